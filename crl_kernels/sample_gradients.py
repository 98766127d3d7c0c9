"""Per-sample gradients in one backward pass: their square norms, mean, projections and Gram matrix, without a matrix
of them, and sums of them with weights.

Formulas, with g_i the gradient of sample i's loss by all P parameters and N samples in the batch:

    mu = mean_i g_i        n_i = |g_i|^2        p_i = u . g_i        G_ij = g_i . g_j        d_j = mean_i g_ij^2

Each is a sum over parameters, and is taken where a layer's input meets the gradient of its output (layer_gradients.py)
in the one backward pass that a training step makes anyway.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from .binding import Binding, join_names
from .layer_gradients import MatrixGradient, SampleGradient, Statistics, Wanted
from .preserved import without_gradient_hooks
from .recorder import ParameterUse, Recorder, Settle, contiguous_strides

_NOT_OF_THIS_BLOCK = "weighted_sums needs losses that the model has computed in this SampleGradients block."
# Per-sample gradients of at most so many elements a parameter are kept until the end and taken together: a bias or a
# scale of a norm costs more in calls than in arithmetic.
_SMALL = 4096


def rows_of(direction: Mapping[str, Tensor], binding: Binding) -> tuple[bool, list[Tensor]]:
    """(whether it is one direction, without a leading K; (K, numel) of each bound parameter, float32 or float64)."""
    if not isinstance(direction, Mapping):
        raise TypeError(f"direction is a {type(direction).__name__}; expected a mapping from parameter names.")
    layout = binding.layout
    if unknown := [name for name in direction if name not in layout.names]:
        raise ValueError(f"direction has {join_names(unknown)}, which are no parameters that are looked at.")
    leading: set[int | None] = set()
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in direction:
            continue
        tensor = direction[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"direction[{name!r}] is a {type(tensor).__name__}; expected a tensor.")
        if tensor.shape != shape and (tensor.dim() != len(shape) + 1 or tensor.shape[1:] != shape):
            raise ValueError(
                f"direction[{name!r}] has shape {tuple(tensor.shape)}; expected {tuple(shape)}, or (K, *) of it."
            )
        if tensor.device != binding.device:
            raise ValueError(f"direction[{name!r}] is on {tensor.device} and the model on {binding.device}.")
        leading.add(None if tensor.shape == shape else tensor.shape[0])
    if len(leading) != 1:
        raise ValueError("direction is empty, or its tensors are of different numbers K of directions.")
    (count,) = leading
    rows = []
    for name, length, parameter in zip(layout.names, layout.lengths, binding.params, strict=True):
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        zeros = parameter.new_zeros(count or 1, length, dtype=dtype)
        given = direction[name].detach().to(dtype).reshape(zeros.shape) if name in direction else zeros
        rows.append(given.contiguous())
    return count is None, rows


@dataclass(frozen=True)
class LayerStatistics:
    """One parameter's share. The sums over parameters are those of the whole model."""

    sq_norms: Tensor  # (N,) float64
    projections: Tensor  # as the whole model's
    gram: Tensor | None  # (N, N) float64


class _WeightedSums:
    """sum_i w_ki g_i while a backward pass makes the g_i."""

    def __init__(self, weights: Tensor, binding: Binding) -> None:
        self._weights = weights  # (K, N)
        self.rows = weights.new_zeros(len(weights), binding.layout.numel, dtype=binding.dtype)
        self._of = self.rows.split(binding.layout.lengths, 1)
        self.reached: set[int] = set()  # parameters

    def add(self, use: ParameterUse, gradient: SampleGradient) -> None:
        self.reached.add(use.index)
        use.add_to(self._of[use.index], gradient.weighted_sums(self._weights))


def _settle_of(owner: "weakref.ref[SampleGradients]") -> Settle:
    """For the recorder, which its owner keeps, and which is not to keep its owner in turn."""

    def settle(use: ParameterUse, gradient: SampleGradient) -> Tensor:
        found = owner()
        assert found is not None  # it has begun the backward pass, or is on the stack as a context
        return found._settle(use, gradient)

    return settle


