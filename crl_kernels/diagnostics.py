"""Is rank 1 enough for this model? Per timestep, per layer, with intervals, in words and in pictures.

    diagnosis = diagnose(model, per_sample_loss_at, loader)
    print(*diagnosis.verdict.sentences, sep="\\n")
    diagnosis.save("report")                        # report.json, report.md, pictures

F = E[g g^T] over per-sample gradients g at one timestep t, or with t uniform; mu = E[g]. Everything comes from the Gram
matrix G_ij = g_i . g_j of N samples (and the Fisher's diagonal), never from a P x P or N x P matrix: the numbers are
made of it in spectrum.py, the answer of them in verdict.py.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import batch_size, concatenate_batches, limited, reorder_batch, slice_batch
from .binding import Binding
from .independence import require_independent_losses
from .preserved import preserved, require_no_inference_mode
from .sample_gradients import SampleGradients
from .spectrum import GROUPS, Estimate, Spectrum, share_of_bands, spectrum_of, top_coefficients
from .unsharded import whole_parameters
from .verdict import Verdict, judge, short

PerSampleLossAt = Callable[[nn.Module, Any, Tensor], Tensor]

_FRACTIONS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found.

    Attributes:
        num_timesteps: uniform t is drawn from 0 .. num_timesteps - 1.
        num_samples: at every timestep.
        num_parameters: that were looked at.
        at: timestep -> Spectrum.
        uniform: the Spectrum with t uniform.
        layers: name of the module that owns the parameters -> timestep or "uniform" -> Spectrum.
        snr: timestep -> signal-to-noise ratio, or empty.
        cosines: between the mean gradients of the timesteps in the order of ``at``, and t uniform last; nan where a
            mean is lost in noise.
        bands: share of the trace with t uniform in the span of the top directions of all the timesteps, held out; its
            interval takes the directions as given.
        verdict: the answer; ``verdict.sentences`` says it in three sentences.
    """

    num_timesteps: int
    num_samples: int
    num_parameters: int
    at: dict[int, Spectrum]
    uniform: Spectrum
    layers: dict[str, dict[str, Spectrum]]
    snr: dict[int, float]
    cosines: list[list[float]]
    bands: Estimate | None
    verdict: Verdict

    def save(self, folder: str | os.PathLike[str], title: str = "Is rank 1 enough?") -> list[Path]:
        """Writes report.json, report.md and, as PNG and SVG, five pictures; returns their paths.

        Raises:
            ImportError: matplotlib is missing; report.json and report.md are written all the same.
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
        from . import diagnostics_pictures

        return paths + diagnostics_pictures.write(self, out)

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
        """Headings and rows: one for each timestep and one for t uniform."""
        places = [*((str(t), s) for t, s in self.at.items()), ("uniform", self.uniform)]
        rows = [(label, [place(s) for _, s in places]) for label, place in _ROWS]
        if self.snr:
            rows.insert(0, ("SNR", [*(short(self.snr[t]) for t in self.at), ""]))
        return ["t", *(name for name, _ in places)], [[label, *cells] for label, cells in rows]

    def markdown(self, title: str) -> str:
        """The report as text."""
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
    """JSON with Estimates as [value, low, high], six significant digits, null for nan."""

    def plain(x: Any) -> Any:
        if isinstance(x, Estimate):
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


def _read_estimate(raw: Sequence[float | None]) -> Estimate:
    return Estimate(*map(_number, raw))


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


def diagnose(
    model: nn.Module,
    per_sample_loss_at: PerSampleLossAt,
    loader: Iterable[Any],
    timesteps: Sequence[int] | None = None,
    *,
    num_timesteps: int = 1000,
    samples: int = 256,
    snr: Callable[[int], float] | Mapping[int, float] | Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    progress: Callable[[str], None] | None = None,
    mixed_losses: bool = False,
) -> Diagnosis:
    """Looks at the Fisher of a model at single timesteps and with t uniform, and says whether rank 1 is enough.

    ONE batch of N samples, put together from the loader, serves at every timestep: N is limited by the memory of one
    backward pass over N samples. Samples of one timestep must be compared with one another, and a Gram matrix over
    several batches would need their gradients kept, N x P. At each timestep there is that pass, one for weighted
    sums (the mean over one half and the top direction of each half), and N samples more, in sixteen batches, for the
    diagonal; and G, P floats for each of sixteen groups.

    The model is in evaluation mode meanwhile. Its mode, gradients, buffers, hooks and the global random state are left
    as they were, also when the loss raises. Of a sharded model (FSDP2, HSDP) all processes call this together, have the
    whole parameters meanwhile, and each returns the diagnosis of its own loader's samples.

    Args:
        model: the model at the end of its task.
        per_sample_loss_at: ``(model, batch, t) -> (N,)``, one loss for each sample, computed from that sample alone at
            timestep t_i; t is (N,), int64, on the model's device. Noise may come from the global generators.
        loader: batches of images (and labels, captions, ...) without timesteps, in any order, on the model's device, as
            in ``estimate_fisher``.
        timesteps: by default 2, 10, 30, 50, 70, 90 and 98 % of ``num_timesteps``.
        num_timesteps: uniform t is drawn from 0 .. num_timesteps - 1.
        samples: N, at least 48, cut down to a multiple of 16; a loader that has fewer gives all it has.
        snr: signal-to-noise ratio of a timestep, or of each of ``timesteps``; only shown.
        generator: seeds the random numbers of the loss and of uniform t.
        include, exclude: patterns that choose parameters, as in ``LowRankHistory``.
        progress: told what is looked at.
        mixed_losses: True takes losses that depend on other samples too, as in ``estimate_fisher``.

    Raises:
        TypeError, ValueError: for input that does not fit, naming it; non-finite gradients, or none but zeros; a loss
            that mixes samples.
        RuntimeError: in torch.inference_mode().

    Source: the claim of rank 1: arXiv 2509.23593; Gram matrix, held-out shares and the rule: ours.
    """
    if timesteps is None:
        timesteps = list(dict.fromkeys(int(f * num_timesteps) for f in _FRACTIONS))
    _check_timesteps(timesteps, num_timesteps)
    ratios = _check_snr(snr, timesteps)
    timesteps = sorted(timesteps)
    if samples < 3 * GROUPS:
        raise ValueError(f"samples is {samples}; expected at least {3 * GROUPS}, to be cut into {GROUPS} groups.")
    say = progress or (lambda line: None)
    require_no_inference_mode("diagnose")
    with whole_parameters(model):
        binding = Binding(model, include, exclude)
        with preserved(model, binding.device), torch.enable_grad():
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            batch = _one_batch(loader, samples)
            look = _Look(model, binding, per_sample_loss_at, batch)
            if not mixed_losses:
                look.require_independent_losses(timesteps[0])
            views = []
            for t in timesteps:
                say(f"t = {t}")
                views.append(look.at(torch.full((look.count,), t, device=binding.device)))
            say("t uniform")
            tops = torch.stack([top for view in views for top in view.tops]) if len(views) > 1 else None
            views.append(look.at(torch.randint(num_timesteps, (look.count,)).to(binding.device), tops))

    uniform = views[-1].spectrum
    at = {t: view.spectrum for t, view in zip(timesteps, views, strict=False)}
    names = [*map(str, timesteps), "uniform"]
    layers = {
        layer: {name: view.layers[layer] for name, view in zip(names, views, strict=True)} for layer in views[0].layers
    }
    bands = views[-1].bands
    return Diagnosis(
        num_timesteps,
        look.count,
        binding.layout.numel,
        at,
        uniform,
        layers,
        ratios,
        _cosines(views),
        bands,
        judge(uniform, at, bands),
    )


@dataclass(frozen=True)
class _View:
    """One timestep's numbers, the means of both halves, and the top directions of both, (P,) each."""

    spectrum: Spectrum
    layers: dict[str, Spectrum]
    means: tuple[Tensor, Tensor]
    tops: tuple[Tensor, Tensor]
    bands: Estimate | None


