"""Options of histories: slopes, decay, a limit on terms; and parameters in one buffer."""

import copy

import pytest
import torch
from torch import Tensor, nn

import crl_kernels as ck


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.LayerNorm(4)).double()


def random_named(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for n, p in model.named_parameters()
    }


def fisher_of(model: nn.Module, seed: int, terms: int = 1, slopes: Tensor | None = None) -> ck.LowRankFisher:
    rows = [random_named(model, 10 * seed + k) for k in range(terms)]
    directions = {name: torch.stack([row[name] for row in rows]) / 7 for name in rows[0]}
    return ck.LowRankFisher(
        directions, torch.arange(1.0, terms + 1) + seed, random_named(model, 900 + seed), slopes=slopes
    )


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def value_and_gradient(history, model: nn.Module, lam: float = 2.0) -> tuple[Tensor, Tensor]:
    params = list(model.parameters())
    value = history.penalty(lam)
    return value.detach(), flat(torch.autograd.grad(value, params))


# Slopes


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
    model = network()
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
    torch.testing.assert_close(gradient, flat(torch.autograd.grad(expected, params)), rtol=1e-9, atol=1e-12)

    before = flat(params)
    history.decoupled_step_(2.0, 0.3)  # the gradient of distance^2 / (2 lr) + expansion is zero there
    residual = (flat(params) - before) / 0.3 + flat(torch.autograd.grad(expansion(model, fishers, 2.0), params))
    assert float(residual.norm()) <= 1e-9 * float((flat(params) - before).norm() / 0.3)


def test_slopes_are_left_out_unless_asked_for():
    model = network()
    plain, with_slopes = ck.LowRankHistory(model), ck.LowRankHistory(model)
    plain.append(fisher_of(model, 1))
    with_slopes.append(fisher_of(model, 1, slopes=torch.tensor([3.0])))
    assert torch.equal(plain.penalty(1.0), with_slopes.penalty(1.0))


def test_mean_gradients_and_estimates_have_slopes(tmp_path):
    model = network()
    mu = random_named(model, 3)
    fisher = ck.LowRankFisher.from_mean_gradient(mu, 2.0, random_named(model, 4), storage_dtype=torch.bfloat16)
    stored = flat(fisher.layout.split(fisher.directions[0].double()).values())
    torch.testing.assert_close(fisher.slopes[0], flat(mu.values()) @ stored, rtol=1e-12, atol=0)
    fisher.save(tmp_path / "fisher.safetensors")
    assert torch.equal(ck.load_fisher(tmp_path / "fisher.safetensors").slopes, fisher.slopes)

    data = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def per_sample_loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - 3).square().mean(dim=1)

    estimate = ck.estimate_fisher(model, per_sample_loss, list(data.split(8)), rank=2)
    held_out = torch.autograd.grad(per_sample_loss(model, data[32:]).mean(), list(model.parameters()))
    torch.testing.assert_close(estimate.slopes, estimate.directions.double() @ flat(held_out), rtol=1e-9, atol=1e-12)


def test_slopes_that_do_not_fit_are_refused():
    model = network()
    history = ck.LowRankHistory(model, first_order=True)
    with pytest.raises(ValueError, match=r"fisher has no slopes, which first_order=True needs"):
        history.append(fisher_of(model, 1))
    with pytest.raises(ValueError, match=r"slopes has shape \(2,\); expected \(1,\)"):
        fisher_of(model, 1, slopes=torch.ones(2))
    with pytest.raises(ValueError, match=r"slopes is \[nan\]; expected finite values"):
        fisher_of(model, 1, slopes=torch.tensor([float("nan")]))
    flat_fisher = ck.LowRankFisher(
        {n: x[None] for n, x in random_named(model, 1).items()},
        torch.zeros(1),
        random_named(model, 2),
        slopes=torch.ones(1),
    )
    with pytest.raises(ValueError, match="a slope along a direction of curvature 0"):
        history.append(flat_fisher)
    assert len(history) == 0


# Decay


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_decay_weighs_each_task_by_its_age(kind, tmp_path):
    model = network()
    history_type = ck.LowRankHistory if kind == "low_rank" else ck.DiagonalHistory
    history, each = history_type(model, decay=0.8), []
    for seed in range(4):
        fisher = fisher_of(model, seed)
        if kind == "diagonal":
            diagonal = {n: g**2 for n, g in random_named(model, seed).items()}
            fisher = ck.DiagonalFisher(diagonal, random_named(model, 50 + seed))
        history.append(fisher)
        each.append(history_type(model))
        each[-1].append(fisher)
    found = value_and_gradient(history, model)
    for i in range(2):
        expected = sum(0.8 ** (3 - t) * value_and_gradient(one, model)[i] for t, one in enumerate(each))
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-12)
    history.save(tmp_path / "h.safetensors")
    loaded = history_type.load(tmp_path / "h.safetensors", model)
    for one in (history, loaded):
        one.append(fisher)
    torch.testing.assert_close(loaded.penalty(1.0), history.penalty(1.0), rtol=0, atol=0)


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.5, float("nan"), "half"])
def test_decay_out_of_range_is_refused(decay):
    for history_type in (ck.LowRankHistory, ck.DiagonalHistory):
        with pytest.raises(ValueError, match=r"decay is .*; expected 0 < decay <= 1"):
            history_type(network(), decay=decay)


