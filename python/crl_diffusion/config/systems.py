"""Published systems, each as a method of the trainer: where it comes from, and how the method differs from it.

`--method` accepts the name of a system and uses its method: a run of `ewc-guided-replay` is a run of
`replay+diagonal:gradient`, and is labelled so.
"""

from __future__ import annotations

from typing import NamedTuple


class System(NamedTuple):
    """One published system."""

    method: str  # in canonical spelling
    source: str  # authors, title, venue or arXiv number
    differs: str  # what was left out, and what is different


SYSTEMS: dict[str, System] = {
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
        "There the generator is a GAN, and a classifier is what is trained; here the diffusion model is both. Real and "
        "replayed images have the same weight, not shares by the number of tasks.",
    ),
    "generative-distillation": System(
        "masip",
        "Masip et al., Continual Learning of Diffusion Models with Generative Distillation, arXiv 2311.14028",
        "There the model has no labels; here it has, and the classes of replayed images are uniform over the old ones.",
    ),
    "ddgr": System(
        "ddgr",
        "Gao and Liu, DDGR: Continual Learning with Deep Diffusion-based Generative Replay, ICML 2023",
        "There the classifier is the product, in the authors' code a pretrained AlexNet of clean images, and images "
        "take 250 ancestral steps; here it is a small network of noised images and their timesteps that only guides "
        "DDIM. The authors' code has the scale 1 on CIFAR-100, the default of --guidance. Real and replayed images "
        "have the same weight; there the model is trained on their union.",
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
