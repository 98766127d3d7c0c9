"""``python -m benchmarks.estimation``: samples per second of ``estimate_fisher`` and of the paper's procedure.

The paper's code goes through the task twice with batch size 1: once for mu, once for c* = mean (u . g_i)^2 / |mu|^2.
Both see the same noised images and the demo's UNet, in one process, in interleaved rounds. The command prints a
Markdown table, and writes it with all figures to ``--out``.
"""

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from crl_kernels import LowRankFisher, estimate_fisher

from .common import command
from .common.measure import clock, commit, interleaved, percentiles

PAPER = "the paper's two passes, batch size 1"
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # noised, t, label, noise


def problem(preset: str, size: int, samples: int, device: torch.device) -> tuple[nn.Module, Batch]:
    sys.path.insert(0, str(command.ROOT / "python"))  # benchmarks run from a checkout, where this may not be installed
    from crl_diffusion.diffusion import network, noising

    shape, classes = (1, size, size), 10
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(samples, *shape, generator=generator) * 2 - 1
    t, noise = noising.draw_noise(generator, (samples, *shape))
    batch = (noising.SCHEDULES["linear"].add_noise(images, noise, t), t, torch.arange(samples) % classes, noise)
    noised, t, label, noise = (part.to(device) for part in batch)
    return network.build(preset, shape, classes, seed=0).to(device), (noised, t, label, noise)


def per_sample_loss(model: nn.Module, batch: Batch) -> Tensor:
    noised, t, label, noise = batch
    prediction: Tensor = model(noised, t, class_labels=label, return_dict=False)[0]
    return (prediction - noise).square().flatten(1).mean(1)


def banded_loss(bands: int) -> Callable[[nn.Module, Batch], Any]:
    """The loss, and beside it each sample's band of timesteps, if there are any."""
    if not bands:
        return per_sample_loss
    return lambda model, batch: (per_sample_loss(model, batch), batch[1] * bands // 1000)


def paper(model: nn.Module, batch: Batch) -> LowRankFisher:
    """mu and c* with float64 sums, one backward pass a sample and pass."""
    model.eval()
    params = dict(model.named_parameters())
    samples = list(zip(*(part.split(1) for part in batch), strict=True))

    def gradient(sample: Batch) -> Tensor:
        gradients = torch.autograd.grad(per_sample_loss(model, sample).sum(), list(params.values()))
        return torch.cat([g.reshape(-1) for g in gradients]).double()

    mu = torch.zeros(sum(p.numel() for p in params.values()), dtype=torch.float64, device=batch[0].device)
    for sample in samples:
        mu += gradient(sample) / len(samples)
    norm, c = mu.norm(), torch.zeros((), dtype=torch.float64, device=mu.device)
    for sample in samples:
        c += (gradient(sample) @ mu / norm).square() / len(samples)
    parts = mu.split([p.numel() for p in params.values()])
    named = {name: part.reshape(params[name].shape) for name, part in zip(params, parts, strict=True)}
    return LowRankFisher.from_mean_gradient(named, c / norm.square(), params)


def contenders(batch_size: int) -> dict[str, dict[str, Any]]:
    """By row, the options of estimate_fisher; "strata" is how many bands of timesteps get their own direction."""
    return {
        f"estimate_fisher, batch size {batch_size}": {},
        f"estimate_fisher, unbiased=False, batch size {batch_size}": {"unbiased": False},
        f"estimate_fisher, 8 strata, batch size {batch_size}": {"strata": 8},
        f"estimate_fisher, direction='top', batch size {batch_size}": {"direction": "top"},
        f"estimate_fisher, rank=10, batch size {batch_size}": {"rank": 10},
        f"estimate_fisher, kind='diagonal', batch size {batch_size}": {"kind": "diagonal"},
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    model, batch = problem(args.model, args.size, args.samples, device)
    batches = list(zip(*(part.split(args.batch_size) for part in batch), strict=True))
    on_cpu = device.type == "cpu"

    def finished(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            call()
            if not on_cpu:
                torch.accelerator.synchronize()

        return run

    calls = {PAPER: finished(lambda: paper(model, batch))}
    for name, options in contenders(args.batch_size).items():
        loss = banded_loss(options.pop("strata", 0))
        calls[name] = finished(lambda f=loss, o=options: estimate_fisher(model, f, batches, **o))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model is not trained, and nobody uses what is estimated
        ours, theirs = estimate_fisher(model, per_sample_loss, batches, unbiased=False), paper(model, batch)
        torch.testing.assert_close(ours.curvatures, theirs.curvatures, rtol=1e-3, atol=0)
        timer = clock() if on_cpu else time.perf_counter
        seconds = interleaved(calls, args.rounds, timer)
    rows = []
    for name, times in seconds.items():
        row: dict[str, Any] = {"name": name, **percentiles(times)}
        row["samples_per_s"] = 1e3 * args.samples / row["ms"]
        rows.append(row)
    for row in rows:
        row["times_paper"] = row["samples_per_s"] / rows[0]["samples_per_s"]
    return {
        **command.record_head("estimation"),
        **({} if on_cpu else {"machine": torch.cuda.get_device_name(device)}),
        "options": {key: value for key, value in vars(args).items() if key != "out"},
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clock": "process time" if timer is time.process_time else "wall time",
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    o = result["options"]
    lines = [
        "# Fisher estimation, samples per second",
        "",
        f"`{result['command']}`, {result['date']}, {result['machine']}, {result['threads']} thread(s), "
        f"{result['clock']}, torch {result['torch']}; UNet preset {o['model']!r}, {result['parameters']:,} parameters, "
        f"images of {o['size']} x {o['size']}, {o['samples']} samples, {o['rounds']} rounds; median [20th, 80th "
        "percentile].",
        "",
        "| | ms | samples/s | × the paper's way |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = f"{row['ms']:.0f} [{row['ms_p20']:.0f}, {row['ms_p80']:.0f}]"
        lines.append(f"| {row['name']} | {times} | {row['samples_per_s']:.0f} | {row['times_paper']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    sys.path.insert(0, str(command.ROOT / "python"))  # as in problem()
    from crl_diffusion.config.networks import MODELS

    results = command.ROOT / "benchmarks" / "results"
    parser = command.parser("estimation", __doc__, "estimation_DEVICE.json and .md", results)
    parser.add_argument(
        "--model", choices=MODELS, default="tiny", help="size of the UNet, as in --model of crl-diffusion"
    )
    parser.add_argument("--size", type=command.count, default=16, help="pixels of an image's side")
    parser.add_argument("--samples", type=command.count, default=128)
    parser.add_argument("--batch-size", type=command.count, default=32)
    parser.add_argument("--rounds", type=command.count, default=5)
    parser.add_argument("--threads", type=command.count, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    command.require_kernels(args.device)
    torch.set_num_threads(args.threads)
    result = measure(args)
    command.write(args.out, f"estimation_{args.device.partition(':')[0]}", result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
