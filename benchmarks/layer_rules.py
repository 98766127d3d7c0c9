"""``python -m benchmarks.layer_rules``: algorithms for the statistics of one layer's per-sample weight gradients.

Every algorithm returns the sum over the batch, all square norms and all projections on that sum; with ``Gram matrix``
it also returns the samples' Gram matrix. The algorithms are checked against each other, and take turns on one thread;
times are process CPU time.

    explicit        the operator sample_weight_gradients
    Gram            linear layers: |g_i|^2 = sum_ts (a_it . a_is) (b_it . b_is), float64; sum and projections in two
                    products of the layer's size
    unfolded Gram   convolutions: the same on their patches
    shifted Gram    convolutions without the Gram matrix: a_it . a_is as sums over the kernel's offsets of products
                    of pixels, float32; sum and projections as convolutions
"""

import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date

import torch
from torch import Tensor
from torch.nn import functional

from crl_kernels.backends import registry

from .common import command
from .common.measure import interleaved, processor

Algorithm = Callable[[], tuple[Tensor, ...]]  # sum, square norms, projections, and perhaps the Gram matrix

TOKENS = [1, 2, 4, 8, 16, 49, 196]
WIDTHS = [(32, 32), (32, 512), (512, 32), (128, 128), (128, 512), (512, 128), (512, 512), (1024, 1024)]
OTHER_BATCHES = [(128, 512), (512, 512)]  # also with 8 and 128 samples, up to 16 tokens
# channels in, channels out, height and width, kernel
CONVOLUTIONS = [
    (64, 32, 28, 3),
    (32, 32, 28, 3),
    (64, 64, 14, 3),
    (64, 64, 14, 1),
    (128, 128, 7, 3),
    (128, 128, 7, 1),
    (256, 256, 4, 3),
    (256, 256, 4, 1),
    (256, 256, 2, 3),
    (256, 256, 2, 1),
]
# Larger ones are left out: multiply-adds of an ordinary weight gradient, rows of the tokens' Gram matrix.
MOST_WORK, MOST_ROWS = 2_000_000_000, 1600


def explicit(input: Tensor, grad_output: Tensor, kernel: int, gram: bool) -> tuple[Tensor, ...]:
    padding = kernel // 2
    results = torch.ops.crl_kernels.sample_weight_gradients(
        input, grad_output, [kernel] * 2, [1, 1], [padding] * 2, [1, 1], 1, None, gram, False
    )
    return results[:4] if gram else results[:3]


def token_gram(a: Tensor, b: Tensor, gram: bool) -> tuple[Tensor, ...]:
    """a: (N, T, C), b: (N, T, O)"""
    total = b.flatten(0, 1).T @ a.flatten(0, 1)
    projections = ((a @ total.T) * b).sum((1, 2), dtype=torch.float64)
    a, b = a.double(), b.double()
    if not gram:
        return total, ((a @ a.mT) * (b @ b.mT)).sum((1, 2)), projections
    rows_a, rows_b, tokens = a.flatten(0, 1), b.flatten(0, 1), a.shape[1]
    products = (rows_a @ rows_a.T) * (rows_b @ rows_b.T)
    products = products.unflatten(0, (-1, tokens)).unflatten(2, (-1, tokens)).sum((1, 3))
    return total, products.diagonal(), projections, products


