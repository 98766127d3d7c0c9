"""FusedAdamW's step against torch's AdamW with the penalty added by history calls."""

import copy
from collections.abc import Callable

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
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import crl_kernels as ck

STEPS = 1000
KINDS = pytest.mark.parametrize("kind", ["1", "3", "10", "diagonal"])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_without_a_history_it_is_torchs_adamw(dtype, bound, maximize):
    ends = []
    for optimizer_type in (torch.optim.AdamW, ck.FusedAdamW):
        model = Network(dtype)
        optimizer = optimizer_type(groups_of(model), weight_decay=0.1, maximize=maximize)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = task_loss(model, step)
            (-loss if maximize else loss).backward()
            optimizer.step()
            schedule.step()
        ends.append(flat(model))
    assert relative_distance(ends[1], ends[0]) <= bound


@KINDS
@MODES
def test_with_a_history_it_is_adamw_and_the_penalty_by_hand(kind, decoupled):
    """Groups, a schedule of rates that changes their ratio, a task that is appended and one parameter without a
    gradient."""
    ends = []
    for optimizer_type in BOTH:
        model = Network()
        history = history_of(model, kind)
        optimizer = optimizer_type(groups_of(model), history=history, lam=LAM, decoupled=decoupled)
        for step in range(STEPS):
            if step == STEPS // 2:
                history.append(fisher_of(model, history.names, 99, kind))
            if step % 10 == 0:
                optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
            optimizer.zero_grad()
            task_loss(model, step).backward()
            value = float(history.penalty(LAM).detach())
            optimizer.step()
            if optimizer_type is ck.FusedAdamW:
                assert abs(float(optimizer.last_penalty) - value) <= 1e-9 * value
        ends.append(flat(model))
    assert relative_distance(ends[1], ends[0]) <= 1e-9
    assert relative_distance(flat(Network()), ends[0]) > 0.1
    if kind != "diagonal":
        assert_carries_the_projections(optimizer, history)


@MODES
@pytest.mark.parametrize("storage_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_float32_parameters_and_all_ways_to_store_a_direction(storage_dtype, decoupled):
    ends = []
    for optimizer_type in BOTH:
        model = Network(torch.float32)
        history = ck.LowRankHistory(model)
        history.append(fisher_of(model, history.names, 0, "1", storage_dtype))
        optimizer = optimizer_type(groups_of(model), history=history, lam=LAM, decoupled=decoupled)
        ends.append(train(model, optimizer, range(200)))
    assert relative_distance(ends[1], ends[0]) <= 1e-5
    assert_carries_the_projections(optimizer, history)


def bytes_of_a_step(optimizer: ck.FusedAdamW) -> dict[str, int]:
    """Of the operator's lists of tensors, by their kind."""
    moved: dict[str, int] = {}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator is torch.ops.crl_kernels.low_rank_adamw_.default:
                params, grads, m, v, _, _, directions, *_ = args
                sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in (params, grads, m, v, directions)]
                moved["AdamW"], moved["penalty"] = 2 * (sizes[0] + sizes[2] + sizes[3]) + sizes[1], sizes[4]
            return operator(*args, **(kwargs or {}))

    with Counting():
        optimizer.step()
    return moved


@pytest.mark.parametrize(
    ("storage_dtype", "expected"), [(torch.float32, 4.0), (torch.bfloat16, 2.0), (torch.int8, 1 + 4 / 128)], ids=str
)
@pytest.mark.parametrize("terms", [1, 3])
def test_bytes_that_a_step_reads_and_writes(storage_dtype, expected, terms):
    """28 of AdamW for each float32 parameter; of each term its storage, with a scale for each 128 elements in int8."""
    model = nn.Linear(256, 8, bias=False)
    history = ck.LowRankHistory(model)
    for seed in range(terms):
        history.append(fisher_of(model, history.names, seed, "1", storage_dtype))
    optimizer = ck.FusedAdamW(model.parameters(), history=history, lam=LAM)
    model.weight.grad = torch.ones_like(model.weight)
    assert bytes_of_a_step(optimizer) == {"AdamW": 28 * 2048, "penalty": terms * expected * 2048}


@pytest.mark.parametrize("kind", ["3", "diagonal"])
def test_an_infinite_lam_takes_the_step_that_is_taken_by_hand(kind):
    def end_of(optimizer_type) -> Tensor:
        model = Network()
        optimizer = optimizer_type(groups_of(model), history=history_of(model, kind), lam=float("inf"), decoupled=True)

        def schedule(step: int) -> None:
            optimizer.param_groups[1]["lr"] = 0.0 if step < 10 else 1e-3

        return train(model, optimizer, range(20), schedule)

    assert relative_distance(end_of(ck.FusedAdamW), end_of(AdamWWithPenalty)) <= 1e-9


