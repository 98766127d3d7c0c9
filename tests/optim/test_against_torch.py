"""FusedAdamW on PyTorch's own inputs for AdamW (``torch.testing._internal.common_optimizers``), each taken through many
steps beside ``torch.optim.AdamW``, and on what else a program that moves over from AdamW may pass."""

import inspect
import warnings
from unittest import mock

import pytest
import torch
from helpers.past_tasks import flat
from torch import Tensor, nn

import crl_kernels as ck

pytest.importorskip(
    "expecttest", reason="expecttest, which torch's own test inputs import, is not installed (extra dev)"
)
with mock.patch.object(torch.backends, "disable_global_flags"):  # it would hold for the whole process
    from torch.testing._internal import common_optimizers

STEPS = 50
INFO = next(info for info in common_optimizers.optim_db if info.optim_cls is torch.optim.AdamW)
# Inputs that torch has for other devices than a CPU are made of its own function, so that none is overlooked.
DEVICES = ("cpu", "cuda", "mps")
# Options that FusedAdamW does not support, and how its error begins.
UNSUPPORTED = {
    "amsgrad": "amsgrad=True is not supported; use torch.optim.AdamW with history.attach",
    "differentiable": "differentiable=True is not supported, because the step writes in place",
}
# What torch's own loops cannot do, and FusedAdamW can: foreach=True chooses one of them, and has no effect here.
SUPPORTED_ERRORS = (
    "lr as Tensor doesn't work with foreach & not capturable",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
)


def inputs() -> dict[str, dict]:
    """By description; with every value of the flags that choose among torch's loops."""
    described = {}
    for device in DEVICES:
        for case in INFO.optim_inputs_func(device=device):
            for flags in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}):
                named = "".join(f", {flag}={value}" for flag, value in flags.items())
                described[case.desc + named] = case.kwargs | flags
            described[case.desc + ", differentiable"] = case.kwargs | {"differentiable": True}
    return described


def refused(kwargs: dict) -> str | None:
    return next((flag for flag in UNSUPPORTED if kwargs.get(flag)), None)


INPUTS = inputs()


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def train(optimizer, model: nn.Module, steps: int = STEPS, closure: bool = False, first: int = 0) -> list[float]:
    dtype, losses = next(model.parameters()).dtype, []
    for step in range(first, first + steps):
        x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)

        def loss_of(x=x) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x).squeeze(1) - x[:, 0, 0, 0].sin()).square().mean()
            loss.backward()
            return loss

        loss = optimizer.step(loss_of) if closure else loss_of()
        if not closure:
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def in_dtype(kwargs: dict, dtype: torch.dtype) -> dict:
    """Tensor rates in the parameters' dtype: torch rounds to a rate's own dtype, which FusedAdamW need not repeat."""

    def cast(value):
        if isinstance(value, tuple):
            return tuple(map(cast, value))
        return value.detach().clone().to(dtype) if isinstance(value, Tensor) else value

    return {name: cast(value) for name, value in kwargs.items()}


