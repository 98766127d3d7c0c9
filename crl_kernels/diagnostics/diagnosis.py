"""``Diagnosis``, the result of ``diagnose``: its fields, its tables and its files."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .findings import Findings
from .spectrum import IntervalEstimate, Spectrum
from .verdict import Verdict, short


@dataclass(frozen=True)
class Diagnosis(Findings):
    """What ``diagnose`` measured of a model's Fisher: by timestep and by layer, with 95 % intervals.

    ::

        diagnosis = diagnose(model, per_sample_loss_at, loader)
        print(diagnosis)                        # the verdict and a small table
        diagnosis.save("report")                # report.json, report.md, pictures

    Fields:
        num_timesteps     t is an integer from 0 to num_timesteps - 1
        num_samples       N, at each timestep
        num_parameters    P
        at                timestep -> Spectrum of F at this timestep
        uniform           Spectrum of F with t uniform over all timesteps
        layers            name of the module that owns the parameters -> {timestep as a string, or "uniform": Spectrum}
        snr               timestep -> signal-to-noise ratio; empty if none was given
        cosines           matrix of cosines between the mean gradients of the timesteps, in the order of ``at``, and of
                          t uniform, last; nan where a mean cannot be told from noise
        bands             share of the trace with t uniform in the span of the top directions of all the timesteps,
                          held out; the interval treats the directions as fixed; None for one timestep
        verdict           Verdict: the answer, and the sentences that say it
    """

    def __repr__(self) -> str:
        return (
            f"Diagnosis(answer={self.verdict.answer!r}, use={self.verdict.use!r}, num_samples={self.num_samples}, "
            f"num_parameters={self.num_parameters}, timesteps={len(self.at)}, layers={len(self.layers)})"
        )

    def __str__(self) -> str:
        """The verdict's sentences, and the shares of the trace that its forms hold. ``table`` has all numbers."""
        rows = [["t", *map(str, self.at), "uniform"]]
        forms: list[tuple[str, Callable[[Spectrum], IntervalEstimate]]] = [("mean", lambda s: s.held_out_mean)]
        for k in self.uniform.held_out:
            forms.append(("top" if k == 1 else f"rank {k}", lambda s, k=k: s.held_out[k]))  # type: ignore[misc]
        for name, share in forms:
            rows.append([name, *(f"{100 * share(s).value:.0f} %" for s in (*self.at.values(), self.uniform))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        title = f"Share of the trace, held out, from {self.num_samples} samples at each t:"
        return "\n".join([*self.verdict.sentences, "", title, *lines])

    def save(self, folder: str | os.PathLike[str], title: str = "Is rank 1 enough?") -> list[Path]:
        """Writes report.json, report.md and, as PNG and SVG, five pictures; returns their paths.

        Raises:
            ImportError: matplotlib is missing; report.json and report.md have been written.
        """
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        paths = [out / "report.json", out / "report.md"]
        lines = ",\n".join(f"{json.dumps(k)}: {_dumps(v)}" for k, v in self._as_json().items())
        paths[0].write_text("{\n" + lines + "\n}\n", encoding="utf-8")
        paths[1].write_text(self.markdown(title), encoding="utf-8")
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ImportError("the pictures of a diagnosis need matplotlib: pip install matplotlib") from error
        from . import pictures

        return paths + pictures.write(self, out)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Diagnosis":
        """Reads back what ``save`` wrote, to six significant digits."""
        raw = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        verdict: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw["verdict"].items()}
        return cls(
            raw["num_timesteps"],
            raw["num_samples"],
            raw["num_parameters"],
            {int(t): _read_spectrum(s) for t, s in raw["at"].items()},
            _read_spectrum(raw["uniform"]),
            {name: {t: _read_spectrum(s) for t, s in row.items()} for name, row in raw["layers"].items()},
            {int(t): v for t, v in raw["snr"].items()},
            [[_number(x) for x in row] for row in raw["cosines"]],
            None if raw["bands"] is None else _read_estimate(raw["bands"]),
            Verdict(**verdict),
        )

    def _as_json(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"verdict": asdict(self.verdict)}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows; one column for each timestep and one for t uniform."""
        columns = [*((str(t), s) for t, s in self.at.items()), ("uniform", self.uniform)]
        rows = [(label, [cell(s) for _, s in columns]) for label, cell in _ROWS]
        if self.snr:
            rows.insert(0, ("SNR", [*(short(self.snr[t]) for t in self.at), ""]))
        return ["t", *(name for name, _ in columns)], [[label, *cells] for label, cells in rows]

    def markdown(self, title: str) -> str:
        """The report as Markdown text."""
        head, body = self.table()
        lines = [f"# {title}", "", *self.verdict.sentences, "", "| " + " | ".join(head) + " |"]
        lines += ["|---" + "|---:" * (len(head) - 1) + "|", *("| " + " | ".join(row) + " |" for row in body), ""]
        lines += [
            f"{self.num_samples} samples at every timestep, {self.num_parameters} parameters, 95 % intervals. Held "
            "out: directions from one half of the samples, shares and errors on the other. Rank 1 is called enough "
            "where the lower end of the share that one direction holds is at least one half.",
            "",
        ]
        if self.bands is not None:
            together = f"One direction at each of the {len(self.at)} timesteps: together they hold {self.bands.percent}"
            lines += [f"{together} of the trace with t uniform, held out.", ""]
        lines += ["Share of the trace along the top eigenvector, held out, layer by layer:", ""]
        lines += ["| layer | " + " | ".join(head[1:]) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
        for name, row in self.layers.items():
            cells = [f"{s.held_out[1].value:.2f}" if s.trace.value else "-" for s in row.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join([*lines, ""])


_ROWS: tuple[tuple[str, Callable[[Spectrum], str]], ...] = (
    ("trace of F", lambda s: str(s.trace)),
    ("kappa, unbiased", lambda s: str(s.kappa)),
    ("rho, unbiased", lambda s: str(s.rho) if s.rho.value == s.rho.value else "mean lost in noise"),
    ("share along the mean, held out", lambda s: str(s.held_out_mean)),
    ("share along the top eigenvector, held out", lambda s: str(s.held_out[1])),
    ("lambda_1 / trace, in sample", lambda s: str(s.lambda1_share)),
    ("lambda_2 / lambda_1, in sample", lambda s: str(s.lambda2_over_lambda1)),
    ("stable rank, in sample", lambda s: str(s.stable_rank)),
    ("participation ratio, unbiased", lambda s: str(s.participation_ratio)),
    ("mean abs cos to the others' mean", lambda s: str(s.mean_abs_cos)),
    ("share of the largest rank, held out", lambda s: f"k = {max(s.held_out)}: {s.held_out[max(s.held_out)]}"),
    ("Frobenius error, diagonal", lambda s: str(s.error_diagonal)),
    ("Frobenius error, mean direction", lambda s: str(s.error_mean)),
    ("Frobenius error, top direction", lambda s: str(s.error[1])),
    ("Frobenius error of the largest rank", lambda s: f"k = {max(s.error)}: {s.error[max(s.error)]}"),
)


def _dumps(value: Any) -> str:
    """JSON with an IntervalEstimate as [value, low, high], six significant digits, null for nan."""

    def plain(x: Any) -> Any:
        if isinstance(x, IntervalEstimate):
            return [plain(y) for y in (x.value, x.low, x.high)]
        if isinstance(x, Spectrum):
            return {field.name: plain(getattr(x, field.name)) for field in fields(x)}
        if isinstance(x, Mapping):
            return {str(k): plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(y) for y in x]
        if isinstance(x, float):
            return float(f"{x:.6g}") if math.isfinite(x) else None
        return x

    simple = plain(value)
    if isinstance(simple, dict) and any(isinstance(v, dict) for v in simple.values()):  # one line for each entry
        return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in simple.items()) + "\n}"
    return json.dumps(simple)


def _number(x: float | None) -> float:
    return math.nan if x is None else float(x)


def _read_estimate(raw: Sequence[float | None]) -> IntervalEstimate:
    return IntervalEstimate(*map(_number, raw))


def _read_spectrum(raw: Mapping[str, Any]) -> Spectrum:
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if isinstance(value, dict):
            values[name] = {int(k): _read_estimate(v) for k, v in value.items()}
        elif name == "eigenvalues":
            values[name] = tuple(value)
        else:
            values[name] = _read_estimate(value) if isinstance(value, list) else value
    return Spectrum(**values)