def test_lam_is_a_number_or_a_tensor_and_may_change():
    def end_of(form: str) -> Tensor:
        model = Network()
        lam = torch.tensor(1.0) if form == "tensor" else 1.0
        optimizer_type = AdamWWithPenalty if form == "by hand" else ck.FusedAdamW
        optimizer = optimizer_type(groups_of(model), history=history_of(model, "3"), lam=lam)

        def change(step: int) -> None:
            optimizer.lam = lam.fill_(step / 10) if form == "tensor" else step / 10

        return train(model, optimizer, range(20), change)

    by_hand, by_tensor, by_number = map(end_of, ("by hand", "tensor", "number"))
    for end in (by_tensor, by_number):
        assert relative_distance(end, by_hand) <= 1e-7  # a float32 lam
    assert relative_distance(by_number, by_hand) <= 1e-12


def test_parameters_may_join_and_change_their_group_between_steps():
    """As in torch's AdamW: one joins, two change places, which leaves the groups' sizes, and one moves."""
    ends = []
    for optimizer_type in (torch.optim.AdamW, ck.FusedAdamW):
        model = Network()
        first, second = groups_of(model)
        joins = first["params"].pop()
        optimizer = optimizer_type([first, second])
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
    assert relative_distance(ends[1], ends[0]) <= 1e-12


def test_learning_rates_on_a_device_are_not_read_on_the_host(monkeypatch):
    """On a CPU, by taking every tensor for one on a device."""

    def end() -> Tensor:
        model = Network()
        groups = groups_of(model)
        groups[0]["lr"] = torch.tensor(groups[0]["lr"], dtype=torch.float64)
        optimizer = ck.FusedAdamW(groups, history=history_of(model, "3"), lam=LAM)
        return train(model, optimizer, range(20), lambda step: groups[0]["lr"].mul_(0.9))

    expected = end()
    monkeypatch.setattr("crl_kernels.optim.fused_adamw.on_device", lambda rate: isinstance(rate, Tensor))
    assert torch.equal(end(), expected)


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
        scaler = torch.amp.GradScaler(device.type_(), init_scale=2.0**10, enabled=scaled)
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
            kept = carried_sums(optimizer) if overflow and step else None
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, flat(model)) == overflow
            if kept is not None:
                assert torch.equal(carried_sums(optimizer), kept)
        ends[scaled] = flat(model)
        steps = {float(optimizer.state[p]["step"]) for p in (model.first.weight, model.second.bias)}
        assert steps == {40.0 - sum(s % 9 == 3 or s == 0 for s in range(40))}
    assert relative_distance(ends[True], ends[False]) <= 1e-12


@KINDS
@MODES
def test_parameters_frozen_during_training_stay_and_count_in_the_penalty(kind, decoupled):
    """By hand: frozen parameters have the rate 0."""
    ends = []
    for optimizer_type in BOTH:
        model = Network()
        history = history_of(model, kind)
        frozen = [model.first.weight, model.unused]
        rest = [p for p in reversed(list(model.parameters())) if not any(p is f for f in frozen)]
        groups = [{"params": rest, "lr": 2e-3}, {"params": frozen, "lr": 1e-3}]
        fused = optimizer_type is ck.FusedAdamW
        optimizer = optimizer_type(groups, history=history, lam=LAM, decoupled=decoupled)
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
                kept = [copy.deepcopy(optimizer.state[p]) for p in frozen]
            before = torch.cat([p.detach().flatten() for p in frozen])
            optimizer.step()
            if freeze:
                assert torch.equal(before, torch.cat([p.detach().flatten() for p in frozen]))
                if not fused:
                    for parameter, state in zip(frozen, kept, strict=True):
                        optimizer.state[parameter] = state
            if fused:
                expected = float(history.penalty(LAM).detach())
                optimizer.resync()
        ends.append(flat(model))
    assert relative_distance(ends[1], ends[0]) <= 1e-9
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    optimizer.step()
    assert abs(float(optimizer.last_penalty) - expected) <= 1e-9 * expected
    assert torch.equal(flat(model), ends[1])


@MODES
def test_parameters_that_the_history_excludes_have_no_penalty(decoupled):
    ends = []
    for optimizer_type in BOTH:
        model = Network()
        history = history_of(model, "3", exclude=["second", "*.bias"])
        optimizer = optimizer_type(groups_of(model), history=history, lam=LAM, decoupled=decoupled)
        ends.append(train(model, optimizer, range(60)))
    assert relative_distance(ends[1], ends[0]) <= 1e-9


