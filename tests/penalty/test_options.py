"""Options of histories: slopes, decay, a limit on the number of terms."""

import pytest
import torch
from helpers.histories import fisher_of, flatten, small_network, value_and_gradient
from helpers.past_tasks import HISTORIES, KINDS, random_like, trainable
from torch import Tensor, nn

import crl_kernels as ck


def expansion(model: nn.Module, fishers: list[ck.LowRankFisher], lam: float) -> Tensor:
    """lam sum_k (s_k x_k + a_k x_k^2 / 2), x_k = u_k . (theta - theta*), written out."""
    total = torch.zeros((), dtype=torch.float64)
    for fisher in fishers:
        for k, (a, b, s) in enumerate(zip(fisher.curvatures, fisher.anchor_projections, fisher.slopes, strict=True)):
            u = fisher.layout.split(fisher.directions[k].double())
            x = sum((u[name] * p).sum() for name, p in model.named_parameters()) - b
            total = total + lam * (s * x + a * x * x / 2)
    return total


@pytest.mark.parametrize("terms", [1, 3])
def test_first_order_terms_equal_the_written_out_expansion(terms):
    model = small_network()
    params = list(model.parameters())
    fishers = [
        fisher_of(model, seed, terms, slopes=torch.linspace(-2, 3, terms, dtype=torch.float64) + seed)
        for seed in (1, 2)
    ]
    history = ck.LowRankHistory(model, first_order=True)
    for fisher in fishers:
        history.append(fisher)
    constant = sum(float((f.slopes**2 / (2 * f.curvatures)).sum()) for f in fishers)

    value, gradient = value_and_gradient(history, model, 2.0)
    expected = expansion(model, fishers, 2.0)
    torch.testing.assert_close(value, expected.detach() + 2.0 * constant, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, flatten(torch.autograd.grad(expected, params)), rtol=1e-9, atol=1e-12)

    before = flatten(params)
    history.decoupled_step_(2.0, 0.3)  # the gradient of distance^2 / (2 lr) + expansion is zero there
    residual = (flatten(params) - before) / 0.3 + flatten(torch.autograd.grad(expansion(model, fishers, 2.0), params))
    assert float(residual.norm()) <= 1e-9 * float((flatten(params) - before).norm() / 0.3)


def test_slopes_are_left_out_unless_asked_for():
    model = small_network()
    plain, with_slopes = ck.LowRankHistory(model), ck.LowRankHistory(model)
    plain.append(fisher_of(model, 1))
    with_slopes.append(fisher_of(model, 1, slopes=torch.tensor([3.0])))
    assert torch.equal(plain.penalty(1.0), with_slopes.penalty(1.0))


def test_mean_gradients_and_estimates_have_slopes(tmp_path):
    model = small_network()
    mu, anchor = (random_like(trainable(model), seed) for seed in (3, 4))
    fisher = ck.LowRankFisher.from_mean_gradient(mu, 2.0, anchor, storage_dtype=torch.bfloat16)
    stored = flatten(fisher.layout.split(fisher.directions[0].double()).values())
    torch.testing.assert_close(fisher.slopes[0], flatten(mu.values()) @ stored, rtol=1e-12, atol=0)
    fisher.save(tmp_path / "fisher.safetensors")
    assert torch.equal(ck.load_fisher(tmp_path / "fisher.safetensors").slopes, fisher.slopes)

    data = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def per_sample_loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - 3).square().mean(dim=1)

    estimate = ck.estimate_fisher(model, per_sample_loss, list(data.split(8)), rank=2)
    held_out = torch.autograd.grad(per_sample_loss(model, data[32:]).mean(), list(model.parameters()))
    torch.testing.assert_close(estimate.slopes, estimate.directions.double() @ flatten(held_out), rtol=1e-9, atol=1e-12)


def test_slopes_that_do_not_fit_are_refused():
    model = small_network()
    history = ck.LowRankHistory(model, first_order=True)
    with pytest.raises(ValueError, match=r"fisher has no slopes, which first_order=True needs"):
        history.append(fisher_of(model, 1))
    with pytest.raises(ValueError, match=r"slopes has shape \(2,\); expected \(1,\)"):
        fisher_of(model, 1, slopes=torch.ones(2))
    with pytest.raises(ValueError, match=r"slopes is \[nan\]; expected finite values"):
        fisher_of(model, 1, slopes=torch.tensor([float("nan")]))
    flat_fisher = ck.LowRankFisher(
        {n: x[None] for n, x in random_like(trainable(model), 1).items()},
        torch.zeros(1),
        random_like(trainable(model), 2),
        slopes=torch.ones(1),
    )
    with pytest.raises(ValueError, match="a slope along a direction of curvature 0"):
        history.append(flat_fisher)
    assert len(history) == 0


@KINDS
def test_decay_weighs_each_task_by_its_age(kind, tmp_path):
    model = small_network()
    history, single_tasks = HISTORIES[kind](model, decay=0.8), []
    for seed in range(4):
        fisher = fisher_of(model, seed)
        if kind == "diagonal":
            diagonal = {n: g**2 for n, g in random_like(trainable(model), seed).items()}
            fisher = ck.DiagonalFisher(diagonal, random_like(trainable(model), 50 + seed))
        history.append(fisher)
        single_tasks.append(HISTORIES[kind](model))
        single_tasks[-1].append(fisher)
    actual = value_and_gradient(history, model)
    for i in range(2):
        expected = sum(0.8 ** (3 - t) * value_and_gradient(task, model)[i] for t, task in enumerate(single_tasks))
        torch.testing.assert_close(actual[i], expected, rtol=1e-9, atol=1e-12)
    history.save(tmp_path / "h.safetensors")
    loaded = HISTORIES[kind].load(tmp_path / "h.safetensors", model)
    history.append(fisher)
    loaded.append(fisher)
    torch.testing.assert_close(loaded.penalty(1.0), history.penalty(1.0), rtol=0, atol=0)


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.5, float("nan"), "half"])
def test_decay_out_of_range_is_refused(decay):
    for history_type in HISTORIES.values():
        with pytest.raises(ValueError, match=r"decay is .*; expected 0 < decay <= 1"):
            history_type(small_network(), decay=decay)


