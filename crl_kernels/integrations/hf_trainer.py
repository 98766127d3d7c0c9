"""Hugging Face's Trainer: the penalty as a callback.

    history = LowRankHistory.load("task1.safetensors", model)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[EWCCallback(history, lam=100.0)])
    trainer.train()
    history.append(estimate_fisher(model, per_sample_loss, loader))  # after the task

Trainers that are made of it, such as TRL's SFTTrainer, take the callback too, and ``causal_lm.py`` has a
``per_sample_loss`` of language models.

Trainer clips gradients (``max_grad_norm``, 1 by default) before the optimizer's step, and the penalty is applied inside
the step: it is **not** clipped, and its gradient is not in the logged ``grad_norm``. A penalty in the loss is clipped
with the task's gradient, so the two trainings differ as soon as Trainer clips, with every optimizer. With
``max_grad_norm=0`` they are equal. To have the penalty clipped, add ``history.penalty(lam)`` to the loss in
``Trainer.compute_loss``. Adafactor's own clipping (``clip_threshold``) is inside its step and affects both alike.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, distributed
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distributed.agreement import agreement_in
from ..penalty.diagonal import DiagonalHistory
from ..penalty.folded import check_penalty
from ..penalty.low_rank import LowRankHistory

HISTORY_FILE = "ewc_history.safetensors"


class EWCCallback(TrainerCallback):
    """Attaches a history to the Trainer's optimizer during training, and saves it in every checkpoint's folder.

    Args:
        history: bound to the trained model; with adapters (peft) it has only the parameters that require a gradient,
            so the adapters.
        lam, decoupled: see ``LowRankHistory.attach``; ``history.suggest_lam(lr, steps)`` is where to begin with lam.

    A checkpoint's folder has the history in ``ewc_history.safetensors``. To resume, load the history from there, and
    pass ``resume_from_checkpoint`` as usual.

    Raises:
        TypeError, ValueError: an argument of another kind; when training begins: the errors of ``attach``, and a
            history of sharded parameters.
        RuntimeError: when training begins in several processes: they have different histories, or another ``lam``.
    """

    def __init__(
        self, history: LowRankHistory | DiagonalHistory, lam: float | Tensor, *, decoupled: bool = False
    ) -> None:
        check_penalty(history, lam, decoupled)
        self._history, self._lam, self._decoupled = history, lam, decoupled
        self._attached = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._detach()  # from a training that ended with an exception
        if not self._history._binding.shards.unsharded:
            raise ValueError(
                "history has sharded parameters, and EWCCallback saves it from one process only; attach it to the "
                "optimizer yourself, and save it with history.save or torch.distributed.checkpoint in all processes."
            )
        if args.world_size > 1 and distributed.is_available() and distributed.is_initialized():
            everyone = agreement_in(distributed.group.WORLD)
            self._history._require_same_among(everyone, self._lam, self._decoupled)
        optimizer: Optimizer = kwargs["optimizer"]
        self._history.attach(optimizer, self._lam, decoupled=self._decoupled)
        self._attached = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._history.save(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / HISTORY_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._attached:
            self._history.detach()
            self._attached = False
