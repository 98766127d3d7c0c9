"""What could make per-sample gradients wrong, or change the model: checkpoints, autocast, hooks, threads, errors."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import device
from helpers.block_checks import check
from helpers.by_loop import Parts, Rows, assert_close, flat, rows_of_single_samples, squared
from helpers.layer_cases import N, images, prepared, tokens, without_rules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crl_kernels import SampleGradients
from crl_kernels.backends import reference


def block() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model whose middle is checkpointed by the tests below."""
    model = Parts(
        lambda m, x: m.out(m.middle(m.first(x))),
        first=nn.Conv2d(4, 6, 3, padding=1),
        middle=nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 6, 3, padding=1)),
        out=nn.Conv2d(6, 3, 1),
    )
    return model.double(), tuple(x.double() for x in images())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model, batch = block()
    expected = rows_of_single_samples(model, squared, batch)
    middle = model.middle
    model.function = lambda m, x: m.out(checkpoint(middle, m.first(x), use_reentrant=reentrant))
    check(model, batch, expected=expected)


def test_checkpointed_shared_weights():
    model, batch = block()
    model.function = lambda m, x: m.out(m.middle(m.middle(m.first(x))))
    expected = rows_of_single_samples(model, squared, batch)
    model.function = lambda m, x: m.out(
        checkpoint(m.middle, checkpoint(m.middle, m.first(x), use_reentrant=False), use_reentrant=False)
    )
    check(model, batch, expected=expected)
    model.function = lambda m, x: m.out(checkpoint(m.middle, m.middle(m.first(x)), use_reentrant=True))
    check(model, batch, expected=expected)
    model.function = lambda m, x: m.out(
        checkpoint(m.middle, checkpoint(m.middle, m.first(x), use_reentrant=True), use_reentrant=True)
    )
    check(model, batch, expected=expected)


def test_one_sample():
    model, batch = block()
    check(model, (batch[0][:1],))


def with_rows(case: str) -> tuple[nn.Module, tuple[Tensor, ...], Rows]:
    """A model in float64, its batch, and the gradient of each sample."""
    model, batch = prepared(case, torch.float64)
    return model, batch, rows_of_single_samples(model, squared, batch)


