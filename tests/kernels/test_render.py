"""What reaches templates, and what comes out of them."""

from __future__ import annotations

import contextlib
import enum
import re
from dataclasses import fields, replace
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegen import hooks, render
from codegen.device import DType, Isa
from codegen.errors import UnsafeInput
from codegen.ops.grouped_query_attention.cpp_kernel import kernel_name, source
from codegen.ops.linear_attention import cpp_kernel as linear_cpp
from codegen.ops.mixed_chunk_attention import cpp_kernel as chunk_cpp
from codegen.sight import Sight
from codegen.spec import FeatureMap, GroupedQueryAttention, LinearAttention, MixedChunkAttention
from tests.kernels.golden_source import CHANGES, require_golden
from tests.kernels.problems import CAUSAL, EVERYTHING, MULTI_QUERY, SPARSE

GOLDEN = {
    "causal_f32_avx512": (CAUSAL, DType.FLOAT32, Isa.AVX512),
    "everything_f16_avx2": (EVERYTHING, DType.FLOAT16, Isa.AVX2),
    "multi_query_bf16_avx512_bf16": (MULTI_QUERY, DType.BFLOAT16, Isa.AVX512_BF16),
    "multi_query_bf16_avx512_bf16_amx": (MULTI_QUERY, DType.BFLOAT16, Isa.AMX),
    "strided_f32_avx2": (SPARSE["strided"], DType.FLOAT32, Isa.AVX2),
}

CHUNKS = MixedChunkAttention(12, 20, 6, chunk=7, causal=True)
LINEAR = LinearAttention(GroupedQueryAttention(4, 2, 6, 5, 0.4, causal=True), 20)

HOSTILE = ['1); system("id"); //', "64", "{{ 7 * 7 }}", "h\n#include </etc/passwd>", "", "inf", b"64", ["64"], object()]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_source(name: str) -> None:
    require_golden(f"{name}.cpp", source(*GOLDEN[name]))


def test_golden_source_of_linear_attention() -> None:
    require_golden("linear_f32_avx512.cpp", linear_cpp.source(LINEAR, DType.FLOAT32, Isa.AVX512))


@pytest.mark.parametrize(
    "change",
    [{"heads": 6}, {"kv_heads": 1}, {"head_dim": 7}, {"value_dim": 9}, {"causal": False},
     {"chunk": 24}, {"features": FeatureMap.ELU1}],
    ids=str,
)  # fmt: skip
def test_every_field_of_linear_attention_changes_the_source_and_the_name(change: dict[str, Any]) -> None:
    outer = {name: change[name] for name in change.keys() & {"chunk", "features"}}
    inner = {name: change[name] for name in change.keys() - outer.keys()}
    specs = (LINEAR, replace(LINEAR, attention=replace(LINEAR.attention, **inner), **outer))
    texts = [linear_cpp.source(s, DType.FLOAT32, Isa.AVX512) for s in specs]
    names = [str(linear_cpp.kernel_name(s, DType.FLOAT32, Isa.AVX512)) for s in specs]
    assert names[0] != names[1]
    assert _code(texts[0], names[0]) != _code(texts[1], names[1])


def test_kernels_of_linear_attention_are_told_the_scale_when_they_are_called() -> None:
    other = replace(LINEAR, attention=replace(LINEAR.attention, scale=0.5))
    assert linear_cpp.source(LINEAR, DType.FLOAT32, Isa.AVX2) == linear_cpp.source(other, DType.FLOAT32, Isa.AVX2)
    assert linear_cpp.scales(LINEAR) != linear_cpp.scales(other)


def test_golden_source_of_mixed_chunk_attention() -> None:
    require_golden("chunks_bf16_avx2.cpp", chunk_cpp.source(CHUNKS, DType.BFLOAT16, Isa.AVX2))


@pytest.mark.parametrize(
    "change", [{"expanded": 24}, {"base": 8}, {"chunk": 9}, {"causal": False}, {"averaged": False}], ids=str
)
def test_every_size_of_mixed_chunk_attention_changes_the_source_and_the_name(change: dict[str, Any]) -> None:
    specs = (CHUNKS, replace(CHUNKS, **change))
    texts = [chunk_cpp.source(s, DType.FLOAT32, Isa.AVX512) for s in specs]
    names = [str(chunk_cpp.kernel_name(s, DType.FLOAT32, Isa.AVX512)) for s in specs]
    assert names[0] != names[1]
    assert _code(texts[0], names[0]) != _code(texts[1], names[1])


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_field_changes_the_source_and_the_name(change: dict[str, Any]) -> None:
    other = replace(EVERYTHING, **change)
    before, after = (source(s, DType.FLOAT32, Isa.AVX512) for s in (EVERYTHING, other))
    names = [str(kernel_name(s, DType.FLOAT32, Isa.AVX512)) for s in (EVERYTHING, other)]
    assert names[0] != names[1]
    assert _code(before, names[0]) != _code(after, names[1]), "the field only changes a name or a comment"