class _Look:
    """Gradients of one batch, at any timesteps."""

    def __init__(
        self,
        model: nn.Module,
        binding: Binding,
        loss: PerSampleLossAt,
        batch: Any,
    ) -> None:
        self._model, self._binding, self._loss, self._batch = model, binding, loss, batch
        self._choice: dict[str, Any] = {"include": binding.include, "exclude": binding.exclude}
        self.count = batch_size(batch)
        # A parameter of the model itself has no module to be named after.
        self._owner = {name: name.rpartition(".")[0] or name for name in binding.layout.names}

    def at(self, t: Tensor, directions: Tensor | None = None) -> _View:
        """``directions``, (2T, P): of the first and the second half for each of T timesteps, to be held against t."""
        n, half = self.count, self.count // 2
        named = None if directions is None else self._binding.layout.split(directions)
        with SampleGradients(self._model, direction=named, gram=True, **self._choice) as gradients:
            losses = self._losses(self._batch, t)
            gradients.backward(losses, retain_graph=True)
        gram = gradients.gram
        assert gram is not None
        if not bool(torch.isfinite(gram).all()):
            raise ValueError("per_sample_loss_at has NaN or infinite gradients, and nothing can be said about them.")
        if not bool(gram.diagonal().any()):
            raise ValueError("every per-sample gradient is zero; check that the loss depends on the parameters.")

        weights = torch.zeros(3, n, dtype=torch.float64, device=losses.device)
        weights[0, :half] = 1 / half
        for row, part in enumerate((slice(0, half), slice(half, n)), 1):
            weights[row, part] = top_coefficients(gram[part, part].cpu(), 1)[:, 0].to(weights)
        mean, *tops = gradients.weighted_rows(losses, weights)
        other = 2 * self._binding.layout.flatten(gradients.mean) - mean  # the halves are equal

        diagonals = self._diagonals(t)
        layers: dict[str, Tensor] = {}
        for name, layer in gradients.per_layer.items():
            assert layer.gram is not None
            owner = self._owner[name]
            layers[owner] = layers[owner] + layer.gram if owner in layers else layer.gram
        bands = None
        if directions is not None:
            bands = share_of_bands(gradients.projections, directions.double() @ directions.double().T, gram.diagonal())
        return _View(
            spectrum_of(gram, torch.stack(list(diagonals.values())).sum(0)),
            {owner: spectrum_of(block, diagonals[owner]) for owner, block in layers.items()},
            (mean, other),
            (tops[0], tops[1]),
            bands,
        )

    def require_independent_losses(self, t: int) -> None:
        timesteps = torch.full((self.count,), t, device=self._binding.device)
        require_independent_losses(
            "per_sample_loss_at",
            self._loss,
            lambda batch: self._losses(batch, timesteps),
            self._batch,
            self._model,
            self._binding.device,
        )

    def _losses(self, batch: Any, t: Tensor) -> Tensor:
        losses = self._loss(self._model, batch, t)
        if not isinstance(losses, Tensor) or losses.shape != t.shape:
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
            raise ValueError(
                f"per_sample_loss_at returned {got} for a batch of {len(t)}; expected ({len(t)},), one loss per "
                "sample, such as (error ** 2).mean(dim=(1, 2, 3))."
            )
        if not losses.requires_grad:
            raise ValueError(
                "per_sample_loss_at carries no gradient: compute it from model, outside of torch.no_grad()."
            )
        return losses

    def _diagonals(self, t: Tensor) -> dict[str, Tensor]:
        """By layer, (16, 16): products of the diagonal Fishers of the groups."""
        size = self.count // GROUPS
        rows: dict[str, list[Tensor]] = {name: [] for name in self._binding.layout.names}
        for begin in range(0, self.count, size):
            part = slice_batch(self._batch, begin, begin + size)
            with SampleGradients(self._model, diagonal=True, **self._choice) as gradients:
                gradients.backward(self._losses(part, t[begin : begin + size]))
            for name, value in gradients.diagonal.items():
                rows[name].append(value.reshape(-1))
        products: dict[str, Tensor] = {}
        for name, row in rows.items():
            matrix = torch.stack(row).double()
            owner = self._owner[name]
            product = (matrix @ matrix.T).cpu()
            products[owner] = products[owner] + product if owner in products else product
        return products


