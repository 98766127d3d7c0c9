"""``python -m benchmarks.int8``: what directions in int8 and bfloat16 cost in accuracy, on real Fishers.

Small models are trained on one half of a data set's classes: two UNets of the reference trainer, and a transformer that
predicts the next pixel of a digit. The Fisher of that task is estimated once for each storage dtype, from the same
samples. Then the model is trained on the other classes. Reported, relative to float32: the curvatures a_k, which are
u_k^T F u_k of the stored directions over held-out samples (the largest error of a term), and the penalty's value where
the later task has moved the parameters. Nothing is timed.
"""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import crl_kernels as ck

from .common import command
from .common.measure import commit

Loss = Callable[[nn.Module, Any], Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
DIRECTIONS: dict[str, dict[str, Any]] = {"mean gradient": {}, "top 4": {"rank": 4}}
LIMITS = {"curvature": 0.01, "penalty": 0.02}  # of int8
PIXELS, SHADES = 64, 17  # of a digit


class Transformer(nn.Module):
    """Predicts each pixel of a digit from those before it."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.shades, self.places = nn.Embedding(SHADES, width), nn.Embedding(PIXELS, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "mlp": nn.Sequential(
                        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
                    ),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, SHADES))

    def forward(self, pixels: Tensor) -> Tensor:
        places = torch.arange(pixels.shape[1]).expand_as(pixels)
        hidden = self.shades(pixels) + self.places(places)
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm"](hidden)).unflatten(-1, (3, self.heads, -1)).unbind(2)
            heads = (part.transpose(1, 2) for part in (q, k, v))
            mixed = functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
            hidden = hidden + block["out"](mixed)
            hidden = hidden + block["mlp"](hidden)
        return self.head(hidden)


def next_pixel_loss(model: nn.Module, pixels: Tensor) -> Tensor:
    logits = model(pixels[:, :-1])
    return functional.cross_entropy(logits.transpose(1, 2), pixels[:, 1:], reduction="none").mean(1)


def transformer() -> tuple[nn.Module, Loss, list[tuple[Tensor, ...]]]:
    """(model, per-sample loss, the samples of each of two tasks)"""
    data = images_of("digits", Path("unused"))
    tasks = [((images.float() + 1) * 8).round().long().flatten(1) for images, _ in data]
    torch.manual_seed(0)
    return Transformer(), next_pixel_loss, [(pixels,) for pixels in tasks]


def images_of(name: str, root: Path) -> list[tuple[Tensor, Tensor]]:
    """(images in [-1, 1], labels) of the first five classes, and of the others."""
    sys.path.insert(0, str(command.ROOT / "python"))  # benchmarks run from a checkout, where this may not be installed
    from crl_diffusion.config.settings import RunConfig
    from crl_diffusion.data.images import to_float
    from crl_diffusion.data.tasks import load
    from crl_diffusion.errors import OptionError
    from crl_diffusion.training.plan import resolve

    config = resolve(RunConfig(method="fine-tune", data=name, tasks=2, classes_per_task=5, device="cpu"))
    try:
        data = load(config, root)
    except OptionError as error:
        raise SystemExit(f"python -m benchmarks.int8: {error}") from None
    return [(to_float(task.train.pixels), task.train.labels) for task in data.tasks]


def unet(name: str, root: Path) -> tuple[nn.Module, Loss, list[tuple[Tensor, ...]]]:
    tasks = images_of(name, root)
    from crl_diffusion.diffusion import network, noising

    schedule, samples = noising.SCHEDULES["linear"], []
    for task, (images, labels) in enumerate(tasks):
        t, noise = noising.draw_noise(noising.stream(0, "int8", task), tuple(images.shape))
        samples.append((schedule.add_noise(images, noise, t), t, labels, noise))

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        noised, t, labels, noise = batch
        return noising.per_sample_loss(network.predict(model, noised, t, labels), noise)

    shape = tuple(tasks[0][0].shape[1:])
    return network.build("mini", shape, 10, seed=0), loss, samples  # type: ignore[arg-type]


def batches_of(samples: tuple[Tensor, ...], order: Tensor, size: int) -> list[Any]:
    parts = list(zip(*(part[order].split(size) for part in samples), strict=True))
    return [batch[0] if len(batch) == 1 else batch for batch in parts]


def train(model: nn.Module, loss: Loss, samples: tuple[Tensor, ...], steps: int) -> None:
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(len(samples[0]), (64,), generator=generator)
        (batch,) = batches_of(samples, chosen, 64)
        optimizer.zero_grad()
        loss(model, batch).mean().backward()
        optimizer.step()


def measure(name: str, steps: int, count: int, root: Path) -> dict[str, Any]:
    model, loss, (first, later) = {
        "UNet mini, digits": partial(unet, "digits", root),
        "UNet mini, MNIST": partial(unet, "mnist", root),
        "transformer, digits": transformer,
    }[name]()
    train(model, loss, first, steps)
    order = torch.randperm(len(first[0]), generator=torch.Generator().manual_seed(2))[:count]
    histories: dict[tuple[str, torch.dtype], tuple[ck.LowRankHistory, ck.LowRankFisher]] = {}
    for direction, options in DIRECTIONS.items():
        for dtype in DTYPES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ck.FisherWarning)  # how good the directions are is not the question
                batches = batches_of(first, order, 64)
                fisher = ck.estimate_fisher(model, loss, batches, storage_dtype=dtype, **options)
            history = ck.LowRankHistory(model)
            history.append(fisher)
            histories[direction, dtype] = history, fisher
    train(model, loss, later, steps)
    rows = []
    for (direction, dtype), (history, fisher) in histories.items():
        exact, exact_fisher = histories[direction, torch.float32]
        value, exact_value = (float(h.penalty(1.0).detach()) for h in (history, exact))
        rows.append(
            {
                "direction": direction,
                "dtype": str(dtype).removeprefix("torch."),
                "bytes": fisher.nbytes / len(fisher) / fisher.layout.numel,
                "curvature": float((fisher.curvatures / exact_fisher.curvatures - 1).abs().max()),
                "penalty": abs(value / exact_value - 1),
            }
        )
    return {"name": name, "parameters": fisher.layout.numel, "rows": rows}


MODELS = ("UNet mini, digits", "UNet mini, MNIST", "transformer, digits")


def page(record: dict[str, Any]) -> str:
    columns = ["model", "parameters", "direction", "stored in", "bytes per parameter and term", "curvature", "penalty"]
    lines = [f"| {' | '.join(columns)} |", "|---|---:|---|---|---:|---:|---:|"]
    for model in record["models"]:
        for row in model["rows"]:
            exact = row["dtype"] == "float32"
            errors = ["0" if exact else f"{100 * row[key]:.4f} %" for key in LIMITS]
            cells = [model["name"], f"{model['parameters']:,}", row["direction"], row["dtype"], f"{row['bytes']:.2f}"]
            lines.append(f"| {' | '.join([*cells, *errors])} |")
    head = f"`{record['command']}`, {record['machine']}, {record['date']}, torch {record['torch']}."
    verdict = "Every error of int8 is within 1 % (curvature) and 2 % (penalty)."
    if worse := beyond(record):
        verdict = f"**Beyond 1 % (curvature) or 2 % (penalty):** {'; '.join(worse)}."
    text = "Errors relative to float32: of curvatures, the largest of a term; of the penalty after a later task."
    return "\n".join([f"# Directions in int8\n\n{head}\n\n{text} {verdict}\n", *lines, ""])


def beyond(record: dict[str, Any]) -> list[str]:
    """The errors of int8 that are larger than the limits."""
    return [
        f"{model['name']}, {row['direction']}, {key}"
        for model in record["models"]
        for row in model["rows"]
        for key, limit in LIMITS.items()
        if row["dtype"] == "int8" and not row[key] <= limit
    ]


def main() -> None:
    parser = command.parser("int8", __doc__, "int8.json and int8.md")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="some of the models")
    parser.add_argument("--steps", type=command.count, default=300, help="of training on each task (default: 300)")
    parser.add_argument("--samples", type=command.count, default=512, help="of each estimate (default: 512)")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    arguments = parser.parse_args()
    command.require_kernels()
    torch.set_num_threads(1)
    record = {
        **command.record_head("int8"),
        "commit": commit(),
        "torch": torch.__version__,
        "steps": arguments.steps,
        "samples": arguments.samples,
        "models": [measure(m, arguments.steps, arguments.samples, arguments.data_root) for m in arguments.models],
    }
    text = page(record)
    command.write(arguments.out, "int8", record, text)
    print(text)


if __name__ == "__main__":
    main()
