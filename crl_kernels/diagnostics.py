"""Is rank 1 enough for this model? Per timestep, per layer, with intervals, in words and in pictures.

    diagnosis = diagnose(model, per_sample_loss_at, loader)
    print(*diagnosis.verdict.sentences, sep="\\n")
    diagnosis.save("report")                        # report.json, report.md, pictures

F = E[g g^T] over per-sample gradients g at one timestep t, or with t uniform; mu = E[g]. Everything comes from the Gram
matrix G_ij = g_i . g_j of N samples (and the Fisher's diagonal), never from a P x P or N x P matrix. Estimates of
functions of F are unbiased (only products of different samples enter) or held out (directions from one half of the
samples, what they hold on the other half, both ways, averaged); what is in sample is called so.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .batches import batch_size, slice_batch
from .binding import Binding
from .preserved import preserved
from .sample_gradients import SampleGradients

PerSampleLossAt = Callable[[nn.Module, Any, Tensor], Tensor]

RANKS = (1, 2, 4, 8, 16)
GROUPS = 16  # of the jackknife; the first eight are one half of the samples, the others the other
KEPT_EIGENVALUES = 32
# Train directions below this share of the largest eigenvalue are dropped: they hold nothing, and projections on them
# divide by its root, which turns errors of 1e-6 in a float32 Gram matrix into errors of 1e-3.
_NEGLIGIBLE = 1e-6
_CANCELLED = 1e-10
_FRACTIONS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)

# The rule of the verdict.
ENOUGH = 0.5
MARGIN = 0.05


# Numbers: from a Gram matrix to what it says


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; nan where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        return f"{self.value:.2g} [{self.low:.2g}, {self.high:.2g}]"

    @property
    def percent(self) -> str:
        """A share in words: ``16 % [13, 19]``."""
        return f"{100 * self.value:.2g} % [{100 * self.low:.2g}, {100 * self.high:.2g}]"


@dataclass(frozen=True)
class Spectrum:
    """What the Gram matrix of N samples says about F, for one timestep (or t uniform), for one layer or all.

    Unbiased, or a ratio of unbiased estimates:
        trace                  tr F = E |g|^2
        kappa                  |mu|^2 / tr F, the signal share; below 0 when mu is lost in noise
        rho                    mu^T F mu / (|mu|^2 tr F), the share of the trace along the exact mean gradient; nan when
                               the interval of kappa reaches 0, because nothing can be said about a direction then
        participation_ratio    (sum l)^2 / sum l^2 over F's eigenvalues l
    Leave-one-out:
        mean_abs_cos           mean |cos(g_i, mean of the OTHER samples)|: a sample does not meet itself in the mean
    In sample, biased upwards (lambda_1) by about what N samples of noise would give; intervals are of their spread:
        lambda1_share          lambda_1 / tr F
        lambda2_over_lambda1
        stable_rank            tr F / lambda_1
        eigenvalues            the first 32, as shares of the trace, without intervals
    Held out, and so a little below what the population's own directions hold:
        held_out_mean          share of the trace along the mean gradient
        held_out[k]            share of the trace along the top k eigenvectors; with lambda1_share above and
                               held_out[1] below, lambda_1 / tr F of the population lies between
        top_over_mean          held_out[1] - held_out_mean
        error_mean, error[k]   relative Frobenius error |F - Fhat|_F / |F|_F of Fhat = sum_k a_k u_k u_k^T with
                               a_k = u_k^T F u_k, the optimal c for the mean: sqrt(1 - sum_k a_k^2 / |F|_F^2)
        error_diagonal         the same of Fhat = diag F: sqrt(1 - sum_j F_jj^2 / |F|_F^2); nan without diagonals
    |F|_F^2 is the mean of G_ij^2 over i != j; G_ii^2 would add a term of order 1 / N that is no part of F.
    """

    num_samples: int
    trace: Estimate
    kappa: Estimate
    rho: Estimate
    participation_ratio: Estimate
    mean_abs_cos: Estimate
    lambda1_share: Estimate
    lambda2_over_lambda1: Estimate
    stable_rank: Estimate
    eigenvalues: tuple[float, ...]
    held_out_mean: Estimate
    held_out: dict[int, Estimate]
    top_over_mean: Estimate
    error_mean: Estimate
    error: dict[int, Estimate]
    error_diagonal: Estimate


def spectrum_of(gram: Tensor, diagonals: Tensor | None = None, ranks: Sequence[int] = RANKS) -> Spectrum:
    """Everything in :class:`Spectrum`, from a Gram matrix.

    Args:
        gram: (N, N), g_i . g_j of samples in random order; N a multiple of 16, at least 48. Sixteen consecutive runs
            of samples are the groups of the jackknife, the first eight of them the first half.
        diagonals: (16, 16), d_g . d_h of the diagonal Fishers d_g = mean of g_ij^2 over each group's samples. Products
            of different groups are unbiased for sum_j F_jj^2; |diag F|^2 of all samples is not.
        ranks: the k of ``held_out`` and ``error``; those above N / 4 are left out.

    Intervals are estimate +- t_15(0.975) s, with s the delete-one-group jackknife's standard error, or, for the
    eigenvalues in sample, that of the infinitesimal jackknife: the influence of sample i on lambda_k is
    (v_k . g_i)^2 - lambda_k. Shares and errors are cut off at 0 and 1.
    """
    n = len(gram)
    if gram.shape != (n, n) or n % GROUPS or n < 3 * GROUPS:
        raise ValueError(
            f"gram has shape {tuple(gram.shape)}; expected (N, N) with N a multiple of {GROUPS}, at least {3 * GROUPS}."
        )
    if diagonals is not None and diagonals.shape != (GROUPS, GROUPS):
        raise ValueError(f"diagonals has shape {tuple(diagonals.shape)}; expected ({GROUPS}, {GROUPS}).")
    gram = gram.detach().double().cpu()
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("gram has NaN or infinite entries: the loss has such gradients, and nothing can be said then.")
    ranks = [k for k in ranks if k <= n // 4]
    if not bool(gram.diagonal().sum() > 0):
        return _nothing(n, ranks)

    group = torch.arange(n) // (n // GROUPS)
    everything = torch.ones(n, dtype=torch.bool)
    kept = [everything] + [group != g for g in range(GROUPS)]
    moments = torch.stack([_moments(gram[keep][:, keep]) for keep in kept])
    held = torch.stack(_held_out(gram, group, kept, ranks))
    trace, kappa, rho, participation, cosine = _intervals(moments[:, :5])
    if not kappa.low > 0:
        rho = Estimate(math.nan)
    first, second, stable, eigenvalues = _in_sample(gram)

    shares = _intervals(held[:, : 2 + len(ranks)])
    squares = held[:, 2 + len(ranks) :]
    if diagonals is not None:
        diagonals = diagonals.detach().double().cpu()
        sums = [diagonals] + [diagonals[rest][:, rest] for rest in (torch.arange(GROUPS) != g for g in range(GROUPS))]
        off = torch.stack([(q.sum() - q.trace()) / (len(q) * (len(q) - 1)) for q in sums])
        squares = torch.cat([squares, (1 - off / moments[:, 5])[:, None]], 1)
    errors = [_root(estimate) for estimate in _intervals(squares)]
    return Spectrum(
        num_samples=n,
        trace=trace,
        kappa=kappa,
        rho=rho,
        participation_ratio=participation,
        mean_abs_cos=_clipped(cosine),
        lambda1_share=_clipped(first),
        lambda2_over_lambda1=_clipped(second),
        stable_rank=stable,
        eigenvalues=eigenvalues,
        held_out_mean=_clipped(shares[0]),
        held_out={k: _clipped(share) for k, share in zip(ranks, shares[2:], strict=True)},
        top_over_mean=shares[1],
        error_mean=errors[0],
        error=dict(zip(ranks, errors[1 : 1 + len(ranks)], strict=True)),
        error_diagonal=errors[-1] if diagonals is not None else Estimate(math.nan),
    )


def _nothing(n: int, ranks: Sequence[int]) -> Spectrum:
    """The Spectrum of a layer whose gradients are all zero."""
    nan = Estimate(math.nan)
    values: dict[str, Any] = {field.name: nan for field in fields(Spectrum)}
    values |= {"num_samples": n, "trace": Estimate(0.0, 0.0, 0.0), "eigenvalues": ()}
    return Spectrum(**values | {"held_out": dict.fromkeys(ranks, nan), "error": dict.fromkeys(ranks, nan)})


def _moments(gram: Tensor) -> Tensor:
    """tr F, kappa, rho, participation ratio, mean |cos| and |F|_F^2."""
    n, own = len(gram), gram.diagonal()
    others = gram.sum(1) - own  # sum over j != i of g_i . g_j
    squares = gram.square().sum(1) - own.square()
    pairs = n * (n - 1)
    trace = own.mean()
    mean_sq = others.sum() / pairs
    frobenius_sq = squares.sum() / pairs
    along_mean = (others.square() - squares).sum() / (pairs * (n - 2))  # mu^T F mu, from i, j, k all different
    trace_sq = (own.sum().square() - own.square().sum()) / pairs
    rest_sq = gram.sum() - 2 * others - own  # |sum of the others|^2
    cosine = others / (own * rest_sq).clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    return torch.stack(
        [
            trace,
            mean_sq / trace,
            along_mean / (mean_sq * trace),
            trace_sq / frobenius_sq,
            cosine.abs().mean(),
            frobenius_sq,
        ]
    )


def _held_out(gram: Tensor, group: Tensor, kept: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """For each choice of samples: share along the mean, top less mean, shares of top k, 1 - squared errors likewise.

    Directions are u = sum_i c_i g_i over the samples of one half, so u . g_j = sum_i c_i G_ij for those of the other.
    """
    half = group < GROUPS // 2
    most = max(ranks)
    made: dict[tuple[int, ...], Tensor] = {}  # a group that is left out changes the directions of its own half only

    def directions(samples: Tensor) -> Tensor:
        key = tuple(samples.tolist())
        if key not in made:
            block = gram[samples][:, samples]
            # A sum that cancels to rounding errors has no direction, and holds nothing.
            sq_norm = block.sum()
            scale = sq_norm.rsqrt() if sq_norm > _CANCELLED * block.trace() else torch.zeros_like(sq_norm)
            made[key] = torch.cat([scale.expand(len(block), 1), top_coefficients(block, most)], 1)
        return made[key]

    results = []
    for keep in kept:
        parts = torch.nonzero(keep & half).flatten(), torch.nonzero(keep & ~half).flatten()
        held, trace, square, frobenius_sq = torch.zeros(4, 1, dtype=gram.dtype)
        for train, test in (parts, parts[::-1]):
            b = len(test)
            block = gram[test][:, test]
            projections = (gram[test][:, train] @ directions(train)).square()
            held = held + projections.mean(0)
            trace = trace + block.diagonal().mean()
            # (u^T F u)^2 and |F|_F^2 from pairs of different samples: of these very samples both, so that a matrix of
            # exact rank has an error of exactly 0.
            square = square + (projections.sum(0).square() - projections.square().sum(0)) / (b * (b - 1))
            frobenius_sq = frobenius_sq + (block.square().sum() - block.diagonal().square().sum()) / (b * (b - 1))
        share, caught = held / trace, square / frobenius_sq
        at = torch.tensor(ranks) - 1
        top, caught_top = share[1:].cumsum(0), caught[1:].cumsum(0)
        results.append(
            torch.cat([share[:1], share[1:2] - share[:1], top[at], 1 - caught[:1], 1 - caught_top[at]]).double()
        )
    return results


def top_coefficients(block: Tensor, count: int) -> Tensor:
    """(N, count) coefficients c of the orthonormal top directions v_k = sum_i c_ik g_i, from the Gram matrix (N, N)."""
    values, vectors = torch.linalg.eigh(block)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    good = values > _NEGLIGIBLE * values[0]
    return torch.where(good, vectors / values.clamp(min=1e-300).sqrt(), 0.0)


def _in_sample(gram: Tensor) -> tuple[Estimate, Estimate, Estimate, tuple[float, ...]]:
    n = len(gram)
    values, vectors = torch.linalg.eigh(gram / n)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    trace = gram.diagonal().mean()
    influence = values[:2] * (n * vectors[:, :2].square() - 1)  # on lambda_1 and lambda_2, (N, 2)
    first, second = influence[:, 0], influence[:, 1]
    of_trace = gram.diagonal() - trace
    share, ratio, stable = values[0] / trace, values[1] / values[0], trace / values[0]

    def interval(value: Tensor, psi: Tensor) -> Estimate:
        reach = _student(n - 1) * float(psi.square().sum() / (n * (n - 1))) ** 0.5
        return Estimate(float(value), float(value) - reach, float(value) + reach)

    return (
        interval(share, (first - share * of_trace) / trace),
        interval(ratio, (second - ratio * first) / values[0]),
        interval(stable, (of_trace - stable * first) / values[0]),
        tuple((values[:KEPT_EIGENVALUES] / trace).tolist()),
    )


def _intervals(table: Tensor) -> list[Estimate]:
    """Estimates from rows of values: of all samples first, then with each group left out."""
    values, replicates = table[0], table[1:]
    g = len(replicates)
    errors = ((g - 1) / g * (replicates - replicates.mean(0)).square().sum(0)).sqrt()
    reach = _student(g - 1) * errors
    return [Estimate(*row) for row in torch.stack([values, values - reach, values + reach], 1).tolist()]


def _student(degrees: int) -> float:
    """Student's t quantile at 0.975 by the first terms of its expansion: within 2e-4 from 15 degrees on."""
    z = NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + math.fsum(term / degrees ** (i + 1) for i, term in enumerate(terms))