def _cosines(views: Sequence[_View]) -> list[list[float]]:
    """mu_s . mu_t / (|mu_s| |mu_t|) without the noise: products of different halves, so of different samples."""
    first, second = (torch.stack([view.means[i] for view in views]).double() for i in (0, 1))
    cross = first @ second.T
    sq_norms = [s.kappa.value * s.trace.value if s.kappa.low > 0 else math.nan for s in (v.spectrum for v in views)]
    scale = torch.tensor(sq_norms, dtype=torch.float64).sqrt()
    cosines = ((cross + cross.T) / 2).cpu() / (scale[:, None] * scale)
    cosines.diagonal().copy_(scale / scale)
    rows: list[list[float]] = cosines.clamp(-1, 1).tolist()
    return rows


def _one_batch(loader: Iterable[Any], samples: int) -> Any:
    """The first ``samples`` samples, or all there are, cut to a multiple of 16, in a fixed random order."""
    batches = list(limited(loader, samples))
    total = sum(map(batch_size, batches))
    count = total // GROUPS * GROUPS
    if count < 3 * GROUPS:
        raise ValueError(
            f"loader yields {total} samples; expected at least {3 * GROUPS}, to be cut into {GROUPS} groups."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return reorder_batch(concatenate_batches(batches), order)


def _check_timesteps(timesteps: Sequence[int], num_timesteps: int) -> None:
    for t in timesteps:
        if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < num_timesteps:
            raise ValueError(
                f"timesteps has {t!r}; expected integers from 0 to num_timesteps - 1 = {num_timesteps - 1}."
            )
    if len(set(timesteps)) < len(timesteps) or not timesteps:
        raise ValueError(f"timesteps is {list(timesteps)}; expected at least one, and none twice.")


def _check_snr(
    snr: Callable[[int], float] | Mapping[int, float] | Sequence[float] | None, timesteps: Sequence[int]
) -> dict[int, float]:
    if snr is None:
        return {}
    if callable(snr):
        return {t: float(snr(t)) for t in timesteps}
    if isinstance(snr, Mapping):
        if missing := [t for t in timesteps if t not in snr]:
            raise ValueError(f"snr lacks the timesteps {', '.join(map(str, missing))}.")
        return {t: float(snr[t]) for t in timesteps}
    if len(snr) != len(timesteps):
        raise ValueError(f"snr has {len(snr)} values for {len(timesteps)} timesteps; expected one for each.")
    return {t: float(value) for t, value in zip(timesteps, snr, strict=True)}
