"""Per-sample gradients in one backward pass: their square norms, mean, projections and Gram matrix, without a matrix
of them, and sums of them with weights.

Formulas, with g_i the gradient of sample i's loss by all P parameters and N samples in the batch:

    mu = mean_i g_i        n_i = |g_i|^2        p_i = u . g_i        G_ij = g_i . g_j        d_j = mean_i g_ij^2

Each is a sum over parameters, and is taken where a layer's input meets the gradient of its output (layer_gradients.py)
in the one backward pass that a training step makes anyway.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from ..model.binding import Binding
from ..model.names import join_names
from ..model.preserved import require_no_inference_mode
from .collector import GradientCollector, LayerStatistics
from .directions import rows_of
from .graph import Losses
from .loss_passes import LossPasses, disagreeing
from .recorder import CallRecorder, dense

_NOT_OF_THIS_BLOCK = "weighted_sums needs losses that the model has computed in this SampleGradients block."


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
        self._want_diagonal = diagonal
        single, rows = (True, None) if direction is None else rows_of(direction, self._binding)
        self._collector = GradientCollector(self._binding, rows, single, gram, diagonal)
        self._entered = False
        self._only_weighed = False

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
        self._recorder = CallRecorder(params, self._binding.layout.names, self._collector, self._prepare)
        self._passes = LossPasses(self._model, self._binding, self._recorder, self._collector)
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

    def _prepare(self, losses: Losses | None) -> None:
        """Before the block's backward pass: the recorder calls it."""
        recorder, passes = self._recorder, self._passes
        if losses is None:
            recorder.sample_layout = passes.assumed_layout()
            return
        if losses.count == 0:
            raise ValueError("losses is empty: there are no samples in the batch.")
        recorder.sample_layout = passes.layout_of(losses)
        if by_passes := recorder.sample_layout.by_passes:
            passes.take_by_passes(losses, by_passes)

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
            block_layout = recorder.sample_layout
            recorder.sample_layout = self._passes.layout_of(edge)
            if recorder.calls and not recorder.sample_layout.reached:
                recorder.sample_layout = block_layout
                raise RuntimeError(_NOT_OF_THIS_BLOCK)
            sums = self._passes.weigh(edge, weights.detach().to(binding.device))
            if block_layout is not None or not sums.uses:
                recorder.sample_layout = block_layout
            if not sums.uses:
                raise RuntimeError(_NOT_OF_THIS_BLOCK)
        self._only_weighed, self.num_samples = in_block, len(losses)
        return sums.rows

    # After the block

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
        scale = float(count) if self._reduction == "mean" else 1.0
        model = self._collector.finish(count, scale)
        self.sq_norms, self.projections, self.gram = model.sq_norms, model.projections, model.gram
        self.mean = {}
        for i, (name, parameter, grad) in enumerate(zip(layout.names, self._binding.params, grads, strict=True)):
            source = self._collector.sums.get(i)
            if grad is None:
                self.mean[name] = torch.zeros_like(parameter, dtype=None if source is None else source.dtype)
            else:
                value = dense(grad) if source is None else source.reshape(parameter.shape)
                self.mean[name] = value * (scale / count)
        squares = zip(layout.names, layout.shapes, self._collector.squares if self._want_diagonal else [], strict=False)
        self.diagonal = {name: part.reshape(shape) * (scale * scale / count) for name, shape, part in squares}

    def _require_seen(self, grads: Sequence[Tensor | None]) -> None:
        """Raises for parameters with a gradient of which not all was taken, in a pass that could not be checked."""
        names, lengths = self._binding.layout.names, self._binding.layout.lengths
        assumed_sums = self._collector.assumed_sums
        sums = [
            assumed_sums[i] if i in assumed_sums else self._binding.params[i].new_zeros(lengths[i])
            for i in range(len(grads))
        ]
        gradients = [None if grad is None else dense(grad).flatten() for grad in grads]
        if unseen := [names[i] for i in disagreeing(sums, gradients)]:
            raise NotImplementedError(
                f"the per-sample gradients of {join_names(unseen)} cannot be read in a backward pass that does not "
                "start from the losses. Compute one loss for each sample and call sg.backward(losses), or exclude the "
                "parameters with exclude=."
            )

    @cached_property
    def per_layer(self) -> dict[str, LayerStatistics]:
        return self._collector.per_layer()
