"""Sites whose output no formula gives once heads are shared: the program itself is run with them.

What lies between projections and scores may be known by running only (pooled tokens, rotations that are not read), or
keys may bias the scores on ways of their own. Shared heads are then put where the projections give them, repeated, and
the program goes on from there: what arrives at the output projection is what it will read, and it is refitted to that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from passes.activations import attending
from passes.dataflow import Array, Flow, Value
from passes.match.attention import Evidence
from passes.paired_runs import PairedRuns
from passes.protocols import Trial
from passes.site import AttentionSite, Operand
from passes.targets.freedom import output_stays
from passes.targets.replacement import Replacement
from passes.weights.head_gains import stored_gains
from passes.weights.projection import merge_orders, merges_in_order
from passes.weights.refit import Folded


def can_run(pair: PairedRuns, site: AttentionSite) -> bool:
    """Whether heads can be put where a site's projections give them before anything has read them."""
    flow = pair.flow
    if pair.ahead or len(pair.sharing(site)) > 1:
        return False
    for operand in site.operands:
        projection = operand.projection
        plain = projection.bias_index is None and projection.weight_axes is None and projection.factor == 1.0
        if not plain or stored_gains(operand) or flow.shape(projection.output)[-1] != projection.features:
            return False
    earlier = [flow.producer(s.out.output) for s in pair.matches.sites if s.anchor < site.anchor and s.out is not None]
    stands = max((node.index for node in earlier if node is not None), default=-1)
    readers = [n.index for o in site.operands for n in flow.consumers(o.projection.output)]
    return min(readers, default=-1) > stands


def run_refitted(pair: PairedRuns, made: Replacement, reference: Sequence[Array] | None = None) -> Replacement:
    """`made`, of a site for which `can_run` holds, with its output projection refitted where that reads the heads in
    order and may change. The students then stand behind it, and hold it.

    Args:
        reference: what the teachers' output projection gave, None if they have not come so far.
    """
    flow, site, out = pair.flow, made.site, made.site.out
    for run in pair.students:
        _put_heads(flow, run, made)
    if out is None or not merges_in_order(flow, site) or output_stays(flow, site) is not None:
        return made
    wished = (
        [t.advance(out.output, {out.output})[out.output] for t in pair.teachers] if reference is None else reference
    )
    evidence = pair.matches.evidence[site.name]
    # by its rows which tokens they are of, and by queries and keys which of these ask
    tells = not (site.cross or site.whole) and "batch" in merge_orders(flow, site)
    masks = {m.value for m in evidence.path.modifiers if m.value is not None}
    names = ({evidence.path.q.value, evidence.path.k.value} | masks) - set(flow.weights) if tells else set[Value]()
    seen = [run.advance(out.input, names | {out.input}) for run in pair.students]
    constant = out.bias is not None
    features = [_features(s[out.input], site, constant=constant) for s in seen]
    known = _known(flow, made)
    equations = Folded()
    for values, x, y in pair.fit(list(zip(seen, features, wished, strict=True))):
        asking = _asking(flow, values, evidence, len(x)) if tells else np.ones(len(x), dtype=bool)
        equations.add(x[asking], y.reshape(len(x), -1)[asking])
    solved = equations.solve(known, constant=constant)
    for run, x, y in zip(pair.students, features, wished, strict=True):
        run.advance(out.output, {out.output})
        run.put(out.output, (x @ solved.T).reshape(y.shape))
    columns = solved[:, :-1] if constant else solved
    tensors = {**made.tensors, "out_weight": columns.astype(flow.value(out.weight).dtype, order="C")}
    if out.bias is not None:
        tensors["out_bias"] = solved[:, -1].astype(flow.value(out.bias).dtype)
    return replace(made, tensors=tensors, exact=False)


def _put_heads(flow: Flow, run: Trial, made: Replacement) -> None:
    """Let what follows the projections read the new heads, of keys and values each repeated for those it stands for."""
    changed: dict[Value, list[tuple[str, Operand]]] = {}
    queries = [("q", made.site.q)] if "q_weight" in made.tensors else []
    for role, operand in (*made.site.shared, *queries):
        changed.setdefault(operand.projection.output, []).append((role, operand))
    place = {output: node.index for output in changed if (node := flow.producer(output)) is not None}
    for output in sorted(changed, key=lambda value: place.get(value, -1)):
        given = changed[output][0][1].projection.input
        seen = run.advance(output, {output, given})
        new = np.array(seen[output], copy=True)
        for role, operand in changed[output]:
            heads = made.grouped.heads if role == "q" else made.grouped.kv_heads
            index = np.arange(operand.heads) * heads // operand.heads
            rows = np.asarray(made.tensors[f"{role}_weight"], dtype=new.dtype)
            shared = seen[given] @ rows.T
            if (bias := made.tensors.get(f"{role}_bias")) is not None:
                shared = shared + np.asarray(bias, dtype=new.dtype)
            by_head = shared.reshape(*shared.shape[:-1], heads, operand.dim)[..., index, :]
            new[..., operand.columns] = by_head.reshape(*new.shape[:-1], *operand.columns.shape)
        run.put(output, new)


def _features(read: Array, site: AttentionSite, *, constant: bool) -> Array:
    """[rows, heads * value_dim] of what the output projection reads, with a last feature of 1 if there is a bias."""
    rows = np.asarray(read, dtype=np.float32).reshape(-1, site.heads * site.value_dim)
    return np.concatenate([rows, np.ones((len(rows), 1), rows.dtype)], axis=1) if constant else rows


def _known(flow: Flow, made: Replacement) -> Array:
    """[E, features] of the output projection as `made` leaves it, its bias last."""
    out = made.site.out
    assert out is not None
    matrix = np.asarray(out.matrix(flow.value(out.weight)), dtype=np.float64)
    weight = np.asarray(made.tensors.get("out_weight", matrix if out.out_first else matrix.T), dtype=np.float64)
    if out.bias is None:
        return weight
    bias = np.asarray(made.tensors.get("out_bias", flow.value(out.bias)), dtype=np.float64)
    return np.concatenate([weight, bias.reshape(-1, 1)], axis=1)


def _asking(flow: Flow, seen: Mapping[Value, Array], evidence: Evidence, rows: int) -> Array:
    """Which rows of the output projection count: not those of tokens that no query sees, where there are as many."""
    here = replace(flow, read=lambda name: seen[name] if name in seen else flow.read(name))
    shown = attending(here, evidence)
    return shown.reshape(-1) if shown.size == rows else np.ones(rows, dtype=bool)