def _clipped(e: Estimate) -> Estimate:
    return Estimate(*(min(1.0, max(0.0, x)) if x == x else x for x in (e.value, e.low, e.high)))


def _root(e: Estimate) -> Estimate:
    return Estimate(*(math.sqrt(x) if x == x else x for x in asdict(_clipped(e)).values()))


# The verdict


@dataclass(frozen=True)
class Verdict:
    """The answer, and the three sentences that say it.

    The rule, on held-out shares of the trace and their 95 % intervals:
        a form is enough where the lower end is at least one half, not enough where the upper end is below one half, and
        undecided in between;
        rank 1 is enough where the mean gradient or the top eigenvector is; ``direction`` is "top" where its share is
        above the mean's by more than 0.05 at the lower end of the difference's interval, or where only it is enough,
        and "mean" otherwise;
        ``use``, with t uniform, is the first of these that is enough, in the order of their number of directions:
        "mean", "top", "rank 2", "rank 4", "bands" (one direction at each of the listed timesteps), "rank 8",
        "rank 16"; and "diagonal", which keeps the whole trace, though not the directions, where none is.

    answer: "yes", "no" or "undecided", of rank 1 with t uniform. enough_at, not_at, undecided_at: timesteps, where
    rank 1 is judged for F of that timestep alone.
    """

    answer: str
    direction: str
    use: str
    enough_at: tuple[int, ...]
    not_at: tuple[int, ...]
    undecided_at: tuple[int, ...]
    sentences: tuple[str, str, str]