# A limit on terms


def test_terms_up_to_the_limit_are_kept_as_they_are():
    model = network()
    free, limited = ck.LowRankHistory(model), ck.LowRankHistory(model, max_terms=3)
    for seed in range(3):
        free.append(fisher_of(model, seed))
        limited.append(fisher_of(model, seed))
    assert torch.equal(free.penalty(1.0), limited.penalty(1.0))
    limited.append(fisher_of(model, 3))
    assert len(limited) == 3


@pytest.mark.parametrize("storage_dtype", [torch.float64, torch.float32])
def test_merged_terms_are_the_best_low_rank_approximation(storage_dtype):
    """The matrix sum a u u^T is cut as its eigenvalues say; the gradient is the full one, projected on what is kept."""
    model = network()
    free, limited = ck.LowRankHistory(model), ck.LowRankHistory(model, max_terms=2)
    for history in (free, limited):
        fisher = fisher_of(model, 5, terms=5)
        fisher.directions = fisher.directions.to(storage_dtype)
        history.append(fisher)
    assert limited.directions()[0]["0.weight"].dtype == storage_dtype

    def matrix(history: ck.LowRankHistory) -> Tensor:
        u = torch.stack([flat(term.values()).double() for term in history.directions()])
        return u.T @ (history.curvatures[:, None] * u)

    tolerance = 1e-9 if storage_dtype == torch.float64 else 1e-5
    full = matrix(free)
    values, vectors = torch.linalg.eigh(full)
    kept = vectors[:, -2:]
    best = kept @ torch.diag(values[-2:]) @ kept.T
    assert float((matrix(limited) - best).norm()) <= tolerance * float(best.norm())
    (_, whole), (_, gradient) = value_and_gradient(free, model), value_and_gradient(limited, model)
    expected = kept @ (kept.T @ whole)
    assert float((gradient - expected).norm()) <= tolerance * float(expected.norm())


def test_terms_that_span_less_than_the_limit_merge_without_loss():
    """Tasks along one direction: one term holds all of them, up to a constant."""
    model = network()
    u = {n: x[None] / 7 for n, x in random_named(model, 1).items()}
    free, limited = ck.LowRankHistory(model), ck.LowRankHistory(model, max_terms=1)
    for seed in range(3):
        for history in (free, limited):
            history.append(ck.LowRankFisher(u, torch.tensor([1.0 + seed]), random_named(model, 60 + seed)))
    assert (len(free), len(limited)) == (3, 1)
    constants = []
    for seed in range(3):
        with torch.no_grad():
            for p, new in zip(model.parameters(), random_named(model, 70 + seed).values(), strict=True):
                p.copy_(new)
        (value, gradient), (merged, merged_gradient) = (value_and_gradient(h, model) for h in (free, limited))
        torch.testing.assert_close(merged_gradient, gradient, rtol=1e-9, atol=1e-12)
        constants.append(value - merged)
    torch.testing.assert_close(constants[0], constants[1])
    torch.testing.assert_close(constants[0], constants[2])


@pytest.mark.parametrize("max_terms", [0, -1, 1.5, "2"])
def test_max_terms_out_of_range_is_refused(max_terms):
    with pytest.raises(ValueError, match=r"max_terms is .*; expected an integer >= 1, or None"):
        ck.LowRankHistory(network(), max_terms=max_terms)


def test_options_are_saved(tmp_path):
    model = network()
    history = ck.LowRankHistory(model, exclude=("3",), first_order=True, decay=0.5, max_terms=7)
    history.save(tmp_path / "h.safetensors")
    loaded = ck.LowRankHistory.load(tmp_path / "h.safetensors", model)
    assert loaded._options() == history._options()


# Parameters in one buffer


def histories(model: nn.Module) -> list[ck.LowRankHistory | ck.DiagonalHistory]:
    low_rank, diagonal = ck.LowRankHistory(model), ck.DiagonalHistory(model)
    for seed in range(2):
        low_rank.append(fisher_of(model, seed))
        squares = {n: g**2 for n, g in random_named(model, seed).items()}
        diagonal.append(ck.DiagonalFisher(squares, random_named(model, 50 + seed)))
    return [low_rank, diagonal]