GROUPS = {
    "one list": lambda model: model.parameters(),
    "groups": lambda model: [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.2},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 5e-3, "betas": (0.8, 0.9), "eps": 1e-6},
    ],
    "names": lambda model: model.named_parameters(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", GROUPS)
@pytest.mark.parametrize("name", [name for name, kwargs in INPUTS.items() if not refused(kwargs)])
def test_an_input_of_torchs_own_tests_trains_as_with_adamw(name, form, dtype):
    """float64 to rounding; float32 as close to the float64 truth as twice torch's own distance."""
    kwargs = INPUTS[name]
    loops = {"foreach", "fused", "capturable"} & kwargs.keys()
    ends, losses, optimizers = {}, {}, {}
    cases = {"torch": (torch.optim.AdamW, dtype), "fused": (ck.FusedAdamW, dtype)}
    if dtype == torch.float32:
        cases["truth"] = (torch.optim.AdamW, torch.float64)
    for case, (make, kind) in cases.items():
        model = network(kind)
        given = in_dtype(kwargs, kind)
        if case != "fused":  # the reference is torch's plainest loop; torch's AdamW takes capturable on a GPU only
            given = {flag: value for flag, value in given.items() if flag not in loops}
        optimizer = optimizers[case] = make(GROUPS[form](model), **given)
        losses[case] = train(optimizer, model, closure=form == "groups")
        ends[case] = flat(model)
    if dtype == torch.float64:
        torch.testing.assert_close(ends["fused"], ends["torch"], rtol=1e-11, atol=1e-13)
        assert losses["fused"] == pytest.approx(losses["torch"], rel=1e-10)
    else:
        error, own = ((ends[case] - ends["truth"]).norm() for case in ("fused", "torch"))
        assert error <= 2 * own
    assert set(optimizers["fused"].param_groups[0]) == set(optimizers["torch"].param_groups[0])
    start = flat(network(dtype))
    assert (ends["fused"] - start).norm() > 1e-2


@pytest.mark.parametrize("name", [name for name, kwargs in INPUTS.items() if refused(kwargs)])
def test_an_unsupported_input_is_refused_with_its_reason(name):
    kwargs = INPUTS[name]
    message = "|".join(UNSUPPORTED[flag] for flag in UNSUPPORTED if kwargs.get(flag))
    with pytest.raises(ValueError, match=message):
        ck.FusedAdamW(network(torch.float32).parameters(), **kwargs)


def test_every_input_is_supported_or_named():
    """And how many: ``pytest -s`` prints it."""
    left = {flag: [n for n, kwargs in INPUTS.items() if refused(kwargs) == flag] for flag in UNSUPPORTED}
    taken = len(INPUTS) - sum(map(len, left.values()))
    counts = {flag: len(names) for flag, names in left.items()}
    print(f"\nAdamW's inputs, with flags: {len(INPUTS)}; taken: {taken}; left out: {counts}")
    plain = {case.desc for case in INFO.optim_inputs_func(device="cpu")}
    assert plain == {"default", "non-default lr", "nonzero weight_decay", "maximize", "amsgrad"}
    assert plain - set(left["amsgrad"]) == {"default", "non-default lr", "nonzero weight_decay", "maximize"}
    assert "Tensor lr" in INPUTS
    # With each flag: four of a CPU, the tensor lr of mps, capturable, and capturable with tensors.
    assert taken == 7 * 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_error_inputs_of_torchs_own_tests(dtype):
    refusals, taken = 0, []
    for case in INFO.optim_error_inputs_func(device="cpu", dtype=dtype):
        given = case.optimizer_error_input
        assert case.error_on is common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = network(dtype).parameters() if given.params is None else given.params
        if given.desc in SUPPORTED_ERRORS:
            taken.append(given.desc)
            model, plain = network(dtype), network(dtype)
            train(ck.FusedAdamW(model.parameters(), **in_dtype(given.kwargs, torch.float64)), model)
            kwargs = in_dtype(given.kwargs, torch.float64) | {"foreach": False}
            train(torch.optim.AdamW(plain.parameters(), **kwargs), plain)
            bound = 1e-11 if dtype == torch.float64 else 1e-6
            assert (flat(model) - flat(plain)).norm() <= bound * flat(plain).norm()
            continue
        refusals += 1
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # torch only warns of duplicates
            with pytest.raises(case.error_type):
                ck.FusedAdamW(params, **given.kwargs)
    print(f"\nAdamW's error inputs: {refusals + len(taken)}; refused: {refusals}; taken: {taken}")
    assert sorted(taken) == sorted(SUPPORTED_ERRORS)
    assert refusals >= 10


def test_the_signature_begins_as_adamws():
    own = inspect.signature(ck.FusedAdamW).parameters
    adamw = inspect.signature(torch.optim.AdamW).parameters
    assert list(own)[: list(own).index("history")] == list(adamw)
    for name, parameter in adamw.items():
        assert (own[name].kind, own[name].default) == (parameter.kind, parameter.default), name
    assert all(own[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(own)[len(adamw) :])


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}], ids=str)
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("first", ["torch's", "ours"])
def test_a_state_moves_between_adamw_and_ours_with_the_options_of_its_groups(flags, lr, first):
    """Half of the steps by one, half by the other, and back: the same as AdamW alone."""
    if flags.get("foreach") and isinstance(lr, Tensor):
        lr = torch.tensor([1e-2], dtype=torch.float64)
        flags = {}  # which torch refuses

    def groups(model: nn.Module) -> list[dict]:
        params = list(model.parameters())
        return [{"params": params[:2], "weight_decay": 0.3, "lr": lr}, {"params": params[2:], "betas": (0.7, 0.9)}]

    alone = network(torch.float64)
    train(torch.optim.AdamW(groups(alone), lr=lr), alone, 30)

    model = network(torch.float64)
    pair = [torch.optim.AdamW(groups(model), lr=lr, **flags), ck.FusedAdamW(groups(model), lr=lr, **flags)]
    order = pair if first == "torch's" else pair[::-1]
    saved = None
    for i, optimizer in enumerate((*order, order[0])):
        if saved is not None:
            optimizer.load_state_dict(saved)
        train(optimizer, model, 10, first=10 * i)
        saved = optimizer.state_dict()
        for group, expected in zip(saved["param_groups"], pair[0].state_dict()["param_groups"], strict=True):
            assert group.keys() == expected.keys()
            assert {k: group[k] for k in flags} == flags
    torch.testing.assert_close(flat(model), flat(alone), rtol=1e-11, atol=1e-13)


