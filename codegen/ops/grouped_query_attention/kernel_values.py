"""What kernels of grouped-query attention say alike in every language: names, template values, and what none can do."""

from __future__ import annotations

from typing import Any

from codegen import hooks
from codegen.device import DType
from codegen.render import identifier, numbers
from codegen.spec import GroupedQueryAttention


def name_of(prefix: str, spec: GroupedQueryAttention, dtype: DType, arch: str) -> hooks.Lowered:
    """Readable, unique to the spec, and nothing but letters, digits and underscores."""
    flags = {"causal": spec.causal, "bias": spec.bias, "softcap": spec.softcap is not None, "sinks": spec.sinks}
    flags["zero"] = spec.masked_rows_are_zero
    words = [f"h{spec.heads}", f"kv{spec.kv_heads}", f"d{spec.head_dim}"]
    words += [f"e{spec.value_dim}"] * (spec.value_dim != spec.head_dim)
    words += [word for word, present in flags.items() if present]
    words += [f"sparse{len(spec.pattern)}"] * bool(spec.pattern)
    return identifier(prefix, [*words, dtype.short, arch], spec)


def values_of(spec: GroupedQueryAttention, dtype: DType, language: str) -> dict[str, Any]:
    """Template values that follow from the spec alone, its score modifiers lowered into the language.

    Raises UnsafeInput if the spec holds anything but numbers and flags.
    """
    return {
        "fields": numbers(spec),
        "dtype": dtype,
        "kv_heads": spec.kv_heads,
        "group": spec.group,
        "head_dim": spec.head_dim,
        "value_dim": spec.value_dim,
        "causal": spec.causal,
        "bias": spec.bias,
        "sinks": spec.sinks,
        "pattern": [numbers(sight) for sight in spec.pattern],
        "tanh": spec.softcap is not None,
        "masked_rows_are_zero": spec.masked_rows_are_zero,
        "base_two": hooks.in_base_two(spec),
        "score": hooks.lower(hooks.folded_expression(spec), language),
        "last_key": hooks.last_key(spec, language),
    }


def why_not(spec: Any, language: str, most: int, where: str = "", *, sparse: bool = False) -> str | None:
    """Why there is no kernel for heads of up to `most` features in this language, or None if there is one.

    `sparse`: kernels in this language follow patterns.
    """
    if not isinstance(spec, GroupedQueryAttention):
        return f"there is no {language} kernel of {type(spec).__name__}"
    if spec.pattern and not sparse:
        return f"there is no {language} kernel of sparse attention"
    if max(spec.head_dim, spec.value_dim) > most:
        return f"heads of more than {most} features do not fit the kernel's tile{where}"
    if spec.softcap is not None and not spec.softcap > 0:
        return "a softcap must be positive"
    return None
