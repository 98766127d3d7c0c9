"""``tail="diagonal"``: directions that merging leaves out become one diagonal."""

import copy
import math
import pickle

import pytest
import torch
from helpers.histories import fisher_of, flatten, small_network, value_and_gradient
from helpers.past_tasks import MODES, random_like, task_loss, train, trainable
from torch import Tensor, nn

import crl_kernels as ck

LAM = 1.5
INFINITY = float("inf")


def move(model: nn.Module, seed: int) -> None:
    with torch.no_grad():
        for p, step in zip(model.parameters(), random_like(trainable(model), 500 + seed).values(), strict=True):
            p.add_(step, alpha=0.3)


def history_with_tail(model: nn.Module, tasks: int = 6, max_terms: int = 2, **options) -> ck.LowRankHistory:
    """Of a model that moves after every task."""
    history = ck.LowRankHistory(model, max_terms=max_terms, tail="diagonal", **options)
    for seed in range(tasks):
        history.append(fisher_of(model, seed))
        move(model, seed)
    return history


def matrix(history: ck.LowRankHistory) -> Tensor:
    """sum_k a_k u_k u_k^T."""
    u = torch.stack([flatten(term.values()).double() for term in history.directions()])
    return u.T @ (history.curvatures[:, None] * u)


def tail(history: ck.LowRankHistory) -> tuple[Tensor, Tensor, Tensor]:
    """(S, m, R), from the state by name."""
    state = history.state_dict()
    flat = [
        torch.cat([state[f"{part}.{n}"].flatten() for n in history.names]) for part in ("fisher_diagonal", "anchor")
    ]
    return (*flat, state["residual"])


