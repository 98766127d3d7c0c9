"""Peers as oracles of the Fisher: nngeometry's Fisher and curvlinops's empirical Fisher, of the same losses.

The Fisher's trace, norm, spectrum, diagonal, curvatures and top directions are held to both peers
(``pip install crl-kernels[peers]``).

Left out, with the reason:

- nngeometry: KFAC, EKFAC and its own layers (Cosine1d, WeightNorm1d, Affine1d: layers of that library, approximations).
- curvlinops: Hessian, GGN, KFAC, inverses and traces by sampling (other matrices, or estimates).
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.by_loop import assert_close
from helpers.peers import lines, peer
from torch import Tensor, nn

from crl_kernels import SampleGradients, diagnose, estimate_fisher

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore"),  # of slow ways to a gradient, small batches, and the peers' own
]
TOLERANCE = 1e-9
SAMPLES = 48


def classifier(kind: str) -> tuple[nn.Module, Tensor]:
    if kind == "linear":
        return lines(6, 4, 3, between=nn.Tanh), torch.randn(SAMPLES, 6)
    if kind == "convolutions":
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
        )
        return model, torch.randn(SAMPLES, 2, 5, 5)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
    return model, torch.randn(SAMPLES, 2, 5, 5)


@pytest.fixture(params=["linear", "convolutions", "group norm"])
def task(request) -> tuple[nn.Module, Tensor, Tensor]:
    """A classifier and its samples, in as many classes as tokens."""
    model, x = classifier(request.param)
    return model, x, torch.randint(3, (SAMPLES,))


def cross_entropies(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def empirical_fisher(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """curvlinops's, (P, P)"""
    operator = peer("curvlinops").EFLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)])
    return operator @ torch.eye(operator.shape[1])


def nngeometry_fisher(model: nn.Module, x: Tensor, y: Tensor, kind: str) -> Tensor:
    """Of the losses themselves in place of the logits: PMatDense (P, P), or PMatDiag (P,)"""
    pspace, backend = peer("nngeometry.object.pspace"), peer("nngeometry.backend")
    collection = peer("nngeometry.layercollection").LayerCollection.from_model(model)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=12)
    generator = backend.TorchHooksJacobianBackend(
        layer_collection=collection, model=model, function=lambda *d: cross_entropies(model, d)[:, None]
    )
    matrix = getattr(pspace, kind)(generator=generator, examples=loader)
    return matrix.to_torch() if kind == "PMatDense" else matrix.get_diag()


def both_fishers(task: tuple[nn.Module, Tensor, Tensor]) -> list[Tensor]:
    return [empirical_fisher(*task), nngeometry_fisher(*task, "PMatDense")]


def test_fisher_of_peers_agrees_with_gram(task):
    """F and G / N have the same eigenvalues, trace and Frobenius norm."""
    model, x, y = task
    with SampleGradients(model, gram=True) as sg:
        cross_entropies(model, (x, y)).sum().backward()
    eigenvalues = torch.linalg.eigvalsh(sg.gram / SAMPLES).flip(0)[:8]
    for fisher in both_fishers(task):
        assert_close(sg.sq_norms.mean(), fisher.trace(), TOLERANCE, "trace")
        assert_close((sg.gram / SAMPLES).norm(), fisher.norm(), TOLERANCE, "Frobenius norm")
        assert_close(eigenvalues, torch.linalg.eigvalsh(fisher).flip(0)[:8], TOLERANCE, "eigenvalues")


def test_diagonal_of_peers(task):
    model, x, y = task
    ours = estimate_fisher(model, cross_entropies, [(x[:30], y[:30]), (x[30:], y[30:])], kind="diagonal")
    for theirs in (empirical_fisher(*task).diagonal(), nngeometry_fisher(*task, "PMatDiag")):
        assert_close(ours.fisher_diagonal, theirs, TOLERANCE, "diagonal")
        assert ours.statistics.trace == pytest.approx(float(theirs.sum()), rel=TOLERANCE)