def judge(uniform: Spectrum, at: Mapping[int, Spectrum], bands: Estimate | None = None) -> Verdict:
    """Applies :class:`Verdict`'s rule to the numbers of t uniform, of single timesteps, and of their bands."""
    answer, direction = _rank_1(uniform)
    found = {t: _rank_1(spectrum) for t, spectrum in at.items()}
    enough, no, undecided = (tuple(t for t in at if found[t][0] == a) for a in ("yes", "no", "undecided"))

    candidates = [(k, f"rank {k}", share) for k, share in uniform.held_out.items() if k > 1]
    if bands is not None:
        candidates.append((len(at), "bands", bands))
    candidates.sort(key=lambda candidate: (candidate[0], candidate[1]))
    use = next((name for _, name, share in candidates if share.low >= ENOUGH), "diagonal")
    if answer == "yes":
        use = direction
    return Verdict(
        answer,
        direction,
        use,
        enough,
        no,
        undecided,
        (
            _first_sentence(answer, direction, uniform),
            _second_sentence(found, at, enough, no, undecided),
            _third_sentence(use, answer, uniform, len(at), bands),
        ),
    )


def _rank_1(spectrum: Spectrum) -> tuple[str, str]:
    mean, top = spectrum.held_out_mean, spectrum.held_out[1]
    better = spectrum.top_over_mean.low > MARGIN or (top.low >= ENOUGH > mean.low)
    if mean.low >= ENOUGH or top.low >= ENOUGH:
        answer = "yes"
    else:
        answer = "no" if max(mean.high, top.high) < ENOUGH else "undecided"
    return answer, "top" if better else "mean"