class Dense:
    """The same form with full matrices, eigenvectors of P x P, and a list of diagonals in place of their sum."""

    def __init__(self, max_terms: int, decay: float, numel: int) -> None:
        self.max_terms, self.decay = max_terms, decay
        self.h = torch.zeros(numel, numel, dtype=torch.float64)
        self.pull = torch.zeros(numel, dtype=torch.float64)  # the kept part's gradient is h theta - pull
        self.left_out: list[tuple[Tensor, Tensor]] = []

    def append(self, fisher: ck.LowRankFisher, theta: Tensor) -> None:
        self.h, self.pull = self.decay * self.h, self.decay * self.pull
        self.left_out = [(self.decay * s, m) for s, m in self.left_out]
        for u, a, b in zip(fisher.directions.double(), fisher.curvatures, fisher.anchor_projections, strict=True):
            self.h, self.pull = self.h + a * torch.outer(u, u), self.pull + a * b * u
        values, vectors = torch.linalg.eigh(self.h)
        strongest = values.argsort(descending=True)
        for i in strongest[self.max_terms :]:
            if values[i] > 1e-9 * values.max():
                v = vectors[:, i]
                drift = v @ (self.h @ theta - self.pull) / values[i]
                self.left_out.append((values[i] * v.square(), theta - drift * v))
        kept = vectors[:, strongest[: self.max_terms]]
        onto = kept @ kept.T
        self.h, self.pull = onto @ self.h @ onto, onto @ self.pull

    def gradient(self, theta: Tensor) -> Tensor:
        return self.h @ theta - self.pull + sum(s * (theta - m) for s, m in self.left_out)

    def value(self, theta: Tensor) -> Tensor:
        gradient = self.h @ theta - self.pull
        kept = gradient @ torch.linalg.pinv(self.h, rtol=1e-9) @ gradient
        return (kept + sum((s * (theta - m).square()).sum() for s, m in self.left_out)) / 2


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("decay", [1.0, 0.6])
@pytest.mark.parametrize("first_order", [False, True])
def test_value_and_gradient_are_those_of_full_matrices(terms, decay, first_order):
    model = small_network()
    history = ck.LowRankHistory(model, max_terms=3, tail="diagonal", decay=decay, first_order=first_order)
    dense = Dense(3, decay, sum(p.numel() for p in model.parameters()))
    for seed in range(8):
        slopes = torch.linspace(-2, 1, terms, dtype=torch.float64)
        fisher = fisher_of(model, seed, terms, slopes=slopes)
        history.append(fisher)
        if first_order:
            fisher.anchor_projections = fisher.anchor_projections - slopes / fisher.curvatures
        dense.append(fisher, flatten(model.parameters()))
        for _ in range(2):  # where the task was appended, and after a move
            theta = flatten(model.parameters())
            value, gradient = value_and_gradient(history, model, 1.0)
            torch.testing.assert_close(gradient, dense.gradient(theta), rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(value, dense.value(theta), rtol=1e-9, atol=1e-12)
            move(model, seed)
    assert len(history) == 3
    assert len(dense.left_out) >= 5


@pytest.mark.parametrize("decay", [1.0, 0.6])
def test_the_diagonal_and_the_trace_of_the_second_derivative_are_kept(decay):
    """Whatever is merged, however often."""
    model = small_network()
    exact, bounded = ck.LowRankHistory(model, decay=decay), history_with_tail(model, 0, decay=decay)
    for seed in range(12):
        for history in (exact, bounded):
            history.append(fisher_of(model, seed, terms=1 + seed % 2))
        move(model, seed)
        diagonal = matrix(bounded).diagonal() + tail(bounded)[0]
        torch.testing.assert_close(diagonal, matrix(exact).diagonal(), rtol=1e-9, atol=1e-12)


def test_a_task_that_is_left_out_holds_the_point_where_it_was_zero():
    """Its anchor is the nearest point at which the term is zero, so its drift is kept."""
    model = small_network()
    history = ck.LowRankHistory(model, max_terms=1, tail="diagonal")
    u = {n: torch.zeros(2, *p.shape, dtype=torch.float64) for n, p in trainable(model).items()}
    u["0.weight"][0, 0, :2] = torch.tensor([0.6, 0.8])  # orthogonal: each direction is an eigenvector
    u["2.weight"][1, 1, 1] = 1.0
    history.append(ck.LowRankFisher(u, torch.tensor([2.0, 5.0]), random_like(trainable(model), 1)))
    curvature, anchor, residual = tail(history)
    weak, theta = flatten(x[0] for x in u.values()), flatten(model.parameters())
    torch.testing.assert_close(curvature, 2 * weak.square())
    drift = weak @ (theta - flatten(random_like(trainable(model), 1).values()))
    assert abs(drift) > 0.1
    torch.testing.assert_close((theta - anchor)[weak != 0], (drift * weak)[weak != 0])
    assert residual == 0


@pytest.mark.parametrize("max_terms", [3, 5])
def test_nothing_changes_while_there_are_no_more_terms_than_the_limit(max_terms):
    model = small_network()
    plain = ck.LowRankHistory(model)
    history = ck.LowRankHistory(model, max_terms=max_terms, tail="diagonal")
    for seed in range(3):
        for each in (plain, history):
            each.append(fisher_of(model, seed))
    assert not tail(history)[0].any()
    assert torch.equal(history.penalty(LAM), plain.penalty(LAM))
    assert history.suggest_lam(0.1, 10) == plain.suggest_lam(0.1, 10)
    gradients = []
    for each in (plain, history):
        model.zero_grad()
        each.add_penalty_grad_(LAM)
        gradients.append(flatten(p.grad for p in model.parameters()))
    assert torch.equal(*gradients)
    other = copy.deepcopy(model)
    plain.decoupled_step_(LAM, 0.1)
    moved = flatten(model.parameters())
    model.load_state_dict(other.state_dict())
    history.decoupled_step_(LAM, 0.1)
    assert torch.equal(flatten(model.parameters()), moved)


def test_the_state_has_one_size_from_the_first_task_on():
    model = small_network()
    numel, sizes = sum(p.numel() for p in model.parameters()), []
    history = history_with_tail(model, 0)
    for seed in range(50):
        history.append(fisher_of(model, seed))
        sizes.append(history.nbytes)
    assert sizes[0] == 8 * (numel + 2) + 8 * (2 * numel + 1)  # one direction with its scalars, S, m and R, in float64
    assert set(sizes[1:]) == {2 * 8 * (numel + 2) + 8 * (2 * numel + 1)}


# Strength


def test_suggested_lam_and_stiffness_are_those_of_the_sum_of_both_parts():
    model = small_network()
    for history in (history_with_tail(model), history_with_tail(model, decay=0.5, tasks=9)):
        curvature = tail(history)[0]
        h = matrix(history) + torch.diag(curvature)
        mean = float((h @ h).trace() / h.trace())
        assert history.suggest_lam(0.1, 10) == pytest.approx(math.log(2) / (0.1 * 10 * mean), rel=1e-9)
        bound = float(matrix(history).trace() + curvature.max())
        assert history.stiffness(LAM, 0.1) == pytest.approx(0.1 * LAM * bound, rel=1e-9)
        assert bound >= float(torch.linalg.eigvalsh(h)[-1])


# Ways to apply it


def gradients_of(model: nn.Module) -> Tensor:
    return flatten(p.grad for p in model.parameters())


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_added_gradient_is_that_of_the_penalty(flattened, dtype):
    model = small_network().to(dtype)
    history = history_with_tail(model)
    if flattened:
        ck.flatten_parameters(model)
    value = history.penalty(LAM)
    value.backward()
    by_autograd = gradients_of(model).double()
    model.zero_grad()
    with torch.no_grad():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    returned = history.add_penalty_grad_(LAM)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    assert float(returned) == pytest.approx(float(value), rel=max(rounding, 1e-12) if dtype != torch.bfloat16 else 1e-6)
    added = gradients_of(model).double() - 1
    assert float((added - by_autograd).norm()) <= rounding * float(1 + by_autograd.norm() + len(added) ** 0.5)
    assert tail(history)[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_second_derivatives_are_those_of_both_parts():
    model = small_network()
    history = history_with_tail(model)
    params = list(model.parameters())
    vector = list(random_like(trainable(model), 3).values())
    gradient = torch.autograd.grad(history.penalty(LAM), params, create_graph=True)
    product = flatten(torch.autograd.grad(gradient, params, vector))
    h = matrix(history) + torch.diag(tail(history)[0])
    torch.testing.assert_close(product, LAM * h @ flatten(vector), rtol=1e-9, atol=1e-12)


def test_compiled_code_has_both_parts():
    model = small_network()
    history = history_with_tail(model)
    compiled = torch.compile(lambda: history.penalty(LAM), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), history.penalty(LAM))
    gradient = flatten(torch.autograd.grad(compiled(), list(model.parameters())))
    torch.testing.assert_close(gradient, value_and_gradient(history, model, LAM)[1])


def proximal(theta: Tensor, rates: Tensor, lam: float, history: ck.LowRankHistory) -> Tensor:
    """The diagonal's step, then the directions', by solving linear equations."""
    curvature, anchor, _ = tail(history)
    theta = (theta + rates * lam * curvature * anchor) / (1 + rates * lam * curvature)
    u = torch.stack([flatten(term.values()) for term in history.directions()])
    pull = u.T @ (history.curvatures * history.anchor_projections)
    eye = torch.eye(len(theta), dtype=torch.float64)
    return torch.linalg.solve(eye + rates[:, None] * lam * matrix(history), theta + rates * lam * pull)


@pytest.mark.parametrize("lam", [0.0, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("split", [False, True])
def test_the_decoupled_step_is_the_diagonals_and_then_the_directions(lam, split):
    model = small_network()
    history = history_with_tail(model)
    rates = [0.1, 0.02 if split else 0.1]
    params = list(model.parameters())
    groups = [{"params": params[:2], "lr": rates[0]}, {"params": params[2:], "lr": rates[1]}]
    by_element = torch.cat([torch.full((p.numel(),), rates[i >= 2], dtype=torch.float64) for i, p in enumerate(params)])
    expected = proximal(flatten(params), by_element, lam, history)
    history.decoupled_step_(lam, groups if split else rates[0])
    torch.testing.assert_close(flatten(params), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lam", [1e-3, 1.0, 1e6, 1e30, INFINITY])
def test_decoupled_steps_never_push_two_models_apart(lam):
    models = [small_network(), small_network(5)]
    history = history_with_tail(models[0])
    other = ck.LowRankHistory(models[1], max_terms=2, tail="diagonal")
    other.load_state_dict(history.state_dict())
    before, after = [], []
    for model, each in zip(models, (history, other), strict=True):
        before.append(flatten(model.parameters()))
        each.decoupled_step_(lam, 0.5)
        after.append(flatten(model.parameters()))
    assert bool(torch.isfinite(after[0]).all())
    assert float((after[0] - after[1]).norm()) <= float((before[0] - before[1]).norm()) * (1 + 1e-9)
    if lam == INFINITY:  # the directions have the last word
        assert float(history.drift().abs().max()) < 1e-9


def test_the_split_step_differs_from_the_exact_one_in_second_order():
    model = small_network()
    history = history_with_tail(model)
    theta, start = flatten(model.parameters()), copy.deepcopy(model.state_dict())
    curvature, anchor, _ = tail(history)
    u = torch.stack([flatten(term.values()) for term in history.directions()])
    h = matrix(history) + torch.diag(curvature)
    pull = u.T @ (history.curvatures * history.anchor_projections) + curvature * anchor
    distances = []
    for lam in (1e-3, 5e-4):
        model.load_state_dict(start)
        history.decoupled_step_(lam, 0.1)
        exact = torch.linalg.solve(torch.eye(len(theta), dtype=torch.float64) + 0.1 * lam * h, theta + 0.1 * lam * pull)
        distances.append(float((flatten(model.parameters()) - exact).norm()))
    assert distances[0] / distances[1] == pytest.approx(4, rel=0.01)


@MODES
@pytest.mark.parametrize("optimizer_type", [torch.optim.AdamW, ck.FusedAdamW])
def test_attached_training_is_training_by_hand(decoupled, optimizer_type):
    ends = []
    for attached in (True, False):
        model = small_network()
        history = history_with_tail(model)
        optimizer = optimizer_type(model.parameters(), lr=1e-2)
        if attached:
            history.attach(optimizer, LAM, decoupled=decoupled)
            ends.append(train(model, optimizer, range(6)))
            continue
        for step in range(6):
            optimizer.zero_grad()
            task_loss(model, step).backward()
            if not decoupled:
                history.add_penalty_grad_(LAM)
            optimizer.step()
            if decoupled:
                history.decoupled_step_(LAM, 1e-2)
        ends.append(flatten(model.parameters()))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


def test_fused_adamw_refuses_it_and_names_attach():
    model = small_network()
    with pytest.raises(ValueError, match=r"history has tail='diagonal', .* call history.attach\(optimizer, lam\)"):
        ck.FusedAdamW(model.parameters(), history=history_with_tail(model, 1), lam=LAM)


# The model changes


def test_it_follows_a_model_that_changes_its_memory_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, bias=False)).double()
    history = history_with_tail(model)
    twin = copy.deepcopy((model, history))
    expected, state = history.penalty(LAM).detach(), {k: t.clone() for k, t in history.state_dict().items()}
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(history.penalty(LAM).detach(), expected, rtol=1e-12, atol=0)
    for each, of in ((model, history), twin):
        of.append(fisher_of(each, 9))
    assert history.suggest_lam(0.1, 10) == pytest.approx(twin[1].suggest_lam(0.1, 10), rel=1e-12)
    for of in (history, twin[1]):
        of.add_penalty_grad_(LAM)
        of.decoupled_step_(LAM, 0.1)
    for p, q in zip(model.parameters(), twin[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)
    assert {k: t.shape for k, t in state.items()} == {k: t.shape for k, t in history.state_dict().items()}


def test_suggest_lam_does_not_depend_on_the_memory_order():
    """Also when one of both parts has followed the model and the other has not yet."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, bias=False)).double()
    history = history_with_tail(model)
    state, expected = history.state_dict(), history.suggest_lam(0.1, 10)
    model.to(memory_format=torch.channels_last)
    history.drift()
    assert history.suggest_lam(0.1, 10) == expected
    history.load_state_dict(state)
    assert history.suggest_lam(0.1, 10) == pytest.approx(expected, rel=1e-12)
    first = {name: u[None] for name, u in history.directions()[0].items()}
    again = ck.LowRankFisher(first, history.curvatures[:1], trainable(model))
    history.drift()
    history.append(again)  # merged without a rest, so nothing is folded into the tail
    model.to(memory_format=torch.contiguous_format)
    twin = history_with_tail(model, tasks=0)
    twin.load_state_dict(history.state_dict())
    assert history.suggest_lam(0.1, 10) == pytest.approx(twin.suggest_lam(0.1, 10), rel=1e-12)


def test_rows_that_join_are_free_and_later_tasks_have_them():
    model = nn.ModuleDict({"net": nn.Linear(4, 3), "embed": nn.Embedding(3, 3)}).double()
    history = history_with_tail(model)
    before, curvature = history.penalty(LAM).item(), tail(history)[0].sum()
    old = model["embed"].weight
    model["embed"] = nn.Embedding(5, 3, dtype=torch.float64)
    with torch.no_grad():
        model["embed"].weight[:3] = old
    history.rebind(model, grown=["embed"])
    assert history.penalty(LAM).item() == pytest.approx(before, rel=1e-12)
    assert tail(history)[0].sum() == curvature
    history.add_penalty_grad_(LAM)
    assert not model["embed"].weight.grad[3:].any()
    history.append(fisher_of(model, 9))
    move(model, 9)
    history.add_penalty_grad_(LAM)
    assert model["embed"].weight.grad[3:].all()


def test_parameters_that_are_left_out_stay_out():
    model = small_network()
    history = ck.LowRankHistory(model, exclude=["0.bias"], max_terms=1, tail="diagonal")
    params = {n: p for n, p in trainable(model).items() if n != "0.bias"}
    for seed in range(3):
        history.append(ck.LowRankFisher.from_mean_gradient(random_like(params, seed), 1.0, random_like(params, seed)))
    history.add_penalty_grad_(LAM)
    assert model[0].bias.grad is None
    assert model[0].weight.grad is not None
    model[0].weight.requires_grad_(False)
    before = flatten(model.parameters())
    with pytest.raises(ValueError, match=r"'0.weight' no longer require"):
        history.decoupled_step_(LAM, 0.1)
    assert torch.equal(flatten(model.parameters()), before)


# Copies and files


COPIERS = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


def continued(model: nn.Module, history: ck.LowRankHistory) -> list[Tensor]:
    """What comes of three more tasks."""
    for seed in range(20, 23):
        history.append(fisher_of(model, seed))
        history.decoupled_step_(LAM, 0.05)
    return [flatten(model.parameters()), history.penalty(LAM).detach(), *tail(history), history.drift()]


@pytest.mark.parametrize("copier", COPIERS)
def test_a_copy_goes_on_as_the_original_and_beside_it(copier):
    model = small_network()
    history = history_with_tail(model, decay=0.9)
    copied = COPIERS[copier]((model, history))
    before = [flatten(model.parameters()), *(tensor.clone() for tensor in tail(history))]
    ends = continued(*copied)
    assert all(map(torch.equal, [flatten(model.parameters()), *tail(history)], before))
    assert all(map(torch.equal, continued(model, history), ends))


@pytest.mark.parametrize("tasks", [1, 6])
def test_a_saved_history_goes_on_as_the_original(tasks, tmp_path):
    model = small_network()
    history = history_with_tail(model, tasks, decay=0.9)
    history.save(tmp_path / "h.safetensors")
    loaded = ck.LowRankHistory.load(tmp_path / "h.safetensors", model)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "h.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert loaded._options() == history._options()
    assert loaded.suggest_lam(0.1, 5) == history.suggest_lam(0.1, 5)
    start = copy.deepcopy(model.state_dict())
    ends = continued(model, loaded)
    model.load_state_dict(start)
    assert all(map(torch.equal, continued(model, history), ends))


def test_options_without_a_tail_are_written_as_before():
    """So that files of plain histories stay readable for versions that know no tail."""
    assert "tail" not in ck.LowRankHistory(small_network(), max_terms=2)._options()


def test_states_of_the_other_kind_are_refused_and_nothing_changes():
    model = small_network()
    history, plain = history_with_tail(model), ck.LowRankHistory(model, max_terms=2)
    plain.append(fisher_of(model, 1))
    value = history.penalty(LAM).item(), plain.penalty(LAM).item()
    with pytest.raises(
        ValueError, match=r"the state is of a history with tail='diagonal', and this one has tail='drop'"
    ):
        plain.load_state_dict(history.state_dict())
    with pytest.raises(
        ValueError, match=r"the state is of a history with tail='drop', and this one has tail='diagonal'"
    ):
        history.load_state_dict(plain.state_dict())
    state = history.state_dict()
    for key, wrong, message in (
        ("fisher_diagonal.0.weight", -state["fisher_diagonal.0.weight"], "fisher_diagonal"),
        ("anchor.0.weight", state["anchor.0.weight"].float(), "expected tensors of one dtype"),
        ("residual", torch.tensor(-1.0).double(), "residual in the state is"),
        ("residual", None, "the state lacks 'residual'"),
        ("anchor.0.weight", None, "0.weight"),
    ):
        changed = {k: t for k, t in state.items() if k != key} | ({} if wrong is None else {key: wrong})
        with pytest.raises(ValueError, match=message):
            history.load_state_dict(changed)
    assert (history.penalty(LAM).item(), plain.penalty(LAM).item()) == value


def test_a_task_that_does_not_fit_changes_nothing():
    """Both parts are as they were, also when the last check fails."""
    model = small_network().float()
    history = history_with_tail(model, decay=0.5)
    before = {name: tensor.clone() for name, tensor in history.state_dict().items()}
    huge = fisher_of(model, 1, terms=3)
    huge.curvatures = torch.tensor([1e40, 1e41, 1e42], dtype=torch.float64)  # the diagonal is float32
    with pytest.raises(ValueError, match=r"the sum of curvatures in torch\.float32"):
        history.append(huge)
    after = history.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    history.append(fisher_of(model, 1))


# Unusual terms


def test_terms_of_curvature_zero_add_nothing():
    model = small_network()
    history, plain = history_with_tail(model, 4), history_with_tail(model, 0)
    plain.load_state_dict(history.state_dict())
    flat_fisher = fisher_of(model, 7, terms=2)
    flat_fisher.curvatures = torch.zeros(2, dtype=torch.float64)
    history.append(flat_fisher)
    assert len(history) == 2
    torch.testing.assert_close(history.penalty(LAM), plain.penalty(LAM), rtol=1e-9, atol=0)
    assert torch.equal(tail(history)[0], tail(plain)[0])

    empty = history_with_tail(model, 0, max_terms=1)
    empty.append(flat_fisher)
    assert (len(empty), float(empty.penalty(LAM)), float(empty.add_penalty_grad_(LAM))) == (0, 0.0, 0.0)
    empty.decoupled_step_(INFINITY, 0.1)
    empty.append(fisher_of(model, 1, terms=2))
    assert len(empty) == 1
    assert tail(empty)[0].sum() > 0


def test_tasks_along_one_direction_leave_nothing_out():
    model = small_network()
    history = ck.LowRankHistory(model, max_terms=1, tail="diagonal")
    u = {n: x[None] / 7 for n, x in random_like(trainable(model), 1).items()}
    for seed in range(5):
        history.append(ck.LowRankFisher(u, torch.tensor([1.0 + seed]), random_like(trainable(model), 60 + seed)))
        move(model, seed)
    assert len(history) == 1
    assert not tail(history)[0].any()


def test_decay_alone_shrinks_the_diagonal():
    """Tasks that leave nothing out: the diagonal of earlier ones halves with each of them, and its anchor stays."""
    model = small_network()
    history = history_with_tail(model, decay=0.5)
    curvature, anchor, residual = tail(history)
    flat_fisher = fisher_of(model, 7)
    flat_fisher.curvatures = torch.zeros(1, dtype=torch.float64)
    history.append(flat_fisher)
    history.append(flat_fisher)
    torch.testing.assert_close(tail(history), (curvature / 4, anchor, residual / 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tail": "keep", "max_terms": 2}, "tail is 'keep'; expected 'drop' or 'diagonal'"),
        ({"tail": None, "max_terms": 2}, "tail is None; expected 'drop' or 'diagonal'"),
        ({"tail": "diagonal"}, "tail is 'diagonal' and max_terms None, so nothing is ever left out; give max_terms="),
    ],
)
def test_tails_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ck.LowRankHistory(small_network(), **options)


# Appending without a limit


def test_directions_in_int8_leave_out_what_float32_ones_of_the_same_values_do(tmp_path):
    """One merge: after it, what was kept is rounded to int8 again."""
    model = small_network().float()
    histories = {dtype: ck.LowRankHistory(model, max_terms=1, tail="diagonal") for dtype in (torch.int8, torch.float32)}
    for seed in range(2):
        drawn, anchor = fisher_of(model, seed), trainable(model)
        directions = drawn.layout.split(drawn.directions)
        for dtype, history in histories.items():
            fisher = ck.LowRankFisher(directions, drawn.curvatures, anchor, storage_dtype=dtype)
            history.append(fisher)
            directions = fisher.layout.split(fisher.directions)  # the values in int8, for float32
        move(model, seed)
    parts = [tail(history) for history in histories.values()]
    assert all(map(torch.equal, *parts))
    assert bool((parts[0][0] > 0).any())

    history = histories[torch.int8]
    history.save(tmp_path / "history.safetensors")
    loaded = ck.LowRankHistory.load(tmp_path / "history.safetensors", model)
    assert all(map(torch.equal, loaded.state_dict().values(), history.state_dict().values()))
    value, gradient = value_and_gradient(history, model, LAM)
    assert float(history.add_penalty_grad_(LAM)) == pytest.approx(float(value), rel=1e-5)
    torch.testing.assert_close(gradients_of(model), gradient)


def test_the_gram_matrix_of_appended_terms_is_that_of_all():
    """An append computes only the new terms' products."""
    model = small_network()
    history = ck.LowRankHistory(model)
    for seed in range(6):
        history.append(fisher_of(model, seed, terms=1 + seed % 3))
        u = torch.stack([flatten(term.values()) for term in history.directions()])
        torch.testing.assert_close(history._gram(None), u @ u.T, rtol=1e-12, atol=1e-13)
