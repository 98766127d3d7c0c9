"""Rules: how a function that takes parameters runs, so that its backward pass gives per-sample gradients.

To add a rule for a layer:
    1. Write ``rule(recorder, *arguments)`` in this folder; ``linear.py`` is the model to copy. It returns
       ``NotImplemented`` where it does not apply.
    2. Run the function inside an ``autograd.Function`` on ``recorder.call(*operands)``, the parameters by slot.
    3. In its backward pass, ``call.rows(b, dims)`` says which samples the rows of the output's gradient b belong to,
       or None. If rows are known, give each operand's per-sample gradients to ``take_gradient``; else return the sum.
    4. Add the function to ``RULES``, and a case to ``CASES`` in tests/helpers/layer_cases.py.

The gradient by the input is always the ordinary one. ``any_function`` serves every function without a rule, with one
backward pass for each sample. A backward pass with create_graph=True, for a loss that contains a derivative, runs
PyTorch's own functions.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .broadcast import attention, broadcast_to, elementwise, expand, expand_as, repeat, set_item, where
from .convolution import convolution, transposed_convolution
from .embedding import embedding
from .linear import addmm, linear, matmul
from .norms import batch_norm, group_norm, instance_norm, layer_norm, rms_norm

_ELEMENTWISE = (
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_),
    *(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, Tensor.__isub__, Tensor.sub_),
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, Tensor.mul_),
    *(torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide, Tensor.__itruediv__, Tensor.div_),
    *(torch.pow, Tensor.pow, Tensor.__pow__, torch.maximum, torch.minimum),
)

RULES: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    torch.mm: matmul,
    Tensor.mm: matmul,
    torch.addmm: addmm,
    torch.conv1d: convolution(1),
    torch.conv2d: convolution(2),
    torch.conv3d: convolution(3),
    torch.conv_transpose1d: transposed_convolution(1),
    torch.conv_transpose2d: transposed_convolution(2),
    torch.conv_transpose3d: transposed_convolution(3),
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.embedding: embedding,
    F.scaled_dot_product_attention: attention,
    Tensor.expand: expand,
    Tensor.expand_as: expand_as,
    torch.broadcast_to: broadcast_to,
    Tensor.broadcast_to: broadcast_to,
    Tensor.repeat: repeat,
    Tensor.__setitem__: set_item,
    torch.where: where,
    Tensor.where: lambda recorder, value, condition, other: where(recorder, condition, value, other),
    **{function: elementwise(function) for function in _ELEMENTWISE},
}