@MODES
def test_a_history_without_terms_and_gradients_that_are_missing(decoupled):
    """As in torch, what has no gradient and no penalty is left alone, and has no state."""
    ends = []
    for optimizer_type in BOTH:
        model = Network()
        history = ck.LowRankHistory(model)
        optimizer = optimizer_type(model.parameters(), history=history, lam=LAM, decoupled=decoupled)
        for step in range(60):
            if step == 30:
                history.append(fisher_of(model, history.names, 0, "1"))
            optimizer.zero_grad()
            if step % 4 != 1:
                task_loss(model, step).backward()
            optimizer.step()
            if step == 29:
                assert torch.equal(model.unused, Network().unused)
                assert optimizer_type is AdamWWithPenalty or model.unused not in optimizer.state
        ends.append(flat(model))
        assert model.unused.grad is None
    assert relative_distance(ends[1], ends[0]) <= 1e-9


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
        optimizer_type = AdamWWithPenalty if form == "by hand" else ck.FusedAdamW
        optimizer = optimizer_type(groups_of(model), history=history, lam=LAM, decoupled=decoupled)
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
    assert relative_distance(ends[1], ends[0]) <= 1e-9
    assert relative_distance(ends[2], ends[1]) <= 1e-9  # it sums in the order of its memory
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
    def compiled_step(step: int) -> Tensor:
        loss = task_loss(model, step)
        loss.backward()
        optimizer.step()
        return loss.detach()

    before = flat(model)
    compiled_step(0)
    assert_carries_the_projections(optimizer, optimizer._penalty.history)
    assert not torch.equal(flat(model), before)


