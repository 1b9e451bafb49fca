"""Linear attention by a generated kernel where one was asked for, else by torch.

Shape legend: B batch, H query heads, N key/value heads, S queries, T keys, D head_dim, V value_dim.
"""

from __future__ import annotations

from torch import Tensor

from codegen.errors import NotLegal
from codegen.launch import linear_operator
from codegen.ops.linear_attention.torch_body import Parameters, linear_attention
from codegen.spec import LinearAttention


def attention(
    spec: LinearAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: Parameters,
    shown: Tensor | None = None,
    *,
    kernels: str = "auto",
) -> Tensor:
    """[B, H, S, V] in q's dtype; arguments as `torch_body.linear_attention`, which stands in for a kernel with "off",
    and with "auto", since no kernel was measured to be faster.

    Raises:
        NotLegal: a language was asked for by name and has no kernel of this.
        ValueError: operands that contradict the spec.
    """
    if kernels in ("auto", "off"):
        return linear_attention(spec, q, k, v, parameters, shown)
    if kernels != "triton":
        raise NotLegal(f"there is no {kernels} kernel of linear attention", hint='use kernels="auto" or "off"')
    return linear_operator.attention(spec, q, k, v, parameters, shown)
