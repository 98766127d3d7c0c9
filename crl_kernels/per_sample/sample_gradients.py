"""Per-sample gradients in one backward pass: their square norms, mean, projections and Gram matrix, without a matrix
of them, and sums of them with weights.

Formulas, with g_i the gradient of sample i's loss by all P parameters and N samples in the batch:

    mu = mean_i g_i        n_i = |g_i|^2        p_i = u . g_i        G_ij = g_i . g_j        d_j = mean_i g_ij^2

Each is a sum over parameters, and is taken where a layer's input meets the gradient of its output (layer_gradients.py)
in the one backward pass that a training step makes anyway.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from ..model.binding import Binding
from ..model.names import join_names
from ..model.preserved import require_no_inference_mode, without_gradient_hooks
from .directions import rows_of
from .graph import Losses
from .layer_gradients import MatrixGradient, SampleGradient, Statistics, Wanted
from .operands import ParameterUse, contiguous_strides
from .recorder import CallRecorder, Pass, SampleLayout, Sink, dense, warn_once
from .rows import Codes

_NOT_OF_THIS_BLOCK = "weighted_sums needs losses that the model has computed in this SampleGradients block."
# Of each model, where the samples are in the sequences of calls that were measured; the latest so many.
_LAYOUTS: "weakref.WeakKeyDictionary[nn.Module, dict[Any, SampleLayout]]" = weakref.WeakKeyDictionary()
_LAYOUTS_KEPT = 256
# How far two ways to a sum of gradients may be apart, relatively.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}
_ROUNDING_16_BIT = 0.03
# Per-sample gradients of at most so many elements a parameter are kept until the end and taken together: a bias or a
# scale of a norm costs more in calls than in arithmetic.
_SMALL = 4096


@dataclass(frozen=True)
class LayerStatistics:
    """One parameter's share. The sums over parameters are those of the whole model."""

    sq_norms: Tensor  # (N,) float64
    projections: Tensor  # as the whole model's
    gram: Tensor | None  # (N, N) float64


class _WeightedSums:
    """sum_i w_ki g_i while a backward pass makes the g_i."""

    def __init__(self, weights: Tensor, binding: Binding) -> None:
        self.weights = weights  # (K, N)
        self.rows = weights.new_zeros(len(weights), binding.layout.numel, dtype=binding.dtype)
        self._of = self.rows.split(binding.layout.lengths, 1)
        self.uses: dict[int, list[ParameterUse]] = {}  # by parameter

    def add(self, use: ParameterUse, gradient: SampleGradient) -> None:
        self.uses.setdefault(use.index, []).append(use)
        use.add_to(self._of[use.index], gradient.weighted_sums(self.weights))


def _several(uses: Mapping[int, Sequence[ParameterUse]]) -> set[int]:
    """Parameters of which an element has gradients from more than one use."""
    return {
        index
        for index, those in uses.items()
        if any(use.overlaps_itself() for use in those)
        or any(one.overlaps(other) for i, one in enumerate(those) for other in those[:i])
    }