class SampleGradients:
    """Statistics of the per-sample gradients g_i of a batch of N, from one ordinary backward pass.

    ::

        with SampleGradients(model) as sg:
            losses = per_sample_loss(model, batch)      # (N,), each from its own sample alone
            losses.sum().backward()

        sg.sq_norms       (N,) float64              |g_i|^2
        sg.mean           name -> tensor            mu = mean_i g_i, zeros where no gradient arrived
        sg.projections    (N,) float64              mu . g_i, or direction . g_i; (N, K) for K directions
        sg.gram           (N, N) float64            g_i . g_j, with gram=True; else None
        sg.diagonal       name -> tensor            mean_i g_ij^2, with diagonal=True; else {}
        sg.per_layer      name -> LayerStatistics   the same, parameter by parameter
        sg.num_samples    N

    They can be read after the block. ``.grad`` is what it is without the block. The first dimension of the model's
    inputs is the sample, and each loss depends on its own sample alone: BatchNorm in training mode is refused.

    Linear, Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d, GroupNorm, LayerNorm, RMSNorm, BatchNorm in evaluation
    mode, Embedding, MultiheadAttention, ``x @ W`` and parameters that are broadcast over samples have rules, wherever
    and however often they are used: tied weights, subclasses, functional calls, activation checkpointing, autocast. A
    module that uses a parameter in another way is run again under ``torch.func.vmap``, and a warning says so, once.

    One backward pass a block. The graph may be retained (``backward(retain_graph=True)``), for :meth:`weighted_sums` or
    for others: backward passes after the block are ordinary ones. Losses that a GradScaler has multiplied give
    gradients multiplied by as much.

    Args:
        model: its parameters that require a gradient are looked at.
        direction: parameter name -> tensor u of the parameter's shape; or (K, \\*shape), for K directions. A parameter
            that is left out counts as zero.
        gram: also take the Gram matrix.
        loss_reduction: "sum" if the backward pass starts from ``losses.sum()``, "mean" if from ``losses.mean()``.
        diagonal: also take the mean of squares, the diagonal Fisher.
        include, exclude: patterns that choose parameters, as in :class:`LowRankHistory`.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming them; a BatchNorm in training mode; a sharded model
            outside of :func:`whole_parameters`.
        RuntimeError: no backward pass in the block, or two.
        NotImplementedError: a parameter is used in a way that neither has a rule nor can be vectorised, by name.

    Source: one backward for norms: Goodfellow, arXiv 1510.01799; by layers: Rochette et al., arXiv 1912.06015. Sums
    over samples in the tile of a weight where they are made, and projections on the batch's own mean, are ours.
    """

    def __init__(
        self,
        model: nn.Module,
        direction: Mapping[str, Tensor] | None = None,
        gram: bool = False,
        loss_reduction: Literal["sum", "mean"] = "sum",
        *,
        diagonal: bool = False,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
    ) -> None:
        if loss_reduction not in ("sum", "mean"):
            raise ValueError(f"loss_reduction is {loss_reduction!r}; expected 'sum' or 'mean'.")
        self._binding = Binding(model, include, exclude)
        self._binding.require_whole()
        self._model, self._reduction = model, loss_reduction
        self._want_gram, self._want_diagonal = gram, diagonal
        self._single_direction, self._directions = True, None
        if direction is not None:
            self._single_direction, self._directions = rows_of(direction, self._binding)
        self._entered = False
        self._weighing: _WeightedSums | None = None  # while weighted_sums runs
        self._only_weighed = False

    # The block

    def __enter__(self) -> "SampleGradients":
        if self._entered:
            raise RuntimeError("a SampleGradients serves one block; make another for the next batch.")
        self._entered = True
        for module in self._model.modules():
            if getattr(module, "batch_first", True) is False and not isinstance(module, nn.MultiheadAttention):
                raise ValueError(
                    f"model has a {type(module).__name__} with batch_first=False, whose first dimension is not the "
                    "sample. Build it with batch_first=True."
                )
        params = self._binding.params
        self._collected: dict[int, list[Statistics]] = {}
        self._small: list[tuple[ParameterUse, Tensor]] = []
        self._shared: dict[int, Tensor] = {}  # (N, numel), of parameters that are used more than once
        self._sums: dict[int, Tensor] = {}  # float32 sums of 16-bit parameters' gradients, flat
        self._grads = [parameter.grad for parameter in params]
        self._recorder = Recorder(self._model, params, self._binding.layout.names, _settle_of(weakref.ref(self)))
        self._stack = ExitStack()
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._stack.enter_context(self._recorder)
        self._recorder.watch()
        for parameter in params:
            parameter.grad = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        recorder, params = self._recorder, self._binding.params
        recorder.unwatch()
        self._stack.close()
        new = [parameter.grad for parameter in params]
        try:
            if kind is None and not (self._only_weighed and all(grad is None for grad in new)):
                self._finish(new)
        finally:
            for parameter, old, grad in zip(params, self._grads, new, strict=True):
                if old is not None:
                    if grad is not None:
                        old.add_(grad)
                    parameter.grad = old
            del self._stack, self._grads

    # In the backward pass

    def _wanted(self, use: ParameterUse) -> Wanted:
        u = None if self._directions is None else use.of(self._directions[use.index])
        return Wanted(u, self._want_gram, self._want_diagonal)

    def _settle(self, use: ParameterUse, gradient: SampleGradient) -> Tensor:
        """Called for each use: takes its statistics and returns the sum of its per-sample gradients."""
        recorder = self._recorder
        if self._weighing is not None:
            if not use.covered:
                self._weighing.add(use, gradient)
            return self._weighing.rows.new_zeros(()).expand(use.shape)  # thrown away by weighted_rows
        if use.settled:
            raise RuntimeError(
                "a second backward pass went through the model inside of one SampleGradients block. Make one pass from "
                "the sum of all losses, or use a block for each."
            )
        use.settled = True
        if not use.registered:  # a reentrant checkpoint's second run, which is its first with gradients
            recorder.register(use)
        if use.covered:
            return gradient.matrix().sum(0)
        others = [other for other in recorder.uses if other.index == use.index and other is not use]
        elsewhere = any(use.index in call.indices for call in recorder.calls)
        if elsewhere or any(use.overlaps(other) for other in others) or use.overlaps_itself():
            return self._add_to_shared(use, gradient, others)
        if isinstance(gradient, MatrixGradient) and use.shape.numel() <= _SMALL:
            matrix = gradient.matrix()
            self._small.append((use, matrix))
            return matrix.sum(0)
        found = gradient.statistics(self._wanted(use))
        self._collect(use, found)
        return found.sum

    def _add_to_shared(self, use: ParameterUse, gradient: SampleGradient, others: list[ParameterUse]) -> Tensor:
        if use.index not in self._shared and any(other.settled and not other.covered for other in others):
            raise RuntimeError(
                f"parameter {self._binding.layout.names[use.index]!r} is used again by a later segment of a reentrant "
                "checkpoint, after its statistics were taken. Use torch.utils.checkpoint with use_reentrant=False."
            )
        matrix = gradient.matrix()
        shared = self._shared_matrix(use.index, matrix)
        use.add_to(shared, matrix)
        return matrix.sum(0)

    def _shared_matrix(self, index: int, like: Tensor) -> Tensor:
        if index not in self._shared:
            numel = self._binding.layout.lengths[index]
            self._shared[index] = like.new_zeros(len(like), numel)
        return self._shared[index]

    def _collect(self, use: ParameterUse, found: Statistics) -> None:
        self._keep(use, found.sum, found.squares)
        self._collected.setdefault(use.index, []).append(replace(found, sum=found.sum.new_empty(0), squares=None))

    def _keep(self, use: ParameterUse, total: Tensor, squares: Tensor | None) -> None:
        """Keeps a float32 sum where ``.grad`` has 16 bits, and the sum of squares."""
        if squares is not None:
            use.of(self._squares[use.index][None])[0].copy_(squares)
        parameter = self._binding.params[use.index]
        if parameter.dtype not in (torch.float32, torch.float64):
            if use.index not in self._sums:
                self._sums[use.index] = total.new_zeros(parameter.numel())
            use.of(self._sums[use.index][None])[0].copy_(total)

    @cached_property
    def _squares(self) -> list[Tensor]:
        """sum_i g_ij^2, flat, for each parameter."""
        return [
            parameter.new_zeros(
                parameter.numel(), dtype=torch.float64 if parameter.dtype == torch.float64 else torch.float32
            )
            for parameter in self._binding.params
        ]

    # Sums with weights

    def weighted_sums(self, losses: Tensor, weights: Tensor) -> dict[str, Tensor]:
        r"""sum_i w_ki g_i for each row k of weights, from one backward pass: sums over the classes of a batch, say, or
        eigenvectors of its Fisher, of any length, whose weights come from ``gram``.

        ::

            with SampleGradients(model, gram=True) as sg:
                losses = per_sample_loss(model, batch)
                losses.sum().backward(retain_graph=True)
            eigenvectors = sg.weighted_sums(losses, torch.linalg.eigh(sg.gram).eigenvectors.T[-3:])

        After the block, if its backward pass retained the graph; or in the block and instead of its backward pass, if
        nothing else is wanted of it: it then has no statistics. ``.grad`` stays what it is, and hooks on parameters are
        not called.

        Args:
            losses: (N,), computed in the block.
            weights: (K, N).

        Returns:
            name -> (K, \*shape), float32, or float64 if a parameter is; views of what :meth:`weighted_rows` returns.

        Memory for the result, for one layer's part of it once more, and for per-sample gradients about 64 MiB, or what
        one sample's take in a layer if that is more; where tokens are few, for copies of a layer's inputs and output
        gradients instead. All samples' gradients of biases, norms, broadcast parameters and modules that are run again.

        Raises:
            TypeError, ValueError: weights or losses that do not fit.
            RuntimeError: losses that were not computed in the block; a block that is open and has made its backward
                pass; by PyTorch, a checkpoint with use_reentrant=True.
            NotImplementedError: a parameter is used in a way that neither has a rule nor can be vectorised, by name.
        """
        return self._binding.layout.split(self.weighted_rows(losses, weights))

    def weighted_rows(self, losses: Tensor, weights: Tensor) -> Tensor:
        """The same as one tensor (K, P): all parameters flattened, in the order of ``mean``."""
        count = self._recorder.num_samples if self._entered else None
        if count is None:
            raise RuntimeError(_NOT_OF_THIS_BLOCK)
        recorder, binding = self._recorder, self._binding
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights is a {type(weights).__name__}; expected a tensor (K, {count}).")
        if weights.dim() != 2 or weights.shape[1] != count:
            raise ValueError(f"weights has shape {tuple(weights.shape)}; expected (K, {count}), K weights a sample.")
        if not isinstance(losses, Tensor):
            raise TypeError(f"losses is a {type(losses).__name__}; expected a tensor ({count},).")
        if losses.shape != (count,):
            raise ValueError(f"losses has shape {tuple(losses.shape)}; expected ({count},), one loss for each sample.")
        with ExitStack() as stack:
            in_block = recorder.recording
            if not in_block:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(recorder)
                recorder.recording = True
                stack.callback(setattr, recorder, "recording", False)
            elif any(use.settled for use in recorder.uses) or any(call.grads for call in recorder.calls):
                raise RuntimeError("weighted_sums after the block's backward pass: call it when the block has ended.")
            found = self._weighing = _WeightedSums(weights.detach().to(binding.device), binding)
            stack.callback(setattr, self, "_weighing", None)
            stack.enter_context(torch.autocast(binding.device.type, enabled=False))
            stack.enter_context(without_gradient_hooks(binding.params))
            recorder.forget_calls()
            stack.callback(recorder.forget_calls)
            ones = torch.ones_like(losses)
            grads = torch.autograd.grad(losses, binding.params, ones, allow_unused=True)
            recorded = (recorder.uses or recorder.calls) and not recorder.stray
            if recorded and not found.reached and not any(call.grads for call in recorder.calls):
                raise RuntimeError(_NOT_OF_THIS_BLOCK)
            self._require_seen(grads, found.reached)
            for index, matrix in recorder.gradients_of_calls():
                found.add(self._whole(index), MatrixGradient(matrix))
        self._only_weighed, self.num_samples = in_block, count
        return found.rows

    # After the block

    def _require_seen(self, grads: Sequence[Tensor | None], settled: set[int]) -> None:
        """Raises unless all parameters that have got a gradient are settled, or those of a call."""
        recorder, layout = self._recorder, self._binding.layout
        if recorder.stray:
            index, function = next(iter(recorder.stray.items()))
            raise NotImplementedError(
                f"parameter {layout.names[index]!r} is used by {function} outside of the model's modules, which has no "
                "rule. Use it in a module's forward, or exclude it with exclude=."
            )
        if recorder.num_samples is None or all(grad is None for grad in grads):
            raise RuntimeError(
                "no gradient reached the model's parameters inside of the SampleGradients block. Run the model and "
                "losses.sum().backward() in it."
            )
        seen = settled | {index for call in recorder.calls for index in call.indices}
        if unseen := [name for i, name in enumerate(layout.names) if grads[i] is not None and i not in seen]:
            raise NotImplementedError(
                f"{join_names(unseen)} got a gradient through something that is no function of PyTorch's, such as an "
                "autograd.Function, so its per-sample gradients were not seen. Exclude it with exclude=."
            )

    def _whole(self, index: int) -> ParameterUse:
        """A parameter as it is."""
        shape = self._binding.layout.shapes[index]
        return ParameterUse(index, shape, contiguous_strides(shape), 0, self._settle)

    def _finish(self, grads: list[Tensor | None]) -> None:
        recorder, layout = self._recorder, self._binding.layout
        self._require_seen(grads, {use.index for use in recorder.uses if use.settled})
        assert recorder.num_samples is not None
        count = self.num_samples = recorder.num_samples
        for index, matrix in recorder.gradients_of_calls():
            self._shared_matrix(index, MatrixGradient(matrix).matrix()).add_(matrix.reshape(count, -1))
        for index, matrix in self._shared.items():
            whole = self._whole(index)
            gradient = MatrixGradient(matrix.reshape(count, *whole.shape))
            self._collect(whole, gradient.statistics(self._wanted(whole)))
        self._shared.clear()

        scale = float(count) if self._reduction == "mean" else 1.0  # of a sample's loss against its part of the pass
        self._scale, self._to_projection = scale, scale * scale / count if self._directions is None else scale
        model = self._total([part for parts in self._collected.values() for part in parts] + self._take_small())
        self.sq_norms, self.projections, self.gram = model.sq_norms, model.projections, model.gram
        self.mean = {}
        for i, (name, parameter, grad) in enumerate(zip(layout.names, self._binding.params, grads, strict=True)):
            source = self._sums.get(i)
            if grad is None:
                self.mean[name] = torch.zeros_like(parameter, dtype=None if source is None else source.dtype)
            else:
                value = grad if source is None else source.reshape(parameter.shape)
                self.mean[name] = value.detach() * (scale / count)
        squares = zip(layout.names, layout.shapes, self._squares if self._want_diagonal else [], strict=False)
        self.diagonal = {name: part.reshape(shape) * (scale * scale / count) for name, shape, part in squares}

    def _take_small(self) -> list[Statistics]:
        """Statistics of all small gradients together: one set of calls instead of one a parameter."""
        if not self._small:
            return []
        wanted = [self._wanted(use) for use, _ in self._small]
        u = [part.directions.flatten(1) for part in wanted if part.directions is not None]
        together = Wanted(torch.cat(u, 1) if u else None, self._want_gram, self._want_diagonal)
        lengths = [use.shape.numel() for use, _ in self._small]
        found = MatrixGradient(torch.cat([matrix.flatten(1) for _, matrix in self._small], 1)).statistics(together)
        squares = [None] * len(lengths) if found.squares is None else found.squares.split(lengths)
        for (use, _), total, part in zip(self._small, found.sum.split(lengths), squares, strict=True):
            self._keep(use, total.reshape(use.shape), None if part is None else part.reshape(use.shape))
        return [found]

    def _total(self, parts: Sequence[Statistics]) -> LayerStatistics:
        count, num_directions = self.num_samples, 1 if self._directions is None else len(self._directions[0])
        zeros = torch.zeros(count, num_directions, dtype=torch.float64, device=self._binding.device)
        projections = sum((part.projections for part in parts), zeros) * self._to_projection
        gram = None
        if self._want_gram:
            grams = (part.gram for part in parts if part.gram is not None)
            gram = sum(grams, zeros.new_zeros(count, count)) * self._scale**2
        return LayerStatistics(
            sum((part.sq_norms for part in parts), zeros[:, 0]) * self._scale**2,
            projections[:, 0] if self._single_direction else projections,
            gram,
        )

    @cached_property
    def per_layer(self) -> dict[str, LayerStatistics]:
        parts = {index: list(found) for index, found in self._collected.items()}
        for use, matrix in self._small:
            parts.setdefault(use.index, []).append(MatrixGradient(matrix).statistics(self._wanted(use)))
        return {name: self._total(parts.get(i, [])) for i, name in enumerate(self._binding.layout.names)}