@pytest.mark.parametrize("field", [f.name for f in fields(Sight)])
def test_every_number_of_a_pattern_changes_the_source_and_the_name(field: str) -> None:
    sight = SPARSE["all at once"].pattern[0]
    changed = not sight.ordered if field == "ordered" else getattr(sight, field) + 1
    specs = [replace(SPARSE["all at once"], pattern=(s,)) for s in (sight, replace(sight, **{field: changed}))]
    texts = [source(s, DType.FLOAT32, Isa.AVX512) for s in specs]
    names = [str(kernel_name(s, DType.FLOAT32, Isa.AVX512)) for s in specs]
    assert names[0] != names[1]
    assert _code(texts[0], names[0]) != _code(texts[1], names[1])


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_but_numbers_comes_through_a_pattern(hostile: Any) -> None:
    sight = Sight(reach=3)
    object.__setattr__(sight, "sinks", hostile)
    spec = replace(CAUSAL, pattern=(sight,))
    with pytest.raises(UnsafeInput):
        source(spec, DType.FLOAT32, Isa.AVX512)
    with pytest.raises(UnsafeInput):
        render.fingerprint(spec)


def test_every_format_and_instruction_set_changes_the_source() -> None:
    found = {_code(source(CAUSAL, d, i), str(kernel_name(CAUSAL, d, i))) for d in DType for i in Isa}
    # where their bfloat16 instructions are not used, AVX512_BF16 and AMX are AVX512
    assert len(found) == 3 * 4 - 2 * 2


def _code(text: str, name: str) -> str:
    return "\n".join(line for line in text.replace(name, "NAME").splitlines() if not line.startswith("//"))


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["heads", "head_dim", "scale", "causal", "softcap", "sinks"])
def test_nothing_but_numbers_and_flags_comes_through_a_spec(field: str, hostile: Any) -> None:
    spec = replace(CAUSAL)
    object.__setattr__(spec, field, hostile)
    with pytest.raises((UnsafeInput, TypeError)):
        source(spec, DType.FLOAT32, Isa.AVX512)
    with pytest.raises(UnsafeInput):
        render.fingerprint(spec)


class _Text(str):
    pass


class _Count(int):
    def __str__(self) -> str:
        return "1; evil()"


class _Foreign(enum.Enum):
    VALUE = "evil()"


@pytest.mark.parametrize(
    "value", [_Text("64"), _Count(64), _Foreign.VALUE, float("nan"), float("inf"), 2**70, {"a": "b"}, [_Count(1)]],
    ids=repr,
)  # fmt: skip
def test_disguises_are_seen_through(value: Any) -> None:
    with pytest.raises(UnsafeInput):
        render.render("cpp/numbers.h.j2", {"dtype": DType.FLOAT32, "lanes": value})


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render.render("cpp/numbers.h.j2", {})


@given(st.text(min_size=1, max_size=40))
def test_names_hold_letters_digits_and_underscores_or_are_refused(text: str) -> None:
    for make in (render.word, lambda t: render.identifier("gqa", [t], CAUSAL)):
        with contextlib.suppress(UnsafeInput):
            assert re.fullmatch(r"[A-Za-z0-9_]+", str(make(text)))


@given(
    st.integers(1, 64), st.integers(1, 8), st.integers(1, 512), st.integers(1, 512),
    st.floats(allow_nan=False, allow_infinity=False, width=32), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_honest_spec_renders(
    group: int, kv: int, d: int, e: int, scale: float, causal: bool, bias: bool, sinks: bool
) -> None:
    spec = GroupedQueryAttention(group * kv, kv, d, e, scale, causal=causal, bias=bias, sinks=sinks)
    text = source(spec, DType.FLOAT32, Isa.AVX512)
    assert f"D = {d}, E = {e};" in text and "{{" not in text and "{%" not in text


def test_one_tree_in_three_languages() -> None:
    spec = GroupedQueryAttention(2, 1, 4, 4, 0.5, softcap=2.0, bias=True, causal=True)
    tree = hooks.score_expression(spec)
    assert str(hooks.lower(tree, "cuda")) == "(tanhf(score * 0x1.0000000000000p-2f) * 0x1.0000000000000p+1f + bias)"
    assert str(hooks.lower(tree, "triton")) == "(tanh_of(score * 0.25) * 2.0 + bias)"
    assert str(hooks.lower(tree, "cpp")).startswith("(tanh_of(score * splat(0x1.0")
    assert str(hooks.last_key(spec, "triton")) == "rows[:, None] + (keys - queries)"
    assert hooks.last_key(replace(spec, causal=False), "cpp") is None


def test_with_a_bias_scores_stay_in_base_e() -> None:
    """The lowest finite number times log2(e) would be minus infinity, and a hidden row would lose its mean."""
    plain = GroupedQueryAttention(2, 1, 4, 4, 0.5)
    assert hooks.folded_expression(plain) != hooks.score_expression(plain)
    biased = replace(plain, bias=True)
    assert hooks.folded_expression(biased) == hooks.score_expression(biased)
