"""Where the samples are in each call of a sequence of calls, and its measurement from fingerprints of gradients.

``rows.py`` has the method for one call: weights on the losses that tell samples apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .rows import Codes, Rows, fingerprint


@dataclass(eq=False)
class SampleLayout:
    """Where the samples are in each call of one sequence of calls."""

    count: int
    calls: dict[Any, Rows] = field(default_factory=dict)  # of those whose output no two samples share
    shared: set[Any] = field(default_factory=set)  # (call, slot) of derived operands that samples share
    several: set[int] = field(default_factory=set)  # parameters that several calls give overlapping gradients
    by_passes: tuple[int, ...] = ()  # parameters whose per-sample gradients take a backward pass for each sample
    lasting: bool = True  # holds for other batches of the same calls; otherwise each batch is checked
    moves: bool = False  # did not hold for one batch, because of indices
    blocks: int = 0  # in which that was checked
    reached: bool = True  # by the passes
    zero: tuple[int, ...] = ()  # parameters whose gradients were zero, for which nothing could be proven
    assumed: bool = False  # the first dimension is taken for the sample, unmeasured


@dataclass
class _Fingerprints:
    dims: tuple[int, ...]
    passes: list[Tensor] = field(default_factory=list)


class Measurement:
    """Fingerprints of gradients in the backward passes that look for the samples.

    A key is (call, None) for the gradient of the call's output, or (call, slot) for that of a derived operand.
    """

    def __init__(self) -> None:
        self._fingerprints: dict[tuple[Any, int | None], _Fingerprints] = {}
        self._noise = 0.0  # how far fingerprints of two equal passes are apart, relatively

    def note(self, call: Any, slot: int | None, gradient: Tensor, dims: Sequence[int]) -> None:
        prints = self._fingerprints.setdefault((call, slot), _Fingerprints(tuple(dims)))
        prints.passes.append(fingerprint(gradient, dims))

    def measure_noise(self) -> None:
        """After two equal passes, which were the only ones; on a CPU their fingerprints are equal."""
        for prints in self._fingerprints.values():
            first, second = prints.passes
            difference = ((first - second).abs() / first).nan_to_num(0.0)
            self._noise = max(self._noise, 4 * float(difference.max()) if difference.numel() else 0.0)
        self._fingerprints.clear()

    def layout(self, codes: Codes, lasting: bool) -> SampleLayout:
        """What was measured in the passes of ``codes``."""
        layout = SampleLayout(codes.count, lasting=lasting, reached=bool(self._fingerprints))
        for (call, slot), prints in self._fingerprints.items():
            complete = len(prints.passes) == len(codes.passes)
            rows = codes.rows(prints.passes, prints.dims, self._noise) if complete else None
            layout.lasting = layout.lasting and complete and (rows is None or rows.lasting)
            if slot is None and rows is not None:
                layout.calls[call] = rows
            elif slot is not None and rows is None:
                layout.shared.add((call, slot))
        self._fingerprints.clear()
        return layout

    def confirms(self, layout: SampleLayout, codes: Codes) -> bool:
        """Whether every row still belongs to the same sample, from all passes of ``codes`` but the last."""
        by_call = {call: prints for (call, slot), prints in self._fingerprints.items() if slot is None}
        self._fingerprints.clear()
        return all(
            call in by_call and codes.confirm(rows, by_call[call].passes, by_call[call].dims, self._noise)
            for call, rows in layout.calls.items()
        )
