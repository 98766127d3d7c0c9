"""The operators of ``torch.ops.crl_kernels``: every schema and every fake kernel.

``backends/reference.py`` says what an operator computes; the compiled libraries register faster implementations of the
same schemas. A list of tensors stands for one flat vector.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import reference, registry

SCHEMAS = (
    "low_rank_projections(Tensor[] params, Tensor[] directions, int num_terms) -> Tensor",
    "low_rank_combine(Tensor[] directions, Tensor coefficients, Tensor[] like) -> Tensor[]",
    "low_rank_accumulate_(Tensor(a!)[] targets, Tensor[] directions, Tensor coefficients) -> ()",
    "low_rank_penalty_accumulate_(Tensor(a!)[] targets, Tensor[] params, Tensor[] directions, Tensor curvatures,"
    " Tensor anchor_projections, Tensor coefficient) -> Tensor",
    "diagonal_quadratic(Tensor[] params, Tensor[] fisher, Tensor[] anchor) -> Tensor",
    "diagonal_gradient(Tensor[] params, Tensor[] fisher, Tensor[] anchor, Tensor coefficient) -> Tensor[]",
    "diagonal_accumulate_(Tensor(a!)[] targets, Tensor[] params, Tensor[] fisher, Tensor[] anchor, Tensor coefficient)"
    " -> Tensor",
    "diagonal_shrink_(Tensor(a!)[] params, Tensor[] fisher, Tensor[] anchor, Tensor strength) -> ()",
    "low_rank_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor settings, Tensor? found_inf, Tensor[] directions, Tensor coefficients, bool decoupled,"
    " Tensor(d!)[]? roundings=None) -> Tensor",
    "diagonal_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor settings, Tensor? found_inf, Tensor[] fisher, Tensor[] anchor, bool decoupled,"
    " Tensor(d!)[]? roundings=None) -> Tensor",
    "sample_weight_gradients(Tensor input, Tensor grad_output, int[] kernel_size, int[] stride, int[] padding,"
    " int[] dilation, int groups, Tensor? directions, bool gram, bool squares)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "sample_gradient_stats(Tensor grads, Tensor? directions, bool diagonal) -> Tensor[]",
    "sample_gram(Tensor grads) -> Tensor",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)

_library = torch.library.Library("crl_kernels", "DEF")
# An operator on lists keeps tables of addresses, which an eager call writes into memory of its own. Under
# torch.compile(mode="reduce-overhead") that memory would be of a CUDA graph's pool, which takes it back.
_KEEPS_TABLES = (torch.Tag.cudagraph_unsafe,)
for _schema, _name in zip(SCHEMAS, NAMES, strict=True):
    _library.define(_schema, tags=_KEEPS_TABLES if _name.startswith(("low_rank_", "diagonal_")) else ())
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
registry.register(NAMES)

ops = torch.ops.crl_kernels


# Fake kernels: shapes and dtypes of results, for torch.compile and torch.export.


@reference.takes(reference.Convolution)
def _fake_sample_weight_gradients(
    convolution: reference.Convolution, directions: Tensor | None, gram: bool, squares: bool
) -> tuple[Tensor, ...]:
    input, weight = convolution.input, convolution.weight_shape
    count, num_directions = input.shape[0], 1 if directions is None else directions.shape[0]
    side = count if gram else 0
    dtype, float64 = reference.mean_dtype(input.dtype), torch.float64
    return (
        input.new_empty(weight, dtype=dtype),
        input.new_empty(count, dtype=float64),
        input.new_empty(count, num_directions, dtype=float64),
        input.new_empty(side, side, dtype=float64),
        input.new_empty(weight if squares else 0, dtype=dtype),
    )


def _float64(params: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    return params[0].new_empty(shape, dtype=torch.float64)


def _fake_stats(grads: Tensor, directions: Tensor | None, diagonal: bool) -> list[Tensor]:
    num_rows, num_columns = grads.shape
    dtype = reference.mean_dtype(grads.dtype)
    mean, *squares = [grads.new_empty(num_columns, dtype=dtype) for _ in range(1 + diagonal)]
    projections = (num_rows,) if directions is None else (num_rows, directions.shape[0])
    return [mean, _float64([grads], (num_rows,)), _float64([grads], projections), *squares]


_FAKES: dict[str, Callable[..., Any]] = {
    "low_rank_projections": lambda params, directions, num_terms: _float64(params, (num_terms,)),
    "low_rank_combine": lambda directions, coefficients, like: list(map(torch.empty_like, like)),
    "low_rank_accumulate_": lambda targets, directions, coefficients: None,
    "low_rank_penalty_accumulate_": lambda targets, params, directions, a, b, coefficient: _float64(params, ()),
    "diagonal_quadratic": lambda params, fisher, anchor: _float64(params, ()),
    "diagonal_gradient": lambda params, fisher, anchor, coefficient: list(map(torch.empty_like, params)),
    "diagonal_accumulate_": lambda targets, params, fisher, anchor, coefficient: _float64(params, ()),
    "diagonal_shrink_": lambda params, fisher, anchor, strength: None,
    "low_rank_adamw_": lambda params, grads, m, v, settings, found_inf, directions, coefficients, *options: _float64(
        params, (coefficients.numel(),)
    ),
    "diagonal_adamw_": lambda params, *arguments: _float64(params, ()),
    "sample_weight_gradients": _fake_sample_weight_gradients,
    "sample_gradient_stats": _fake_stats,
    "sample_gram": lambda grads: _float64([grads], (grads.shape[0], grads.shape[0])),
}

for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"crl_kernels::{_name}", _fake)
