"""FusedAdamW against torch's AdamW with the penalty added by hand, and what it carries from step to step."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import crl_kernels as ck

STEPS = 1000
LAM = 1.5
MODES = pytest.mark.parametrize("decoupled", [False, True], ids=["gradient", "decoupled"])
KINDS = pytest.mark.parametrize("kind", ["1", "3", "10", "diagonal"])


class Network(nn.Module):
    """Layers of several shapes, one parameter without elements and one that the loss does not use."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(2, 3, 3)
        self.first, self.second = nn.Linear(12, 17), nn.Linear(17, 3)
        self.empty, self.unused = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.randn(5))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.convolution(x).flatten(1)).tanh())


def task_loss(model: Network, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step % 7)
    x = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64).to(model.unused.dtype)
    return (model(x) - x[:, 0, 0, :3].sin()).square().mean()


def fisher_of(model: nn.Module, names, seed: int, kind: str, storage_dtype: torch.dtype | None = None):
    """A task of the named parameters, whose anchor lies away from where the model stands."""
    generator = torch.Generator().manual_seed(seed)
    gradient, anchor = (
        {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            for name, p in model.named_parameters()
            if name in names
        }
        for _ in range(2)
    )
    if kind == "diagonal":
        return ck.DiagonalFisher({n: 0.1 * g**2 for n, g in gradient.items()}, anchor)
    return ck.LowRankFisher.from_mean_gradient(gradient, 0.02, anchor, storage_dtype=storage_dtype)


def history_of(model: nn.Module, kind: str, exclude: list[str] | None = None):
    history = (ck.DiagonalHistory if kind == "diagonal" else ck.LowRankHistory)(model, exclude=exclude)
    for seed in range(2 if kind == "diagonal" else int(kind)):
        history.append(fisher_of(model, history.names, seed, kind))
    return history


def groups_of(model: Network) -> list[dict]:
    """Groups with hyperparameters of their own, in another order than the model's."""
    params = list(reversed(list(model.parameters())))
    return [
        {"params": [p for p in params if p.dim() > 1], "lr": 3e-3},
        {"params": [p for p in params if p.dim() <= 1], "lr": 1e-3, "weight_decay": 0.0, "betas": (0.8, 0.99)},
    ]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