def _first_sentence(answer: str, direction: str, s: Spectrum) -> str:
    numbers = (
        f"with t uniform the mean gradient holds {s.held_out_mean.percent} of the trace of F, and the top eigenvector "
        f"{s.held_out[1].percent}, on samples that did not choose them (95 % intervals, {s.num_samples} samples)"
    )
    lost = "" if s.kappa.low > 0 else "; the mean gradient itself is lost in noise"
    if answer == "yes" and direction == "mean":
        return f"Rank 1 is enough here: {numbers}{lost}."
    if answer == "yes":
        return f"Rank 1 is enough here, but along the top eigenvector and not along the mean gradient: {numbers}{lost}."
    if answer == "no":
        return f"Rank 1 is not enough here: {numbers}{lost}."
    return f"These samples do not decide whether rank 1 is enough here: {numbers}{lost}."


def _second_sentence(
    found: Mapping[int, tuple[str, str]],
    at: Mapping[int, Spectrum],
    enough: Sequence[int],
    no: Sequence[int],
    undecided: Sequence[int],
) -> str:
    if not at:
        return "No single timesteps were looked at."
    parts = []
    if enough:
        parts.append(f"enough at t = {_listed(enough)}")
        top = [t for t in enough if found[t][1] == "top"]
        if top:
            which = "there" if len(top) == len(enough) else f"at t = {_listed(top)}"
            parts[-1] += f" ({which} along the top eigenvector rather than the mean)"
    if no:
        parts.append(f"not enough at t = {_listed(no)}")
    if undecided:
        parts.append(f"undecided at t = {_listed(undecided)}")
    share = sum(at[t].trace.value for t in enough) / sum(s.trace.value for s in at.values())
    carried = f", with {100 * share:.2g} % of the trace summed over all timesteps listed" if enough else ""
    return f"One timestep at a time, rank 1 is {parts[0]}{carried}{''.join('; ' + part for part in parts[1:])}."