def test_states_of_optimizers_with_fewer_options_load():
    """Groups without the newer flags, and a state of Adam, whose weight decay is no AdamW's."""
    model = network(torch.float64)
    torchs = torch.optim.AdamW(model.parameters())
    train(torchs, model, 3)
    state = torchs.state_dict()
    for group in state["param_groups"]:
        for flag in ("foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay", "maximize"):
            group.pop(flag, None)
    optimizer = ck.FusedAdamW(model.parameters())
    optimizer.load_state_dict(state)
    assert set(optimizer.param_groups[0]) == set(torchs.param_groups[0])
    adam = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    optimizer.load_state_dict(adam.state_dict())
    back = torch.optim.AdamW(model.parameters())
    back.load_state_dict(optimizer.state_dict())
    assert back.param_groups[0]["decoupled_weight_decay"]
    assert optimizer.param_groups[0]["decoupled_weight_decay"]
    capturable = torch.optim.AdamW(model.parameters(), capturable=True)
    optimizer.load_state_dict(capturable.state_dict())  # no number depends on it
    assert optimizer.state_dict()["param_groups"][0]["capturable"]
    train(optimizer, model, 1)


FROZEN = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "int64": torch.int64,
    "complex64": torch.complex64,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters_of_any_dtype_are_accepted_as_by_adamw(name):
    ends = []
    for make in (torch.optim.AdamW, ck.FusedAdamW):
        model = network(torch.float64)
        frozen = nn.Parameter(torch.ones(3).to(FROZEN[name]), requires_grad=False)
        optimizer = make([frozen, *model.parameters()])
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2).to(FROZEN[name]), requires_grad=False)]})
        train(optimizer, model, 5)
        merged_groups = make([frozen, *model.parameters(), *optimizer.param_groups[1]["params"]])
        merged_groups.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        merged = optimizer.state_dict()
        merged["param_groups"][0]["params"] += merged["param_groups"].pop(1)["params"]
        merged_groups.load_state_dict(merged)
        train(merged_groups, model, 5)
        assert torch.equal(frozen.to(torch.complex64), torch.ones(3, dtype=torch.complex64))
        assert frozen not in optimizer.state
        ends.append(flat(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e5m2], ids=str)
def test_trained_parameters_of_unsupported_dtypes_are_refused(dtype):
    message = (
        rf"a parameter is {dtype}; expected a real floating-point dtype of 16, 32 or 64 bits, .* another optimizer"
    )
    with pytest.raises(TypeError, match=message):
        ck.FusedAdamW([nn.Parameter(torch.zeros(2).to(dtype))])
    model = network(torch.float64)
    late = nn.Parameter(torch.zeros(2).to(dtype), requires_grad=False)
    optimizer = ck.FusedAdamW([*model.parameters(), late])
    train(optimizer, model, 1)
    late.requires_grad_()
    late.grad = torch.zeros_like(late)
    before = flat(model)
    with pytest.raises(RuntimeError, match=rf"of shape \(2,\) is {dtype} and has a gradient; .* another optimizer"):
        optimizer.step()
    assert torch.equal(flat(model), before)


def test_only_tensors_with_a_gradient_move_as_in_adamw():
    """Plain tensors, tensors that require no gradient and were given one, and empty groups."""
    ends = []
    for make in (torch.optim.AdamW, ck.FusedAdamW):
        torch.manual_seed(0)
        tensors = [torch.randn(3, dtype=torch.float64) for _ in range(4)]
        tensors[0].requires_grad_()
        optimizer = make([{"params": []}, {"params": tensors, "lr": 0.1}, {"params": []}])
        for step in range(5):
            for tensor in tensors[:3]:
                tensor.grad = torch.full_like(tensor, step - 1.5)
            if step == 3:
                tensors[0].requires_grad_(False)
            if step > 1:
                tensors[1].grad = None
            optimizer.step()
        ends.append(torch.stack([tensor.detach() for tensor in tensors]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-13, atol=1e-15)


def test_gradients_of_layouts_that_adamw_refuses_are_refused():
    for make in (torch.optim.AdamW, ck.FusedAdamW):
        embedding = nn.Embedding(4, 2, sparse=True)
        optimizer = make(embedding.parameters())
        embedding(torch.tensor([1, 1])).sum().backward()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
