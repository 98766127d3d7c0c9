"""Per-sample gradients: their operators, a UNet end to end, and the time and memory beside a plain backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .checks import poison, require_backend, require_close
from .speed import timed


def weight_gradient_statistics(rows: Tensor, directions: Tensor | None) -> list[Tensor]:
    """Sum, square norms, projections and sum of squares of (N, *weight), in plain PyTorch."""
    flat, total = rows.flatten(1), rows.sum(0)
    u = total.flatten()[None] if directions is None else directions.to(rows.dtype).flatten(1)
    return [total, flat.square().sum(1), flat @ u.T, rows.square().sum(0)]


# input channels, output channels, image, kernel, stride, padding, dilation, groups
CONVOLUTIONS: tuple[tuple[int, int, tuple[int, int], tuple[int, int], int, int, int, int], ...] = (
    (128, 256, (16, 16), (3, 3), 1, 1, 1, 1),
    (3, 128, (17, 16), (3, 3), 1, 1, 1, 1),
    (200, 3, (9, 8), (3, 3), 1, 1, 1, 1),
    (96, 80, (14, 14), (3, 3), 2, 1, 1, 1),
    (64, 70, (12, 11), (3, 2), 1, 2, 2, 2),
    (48, 48, (9, 9), (3, 3), 1, 1, 1, 48),
    (320, 640, (1, 77), (1, 1), 1, 0, 1, 1),
    (65, 33, (7, 5), (1, 1), 2, 0, 1, 1),
)


def sample_operators(device: str, small: bool) -> dict[str, Any]:
    """Statistics of per-sample weight gradients and of a matrix of gradients, against float64, twice: bitwise the same.

    Bounds are in units of the magnitudes that are added. A float32 product of three TF32 ones is within 2^-20; each of
    n numbers that float32 adds may be truncated, 2^-24; plain PyTorch's own error, doubled, is allowed too.
    """
    require_backend(device)
    torch.backends.cudnn.allow_tf32 = False  # of plain PyTorch
    ops, generator = torch.ops.crl_kernels, torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    samples = 3 if small else 70

    def image(channels: int, height: int, width: int, dtype: torch.dtype, layout: str) -> Tensor:
        values = torch.randn(samples, channels, height, width, generator=generator) + 0.3
        if layout == "tokens":
            return values.to(dtype).to(device).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        if layout == "sliced":
            return nn.functional.pad(values, (1, 2, 1, 0)).to(dtype).to(device)[:, :, 1:, 1:-2]
        return values.to(dtype).to(device)

    def plain(a: Tensor, b: Tensor, kernel: tuple[int, int], geometry: tuple[int, ...]) -> Tensor:
        weight = (b.shape[1], a.shape[1] // geometry[3], *kernel)
        return torch.stack(
            [torch.nn.grad.conv2d_weight(x, weight, y, *geometry) for x, y in zip(a.split(1), b.split(1), strict=True)]
        )

    # Each kernel takes a second to compile, so layouts and directions take turns.
    layouts = ("contiguous", "tokens", "sliced")
    for i, (c, o, (height, width), kernel, stride, padding, dilation, groups) in enumerate(CONVOLUTIONS):
        out = [
            (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1
            for n, k in zip((height, width), kernel, strict=True)
        ]
        geometry = (stride, padding, dilation, groups)
        for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
            layout, terms = layouts[(i + j) % 3], 3 if (i + j // 2) % 2 else None
            a, b = image(c, height, width, dtype, layout), image(o, out[0], out[1], dtype, layout)
            shape = (o, c // groups, *kernel)
            u = None if terms is None else torch.randn(terms, *shape, generator=generator).to(device)
            where = f"weight gradients, {c} to {o}, {dtype}, {layout}, {terms} directions"
            results = []
            for _ in range(2):
                poison(device)
                pairs = [[n, n] for n in geometry[:3]]
                results.append(ops.sample_weight_gradients(a, b, list(kernel), *pairs, groups, u, False, True))
            if not all(torch.equal(x, y) for x, y in zip(*results, strict=True)):
                raise AssertionError(f"{where}: differ from run to run")
            exact = weight_gradient_statistics(plain(a.double(), b.double(), kernel, geometry), u)
            theirs = weight_gradient_statistics(plain(a.float(), b.float(), kernel, geometry), u)
            size = weight_gradient_statistics(
                plain(a.double().abs(), b.double().abs(), kernel, geometry), None if u is None else u.abs()
            )
            ours = [results[0][i] for i in (0, 1, 2, 4)]
            added = samples * out[0] * out[1]
            for x, y, e, m in zip(ours, theirs, exact, size, strict=True):
                allowed = 2 * float(((y.double() - e).abs() / m.clamp(min=1e-300)).max())
                error = require_close(where, x, e, m, max(allowed, 2.0**-20 + added * 2.0**-24))
                worst[str(dtype)] = max(worst.get(str(dtype), 0.0), error)

    for rows, columns in (
        ((1, 4097), (5, 1000), (64, 2051)) if small else ((1, 100_003), (64, 1_000_003), (300, 70_001))
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            grads = (torch.randn(rows, columns, generator=generator) + 0.3).to(dtype).to(device)
            x, size = grads.double(), grads.double().abs()
            poison(device)
            mean, norms, projections, diagonal = ops.sample_gradient_stats(grads, None, True)
            gram = ops.sample_gram(grads)
            where, tight = f"matrix of {rows} x {columns}, {dtype}", 1e-13 if dtype == torch.float64 else 1e-6
            require_close(f"{where}: mean", mean, x.mean(0), size.mean(0), tight)
            require_close(f"{where}: norms", norms, x.square().sum(1), size.square().sum(1), tight)
            require_close(f"{where}: projections", projections, x @ x.mean(0), size @ size.mean(0), tight)
            require_close(f"{where}: diagonal", diagonal, x.square().mean(0), size.square().mean(0), tight)
            bound = 1e-13 if dtype == torch.float64 else 2.0**-20 + 256 * 2.0**-24  # float32 adds runs of 256
            worst[f"gram, {dtype}"] = max(
                worst.get(f"gram, {dtype}", 0.0), require_close(f"{where}: Gram", gram, x @ x.T, size @ size.T, bound)
            )
    return {"largest_errors": worst}


def batch_of(size: int, samples: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Images, timesteps and classes for the models of ``benchmarks.sample_gradients``."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 1, size, size, generator=generator, dtype=torch.float64)
    t, label = (torch.randint(n, (samples,), generator=generator) for n in (1000, 10))
    return x.to(dtype).to(device), t.to(device), label.to(device)


def losses_of(model: nn.Module, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return (model(x, t, label) - x.flip(0)).float().square().flatten(1).mean(1)


def sample_gradients(device: str, small: bool) -> dict[str, Any]:
    """SampleGradients of a small UNet end to end, against a backward pass per sample in float64; TF32 is off."""
    from crl_kernels import SampleGradients

    from ..sample_gradients.models import SIZE, TINY

    torch.backends.cudnn.allow_tf32 = False
    samples, worst = 4, {}
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        torch.manual_seed(0)
        model = TINY["unet-tiny"]().double().to(device)
        batch = batch_of(SIZE, samples, device, torch.float64)
        losses = (model(*batch) - batch[0].flip(0)).square().flatten(1).mean(1)
        params = dict(model.named_parameters())
        rows = [torch.autograd.grad(loss, list(params.values()), retain_graph=True) for loss in losses]
        g = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
        generator = torch.Generator().manual_seed(2)
        u = {name: torch.randn(p.shape, generator=generator).to(dtype).to(device) for name, p in params.items()}
        along = torch.cat([u[name].double().flatten() for name in params])
        model.to(dtype)
        for direction in (None, u):
            with SampleGradients(model, direction, gram=direction is not None, diagonal=direction is None) as sg:
                x, t, label = batch_of(SIZE, samples, device, dtype)
                (model(x, t, label) - x.flip(0)).square().flatten(1).mean(1).sum().backward()
            mean = torch.cat([sg.mean[name].flatten() for name in params])
            results = {"sq_norms": (sg.sq_norms, g.square().sum(1)), "mean": (mean, g.mean(0))}
            if direction is None:
                diagonal = torch.cat([sg.diagonal[name].flatten() for name in params])
                results |= {"projections": (sg.projections, g @ g.mean(0)), "diagonal": (diagonal, g.square().mean(0))}
            else:
                results |= {"directions": (sg.projections, g @ along), "gram": (sg.gram, g @ g.T)}
            for name, (actual, expected) in results.items():
                scale = expected.abs().max() if name != "directions" else g.norm(dim=1).max() * along.norm()
                key = f"{name}, {dtype}"
                worst[key] = require_close(f"SampleGradients: {key}", actual, expected, scale, bound)
    return {"largest_errors": worst}


def calls_on(model: nn.Module, samples: int, size: int) -> dict[str, Callable[[], object]]:
    """A backward pass, and the same in SampleGradients: on the batch's own mean, and on one direction."""
    from crl_kernels import SampleGradients

    parameter = next(model.parameters())
    batch = batch_of(size, samples, str(parameter.device), parameter.dtype)
    u = {name: torch.randn_like(p, dtype=torch.float32) for name, p in model.named_parameters()}

    def step() -> None:
        model.zero_grad()
        losses_of(model, *batch).sum().backward()

    def statistics_of(**options: Any) -> None:
        model.zero_grad()
        with SampleGradients(model, **options):
            step()

    return {
        "forward + backward": step,
        "SampleGradients": statistics_of,
        "SampleGradients, a direction": lambda: statistics_of(direction=u),
    }


def sample_gradients_speed(device: str, small: bool) -> dict[str, Any]:
    """Milliseconds and peak memory of SampleGradients beside plain forward + backward, on a UNet."""
    from ..sample_gradients.models import SIZE, UNet

    results: dict[str, Any] = {}
    widths, samples, rounds = ((8, 8, 16), 2, 1) if small else ((128, 256, 512), 64, 10)
    for dtype in (torch.float32, torch.bfloat16):
        model = UNet(widths).to(dtype).to(device)
        rows: dict[str, Any] = {}
        for name, call in calls_on(model, samples, SIZE).items():
            rows[name] = {"ms": timed(call, device, rounds), "peak_mib": None}
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                call()
                rows[name]["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            rows[name]["times_plain"] = rows[name]["ms"] / rows["forward + backward"]["ms"]
        parameters = sum(p.numel() for p in model.parameters())
        results[f"{parameters:,} parameters, {samples} samples, {dtype}"] = rows
    return results
