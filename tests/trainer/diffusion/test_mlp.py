"""The residual MLP: against its formula, what it depends on, and its per-sample gradients against loops of autograd."""

from __future__ import annotations

import warnings

import pytest
import torch
from crl_diffusion.config.networks import MODELS, MLPSize
from crl_diffusion.diffusion.network import build, predict
from crl_diffusion.training.fisher_batches import per_sample_loss
from helpers.by_loop import assert_close, assert_statistics, flat, rows_by_loop
from torch import Tensor, nn

from crl_kernels import SampleGradients, estimate_fisher

SHAPES = [(1, 8, 8), (1, 16, 16), (3, 16, 16)]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def _mlp(shape: tuple[int, int, int] = (1, 8, 8)) -> nn.Module:
    return build("mlp", shape, 10, seed=0).double()


def _batch(shape: tuple[int, int, int] = (1, 8, 8), n: int = 6, seed: int = 1) -> Batch:
    """Noised images, timesteps, labels and noise."""
    generator = torch.Generator().manual_seed(seed)
    noised, noise = torch.randn(2, n, *shape, generator=generator, dtype=torch.float64)
    t = torch.randint(1000, (n,), generator=generator)
    return noised, t, torch.randint(10, (n,), generator=generator), noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_has_the_shape_and_dtype_of_the_images(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    model = build("mlp", shape, 10, 0).to(dtype)
    noised, t, label, _ = _batch(shape)
    noise = predict(model, noised.to(dtype), t, label)
    assert (noise.shape, noise.dtype) == (noised.shape, dtype)
    assert noise.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_is_that_of_the_formula(shape: tuple[int, int, int]) -> None:
    noised, t, label, _ = _batch(shape)
    model, size = _mlp(shape), MODELS["mlp"]
    assert isinstance(size, MLPSize)
    weights = dict(model.named_parameters())

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def normalised(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def silu(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    half = size.width // 2
    angles = t[:, None] * torch.tensor([10000 ** (-i / (half - 1)) for i in range(half)])
    embedding = torch.cat([angles.sin(), angles.cos()], 1).double()
    embedding = linear("time_embedding.2", silu(linear("time_embedding.0", embedding)))
    embedding = embedding + weights["label_embedding.weight"][label]
    x = noised.flatten(1)
    hidden = linear("first", x)
    for i in range(size.blocks):
        inner = normalised(f"blocks.{i}.norm", hidden + embedding)
        hidden = hidden + linear(f"blocks.{i}.second", silu(linear(f"blocks.{i}.first", inner)))
    expected = linear("last", normalised("norm", hidden)) + linear("factor", embedding) * x
    actual = predict(model, noised, t, label).flatten(1)
    # The sinusoids of timesteps are float32: angles of up to 999 are rounded by 6e-5.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_label_and_timestep_and_image_matter_for_their_own_sample_alone() -> None:
    model = _mlp()
    noised, t, label, _ = _batch()
    with torch.no_grad():
        before = predict(model, noised, t, label)
        for i, changed in enumerate([(noised + 1, t, label), (noised, 999 - t, label), (noised, t, (label + 1) % 10)]):
            mixed = [
                torch.cat([old[:2], new[2:3], old[3:]]) for old, new in zip((noised, t, label), changed, strict=True)
            ]
            difference = (predict(model, *mixed) - before).flatten(1).norm(dim=1)
            assert difference[2] > 1e-3, i
            assert difference[[0, 1, 3, 4, 5]].max() < 1e-12, i


def test_every_label_and_every_timestep_has_an_embedding_of_its_own() -> None:
    model = _mlp()
    x = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    zero = torch.zeros(1000, dtype=torch.int64)
    with torch.no_grad():
        by_label = predict(model, x.expand(10, 1, 8, 8), zero[:10], torch.arange(10)).flatten(1)
        by_time = predict(model, x.expand(1000, 1, 8, 8), torch.arange(1000), zero).flatten(1)
    assert torch.pdist(by_label).min() > 1e-3
    assert (by_time[1:] - by_time[:-1]).norm(dim=1).min() > 1e-6


def test_its_state_is_its_parameters() -> None:
    """Sinusoids are computed, not kept: checkpoints hold what is trained."""
    model = _mlp()
    assert model.state_dict().keys() == {name for name, _ in model.named_parameters()}
    pixels, width, blocks = 64, 112, 3
    square = width * width + width
    by_hand = 2 * square + 10 * width + (pixels * width + width) + blocks * (2 * width + 2 * square)
    by_hand += 2 * width + (width * pixels + pixels) + (width + 1)
    assert sum(p.numel() for p in model.parameters()) == by_hand == 117_889


def test_every_parameter_gets_a_gradient() -> None:
    model = _mlp()
    noised, t, _, noise = _batch(n=10)
    per_sample_loss(model, (noised, t, torch.arange(10), noise)).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("shape", SHAPES)
def test_per_sample_gradients_are_those_of_a_loop(shape: tuple[int, int, int]) -> None:
    model, batch = _mlp(shape), _batch(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a function without a rule
        with SampleGradients(model, gram=True, diagonal=True) as gradients:
            per_sample_loss(model, batch).sum().backward()
    assert_statistics(gradients, rows_by_loop(model, per_sample_loss(model, batch)), 1e-12)


@pytest.mark.filterwarnings("ignore:only .* of the trace of the Fisher", "ignore:the mean gradient .*is mostly noise")
@pytest.mark.parametrize("kind", ["mean", "top", "diagonal"])
def test_a_fisher_is_that_of_a_loop(kind: str) -> None:
    """The direction is from the first batch; curvatures and slopes are from the second."""
    model, batches = _mlp(), [_batch(seed=1), _batch(seed=2)]
    first, second = (rows_by_loop(model, per_sample_loss(model, batch)) for batch in batches)
    if kind == "diagonal":
        diagonal = estimate_fisher(model, per_sample_loss, batches, kind="diagonal").fisher_diagonal
        expected = torch.cat([flat(first), flat(second)]).square().mean(0)
        torch.testing.assert_close(diagonal.double(), expected, rtol=1e-6, atol=1e-12)
        return
    fisher = estimate_fisher(model, per_sample_loss, batches, direction=kind)
    (u,) = fisher.directions.double()
    mu = flat(first).mean(0)
    wanted = mu / mu.norm() if kind == "mean" else torch.linalg.svd(flat(first), full_matrices=False).Vh[0]
    assert abs(float(u @ wanted)) == pytest.approx(1, abs=1e-10)
    assert float((u @ wanted).sign()) == 1 or kind == "top"
    along = flat(second) @ u
    assert_close(fisher.curvatures, along.square().mean()[None], 1e-10, "curvatures")
    assert_close(fisher.slopes, along.mean()[None], 1e-10, "slopes")