def test_curvature_and_rho_of_peers(task):
    """u^T F u and its share of the trace, over the half that did not choose u."""
    model, x, y = task
    first, second = (x[:24], y[:24]), (x[24:], y[24:])
    ours = estimate_fisher(model, cross_entropies, [first, second])
    u = ours.directions[0]
    for fisher in both_fishers((model, *second)):
        assert_close(ours.curvatures[0], u @ fisher @ u, TOLERANCE, "curvature")
        assert ours.statistics.rho == pytest.approx(float(u @ fisher @ u / fisher.trace()), rel=TOLERANCE)
        assert ours.statistics.trace == pytest.approx(float(fisher.trace()), rel=TOLERANCE)


def test_top_directions_of_peers(task):
    """Eigenvectors of F, of all samples."""
    model, x, y = task
    ours = estimate_fisher(model, cross_entropies, [(x, y)], rank=3, unbiased=False)
    for fisher in both_fishers(task):
        values, vectors = torch.linalg.eigh(fisher)
        assert_close(ours.curvatures, values.flip(0)[:3], TOLERANCE, "curvatures")
        assert_close((ours.directions @ vectors.flip(1)[:, :3]).abs(), torch.eye(3), 1e-6, "cosines")


def test_spectrum_of_peers(task):
    model, x, y = task
    diagnosis = diagnose(
        model, lambda m, batch, t: cross_entropies(m, batch), [(x, y)], [0], num_timesteps=1, samples=SAMPLES
    )
    for spectrum in (diagnosis.at[0], diagnosis.uniform):
        for fisher in both_fishers(task):
            values = torch.linalg.eigvalsh(fisher).flip(0)
            trace, top = float(fisher.trace()), float(values[0])
            assert spectrum.trace.value == pytest.approx(trace, rel=TOLERANCE)
            assert spectrum.lambda1_share.value == pytest.approx(top / trace, rel=TOLERANCE)
            assert spectrum.lambda2_over_lambda1.value == pytest.approx(float(values[1]) / top, rel=TOLERANCE)
            assert spectrum.stable_rank.value == pytest.approx(trace / top, rel=TOLERANCE)
            assert_close(torch.tensor(spectrum.eigenvalues[:8]), values[:8] / trace, TOLERANCE, "eigenvalues")


# curvlinops's own cases: a small network, batches of different sizes


@pytest.mark.parametrize(
    ("widths", "sizes", "loss"),
        [((10, 5, 2), (3, 4), nn.CrossEntropyLoss), ((8, 5, 3), (2, 6), nn.MSELoss),
        ((8, 5, 1), (2, 6), nn.BCEWithLogitsLoss)]
)  # fmt: skip
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cases_of_curvlinops(widths, sizes, loss, reduction):
    """Its means are over a sample's outputs too, and over all samples of all batches."""
    operators = peer("curvlinops")
    model = lines(*widths, between=nn.ReLU)
    outputs = 1 if loss is nn.CrossEntropyLoss else widths[-1]

    def target(n: int) -> Tensor:
        if loss is nn.CrossEntropyLoss:
            return torch.randint(widths[-1], (n,))
        return torch.randn(n, widths[-1]) if loss is nn.MSELoss else torch.randint(2, (n, 1)).double()

    data = [(torch.randn(n, widths[0]), target(n)) for n in sizes]
    operator = operators.EFLinearOperator(model, loss(reduction=reduction), list(model.parameters()), data)
    theirs = operator @ torch.eye(operator.shape[1])

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        sample_losses = loss(reduction="none")(model(batch[0]), batch[1]).reshape(len(batch[0]), -1).sum(1)
        return sample_losses / outputs**0.5 if reduction == "mean" else sample_losses

    ours = estimate_fisher(model, losses, data, kind="diagonal")
    count = 1 if reduction == "mean" else sum(sizes)
    assert_close(count * ours.fisher_diagonal, theirs.diagonal(), TOLERANCE, "diagonal")
