"""The decoupled step against the exact minimiser, in rational arithmetic."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import crl_kernels as ck

SHAPES = {"w": (4, 3), "b": (5,), "c": ()}
SPLIT = {"w": 0, "b": 1, "c": 1}  # the parameter group of each


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)))


def terms(num_terms: int, kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(directions (K, P), curvatures (K,), anchors (K, P)), the directions at the named angles to each other."""
    generator = torch.Generator().manual_seed(seed)
    numel = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    u, anchors = torch.randn(2, num_terms, numel, generator=generator, dtype=torch.float64)
    if kind == "identical":
        u = u[:1].expand(num_terms, numel).clone()
    elif kind != "random":  # the cosine of the angle to the first
        first = u[0] / u[0].norm()
        across = u - (u @ first)[:, None] * first
        cosine = 1 - float(kind)
        u = cosine * first + (1 - cosine**2) ** 0.5 * across / across.norm(dim=1, keepdim=True).clamp(min=1e-9)
    u = u / u.norm(dim=1, keepdim=True)
    return u, 10.0 ** torch.empty(num_terms, dtype=torch.float64).uniform_(-2, 2, generator=generator), anchors


def named(flat: Tensor) -> dict[str, Tensor]:
    lengths = [torch.Size(shape).numel() for shape in SHAPES.values()]
    pieces = flat.split(lengths, dim=-1)
    return {n: x.reshape((*flat.shape[:-1], *s)) for (n, s), x in zip(SHAPES.items(), pieces, strict=True)}


def low_rank_history(model: nn.Module, num_terms: int, kind: str, seed: int) -> ck.LowRankHistory:
    history = ck.LowRankHistory(model)
    for u, a, anchor in zip(*terms(num_terms, kind, seed), strict=True):
        history.append(ck.LowRankFisher(named(u[None]), a[None], named(anchor)))
    return history


def flat(model: nn.Module) -> list[Fraction]:
    return [Fraction(x) for p in model.parameters() for x in p.detach().flatten().tolist()]


def exact(tensor: Tensor) -> list:
    return [exact(row) for row in tensor] if tensor.dim() > 1 else [Fraction(x) for x in tensor.tolist()]