def _disagreeing(sums: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Which of two lists of sums of the same gradients differ by more than rounding. A gradient that is zero but for
    rounding, of a bias before a norm say, is held against the whole model's; one of which nothing was read is not."""
    pairs = [
        (one, torch.zeros_like(one) if other is None else dense(other).to(one.dtype))
        for one, other in zip(sums, gradients, strict=True)
    ]
    norms = [float(other.norm()) for _, other in pairs]
    whole = math.hypot(*norms)
    found = []
    for i, ((one, other), norm) in enumerate(zip(pairs, norms, strict=True)):
        gradient = gradients[i]
        rounding = 0.0 if gradient is None else _ROUNDING.get(gradient.dtype, _ROUNDING_16_BIT)
        missing = norm > 1e-2 * rounding * whole and not bool(one.any())
        if missing or not float((one - other).norm()) <= rounding * max(norm, 1e-3 * whole):
            found.append(i)
    return tuple(found)


def _weak_sink(owner: "SampleGradients") -> Callable[[], Sink]:
    """For the recorder, which its owner keeps, and which is not to keep its owner in turn."""
    reference = weakref.ref(owner)

    def sink() -> Sink:
        found = reference()
        assert found is not None  # it has begun the backward pass, or is on the stack as a context
        return found

    return sink


class SampleGradients:
    """Statistics of the per-sample gradients g_i of a batch of N, from one ordinary backward pass.

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

    They can be read after the block. ``.grad`` is what it is without the block. Sample i is what loss_i depends on, and
    no other loss: BatchNorm in training mode is refused.

    Where in the model's tensors the samples are is measured, not guessed: in any dimension, several rows a sample,
    sorted, packed or routed. In the first block of a model with given shapes, ceil(log_8 N) + 2 backward passes with
    weights on the losses come before the block's own and tell which sample each row of a layer's output belongs to; one
    more proves for every parameter that sum_i w_i g_i, of the g_i that are read, is the gradient of sum_i w_i loss_i.
    Later blocks with the same calls and shapes cost nothing more, but a walk over the graph; where indices or products
    may move rows, ceil(log_8 N) + 1 passes see whether they are where they were. (Only values that choose between two
    ways through the model by multiplying them, without an index, are not seen.)

    The block's pass must start from the sum or the mean of a tensor whose first dimension is the sample, as it does
    from ``losses.sum()``, or be made by ``backward``. From anything else, such as the mean over a batch that
    ``F.mse_loss`` returns, the losses cannot be seen: then the first dimension of every layer's output is taken for the
    sample, and a warning says so.

    Linear, Conv1d to Conv3d and their transposes, GroupNorm, LayerNorm, RMSNorm, InstanceNorm, BatchNorm in evaluation
    mode, Embedding, MultiheadAttention, ``x @ W`` and parameters that are broadcast over samples have rules, wherever
    and however often they are used: tied weights, subclasses, functional calls, activation checkpointing, autocast;
    and tensors that are made of parameters: parametrized weights, tables of positions, temperatures. Another function
    takes a backward pass of its own for each sample. A parameter whose gradients the proof finds wrong or missing,
    because a custom autograd.Function or a derivative inside the loss hides its use, takes one backward pass from the
    losses for each sample. A warning names either, once.

    One backward pass of the user's a block. The graph may be retained (``backward(retain_graph=True)``), for
    ``weighted_sums`` or for others: backward passes after the block are ordinary ones. Losses that a GradScaler has
    multiplied give gradients multiplied by as much. Hooks on activations are called in the passes that measure, too.

    Args:
        model: its parameters that require a gradient are looked at.
        direction: parameter name -> tensor u of the parameter's shape; or (K, \\*shape), for K directions. A parameter
            that is left out counts as zero.
        gram: also take the Gram matrix.
        loss_reduction: "sum" if the backward pass starts from ``losses.sum()``, "mean" if from ``losses.mean()``.
        diagonal: also take the mean of squares, the diagonal Fisher.
        include, exclude: patterns that choose parameters, as in ``LowRankHistory``.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming them; a BatchNorm in training mode; a sharded model
            outside of ``whole_parameters``.
        RuntimeError: no backward pass in the block, or two.
        NotImplementedError: per-sample gradients that this pass cannot give, by parameter.

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
        self._layout_key: Any = None
        self._by_passes = False  # while gradients are taken from the losses, not from layers

    # The block

    def __enter__(self) -> "SampleGradients":
        if self._entered:
            raise RuntimeError("a SampleGradients serves one block; make another for the next batch.")
        require_no_inference_mode("SampleGradients")
        if any(isinstance(mode, CallRecorder) for mode in _get_current_function_mode_stack()):
            raise RuntimeError(
                "a SampleGradients block lies in another one. Use one block, of a module that holds both models: "
                "SampleGradients(nn.ModuleList([first, second]))."
            )
        self._entered = True
        params = self._binding.params
        self._collected: dict[int, list[Statistics]] = {}
        self._small: list[tuple[ParameterUse, Tensor]] = []
        self._assumed_sums: dict[int, Tensor] = {}  # of what was taken in a pass that is not checked, flat
        self._shared: dict[int, Tensor] = {}  # (N, numel), of parameters that are used more than once
        self._sums: dict[int, Tensor] = {}  # float32 sums of 16-bit parameters' gradients, flat
        self._recorder = CallRecorder(params, self._binding.layout.names, _weak_sink(self))
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self._recorder)
            self._recorder.recording = True
            self._stack = stack.pop_all()
        self._grads = [parameter.grad for parameter in params]
        for parameter in params:
            parameter.grad = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        params = self._binding.params
        self._recorder.recording = False
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

    def backward(self, losses: Tensor, retain_graph: bool = False) -> None:
        """The block's backward pass from ``losses.sum()``, or ``losses.mean()`` with loss_reduction="mean", for losses
        that are checked to be one number for each sample.

        Args:
            losses: (N,), computed in the block.

        Raises:
            TypeError, ValueError: losses that are no vector, or carry no gradient.
        """
        if not self._entered or not self._recorder.recording:
            raise RuntimeError("backward belongs inside of the SampleGradients block.")
        if not isinstance(losses, Tensor):
            raise TypeError(f"losses is a {type(losses).__name__}; expected a tensor (N,).")
        if losses.dim() != 1:
            raise ValueError(f"losses has shape {tuple(losses.shape)}; expected (N,), one loss for each sample.")
        if len(losses) == 0:
            raise ValueError("losses is empty: there are no samples in the batch.")
        if not losses.requires_grad:
            raise ValueError("losses carry no gradient: compute them from the model, outside of torch.no_grad().")
        total = losses.mean() if self._reduction == "mean" else losses.sum()
        total.backward(retain_graph=retain_graph)

    # Where the samples are

    def prepare(self, losses: Losses | None) -> None:
        """Before the block's backward pass: called by the recorder."""
        recorder = self._recorder
        if losses is None:
            recorder.sample_layout = self._assumed()
            return
        if losses.count == 0:
            raise ValueError("losses is empty: there are no samples in the batch.")
        recorder.sample_layout = self._layout_of(losses)
        if by_passes := recorder.sample_layout.by_passes:
            self._take_by_passes(losses, by_passes)

    def _assumed(self) -> SampleLayout:
        recorder = self._recorder
        warn_once(
            "the backward pass inside of a SampleGradients block starts from something else than the sum or the mean "
            "of the losses, so what belongs to which sample cannot be checked: the first dimension of every layer's "
            "output is taken for the sample. Compute one loss for each sample and call sg.backward(losses)."
        )
        uses: dict[int, list[ParameterUse]] = {}
        for call in recorder.calls:
            for operand in call.operands:
                if isinstance(operand, ParameterUse):
                    uses.setdefault(operand.index, []).append(operand)
        return SampleLayout(recorder.first_size or 0, several=_several(uses), assumed=True)

    def _layout_of(self, losses: Losses) -> SampleLayout:
        recorder = self._recorder
        known = _LAYOUTS.setdefault(self._model, {})
        key = (*recorder.key_of(losses), self._binding.layout.names)
        if recorder.sample_layout is not None and key == self._layout_key:  # the block's own
            return recorder.sample_layout
        layout = known.get(key)
        if layout is None or not self._holds(layout, losses):
            before, layout = layout, self._measure(losses)
            if before is not None:
                layout.moves, layout.blocks = before.moves, before.blocks
            if len(known) >= _LAYOUTS_KEPT:
                del known[next(iter(known))]
            known[key] = layout
        if recorder.sample_layout is None:
            self._layout_key = key
        return layout

    def _holds(self, layout: SampleLayout, losses: Losses) -> bool:
        """Whether a layout of the same calls is this batch's, as far as it takes no measurement to say so."""
        recorder = self._recorder
        if layout.moves:
            return False
        if layout.zero:  # parameters whose gradients were zero, so that nothing of them was proven
            gradients = self._pass(losses, torch.ones(losses.count), Pass.ORDINARY, layout.zero)
            if any(gradient is not None and bool(dense(gradient).any()) for gradient in gradients):
                return False
        if layout.lasting:
            return True
        codes = Codes(losses.count, self._binding.device)
        recorder.begin_measurement()
        for weights in codes.passes[:-1]:
            self._pass(losses, weights, Pass.MEASURE)
        confirmed = recorder.confirms(layout, codes)
        layout.moves = recorder.moves_rows and not confirmed
        layout.blocks += 1  # what the first batches lacked, a later one may show: the 1st, 2nd, 4th, ... is measured
        return confirmed and (recorder.moves_rows or layout.blocks.bit_count() > 1)

    def _measure(self, losses: Losses) -> SampleLayout:
        """Where the samples are, proven."""
        recorder = self._recorder
        codes = Codes(losses.count, self._binding.device)
        recorder.begin_measurement()
        if self._binding.device.type != "cpu":
            for _ in range(2):
                self._pass(losses, codes.passes[0], Pass.MEASURE)
            recorder.measure_noise()
        for weights in codes.passes[:-1]:
            self._pass(losses, weights, Pass.MEASURE)
        wanted = self._pass(losses, codes.passes[-1], Pass.CHECK)
        layout = recorder.layout_of(codes)
        before, recorder.sample_layout = recorder.sample_layout, layout
        weighed = self._weigh(losses, codes.passes[-1][None])
        recorder.sample_layout = before
        layout.several = _several(weighed.uses)
        sums = list(self._binding.layout.split(weighed.rows[0]).values())
        layout.by_passes = _disagreeing(sums, wanted)
        norms = [0.0 if gradient is None else float(dense(gradient).double().norm()) for gradient in wanted]
        layout.zero = tuple(i for i, norm in enumerate(norms) if norm == 0 and wanted[i] is not None)
        if not math.isfinite(sum(norms)):  # one backward pass a sample says whose gradient is not finite
            layout.lasting, layout.zero = False, tuple(range(len(wanted)))
        elif layout.by_passes and losses.count > 1:
            names = join_names(self._binding.layout.names[i] for i in layout.by_passes)
            warn_once(
                f"the per-sample gradients of {names} cannot be read from the layers that use them: something that is "
                "no function of PyTorch's hides a use, or the samples share what is computed. They take a backward "
                "pass from the losses for each sample of a batch. Exclude them with exclude= if that is too slow."
            )
        return layout

    def _pass(
        self, losses: Losses, weights: Tensor, purpose: Pass, which: Sequence[int] | None = None
    ) -> Sequence[Tensor | None]:
        """Gradients of sum_i w_i loss_i by all parameters, or some; the graph is retained."""
        recorder, params = self._recorder, self._binding.params
        if which is not None:
            params = [params[i] for i in which]
        with (
            recorder.purposed(purpose),
            without_gradient_hooks(params),
            torch.autocast(self._binding.device.type, enabled=False),
        ):
            return recorder.differentiate(losses, weights, params)

    def _weigh(self, losses: Losses, weights: Tensor) -> _WeightedSums:
        """Sums with weights (K, N), where the samples are known to be."""
        recorder = self._recorder
        found = self._weighing = _WeightedSums(weights, self._binding)
        try:
            self._pass(losses, torch.ones_like(weights[0]), Pass.SUMS)
            assert recorder.sample_layout is not None
            if by_passes := recorder.sample_layout.by_passes:
                self._take_by_passes(losses, by_passes)
        finally:
            self._weighing = None
        return found

    def _take_by_passes(self, losses: Losses, parameters: Sequence[int]) -> None:
        weights = self._recorder.weights_of_rows(losses.count)
        params = [self._binding.params[i] for i in parameters]
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self._binding.device.type, enabled=False))
            stack.enter_context(without_gradient_hooks(params))
            self._by_passes = True
            stack.callback(setattr, self, "_by_passes", False)
            self._recorder.take_rows(lambda i: ([losses.edge], [losses.seeds(weights[i])]), len(weights), params)

    # In the backward pass

    def _wanted(self, use: ParameterUse) -> Wanted:
        u = None if self._directions is None else use.of(self._directions[use.index])
        return Wanted(u, self._want_gram, self._want_diagonal)

    def weights(self) -> Tensor | None:
        """(K, N) of the sums that are being taken."""
        return None if self._weighing is None else self._weighing.weights

    def take(self, use: ParameterUse, gradient: SampleGradient) -> Tensor:
        """Takes what is wanted of a use's per-sample gradients and returns their sum."""
        layout = self._recorder.sample_layout
        assert layout is not None
        if use.index in layout.by_passes and not self._by_passes:
            return gradient.matrix().sum(0)
        if self._weighing is not None:
            self._weighing.add(use, gradient)
            return self._weighing.rows.new_zeros(()).expand(use.shape)  # thrown away
        if layout.assumed:
            total = gradient.matrix().sum(0)
            if use.index not in self._assumed_sums:
                self._assumed_sums[use.index] = total.new_zeros(self._binding.layout.lengths[use.index])
            use.add_to(self._assumed_sums[use.index][None], total[None])
        if use.index in layout.several or use.overlaps_itself():
            matrix = gradient.matrix()
            use.add_to(self._shared_matrix(use.index, matrix), matrix)
            return matrix.sum(0)
        if isinstance(gradient, MatrixGradient) and use.shape.numel() <= _SMALL:
            matrix = gradient.matrix()
            self._small.append((use, matrix))
            return matrix.sum(0)
        found = gradient.statistics(self._wanted(use))
        self._collect(use, found)
        return found.sum

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

            with SampleGradients(model, gram=True) as sg:
                losses = per_sample_loss(model, batch)
                losses.sum().backward(retain_graph=True)
            eigenvectors = sg.weighted_sums(losses, torch.linalg.eigh(sg.gram).eigenvectors.T[-3:])

        After the block, if its backward pass retained the graph; or in the block and instead of its backward pass, if
        nothing else is wanted of it: it then has no statistics. ``.grad`` stays what it is, and hooks on parameters are
        not called.

        Args:
            losses: (N,), computed in the block: those of its backward pass, or others, which are then measured.
            weights: (K, N).

        Returns:
            name -> (K, \*shape), float32, or float64 if a parameter is; views of what ``weighted_rows`` returns.

        Memory for the result, for one layer's part of it once more, and for per-sample gradients about 64 MiB, or what
        one sample's take in a layer if that is more; where tokens are few, for copies of a layer's inputs and output
        gradients instead. All samples' gradients of biases, norms and broadcast parameters.

        Raises:
            TypeError, ValueError: weights or losses that do not fit.
            RuntimeError: losses that were not computed in the block; a block that is open and has made its backward
                pass.
        """
        return self._binding.layout.split(self.weighted_rows(losses, weights))

    def weighted_rows(self, losses: Tensor, weights: Tensor) -> Tensor:
        """The same as one tensor (K, P): all parameters flattened, in the order of ``mean``."""
        if not self._entered:
            raise RuntimeError(_NOT_OF_THIS_BLOCK)
        recorder, binding = self._recorder, self._binding
        count = None if recorder.sample_layout is None else recorder.sample_layout.count
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights is a {type(weights).__name__}; expected a tensor (K, {count or 'N'}).")
        if not isinstance(losses, Tensor):
            raise TypeError(f"losses is a {type(losses).__name__}; expected a tensor ({count or 'N'},).")
        if losses.dim() != 1 or count not in (None, len(losses)):
            raise ValueError(
                f"losses has shape {tuple(losses.shape)}; expected ({count or 'N'},), one loss for each sample."
            )
        if weights.dim() != 2 or weights.shape[1] != len(losses):
            raise ValueError(
                f"weights has shape {tuple(weights.shape)}; expected (K, {len(losses)}), K weights a sample."
            )
        if losses.grad_fn is None:
            raise RuntimeError(_NOT_OF_THIS_BLOCK)
        edge = Losses(torch.autograd.graph.get_gradient_edge(losses), losses.shape)
        with ExitStack() as stack:
            in_block = recorder.recording
            if not in_block:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(recorder)
                recorder.recording = True
                stack.callback(setattr, recorder, "recording", False)
            elif recorder.finished_passes:
                raise RuntimeError("weighted_sums after the block's backward pass: call it when the block has ended.")
            of_the_block = recorder.sample_layout
            recorder.sample_layout = self._layout_of(edge)
            if recorder.calls and not recorder.sample_layout.reached:
                recorder.sample_layout = of_the_block
                raise RuntimeError(_NOT_OF_THIS_BLOCK)
            found = self._weigh(edge, weights.detach().to(binding.device))
            if of_the_block is not None or not found.uses:
                recorder.sample_layout = of_the_block
            if not found.uses:
                raise RuntimeError(_NOT_OF_THIS_BLOCK)
        self._only_weighed, self.num_samples = in_block, len(losses)
        return found.rows

    # After the block

    def _whole(self, index: int) -> ParameterUse:
        """A parameter as it is."""
        shape = self._binding.layout.shapes[index]
        return ParameterUse(index, shape, contiguous_strides(shape), 0)

    def _finish(self, grads: list[Tensor | None]) -> None:
        recorder, layout = self._recorder, self._binding.layout
        if recorder.sample_layout is None or all(grad is None for grad in grads):
            raise RuntimeError(
                "no gradient reached the model's parameters inside of the SampleGradients block. Run the model and "
                "losses.sum().backward() in it."
            )
        if recorder.sample_layout.assumed:
            self._require_seen(grads)
        count = self.num_samples = recorder.sample_layout.count
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
                value = dense(grad) if source is None else source.reshape(parameter.shape)
                self.mean[name] = value * (scale / count)
        squares = zip(layout.names, layout.shapes, self._squares if self._want_diagonal else [], strict=False)
        self.diagonal = {name: part.reshape(shape) * (scale * scale / count) for name, shape, part in squares}

    def _require_seen(self, grads: Sequence[Tensor | None]) -> None:
        """Raises for parameters with a gradient of which not all was taken, in a pass that could not be checked."""
        names, lengths = self._binding.layout.names, self._binding.layout.lengths
        sums = [
            self._assumed_sums[i] if i in self._assumed_sums else self._binding.params[i].new_zeros(lengths[i])
            for i in range(len(grads))
        ]
        gradients = [None if grad is None else dense(grad).flatten() for grad in grads]
        if unseen := [names[i] for i in _disagreeing(sums, gradients)]:
            raise NotImplementedError(
                f"the per-sample gradients of {join_names(unseen)} cannot be read in a backward pass that does not "
                "start from the losses. Compute one loss for each sample and call sg.backward(losses), or exclude the "
                "parameters with exclude=."
            )

    def _take_small(self) -> list[Statistics]:
        """Statistics of all small gradients together: one set of calls instead of one a parameter."""
        if not self._small:
            return []
        wanted = [self._wanted(use) for use, _ in self._small]
        u = [part.directions.reshape(len(part.directions), -1) for part in wanted if part.directions is not None]
        together = Wanted(torch.cat(u, 1) if u else None, self._want_gram, self._want_diagonal)
        lengths = [use.shape.numel() for use, _ in self._small]
        found = MatrixGradient(torch.cat([matrix.reshape(len(matrix), -1) for _, matrix in self._small], 1)).statistics(
            together
        )
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
