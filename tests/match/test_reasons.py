"""Attentions in spellings that are not read: each is refused, by both doors, with the reason that is true of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter

WIDTH, HEADS, DIM, TOKENS = 32, 4, 8, 6


def _x() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


class Projects(nn.Module):
    """Queries, keys and values [B, heads, T, DIM] of ``x [B, T, 32]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (m(x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for m in (self.q, self.k, self.v))
        return q, k, v

    def merged(self, mixed: Tensor) -> Tensor:
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class TalkingTwice(Projects):
    """Scores and weights are both mixed between heads."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.merged(weights @ v)


class TalkingByEinsum(Projects):
    """Likewise, by einsum with a stored matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = (nn.Parameter(torch.randn(HEADS, HEADS)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = torch.einsum("bhij,hg->bgij", q @ k.transpose(-2, -1), self.before)
        return self.merged(torch.einsum("bhij,hg->bgij", scores.softmax(-1), self.after) @ v)


class TalkingClass(TalkingByEinsum):
    """Likewise, where what asks is a learned class token before it has seen anything."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        (_, k, v), (q, _, _) = self.heads(x), self.heads(self.token.expand(len(x), -1, -1))
        scores = torch.einsum("bhij,hg->bgij", q @ k.transpose(-2, -1), self.before)
        return self.merged(torch.einsum("bhij,hg->bgij", scores.softmax(-1), self.after) @ v)


class SummedByHand(Projects):
    """Both products are elementwise, then summed."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q[:, :, :, None] * k[:, :, None]).sum(-1).softmax(-1)
        return self.merged((weights[..., None] * v[:, :, None]).sum(-2))


class SummedAdditive(Projects):
    """Keras' AdditiveAttention: features of sums of queries and keys are weighted and summed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(DIM) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = (torch.tanh(q[:, :, :, None] + k[:, :, None]) * self.scale).sum(-1)
        return self.merged(scores.softmax(-1) @ v)


class Additive(Projects):
    """A learned function of each query and key together."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = self.score(torch.tanh(q[:, :, :, None] + k[:, :, None])).squeeze(-1).softmax(-1)
        return self.merged(weights @ v)


class SoftFeatures(Projects):
    """Linear attention whose features are softmaxes, over the features of queries and over the tokens of keys."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v))


class NormalisedLast(Projects):
    """Exponentials are divided by their sum behind the product with values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        raised = (q @ k.transpose(-2, -1)).exp()
        return self.merged((raised @ v) / raised.sum(-1, keepdim=True))


class StoredQueries(Projects):
    """Queries are parameters, by head, that nothing projects."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, HEADS, 3, DIM))

    def forward(self, x: Tensor) -> Tensor:
        _, k, v = self.heads(x)
        return self.merged((self.queries @ k.transpose(-2, -1)).softmax(-1) @ v)


class Unprojected(Projects):
    """Tokens are compared with themselves."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o((x @ x.transpose(-2, -1)).softmax(-1) @ x)
        return out


class Adapted(Projects):
    """A low-rank adapter beside the queries' projection, added to the heads that are laid out already."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Sequential(nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        _, k, v = self.heads(x)
        q, added = (m(x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for m in (self.q, self.adapter))
        q = q + 0.5 * added
        return self.merged((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class HeadByHead(Projects):
    """A projection for each head, whose results are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.by_head = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, DIM) for _ in range(HEADS)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.stack([m(x) for m in heads], dim=1) for heads in self.by_head)  # type: ignore[union-attr]
        return self.merged((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class ByChannel(Projects):
    """Features are weighed by features."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(-2, -1) for t in self.heads(x))
        return self.merged(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(-2, -1))


class Warmed(Projects):
    """Each token has a temperature of its own, computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.warmth = nn.Linear(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(
            (q @ k.transpose(-2, -1) * self.warmth(x).transpose(-2, -1)[..., None].exp()).softmax(-1) @ v
        )


class TurnedByHead(Projects):
    """Each head has rotary frequencies of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pace = nn.Parameter(torch.rand(HEADS, 1, DIM // 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        angle = torch.arange(TOKENS)[:, None] * self.pace
        cos, sin = angle.cos(), angle.sin()
        q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (t.chunk(2, dim=-1) for t in (q, k)))
        return self.merged((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class NormalisedByBatch(Projects):
    """A batch normalisation makes keys of what are values without it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.v(x).flatten(0, 1)
        q, k, v = (t.view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for t in (self.q(x), self.norm(rows), rows))
        return self.merged((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class TalkingOnTop(Projects):
    """What is mixed between heads is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(HEADS, HEADS, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-2, -1)
        return self.merged((scores + self.mix(scores)).softmax(-1) @ v)


class WithLearnedToken(Projects):
    """A key and a value that are learned are joined to those of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.further = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.further(x, x, x, need_weights=False)[0]
        return out


class PositionsByHead(Projects):
    """Projected positions are added to the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(HEADS, 6, DIM))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged((q @ (k + self.positions).transpose(-2, -1)).softmax(-1) @ v)


class PooledQueries(Projects):
    """The larger of two neighbouring queries asks for both."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        fewer = q.reshape(*q.shape[:2], -1, 2, DIM).amax(3)
        return self.merged((fewer @ k.transpose(-2, -1)).softmax(-1) @ v)


class BiasedInPart(Projects):
    """All tokens but the first get a bias, in place."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-2, -1)
        near = -(torch.arange(x.shape[1] - 1)[:, None] - torch.arange(x.shape[1] - 1)).abs().float()
        scores[:, :, 1:, 1:] = scores[:, :, 1:, 1:] + near
        return self.merged(scores.softmax(-1) @ v)


class PooledByIndex(PooledQueries):
    """The same by the operator that tells places, too."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        fewer = q.reshape(*q.shape[:2], -1, 2, DIM).max(3).values
        return self.merged((fewer @ k.transpose(-2, -1)).softmax(-1) @ v)


class Landmarks(Projects):
    """Nyström attention: every query is compared with means of keys, and the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        few_q, few_k = (t.unflatten(2, (2, -1)).mean(3) for t in (q, k))
        return self.merged((q @ few_k.transpose(-2, -1)).softmax(-1) @ ((few_q @ k.transpose(-2, -1)).softmax(-1) @ v))


class Summed(Projects):
    """Queries are compared with sums of pairs of keys."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = (t.unflatten(2, (-1, 3)).sum(3) for t in (k, v))
        return self.merged((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class HeadsFirst(Projects):
    """Scores of each row of a table by einsum, heads before rows: [heads, rows, batch, queries, keys]."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2).unflatten(1, (2, -1)).permute(1, 2, 0, 3, 4) for t in self.heads(x))
        weights = torch.einsum("icnhd,jcnhd->hcnij", q, k).softmax(-1)
        mixed = torch.einsum("hcnij,jcnhd->icnhd", weights, v)
        return self.merged(mixed.permute(2, 3, 1, 0, 4).flatten(2, 3))


class Inverted(Projects):
    """Weights enter a product with their own transpose before they meet values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.merged(weights.transpose(-2, -1) @ (weights @ v))


class Gated(Projects):
    """Weights are mixed with stored ones by a learned gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.places = nn.Parameter(torch.rand(HEADS, 1, 1)), nn.Parameter(torch.rand(HEADS, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.merged(((1 - self.gate) * weights + self.gate * self.places) @ v)


class Assigned(Projects):
    """Each token goes to the query that it suits best, whole."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        hard = F.one_hot(weights.argmax(-1), TOKENS).float()
        return self.merged((weights + (hard - weights.detach())) @ v)


class GlobalAndNear(Projects):
    """Scores with two global keys and with all are joined, weights parted again."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = torch.cat([q @ k[:, :, :2].transpose(-2, -1), q @ k.transpose(-2, -1)], -1)
        weights = scores.softmax(-1)
        return self.merged(weights[..., :2] @ v[:, :, :2] + weights[..., 2:] @ v)


class GatheredKeys(Projects):
    """Each of two blocks of queries meets its own keys and the first ones."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        own = torch.tensor([[0, 1, 2], [3, 4, 5]])
        near = torch.cat([own, torch.zeros(2, 1, dtype=torch.long)], 1)
        scores = q[:, :, own] @ k[:, :, near].transpose(-2, -1)
        return self.merged((scores.softmax(-1) @ v[:, :, near]).flatten(2, 3))


class ChosenQueries(Projects):
    """Queries are added up where a router says."""

    def forward(self, x: Tensor) -> Tensor:
        _, k, v = self.heads(x)
        rows = self.q(x).flatten(0, 1)
        order = rows.sum(-1).argsort()
        q = torch.zeros_like(rows).index_add(0, order, rows[order]).view(*x.shape[:2], HEADS, DIM).transpose(1, 2)
        return self.merged((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class Indexed(Projects):
    """An indexer's scores, added up over heads of their own, say which keys are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.index_q, self.index_k, self.weight = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, DIM),
            nn.Linear(WIDTH, HEADS),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        index = self.index_q(x).view(*x.shape[:2], HEADS, DIM)
        found = torch.einsum("bshd,btd->bsht", index, self.index_k(x)).relu()
        best = torch.einsum("bsht,bsh->bst", found, self.weight(x)).topk(3, dim=-1).indices
        hidden = torch.full((*x.shape[:2], x.shape[1]), float("-inf")).scatter(-1, best, 0.0)
        return self.merged((q @ k.transpose(-2, -1) + hidden[:, None]).softmax(-1) @ v)


class Unbatched(Projects):
    """One head over a sequence without a batch."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x[0]) for f in (self.q, self.k, self.v))
        return x + (q @ k.transpose(-2, -1)).softmax(-1) @ v


class ScaledLate(Projects):
    """Queries are rotated, and then scaled feature by feature."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        turns = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.125]).repeat(2)

        def turned(t: Tensor) -> Tensor:
            first, second = t.chunk(2, -1)
            return t * turns.cos() + torch.cat([-second, first], -1) * turns.sin()

        return self.merged(((turned(q) * torch.arange(1.0, DIM + 1)) @ turned(k).transpose(-2, -1)).softmax(-1) @ v)


class EarlierValues(Projects):
    """Values are mixed with those of the features that came before a nonlinearity, as of an earlier layer."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(F.gelu(self.before(x)))
        _, _, earlier = self.heads(x)
        return self.merged((q @ k.transpose(-2, -1)).softmax(-1) @ (0.25 * v + 0.75 * earlier))


class Differential(Projects):
    """The weights of every other head are subtracted from those of the one before."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-2, -1)).softmax(-1).unflatten(1, (HEADS // 2, 2))
        return self.merged(((weights[:, :, 0] - 0.5 * weights[:, :, 1]).repeat_interleave(2, 1)) @ v)


class AlongEdges(Projects):
    """A graph transformer: each edge's score is normalised by the sum at the node where it ends."""

    pooled = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x.flatten(0, 1)).view(-1, HEADS, DIM) for p in (self.q, self.k, self.v))
        start, end = torch.tensor([0, 1, 2, 3, 4, 5, 0]), torch.tensor([1, 2, 3, 4, 5, 0, 3])
        scores = self.k(x.flatten(0, 1))[start, :HEADS] if self.pooled else (q[end] * k[start]).sum(-1)
        powers, where = scores.exp(), end[:, None].expand(-1, HEADS)
        weights = powers / torch.zeros(len(q), HEADS).scatter_add(0, where, powers)[end]
        summed = torch.zeros_like(v).scatter_add(0, where[..., None].expand(-1, -1, DIM), weights[..., None] * v[start])
        return self.o(summed.reshape(x.shape))


class PooledAlongEdges(AlongEdges):
    """A learned projection of what is pooled is its score."""

    pooled = True


def test_pooling_along_edges_is_no_attention() -> None:
    seen = rewriter.inspect(PooledAlongEdges().eval(), example_inputs=(_x(),))
    assert not seen.sites and not seen.refusals


REASONS: dict[type[Projects], str] = {
    AlongEdges: "along the edges of a graph",
    Indexed: "hidden states choose which keys each query sees",
    Unbatched: "it is one head of one sequence",
    EarlierValues: "sum of projections of different hidden states",
    Inverted: "they enter several products",
    TalkingTwice: "mixed between heads",
    TalkingByEinsum: "mixed between heads",
    TalkingClass: "mixed between heads",
    SummedByHand: "products of elements that are summed by hand",
    Additive: "additive attention",
    SummedAdditive: "additive attention",
    SoftFeatures: "without a softmax of scores",
    NormalisedLast: "normalised by hand in a way that is not read",
    StoredQueries: "that no projection makes",
    Unprojected: "no projection makes keys or values of them",
    Adapted: "merge the adapter into the layer's weights first",
    HeadByHead: "its heads are joined from 4 projections",
    ByChannel: "it weighs features by features",
    NormalisedByBatch: "a batch normalisation stands between projection and scores",
    TalkingOnTop: "mixed between heads",
}


RUN: dict[type[Projects], str] = {
    Differential: "as in differential attention",
    HeadsFirst: "axes in another order than its queries",
    Gated: "they are combined with other numbers first (Mul",
    Assigned: "only the largest of each token's count",
    GlobalAndNear: "its scores are joined from several products",
    Warmed: "scores are multiplied by something computed from hidden states",
    TurnedByHead: "rotated by angles of their own",
    WithLearnedToken: "joined to it (add_zero_attn, add_bias_kv, a prefix); without them it is read",
    PositionsByHead: "numbers of their own for each head (such as projected positions)",
    BiasedInPart: "part of its scores is written over in place",
}
"""What is run whole, and why it is not read."""


@pytest.mark.parametrize("kind", RUN, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("door", ["torch", "file"])
def test_what_is_not_read_is_run_whole(kind: type[Projects], door: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    if door == "torch":
        seen = rewriter.inspect(module, example_inputs=(_x(),))
    else:
        path = tmp_path / "model.onnx"
        torch.onnx.export(module, (_x(),), str(path), dynamo=False, opset_version=17, input_names=["x"])
        seen = rewriter.inspect(path)
    (site,) = seen.sites
    read = kind is HeadsFirst and door == "torch"  # whose einsums are put into order there
    assert not seen.refusals and (site.whole == "" if read else RUN[kind] in site.whole)


@pytest.mark.parametrize("kind", REASONS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("door", ["torch", "file"])
def test_what_is_not_read_is_refused_with_what_is_true_of_it(kind: type[Projects], door: str, tmp_path: Path) -> None:
    module = kind().eval()
    if door == "torch":
        seen = rewriter.inspect(module, example_inputs=(_x(),))
    else:
        path = tmp_path / "model.onnx"
        torch.onnx.export(module, (_x(),), str(path), dynamo=False, opset_version=17, input_names=["x"])
        seen = rewriter.inspect(path)
    assert not seen.sites and seen.refusals and all(REASONS[kind] in r.reason for r in seen.refusals)


class Standing(Projects):
    """Queries that stand out against keys drawn at random attend, the others get the mean (arXiv 2012.07436)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        drawn = k[:, :, torch.randint(x.shape[1], (x.shape[1], 3))]
        scores = (q.unsqueeze(-2) @ drawn.transpose(-2, -1)).squeeze(-2)
        best = (scores.amax(-1) - scores.mean(-1)).topk(2, sorted=False).indices
        places = torch.arange(len(x))[:, None, None], torch.arange(HEADS)[None, :, None], best
        mixed = (q[places] @ k.transpose(-2, -1)).softmax(-1) @ v
        answer = v.mean(2, keepdim=True).expand_as(q).clone()
        answer[places] = mixed
        return self.merged(answer)


def test_scores_that_choose_queries_are_no_attention_of_their_own() -> None:
    seen = rewriter.inspect(Standing().eval(), example_inputs=(_x(),))
    assert ["it draws random numbers in every call" in r.reason for r in seen.refusals] == [True] and not seen.sites


class AdditiveAttention(Projects):
    """A softmax-free mean of gated tokens."""

    def forward(self, x: Tensor) -> Tensor:
        gate = F.normalize(self.q(x), dim=1)
        return self.o((gate * self.k(x)).sum(1, keepdim=True) * self.v(x))


@pytest.mark.parametrize("kind", [AdditiveAttention, Indexed], ids=["without scores", "with scores"])
def test_an_attention_in_which_nothing_is_found_is_not_passed_over(kind: type[Projects]) -> None:
    found = rewriter.inspect(nn.Sequential(kind()).eval(), example_inputs=(_x(),))
    assert [r.name for r in found.refusals] == ["0"]
    assert ("it is called an attention" in found.refusals[0].reason) == (kind is AdditiveAttention)


class FixedCache(Projects):
    """Keys and values are written into tensors of all tokens, at given places."""

    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.copied = copied
        self.register_buffer("keys", torch.randn(2, HEADS, 9, DIM))
        self.register_buffer("values", torch.randn(2, HEADS, 9, DIM))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        q, *new = self.heads(x)
        held = [getattr(self, name).clone() for name in ("keys", "values")]
        for tensor, given in zip(held, new, strict=True):
            if self.copied:
                tensor.index_copy_(2, places, given)
            else:
                tensor[:, :, places] = given
        return self.merged((q @ held[0].transpose(-2, -1)).softmax(-1) @ held[1])


@pytest.mark.parametrize("copied", [True, False])
def test_a_cache_of_fixed_size_is_refused_as_such(copied: bool) -> None:
    seen = rewriter.inspect(FixedCache(copied).eval(), example_inputs=(_x(), torch.arange(TOKENS) + 2))
    assert ["(a cache of fixed size)" in r.reason for r in seen.refusals] == [True]


class ValuesTwice(Projects):
    """An element that is added to itself is one element."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged((q @ k.transpose(-2, -1)).softmax(-1) @ (0.25 * v + 0.75 * v))


def test_parts_of_one_projection_add_up() -> None:
    (site,) = rewriter.inspect(ValuesTwice().eval(), example_inputs=(_x(),)).sites
    assert site.v.rotary is None


class Pools(nn.Module):
    """Tokens weighed by a number that is computed from each alone."""

    def __init__(self, in_channels: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Conv1d(WIDTH, 1, 1) if in_channels else nn.Linear(WIDTH, 1)
        self.value, self.in_channels = nn.Linear(WIDTH, WIDTH), in_channels

    def forward(self, x: Tensor) -> Tensor:
        weights = (
            self.weight(x.transpose(-2, -1)).softmax(-1)
            if self.in_channels
            else self.weight(x).softmax(1).transpose(-2, -1)
        )
        out: Tensor = weights @ self.value(x)
        return out


@pytest.mark.parametrize("in_channels", [False, True], ids=["linear", "convolution"])
def test_pooling_compares_no_tokens(in_channels: bool) -> None:
    seen = rewriter.inspect(Pools(in_channels).eval(), example_inputs=(_x(),))
    assert not seen.sites and not seen.refusals
    assert ["weights for pooling" in n.reason for n in seen.not_attention] == [True]


class MoreQueriesThanKeys(Projects):
    """Causal over another sequence, as cross-attention without a mask is by mistake."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(F.scaled_dot_product_attention(q, k[:, :, :4], v[:, :, :4], is_causal=True))


def test_an_order_of_two_sequences_is_refused_as_such() -> None:
    (refusal,) = rewriter.inspect(MoreQueriesThanKeys().eval(), example_inputs=(_x(),)).refusals
    assert "causal over 4 keys for 6 queries" in refusal.reason


class Unread(Projects):
    """Weights are computed a second time, and thrown away: as they are, with the values that they weigh, or those of
    the very scores that count."""

    def __init__(self, thrown: str) -> None:
        super().__init__()
        self.thrown = thrown

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-2, -1)
        if self.thrown == "of these scores":
            scores.softmax(-1) @ v
        else:
            weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1)
            if self.thrown == "with values":
                weights @ v.transpose(1, 2)
        return self.merged((scores * DIM**-0.5).softmax(-1) @ v)


@pytest.mark.parametrize("thrown", ["weights", "with values", "of these scores"])
def test_a_softmax_that_nothing_reads_is_no_attention(thrown: str) -> None:
    seen = rewriter.inspect(Unread(thrown).eval(), example_inputs=(_x(),))
    assert len(seen.sites) == 1 and not seen.refusals
    assert [n.reason for n in seen.not_attention] == ["nothing reads what it gives"]


class ByToken(nn.Module):
    """Streams [B, T, E, 4] mixed twice, each token by matrices that are made of it, or all alike by those of tokens."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inwards, self.mix = nn.Linear(WIDTH, 4 * WIDTH), nn.ModuleList(nn.Linear(WIDTH, 16) for _ in range(2))
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        streams = self.inwards(x).unflatten(-1, (WIDTH, 4))
        for mix in self.mix:
            matrices = mix(x).unflatten(-1, (4, 4))
            streams = streams @ (matrices.cumsum(1).transpose(1, 2).flip(1)[:, :, :4] if self.tokens else matrices)
        return streams.flatten(2)


def test_matrices_made_of_each_token_mix_no_tokens() -> None:
    assert not rewriter.inspect(ByToken(False).eval(), example_inputs=(_x(),)).refusals


class Streams(nn.Module):
    """Copies of each token, mixed twice by matrices with a row for each copy; or tokens themselves in their place."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(2))
        self.inner, self.back, self.tokens = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1), tokens

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        streams = x.unflatten(1, (-1, 4)) if self.tokens else x[:, :, None].expand(-1, -1, 4, -1)
        for mix in self.mixes:
            mixed = torch.einsum("btsr,btsd->btrd", mix(streams).tanh(), streams)
            added = torch.einsum("btd,bts->btsd", self.inner(mixed[:, :, 0]), self.back(streams)[..., 0].tanh())
            streams = mixed + added
        return streams.flatten(1, 2)


@pytest.mark.parametrize("tokens", [False, True])
def test_copies_of_a_token_that_are_mixed_are_no_attention(tokens: bool) -> None:
    seen = rewriter.inspect(Streams(tokens).eval(), example_inputs=(torch.randn(2, 8, WIDTH),))
    assert not seen.sites and bool(seen.refusals) is tokens


class Blurred(Projects):
    """A convolution over neighbouring tokens stands behind the queries' projection."""

    def __init__(self) -> None:
        super().__init__()
        self.blur, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        _, k, v = self.heads(x)
        q = self.norm(self.blur(self.q(x).transpose(1, 2))).unflatten(1, (HEADS, DIM)).transpose(-2, -1)
        return self.merged((q @ k.transpose(-2, -1)).softmax(-1) @ v)


def test_a_convolution_and_a_norm_behind_a_projection_are_run() -> None:
    torch.manual_seed(0)
    seen = rewriter.inspect(Blurred().eval(), example_inputs=(_x(),))
    assert [bool(s.whole) for s in seen.sites] == [True] and not seen.refusals


class Plain(Projects):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged((q @ k.transpose(-2, -1)).softmax(-1) @ v)


@pytest.mark.parametrize("broken", ["k", "v", None])
def test_operands_that_are_not_finite_are_refused_for_that(broken: str | None) -> None:
    model = Plain().eval()
    if broken is None:
        assert not rewriter.inspect(model, example_inputs=(_x(),)).refusals
        return
    getattr(model, broken).bias.data[3] = float("nan")
    (refusal,) = rewriter.inspect(model, example_inputs=(_x(),)).refusals
    assert f"its {'keys' if broken == 'k' else 'values'} are not finite" in refusal.reason


class Hidden(Projects):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(((q @ k.transpose(-2, -1)) + torch.full((TOKENS, TOKENS), -torch.inf)).softmax(-1) @ v)


class Packed(Projects):
    """Keys and values come in one cache (streaming speech recognisers)."""

    def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v = self.heads(x)
        past_k, past_v = cache.split(DIM, -1)
        k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
        return self.merged((q @ k.transpose(-2, -1)).softmax(-1) @ v), torch.cat((k, v), -1)


def test_what_a_recording_or_a_cache_does_not_tell_is_refused_for_that(tmp_path: Path) -> None:
    (refusal,) = rewriter.inspect(Hidden().eval(), example_inputs=(_x(),)).refusals
    assert "none of its scores is finite" in refusal.reason
    path, given = tmp_path / "packed.onnx", (_x(), torch.randn(len(_x()), HEADS, 3, 2 * DIM))
    axes = {"x": {1: "t"}, "cache": {2: "p"}}
    torch.onnx.export(Packed().eval(), given, str(path), dynamo=False, input_names=["x", "cache"], dynamic_axes=axes)
    (refusal,) = rewriter.inspect(path).refusals
    assert "the cache that comes in as cache is cut into parts (Split)" in refusal.reason


def test_a_class_token_that_is_repeated_for_any_batch_talks_in_files_too(tmp_path: Path) -> None:
    path = tmp_path / "class.onnx"
    axes = {"x": {0: "batch"}}
    torch.onnx.export(TalkingClass().eval(), (_x(),), str(path), dynamo=False, input_names=["x"], dynamic_axes=axes)
    (refusal,) = rewriter.inspect(path).refusals
    assert REASONS[TalkingClass] in refusal.reason


def test_scores_that_no_memory_holds_are_refused_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def replay(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("passes.match.attention.replay", replay)
    (refusal,) = rewriter.inspect(Plain().eval(), example_inputs=(_x(),)).refusals
    assert "pass example_inputs of fewer tokens" in refusal.reason
