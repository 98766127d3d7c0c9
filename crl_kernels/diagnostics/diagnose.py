"""``diagnose`` measures the Fisher of a model at chosen timesteps.

F = E[g g^T] over per-sample gradients g at one timestep t, or with t uniform; mu = E[g]. Everything is computed from
the Gram matrix G_ij = g_i . g_j of N samples (and the Fisher's diagonal), never from a P x P or N x P matrix.
spectrum.py computes the numbers, verdict.py the answer.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.unsharded import whole_parameters
from ..fisher.loss_source import require_per_sample_loss
from ..model.arguments import require_generator, require_integer, shown
from ..model.binding import Binding
from ..model.preserved import preserved, require_no_inference_mode
from ..per_sample.batches import batch_size, concatenate_batches, reorder_batch, slice_batch
from ..per_sample.independence import require_independent_losses
from ..per_sample.loaders import limited
from ..per_sample.sample_gradients import SampleGradients
from .diagnosis import Diagnosis
from .spectrum import GROUPS, IntervalEstimate, Spectrum, share_of_bands, spectrum_of, top_coefficients
from .verdict import judge

PerSampleLossAt = Callable[[nn.Module, Any, Tensor], Tensor]

_FRACTIONS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)


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
    """Measures the Fisher of a model at single timesteps and with t uniform, and says whether rank 1 is enough.

    ONE batch of N samples, joined from the loader's batches, is used at every timestep, so the memory of one backward
    pass over N samples limits N. (The samples of one timestep are compared with one another; a Gram matrix over several
    batches would have to keep their gradients, N x P.) Each timestep costs that pass; one pass for weighted sums (the
    mean over one half, and the top direction of each half); and passes over the N samples in sixteen batches for the
    diagonal. The memory is G, and P floats for each of sixteen groups.

    The model is in evaluation mode during the call. Its mode, gradients, buffers and hooks, and the global random
    state, are restored, also when the loss raises. For a sharded model (FSDP2, HSDP), all processes call this function
    together; each holds the whole parameters during the call and returns the diagnosis of its own loader's samples.

    Args:
        model: the model at the end of its task.
        per_sample_loss_at: ``(model, batch, t) -> (N,)``, one loss for each sample, computed from that sample alone at
            timestep t_i; t is (N,), int64, on the model's device. Noise may come from the global generators.
        loader: batches of images (and labels, captions, ...) without timesteps, in any order, on the model's device;
            see ``estimate_fisher``.
        timesteps: by default 2, 10, 30, 50, 70, 90 and 98 % of ``num_timesteps``.
        num_timesteps: uniform t is drawn from 0 .. num_timesteps - 1.
        samples: N, at least 48, rounded down to a multiple of 16; all samples, if the loader has fewer.
        snr: signal-to-noise ratio of a timestep, or of each of ``timesteps``; only shown in tables and pictures.
        generator: seeds the random numbers of the loss and of the uniform t.
        include, exclude: patterns that choose parameters, as in ``LowRankHistory``.
        progress: called with a line of text before each timestep.
        mixed_losses: True accepts losses that depend on other samples too, as in ``estimate_fisher``.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name; gradients that are not finite, or all zero; a
            loss that mixes samples.
        RuntimeError: in torch.inference_mode().

    Source: the claim that rank 1 is enough: arXiv 2509.23593. New here: the Gram matrix, held-out shares and the rule.
    """
    if timesteps is None:
        timesteps = list(dict.fromkeys(int(f * num_timesteps) for f in _FRACTIONS))
    require_integer("num_timesteps", num_timesteps, 1)
    _check_timesteps(timesteps, num_timesteps)
    ratios = _check_snr(snr, timesteps)
    timesteps = sorted(timesteps)
    require_integer("samples", samples, 3 * GROUPS, f", to be cut into {GROUPS} groups")
    require_generator("generator", generator)
    require_per_sample_loss("per_sample_loss_at", per_sample_loss_at, "model, batch, t")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is {shown(progress)}; expected a function of a line, such as print.")
    report = progress or (lambda line: None)
    require_no_inference_mode("diagnose")
    with whole_parameters(model):
        binding = Binding(model, include, exclude)
        with preserved(model, binding.device), torch.enable_grad():
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            batch = _one_batch(loader, samples)
            gradients = _BatchGradients(model, binding, per_sample_loss_at, batch)
            if not mixed_losses:
                gradients.require_independent_losses(timesteps[0])
            measurements = []
            for t in timesteps:
                report(f"t = {t}")
                measurements.append(gradients.at(torch.full((gradients.count,), t, device=binding.device)))
            report("t uniform")
            tops = torch.stack([top for m in measurements for top in m.tops]) if len(measurements) > 1 else None
            measurements.append(gradients.at(torch.randint(num_timesteps, (gradients.count,)).to(binding.device), tops))

    uniform = measurements[-1].spectrum
    at = {t: m.spectrum for t, m in zip(timesteps, measurements, strict=False)}
    names = [*map(str, timesteps), "uniform"]
    layers = {
        layer: {name: m.layers[layer] for name, m in zip(names, measurements, strict=True)}
        for layer in measurements[0].layers
    }
    bands = measurements[-1].bands
    return Diagnosis(
        num_timesteps,
        gradients.count,
        binding.layout.numel,
        at,
        uniform,
        layers,
        ratios,
        _cosines(measurements),
        bands,
        judge(uniform, at, bands),
    )


@dataclass(frozen=True)
class _Measurement:
    """The numbers of one timestep; the mean and the top direction of each half of the samples, (P,) each."""

    spectrum: Spectrum
    layers: dict[str, Spectrum]
    means: tuple[Tensor, Tensor]
    tops: tuple[Tensor, Tensor]
    bands: IntervalEstimate | None


class _BatchGradients:
    """Per-sample gradients of one batch, at any timesteps."""

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

    def at(self, t: Tensor, directions: Tensor | None = None) -> _Measurement:
        """Measures at timesteps ``t``, (N,). ``directions``, (2T, P): the top directions of the first and the second
        half for each of T timesteps, whose share of the trace at ``t`` is ``bands``."""
        n, half = self.count, self.count // 2
        named = None if directions is None else self._binding.layout.split(directions)
        with SampleGradients(self._model, direction=named, gram=True, **self._choice) as gradients:
            losses = self._losses(self._batch, t)
            gradients.backward(losses, retain_graph=True)
        gram = gradients.gram
        assert gram is not None
        if not bool(torch.isfinite(gram).all()):
            raise ValueError("per_sample_loss_at has NaN or infinite gradients, so there is nothing to measure.")
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
        return _Measurement(
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
        """By layer, (16, 16): inner products of the diagonal Fishers of the groups."""
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


def _cosines(measurements: Sequence[_Measurement]) -> list[list[float]]:
    """mu_s . mu_t / (|mu_s| |mu_t|), unbiased: only products of different halves, so of different samples, enter."""
    first, second = (torch.stack([measurement.means[i] for measurement in measurements]).double() for i in (0, 1))
    cross = first @ second.T
    sq_norms = [
        s.kappa.value * s.trace.value if s.kappa.low > 0 else math.nan for s in (v.spectrum for v in measurements)
    ]
    scale = torch.tensor(sq_norms, dtype=torch.float64).sqrt()
    cosines = ((cross + cross.T) / 2).cpu() / (scale[:, None] * scale)
    cosines.diagonal().copy_(scale / scale)
    rows: list[list[float]] = cosines.clamp(-1, 1).tolist()
    return rows


def _one_batch(loader: Iterable[Any], samples: int) -> Any:
    """The first ``samples`` samples, or all if there are fewer, cut to a multiple of 16, in a fixed random order."""
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
    if not isinstance(timesteps, Collection):
        raise TypeError(f"timesteps is {shown(timesteps)}; expected a list of integers, or None.")
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
    if not isinstance(snr, Collection):
        raise TypeError(f"snr is {shown(snr)}; expected a function of a timestep, a dict or a list of one for each.")
    if len(snr) != len(timesteps):
        raise ValueError(f"snr has {len(snr)} values for {len(timesteps)} timesteps; expected one for each.")
    return {t: float(value) for t, value in zip(timesteps, snr, strict=True)}