def unfolded_gram(input: Tensor, grad_output: Tensor, kernel: int, gram: bool) -> tuple[Tensor, ...]:
    patches = functional.unfold(input, kernel, padding=kernel // 2).mT.contiguous()
    return token_gram(patches, grad_output.flatten(2).mT.contiguous(), gram)


def shifted_gram(input: Tensor, grad_output: Tensor, kernel: int) -> tuple[Tensor, ...]:
    channels, side, padding = input.shape[1], input.shape[2], kernel // 2
    shape = (grad_output.shape[1], channels, kernel, kernel)
    total = torch.nn.grad.conv2d_weight(input, shape, grad_output, padding=padding)
    projections = (functional.conv2d(input, total, padding=padding) * grad_output).sum((1, 2, 3), dtype=torch.float64)
    pixels = functional.pad(input, [padding] * 4).flatten(2)
    padded = side + 2 * padding
    s = (pixels.mT @ pixels).unflatten(1, (padded, padded)).unflatten(3, (padded, padded))
    products = torch.zeros(len(input), side, side, side, side)
    for y in range(kernel):
        for x in range(kernel):
            products += s[:, y : y + side, x : x + side, y : y + side, x : x + side]
    b = grad_output.flatten(2)
    sq_norms = (products.flatten(3).flatten(1, 2) * (b.mT @ b)).sum((1, 2), dtype=torch.float64)
    return total, sq_norms, projections


def linear(samples: int, tokens: int, d_in: int, d_out: int) -> tuple[Callable[[], Tensor], dict[str, Algorithm]]:
    a, b = torch.randn(samples, tokens, d_in), torch.randn(samples, tokens, d_out)
    images = tuple(tensor.mT.unsqueeze(2) for tensor in (a, b))
    algorithms: dict[str, Algorithm] = {}
    for gram, suffix in ((False, ""), (True, " + Gram matrix")):
        algorithms[f"explicit{suffix}"] = lambda gram=gram: explicit(*images, 1, gram)
        if not gram or samples * tokens <= MOST_ROWS:
            algorithms[f"Gram{suffix}"] = lambda gram=gram: token_gram(a, b, gram)
    return lambda: b.flatten(0, 1).T @ a.flatten(0, 1), algorithms


def convolution(samples: int, d_in: int, d_out: int, side: int, kernel: int) -> tuple[Callable[[], Tensor], dict]:
    input, grad_output = torch.randn(samples, d_in, side, side), torch.randn(samples, d_out, side, side)
    algorithms: dict[str, Algorithm] = {"shifted Gram": lambda: shifted_gram(input, grad_output, kernel)}
    for gram, suffix in ((False, ""), (True, " + Gram matrix")):
        algorithms[f"explicit{suffix}"] = lambda gram=gram: explicit(input, grad_output, kernel, gram)
        if not gram or samples * side * side <= MOST_ROWS:
            algorithms[f"unfolded Gram{suffix}"] = lambda gram=gram: unfolded_gram(input, grad_output, kernel, gram)
    shape = (d_out, d_in, kernel, kernel)
    return lambda: torch.nn.grad.conv2d_weight(input, shape, grad_output, padding=kernel // 2), algorithms


def check(algorithms: dict[str, Algorithm]) -> None:
    """Requires all results to equal the explicit kernel's, within 1e-4 of the largest value."""
    expected = algorithms["explicit + Gram matrix"]()
    for name, algorithm in algorithms.items():
        results = zip(("sum", "square norms", "projections", "Gram matrix"), algorithm(), expected, strict=False)
        for statistic, actual, right in results:
            error = (actual.flatten() - right.flatten()).abs().max() / right.abs().max()
            if not error < 1e-4:
                raise AssertionError(f"{name}: {statistic} differ by {error:.1e} of the largest")


def cases() -> Iterator[tuple[str, tuple[Callable[[], Tensor], dict[str, Algorithm]]]]:
    sizes = [(32, tokens, *widths) for widths in WIDTHS for tokens in TOKENS]
    sizes += [(n, tokens, *widths) for n in (8, 128) for widths in OTHER_BATCHES for tokens in TOKENS if tokens <= 16]
    for samples, tokens, d_in, d_out in sizes:
        if samples * tokens * d_in * d_out <= MOST_WORK:
            yield f"linear {d_in} -> {d_out}, T = {tokens}, N = {samples}", linear(samples, tokens, d_in, d_out)
    for d_in, d_out, side, kernel in CONVOLUTIONS:
        name = f"conv {kernel} x {kernel}, {d_in} -> {d_out} @ {side}, N = 32"
        yield name, convolution(32, d_in, d_out, side, kernel)


def main() -> None:
    parser = command.parser("layer_rules", __doc__, "layer_rules_cpu_1thread.md")
    parser.add_argument("--rounds", type=command.count, default=5)
    arguments = parser.parse_args()
    command.require_kernels()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = ["explicit", "Gram", "unfolded Gram", "shifted Gram"]
    names += ["explicit + Gram matrix", "Gram + Gram matrix", "unfolded Gram + Gram matrix"]
    lines = [
        "# Statistics of per-sample weight gradients, by layer and way",
        "",
        f"`{command.command_line('layer_rules')}`, {date.today()}, {processor()}, 1 thread, "
        f"process CPU time, torch {torch.__version__}, "
        f"{registry.implementation('cpu', 'sample_weight_gradients')} kernels, float32; medians of "
        f"{arguments.rounds} rounds, ms. Ordinary: the batch's weight gradient alone.",
        "",
        f"| layer | ordinary | {' | '.join(names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    print("\n".join(lines), flush=True)
    for name, (ordinary, algorithms) in cases():
        check(algorithms)
        seconds = interleaved({"ordinary": ordinary, **algorithms}, arguments.rounds, time.process_time)
        cells = [f"{1e3 * statistics.median(seconds[n]):.2f}" if n in seconds else "" for n in ("ordinary", *names)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "layer_rules_cpu_1thread.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
