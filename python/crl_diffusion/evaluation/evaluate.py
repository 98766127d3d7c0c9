"""Evaluation: after a task, images of all tasks learnt are drawn and measured; one row of metrics.jsonl for each task.

A row holds the numbers (`fid`, `accuracy`, `class_kl`) and how they were measured: extractor and classifier with their
digests, number of drawn images, seed, sampler and its steps, held-out part and its number of images. Nothing here
depends on the method or changes the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from crl_diffusion.config.settings import ExtractorName, RunConfig
from crl_diffusion.data.images import Images, to_pixels
from crl_diffusion.data.tasks import Data, Task
from crl_diffusion.diffusion import sampling
from crl_diffusion.errors import OptionError, RecordError, WriteError
from crl_diffusion.evaluation import classifiers, extractors
from crl_diffusion.evaluation.classifiers import Classifier
from crl_diffusion.evaluation.extractors import Custom
from crl_diffusion.evaluation.features import Extractor
from crl_diffusion.evaluation.fid import Statistics, fid, kept_statistics
from crl_diffusion.evaluation.metrics import class_kl
from crl_diffusion.files import Row, write_tensors
from crl_diffusion.run_folder.readers import CONFIG_REMEDY, read_config, samples_path

KEPT_SAMPLES = 12  # images of each class and evaluation that stay in the run folder


class Instruments(NamedTuple):
    """The networks that measure a run: FIDs use `extractor`, accuracies and class histograms use `classifier`.
    Statistics of real images are kept in `folder`."""

    extractor: Extractor
    classifier: Classifier
    folder: Path

    def names(self) -> dict[str, str]:
        """Names in config.json, which must be the same when the run is resumed."""
        return {"extractor": self.extractor.name, "classifier": self.classifier.name}

    def about(self, config: RunConfig, data: Data) -> list[str]:
        """Lines about the networks, the numbers of images and the bias of the FIDs."""
        used = [self.extractor] if self.extractor is self.classifier else [self.extractor, self.classifier]
        lines = [network.about() for network in used]
        if self.classifier is not self.extractor:
            lines[-1] = lines[-1].replace("feature extractor", "conditional accuracy by")
        held_out = [len(task.held_out.labels) for task in data.tasks]
        drawn = config.eval_samples * max(len(task.classes) for task in data.tasks)
        images = " to ".join(map(str, dict.fromkeys((min(held_out), max(held_out)))))
        lines.append(
            f"a task's FID compares {drawn} images (DDIM, {config.eval_steps} steps) with {images} held-out "
            f"{config.held_out} images"
        )
        if drawn < self.extractor.num_features:
            lines.append(
                f"{drawn} images are fewer than {self.extractor.num_features} features: FIDs are biased far upwards, "
                "compare at equal counts only, or raise --eval-samples"
            )
        return lines


def instruments(chosen: ExtractorName | Custom, data: Data, folder: Path, device: str = "cpu") -> Instruments:
    """The chosen extractor, and the `cnn` of the data set, which classifies with any extractor."""
    try:
        classifier = classifiers.classifier(data, folder)
        extractor = classifier if chosen == "cnn" else extractors.extractor(chosen, data, folder, device)
    except WriteError as error:
        raise OptionError(f"{error}; make {str(folder)!r} writable, with room on its disk") from error
    return Instruments(extractor, classifier, folder)


Draw = Callable[[Tensor, Tensor], Tensor]  # latents (N, C, S, S), labels (N,) -> images (N, C, S, S) in [-1, 1], CPU


def evaluate(draw: Draw, tools: Instruments | None, data: Data, config: RunConfig, learnt: int, out: Path) -> list[Row]:
    """A row for each of the first `learnt` tasks; the first images of each class are kept in `out`/samples.

    `draw` is the model's sampler, with `config.eval_steps` steps of DDIM. The n-th image of class c starts from the
    same noise in every evaluation, whatever else is drawn; the batches of the sampler change only the rounding of its
    arithmetic. Without tools, images are drawn for another process that measures them, and nothing is returned or
    written.
    """
    rows, kept = [], []
    for task in data.tasks[:learnt]:
        label = torch.tensor(task.classes).repeat_interleave(config.eval_samples)
        images = draw(sampling.draw_latents(config.seed, "evaluation", label, data.shape), label)
        if tools is None:
            continue
        pixels = to_pixels(images)
        first = torch.cat([torch.nonzero(label == c).flatten()[:KEPT_SAMPLES] for c in task.classes])
        kept.append(Images(pixels[first], label[first]))
        rows.append(
            {
                "kind": "evaluation",
                "after_task": learnt,
                "task": task.index + 1,
                **measure(tools, data, config, task, Images(pixels, label)),
                "sampler": "DDIM",
                "sampler_steps": config.eval_steps,
                "seed": config.seed,
            }
        )
    if kept:
        pixels, labels = torch.cat([part.pixels for part in kept]), torch.cat([part.labels for part in kept])
        write_tensors(samples_path(out, learnt), {"pixels": pixels, "labels": labels})
    return rows


def measure(tools: Instruments, data: Data, config: RunConfig, task: Task, generated: Images) -> Row:
    """The numbers of one task. The labels of `generated` are the classes that the model was asked to draw."""
    predictions = tools.classifier.predictions(generated.pixels)
    predicted, asked = (counts(labels, task.classes) for labels in (predictions, generated.labels))
    elsewhere = len(predictions) - sum(predicted)
    return {
        "fid": fid(tools.extractor, real(tools, data, config, task), generated.pixels),
        "accuracy": int((predictions == generated.labels).sum()) / len(predictions),
        "class_kl": class_kl(predicted, elsewhere, asked),
        "predicted": predicted,
        "predicted_elsewhere": elsewhere,
        "extractor": tools.extractor.name,
        "classifier": tools.classifier.name,
        "samples": len(predictions),
        "held_out": config.held_out,
        "held_out_images": len(task.held_out.labels),
    }


def prepare(tools: Instruments, config: RunConfig, data: Data) -> None:
    """Store the statistics of all tasks' real images, so that processes that share the folder only read them."""
    if tools.extractor.keep:
        for task in data.tasks:
            real(tools, data, config, task)


def real(tools: Instruments, data: Data, config: RunConfig, task: Task) -> Statistics:
    """Statistics of the task's held-out images."""
    subject = {
        "data": data.name,
        "size": str(data.shape[-1]),
        "task": " ".join(map(str, task.classes)),
        "part": config.held_out,
    }
    return kept_statistics(tools.extractor, task.held_out.pixels, tools.folder, subject)


def counts(labels: Tensor, classes: tuple[int, ...]) -> list[int]:
    """How often each of the classes is among the labels."""
    return [int((labels == c).sum()) for c in classes]


def check_finished(chosen: ExtractorName | Custom, out: Path) -> None:
    """OptionError if the finished run was measured with another extractor than the chosen one."""
    measured = read_config(out).get("extractor")
    if measured is None:
        raise RecordError(out / "config.json", "names no extractor", CONFIG_REMEDY)
    wanted = chosen.name if isinstance(chosen, Custom) else extractors.KINDS.get(chosen, chosen)
    if measured != wanted and (isinstance(chosen, Custom) or not measured.startswith(f"{wanted}-")):
        name = chosen.name if isinstance(chosen, Custom) else chosen
        raise OptionError(
            f"--extractor is {name}, but the run in {str(out)!r} was measured with {measured}; choose that one, or "
            "another folder"
        )
