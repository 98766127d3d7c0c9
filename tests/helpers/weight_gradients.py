"""Images, geometries and arguments for tests of ``sample_weight_gradients``, and results whose form is checked."""

import torch
from torch import Tensor

from crl_kernels.backends import reference
from helpers.backends import poison

ARGUMENTS = {
    "input": torch.ones(2, 4, 5, 5),
    "grad_output": torch.ones(2, 6, 5, 5),
    "kernel_size": [3, 3],
    "stride": [1, 1],
    "padding": [1, 1],
    "dilation": [1, 1],
    "groups": 2,
    "directions": None,
    "gram": True,
    "squares": True,
}


def images(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """(N, channels, height, width) with a mean, so that sums are more than noise, and the named memory layout."""
    generator = torch.Generator().manual_seed(seed)
    count, channels, height, width = shape

    def fresh(*sizes: int) -> Tensor:
        return (torch.randn(sizes, generator=generator, dtype=torch.float64) + 0.3).to(dtype)

    if layout == "channels last":
        return fresh(*shape).to(memory_format=torch.channels_last)
    if layout == "tokens":  # (N, T, C), transposed
        return fresh(count, height * width, channels).transpose(1, 2).reshape(shape)
    if layout == "offset":
        return fresh(torch.Size(shape).numel() + 1)[1:].reshape(shape)
    if layout == "sliced":
        return fresh(count, channels, height + 1, width + 3)[:, :, 1:, 1:-2]
    if layout == "transposed":
        return fresh(channels, width, count, height).permute(2, 0, 3, 1)
    if layout == "expanded samples":
        return fresh(1, *shape[1:]).expand(shape)
    if layout == "expanded pixels":
        return fresh(count, channels, 1, 1).expand(shape)
    return fresh(*shape)


def output_sizes(image: tuple[int, int], geometry) -> list[int]:
    """Of a convolution's output, by PyTorch's formula; nothing where the kernel is larger than the padded image."""
    return [
        max(0, (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1)
        for size, kernel, step, pad, spread in zip(image, *geometry, strict=True)
    ]


def checked_statistics(
    backend, a: Tensor, b: Tensor, geometry, groups: int, u: Tensor | None, gram: bool, squares: bool
) -> list[Tensor]:
    """What the backend's operator gives, which must be contiguous and have the shapes and dtypes of its schema."""
    poison()
    results = backend.sample_weight_gradients(a, b, *map(list, geometry), groups, u, gram, squares)
    count, weight, sums = len(a), (b.shape[1], a.shape[1] // groups, *geometry[0]), reference.mean_dtype(a.dtype)
    side = count if gram else 0
    shapes = [weight, (count,), (count, 1 if u is None else len(u)), (side, side), weight if squares else (0,)]
    dtypes = [sums, torch.float64, torch.float64, torch.float64, sums]
    assert [(t.shape, t.dtype) for t in results] == list(zip(shapes, dtypes, strict=True))
    assert all(t.is_contiguous() for t in results)
    return results