def test_terms_up_to_the_limit_are_kept_as_they_are():
    model = small_network()
    free, limited = ck.LowRankHistory(model), ck.LowRankHistory(model, max_terms=3)
    for seed in range(3):
        free.append(fisher_of(model, seed))
        limited.append(fisher_of(model, seed))
    assert torch.equal(free.penalty(1.0), limited.penalty(1.0))
    limited.append(fisher_of(model, 3))
    assert len(limited) == 3


@pytest.mark.parametrize("storage_dtype", [torch.float64, torch.float32, torch.int8])
def test_merged_terms_are_the_best_low_rank_approximation(storage_dtype):
    """The matrix sum a u u^T is cut as its eigenvalues say; the gradient is the full one, projected on what is kept."""
    model = small_network()
    free, limited = ck.LowRankHistory(model), ck.LowRankHistory(model, max_terms=2)
    for history in (free, limited):
        history.append(fisher_of(model, 5, terms=5, storage_dtype=storage_dtype))
    assert limited.state_dict()["directions.0.0.weight"].dtype == storage_dtype

    def matrix(history: ck.LowRankHistory) -> Tensor:
        u = torch.stack([flatten(term.values()).double() for term in history.directions()])
        return u.T @ (history.curvatures[:, None] * u)

    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.int8: 1e-2}[storage_dtype]
    full = matrix(free)
    values, vectors = torch.linalg.eigh(full)
    kept = vectors[:, -2:]
    best = kept @ torch.diag(values[-2:]) @ kept.T
    assert float((matrix(limited) - best).norm()) <= tolerance * float(best.norm())
    (_, full_gradient), (_, gradient) = value_and_gradient(free, model), value_and_gradient(limited, model)
    expected = kept @ (kept.T @ full_gradient)
    assert float((gradient - expected).norm()) <= tolerance * float(expected.norm())


def test_terms_that_span_less_than_the_limit_merge_without_loss():
    """Tasks along one direction: one term holds all of them, up to a constant."""
    model = small_network()
    u = {n: x[None] / 7 for n, x in random_like(trainable(model), 1).items()}
    free, limited = ck.LowRankHistory(model), ck.LowRankHistory(model, max_terms=1)
    for seed in range(3):
        for history in (free, limited):
            history.append(ck.LowRankFisher(u, torch.tensor([1.0 + seed]), random_like(trainable(model), 60 + seed)))
    assert (len(free), len(limited)) == (3, 1)
    constants = []
    for seed in range(3):
        with torch.no_grad():
            for p, new in zip(model.parameters(), random_like(trainable(model), 70 + seed).values(), strict=True):
                p.copy_(new)
        (value, gradient), (merged, merged_gradient) = (value_and_gradient(h, model) for h in (free, limited))
        torch.testing.assert_close(merged_gradient, gradient, rtol=1e-9, atol=1e-12)
        constants.append(value - merged)
    torch.testing.assert_close(constants[0], constants[1])
    torch.testing.assert_close(constants[0], constants[2])


def test_every_merge_rounds_directions_again():
    """The stream has 4 directions, so merging to 6 terms loses nothing but by rounding."""
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    spanning = torch.randn(4, 32, 64)
    exact = ck.LowRankHistory(model)
    histories = {
        (dtype, limit): ck.LowRankHistory(model, max_terms=limit)
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
        for limit in (None, 6)
    }
    for _ in range(40):
        u = {"weight": (torch.randn(4, 1, 1) * spanning).sum(0)[None] / 64, "bias": torch.zeros(1, 32)}
        anchor = random_like(trainable(model), 1)
        exact.append(ck.LowRankFisher(u, torch.ones(1), anchor, storage_dtype=torch.float64))
        for (dtype, _), history in histories.items():
            history.append(ck.LowRankFisher(u, torch.ones(1), anchor, storage_dtype=dtype))
        with torch.no_grad():
            model.weight.add_(torch.randn(32, 64) / 50)
    _, expected = value_and_gradient(exact, model, 1.0)
    errors = {
        key: float((value_and_gradient(history, model, 1.0)[1] - expected).norm() / expected.norm())
        for key, history in histories.items()
    }
    assert errors[torch.float32, 6] < 1e-6
    for dtype in (torch.bfloat16, torch.int8):
        assert errors[dtype, 6] > 2 * errors[dtype, None] > 100 * errors[torch.float32, 6], errors
    assert errors[torch.int8, 6] < 0.1


@pytest.mark.parametrize("max_terms", [0, -1, 1.5, "2"])
def test_max_terms_out_of_range_is_refused(max_terms):
    with pytest.raises(ValueError, match=r"max_terms is .*; expected an integer >= 1, or None"):
        ck.LowRankHistory(small_network(), max_terms=max_terms)


def test_options_are_saved(tmp_path):
    model = small_network()
    history = ck.LowRankHistory(model, exclude=("3",), first_order=True, decay=0.5, max_terms=7)
    history.save(tmp_path / "h.safetensors")
    loaded = ck.LowRankHistory.load(tmp_path / "h.safetensors", model)
    assert loaded._options() == history._options()