@pytest.mark.parametrize("case", ["conv2d", "transformer layer", "group norm", "embedding, class", "rms norm"])
def test_bfloat16_model_with_float32_statistics(case):
    model, batch, expected = with_rows(case)
    rows = flat(expected)
    model, batch = model.bfloat16(), tuple(x.bfloat16() if x.is_floating_point() else x for x in batch)
    with SampleGradients(model, gram=True) as sg:
        squared(model, *batch).sum().backward()
    assert all(mean.dtype == torch.float32 for mean in sg.mean.values())
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    torch.testing.assert_close(sg.sq_norms, rows.square().sum(1), rtol=0.1, atol=0)
    mean = torch.cat([mean.flatten() for mean in sg.mean.values()]).double()
    assert float(F.cosine_similarity(mean, rows.mean(0), dim=0)) > 0.99
    # The statistics agree with each other far beyond bfloat16.
    torch.testing.assert_close(sg.gram.diagonal(), sg.sq_norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(sg.gram.mean(0), sg.projections, rtol=0, atol=1e-5 * float(sg.sq_norms.max()))
    torch.testing.assert_close(mean.square().sum(), sg.projections.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "case", ["conv2d", "transformer layer", "group norm", "batch norm in evaluation", "layer norm"]
)
def test_autocast(case):
    model, batch, expected = with_rows(case)
    rows = flat(expected)
    model, batch = model.float(), tuple(x.float() for x in batch)
    with torch.autocast(device.type_(), torch.bfloat16):
        plain = squared(model, *batch)
    plain.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with SampleGradients(model) as sg:
        with torch.autocast(device.type_(), torch.bfloat16):
            losses = squared(model, *batch)
        losses.sum().backward(retain_graph=True)
    weights = torch.stack([torch.ones(N), torch.rand(N)])
    with torch.autocast(device.type_(), torch.bfloat16):  # which does not round the sums
        sums = sg.weighted_sums(losses, weights)
    for name, mean in sg.mean.items():
        assert_close(sums[name][0], N * mean, 1e-5, name)
    torch.testing.assert_close(losses, plain, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(sg.sq_norms, rows.square().sum(1), rtol=0.15, atol=0)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad.dtype == torch.float32
        assert float((p.grad - grad).norm()) <= 0.05 * max(float(grad.norm()), 1e-2)


def test_dropout_is_no_trap_where_there_are_rules():
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double().train()
    x = tokens()[0].double()
    with SampleGradients(model, gram=True) as sg:
        squared(model, x).sum().backward()
    torch.testing.assert_close(sg.gram.sum(), sum(p.grad.square().sum() for p in model.parameters()))


@pytest.mark.parametrize("case", ["conv2d", "attention", "tied weights", "group norm", "embedding", "bare parameters"])
def test_backward_passes_after_the_block_are_ordinary(case):
    """The weighted passes that give eigenvectors of the Fisher."""
    model, batch, expected = with_rows(case)
    weights = torch.randn(N, dtype=torch.float64)
    with SampleGradients(model) as sg:
        losses = squared(model, *batch)
        losses.sum().backward(retain_graph=True)
    before = sg.sq_norms.clone()
    gradients = torch.autograd.grad((weights * losses).sum(), list(model.parameters()), allow_unused=True)
    for gradient, rows in zip(gradients, expected.values(), strict=True):
        if gradient is not None:
            assert_close(gradient, torch.einsum("n,n...->...", weights, rows), 1e-10, scale=rows)
    assert torch.equal(sg.sq_norms, before)


@pytest.mark.parametrize("case", ["conv2d", "conv1d", "linear, tokens", "conv2d, groups"])
@pytest.mark.parametrize("tile", [1, 500])
def test_weighted_sums_hold_few_per_sample_gradients_at_a_time(case, tile, monkeypatch):
    """Where there are many tokens; other weighted sums of layers do without."""
    model, batch, expected = with_rows(case)
    held: list[int] = []
    reference_matrix = reference.sample_weight_gradient_matrix

    def matrix(*arguments: Any) -> Tensor:
        rows = reference_matrix(*arguments)
        held.append(len(rows))
        assert len(rows) == 1 or rows.numel() <= tile
        return rows

    monkeypatch.setattr(reference, "sample_weight_gradient_matrix", matrix)
    monkeypatch.setattr("crl_kernels.per_sample.layer_gradients._TILE", tile)
    weights = torch.randn(2, N, dtype=torch.float64)
    with SampleGradients(model) as sg:
        sums = sg.weighted_sums(squared(model, *batch), weights)
    assert bool(held) == case.startswith("conv")
    for name, gradient in expected.items():
        assert_close(sums[name], torch.einsum("kn,n...->k...", weights, gradient), 1e-10, name, gradient)


@pytest.mark.parametrize("case", ["linear", "linear, tokens", "attention", "embedding"])
def test_weighted_sums_of_single_samples_and_of_none(case):
    """A stratum has few of a batch's samples."""
    model, batch, expected = with_rows(case)
    largest = flat(expected)
    with SampleGradients(model) as sg:
        sums = sg.weighted_sums(squared(model, *batch), torch.eye(N + 1)[:, :N])
    for name, gradient in expected.items():
        assert_close(sums[name][:N], gradient, 1e-10, name, largest)
        assert not bool(sums[name][N].any())


@pytest.mark.parametrize("case", ["conv2d", "without rules"])
def test_nothing_waits_for_the_garbage_collector(case):
    model, batch = without_rules() if case == "without rules" else prepared(case, torch.float64)
    kept: list[Any] = []
    model[0].register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    gc.disable()
    try:
        for pass_in_block in (True, False):
            with warnings.catch_warnings(), SampleGradients(model) as sg:
                warnings.simplefilter("ignore")
                losses = squared(model, *batch)
                if pass_in_block:
                    losses.sum().backward(retain_graph=True)
                else:
                    sg.weighted_sums(losses, torch.ones(1, N))
            if pass_in_block:
                sg.weighted_sums(losses, torch.ones(1, N))
            del losses
            assert kept.pop()() is None
            gone = weakref.ref(sg)
            del sg
            assert gone() is None
    finally:
        gc.enable()


def test_wrong_uses_of_weighted_sums():
    model, batch = prepared("conv2d", torch.float64)
    ones = torch.ones(1, N)
    with pytest.raises(RuntimeError, match="computed in this SampleGradients block"):
        SampleGradients(model).weighted_sums(squared(model, *batch), ones)
    with SampleGradients(model) as sg:
        losses = squared(model, *batch)
        with pytest.raises(ValueError, match=r"weights has shape \(1, 5\); expected \(K, 6\)"):
            sg.weighted_sums(losses, ones[:, 1:])
        with pytest.raises(ValueError, match=r"weights has shape \(6,\); expected \(K, 6\)"):
            sg.weighted_sums(losses, ones[0])
        with pytest.raises(ValueError, match=r"losses has shape \(\); expected \(N,\)"):
            sg.weighted_sums(losses.mean(), ones)
        losses.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="when the block has ended"):
            sg.weighted_sums(losses, ones)
    again = sg.weighted_sums(losses, ones)
    for name, mean in sg.mean.items():
        torch.testing.assert_close(again[name][0], N * mean)
    with pytest.raises(RuntimeError, match="computed in this SampleGradients block"), SampleGradients(model) as sg:
        sg.weighted_sums(torch.zeros(N, requires_grad=True), ones)
    others = squared(model, *batch)
    with SampleGradients(model) as sg:
        sg.weighted_sums(squared(model, *batch), ones)
        for losses in (torch.zeros(N, requires_grad=True), others):
            with pytest.raises(RuntimeError, match="computed in this SampleGradients block"):
                sg.weighted_sums(losses, ones)
        with pytest.raises(TypeError, match=r"weights is a list; expected a tensor \(K, 6\)"):
            sg.weighted_sums(losses, [[1.0] * N])
        with pytest.raises(TypeError, match=r"losses is a list; expected a tensor \(6,\)"):
            sg.weighted_sums([1.0] * N, ones)
    assert sg.num_samples == N


@pytest.mark.parametrize("in_block", [True, False])
def test_weighted_sums_do_not_call_hooks_on_parameters(in_block):
    model, batch = prepared("conv2d", torch.float64)
    calls: list[None] = []
    for p in model.parameters():
        p.register_hook(lambda gradient: calls.append(None) or gradient.clamp_(-1e-9, 1e-9))
        p.register_post_accumulate_grad_hook(lambda p: calls.append(None))
    with SampleGradients(model) as sg:
        losses = squared(model, *batch)
        if in_block:
            sums = sg.weighted_sums(losses, torch.ones(1, N))
        else:
            losses.sum().backward(retain_graph=True)
    calls_in_block = len(calls)
    if not in_block:
        sums = sg.weighted_sums(losses, torch.ones(1, N))
    assert len(calls) == calls_in_block
    assert all(float(value.abs().max()) > 1e-3 for value in sums.values())


def test_existing_gradients_are_added_to():
    model, batch = prepared("conv2d", torch.float64)
    squared(model, *batch).sum().backward()
    grads = [p.grad for p in model.parameters()]
    copies = [grad.clone() for grad in grads]
    with SampleGradients(model) as sg:
        squared(model, *batch).sum().backward()
    for p, grad, copy, mean in zip(model.parameters(), grads, copies, sg.mean.values(), strict=True):
        assert p.grad is grad
        torch.testing.assert_close(grad, 2 * copy)
        torch.testing.assert_close(mean * N, copy)


def test_nothing_is_left_behind():
    model, batch = prepared("transformer layer", torch.float64)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.grad for p in model.parameters()]

    def hooks() -> int:
        return sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
        ) + sum(len(p._backward_hooks or ()) for p in model.parameters())

    def failing() -> None:
        with SampleGradients(model):
            squared(model, *batch).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert hooks() == 0
    assert not torch.overrides._get_current_function_mode_stack()
    for p, grad in zip(model.parameters(), before, strict=True):
        assert p.grad is grad
    reference = squared(model, *batch)
    with SampleGradients(model, gram=True):
        losses = squared(model, *batch)
        losses.sum().backward()
    torch.testing.assert_close(losses, reference, rtol=1e-12, atol=0)
    assert hooks() == 0


