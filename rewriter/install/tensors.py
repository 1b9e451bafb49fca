"""New parameters out of tensors: by head, and without keeping larger storages alive."""

from __future__ import annotations

from torch import Tensor, nn


def repeat_heads(rows: Tensor, heads: int, repeats: int) -> Tensor:
    """[heads * dim, ...] -> [heads * repeats * dim, ...], each head followed by its copies."""
    by_head = rows.view(heads, -1, *rows.shape[1:])
    return by_head.repeat_interleave(repeats, dim=0).flatten(0, 1)


def owned_parameter(tensor: Tensor, like: Tensor, trainable: bool) -> nn.Parameter:
    """`tensor` itself if it is a parameter; else a contiguous one of `like`'s dtype, on its device.

    Storage is shared with `tensor` only where `tensor` fills it.
    """
    if isinstance(tensor, nn.Parameter):
        return tensor
    tensor = tensor.detach().to(device=like.device, dtype=like.dtype).contiguous()
    if tensor.untyped_storage().nbytes() > tensor.nbytes:
        tensor = tensor.clone()
    return nn.Parameter(tensor, requires_grad=trainable)
