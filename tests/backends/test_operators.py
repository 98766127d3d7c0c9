"""Every operator, on every backend that runs here, against float64 formulas, on hostile lists of tensors."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch
from helpers.backends import (
    BACKENDS,
    CHUNK,
    DTYPES,
    EXAMPLES,
    INSTRUCTION_SETS,
    MANY,
    ROUNDING,
    assert_pass_with_narrower_loops,
    assert_rounded_once,
    assert_sum_close,
    cpp_loops,
    direction_form,
    directions_like,
    flat64,
    for_narrower_loops,
    form,
    in_other_orders,
    int8_directions,
    layout,
    length,
    lists,
    needs_cpu_library,
    needs_library,
    needs_x86_linux,
    poison,
    random_lists,
    runs_here,
    threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import crl_kernels
from crl_kernels.backends import registry
from crl_kernels.operators import definitions


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=EXAMPLES)
@given(
    case=lists,
    num_terms=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "bfloat16", "float64", "float16"]),
    form=direction_form,
    seed=st.integers(0, 2**30),
)
def test_low_rank_operators(backend, case, num_terms, dtype, form, seed):
    (params,) = random_lists(case, seed)
    directions, matrix = directions_like(params, num_terms, DTYPES[dtype], form, seed + 1)
    theta = flat64(params)
    poison()
    projections = backend.low_rank_projections(params, directions, num_terms)
    assert projections.dtype == torch.float64
    assert_sum_close(projections, matrix @ theta, matrix.abs() @ theta.abs())

    coefficients = torch.randn(num_terms, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    step, size = coefficients @ matrix, coefficients.abs() @ matrix.abs()
    poison()
    combined = backend.low_rank_combine(directions, coefficients, params)
    like = [torch.empty_like(p) for p in params]  # autograd's order of a gradient
    assert [(t.shape, t.dtype, t.stride()) for t in combined] == [(p.shape, p.dtype, p.stride()) for p in like]
    assert_rounded_once(combined, step, size)

    (targets,) = random_lists(case, seed, writable=True)
    targets = in_other_orders(targets, seed)
    before = flat64(targets)
    along = directions_like(targets, num_terms, DTYPES[dtype], form, seed + 1)[0] if form == "row" else directions
    backend.low_rank_accumulate_(targets, along, coefficients)
    assert_rounded_once(targets, before + step, before.abs() + size)

    a, b, lam = coefficients.abs(), coefficients.flip(0), torch.tensor(1.7, dtype=torch.float64)
    drift = projections - b
    force = lam * a * drift
    before = flat64(targets)
    value = backend.low_rank_penalty_accumulate_(targets, params, directions, a, b, lam)
    size = lam / 2 * (a * (matrix.abs() @ theta.abs() + b.abs()).square()).sum()
    assert_sum_close(value, lam / 2 * (a * drift.square()).sum(), size)
    assert_rounded_once(targets, before + force @ matrix, before.abs() + force.abs() @ matrix.abs())


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=EXAMPLES)
@given(
    case=lists,
    state_dtype=st.sampled_from(["float32", "float64"]),
    form=form,
    seed=st.integers(0, 2**30),
)
def test_diagonal_operators(backend, case, state_dtype, form, seed):
    params, targets = random_lists(case, seed, count=2, writable=True)
    (f, fisher), (m, anchor) = (directions_like(params, 1, DTYPES[state_dtype], form, seed + i) for i in (1, 2))
    f, fisher = [t.abs() for t in f], fisher[0].abs()
    theta, distance = flat64(params), flat64(params) - anchor[0]
    poison()
    value = backend.diagonal_quadratic(params, f, m)
    expected = (fisher * distance.square()).sum()
    assert_sum_close(value, expected, expected)

    c = torch.tensor(-1.7, dtype=torch.float64)
    gradient = c * fisher * distance
    poison()
    assert_rounded_once(backend.diagonal_gradient(params, f, m, c), gradient, gradient.abs())

    targets, f = in_other_orders(targets, seed), f if form in ("flat", "row") else in_other_orders(f, seed + 1)
    before = flat64(targets)
    value = backend.diagonal_accumulate_(targets, params, f, m, c)
    assert_sum_close(value, expected, expected)
    assert_rounded_once(targets, before + gradient, before.abs() + gradient.abs())

    for strength in (0.0, 0.3, 1e300, float("inf")):
        (moved,) = random_lists(case, seed, writable=True)
        backend.diagonal_shrink_(moved, f, m, torch.tensor(strength, dtype=torch.float64))
        x = torch.where(fisher == 0, 0.0, fisher * strength)
        share = torch.where(x.isinf(), 1.0, x / (1 + x))
        assert_rounded_once(moved, theta - share * distance, theta.abs() + anchor[0].abs())


def adamw_settings(count: int, seed: int) -> Tensor:
    """A row for each tensor: factor, beta1, beta2, decay, step_size, root_scale, eps (0 for even seeds), share."""
    low = torch.tensor([-2.0, 0.5, 0.5, 0.9, 0.0, 1.0, 1e-3, 0.0], dtype=torch.float64)
    high = torch.tensor([2.0, 0.999, 0.999, 1.0, 0.1, 9.0, 1e-2, 2.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows = low + (high - low) * torch.rand(count, 8, generator=generator, dtype=torch.float64)
    rows[:, 6] *= seed % 2
    return rows


adamw_lists = st.lists(
    st.tuples(
        length, st.sampled_from(["float32", "float64"]), layout, st.sampled_from(["same", "bfloat16", "float16"])
    ),
    min_size=1,
    max_size=6,
)


def adamw_state(case, seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """(parameters, gradients, first moments, second moments)"""
    params = [(n, dtype, kind) for n, dtype, kind, _ in case]
    half = [dtype == "float32" and gradient != "same" for _, dtype, _, gradient in case]
    grads = [(n, g if h else dtype, kind) for h, (n, dtype, kind, g) in zip(half, case, strict=True)]
    theta, m, v = random_lists(params, seed, count=3, writable=True)
    (gradients,) = random_lists(grads, seed + 9)
    for tensor in v:
        tensor.abs_()
    return theta, in_other_orders(gradients, seed + 1), in_other_orders(m, seed + 2), in_other_orders(v, seed + 3)


def assert_adamw(state, before, start: Tensor, pull: Tensor, penalty_size: Tensor, rows: Tensor) -> None:
    """Each element is the float64 formula's, to a few roundings of its dtype of the terms that were added."""
    (theta, _, m, v), (_, grad, old_m, old_v) = state, before
    factor, beta1, beta2, decay, step_size, root_scale, eps, _ = rows.T
    g, size = factor * grad + pull, (factor * grad).abs() + penalty_size
    first, second = old_m + (1 - beta1) * (g - old_m), beta2 * old_v + (1 - beta2) * g.square()
    root = root_scale * second.sqrt() + eps
    moved = decay * start - step_size * first / root
    ulp = torch.cat([torch.full((t.numel(),), 2 * ROUNDING[t.dtype], dtype=torch.float64) for t in theta])
    moment_size = old_m.abs() + size
    assert bool(((flat64(m) - first).abs() <= 8 * ulp * moment_size).all())
    assert bool(((flat64(v) - second).abs() <= 8 * ulp * (old_v + size.square())).all())
    # sqrt(v) is off by half of what v is, relative to it
    root_error = root_scale * (old_v + size.square()) / second.sqrt().clamp(min=1e-300)
    step_error = step_size * (moment_size + first.abs() * root_error / root) / root
    bound = 16 * ulp * (start.abs() + penalty_size + step_error)
    assert bool(((flat64(theta) - moved).abs() <= bound).all())


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=EXAMPLES // 2)
@given(
    case=adamw_lists,
    num_terms=st.integers(0, 3),
    dtype=st.sampled_from(["float32", "bfloat16", "float64", "float16"]),
    form=direction_form,
    decoupled=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_low_rank_adamw(backend, case, num_terms, dtype, form, decoupled, seed):
    state, rows = adamw_state(case, seed), adamw_settings(len(case), seed)
    params, before = state[0], [flat64(tensors) for tensors in state]
    directions, matrix = directions_like(params, num_terms, DTYPES[dtype], form, seed + 1)
    c = torch.randn(num_terms, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([p.numel() for p in params])

    poison()
    kept = backend.low_rank_adamw_(*state, rows, torch.ones(()), directions, c, decoupled)
    for tensors, was in zip(state, before, strict=True):
        assert torch.equal(flat64(tensors), was)
    assert_sum_close(kept, matrix @ before[0], matrix.abs() @ before[0].abs())

    found_inf = torch.zeros(1) if seed % 2 else None
    poison()
    projections = backend.low_rank_adamw_(*state, rows, found_inf, directions, c, decoupled)
    assert projections.dtype == torch.float64
    assert projections.shape == (num_terms,)
    theta = flat64(params)
    assert_sum_close(projections, matrix @ theta, matrix.abs() @ theta.abs())
    assert torch.equal(flat64(state[1]), before[1])
    rows = rows.repeat_interleave(lengths, 0)
    pull, size = rows[:, 7] * (c @ matrix), rows[:, 7] * (c.abs() @ matrix.abs())
    start = before[0] + pull if decoupled else before[0]
    assert_adamw(state, before, start, 0 * pull if decoupled else pull, size, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=EXAMPLES // 2)
@given(
    case=adamw_lists,
    state_dtype=st.sampled_from(["float32", "float64"]),
    form=form,
    decoupled=st.booleans(),
    infinite=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_diagonal_adamw(backend, case, state_dtype, form, decoupled, infinite, seed):
    state, rows = adamw_state(case, seed), adamw_settings(len(case), seed)
    if decoupled and infinite:
        rows[0, 7] = float("inf")
    params, before = state[0], [flat64(tensors) for tensors in state]
    (f, fisher), (a, anchor) = (directions_like(params, 1, DTYPES[state_dtype], form, seed + i) for i in (1, 2))
    f, fisher = [t.abs() for t in f], fisher[0].abs()
    distance = before[0] - anchor[0]
    expected = (fisher * distance.square()).sum()

    poison()
    kept = backend.diagonal_adamw_(*state, rows, torch.ones(()), f, a, decoupled)
    for tensors, was in zip(state, before, strict=True):
        assert torch.equal(flat64(tensors), was)
    poison()
    value = backend.diagonal_adamw_(*state, rows, None, f, a, decoupled)
    for sum_ in (kept, value):
        assert_sum_close(sum_, expected, expected)
    rows = rows.repeat_interleave(torch.tensor([p.numel() for p in params]), 0)
    if decoupled:
        x = torch.where(fisher == 0, 0.0, fisher * rows[:, 7])
        share = torch.where(x.isinf(), 1.0, x / (1 + x))
        start, pull, size = before[0] - share * distance, 0 * distance, before[0].abs() + anchor[0].abs()
    else:
        start, pull, size = before[0], rows[:, 7] * fisher * distance, rows[:, 7] * fisher * distance.abs()
    assert_adamw(state, before, start, pull, size, rows)


WRITTEN = (1.5, -3e4, 0.0, float("inf"), float("nan"))


def roundings_of(params: list[Tensor], seed: int) -> list[Tensor]:
    """In orders of memory of their own; about a third of the elements are other numbers, and some thetas are NaN, or
    beyond what their rounding can hold. A parameter may be in the place of its rounding."""
    generator = torch.Generator().manual_seed(seed)
    roundings = []
    for theta in params:
        dtype = (torch.bfloat16, torch.float16, theta.dtype)[int(torch.randint(3, (), generator=generator))]
        if theta.dtype == torch.float64 or dtype == theta.dtype:
            roundings.append(theta)
            continue
        for value in (1e-9, 1e30, float("nan")):
            theta[torch.rand(theta.shape, generator=generator) < 0.05] = value
        (rounding,) = in_other_orders([theta.to(dtype)], seed + len(roundings))
        for value in WRITTEN:
            rounding[torch.rand(theta.shape, generator=generator) < 0.07] = value
        roundings.append(rounding)
    return roundings


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=EXAMPLES // 2)
@given(
    case=adamw_lists,
    num_terms=st.integers(0, 3),
    dtype=st.sampled_from(["float32", "bfloat16", "float64", "float16", "diagonal"]),
    decoupled=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_a_step_begins_with_what_is_not_thetas_rounding_and_writes_the_rounding(
    backend, case, num_terms, dtype, decoupled, seed
):
    """Bitwise as one of the same tensors that has these numbers in theta."""
    state, rows = adamw_state(case, seed), adamw_settings(len(case), seed)
    params, _, *moments = state
    roundings = roundings_of(params, seed)
    diagonal = dtype == "diagonal"
    if diagonal:
        vectors = [directions_like(params, 1, torch.float32, "list", seed + i)[0] for i in (1, 2)]
        penalty = ([t.abs() for t in vectors[0]], vectors[1])
    else:
        directions, _ = directions_like(params, num_terms, DTYPES[dtype], "list", seed + 1)
        penalty = (directions, torch.linspace(-1, 1, num_terms, dtype=torch.float64))
    operator = backend.diagonal_adamw_ if diagonal else backend.low_rank_adamw_
    written = [*params, *moments[0], *moments[1]]

    def step(start: list[Tensor], *options) -> list[Tensor]:
        for tensor, value in zip(written, start, strict=True):
            tensor.copy_(value)
        poison()
        result = operator(*state, rows, *options)
        return [result, *(tensor.clone() for tensor in written)]

    start, values = ([tensor.clone() for tensor in tensors] for tensors in (written, roundings))
    skip = torch.ones(())
    expected = step(start, skip, *penalty, decoupled)
    skipped = step(start, skip, *penalty, decoupled, roundings)
    torch.testing.assert_close(skipped, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(roundings, values, rtol=0, atol=0, equal_nan=True)

    begins = [
        torch.where(theta.to(value.dtype) == value, theta, value.to(theta.dtype))
        for theta, value in zip(start, values, strict=False)
    ]
    found_inf = torch.zeros(()) if seed % 2 else None
    expected = step([*begins, *start[len(begins) :]], found_inf, *penalty, decoupled)
    actual = step(start, found_inf, *penalty, decoupled, roundings)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    nearest = [theta.to(rounding.dtype) for theta, rounding in zip(params, roundings, strict=True)]
    torch.testing.assert_close(roundings, nearest, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_of_many_tiny_and_empty_tensors(backend):
    lists = [
        [0],
        [0, 0, 0],
        [1] * MANY,
        [0, 5] * (MANY // 2),
        [1] * CHUNK + [0] * 3 + [1] * (CHUNK + 1),
        [0] * 1000 + [3],
        [3] + [0] * MANY + [CHUNK],
        [CHUNK, 0, 1, 2 * CHUNK, 0],
    ]
    for lengths in lists:
        params = [torch.randn(n) for n in lengths]
        directions, matrix = directions_like(params, 2, torch.float32, "flat", 0)
        projections = backend.low_rank_projections(params, directions, 2)
        assert_sum_close(projections, matrix @ flat64(params), matrix.abs() @ flat64(params).abs())
        targets = [torch.zeros(n) for n in lengths]
        coefficients = torch.tensor([2.0, -1.0], dtype=torch.float64)
        backend.low_rank_accumulate_(targets, directions, coefficients)
        assert_rounded_once(targets, coefficients @ matrix, coefficients.abs() @ matrix.abs())
        if len(lengths) < CHUNK:
            state = [[torch.rand(n) for n in lengths] for _ in range(4)]
            before, rows = [flat64(tensors) for tensors in state], adamw_settings(len(lengths), 0)
            moved = backend.low_rank_adamw_(*state, rows, None, directions, coefficients, False)
            assert_sum_close(moved, matrix @ flat64(state[0]), matrix.abs() @ flat64(state[0]).abs())
            rows = rows.repeat_interleave(torch.tensor(lengths), 0)
            pull, size = rows[:, 7] * (coefficients @ matrix), rows[:, 7] * (coefficients.abs() @ matrix.abs())
            assert_adamw(state, before, before[0], pull, size, rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_terms_of_mixed_dtypes(backend):
    """More terms than the loops take at a time, in runs of one dtype that end anywhere."""
    generator = torch.Generator().manual_seed(0)
    for num_terms in (2, 9, 10, 11, 23):
        params = [torch.randn(n, generator=generator) for n in (CHUNK + 5, 1, 40, 3)]
        dtypes = [(torch.float32, torch.bfloat16, torch.float64, torch.float16)[k // 3 % 4] for k in range(num_terms)]
        flat = [torch.randn(CHUNK + 49, generator=generator).to(dtype) for dtype in dtypes]
        pieces = [piece for u in flat for piece in u.split([p.numel() for p in params])]
        matrix, theta = torch.stack([u.double() for u in flat]), flat64(params)
        c = torch.randn(num_terms, generator=generator, dtype=torch.float64)
        for directions in (flat, pieces):
            poison()
            projections = backend.low_rank_projections(params, directions, num_terms)
            assert_sum_close(projections, matrix @ theta, matrix.abs() @ theta.abs())
            combined = backend.low_rank_combine(directions, c, params)
            assert_rounded_once(combined, c @ matrix, c.abs() @ matrix.abs())
            targets = [p.clone() for p in params]
            backend.low_rank_accumulate_(targets, directions, c)
            assert_rounded_once(targets, theta + c @ matrix, theta.abs() + c.abs() @ matrix.abs())


@needs_library
@settings(deadline=None, max_examples=EXAMPLES // 2)
@given(
    case=adamw_lists,
    num_terms=st.sampled_from([1, 2, 3, 11, 23]),
    beside=st.sampled_from([None, "float32", "bfloat16", "float64", "float16"]),
    decoupled=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_int8_directions_do_bitwise_what_their_values_do_in_float32(case, num_terms, beside, decoupled, seed):
    """Of every operator and in every order of summation. Parameters are row-major, for with int8 they are read so."""
    ops = torch.ops.crl_kernels
    (params,) = random_lists([(n, dtype, "offset") for n, dtype, *_ in case], seed)
    quantised, _ = int8_directions(params, num_terms, None if beside is None else DTYPES[beside], seed)
    values = values_of(quantised, num_terms, len(params))
    c = torch.randn(num_terms, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows = adamw_settings(len(params), seed)

    def results(directions: list[Tensor]) -> list[Tensor]:
        targets = [p.clone() for p in params]
        state = [[p.clone() for p in params] for _ in range(4)]
        for v in state[3]:
            v.abs_()
        numbers = [
            ops.low_rank_projections(params, directions, num_terms),
            ops.low_rank_penalty_accumulate_(targets, params, directions, c.abs(), c, c[0]),
            ops.low_rank_adamw_(*state, rows, None, directions, c, decoupled),
            ops.low_rank_adamw_(*state, rows, torch.ones(()), directions, c, decoupled),  # which writes nothing
        ]
        ops.low_rank_accumulate_(targets, directions, c)
        return [*numbers, *ops.low_rank_combine(directions, c, params), *targets, *(t for part in state for t in part)]

    expected = results(values)
    for count in (1, 2):
        with threads(count):
            for got, want in zip(results(quantised), expected, strict=True):
                assert torch.equal(got, want)


def values_of(directions: list[Tensor], num_terms: int, count: int) -> list[Tensor]:
    """int8 elements times their scales, in float32; other tensors as they are."""
    values = []
    for k in range(num_terms):
        pieces = directions[2 * k * count : (2 * k + 1) * count]
        for q, scale in zip(pieces, directions[(2 * k + 1) * count : (2 * k + 2) * count], strict=True):
            if q.dtype != torch.int8:
                values.append(q)
            elif not q.numel():
                values.append(q.float())
            else:
                values.append((q.reshape(len(scale), -1).float() * scale[:, None]).reshape(q.shape))
    return values


@needs_library
def test_bitwise_the_same_flat_or_in_a_list_and_for_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    lengths = [70_001, 1, 0, 33, 4096, 300_000, 17, 65_537]
    flat = torch.randn(sum(lengths), generator=generator)
    u, s = torch.randn(2, len(flat), generator=generator)
    params = list(flat.split(lengths))
    results = []
    for count in (1, 2):
        with threads(count):
            for theta, directions in (
                ([flat], [u, s]),
                (params, [u, s]),
                (params, [*u.split(lengths), *s.split(lengths)]),
            ):
                projections = torch.ops.crl_kernels.low_rank_projections(theta, directions, 2)
                value = torch.ops.crl_kernels.diagonal_quadratic(theta, [s.abs()], [u])
                results.append(torch.cat([projections, value[None]]))
                for num_terms in (1, 2):
                    state = [[t.clone() for t in theta], theta, [t.clone() for t in theta], [t.abs() for t in theta]]
                    terms = directions[: len(directions) // 2 * num_terms]
                    c = torch.ones(num_terms, dtype=torch.float64)
                    rows = adamw_settings(1, 0).expand(len(theta), 8)
                    moved = torch.ops.crl_kernels.low_rank_adamw_(*state, rows, None, terms, c, False)
                    value = torch.ops.crl_kernels.diagonal_adamw_(*state, rows, None, [s.abs()], [u], True)
                    results[-1] = torch.cat([results[-1], moved, value[None], *map(flat64, state)])
    for result in results[1:]:
        assert torch.equal(result, results[0])


# (decoupled, terms); no number of terms: diagonal. Interpreted, a chunk of a hundred tensors takes seconds.
ADAMW_CASES = [(False, 1), (True, None), (True, 4), (False, 0), (True, 1), (False, 4), (False, None)]
ADAMW_CASES = ADAMW_CASES[:2] if registry.INTERPRETED else ADAMW_CASES


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_written_tensors_are_bitwise_the_same_flat_or_in_a_list(dtype):
    """An element's result does not depend on its place in a vector of the processor."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 15, 3, 500, 16, 7, 64, 33, 5_000] + [3] * 100
    theta, gradient, *terms = torch.randn(6, sum(lengths), generator=generator, dtype=torch.float64).to(dtype)
    s, m = torch.rand(2, sum(lengths), generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    numbers = torch.randn(4, generator=generator, dtype=torch.float64)

    def written(split: bool) -> list[Tensor]:
        """Every writing operator's result as one flat tensor."""
        params, *targets = ([*t.clone().split(lengths)] if split else [t.clone()] for t in (theta, *[gradient] * 4))
        ops, one = torch.ops.crl_kernels, numbers[0]
        ops.low_rank_accumulate_(targets[0], terms[:1], numbers[:1])
        ops.low_rank_accumulate_(targets[1], terms, numbers)
        ops.low_rank_penalty_accumulate_(targets[2], params, terms, numbers.abs(), numbers, one)
        ops.diagonal_accumulate_(targets[3], params, [s], [m], one)
        combined = ops.low_rank_combine(terms, numbers, params)
        slopes = ops.diagonal_gradient(params, [s], [m], one)
        ops.diagonal_shrink_(params, [s], [m], one.abs())
        wide = torch.promote_types(dtype, torch.float32)
        moved = []
        for decoupled, count in ADAMW_CASES:
            grads = list(gradient.split(lengths)) if split else [gradient]
            rows = adamw_settings(1, 0).expand(len(grads), 8)
            state = [t.to(wide) for t in (theta, s, s)]
            x, *moments = ([*t.clone().split(lengths)] if split else [t.clone()] for t in state)
            if count is None:
                ops.diagonal_adamw_(x, grads, *moments, rows, None, [s], [m], decoupled)
            else:
                c = torch.ones(count, dtype=torch.float64)
                ops.low_rank_adamw_(x, grads, *moments, rows, None, terms[:count], c, decoupled)
            moved += [x, *moments]
        return [torch.cat(list(tensors)) for tensors in (*targets, combined, slopes, params, *moved)]

    for flat, pieces in zip(written(False), written(True), strict=True):
        assert torch.equal(flat, pieces)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_pass_through(backend):
    params = [torch.ones(5), torch.ones(40)]
    u = [torch.ones(45)]
    for bad in (float("nan"), float("inf")):
        params[1][20] = bad
        expected = torch.tensor([bad], dtype=torch.float64)
        torch.testing.assert_close(backend.low_rank_projections(params, u, 1), expected, equal_nan=True)
        value = backend.diagonal_quadratic(params, u, [torch.zeros(45)])
        torch.testing.assert_close(value, expected[0], equal_nan=True)
        targets = [torch.ones(5), torch.ones(40)]
        backend.low_rank_accumulate_(targets, u, expected)
        torch.testing.assert_close(targets[0], torch.full((5,), bad), equal_nan=True)


@cpp_loops
@needs_cpu_library
def test_sums_are_taken_in_the_documented_order():
    """Products of float32 are exact in float64, so the sum is bitwise that of 16 lanes per chunk of 4,096."""
    theta, u = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    expected = reference_lanes(theta, u)
    assert torch.equal(torch.ops.crl_kernels.low_rank_projections([theta], [u], 1), expected)


@needs_library
def test_a_projection_does_not_depend_on_the_terms_beside_it():
    theta, *terms = torch.randn(24, 10_000, generator=torch.Generator().manual_seed(0))
    together = torch.ops.crl_kernels.low_rank_projections([theta], terms, len(terms))
    alone = [torch.ops.crl_kernels.low_rank_projections([theta], [u], 1) for u in terms]
    assert torch.equal(together, torch.cat(alone))


@for_narrower_loops
def test_this_file_passes_with_narrower_loops(isa):
    """The loops that are not this processor's fastest."""
    assert_pass_with_narrower_loops(isa, __file__, "not (reference or instruction_set or wide_registers)")


@cpp_loops
@needs_cpu_library
@needs_x86_linux
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "sse9"])
def test_an_instruction_set_that_cannot_run_is_refused(isa):
    code = "import torch, crl_kernels; torch.ops.crl_kernels.low_rank_projections([torch.ones(3)], [torch.ones(3)], 1)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"CRL_KERNELS_ISA": isa}, capture_output=True, text=True
    )
    if isa in INSTRUCTION_SETS and runs_here(isa):
        assert run.returncode == 0, run.stderr
    else:
        known = isa in INSTRUCTION_SETS
        reason = "this processor does not have it" if known else "expected baseline, or, on x86-64, avx2 or avx512"
        assert f"crl_kernels: CRL_KERNELS_ISA={isa}: {reason}" in run.stderr


@cpp_loops
@needs_cpu_library
@needs_x86_linux
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, of binutils")
def test_wide_registers_are_used_where_they_were_asked_for_and_nowhere_else():
    """A library that is loaded on any processor must keep AVX code to the functions that dispatch.cpp chooses."""
    library = Path(crl_kernels.__file__).parent / "_C.abi3.so"
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    users: dict[str, set[str]] = {"ymm": set(), "zmm": set()}
    for function in text.split("\n\n"):
        namespace = re.search(r"^[0-9a-f]+ <.*?\bcrl::(avx2|avx512)::", function, re.MULTILINE)
        for register, namespaces in users.items():
            if f"%{register}" in function:
                namespaces.add(namespace[1] if namespace else function.partition("\n")[0])
    assert users == {"ymm": {"avx2", "avx512"}, "zmm": {"avx512"}}


def reference_lanes(theta: Tensor, u: Tensor) -> Tensor:
    """The documented order of summation: 16 lanes per chunk of 4,096, then lanes in order, then chunks in order."""
    total = 0.0
    for chunk in (theta.double() * u.double()).split(CHUNK):
        lanes = [0.0] * 16
        for j, product in enumerate(chunk.tolist()):
            lanes[j % 16] += product
        total += reduce(add, lanes, 0.0)  # sum() compensates roundings from Python 3.12 on
    return torch.tensor([total], dtype=torch.float64)


def test_every_operator_has_a_reference_and_a_schema_of_its_own():
    module = importlib.import_module("crl_kernels.backends.reference")
    for name in definitions.NAMES:
        assert callable(getattr(module, name))
        assert getattr(torch.ops.crl_kernels, name).default._schema.name == f"crl_kernels::{name}"


@needs_library
def test_operators_refuse_arguments_that_would_read_or_write_out_of_bounds():
    """The public API checks first; these are for whoever calls the operators themselves."""
    ops = torch.ops.crl_kernels
    params, state, none = [torch.ones(3)], ([torch.ones(3)], [torch.ones(3)]), torch.ones(0, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    half = ([torch.ones(3).half()], [torch.ones(3).half()])

    row = torch.ones(1, 8, dtype=torch.float64)

    def adamw(theta, grads, moments=params, rows=row, found_inf=None, directions=(), c=none, roundings=None):
        ops.low_rank_adamw_(theta, grads, moments, moments, rows, found_inf, directions, c, False, roundings)

    for call in (
        lambda: ops.low_rank_projections(params, [torch.ones(2)], 1),
        lambda: ops.low_rank_projections(params, [torch.ones(3)] * 3, 2),
        lambda: ops.low_rank_projections(params, [torch.ones(3, dtype=torch.int32)], 1),
        lambda: ops.low_rank_accumulate_(params, [torch.ones(3)], torch.ones(1)),
        lambda: ops.low_rank_projections(params, [torch.ones(3).char()], 1),
        lambda: ops.low_rank_projections([torch.ones(3).char()], [torch.ones(3)], 1),
        *(
            lambda u=u, scales=scales: ops.low_rank_projections(params, [u, scales], 1)
            for u in (torch.ones(3), torch.ones(3, dtype=torch.int8), torch.ones(3, dtype=torch.uint8))
            for scales in (torch.ones(2), torch.ones(4), torch.ones(1).double(), torch.ones(3).half(), torch.ones(6))
        ),
        lambda: ops.low_rank_projections(params, [torch.ones(3).char(), torch.ones(0)], 1),
        lambda: ops.low_rank_projections(params, [torch.ones(3), torch.ones(1)], 1),
        lambda: ops.low_rank_projections(params, [torch.ones(2).char(), torch.ones(2)], 1),
        lambda: ops.low_rank_projections(params, [torch.ones(0).char(), torch.ones(0)], 1),
        lambda: ops.low_rank_penalty_accumulate_(params, params, [torch.ones(3)], one, torch.ones(2).double(), one),
        lambda: ops.low_rank_penalty_accumulate_([torch.ones(3).half()], params, [torch.ones(3)], one, one, one),
        lambda: ops.diagonal_quadratic(params, [torch.ones(3)], [torch.ones(4)]),
        lambda: ops.diagonal_quadratic(params, [torch.ones(3)], [torch.ones(3, dtype=torch.float64)]),
        lambda: ops.diagonal_accumulate_([torch.ones(3).double()], params, *state, one),
        lambda: ops.diagonal_accumulate_([], params, *state, one),
        lambda: ops.diagonal_accumulate_([torch.ones(3)], params, *state, none),
        lambda: ops.diagonal_shrink_(params, *state, none),
        lambda: adamw(params, [torch.ones(2)]),
        lambda: adamw(params, []),
        lambda: adamw(params, [torch.ones(3).double()]),
        lambda: adamw([torch.ones(3).half()], [torch.ones(3).half()]),
        lambda: adamw(params, params, moments=[torch.ones(3).double()]),
        lambda: adamw(params, params, rows=torch.ones(7, dtype=torch.float64)),
        lambda: adamw(params, params, found_inf=torch.ones(2)),
        lambda: adamw(params, params, found_inf=one),
        lambda: adamw(params, params, directions=[torch.ones(2)], c=one),
        lambda: adamw(params, params, roundings=[]),
        lambda: adamw(params, params, roundings=[torch.ones(2).half()]),
        lambda: adamw(params, params, roundings=[torch.ones(3)]),
        lambda: adamw(params, params, roundings=[torch.ones(3).double()]),
        lambda: adamw(params, params, roundings=[torch.ones(3).short()]),
        lambda: ops.diagonal_adamw_(params, params, params, params, torch.ones(1, 8).double(), None, *half, False),
    ):
        with pytest.raises(RuntimeError, match="crl_kernels: "):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_drift_is_exact_where_theta_is_almost_the_anchor(backend):
    """u . theta and b nearly cancel: |theta - theta*| = 1e-5 and ten million parameters."""
    generator = torch.Generator().manual_seed(0)
    numel = 10_000_000
    u = torch.randn(numel, generator=generator)
    u /= u.norm()
    anchor = torch.randn(numel, generator=generator)
    theta = anchor + 1e-5 * torch.randn(numel, generator=generator)
    b = backend.low_rank_projections([anchor], [u], 1)
    drift = backend.low_rank_projections([theta], [u], 1) - b
    exact = u.double() @ (theta.double() - anchor.double())
    torch.testing.assert_close(drift[0], exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [(1e-25, 1e-20), (1e-12, 1e-12), (1e20, 1e19), (1e-30, 1e30)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_float32_products_that_float32_cannot_hold(backend, scale):
    """The products, or what rounding cuts off them, are smaller or larger than any float32."""
    generator = torch.Generator().manual_seed(0)
    theta, u = (torch.randn(5000, generator=generator) * s for s in scale)
    theta[:2500] *= 2.0 ** torch.randint(-9, 9, (2500,), generator=generator)
    products = u.double() * theta.double()
    (projection,) = backend.low_rank_projections([theta], [u], 1)
    assert_sum_close(projection, products.sum(), products.abs().sum())
    fisher = u.abs()
    value = backend.diagonal_quadratic([theta], [fisher], [torch.zeros(5000)])
    expected = (fisher.double() * theta.double().square()).sum()
    assert_sum_close(value, expected, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_few_elements_are_added_as_exactly_as_many(backend):
    """One octet of a GPU's thread: nothing averages out."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        theta, u = torch.randn(2, 8, generator=generator)
        products = u.double() * theta.double()
        (projection,) = backend.low_rank_projections([theta], [u], 1)
        assert abs(projection - products.sum()) <= 2**-44 * products.abs().sum()
