"""Avalanche: the penalty as a plugin of a strategy.

    history = LowRankHistory(model)
    strategy = Naive(model=model, optimizer=optimizer, plugins=[EWCPlugin(history, lam=100.0)], ...)
    for experience in benchmark.train_stream:
        strategy.train(experience)

It differs from ``avalanche.training.plugins.EWCPlugin`` in the Fisher, which is the mean of the squares of per-sample
gradients and not of the batches' mean gradients, in the factor 1/2 of the penalty, (lam / 2) sum F (theta - theta*)^2,
and in how the penalty reaches the parameters, which is ``history.attach``.
"""

import copy
from typing import Any

from avalanche.models import avalanche_forward
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..fisher.estimate import estimate_fisher
from ..fisher.loss_source import PerSampleLoss, require_per_sample_loss
from ..model.arguments import require_integer
from ..penalty.diagonal import DiagonalHistory
from ..penalty.folded import check_penalty
from ..penalty.low_rank import LowRankHistory


class EWCPlugin(SupervisedPlugin):
    """Attaches a history to the strategy's optimizer while it trains on an experience, and appends the experience's
    Fisher to it afterwards.

    The history follows a model that grows: new heads and new classes of ``MultiHeadClassifier`` and
    ``IncrementalClassifier`` are unconstrained, as in ``History.rebind``.

    Args:
        history: a LowRankHistory or DiagonalHistory of the strategy's model; its type is the kind of the Fisher.
        lam, decoupled: see ``LowRankHistory.attach``.
        rank, max_samples: see ``estimate_fisher``, which reads the experience's data in random order, in batches of
            ``train_mb_size``.
        per_sample_loss: ``(model, batch) -> (N,)`` for batches (x, y, ..., task labels) of the experience's data. None:
            the strategy's criterion with ``reduction="none"``, on the strategy's device.

    ``save_checkpoint`` saves the plugin with its history; after ``maybe_load_checkpoint``, the history is
    ``strategy.plugins[i].history``, bound to ``strategy.model``.

    Raises:
        TypeError, ValueError: an argument of another kind; when training begins: the errors of ``attach``; a criterion
            without ``reduction``. When an experience ends: the errors of ``estimate_fisher``.
    """

    def __init__(
        self,
        history: LowRankHistory | DiagonalHistory,
        lam: float | Tensor,
        *,
        decoupled: bool = False,
        rank: int = 1,
        max_samples: int | None = None,
        per_sample_loss: PerSampleLoss | None = None,
    ) -> None:
        check_penalty(history, lam, decoupled)
        require_integer("rank", rank, 1)
        if rank > 1 and isinstance(history, DiagonalHistory):
            raise ValueError(f"rank is {rank}, and history a DiagonalHistory, which has no rank; leave rank out.")
        if max_samples is not None:
            require_integer("max_samples", max_samples, 2)
        if per_sample_loss is not None:
            require_per_sample_loss("per_sample_loss", per_sample_loss)
        super().__init__()
        self.history = history
        self._lam, self._decoupled = lam, decoupled
        self._rank, self._max_samples, self._per_sample_loss = rank, max_samples, per_sample_loss
        self._attached = False

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._detach()  # from a training that ended with an exception
        self._loss_of(strategy)
        self.history.rebind(strategy.model, grown=["*"])
        self.history.attach(strategy.optimizer, self._lam, decoupled=self._decoupled)
        self._attached = True

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._detach()
        self.history.rebind(strategy.model, grown=["*"])  # an evaluation in between may have found new classes
        data, binding = strategy.experience.dataset, self.history._binding
        loader = DataLoader(data, strategy.train_mb_size, shuffle=True, collate_fn=getattr(data, "collate_fn", None))
        fisher = estimate_fisher(
            strategy.model,
            self._loss_of(strategy),
            loader,
            kind="low_rank" if isinstance(self.history, LowRankHistory) else "diagonal",
            rank=self._rank,
            max_samples=self._max_samples,
            include=binding.include,
            exclude=binding.exclude,
        )
        self.history.append(fisher)  # type: ignore[arg-type]

    def _loss_of(self, strategy: Any) -> PerSampleLoss:
        """The user's loss, or the strategy's criterion for each sample."""
        if self._per_sample_loss is not None:
            return self._per_sample_loss
        reduction = getattr(strategy._criterion, "reduction", None)
        if reduction not in ("mean", "sum"):
            raise ValueError(
                f"the strategy's criterion is a {type(strategy._criterion).__name__} with reduction={reduction!r}; "
                "expected 'mean' or 'sum', of which the plugin takes each sample's part. Pass per_sample_loss=."
            )
        criterion = copy.copy(strategy._criterion)
        criterion.reduction = "none"

        def loss(model: nn.Module, batch: Any) -> Tensor:
            x, y, task_labels = (batch[i].to(strategy.device) for i in (0, 1, -1))
            losses: Tensor = criterion(avalanche_forward(model, x, task_labels), y)
            by_sample = losses.reshape(len(losses), -1)
            return by_sample.mean(1) if reduction == "mean" else by_sample.sum(1)

        return loss

    def _detach(self) -> None:
        if self._attached:
            self.history.detach()
            self._attached = False
