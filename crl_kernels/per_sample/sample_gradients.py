"""``SampleGradients``: square norms, mean, projections and Gram matrix of per-sample gradients in one backward pass,
without the matrix of all gradients, and sums of them with weights.

Formulas, with g_i the gradient of sample i's loss by all P parameters and N samples in the batch:

    mu = mean_i g_i        n_i = |g_i|^2        p_i = u . g_i        G_ij = g_i . g_j        d_j = mean_i g_ij^2

Each is a sum over parameters. It is taken from a layer's input and the gradient of its output (layer_gradients.py), in
the one backward pass that a training step makes anyway. Inside a block, a ``CallRecorder`` sees the calls that take
parameters (recorder.py); ``LossPasses`` find out where the samples are (loss_passes.py); a ``GradientCollector`` takes
the statistics (collector.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from ..model.arguments import require_switch
from ..model.binding import Binding
from ..model.names import join_names
from ..model.preserved import require_no_inference_mode
from .collector import GradientCollector, LayerStatistics
from .directions import rows_of
from .graph import Losses
from .loss_passes import LossPasses, disagreeing
from .recorder import CallRecorder, dense

_NOT_OF_THIS_BLOCK = "weighted_sums needs losses that the model has computed in this SampleGradients block."

_STATISTICS = ("sq_norms", "mean", "projections", "gram", "diagonal", "num_samples")


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

    Read them after the block. The block leaves ``.grad`` as an ordinary backward pass does. Sample i must be the only
    sample that loss_i depends on, so BatchNorm in training mode raises an error.

    The library measures where the samples are in the model's tensors and does not guess: they may be in any dimension,
    in several rows per sample, sorted, packed or routed. In the first block of a model with given shapes,
    ceil(log_8 N) + 2 backward passes with weights on the losses run before the block's own pass. They show which sample
    each row of a layer's output belongs to. One more pass proves, for every parameter, that the per-sample gradients
    g_i that are read satisfy: sum_i w_i g_i is the gradient of sum_i w_i loss_i. Later blocks with the same calls and
    shapes only walk over the graph. Where indices or products may move rows, ceil(log_8 N) + 1 passes check that the
    rows are still in the same places. (One case is not detected: values that choose between two ways through the model
    by multiplication, without an index.)

    The block's pass must start from the sum or the mean of a tensor whose first dimension is the sample, for example
    ``losses.sum()``; ``backward`` does that. From anything else, such as the mean over a batch that ``F.mse_loss``
    returns, the losses cannot be seen: the first dimension of every layer's output is then taken for the sample, and a
    warning says so.

    These have rules, wherever and however often they are used: Linear, Conv1d to Conv3d and their transposes,
    GroupNorm, LayerNorm, RMSNorm, InstanceNorm, BatchNorm in evaluation mode, Embedding, MultiheadAttention, ``x @ W``
    and parameters that are broadcast over samples. Tied weights, subclasses, functional calls, activation
    checkpointing and autocast are supported, and so are tensors computed from parameters: parametrized weights, tables
    of positions, temperatures. A function without a rule takes one backward pass through it for each sample. If the
    proof finds a parameter's gradients wrong or missing, because a custom autograd.Function or a derivative inside the
    loss hides its use, that parameter takes one backward pass from the losses for each sample. Either case gives one
    warning with the parameters' names.

    A block serves one backward pass of the user's. The graph may be retained (``backward(retain_graph=True)``) for
    ``weighted_sums`` or other uses: backward passes after the block are ordinary ones. If a GradScaler has
    multiplied the losses, the gradients are multiplied by the same factor. Hooks on activations are also called in the
    passes that measure.

    Args:
        model: statistics are taken of its parameters that require a gradient.
        direction: parameter name -> tensor u of the parameter's shape; or (K, \\*shape), for K directions. A parameter
            that is left out counts as zero.
        gram: also take the Gram matrix.
        loss_reduction: "sum" if the backward pass starts from ``losses.sum()``, "mean" if from ``losses.mean()``.
        diagonal: also take the mean of squares, the diagonal Fisher.
        include, exclude: patterns that choose parameters, as in ``LowRankHistory``.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name; a BatchNorm in training mode; a sharded model
            outside ``whole_parameters``.
        RuntimeError: no backward pass in the block, or two.
        NotImplementedError: per-sample gradients that this pass cannot give, by parameter.

    Source: norms in one backward pass: Goodfellow, arXiv 1510.01799; by kind of layer: Rochette et al., arXiv
    1912.06015. New here: sums over samples within the tile of a weight where they are computed, and projections on the
    batch's own mean.
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
        for name, value in (("gram", gram), ("diagonal", diagonal)):
            require_switch(name, value)
        self._binding = Binding(model, include, exclude)
        self._binding.require_whole()
        self._model, self._reduction = model, loss_reduction
        self._want_diagonal = diagonal
        single, rows = (True, None) if direction is None else rows_of(direction, self._binding)
        self._collector = GradientCollector(self._binding, rows, single, gram, diagonal)
        self._entered = False
        self._only_weighed = False

    def __getattr__(self, name: str) -> Any:
        """Called for what the instance lacks: statistics, before the block has ended."""
        if name in _STATISTICS:
            raise AttributeError(
                f"{name} is there after the SampleGradients block, if a backward pass was made in it; read it then."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
        """Checks that ``losses`` is one number for each sample, and makes the block's backward pass from
        ``losses.sum()``, or from ``losses.mean()`` with loss_reduction="mean".

        Args:
            losses: (N,), computed in the block.

        Raises:
            TypeError, ValueError: losses that are not a vector, or carry no gradient.
        """
        if not self._entered or not self._recorder.recording:
            raise RuntimeError("backward belongs inside of the SampleGradients block.")
        if not isinstance(losses, Tensor):
            raise TypeError(f"losses is a {type(losses).__name__}; expected a tensor (N,).")
        if losses.dim() != 1:
            raise ValueError(f"losses has shape {tuple(losses.shape)}; expected (N,), one loss for each sample.")
        if len(losses) == 0:
            raise ValueError("losses is empty: there are no samples in the batch.")
        if not losses.is_floating_point():
            raise TypeError(f"losses is {losses.dtype}; expected real floating-point losses.")
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
        r"""sum_i w_ki g_i for each row k of weights, from one backward pass. Examples: sums over the classes of a
        batch; eigenvectors of its Fisher, not normalized, with weights from ``gram``.

            with SampleGradients(model, gram=True) as sg:
                losses = per_sample_loss(model, batch)
                losses.sum().backward(retain_graph=True)
            eigenvectors = sg.weighted_sums(losses, torch.linalg.eigh(sg.gram).eigenvectors.T[-3:])

        Call it after the block, if the block's backward pass retained the graph. Or call it in the block, instead of a
        backward pass; the block then has no statistics. ``.grad`` does not change, and hooks on parameters are not
        called.

        Args:
            losses: (N,), computed in the block: those of its backward pass, or other losses, which are then measured.
            weights: (K, N).

        Returns:
            name -> (K, \*shape), float32, or float64 if a parameter is; views of what ``weighted_rows`` returns.

        Memory: the result, one more copy of one layer's part of it, and about 64 MiB for per-sample gradients (or one
        sample's gradients in a layer, if that is more; where tokens are few, copies of a layer's inputs and output
        gradients instead). The gradients of biases, norms and broadcast parameters are held for all samples at once.

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
        """After a pass that could not be checked: raises for parameters whose gradient was not taken in full."""
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
