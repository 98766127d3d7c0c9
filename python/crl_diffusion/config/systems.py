"""Systems of the literature, each as a method of the trainer: where it comes from, and how the method differs from it.

`--method` accepts the name of a system and uses its method: a run of `ewc-guided-replay` is a run of
`replay+diagonal:gradient`, and is labelled so. Values of lam, ranks, guidance and shares of interpolation are the
trainer's defaults, and to be tuned.
"""

from __future__ import annotations

from typing import NamedTuple


class System(NamedTuple):
    """One system."""

    method: str  # in canonical spelling
    source: str  # authors, title, venue or arXiv number
    differs: str  # what was left out, and what is different


RANK1 = (
    "Wang et al., Avoid Catastrophic Forgetting with Rank-1 Fisher from Diffusion Models, ICLR 2026, arXiv 2509.23593"
)
EWC = "Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017, arXiv 1612.00796"
INTERPOLATION = "Kozal et al., Continual Learning with Weight Interpolation, arXiv 2404.04002"
HELD_OUT = (
    "By default, the Fisher matrix has its directions and its curvatures from different samples, there from the same "
    "ones: --fisher-estimate in-sample."
)

SYSTEMS: dict[str, System] = {
    "fine-tuning": System(
        "fine-tune",
        f"The lower bound of most comparisons, for example of {RANK1}",
        "Nothing.",
    ),
    "joint-training": System(
        "joint",
        f"The upper bound of most comparisons, for example of {RANK1}",
        "Not continual. One training on all classes, with as many steps as all tasks together.",
    ),
    "ewc": System(
        "diagonal:gradient",
        EWC,
        "There a classifier, or an agent. The Fisher matrix is that of the denoising loss, with a gradient for every "
        "sample.",
    ),
    "rank1-ewc": System("rank1:gradient", RANK1, HELD_OUT),
    "pooled-distillation": System(
        "gd",
        f"GD in {RANK1}",
        "The authors' code trains on the replayed images as data, too: replay+gd.",
    ),
    "ewc-distillation": System("gd+diagonal:gradient", f"Diagonal EWC with GD in {RANK1}", "As pooled-distillation."),
    "rank1-ewc-distillation": System("gd+rank1:gradient", RANK1, f"As pooled-distillation. {HELD_OUT}"),
    "trust-region": System(
        "gd+rank1:gradient",
        "Wang, Gupta and MacLellan, Trust Region Continual Learning as an Implicit Meta-Learner, arXiv 2602.02417",
        "Its objective (equation 8 of version 1) is the task's loss + beta times that of replayed images + lam times "
        "the rank-1 EWC penalty: the Lagrangian of a trust region, not a constraint that is enforced. So it is the "
        "method of rank1-ewc-distillation, here as there with beta = 1; what the paper adds is a reading of it as "
        "meta-learning, and robot policies. It estimates each Fisher matrix from 10,000 samples in place of all images "
        "of the task, --fisher-samples 10000, and draws 1,300 images for each task, not for each class. How soon old "
        f"tasks recover, which it measures, is not measured here. {HELD_OUT}",
    ),
    "l2-anchor": System(
        "l2:gradient",
        f"The L2 baseline in {EWC}",
        "The anchor is the last task's optimum only.",
    ),
    "l2-average-anchor": System(
        "l2-average:gradient",
        f"The L2 baseline in {EWC}, with an anchor for every old task",
        "Strength lam / k for each of k old tasks, so the sum pulls with lam towards the mean of their weights.",
    ),
    "l2-distillation": System(
        "gd+l2:gradient",
        f"The cheapest penalty beside GD: the L2 baseline in {EWC}",
        "No publication that we know of: a baseline of this trainer.",
    ),
    "l2-average-distillation": System(
        "gd+l2-average:gradient",
        f"The cheapest penalty of all old tasks beside GD: the L2 baseline in {EWC}",
        "No publication that we know of: a baseline of this trainer.",
    ),
    "weight-interpolation": System(
        "interpolate0.5",
        "Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT), CVPR 2022, arXiv 2109.01903; after every "
        f"task: {INTERPOLATION}",
        "WiSE-FT interpolates once, a pretrained classifier and its fine-tuned version. Kozal et al. first align the "
        "neurons of the two networks by a permutation, and correct batch normalization after it; here there is "
        "neither.",
    ),
    "interpolated-replay": System(
        "replay+interpolate0.5",
        f"{INTERPOLATION}, with rehearsal",
        "There images of old tasks are stored, here the old model draws them. As weight-interpolation, there is no "
        "alignment.",
    ),
    "interpolated-distillation": System(
        "gd+interpolate0.5",
        f"{INTERPOLATION}, beside GD",
        "As interpolated-replay, and the old model's predictions are what is replayed.",
    ),
    "adapters": System(
        "adapters4",
        "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685; one task after "
        "another: Smith et al., Continual Diffusion: Continual Customization of Text-to-Image Diffusion with C-LoRA, "
        "arXiv 2304.06027, and Enescu and Sahbi, Deep Generative Continual Learning using Functional LoRA: FunLoRA, "
        "arXiv 2510.02631",
        "C-LoRA adapts the cross attention of a pretrained text-to-image model, adds up the adapters of all tasks and "
        "penalises where they overlap, so old concepts can still change. FunLoRA rescales the filters of a "
        "flow-matching network by functions of rank-1 matrices, one pair for each class. Here the adapters are plain "
        "LoRA of all layers, the base is the first task's model, the label chooses one task's adapters, and no penalty "
        "is needed.",
    ),
    "generative-replay": System(
        "replay",
        "Shin et al., Continual Learning with Deep Generative Replay, NeurIPS 2017",
        "There a generator draws old images for a second model, which solves the tasks; here the diffusion model is "
        "both. Real and replayed images have the same weight.",
    ),
    "generative-distillation": System(
        "masip",
        "Masip et al., Continual Learning of Diffusion Models with Generative Distillation, arXiv 2311.14028",
        "There the model has no labels; here it has, and the classes of replayed images are uniform over the old ones.",
    ),
    "ddgr": System(
        "ddgr",
        "Gao and Liu, DDGR: Continual Learning with Deep Diffusion-based Generative Replay, ICML 2023",
        "There the classifier is the product; in the authors' code for CIFAR-100 it is a pretrained AlexNet of clean "
        "images, and a replayed image takes 250 ancestral steps with the scale 1. Here it is a small network of noised "
        "images and their timesteps, which only guides DDIM; --guidance, by default 1, is the scale. Real and replayed "
        "images have the same weight; there the model is trained on their union.",
    ),
    "ewc-guided-replay": System(
        "replay+diagonal:gradient",
        "Harit et al., EWC-Guided Diffusion Replay for Exemplar-Free Continual Learning in Medical Imaging, arXiv "
        "2509.23906",
        "There EWC anchors a classifier, a vision transformer trained on real and replayed images, and the diffusion "
        "model only draws them; here EWC anchors the diffusion model itself. Weights of a classifier's loss do not "
        "carry over: lam is the trainer's default, and to be tuned.",
    ),
}