def solve(matrix: list[list[Fraction]], right: list[Fraction]) -> list[Fraction]:
    """Gaussian elimination, without rounding."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        pivot = next(j for j in range(i, len(rows)) if rows[j][i] != 0)
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in range(len(rows)):
            if j != i and rows[j][i] != 0:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    return [row[-1] for row in rows]


def dot(x: list[Fraction], y: list[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0))


class Exact:
    """min over theta' of sum_j (theta'_j - theta_j)^2 / (2 eta_j) + (lam / 2) sum_k a_k (u_k . theta' - b_k)^2."""

    def __init__(self, history: ck.LowRankHistory, before: list[Fraction], lam: float, rates: list[Fraction]) -> None:
        directions = torch.stack([torch.cat([x.flatten() for x in term.values()]) for term in history.directions()])
        self.u, self.a = exact(directions.double()), exact(history.curvatures)
        self.b, self.before, self.lam, self.rates = exact(history.anchor_projections), before, Fraction(lam), rates

    def objective(self, theta: list[Fraction]) -> Fraction:
        moved = sum(
            ((x - y) ** 2 / (2 * r) for x, y, r in zip(theta, self.before, self.rates, strict=True)), Fraction(0)
        )
        drifts = [dot(u, theta) - b for u, b in zip(self.u, self.b, strict=True)]
        return moved + self.lam / 2 * sum(a * d * d for a, d in zip(self.a, drifts, strict=True))

    def minimiser(self) -> list[Fraction]:
        """theta - diag(eta) U^T z with (diag(1 / (lam a)) + U diag(eta) U^T) z = U theta - b."""
        scaled = [[x * r for x, r in zip(u, self.rates, strict=True)] for u in self.u]
        matrix = [
            [dot(row, u) + (1 / (self.lam * a) if i == j else 0) for j, u in enumerate(self.u)]
            for i, (row, a) in enumerate(zip(scaled, self.a, strict=True))
        ]
        z = solve(matrix, [dot(u, self.before) - b for u, b in zip(self.u, self.b, strict=True)])
        return [x - sum(zk * row[j] for zk, row in zip(z, scaled, strict=True)) for j, x in enumerate(self.before)]


KINDS = pytest.mark.parametrize("kind", ["random", "1e-2", "1e-4", "identical"])
TERMS = pytest.mark.parametrize("num_terms", [1, 3, 10])


def groups(model: nn.Module, rates: tuple[float, float]) -> tuple[list[dict], list[Fraction]]:
    split: list[list[Tensor]] = [[], []]
    rate_by_element: list[Fraction] = []
    for name, p in model.named_parameters():
        split[SPLIT[name]].append(p)
        rate_by_element += [Fraction(rates[SPLIT[name]])] * p.numel()
    return [{"params": members, "lr": rate} for members, rate in zip(split, rates, strict=True)], rate_by_element


@TERMS
@KINDS
@pytest.mark.parametrize("rates", [(1e-4, 1e-4), (0.1, 0.1), (10.0, 10.0), (1e-3, 0.5)])
def test_objective_is_that_of_the_exact_minimiser(num_terms, kind, rates):
    for lam in (1e-3, 1.0, 1e3, 1e6):
        model = Net(0)
        history = low_rank_history(model, num_terms, kind, 1)
        param_groups, rate_by_element = groups(model, rates)
        problem = Exact(history, flat(model), lam, rate_by_element)
        history.decoupled_step_(lam, rates[0] if rates[0] == rates[1] else param_groups)
        lowest = problem.objective(problem.minimiser())
        assert lowest <= problem.objective(problem.before)
        assert abs(problem.objective(flat(model)) - lowest) <= Fraction(1e-9) * lowest


@TERMS
@KINDS
@pytest.mark.parametrize("lam", [1e30, float("inf")])
def test_huge_lam_reaches_the_minimum_norm_point(num_terms, kind, lam):
    """The nearest of the points that minimise sum_k a_k (u_k . theta - b_k)^2, which all have the same projections."""
    model = Net(0)
    history = low_rank_history(model, num_terms, kind, 1)
    before = torch.tensor([float(x) for x in flat(model)], dtype=torch.float64)
    u = torch.stack([torch.cat([x.flatten() for x in term.values()]) for term in history.directions()])
    history.decoupled_step_(lam, 0.1)
    after = torch.tensor([float(x) for x in flat(model)], dtype=torch.float64)
    assert bool(torch.isfinite(after).all())
    roots = history.curvatures.sqrt()
    # Lowest: the weighted residual is orthogonal to all that a move could change.
    residual = roots * (u @ after - history.anchor_projections)
    weighted = roots[:, None] * u
    assert float((weighted.T @ residual).norm()) <= 1e-9 * float(weighted.norm() * (roots * (u @ before)).norm())
    # Nearest: the move lies in the span of the directions.
    move = after - before
    basis = torch.linalg.svd(u, full_matrices=False)
    basis = basis.Vh[: int(torch.linalg.matrix_rank(u, rtol=1e-9))]
    assert float((move - basis.T @ (basis @ move)).norm()) <= 1e-9 * float(move.norm())


@TERMS
def test_lam_0_leaves_everything_alone(num_terms):
    model = Net(0)
    history = low_rank_history(model, num_terms, "random", 1)
    before = flat(model)
    history.decoupled_step_(0.0, 0.1)
    assert flat(model) == before


@pytest.mark.parametrize("lam", [0.0, 1e-3, 1.0, 1e6, 1e30, float("inf")])
def test_steps_never_push_two_models_apart(lam):
    """Non-expansive at every lam: what makes the step stable."""
    for kind in ("random", "1e-4", "identical"):
        models = [Net(0), Net(5)]
        points = []
        for moved in (False, True):
            for model in models if moved else ():
                low_rank_history(model, 10, kind, 1).decoupled_step_(lam, 0.5)
            points.append([torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models])
        before, after = ((x - y).norm() for x, y in points)
        assert float(after) <= float(before) * (1 + 1e-9)


@pytest.mark.parametrize("lam", [0.5, 30.0, 1e30, float("inf")])
@pytest.mark.parametrize("rates", [(0.1, 0.1), (1e-3, 0.5)])
def test_diagonal_step_is_the_exact_minimiser_of_each_coordinate(lam, rates):
    model = Net(0)
    generator = torch.Generator().manual_seed(2)
    fisher, anchor = torch.randn(2, 18, generator=generator, dtype=torch.float64)
    fisher = torch.where(fisher.abs() < 0.3, 0.0, fisher.square())
    history = ck.DiagonalHistory(model)
    history.append(ck.DiagonalFisher(named(fisher), named(anchor)))
    before = flat(model)
    param_groups, rate_by_element = groups(model, rates)
    history.decoupled_step_(lam, param_groups)
    for x, was, f, m, rate in zip(flat(model), before, exact(fisher), exact(anchor), rate_by_element, strict=True):
        weight = Fraction(f != 0) if lam == float("inf") else rate * Fraction(lam) * f / (1 + rate * Fraction(lam) * f)
        assert abs(x - (was - weight * (was - m))) <= Fraction(1e-15) * (abs(was) + abs(m))
