"""Presets: named settings of whole experiments, as differences from the defaults.

`crl-diffusion train --preset NAME` uses the settings of a preset, `compare --preset NAME` also its methods and seeds.
Other options override them. `crl-diffusion list` prints the resolved settings of each preset.

The paper is arXiv 2509.23593: three data sets of 10 classes as 5 tasks x 2, ImageNet at 32 pixels as 20 tasks x 50,
labels in their own order. Where it gives no number that we know of, the value is ours and listed in OURS.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

PresetName = Literal[
    "demo",
    "forgetting",
    "regime-mnist-gpu",
    "paper-mnist",
    "paper-fashion-mnist",
    "paper-cifar10",
    "paper-imagenet32",
]
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
    "pool_latents": "shared",
    "eval_steps": 50,
    "fisher_samples": 0,
    "fisher_estimate": "in-sample",
    "replay_batch": 128,
    "clip": 0.0,
    "eval_samples": 1000,
    "log_every": 100,
    "checkpoint_every": 1000,
}
# Settings whose value in the paper presets is ours; the others are the paper's or, where it is silent, those of its
# authors' code. eval_samples is the number of held-out images of a class.
OURS = ("precision", "eval_samples", "log_every", "checkpoint_every", "device")
# Not in the table of the presets: read only by methods, and with data, that are in none of them.
UNUSED = ("fresh_steps", "guidance", "skip_unreadable")


def _paper(about: str, data: str, **settings: Any) -> Preset:
    methods, seeds = tuple(PAPER_METHODS.values()), (0, 1, 2)
    return Preset(f"the paper's {about}", {"data": data, **_PAPER, **settings}, methods, seeds, "inception")


# The time of regime-mnist-gpu is estimated, not measured. A pass of the small network on 256 images of 16 pixels takes
# 122 GFLOP forwards and twice that backwards (torch.utils.flop_counter). With the teacher's pass on 128 images, a step
# takes 428 GFLOP: 1.7 ms at 25 % of the 989 TFLOP/s of an H100 in bf16, which is optimistic for so small a network.
# Launching kernels takes longer: a forward pass has 197 operators that compute, a backward pass 219. At 1.5 kernels
# each and 10 us a kernel that is 3 ms a forward pass, 9.2 ms a step, and 6.2 ms a step of the first task, which has no
# teacher. Seconds of a run:
#     training: 900 steps of the first task and of four later ones                             39
#     pools: 20,000 images in 80 batches of 256 at most, 50 DDIM steps of 3 ms each            12
#     evaluations: 15 times 768 images in 3 batches, 50 DDIM steps of 3 ms each                 7
#     start 15, features on one CPU thread and checkpoints 4                                   19
# Four runs of 77 s, 30 s for the Fisher matrices of one, and 30 s before the first make about 6 minutes.
PRESETS: dict[str, Preset] = {
    "demo": Preset("the defaults: digits in minutes on one CPU core", {}, ("fine-tune", "gd", "gd+rank1"), (0,)),
    "forgetting": Preset(
        "digits, a small network trained for long at a constant rate: distillation alone (gd) forgets a little; "
        "compared with fine-tuning, with rank 1 in the gradient, and with an average of the weights",
        {
            "model": "mlp",
            "steps": 2000,
            "batch": 16,
            "replay_batch": 16,
            "lr": 3e-3,
            "lr_schedule": "constant",
            "clip": 0.0,
            "fisher_samples": 4000,
        },
        ("fine-tune", "gd", "gd+rank1:gradient,lam=3000", "gd@ema=0.999"),
        (0, 1),
    ),
    "regime-mnist-gpu": Preset(
        "not run; MNIST at 16 pixels at the paper's constant rate, an estimated 6 minutes on one H100-class GPU: does "
        "rank 1 in the gradient gain more than an average of the weights or a lower rate of later tasks?",
        {
            "data": "mnist",
            "model": "small",
            "precision": "bf16",
            "steps": 900,
            "batch": 128,
            "replay_batch": 128,
            "lr": 2e-4,
            "lr_schedule": "constant",
            "clip": 0.0,
            "pool": 1000,
            "pool_steps": 50,
            "pool_latents": "shared",
            "eval_samples": 384,
            "eval_steps": 50,
            "fisher_samples": 4000,
            "log_every": 100,
            "checkpoint_every": 1000,
            "device": "cuda",
        },
        ("gd", f"gd+rank1:gradient,lam={PAPER_LAM}", "gd@ema=0.999", "gd@lr-later=0.3"),
        (0,),
    ),
    "paper-mnist": _paper("MNIST, 5 tasks x 2 digits", "mnist"),
    "paper-fashion-mnist": _paper("FashionMNIST, 5 tasks x 2 classes", "fashion_mnist"),
    "paper-cifar10": _paper("CIFAR-10, 5 tasks x 2 classes", "cifar10"),
    "paper-imagenet32": _paper(
        "ImageNet-1k at 32 pixels, 20 tasks x 50 classes", "imagenet32", epochs=100, pool=1300, eval_samples=50
    ),
}
