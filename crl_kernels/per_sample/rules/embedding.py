"""The rule for embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layer_gradients import EmbeddingGradient
from .interface import Call, Recorder, as_matrix, differentiable_gradients, take_gradient


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, ids: Tensor, weight: Tensor, padding_idx: int, sparse: bool) -> Tensor:
        ctx.call, ctx.padding_idx, ctx.sparse = call, padding_idx, sparse
        ctx.save_for_backward(ids, weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Any:
        inputs = ids, weight = ctx.saved_tensors
        call = ctx.call
        if torch.is_grad_enabled():
            derivatives = differentiable_gradients(lambda i, w: F.embedding(i, w, ctx.padding_idx), inputs, b)
            return None, *derivatives, None, None
        if ctx.padding_idx >= 0:
            b = b * (ids != ctx.padding_idx)[..., None]
        rows = call.rows(b, range(b.dim() - 1))
        by_weight = None
        if rows is not None:
            sample_ids, gradients = rows.tokens(ids[..., None], b)
            by_weight = take_gradient(
                ctx, call, 0, inputs, lambda: EmbeddingGradient(sample_ids[..., 0], gradients, weight.shape[0])
            )
        if by_weight is None and not call.skips(0):
            by_weight = torch.zeros_like(weight).index_add_(0, ids.flatten(), as_matrix(b).to(weight.dtype))
            call.note_gradient(0, by_weight)
        if ctx.sparse and by_weight is not None:
            by_weight = torch.sparse_coo_tensor(ids.flatten()[None], as_matrix(b).to(weight.dtype), weight.shape)
        return None, None, by_weight, None, None


def embedding(
    recorder: Recorder,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    operand = recorder.operand(weight)
    if operand is None:
        return NotImplemented
    if scale_grad_by_freq:
        raise ValueError(
            "an Embedding with scale_grad_by_freq=True divides gradients by how often an id occurs in the batch, so "
            "there are no per-sample gradients. Build it with scale_grad_by_freq=False."
        )
    if max_norm is not None:
        return NotImplemented
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return _Embedding.apply(recorder.call(operand), input, weight, padding, sparse)