def _third_sentence(use: str, answer: str, s: Spectrum, count: int, bands: Estimate | None) -> str:
    if use == "mean":
        return 'Use estimate_fisher with rank=1 and direction="mean", as the paper does.'
    if use == "top":
        return 'Use estimate_fisher with rank=1 and direction="top".'
    if use == "bands" and bands is not None:
        return (
            f"Use bands of timesteps as strata of estimate_fisher: one direction at each of the {count} timesteps "
            f"holds {bands.percent} together."
        )
    if use.startswith("rank "):
        k = int(use.removeprefix("rank "))
        return f'Use estimate_fisher with rank={k} and direction="top": {k} directions hold {s.held_out[k].percent}.'
    k = max(s.held_out)
    banded = f", {count} bands of timesteps {bands.percent}" if bands is not None else ""
    diagonal, low_rank = s.error_diagonal, s.error[k]
    text = (
        f'Use kind="diagonal", which keeps the whole trace: nothing of low rank surely holds half of it (rank {k} '
        f"{s.held_out[k].percent}{banded})"
    )
    if diagonal.value == diagonal.value:
        closer = "the diagonal" if diagonal.high < low_rank.low else f"rank {k}" if low_rank.high < diagonal.low else ""
        judged = f"{closer} is the closer one" if closer else "neither is surely the closer one"
        text += (
            f"; as matrices {judged}, with relative Frobenius errors of {diagonal} (diagonal) and {low_rank} (rank {k})"
        )
    if answer == "undecided":
        text += "; more samples may change this"
    return text + "."