class ByHand:
    """What FusedAdamW is to equal: AdamW with history.add_penalty_grad_ or decoupled_step_ just before its step."""

    def __init__(self, params, history, lam, decoupled: bool, **options) -> None:
        self.optimizer = torch.optim.AdamW(params, **options)
        self.history, self.lam, self.decoupled = history, lam, decoupled
        self.param_groups = self.optimizer.param_groups

    def step(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        missing = [p for p in params if p.grad is None]
        if self.decoupled:
            self.history.decoupled_step_(self.lam, self.param_groups)
        else:
            self.history.add_penalty_grad_(self.lam)
        self.optimizer.step()
        for parameter in missing:
            parameter.grad = None

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def carried(optimizer: ck.FusedAdamW) -> Tensor:
    return optimizer._penalty._carried()


def assert_carries_the_projections(optimizer: ck.FusedAdamW, history: ck.LowRankHistory) -> None:
    """A fresh sum in plain float64."""
    theta = torch.cat([p.detach().double().flatten() for p in history._binding.params])
    fresh = torch.stack([u.double() @ theta for u in history._directions])
    torch.testing.assert_close(carried(optimizer), fresh, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_without_a_history_it_is_torchs_adamw(dtype, bound, maximize):
    ends = []
    for make in (torch.optim.AdamW, ck.FusedAdamW):
        model = Network(dtype)
        optimizer = make(groups_of(model), weight_decay=0.1, maximize=maximize)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = task_loss(model, step)
            (-loss if maximize else loss).backward()
            optimizer.step()
            schedule.step()
        ends.append(flat(model))
    assert distance(ends[1], ends[0]) <= bound


@KINDS
@MODES
def test_with_a_history_it_is_adamw_and_the_penalty_by_hand(kind, decoupled):
    """Groups, a schedule of rates that changes their ratio, a task that is appended and one parameter without a
    gradient."""
    ends = []
    for fused in (False, True):
        model = Network()
        history = history_of(model, kind)
        if fused:
            optimizer = ck.FusedAdamW(groups_of(model), history=history, lam=LAM, decoupled=decoupled)
        else:
            optimizer = ByHand(groups_of(model), history, LAM, decoupled)
        for step in range(STEPS):
            if step == STEPS // 2:
                history.append(fisher_of(model, history.names, 99, kind))
            if step % 10 == 0:
                optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
            optimizer.zero_grad()
            task_loss(model, step).backward()
            value = float(history.penalty(LAM).detach())
            optimizer.step()
            if fused:
                assert abs(float(optimizer.last_penalty) - value) <= 1e-9 * value
        ends.append(flat(model))
    assert distance(ends[1], ends[0]) <= 1e-9
    assert distance(flat(Network()), ends[0]) > 0.1
    if kind != "diagonal":
        assert_carries_the_projections(optimizer, history)


@MODES
@pytest.mark.parametrize("storage_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_parameters_and_both_ways_to_store_a_direction(storage_dtype, decoupled):
    ends = []
    for fused in (False, True):
        model = Network(torch.float32)
        history = ck.LowRankHistory(model)
        history.append(fisher_of(model, history.names, 0, "1", storage_dtype))
        if fused:
            optimizer = ck.FusedAdamW(groups_of(model), history=history, lam=LAM, decoupled=decoupled)
        else:
            optimizer = ByHand(groups_of(model), history, LAM, decoupled)
        for step in range(200):
            optimizer.zero_grad()
            task_loss(model, step).backward()
            optimizer.step()
        ends.append(flat(model))
    assert distance(ends[1], ends[0]) <= 1e-5
    assert_carries_the_projections(optimizer, history)


@pytest.mark.parametrize("kind", ["3", "diagonal"])
def test_an_infinite_lam_holds_what_can_be_held(kind):
    ends = []
    for fused in (False, True):
        model = Network()
        history = history_of(model, kind)
        if fused:
            optimizer = ck.FusedAdamW(groups_of(model), history=history, lam=float("inf"), decoupled=True)
        else:
            optimizer = ByHand(groups_of(model), history, float("inf"), True)
        for step in range(20):
            optimizer.param_groups[1]["lr"] = 0.0 if step < 10 else 1e-3
            optimizer.zero_grad()
            task_loss(model, step).backward()
            optimizer.step()
        ends.append(flat(model))
    assert distance(ends[1], ends[0]) <= 1e-9


def test_lam_is_a_number_or_a_tensor_and_may_change():
    ends = []
    for form in ("by hand", "tensor", "number"):
        model = Network()
        history = history_of(model, "3")
        lam = torch.tensor(1.0) if form == "tensor" else 1.0
        if form == "by hand":
            optimizer = ByHand(groups_of(model), history, lam, False)
        else:
            optimizer = ck.FusedAdamW(groups_of(model), history=history, lam=lam)
        for step in range(20):
            optimizer.lam = lam.fill_(step / 10) if form == "tensor" else step / 10
            optimizer.zero_grad()
            task_loss(model, step).backward()
            optimizer.step()
        ends.append(flat(model))
    for end in ends[1:]:
        assert distance(end, ends[0]) <= 1e-7  # a float32 lam
    assert distance(ends[2], ends[0]) <= 1e-12


def test_parameters_may_join_and_change_their_group_between_steps():
    """As in torch's AdamW: one joins, two change places, which leaves the groups' sizes, and one moves."""
    ends = []
    for make in (torch.optim.AdamW, ck.FusedAdamW):
        model = Network()
        first, second = groups_of(model)
        joins = first["params"].pop()
        optimizer = make([first, second])
        for step in range(30):
            params = [group["params"] for group in optimizer.param_groups]
            if step == 10:
                optimizer.add_param_group({"params": [joins], "lr": 5e-3})
            elif step == 15:
                params[0][0], params[1][0] = params[1][0], params[0][0]
            elif step == 20:
                params[1].insert(0, params[0].pop())
            optimizer.zero_grad()
            task_loss(model, step).backward()
            optimizer.step()
        ends.append(flat(model))
    assert distance(ends[1], ends[0]) <= 1e-12


def test_learning_rates_on_a_device_are_not_looked_at(monkeypatch):
    """On a CPU, by taking every tensor for one on a device."""
    ends = []
    for on_device in (False, True):
        if on_device:
            monkeypatch.setattr("crl_kernels.optim.fused_adamw._on_device", lambda rate: isinstance(rate, Tensor))
        model = Network()
        groups = groups_of(model)
        groups[0]["lr"] = torch.tensor(groups[0]["lr"], dtype=torch.float64)
        optimizer = ck.FusedAdamW(groups, history=history_of(model, "3"), lam=LAM)
        for step in range(20):
            groups[0]["lr"].mul_(0.9)
            optimizer.zero_grad()
            task_loss(model, step).backward()
            optimizer.step()
        ends.append(flat(model))
    assert torch.equal(ends[1], ends[0])


@KINDS
@MODES
def test_a_grad_scaler_changes_nothing_but_skipped_steps(kind, decoupled):
    """A scaled run equals an unscaled one in which the steps with infinite gradients are left out; the carried
    projections survive them, bit for bit."""
    ends = {}
    for scaled in (False, True):
        model = Network()
        history = history_of(model, kind)
        optimizer = ck.FusedAdamW(groups_of(model), history=history, lam=LAM, decoupled=decoupled)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(40):
            overflow = step % 9 == 3 or step == 0
            if overflow and not scaled:
                continue
            optimizer.zero_grad()
            for micro in range(2):  # accumulated
                scaler.scale(task_loss(model, 2 * step + micro)).backward()
            before = flat(model)
            if overflow:
                model.first.bias.grad[2] = float("inf")
            if step % 3 == 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            kept = carried(optimizer) if overflow and step else None
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, flat(model)) == overflow
            if kept is not None:
                assert torch.equal(carried(optimizer), kept)
        ends[scaled] = flat(model)
        steps = {float(optimizer.state[p]["step"]) for p in (model.first.weight, model.second.bias)}
        assert steps == {40.0 - sum(s % 9 == 3 or s == 0 for s in range(40))}
    assert distance(ends[True], ends[False]) <= 1e-12


@MODES
@pytest.mark.parametrize("storage", ["cpu steps", "fused"])
def test_state_goes_to_torchs_adamw_and_back(decoupled, storage):
    """Every 25 steps the other optimizer goes on from a copy of the state."""
    ends = []
    for changing in (False, True):
        model = Network()
        history = history_of(model, "3")
        by_hand = ByHand(groups_of(model), history, LAM, decoupled, fused=storage == "fused")
        fused = ck.FusedAdamW(groups_of(model), history=history, lam=LAM, decoupled=decoupled)
        now, then = (by_hand.optimizer, fused)
        for step in range(200):
            if changing and step % 25 == 24:
                now, then = then, now
                now.load_state_dict(copy.deepcopy(then.state_dict()))
                assert set(now.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
            optimizer = fused if now is fused else by_hand
            by_hand.param_groups = by_hand.optimizer.param_groups
            now.zero_grad()
            task_loss(model, step).backward()
            optimizer.step()
        ends.append(flat(model))
    assert distance(ends[1], ends[0]) <= 1e-9


def run_with(write, decoupled: bool, verify_every: int = 0, resync: bool = False) -> list[Tensor]:
    """60 steps by hand and fused, with ``write(model, history, optimizer)`` before step 20 and 40."""
    ends = []
    for fused in (False, True):
        model = Network()
        history = history_of(model, "3")
        if fused:
            optimizer = ck.FusedAdamW(
                groups_of(model), history=history, lam=LAM, decoupled=decoupled, verify_every=verify_every
            )
        else:
            optimizer = ByHand(groups_of(model), history, LAM, decoupled)
        for step in range(60):
            if step in (20, 40):
                write(model, history)
                if fused and resync:
                    optimizer.resync()
            optimizer.zero_grad()
            task_loss(model, step).backward()
            optimizer.step()
        ends.append(flat(model))
    if fused and not verify_every:
        assert_carries_the_projections(optimizer, history)
    return ends


def copied(model, history) -> None:
    with torch.no_grad():
        model.second.weight.copy_(model.second.weight * 1.5 + 1)


WRITES = {
    "in place": copied,
    "load_state_dict": lambda model, history: model.load_state_dict(
        {name: tensor + 0.3 for name, tensor in model.state_dict().items()}
    ),
    "our own operators": lambda model, history: history.decoupled_step_(3.0, 0.5),
    "of the history": lambda model, history: history.load_state_dict(
        {key: t * 1.1 if t.is_floating_point() else t for key, t in history.state_dict().items()}
    ),
    "history.to": lambda model, history: history.to("cpu"),
}


@MODES
@pytest.mark.parametrize("write", WRITES)
def test_writes_from_outside_are_noticed_at_once(write, decoupled):
    by_hand, fused = run_with(WRITES[write], decoupled)
    assert distance(fused, by_hand) <= 1e-9


def through_data(model, history) -> None:
    model.second.weight.data.mul_(1.5).add_(1)


@MODES
def test_writes_through_data_are_seen_after_resync(decoupled):
    by_hand, fused = run_with(through_data, decoupled, resync=True)
    assert distance(fused, by_hand) <= 1e-9
    model = Network()
    optimizer = ck.FusedAdamW(groups_of(model), history=history_of(model, "1"), lam=LAM, decoupled=decoupled)
    optimizer.step()
    through_data(model, None)
    before = carried(optimizer)
    optimizer.step()
    assert distance(carried(optimizer), before) > 0.01  # the pass itself sums what is there, so one step is wrong


@MODES
def test_writes_through_data_are_seen_and_said_by_verify_every(decoupled):
    with pytest.warns(UserWarning, match=r"changed behind FusedAdamW's back: the projections u_k . theta were") as caught:
        by_hand, fused = run_with(through_data, decoupled, verify_every=20)
    assert len(caught) == 2
    assert all(warning.filename == __file__ for warning in caught)
    assert distance(fused, by_hand) <= 1e-9


@pytest.mark.parametrize("kind", ["3", "diagonal"])
def test_verify_every_is_silent_where_nothing_was_written(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Network()
        optimizer = ck.FusedAdamW(groups_of(model), history=history_of(model, kind), lam=LAM, verify_every=3)
        model.first.weight.requires_grad_(False)
        for step in range(20):
            optimizer.zero_grad()
            task_loss(model, step).backward()
            optimizer.step()


@KINDS
@MODES
def test_parameters_that_are_frozen_on_the_way_stay_and_count(kind, decoupled):
    """By hand: frozen parameters have the rate 0."""
    ends = []
    for fused in (False, True):
        model = Network()
        history = history_of(model, kind)
        frozen = [model.first.weight, model.unused]
        rest = [p for p in reversed(list(model.parameters())) if not any(p is f for f in frozen)]
        groups = [{"params": rest, "lr": 2e-3}, {"params": frozen, "lr": 1e-3}]
        if fused:
            optimizer = ck.FusedAdamW(groups, history=history, lam=LAM, decoupled=decoupled)
        else:
            optimizer = ByHand(groups, history, LAM, decoupled)
        for step in range(60):
            freeze = 20 <= step < 40
            optimizer.zero_grad()
            if fused:
                for parameter in frozen:
                    parameter.requires_grad_(not freeze)
            else:
                optimizer.param_groups[1]["lr"] = 0.0 if freeze else 1e-3
            task_loss(model, step).backward()
            if not fused and freeze:
                kept = [copy.deepcopy(optimizer.optimizer.state[p]) for p in frozen]
            before = torch.cat([p.detach().flatten() for p in frozen])
            optimizer.step()
            if freeze:
                assert torch.equal(before, torch.cat([p.detach().flatten() for p in frozen]))
                if not fused:
                    for parameter, state in zip(frozen, kept, strict=True):
                        optimizer.optimizer.state[parameter] = state
            if fused:
                expected = float(history.penalty(LAM).detach())
                optimizer.resync()
        ends.append(flat(model))
    assert distance(ends[1], ends[0]) <= 1e-9
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    optimizer.step()
    assert abs(float(optimizer.last_penalty) - expected) <= 1e-9 * expected
    assert torch.equal(flat(model), ends[1])


@MODES
def test_parameters_that_the_history_excludes_have_no_penalty(decoupled):
    ends = []
    for fused in (False, True):
        model = Network()
        history = history_of(model, "3", exclude=["second", "*.bias"])
        if fused:
            optimizer = ck.FusedAdamW(groups_of(model), history=history, lam=LAM, decoupled=decoupled)
        else:
            optimizer = ByHand(groups_of(model), history, LAM, decoupled)
        for step in range(60):
            optimizer.zero_grad()
            task_loss(model, step).backward()
            optimizer.step()
        ends.append(flat(model))
    assert distance(ends[1], ends[0]) <= 1e-9


@MODES
def test_a_history_without_terms_and_gradients_that_are_missing(decoupled):
    """As in torch, what has no gradient and no penalty is left alone, and has no state."""
    ends = []
    for fused in (False, True):
        model = Network()
        history = ck.LowRankHistory(model)
        if fused:
            optimizer = ck.FusedAdamW(model.parameters(), history=history, lam=LAM, decoupled=decoupled)
        else:
            optimizer = ByHand(model.parameters(), history, LAM, decoupled)
        for step in range(60):
            if step == 30:
                history.append(fisher_of(model, history.names, 0, "1"))
            optimizer.zero_grad()
            if step % 4 != 1:
                task_loss(model, step).backward()
            optimizer.step()
            if step == 29:
                assert torch.equal(model.unused, Network().unused)
                assert not fused or model.unused not in optimizer.state
        ends.append(flat(model))
        assert model.unused.grad is None
    assert distance(ends[1], ends[0]) <= 1e-9


@MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters_are_roundings_of_a_master_copy(dtype, decoupled):
    """They go the way of float32 parameters that are given the same gradients, by steps too small for their dtype."""
    half, full = Network(dtype), Network(torch.float32)
    full.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    histories = [ck.LowRankHistory(model) for model in (half, full)]
    for history in histories:
        history.append(fisher_of(full, history.names, 0, "1", torch.float32))
    optimizers = [
        ck.FusedAdamW(groups_of(model), lr=1e-5, history=history, lam=LAM, decoupled=decoupled)
        for model, history in zip((half, full), histories, strict=True)
    ]
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 1e-5
    for step in range(30):
        half.zero_grad()
        task_loss(half, step).backward()
        for p, q in zip(half.parameters(), full.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        if step == 15:  # taken over where it differs, and only there
            with torch.no_grad():
                half.first.weight[0] += 0.5
                full.first.weight[0] = half.first.weight[0].float()
        if step == 20:
            optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(half.parameters(), full.parameters(), strict=True):
            assert torch.equal(optimizers[0].state[p]["master"], q)
            assert torch.equal(p, q.to(dtype))
    torch.testing.assert_close(carried(optimizers[0]), carried(optimizers[1]), rtol=1e-12, atol=0)
    state = optimizers[0].state[half.first.weight]
    assert {key: tensor.dtype for key, tensor in state.items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq", "master"), torch.float32
    )


def test_half_state_goes_to_torchs_adamw_and_back():
    model = Network(torch.bfloat16)
    optimizer = ck.FusedAdamW(model.parameters())
    torchs = torch.optim.AdamW(model.parameters())
    for step, (now, then) in enumerate([(optimizer, torchs), (torchs, optimizer), (optimizer, torchs)]):
        model.zero_grad()
        task_loss(model, step).backward()
        now.step()
        then.load_state_dict(copy.deepcopy(now.state_dict()))
    state = optimizer.state[model.first.weight]
    assert float(state["step"]) == 3
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert torch.equal(state["master"].bfloat16(), model.first.weight)


CHANGES = {
    "16 bits to 32": (torch.bfloat16, torch.float32),
    "16 bits to 64": (torch.float16, torch.float64),
    "32 bits to 16": (torch.float32, torch.bfloat16),
    "64 bits to 16": (torch.float64, torch.float16),
    "32 bits to 64": (torch.float32, torch.float64),
    "64 bits to 32": (torch.float64, torch.float32),
}
STATE_KINDS = pytest.mark.parametrize("kind", ["none", "3", "diagonal"])


@MODES
@STATE_KINDS
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", ["model.to", "load_state_dict"])
def test_a_state_of_another_dtype_goes_on_as_a_fresh_one_with_its_moments(change, kind, way, decoupled):
    """In mid-run, or in the state of another model: the moments in the new dtype, or float32, and a new master copy."""
    before, after = CHANGES[change]
    model = Network(before)
    history = None if kind == "none" else history_of(model, kind)
    options = {"lr": 1e-2, "lam": LAM, "decoupled": decoupled}
    optimizer = ck.FusedAdamW(model.parameters(), history=history, **options)
    for step in range(3):
        optimizer.zero_grad()
        task_loss(model, step).backward()
        optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    computed = torch.float32 if after in (torch.float16, torch.bfloat16) else after
    if way == "model.to":
        model.to(after)
        optimizer.zero_grad()
    else:
        model = Network(after)
        model.load_state_dict(weights)
        history = None if kind == "none" else history_of(model, kind)
        optimizer = ck.FusedAdamW(model.parameters(), history=history, **options)
        optimizer.load_state_dict(copy.deepcopy(saved))

    # A model in the dtype that steps compute in, torch's AdamW, and the penalty by hand.
    plain = Network(computed)
    plain.load_state_dict(model.state_dict())
    beside = None if history is None else type(history)(plain)
    if beside is not None:
        beside.load_state_dict(history.state_dict())
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    adamw.load_state_dict(copy.deepcopy(saved))
    for state in saved["state"].values():
        state.pop("master", None)
    for parameter, state in zip(plain.parameters(), (saved["state"].get(i) for i in range(len(weights))), strict=True):
        if state is not None:  # before any rounding
            adamw.state[parameter] = {k: v if k == "step" else v.to(computed) for k, v in state.items()}
    for step in range(3, 6):
        model.zero_grad()
        task_loss(model, step).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.to(computed)
        start = flat(model)
        optimizer.step()
        missing = [p for p in plain.parameters() if p.grad is None]
        if beside is not None and decoupled:
            beside.decoupled_step_(LAM, adamw.param_groups)
        elif beside is not None:
            beside.add_penalty_grad_(LAM)
        adamw.step()
        for parameter in missing:
            parameter.grad = None
        assert not torch.equal(flat(model), start)
        moved = [optimizer.state.get(p, {}).get("master", p).detach().double().flatten() for p in model.parameters()]
        assert distance(torch.cat(moved), flat(plain)) <= {torch.float32: 1e-6, torch.float64: 1e-12}[computed]
        for parameter in model.parameters():
            state = optimizer.state.get(parameter, {})
            assert ("master" in state) == (bool(state) and after != computed)
            assert {state[key].dtype for key in state.keys() - {"step"}} <= {computed}
            assert "master" not in state or torch.equal(state["master"].to(after), parameter)
    if kind == "3":
        theta = torch.cat([optimizer.state[p].get("master", p).detach().double().flatten() for p in model.parameters()])
        fresh = torch.stack([u.double() @ theta for u in history._directions])
        torch.testing.assert_close(carried(optimizer), fresh, rtol=1e-9, atol=0)


def test_a_part_of_the_model_may_change_its_dtype_and_back():
    """The master copy goes on through a change from one 16-bit dtype to the other where it still rounds to the
    parameter."""
    model = Network(torch.bfloat16)
    optimizer = ck.FusedAdamW(groups_of(model), history=history_of(model, "3"), lam=LAM)
    dtypes = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bfloat16)
    for step, dtype in enumerate(dtypes):
        masters = {p: state["master"].clone() for p, state in optimizer.state.items() if "master" in state}
        model.first.to(dtype)
        started = {p: p.detach().clone() for p in model.parameters()}
        model.zero_grad()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 + step)
        penalty = float(optimizer.history.penalty(LAM).detach())
        optimizer.step()
        assert float(optimizer.last_penalty) == pytest.approx(penalty, rel=1e-2)  # of the master copies
        for parameter in model.parameters():
            half, state = parameter.dtype in (torch.bfloat16, torch.float16), optimizer.state[parameter]
            assert ("master" in state) == half
            moved = state.get("master", parameter).detach().double()
            start = started[parameter].double()
            if half and parameter in masters:
                kept = masters[parameter].to(parameter.dtype) == started[parameter]
                start = torch.where(kept, masters[parameter].double(), start)
            assert ((moved - start).abs() > 1e-4).all()
            assert torch.equal(moved.to(parameter.dtype), parameter)


def broken(state: dict, number: int, **changes) -> dict:
    states = {i: dict(tensors) for i, tensors in state["state"].items()}
    for key, value in changes.items():
        if value is None:
            states[number].pop(key)
        else:
            states[number][key] = value
    return state | {"state": states}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_states_that_cannot_be_taken_over_are_refused_and_change_nothing(dtype):
    model = Network(dtype)
    optimizer = ck.FusedAdamW(model.parameters())
    task_loss(model, 0).backward()
    optimizer.step()
    good = optimizer.state_dict()
    before = copy.deepcopy(good)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sgd.step()
    meta = {"exp_avg": torch.zeros(3, 2, 3, 3, device="meta")}
    hyper = [group | {"betas": (0.9, 1.5)} for group in good["param_groups"]]
    cases = {
        r"state of parameter 2 lacks 'exp_avg_sq'; expected step, exp_avg": broken(good, 2, exp_avg_sq=None),
        r"state of parameter 5 lacks 'step'": broken(good, 5, step=None),
        r"state of parameter 2 lacks 'step', 'exp_avg', 'exp_avg_sq'": broken(sgd.state_dict(), 2),
        r"'exp_avg' in the state of parameter 3 has shape \(4,\) and the parameter \(3,\)": broken(
            good, 3, exp_avg=torch.zeros(4)
        ),
        r"'master' in the state of parameter 3 has shape \(1,\) and the parameter \(3,\)": broken(
            good, 3, master=torch.zeros(1)
        ),
        r"'exp_avg_sq' in the state of parameter 3 has shape None": broken(good, 3, exp_avg_sq=[1.0, 2.0, 3.0]),
        r"'exp_avg' in the state of parameter 2 is on the meta device": broken(good, 2, **meta),
        r"betas is \(0.9, 1.5\)": good | {"param_groups": hyper},
        r"differentiable=True is not supported": good
        | {"param_groups": [group | {"differentiable": True} for group in good["param_groups"]]},
    }
    for message, state in cases.items():
        if "step', 'exp_avg'" in message:
            state["param_groups"] = good["param_groups"]
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        now = optimizer.state_dict()
        assert now["param_groups"] == before["param_groups"]
        for index, tensors in before["state"].items():
            assert all(torch.equal(now["state"][index][key], tensor) for key, tensor in tensors.items())
    assert not optimizer._optimizer_load_state_dict_pre_hooks

    partial = good | {"state": {i: state for i, state in good["state"].items() if i != 3}}
    optimizer.load_state_dict(copy.deepcopy(partial))  # a parameter that has no state begins anew, as in torch
    optimizer.step()
    params = list(model.parameters())
    assert [float(optimizer.state[params[i]]["step"]) for i in (2, 3)] == [2.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_state_hooks_are_torchs(dtype):
    """What a hook returns is what is loaded or saved; every one is called, in torch's order, once."""
    calls = []

    def note(name, result=None):
        def hook(optimizer, *arguments):
            calls.append((name, float(next(iter(optimizer.state.values()))["exp_avg"].sum())))
            return result(*arguments) if result is not None else None

        return hook

    def filled(value):
        def fill(state):
            return {
                **state,
                "state": {k: {**v, "exp_avg": v["exp_avg"].float().fill_(value)} for k, v in state["state"].items()},
            }

        return fill

    def register(optimizer):
        calls.clear()
        optimizer.register_load_state_dict_pre_hook(note("pre", filled(1 / 3)))
        optimizer.register_load_state_dict_pre_hook(note("first", filled(7.0)), prepend=True)
        optimizer.register_load_state_dict_post_hook(note("post"))
        optimizer.register_state_dict_pre_hook(note("before saving"))
        optimizer.register_state_dict_post_hook(note("after saving", filled(9.0)))
        optimizer.register_step_pre_hook(lambda *arguments: calls.append("step"))
        optimizer.register_step_post_hook(lambda *arguments: calls.append("stepped"))

    model = Network(dtype)
    called = []
    for make in (torch.optim.AdamW, ck.FusedAdamW):
        model.zero_grad()
        task_loss(model, 0).backward()
        optimizer = make(model.parameters(), lr=0.0)
        optimizer.step()
        given = copy.deepcopy(optimizer.state_dict())
        register(optimizer)
        optimizer.load_state_dict(given)
        kept = torch.tensor(1 / 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        if make is ck.FusedAdamW:
            for state in optimizer.state.values():
                assert torch.equal(
                    state["exp_avg"], torch.full_like(state["exp_avg"], float(torch.tensor(1 / 3).to(kept)))
                )
        assert all((v["exp_avg"] == 9).all() for v in optimizer.state_dict()["state"].values())
        optimizer.step()
        called.append([call if isinstance(call, str) else call[0] for call in calls])
        assert dict(call for call in calls if not isinstance(call, str))["post"] > 0  # it sees what was loaded
    assert called[1] == called[0]
    assert called[0] == ["first", "pre", "post", "before saving", "after saving", "step", "stepped"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}], ids=str)
@pytest.mark.parametrize("pair", ["ours, ours", "torch's, ours", "ours, torch's"])
def test_distributed_checkpoints_hold_and_give_back_the_state(pair, options, dtype):
    """On one process, flattened and not, groups and a parameter that the loss does not use; between AdamW and ours."""
    from torch.distributed.checkpoint import state_dict as checkpoint

    chosen = checkpoint.StateDictOptions(**options, strict=False)
    make = {"ours": ck.FusedAdamW, "torch's": torch.optim.AdamW}
    first, second = (make[name] for name in pair.split(", "))
    used = "ours" if "flatten_optimizer_state_dict" not in options else pair
    params = {}

    def groups(model: Network) -> list[dict]:
        if used == "ours, torch's":  # torch's AdamW takes no flattened state that lacks a parameter
            model.unused.requires_grad_(False)
            model.empty.requires_grad_(False)
        return groups_of(model)

    model, other = Network(dtype), Network(dtype)
    one, two = first(groups(model)), second(groups(other))
    for step in range(3):
        one.zero_grad()
        task_loss(model, step).backward()
        one.step()
    state = checkpoint.get_optimizer_state_dict(model, one, options=chosen)
    checkpoint.set_optimizer_state_dict(other, two, copy.deepcopy(state), options=chosen)
    other.load_state_dict(model.state_dict())
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        params[name] = p
        kept = one.state.get(p, {})
        assert {k: two.state[q][k].dtype for k in kept.keys() & two.state[q].keys()} or not kept
        for key in kept.keys() & {"exp_avg", "exp_avg_sq", "step"}:
            coarse = dtype if "torch's" in pair else kept[key].dtype
            assert torch.equal(kept[key].to(coarse), two.state[q][key].to(coarse)), (name, key)
    ends = []
    for net, optimizer in ((model, one), (other, two)):
        optimizer.zero_grad()
        task_loss(net, 3).backward()
        optimizer.step()
        ends.append(flat(net))
    bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert distance(ends[1], ends[0]) <= (bound if "torch's" in pair else 1e-12)


def test_the_step_is_not_captured_in_a_graph(monkeypatch):
    model = Network()
    optimizer = ck.FusedAdamW(model.parameters())
    task_loss(model, 0).backward()
    before = flat(model)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"captured in a CUDA graph, .*torch.optim.AdamW\(capturable=True\)"):
        optimizer.step()
    assert torch.equal(flat(model), before)


@MODES
def test_channels_last_flat_buffers_and_mixed_dtypes(decoupled):
    """Other memory than row-major tensors of one dtype."""
    ends = []
    for form in ("by hand", "fused", "channels_last", "flat"):
        model = Network()
        history = history_of(model, "3")
        if form == "channels_last":
            model.to(memory_format=torch.channels_last)
        if form == "flat":
            ck.flatten_parameters(model)
        if form == "by hand":
            optimizer = ByHand(groups_of(model), history, LAM, decoupled)
        else:
            optimizer = ck.FusedAdamW(groups_of(model), history=history, lam=LAM, decoupled=decoupled)
        for step in range(30):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                if form == "flat":
                    parameter.grad.copy_(gradient)
                else:
                    parameter.grad = gradient.to(memory_format=torch.preserve_format)
            optimizer.step()
        ends.append(flat(model))
    assert distance(ends[1], ends[0]) <= 1e-9
    assert torch.equal(ends[2], ends[1])
    assert torch.equal(ends[3], ends[1])

    mixed = Network(torch.float32)
    mixed.first.double()
    history = history_of(mixed, "3")
    optimizer = ck.FusedAdamW(groups_of(mixed), history=history, lam=LAM, decoupled=decoupled)
    for parameter in mixed.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert_carries_the_projections(optimizer, history)


def test_gradients_stay_as_they_are_and_closures_are_called_first():
    model = Network()
    optimizer = ck.FusedAdamW(model.parameters(), history=history_of(model, "1"), lam=LAM)
    task_loss(model, 0).backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)

    ends = []
    for by_closure in (False, True):
        model = Network()
        optimizer = ck.FusedAdamW(model.parameters(), history=history_of(model, "1"), lam=LAM)

        def closure(model=model, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = task_loss(model, 0)
            loss.backward()
            return loss

        if by_closure:
            loss = optimizer.step(closure)
        else:
            loss = closure()
            optimizer.step()
        ends.append(torch.cat([flat(model), loss.detach()[None]]))
    assert torch.equal(ends[0], ends[1])


def test_a_step_in_compiled_code():
    model = Network()
    optimizer = ck.FusedAdamW(model.parameters(), history=history_of(model, "1"), lam=LAM)

    @torch.compile(backend="eager")
    def train(step: int) -> Tensor:
        loss = task_loss(model, step)
        loss.backward()
        optimizer.step()
        return loss.detach()

    before = flat(model)
    train(0)
    assert_carries_the_projections(optimizer, optimizer._penalty.history)
    assert not torch.equal(flat(model), before)


def test_what_cannot_be_is_refused():
    model = Network()
    history = history_of(model, "1")
    params = list(model.parameters())
    cases = [
        (ValueError, r"lam is in a parameter group; .* Pass lam= to FusedAdamW", lambda: ck.FusedAdamW(
            [{"params": params, "lam": 3.0}], history=history)),
        (ValueError, r"amsgrad=True is not supported; use torch.optim.AdamW with history.attach", lambda: ck.FusedAdamW(
            [{"params": params, "amsgrad": True}])),
        (ValueError, r"differentiable=True is not supported, .* in the loss", lambda: ck.FusedAdamW(
            params, differentiable=True)),
        (ValueError, r"capturable=True is not supported: .* with history.attach", lambda: ck.FusedAdamW(
            [{"params": params, "capturable": True}])),
        (ValueError, r"lr is a tensor of shape \(2,\); expected a number or one element", lambda: ck.FusedAdamW(
            params, lr=torch.ones(2))),
        (ValueError, r"expected two numbers or two tensors", lambda: ck.FusedAdamW(
            params, betas=(0.9, torch.tensor(0.9)))),
        (TypeError, "a parameter is torch.complex64; expected a real floating-point dtype", lambda: ck.FusedAdamW(
            [nn.Parameter(torch.zeros(2, dtype=torch.complex64))])),
        (ValueError, r"'second.weight', 'second.bias', which the history has, are in no parameter group",
         lambda: ck.FusedAdamW([p for n, p in model.named_parameters() if "second" not in n], history=history)),
        (ValueError, "maximize=True would maximize the penalty too", lambda: ck.FusedAdamW(
            params, maximize=True, history=history)),
        (TypeError, "history is a Network; expected a LowRankHistory or a DiagonalHistory", lambda: ck.FusedAdamW(
            params, history=model)),
        (ValueError, "lam is inf; expected a finite value >= 0", lambda: ck.FusedAdamW(
            params, history=history, lam=float("inf"))),
        (ValueError, "lam is -1", lambda: ck.FusedAdamW(params, history=history, lam=-1.0, decoupled=True)),
        (ValueError, "lr is -1", lambda: ck.FusedAdamW(params, lr=-1.0)),
        (ValueError, r"betas is \(0.9, 1.0\); expected two numbers >= 0 and < 1", lambda: ck.FusedAdamW(
            params, betas=(0.9, 1.0))),
        (ValueError, "eps is -1", lambda: ck.FusedAdamW(params, eps=-1.0)),
        (ValueError, "weight_decay is -1", lambda: ck.FusedAdamW(params, weight_decay=-1.0)),
        (ValueError, "verify_every is -1; expected an integer >= 0", lambda: ck.FusedAdamW(params, verify_every=-1)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    history.attach(torch.optim.SGD(params, lr=0.1), 1.0)
    with pytest.raises(ValueError, match=r"history is attached to an optimizer, .* call detach\(\) first"):
        ck.FusedAdamW(params, history=history)


@pytest.mark.parametrize("kind", ["1", "diagonal"])
def test_a_step_that_is_refused_writes_nothing(kind):
    model = Network()
    history = history_of(model, kind)
    optimizer = ck.FusedAdamW(model.parameters(), history=history, lam=LAM)
    task_loss(model, 0).backward()
    optimizer.step()
    before, state = flat(model), copy.deepcopy(optimizer.state_dict()["state"])

    def refused(error, message, call=optimizer.step) -> None:
        with pytest.raises(error, match=message):
            call()
        assert torch.equal(flat(model), before)
        now = optimizer.state_dict()["state"]
        for index, tensors in state.items():
            for key, tensor in tensors.items():
                assert torch.equal(now[index][key], tensor), (index, key)

    refused(TypeError, "closure is a float; expected a function that computes the loss", lambda: optimizer.step(1.0))
    optimizer.lam = -2.0
    refused(ValueError, "lam is -2.0")
    optimizer.lam = LAM
    dense = model.second.weight.grad
    model.second.weight.grad = dense.to_sparse()
    refused(RuntimeError, r"the gradient of parameter 6, of shape \(3, 17\), is torch.sparse_coo; FusedAdamW")
    model.second.weight.grad = dense
    amsgrad = torch.optim.AdamW(model.parameters(), amsgrad=True).state_dict()
    refused(ValueError, "amsgrad=True is not supported", lambda: optimizer.load_state_dict(amsgrad))
    parameter = model.second.weight
    model.second.weight = nn.Parameter(parameter.detach().clone())
    refused(ValueError, "parameter 'second.weight' is no longer the object that the history was bound to")
    model.second.weight = parameter
    optimizer.step()
    assert not torch.equal(flat(model), before)
