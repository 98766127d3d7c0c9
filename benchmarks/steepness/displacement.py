"""The loss of a task along a displacement of the weights, in float64, over fixed draws of images, timesteps and noise.

theta are the weights at the end of the task, delta is the displacement, and L is the mean over samples i of
    loss_i = |r_i|^2 / d,   r_i = prediction_i - noise_i,   d = C H W.
With the Jacobian J_i of prediction_i at theta, one forward-mode pass gives J_i delta for every sample, and from it
    first order       g . delta = mean g_i . delta,   g_i . delta = 2 r_i . J_i delta / d
    Gauss-Newton      1/2 delta^T G delta = mean |J_i delta|^2 / d
    Fisher            1/2 delta^T F delta = mean (g_i . delta)^2 / 2
The curvature 1/2 delta^T H delta is a central second difference,
    (L(theta + s delta) - 2 L(theta) + L(theta - s delta)) / (2 s^2),   s = STEP.
Its error grows with s^2, and that of rounding with 1 / s^2. The value at 2 s is kept too: where both agree, neither
error matters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from crl_diffusion.data.images import Images
from crl_diffusion.diffusion import noising
from crl_diffusion.diffusion.network import predict
from crl_diffusion.methods.regression import noise_up
from torch import Tensor, nn
from torch.func import functional_call, jvp

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # noised, t, label, noise
Weights = dict[str, Tensor]

STEP = 1e-3
BATCH = 512


def draw(
    images: Images, count: int, schedule: noising.Schedule, generator: torch.Generator, like: Tensor
) -> list[Batch]:
    """`count` independent draws of an image, a timestep and noise, in batches."""
    chosen = images.take(torch.randint(len(images), (count,), generator=generator))
    t, noise = noising.draw_noise(generator, (count, *images.shape))
    parts = torch.arange(count).split(BATCH)
    return [noise_up(chosen.take(part), t[part], noise[part], schedule, like) for part in parts]


def predict_with(model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
    noised, t, label, _ = batch
    return predict(lambda *args, **options: functional_call(model, weights, args, options), noised, t, label)


def mean(parts: Sequence[Tensor]) -> float:
    return float(torch.cat(tuple(parts)).mean())


@torch.no_grad()
def loss(model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> float:
    return mean([noising.per_sample_loss(predict_with(model, weights, batch), batch[3]) for batch in batches])


def shifted(weights: Weights, delta: Weights, step: float) -> Weights:
    return {name: value + step * delta[name] for name, value in weights.items()}


@torch.no_grad()
def first_and_second_order(
    model: nn.Module, weights: Weights, delta: Weights, batches: Sequence[Batch]
) -> dict[str, float]:
    """The first-order term, and the quadratics of Gauss-Newton and of the Fisher matrix."""
    slopes, squares = [], []
    for batch in batches:
        prediction, moved = jvp(lambda w, batch=batch: predict_with(model, w, batch), (weights,), (delta,))
        slopes.append(2 * ((prediction - batch[3]) * moved).flatten(1).mean(1))
        squares.append(moved.square().flatten(1).mean(1))
    return {
        "first_order": mean(slopes),
        "gauss_newton": mean(squares),
        "fisher": mean([slope.square() for slope in slopes]) / 2,
    }


def curvature(
    model: nn.Module, weights: Weights, delta: Weights, batches: Sequence[Batch], base: float, step: float = STEP
) -> float:
    """The second difference at `step`; `base` is the loss at `weights`."""
    ends = [loss(model, shifted(weights, delta, sign * step), batches) for sign in (1, -1)]
    return (ends[0] - 2 * base + ends[1]) / (2 * step**2)
