"""Presets: named settings of whole experiments, as differences from the defaults.

`crl-diffusion train --preset NAME` uses the settings of a preset, `compare --preset NAME` also its methods and seeds.
Other options override them. `crl-diffusion list` prints the resolved settings of each preset.

The paper is arXiv 2509.23593: three data sets of 10 classes as 5 tasks x 2, ImageNet at 32 pixels as 20 tasks x 50,
labels in their own order. Where it gives no number that we know of, the value is ours and listed in OURS.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

PresetName = Literal["demo", "paper-mnist", "paper-fashion-mnist", "paper-cifar10", "paper-imagenet32"]
PAPER_LAM = 15000  # for a loss that is the MEAN over C*H*W, as the trainer's is

# The paper's methods in the trainer's spelling. The paper adds penalties to the gradient. Its generative distillation
# (GD) matches the teacher's prediction on pooled images; its authors' code also uses these images as data.
PAPER_METHODS: dict[str, str] = {
    "joint (not continual)": "joint",
    "fine-tuning": "fine-tune",
    "diagonal EWC, no replay": f"diagonal:gradient,lam={PAPER_LAM}",
    "rank-1 EWC, no replay": f"rank1:gradient,lam={PAPER_LAM}",
    "GD": "gd",
    "diagonal + GD": f"gd+diagonal:gradient,lam={PAPER_LAM}",
    "rank-1 + GD": f"gd+rank1:gradient,lam={PAPER_LAM}",
}
# Available by name; not in the presets' comparison. The paper computes its rank-k terms by stochastic power iteration,
# the trainer takes exact top eigenvectors of the samples' Gram matrix.
PAPER_VARIANTS: dict[str, str] = {
    "rank-1 + GD, as the authors' code has it": f"replay+gd+rank1:gradient,lam={PAPER_LAM}",
    **{f"rank-{k} + GD (exact eigenvectors)": f"gd+rank{k}:gradient,lam={PAPER_LAM}" for k in (2, 3, 4, 5)},
}


class Preset(NamedTuple):
    """One experiment: settings that differ from the defaults, and the default methods and seeds of `compare`."""

    about: str
    settings: dict[str, Any]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    extractor: str = "cnn"  # the network that FIDs are measured on


_PAPER: dict[str, Any] = {
    "image_size": 32,  # MNIST and FashionMNIST with a black border
    "model": "paper",
    "epochs": 200,
    "batch": 128,
    "lr": 2e-4,
    "lr_schedule": "constant",
    "pool": 5000,
    "pool_steps": 50,
    "eval_steps": 50,
    "fisher_samples": 0,
    "fisher_estimate": "in-sample",
    "replay_batch": 128,
    "clip": 0.0,
    "eval_samples": 1000,
    "log_every": 100,
    "checkpoint_every": 1000,
}
# Settings whose value in the paper presets is ours. eval_samples is the number of held-out images of a class.
OURS = (
    *("replay_batch", "lr_later", "lr_schedule", "clip", "ema", "precision", "pool_latents", "eval_samples"),
    *("log_every", "checkpoint_every"),
)
# Not in the table of the presets: read only by methods that are not the paper's, or replaced by another setting.
UNUSED = ("steps", "fresh_steps", "device")


def _paper(about: str, data: str, **settings: Any) -> Preset:
    methods, seeds = tuple(PAPER_METHODS.values()), (0, 1, 2)
    return Preset(f"the paper's {about}", {"data": data, **_PAPER, **settings}, methods, seeds, "inception")


PRESETS: dict[str, Preset] = {
    "demo": Preset("the defaults: digits in minutes on one CPU core", {}, ("fine-tune", "gd", "gd+rank1"), (0,)),
    "paper-mnist": _paper("MNIST, 5 tasks x 2 digits", "mnist"),
    "paper-fashion-mnist": _paper("FashionMNIST, 5 tasks x 2 classes", "fashion_mnist"),
    "paper-cifar10": _paper("CIFAR-10, 5 tasks x 2 classes", "cifar10"),
    "paper-imagenet32": _paper(
        "ImageNet-1k at 32 pixels, 20 tasks x 50 classes", "imagenet32", epochs=100, pool=1300, eval_samples=50
    ),
}
