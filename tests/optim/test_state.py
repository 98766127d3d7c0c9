"""What FusedAdamW keeps between steps: carried projections, moments, master copies, and their saved form."""

import copy
import warnings

import pytest
import torch
from helpers import device
from helpers.past_tasks import MODES, flat
from helpers.penalized_adamw import (
    BOTH,
    LAM,
    AdamWWithPenalty,
    Network,
    assert_carries_the_projections,
    carried_sums,
    fisher_of,
    groups_of,
    history_of,
    relative_distance,
    task_loss,
    train,
)
from torch import Tensor

import crl_kernels as ck


@MODES
@pytest.mark.parametrize("storage", ["cpu steps", "fused"])
def test_state_can_move_to_torchs_adamw_and_back(decoupled, storage):
    """Every 25 steps the other optimizer continues from a copy of the state."""
    ends = []
    for changing in (False, True):
        model = Network()
        history = history_of(model, "3")
        reference = AdamWWithPenalty(groups_of(model), history, LAM, decoupled, fused=storage == "fused")
        fused = ck.FusedAdamW(groups_of(model), history=history, lam=LAM, decoupled=decoupled)
        now, then = (reference, fused)
        for step in range(200):
            if changing and step % 25 == 24:
                now, then = then, now
                now.load_state_dict(copy.deepcopy(then.state_dict()))
                assert set(now.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
            train(model, now, [step])
        ends.append(flat(model))
    assert relative_distance(ends[1], ends[0]) <= 1e-9


def run_with(write, decoupled: bool, verify_every: int = 0, resync: bool = False) -> list[Tensor]:
    """60 steps of the reference and of FusedAdamW, with ``write(model, history)`` before steps 20 and 40."""
    ends = []
    for optimizer_type in BOTH:
        model = Network()
        history = history_of(model, "3")
        fused = optimizer_type is ck.FusedAdamW
        options = {"verify_every": verify_every} if fused else {}
        optimizer = optimizer_type(groups_of(model), history=history, lam=LAM, decoupled=decoupled, **options)
        for step in range(60):
            if step in (20, 40):
                write(model, history)
                if fused and resync:
                    optimizer.resync()
            optimizer.zero_grad()
            task_loss(model, step).backward()
            optimizer.step()
        ends.append(flat(model))
    if not verify_every:
        assert_carries_the_projections(optimizer, history)
    return ends


def write_in_place(model, history) -> None:
    with torch.no_grad():
        model.second.weight.copy_(model.second.weight * 1.5 + 1)


WRITES = {
    "in place": write_in_place,
    "load_state_dict": lambda model, history: model.load_state_dict(
        {name: tensor + 0.3 for name, tensor in model.state_dict().items()}
    ),
    "our own operators": lambda model, history: history.decoupled_step_(3.0, 0.5),
    "of the history": lambda model, history: history.load_state_dict(
        {key: t * 1.1 if t.is_floating_point() else t for key, t in history.state_dict().items()}
    ),
    "history.to": lambda model, history: history.to(device.here()),
}


@MODES
@pytest.mark.parametrize("write", WRITES)
def test_writes_from_outside_are_noticed_at_the_next_step(write, decoupled):
    reference, fused = run_with(WRITES[write], decoupled)
    assert relative_distance(fused, reference) <= 1e-9


def write_through_data(model, history) -> None:
    model.second.weight.data.mul_(1.5).add_(1)


@MODES
def test_resync_adopts_writes_through_data(decoupled):
    reference, fused = run_with(write_through_data, decoupled, resync=True)
    assert relative_distance(fused, reference) <= 1e-9
    model = Network()
    optimizer = ck.FusedAdamW(groups_of(model), history=history_of(model, "1"), lam=LAM, decoupled=decoupled)
    optimizer.step()
    write_through_data(model, None)
    before = carried_sums(optimizer)
    optimizer.step()
    # A pass sums the present theta, so only one step is wrong.
    assert relative_distance(carried_sums(optimizer), before) > 0.01


@MODES
def test_verify_every_warns_of_writes_through_data(decoupled):
    with pytest.warns(
        UserWarning, match=r"changed without FusedAdamW noticing: the projections u_k . theta were"
    ) as caught:
        reference, fused = run_with(write_through_data, decoupled, verify_every=20)
    assert len(caught) == 2
    assert all(warning.filename == __file__ for warning in caught)
    assert relative_distance(fused, reference) <= 1e-9


@pytest.mark.parametrize("kind", ["3", "diagonal"])
def test_verify_every_is_silent_where_nothing_was_written(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Network()
        optimizer = ck.FusedAdamW(groups_of(model), history=history_of(model, kind), lam=LAM, verify_every=3)
        model.first.weight.requires_grad_(False)
        train(model, optimizer, range(20))


@MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_are_roundings_of_a_master_copy(dtype, decoupled):
    """They follow float32 parameters with the same gradients, by steps that are too small for their own dtype."""
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
        if step == 15:  # the master copy takes the written values, and only these
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
    torch.testing.assert_close(carried_sums(optimizers[0]), carried_sums(optimizers[1]), rtol=1e-12, atol=0)
    state = optimizers[0].state[half.first.weight]
    assert {key: tensor.dtype for key, tensor in state.items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq", "master"), torch.float32
    )


def test_16_bit_state_can_move_to_torchs_adamw_and_back():
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


@MODES
@pytest.mark.parametrize("kind", ["none", "3", "diagonal"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("conversion", ["model.to", "load_state_dict"])
def test_a_state_of_another_dtype_keeps_its_moments(change, kind, conversion, decoupled):
    """In a run, or in the state of another model: moments in the new dtype, or float32, and a new master copy."""
    before, after = CHANGES[change]
    model = Network(before)
    history = None if kind == "none" else history_of(model, kind)
    options = {"lr": 1e-2} | ({} if kind == "none" else {"lam": LAM, "decoupled": decoupled})
    optimizer = ck.FusedAdamW(model.parameters(), history=history, **options)
    train(model, optimizer, range(3))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    computed = torch.float32 if after in (torch.float16, torch.bfloat16) else after
    if conversion == "model.to":
        model.to(after)
        optimizer.zero_grad()
    else:
        model = Network(after)
        model.load_state_dict(weights)
        history = None if kind == "none" else history_of(model, kind)
        optimizer = ck.FusedAdamW(model.parameters(), history=history, **options)
        optimizer.load_state_dict(copy.deepcopy(saved))

    # A model in the dtype of the step's arithmetic.
    plain = Network(computed)
    plain.load_state_dict(model.state_dict())
    plain_history = None if history is None else type(history)(plain)
    if plain_history is not None:
        plain_history.load_state_dict(history.state_dict())
    adamw = AdamWWithPenalty(plain.parameters(), plain_history, LAM, decoupled, lr=1e-2)
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
        adamw.step()
        assert not torch.equal(flat(model), start)
        moved = [optimizer.state.get(p, {}).get("master", p).detach().double().flatten() for p in model.parameters()]
        assert relative_distance(torch.cat(moved), flat(plain)) <= {torch.float32: 1e-6, torch.float64: 1e-12}[computed]
        for parameter in model.parameters():
            state = optimizer.state.get(parameter, {})
            assert ("master" in state) == (bool(state) and after != computed)
            assert {state[key].dtype for key in state.keys() - {"step"}} <= {computed}
            assert "master" not in state or torch.equal(state["master"].to(after), parameter)
    if kind == "3":
        theta = torch.cat([optimizer.state[p].get("master", p).detach().double().flatten() for p in model.parameters()])
        fresh = torch.stack([u.double() @ theta for u in history._directions])
        torch.testing.assert_close(carried_sums(optimizer), fresh, rtol=1e-9, atol=0)


def test_a_part_of_the_model_may_change_its_dtype_and_back():
    """A change from one 16-bit dtype to the other keeps the master copy where it still rounds to the parameter."""
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
def test_invalid_states_are_refused_and_change_nothing(dtype):
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
    optimizer.load_state_dict(copy.deepcopy(partial))  # a parameter without a state starts from zero, as in torch
    optimizer.step()
    params = list(model.parameters())
    assert [float(optimizer.state[params[i]]["step"]) for i in (2, 3)] == [2.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_state_hooks_are_called_as_in_torch(dtype):
    """The state that a hook returns is loaded or saved. Each hook is called once, in torch's order."""
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
    for optimizer_type in (torch.optim.AdamW, ck.FusedAdamW):
        model.zero_grad()
        task_loss(model, 0).backward()
        optimizer = optimizer_type(model.parameters(), lr=0.0)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        register(optimizer)
        optimizer.load_state_dict(saved)
        kept = torch.tensor(1 / 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        if optimizer_type is ck.FusedAdamW:
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
def test_distributed_checkpoints_round_trip_the_state(pair, options, dtype):
    """On one process, flattened and not, groups and a parameter that the loss does not use; between AdamW and ours."""
    from torch.distributed.checkpoint import state_dict as checkpoint

    chosen = checkpoint.StateDictOptions(**options, strict=False)
    make = {"ours": ck.FusedAdamW, "torch's": torch.optim.AdamW}
    first, second = (make[name] for name in pair.split(", "))
    used = "ours" if "flatten_optimizer_state_dict" not in options else pair

    def groups(model: Network) -> list[dict]:
        if used == "ours, torch's":  # torch's AdamW takes no flattened state that lacks a parameter
            model.unused.requires_grad_(False)
            model.empty.requires_grad_(False)
        return groups_of(model)

    model, copied = Network(dtype), Network(dtype)
    source, target = first(groups(model)), second(groups(copied))
    train(model, source, range(3))
    state = checkpoint.get_optimizer_state_dict(model, source, options=chosen)
    checkpoint.set_optimizer_state_dict(copied, target, copy.deepcopy(state), options=chosen)
    copied.load_state_dict(model.state_dict())
    for (name, p), q in zip(model.named_parameters(), copied.parameters(), strict=True):
        kept = source.state.get(p, {})
        assert {k: target.state[q][k].dtype for k in kept.keys() & target.state[q].keys()} or not kept
        for key in kept.keys() & {"exp_avg", "exp_avg_sq", "step"}:
            coarse = dtype if "torch's" in pair else kept[key].dtype
            assert torch.equal(kept[key].to(coarse), target.state[q][key].to(coarse)), (name, key)
    expected, actual = train(model, source, [3]), train(copied, target, [3])
    bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert relative_distance(actual, expected) <= (bound if "torch's" in pair else 1e-12)