def short(ratio: float) -> str:
    """A ratio of any size in two significant digits: 160, 8.5, 0.0069, 5.9e-05."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _listed(timesteps: Sequence[int]) -> str:
    return ", ".join(map(str, timesteps))


# The diagnosis: gradients of a model


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    at: timestep -> Spectrum; uniform: with t uniform over 0 .. num_timesteps - 1. layers: name of the module that owns
    the parameters -> the same, under the timestep or "uniform". snr: timestep -> signal-to-noise ratio, or empty.
    cosines: between the mean gradients of the timesteps in the order of ``at``, and t uniform last; nan where a mean is
    lost in noise. bands: share of the trace with t uniform in the span of the top directions of all the timesteps,
    held out; its interval takes the directions as given.
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
        """Reads back what :meth:`save` wrote, to six significant digits."""
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
) -> Diagnosis:
    """Looks at the Fisher of a model at single timesteps and with t uniform, and says whether rank 1 is enough.

    ONE batch of N samples, put together from the loader, serves at every timestep: N is limited by the memory of one
    backward pass over N samples. Samples of one timestep must be compared with one another, and a Gram matrix over
    several batches would need their gradients kept, N x P. At each timestep there is that pass, three weighted backward
    passes (the mean over one half and the top direction of each half), and N samples more, in sixteen batches, for the
    diagonal; and G, P floats for each of sixteen groups.

    The model is in evaluation mode meanwhile. Its mode, gradients, buffers, hooks and the global random state are left
    as they were, also when the loss raises.

    Args:
        model: the model at the end of its task.
        per_sample_loss_at: ``(model, batch, t) -> (N,)``, one loss for each sample, computed from that sample alone at
            timestep t_i; t is (N,), int64, on the model's device. Noise may come from the global generators.
        loader: batches of images (and labels, ...) without timesteps, in any order, on the model's device: a tensor,
            or tuples, lists and dicts of tensors whose first dimension is the sample.
        timesteps: by default 2, 10, 30, 50, 70, 90 and 98 % of ``num_timesteps``.
        num_timesteps: uniform t is drawn from 0 .. num_timesteps - 1.
        samples: N, at least 48, cut down to a multiple of 16; a loader that has fewer gives all it has.
        snr: signal-to-noise ratio of a timestep, or of each of ``timesteps``; only shown.
        generator: seeds the random numbers of the loss and of uniform t.
        include, exclude: patterns that choose parameters, as in :class:`LowRankHistory`.
        progress: told what is looked at.

    Raises:
        TypeError, ValueError: for input that does not fit, naming it; non-finite gradients, or none but zeros.

    Source: the claim of rank 1: arXiv 2509.23593; Gram matrix, held-out shares and the rule: ours.
    """
    if timesteps is None:
        timesteps = list(dict.fromkeys(int(f * num_timesteps) for f in _FRACTIONS))
    _check_timesteps(timesteps, num_timesteps)
    ratios = _check_snr(snr, timesteps)
    timesteps = sorted(timesteps)
    if samples < 3 * GROUPS:
        raise ValueError(f"samples is {samples}; expected at least {3 * GROUPS}, to be cut into {GROUPS} groups.")
    binding = Binding(model, include, exclude)
    say = progress or (lambda line: None)
    with preserved(model, binding.device), torch.enable_grad():
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        batch = _one_batch(loader, samples)
        look = _Look(model, binding, per_sample_loss_at, batch)
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
            losses.sum().backward(retain_graph=True)
        gram = gradients.gram
        assert gram is not None
        if not bool(torch.isfinite(gram).all()):
            raise ValueError("per_sample_loss_at has NaN or infinite gradients, and nothing can be said about them.")
        if not bool(gram.diagonal().any()):
            raise ValueError("every per-sample gradient is zero; check that the loss depends on the parameters.")

        weights = losses.new_zeros(3, n)
        weights[0, :half] = 1 / half
        for row, part in enumerate((slice(0, half), slice(half, n)), 1):
            weights[row, part] = top_coefficients(gram[part, part].cpu(), 1)[:, 0].to(weights)
        mean, *tops = (self._weighted(losses, row, last=i == 2) for i, row in enumerate(weights))
        other = 2 * self._binding.layout.flatten(gradients.mean) - mean  # the halves are equal

        diagonals = self._diagonals(t)
        layers: dict[str, Tensor] = {}
        for name, layer in gradients.per_layer.items():
            assert layer.gram is not None
            owner = self._owner[name]
            layers[owner] = layers[owner] + layer.gram if owner in layers else layer.gram
        bands = None
        if directions is not None:
            bands = _bands(gradients.projections, directions.double() @ directions.double().T, gram.diagonal())
        return _View(
            spectrum_of(gram, torch.stack(list(diagonals.values())).sum(0)),
            {owner: spectrum_of(block, diagonals[owner]) for owner, block in layers.items()},
            (mean, other),
            (tops[0], tops[1]),
            bands,
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

    def _weighted(self, losses: Tensor, weights: Tensor, last: bool) -> Tensor:
        """sum_i w_i g_i, (P,): one backward pass."""
        params = self._binding.params
        found = torch.autograd.grad((weights * losses).sum(), params, retain_graph=not last, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]
        return torch.cat([piece.reshape(-1).to(self._binding.dtype) for piece in pieces])

    def _diagonals(self, t: Tensor) -> dict[str, Tensor]:
        """By layer, (16, 16): products of the diagonal Fishers of the groups."""
        size = self.count // GROUPS
        rows: dict[str, list[Tensor]] = {name: [] for name in self._binding.layout.names}
        for begin in range(0, self.count, size):
            part = slice_batch(self._batch, begin, begin + size)
            with SampleGradients(self._model, diagonal=True, **self._choice) as gradients:
                self._losses(part, t[begin : begin + size]).sum().backward()
            for name, value in gradients.diagonal.items():
                rows[name].append(value.reshape(-1))
        products: dict[str, Tensor] = {}
        for name, row in rows.items():
            matrix = torch.stack(row).double()
            owner = self._owner[name]
            product = (matrix @ matrix.T).cpu()
            products[owner] = products[owner] + product if owner in products else product
        return products


def _bands(projections: Tensor, overlaps: Tensor, sq_norms: Tensor) -> Estimate:
    """Share of the trace in the span of T directions: those of one half on the samples of the other, both ways.

    projections (N, 2T), overlaps U U^T (2T, 2T): rows of the first half are the even ones. A sample's square norm in
    the span of U is p^T (U U^T)^-1 p.
    """
    n = len(projections)
    projections, overlaps, sq_norms = (x.detach().double().cpu() for x in (projections, overlaps, sq_norms))
    inside = torch.empty_like(sq_norms)
    for part, rows in ((slice(n // 2, n), slice(0, None, 2)), (slice(0, n // 2), slice(1, None, 2))):
        p = projections[part, rows]
        inside[part] = ((p @ torch.linalg.pinv(overlaps[rows, rows], rtol=_NEGLIGIBLE, hermitian=True)) * p).sum(1)
    group = torch.arange(n) // (n // GROUPS)
    kept = [torch.ones(n, dtype=torch.bool)] + [group != g for g in range(GROUPS)]
    return _clipped(_intervals(torch.stack([inside[keep].sum() / sq_norms[keep].sum() for keep in kept])[:, None])[0])


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
    batches: list[Any] = []
    count = 0
    for batch in loader:
        batches.append(batch)
        count += batch_size(batch)
        if count >= samples:
            break
    count = min(count, samples) // GROUPS * GROUPS
    if count < 3 * GROUPS:
        raise ValueError(
            f"loader yields {sum(map(batch_size, batches))} samples; expected at least {3 * GROUPS}, to be cut into "
            f"{GROUPS} groups."
        )
    leaves = [tree_flatten(batch)[0] for batch in batches]
    structure = tree_flatten(batches[0])[1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    whole = [
        torch.cat(column)[:count][order.to(column[0].device)] if isinstance(column[0], Tensor) else column[0]
        for column in zip(*leaves, strict=True)
    ]
    return tree_unflatten(whole, structure)


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
            raise ValueError(f"snr lacks the timesteps {_listed(missing)}.")
        return {t: float(snr[t]) for t in timesteps}
    if len(snr) != len(timesteps):
        raise ValueError(f"snr has {len(snr)} values for {len(timesteps)} timesteps; expected one for each.")
    return {t: float(value) for t, value in zip(timesteps, snr, strict=True)}