def test_a_compiled_model_runs_eagerly():
    model, batch, expected = with_rows("conv2d")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with SampleGradients(compiled) as sg:
        squared(compiled, *batch).sum().backward()
    assert set(sg.mean) == set(expected)
    rows = flat(expected)
    assert_close(sg.sq_norms, rows.square().sum(1), 1e-10)


def test_bitwise_run_to_run_and_for_any_number_of_threads():
    model, batch = prepared("conv2d, wide", torch.float32)

    def run() -> list[Tensor]:
        model.zero_grad()
        with SampleGradients(model, gram=True, diagonal=True) as sg:
            squared(model, *batch).sum().backward()
        return [sg.sq_norms, sg.projections, sg.gram, *sg.mean.values(), *sg.diagonal.values()]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, second = run(), run()
        torch.set_num_threads(2)
        third = run()
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_include_and_exclude():
    model, batch, expected = with_rows("conv2d")
    with SampleGradients(model, exclude=["0"]) as sg:
        squared(model, *batch).sum().backward()
    assert set(sg.mean) == {"2.weight", "2.bias"}
    rows = torch.cat([expected[name].flatten(1) for name in sg.mean], 1)
    assert_close(sg.sq_norms, rows.square().sum(1), 1e-10)
    for name, p in model.named_parameters():
        assert_close(p.grad, expected[name].sum(0), 1e-10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_reduction": "max"}, ValueError, "loss_reduction is 'max'"),
        ({"direction": torch.ones(3)}, TypeError, "direction is a Tensor; expected a mapping"),
        ({"direction": {"x": torch.ones(3)}}, ValueError, "direction has 'x', which are not among"),
        ({"direction": {}}, ValueError, "direction is empty"),
        ({"direction": {"bias": torch.ones(3)}}, ValueError, r"has shape \(3,\); expected \(4,\)"),
        ({"direction": {"bias": 1}}, TypeError, "is a int; expected a tensor"),
        (
            {"direction": {"bias": torch.ones(4), "weight": torch.ones(2, 4, 6)}},
            ValueError,
            "different numbers K",
        ),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        SampleGradients(nn.Linear(6, 4), **options)


def test_bad_blocks():
    model, x = nn.Linear(6, 4), tokens()[0]
    with pytest.raises(RuntimeError, match="no gradient reached the model's parameters"), SampleGradients(model):
        model(x)
    with SampleGradients(model):
        losses = squared(model, x)
        losses.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second backward pass"):
            losses.sum().backward()
    sg = SampleGradients(model)
    with sg:
        squared(model, x).sum().backward()
    with pytest.raises(RuntimeError, match="serves one block"), sg:
        pass
    normed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False))
    with pytest.raises(ValueError, match="BatchNorm in training mode mixes the samples"), SampleGradients(normed):
        normed(x[:, 0])