def test_unsupported_arguments_are_refused():
    model = Network()
    history = history_of(model, "1")
    params = list(model.parameters())
    others = [p for n, p in model.named_parameters() if "second" not in n]
    cases = [
        (ValueError, r"lam is in a parameter group; .* Pass lam= to FusedAdamW", lambda: ck.FusedAdamW(
            [{"params": params, "lam": 3.0}], history=history, lam=3.0)),
        (ValueError, r"amsgrad=True is not supported; use torch.optim.AdamW with history.attach", lambda: ck.FusedAdamW(
            [{"params": params, "amsgrad": True}])),
        (ValueError, r"differentiable=True is not supported, .* in the loss", lambda: ck.FusedAdamW(
            params, differentiable=True)),
        (ValueError, r"lr is a tensor of shape \(2,\); expected a number or one element", lambda: ck.FusedAdamW(
            params, lr=torch.ones(2))),
        (ValueError, r"expected two numbers or two tensors", lambda: ck.FusedAdamW(
            params, betas=(0.9, torch.tensor(0.9)))),
        (TypeError, "a parameter is torch.complex64; expected a real floating-point dtype", lambda: ck.FusedAdamW(
            [nn.Parameter(torch.zeros(2, dtype=torch.complex64))])),
        (ValueError, r"'second.weight', 'second.bias', which the history has, are in no parameter group",
         lambda: ck.FusedAdamW(others, history=history, lam=1.0)),
        (ValueError, "maximize=True would maximize the penalty too", lambda: ck.FusedAdamW(
            params, maximize=True, history=history, lam=1.0)),
        (TypeError, "history is a Network; expected a LowRankHistory or a DiagonalHistory", lambda: ck.FusedAdamW(
            params, history=model, lam=1.0)),
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
        ck.FusedAdamW(params, history=history, lam=1.0)


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


def data(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    def write(model: nn.Module) -> None:
        model.weight.data = change(model.weight.data)

    return write


def gradient(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    def write(model: nn.Module) -> None:
        model.weight.grad.data = change(model.weight.grad.data)

    return write


# (dtype, change): what the step says, of a model whose gradients are left over from before the change.
CHANGED = {
    "wider parameter": (torch.float32, data(Tensor.double), "is torch.float32; the parameter is torch.float64, so"),
    "narrower parameter": (torch.float64, data(Tensor.bfloat16), "is torch.float64; the parameter is torch.bfloat16"),
    "wider gradient": (torch.float32, gradient(Tensor.double), "expected torch.float32 or torch.float16 or"),
    "wider gradient, 16 bits": (torch.float16, gradient(Tensor.double), "is torch.float64; the parameter is"),
    "narrower gradient": (torch.float64, gradient(Tensor.float), "expected torch.float64. Compute it again: zero_grad"),
    "integers": (torch.float32, gradient(Tensor.long), "is torch.int64"),
    "complex": (torch.bfloat16, gradient(lambda x: x.to(torch.complex64)), "is torch.complex64"),
    "smaller": (torch.float32, data(lambda x: x[:2]), r"parameter 0 has shape \(2, 4\) and its state \(3, 4\); .* not"),
    "larger": (torch.bfloat16, data(lambda x: x.repeat(2, 1)), r"parameter 0 has shape \(6, 4\) and its state"),
    "transposed": (torch.float32, data(lambda x: x.t()), r"parameter 0 has shape \(4, 3\) and its state"),
    "transposed copy": (torch.float16, data(lambda x: x.t().clone()), r"parameter 0 has shape \(4, 3\) and its state"),
    "expanded": (torch.float32, data(lambda x: x[:1].expand(3, 4)), "was expanded, so .*clone"),
    "expanded, 16 bits": (torch.bfloat16, data(lambda x: x[:, :1].expand(3, 4)), "was expanded, so .*clone"),
    "gradient of other shape": (
        torch.float32,
        gradient(lambda x: x[:2]),
        r"has shape \(2, 4\); expected the parameter's",
    ),
    "gradient transposed": (torch.bfloat16, gradient(lambda x: x.t().clone()), r"has shape \(4, 3\); expected the"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_change_that_no_step_can_take_is_refused_before_anything_is_written(case):
    dtype, change, message = CHANGED[case]
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    optimizer = ck.FusedAdamW(model.parameters())

    def backward() -> None:
        model.zero_grad()
        model(torch.ones(2, 4, dtype=dtype)).square().sum().backward()

    backward()
    optimizer.step()
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    weight = model.weight.data
    change(model)
    changed = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(model.weight, changed)
    model.weight.data = weight
    now = (model.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(now, kept, rtol=0, atol=0)
    backward()
    optimizer.step()
    assert optimizer.state[model.weight]["step"] == 2


TAKEN = {
    "16-bit parameter": (torch.float32, data(Tensor.bfloat16)),
    "other 16-bit parameter": (torch.float16, data(Tensor.bfloat16)),
    "32-bit parameter": (torch.bfloat16, data(Tensor.float)),
    "model.bfloat16()": (torch.float32, nn.Module.bfloat16),
    "model.half()": (torch.float64, nn.Module.half),
    "model.double()": (torch.bfloat16, nn.Module.double),
    "16-bit gradient": (torch.float32, gradient(Tensor.half)),
    "32-bit gradient": (torch.bfloat16, gradient(Tensor.float)),
    "expanded gradient": (torch.float32, gradient(lambda x: x[:1, :1].expand(3, 4))),
    "expanded gradient, 16 bits": (torch.bfloat16, gradient(lambda x: x[:1].expand(3, 4))),
    "strided gradient": (torch.float64, gradient(lambda x: x.repeat(2, 2)[::2, ::2])),
    "column-major": (torch.float16, data(lambda x: x.t().clone().t())),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_change_that_a_step_can_take_is_taken_with_the_gradients_left_over(case):
    """As torch's AdamW in float64 takes it, from the present values: those of a master copy where it rounds to them."""
    dtype, change = TAKEN[case]
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    optimizer = ck.FusedAdamW(model.parameters())
    model(torch.ones(2, 4, dtype=dtype)).square().sum().backward()
    optimizer.step()
    change(model)
    state = optimizer.state[model.weight]
    present, half = model.weight.detach(), model.weight.dtype in (torch.float16, torch.bfloat16)
    master = state.get("master", present) if half else present
    twin = nn.Parameter(torch.where(master.to(present.dtype) == present, master, present.to(master.dtype)).double())
    twin.grad = model.weight.grad.double()
    torchs = torch.optim.AdamW([twin], weight_decay=1e-2)
    moments = {name: state[name].to(torch.float64, copy=True) for name in ("exp_avg", "exp_avg_sq")}
    torchs.state[twin] = {"step": state["step"].clone(), **moments}
    optimizer.step()
    torchs.step()
    state = optimizer.state[model.weight]
    assert state["step"] == 2
    stepped = state["master"] if half else model.weight
    torch.testing.assert_close(stepped.double(), twin, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.weight, stepped.to(model.weight.dtype))
    assert relative_distance(state["exp_avg"].double(), torchs.state[twin]["exp_avg"]) <= 1e-6


def test_a_gradient_on_another_device_than_its_parameter_is_refused():
    with FakeTensorMode():  # of devices that this machine may lack
        elsewhere = torch.zeros(2, device="cuda")
    parameter = type("Moved", (nn.Parameter,), {"grad": elsewhere})(torch.zeros(2))
    optimizer = ck.FusedAdamW([parameter])
    with pytest.raises(RuntimeError, match=r"is on cuda:0; expected cpu, as its parameter\. Compute"):
        optimizer.step()
    assert not optimizer.state


def test_steps_in_inference_mode_and_outside_of_it_continue_each_other():
    ends = []
    for modes in ((False, False), (True, False), (False, True)):
        model = Network(torch.float32)
        optimizer = ck.FusedAdamW(groups_of(model), history=history_of(model, "3"), lam=LAM)
        for step, inference in enumerate(modes):
            optimizer.zero_grad()
            task_loss(model, step).backward()
            with torch.inference_mode(inference):
                optimizer.step()
        ends.append(flat(model))
    assert torch.equal(ends[1], ends[0])
    assert torch.equal(ends[2], ends[0])
