"""Lightning's Trainer: the penalty as a callback.

    history = LowRankHistory.load("task1.safetensors", module)
    trainer = Trainer(callbacks=[EWCCallback(history, lam=100.0)])
    trainer.fit(module, loader)
    history.append(estimate_fisher(module, per_sample_loss, loader))  # after the task

Lightning clips gradients (``gradient_clip_val``) before the optimizer moves the parameters, and the penalty comes after
clipping: it is **not** clipped, with automatic and with manual optimization. To have it clipped, add
``history.penalty(lam)`` to the loss in ``training_step``. With ``accumulate_grad_batches`` the penalty comes once for
each step of the optimizer. With ``precision="16-mixed"`` it is added to unscaled gradients, and a step that the scaler
skips has no penalty.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..model.binding import agreement_about
from ..penalty.diagonal import DiagonalHistory
from ..penalty.folded import check_penalty
from ..penalty.low_rank import LowRankHistory


class EWCCallback(Callback):
    """Attaches a history to the Trainer's optimizer while it fits, and keeps it in Lightning's checkpoints.

    Args:
        history: bound to the trained module, or to a part of it. It moves to the module's device and back with it.
        lam, decoupled: see ``LowRankHistory.attach``.

    ``trainer.fit(module, ckpt_path=...)`` loads the checkpoint's history into ``history``. ``validate``, ``test`` and
    ``predict`` do not, so a history that was appended to since remains as it is.

    Raises:
        TypeError, ValueError: an argument of another kind; when fitting begins: the errors of ``attach``, several
            optimizers, a history of sharded parameters.
        RuntimeError: when fitting begins in several processes: they have different histories, or another ``lam``.
    """

    def __init__(
        self, history: LowRankHistory | DiagonalHistory, lam: float | Tensor, *, decoupled: bool = False
    ) -> None:
        check_penalty(history, lam, decoupled)
        self._history, self._lam, self._decoupled = history, lam, decoupled
        self._attached = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._history._binding.shards.unsharded:
            raise ValueError(
                "history has sharded parameters, which Lightning's checkpoints of callbacks cannot hold; attach it to "
                "the optimizer yourself, and save it with history.save or torch.distributed.checkpoint."
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"the module configures {len(trainer.optimizers)} optimizers; expected one. Attach a history to each "
                "of them yourself, in on_fit_start of the module, with include= for the parameters that it moves."
            )
        self._history._require_same_among(agreement_about(trainer.model), self._lam, self._decoupled)
        self._history.to(pl_module.device)
        self._history.attach(trainer.optimizers[0], self._lam, decoupled=self._decoupled)
        self._attached = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        self._history.to(pl_module.device)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        return dict(self._history.state_dict())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit" and (state := checkpoint["callbacks"].get(self.state_key)):
            self._history.load_state_dict(state)

    def _detach(self) -> None:
        if self._attached:
            self._history.detach()
            self._attached = False