def steps(model: nn.Module, zero_to_none: bool) -> Tensor:
    """A few steps of everything that writes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    low_rank, diagonal = histories(model)
    for step in range(4):
        optimizer.zero_grad(set_to_none=zero_to_none)
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x.to(next(model.parameters()))).square().mean().backward()
        values = [history.add_penalty_grad_(0.1) for history in (low_rank, diagonal)]
        optimizer.step()
        for history in (low_rank, diagonal):
            history.decoupled_step_(0.1, 0.1)
    return torch.cat([flat(model.parameters()), torch.stack(values), low_rank.drift()])


@pytest.mark.parametrize("zero_to_none", [False, True])
def test_one_buffer_gives_the_same_numbers_bit_for_bit(zero_to_none):
    plain, flattened = network(), network()
    theta, gradient = ck.flatten_parameters(flattened)
    assert torch.equal(flat(flattened.parameters()), theta)
    assert torch.equal(steps(plain, zero_to_none), steps(flattened, zero_to_none))
    assert torch.equal(flat(flattened.parameters()), theta)  # still views
    assert torch.equal(flat(p.grad for p in flattened.parameters()), gradient) == (not zero_to_none)


def test_one_buffer_is_what_kernels_get():
    model = network()
    history = histories(model)[0]
    assert len(history._run_or_list(list(model.parameters()))) == len(list(model.parameters()))
    theta, _ = ck.flatten_parameters(model)
    (run,) = history._run_or_list(list(model.parameters()))
    assert run.data_ptr() == theta.data_ptr()
    assert run.shape == theta.shape


def test_state_dicts_and_optimizers_work_on_one_buffer():
    model, other = network(), network(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    theta, gradient = ck.flatten_parameters(model)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    model.load_state_dict(other.state_dict())
    assert torch.equal(theta, flat(other.parameters()))
    assert list(model.state_dict()) == list(other.state_dict())
    for net in (model, other):
        net(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(gradient, flat(p.grad for p in other.parameters()))
    before = theta.clone()
    optimizer.step()
    assert not torch.equal(theta, before)


@pytest.mark.parametrize(
    "leave",
    [
        lambda model: model.half(),
        lambda model: setattr(model[0].weight, "data", model[0].weight.data.clone()),
        lambda model: setattr(model[3].bias, "data", torch.zeros(4, dtype=torch.float64)),
        lambda model: setattr(model[2].weight, "data", model[2].weight.data.t().contiguous().t()),
        copy.deepcopy,
    ],
    ids=["half", "first", "last", "other strides", "deepcopy"],
)
def test_views_that_were_broken_are_noticed(leave):
    model = network()
    ck.flatten_parameters(model)
    model = leave(model) or model
    low_rank, _ = histories(model)
    plain = network()
    plain.load_state_dict(model.state_dict())
    plain.to(next(model.parameters()).dtype)
    assert len(low_rank._run_or_list(list(model.parameters()))) > 1
    tolerance = (
        {"rtol": 1e-2, "atol": 1e-3} if next(model.parameters()).dtype == torch.half else {"rtol": 1e-12, "atol": 0}
    )
    torch.testing.assert_close(low_rank.penalty(1.0), histories(plain)[0].penalty(1.0), **tolerance)


def test_a_square_view_that_was_transposed_is_not_read_in_the_old_order():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    history = ck.LowRankHistory(model)
    history.append(
        ck.LowRankFisher({n: x[None] for n, x in random_named(model, 1).items()}, torch.ones(1), random_named(model, 2))
    )
    ck.flatten_parameters(model)
    history.add_penalty_grad_(1.0)  # the run is known now
    model[0].weight.data = model[0].weight.data.t()
    value, _ = value_and_gradient(history, model, 1.0)
    torch.testing.assert_close(history.add_penalty_grad_(1.0), value, rtol=1e-12, atol=0)


def test_empty_and_shared_parameters_in_one_buffer():
    model = network()
    model.nothing = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
    model.again = model[0]
    theta, _ = ck.flatten_parameters(model)
    assert len(theta) == sum(p.numel() for p in model.parameters())
    assert model.again.weight is model[0].weight
    history = ck.LowRankHistory(model)
    history.append(
        ck.LowRankFisher({n: x[None] for n, x in random_named(model, 1).items()}, torch.ones(1), random_named(model, 2))
    )
    assert len(history._run_or_list(list(model.parameters()))) == 1
    value, gradient = value_and_gradient(history, model, 1.0)
    torch.testing.assert_close(history.add_penalty_grad_(1.0), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(flat(p.grad for p in model.parameters()), gradient, rtol=1e-12, atol=0)


def test_in_place_steps_on_one_buffer_bump_versions():
    model = network()
    ck.flatten_parameters(model)
    weight = model[2].weight
    for history in histories(model):
        for touch, tensor in (
            (lambda h: h.add_penalty_grad_(1.0), weight.grad),
            (lambda h: h.decoupled_step_(1.0, 0.1), weight),
        ):
            before = tensor._version
            touch(history)
            assert tensor._version > before


def test_models_that_cannot_be_flattened_are_refused():
    with pytest.raises(TypeError, match=r"model is a Tensor; expected a torch.nn.Module"):
        ck.flatten_parameters(torch.ones(3))
    with pytest.raises(ValueError, match="model has no parameter that requires a gradient"):
        ck.flatten_parameters(network().requires_grad_(False))
    mixed = network()
    mixed[0].half()
    with pytest.raises(ValueError, match=r"parameters of torch.float16 on cpu, torch.float64 on cpu; one buffer holds"):
        ck.flatten_parameters(mixed)
    sparse = nn.Embedding(4, 3, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="the gradient of 'weight' is sparse"):
        ck.flatten_parameters(sparse)
