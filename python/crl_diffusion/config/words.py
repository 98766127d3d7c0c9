"""What the parts of a method do, in words: for `crl-diffusion list` and for reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crl_diffusion.config.spelling import VARIED

CONTROL = "control, not a method to use: "
SOURCES = {
    "pool": "images that the old model draws once after every task",
    "fresh": "images that it draws in every step",
    "guided": "a pool that it draws with the guidance of a classifier, which learns each task from its real images and "
    "the pool",
}
TARGETS = {"noise": "ordinary denoising", "teacher": "the prediction of the old model"}
MODES = {
    "decoupled": "a proximal step of the penalty after each optimizer step, with the same learning rate",
    "gradient": "the gradient of the penalty is added to that of the loss before clipping, as in the paper",
    "preconditioned": f"{CONTROL}after each step of Adam, a step along the gradient of the penalty, divided by Adam's "
    "denominator; Adam's moments never see it",
    "damping": f"{CONTROL}the square of the penalty's gradient is added to Adam's second moment, and nothing else: it "
    "shortens steps and never pulls",
    "once": f"{CONTROL}one proximal step at the end of each task, no penalty afterwards",
    "alone": f"{CONTROL}the first-order term only, fading with every task; nothing quadratic",
}
L2 = {
    "l2": "the weights that the last task ended with",
    "l2_average": "the mean of the weights that the old tasks ended with",
}
DIRECTIONS = {
    "top": "the top eigenvectors of the Fisher matrix",
    "mean": "the mean gradient",
    "random": f"{CONTROL}random unit directions with the same curvatures and slopes",
    "signs": f"{CONTROL}the same directions with a random sign for every entry; curvatures and slopes stay",
}
ADAPTERS = (
    "the first task trains all weights, and then each task trains low-rank adapters (LoRA) of all linear and "
    "convolutional layers, and the embeddings of its classes; a class is drawn with the weights of its task"
)
SLOPES = "keep the first-order term of each task: it moves the anchor down the slope of the old task's loss"


def describe(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """A method in a sentence for each of its parts, which `config.json` stores in `recipe` and in `settings`."""
    if recipe["curriculum"] == "joint":
        sentences = ["Trains on all classes at once: the upper bound, which is not continual."]
    elif rank := recipe.get("adapter_rank"):
        sentences = [f"Adapters of rank {rank}: {ADAPTERS}."]
    elif not recipe["replays"] and not recipe["penalty"] and not recipe.get("interpolation"):
        sentences = ["Trains on the images of each task and does nothing against forgetting."]
    elif not recipe["replays"]:
        sentences = ["Trains on the images of each task and replays nothing."]
    else:
        sentences = [_replays(recipe)]
    if share := recipe.get("interpolation"):
        sentences.append(f"At a task's end, weights move {share:g} of the way back to those of the task before.")
    if recipe["penalty"]:
        sentences.append(_penalty(recipe["penalty"]))
    ema, later = (settings.get(name, default) for name, default in VARIED.items())
    if ema:
        sentences.append(f"An average of the weights, with decay {ema:g}, replaces them at the end of a task.")
    if later != 1:
        sentences.append(f"Tasks after the first have {later:g} times the learning rate.")
    return " ".join(sentences)


def _replays(recipe: Mapping[str, Any]) -> str:
    when = {
        "pool": "once after every task",
        "fresh": "in every step",
        "guided": "once after every task, guided by a classifier of all classes so far",
    }
    what = {"noise": "as if they were data", "teacher": "to predict what the old model predicts (distillation)"}
    drawn, used = [], []
    for replay in recipe["replays"]:
        source, target = str(replay["source"]), str(replay["target"])
        drawn.append(when.get(source, source))
        share = "" if replay["weight"] == 1 else f", with weight {replay['weight']:g}"
        used.append(what.get(target, target) + share)
    weights = "; all tasks so far have the same weight" if recipe.get("weights") == "tasks" else ""
    return (
        f"Trains also on images of old classes that the old model draws {' and '.join(dict.fromkeys(drawn))}, "
        f"{' and '.join(used)}{weights}."
    )


def _penalty(penalty: Mapping[str, Any]) -> str:
    mode, direction = str(penalty.get("mode", "decoupled")), str(penalty.get("direction", "mean"))
    rank, bands = penalty.get("rank", 1), penalty.get("bands", 1)
    applied = MODES.get(mode, mode)
    if (anchor := L2.get(str(penalty.get("fisher")))) is not None:
        return f"L2 penalty on the distance to {anchor}, lam {penalty['lam']:g}: {applied}."
    if penalty.get("fisher") == "diagonal":
        kept, along = "the diagonal of each old task's Fisher matrix", ""
    else:
        kept = "one direction of each old task" if rank == 1 else f"{rank} directions of each old task"
        kept += "" if bands == 1 else f" in each of {bands} bands of timesteps"
        along = DIRECTIONS.get(direction, direction)
        if direction == "top" and rank == 1:
            along = along.replace("eigenvectors", "eigenvector")
        kept += f" ({along.removeprefix(CONTROL)})"
    if penalty.get("slopes"):
        kept += ", with slopes"
    control = along.startswith(CONTROL) or applied.startswith(CONTROL)
    name = f"{CONTROL.capitalize()}an EWC penalty" if control else "EWC penalty"
    return f"{name} on {kept}, lam {penalty['lam']:g}: {applied.removeprefix(CONTROL)}."
