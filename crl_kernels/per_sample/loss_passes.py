"""The library's own backward passes from a block's losses: they find where the samples are, prove it, and take sums.

A layout that was measured is remembered for its model, under the calls, shapes and graph that it belongs to.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..model.binding import Binding
from ..model.names import join_names
from ..model.preserved import without_gradient_hooks
from .collector import GradientCollector, WeightedSums
from .graph import Losses
from .operands import ParameterUse
from .recorder import CallRecorder, Pass, dense, warn_once
from .rows import Codes
from .sample_layout import Measurement, SampleLayout

# The latest layouts of each model, at most LAYOUTS_KEPT.
LAYOUTS: "weakref.WeakKeyDictionary[nn.Module, dict[Any, SampleLayout]]" = weakref.WeakKeyDictionary()
LAYOUTS_KEPT = 256
# How far two ways to a sum of gradients may be apart, relatively.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}
_ROUNDING_16_BIT = 0.03


def _used_several_times(uses: Mapping[int, Sequence[ParameterUse]]) -> set[int]:
    """Parameters of which an element has gradients from more than one use."""
    return {
        index
        for index, uses_of_one in uses.items()
        if any(use.overlaps_itself() for use in uses_of_one)
        or any(use.overlaps(earlier) for i, use in enumerate(uses_of_one) for earlier in uses_of_one[:i])
    }


def disagreeing(sums: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> tuple[int, ...]:
    """The parameters whose sum of per-sample gradients differs from the gradient by more than rounding.

    A gradient that is zero but for rounding, of a bias before a norm for example, is compared at the scale of the whole
    model's gradient; one of which no per-sample gradient was read is not.
    """
    pairs = [
        (total, torch.zeros_like(total) if gradient is None else dense(gradient).to(total.dtype))
        for total, gradient in zip(sums, gradients, strict=True)
    ]
    norms = [float(gradient.norm()) for _, gradient in pairs]
    model_norm = math.hypot(*norms)
    indices = []
    for i, ((total, expected), norm) in enumerate(zip(pairs, norms, strict=True)):
        gradient = gradients[i]
        rounding = 0.0 if gradient is None else _ROUNDING.get(gradient.dtype, _ROUNDING_16_BIT)
        missing = norm > 1e-2 * rounding * model_norm and not bool(total.any())
        if missing or not float((total - expected).norm()) <= rounding * max(norm, 1e-3 * model_norm):
            indices.append(i)
    return tuple(indices)


class LossPasses:
    """Backward passes from the losses of one block."""

    def __init__(
        self, model: nn.Module, binding: Binding, recorder: CallRecorder, collector: GradientCollector
    ) -> None:
        self._model, self._binding, self._recorder, self._collector = model, binding, recorder, collector
        self._block_key: Any = None  # of the block's own layout

    def layout_of(self, losses: Losses) -> SampleLayout:
        """Where the samples are in the calls that lead to ``losses``: as remembered, or measured now."""
        recorder = self._recorder
        known = LAYOUTS.setdefault(self._model, {})
        key = (*recorder.key_of(losses), self._binding.layout.names)
        if recorder.sample_layout is not None and key == self._block_key:
            return recorder.sample_layout
        layout = known.get(key)
        if layout is None or not self._holds(layout, losses):
            before, layout = layout, self._measure(losses)
            if before is not None:
                layout.moves, layout.blocks = before.moves, before.blocks
            if len(known) >= LAYOUTS_KEPT:
                del known[next(iter(known))]
            known[key] = layout
        if recorder.sample_layout is None:
            self._block_key = key
        return layout

    def assumed_layout(self) -> SampleLayout:
        """The layout with the sample first in every call, for a pass whose losses cannot be seen."""
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
        return SampleLayout(recorder.first_size or 0, several=_used_several_times(uses), assumed=True)

    def weigh(self, losses: Losses, weights: Tensor) -> WeightedSums:
        """Sums of per-sample gradients with weights (K, N), where the samples are known to be."""
        recorder, collector = self._recorder, self._collector
        sums = collector.weighted_sums = WeightedSums(weights, self._binding)
        try:
            self._gradients(losses, torch.ones_like(weights[0]), Pass.SUMS)
            assert recorder.sample_layout is not None
            if by_passes := recorder.sample_layout.by_passes:
                self.take_by_passes(losses, by_passes)
        finally:
            collector.weighted_sums = None
        return sums

    def take_by_passes(self, losses: Losses, parameters: Sequence[int]) -> None:
        """Takes per-sample gradients of ``parameters`` with one backward pass from the losses for each sample."""
        weights = self._recorder.weights_of_rows(losses.count)
        params = [self._binding.params[i] for i in parameters]
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self._binding.device.type, enabled=False))
            stack.enter_context(without_gradient_hooks(params))
            self._collector.by_passes = True
            stack.callback(setattr, self._collector, "by_passes", False)
            self._recorder.take_rows(lambda i: ([losses.edge], [losses.seeds(weights[i])]), len(weights), params)

    def _holds(self, layout: SampleLayout, losses: Losses) -> bool:
        """Whether a remembered layout of the same calls is also this batch's, as far as that can be told without a new
        measurement."""
        recorder = self._recorder
        if layout.moves:
            return False
        if layout.zero:
            gradients = self._gradients(losses, torch.ones(losses.count), Pass.ORDINARY, layout.zero)
            if any(gradient is not None and bool(dense(gradient).any()) for gradient in gradients):
                return False
        if layout.lasting:
            return True
        codes = Codes(losses.count, self._binding.device)
        recorder.measurement = Measurement()
        for weights in codes.passes[:-1]:
            self._gradients(losses, weights, Pass.MEASURE)
        confirmed = recorder.measurement.confirms(layout, codes)
        layout.moves = recorder.moves_rows and not confirmed
        # What no gradient reached in the first batches may be reached in a later one: blocks 1, 2, 4, ... are measured.
        layout.blocks += 1
        return confirmed and (recorder.moves_rows or layout.blocks.bit_count() > 1)

    def _measure(self, losses: Losses) -> SampleLayout:
        """Measures where the samples are, and proves it for every parameter."""
        recorder = self._recorder
        codes = Codes(losses.count, self._binding.device)
        recorder.measurement = Measurement()
        if self._binding.device.type != "cpu":
            for _ in range(2):
                self._gradients(losses, codes.passes[0], Pass.MEASURE)
            recorder.measurement.measure_noise()
        for weights in codes.passes[:-1]:
            self._gradients(losses, weights, Pass.MEASURE)
        gradients = self._gradients(losses, codes.passes[-1], Pass.CHECK)
        layout = recorder.measurement.layout(codes, lasting=not recorder.moves_rows)
        before, recorder.sample_layout = recorder.sample_layout, layout
        weighted = self.weigh(losses, codes.passes[-1][None])
        recorder.sample_layout = before
        layout.several = _used_several_times(weighted.uses)
        sums = list(self._binding.layout.split(weighted.rows[0]).values())
        layout.by_passes = disagreeing(sums, gradients)
        norms = [0.0 if gradient is None else float(dense(gradient).double().norm()) for gradient in gradients]
        layout.zero = tuple(i for i, norm in enumerate(norms) if norm == 0 and gradients[i] is not None)
        if not math.isfinite(sum(norms)):  # one backward pass a sample says whose gradient is not finite
            layout.lasting, layout.zero = False, tuple(range(len(gradients)))
        elif layout.by_passes and losses.count > 1:
            names = join_names(self._binding.layout.names[i] for i in layout.by_passes)
            warn_once(
                f"the per-sample gradients of {names} cannot be read from the layers that use them: something that is "
                "no function of PyTorch's hides a use, or the samples share what is computed. They take a backward "
                "pass from the losses for each sample of a batch. Exclude them with exclude= if that is too slow."
            )
        return layout

    def _gradients(
        self, losses: Losses, weights: Tensor, purpose: Pass, parameters: Sequence[int] | None = None
    ) -> Sequence[Tensor | None]:
        """Gradients of sum_i w_i loss_i by all parameters, or some; the graph is retained."""
        recorder, params = self._recorder, self._binding.params
        if parameters is not None:
            params = [params[i] for i in parameters]
        with (
            recorder.for_purpose(purpose),
            without_gradient_hooks(params),
            torch.autocast(self._binding.device.type, enabled=False),
        ):
            return recorder.differentiate(losses, weights, params)
