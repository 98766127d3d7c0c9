"""Models in channels_last and other memory orders have the numbers of row-major ones, and steps copy nothing."""

import copy
import math

import pytest
import torch
from helpers.backends import needs_cpu_library
from helpers.past_tasks import KINDS, MODES, flat, history_of, random_fisher, trainable
from torch import Tensor, nn

import crl_kernels as ck
from crl_kernels.backends.memory_order import in_order_of

LAM = 0.3


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Convolutions, one with a 1 x 1 kernel, which is row-major in channels_last too, and a transposed weight."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 5, 2), nn.Flatten(), nn.Linear(45, 4)
    )
    model[-1].weight.data = model[-1].weight.data.T.contiguous().T
    return model.to(dtype)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = torch.empty_like(parameter).copy_(values)


def to_row_major(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def large_copies(call) -> list[tuple[int, ...]]:
    """Shapes of the tensors of more than 30 elements that a call copies."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    shapes = [tuple(event.input_shapes[0]) for event in profile.events() if event.name == "aten::copy_"]
    return [shape for shape in shapes if math.prod(shape) > 30]


@needs_cpu_library
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])  # with int8, parameters are copied into row-major order
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_copies_nothing(kind, dtype):
    model = network(dtype).to(memory_format=torch.channels_last)
    history = history_of(model, kind)
    optimizers = [
        ck.FusedAdamW(model.parameters(), history=history, lam=LAM, decoupled=decoupled) for decoupled in (False, True)
    ]
    for seed in range(2):
        set_gradients(model, seed)
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.resync()
        optimizer.step()  # adopts what the other has written
        assert large_copies(optimizer.step) == []
    assert large_copies(lambda: history.add_penalty_grad_(LAM)) == []
    assert large_copies(lambda: history.decoupled_step_(LAM, 0.1)) == []
    assert large_copies(lambda: history.penalty(LAM)) == []
    optimizer = torch.optim.SGD([{"params": [p], "lr": 0.1 / n} for n, p in enumerate(model.parameters(), 1)])
    assert large_copies(lambda: history.decoupled_step_(LAM, optimizer.param_groups)) == []

    model[0].weight.grad = model[0].weight.grad.contiguous()
    assert large_copies(lambda: history.add_penalty_grad_(LAM)) == 2 * [(8, 3, 3, 3)]  # there and back


@KINDS
def test_gradients_have_the_orders_of_their_parameters(kind):
    model = network().to(memory_format=torch.channels_last)
    history = history_of(model, kind)
    grads = torch.autograd.grad(history.penalty(LAM), list(model.parameters()))
    assert [g.stride() for g in grads] == [p.stride() for p in model.parameters()]
    history.add_penalty_grad_(LAM)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad.stride() == parameter.stride()
        torch.testing.assert_close(parameter.grad, grad)


@KINDS
def test_compiled_gradients(kind):
    """Also where the model changes its order after the history and the compiled code have seen it."""
    torch.compiler.reset()  # which recompiles the same line for every kind
    model = network()
    history = history_of(model, kind)
    compiled = torch.compile(lambda: history.penalty(LAM), fullgraph=True, backend="aot_eager")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format)
        for penalty in (compiled, lambda: history.penalty(LAM), compiled):
            grads = torch.autograd.grad(penalty(), list(model.parameters()))
            model.zero_grad()
            history.add_penalty_grad_(LAM)
            torch.testing.assert_close(grads, tuple(p.grad for p in model.parameters()))


@KINDS
@MODES
@pytest.mark.parametrize("first", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_history_follows_its_model(kind, decoupled, first, tmp_path):
    """Whichever order it was bound in. Saved files and states by name do not depend on the order."""
    model, options = network(), {} if kind == "diagonal" else {"max_terms": 2}
    to_row_major(model)
    model.to(memory_format=first)
    history = history_of(model, kind, **options)
    before, state = flat(model), {name: tensor.clone() for name, tensor in history.state_dict().items()}
    history.save(tmp_path / "row-major")
    results = []
    for change in (
        lambda: None,
        lambda: model.to(memory_format=torch.channels_last),
        lambda: setattr(model[-1].weight, "data", model[-1].weight.data.T.contiguous().T),
        lambda: ck.flatten_parameters(model),
        lambda: model.to(memory_format=torch.channels_last),
        lambda: setattr(model[0].weight, "data", torch.stack([model[0].weight.data] * 2, -1)[..., 0]),  # with gaps
        lambda: to_row_major(model),
        lambda: model.to(memory_format=first),
    ):
        change()
        model.zero_grad()
        results.append([history.add_penalty_grad_(LAM), history.penalty(LAM).detach()])
        results[-1] += [p.grad.clone() for p in model.parameters()]
        assert_same(history.state_dict(), state)
        history.save(tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == (tmp_path / "row-major").read_bytes()
        copies = [type(history).load(tmp_path / "row-major", model), *copy.deepcopy((history, model))[:1]]
        for other in copies:
            assert_same(other.state_dict(), state)
        history.decoupled_step_(LAM, 0.1)
        results[-1].append(flat(model))
        values = before.split([p.numel() for p in model.parameters()])
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.data.copy_(value.view(parameter.shape))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-14)
    assert all(map(torch.equal, results[-1], results[0]))

    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format)
        other = type(history).load(tmp_path / "row-major", model)
        other.append(random_fisher(trainable(model), kind, 7))
        ends.append(other.state_dict())
        other.append(random_fisher(trainable(model), kind, 8))
        ends[-1] |= {"value": other.penalty(LAM).detach(), "stiffness": torch.tensor(other.stiffness(LAM, 0.1))}
    torch.testing.assert_close(ends[1]["value"], ends[0]["value"], rtol=1e-12, atol=0)
    torch.testing.assert_close(ends[1]["stiffness"], ends[0]["stiffness"], rtol=1e-12, atol=0)


@KINDS
@MODES
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_an_optimizer_follows_its_model(kind, decoupled, dtype):
    """The order changes in the middle of a run, and between a run and its continuation."""
    ends = []
    for form in ("row-major", "changes", "loads"):
        model = network(dtype)
        to_row_major(model)
        options = {"history": history_of(model, kind), "lam": LAM, "decoupled": decoupled}
        optimizer = ck.FusedAdamW(model.parameters(), **options)
        for step in range(6):
            if step == 3 and form != "row-major":
                model.to(memory_format=torch.channels_last)
            if step == 3 and form == "loads":
                state, optimizer = optimizer.state_dict(), ck.FusedAdamW(model.parameters(), **options)
                optimizer.load_state_dict(state)
            set_gradients(model, step)
            optimizer.step()
        for parameter in model.parameters():
            shaped = [tensor for name, tensor in optimizer.state[parameter].items() if name != "step"]
            assert all(in_order_of(tensor, parameter) is tensor for tensor in shaped)
        ends.append(torch.cat([optimizer.state[p].get("master", p).detach().flatten() for p in model.parameters()]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-6 * LAM)


def test_terms_are_merged_in_compiled_code_as_in_eager():
    """After a penalty, which keeps the parts of the old directions."""
    merged = []
    for compiled in (False, True):
        model = network().to(memory_format=torch.channels_last)
        history = history_of(model, "low_rank")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        before = history.penalty(LAM)
        merge = torch.compile(history._merge, backend="eager") if compiled else history._merge
        merge(len(history) - 1)
        merged.append(history.penalty(LAM))
        assert 0 < merged[-1] < before * 1.001
    torch.testing.assert_close(*merged)


def test_a_strided_parameter_of_one_row_in_compiled_code():
    """Of several lengths: its shape is that of a row."""

    def penalty(parameter: Tensor, direction: Tensor, anchor: Tensor) -> Tensor:
        return ck.rank1_ewc_penalty(parameter, lam=LAM, direction=direction, curvature=1.0, anchor=anchor)

    gradient = torch.compile(torch.func.grad(penalty), backend="eager", fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for n in (6, 8, 9):
        theta, u, anchor = (torch.randn(1, 2 * n, generator=generator, dtype=torch.float64)[:, ::2] for _ in range(3))
        torch.testing.assert_close(gradient(theta, u, anchor), LAM * ((theta - anchor) * u).sum() * u)


def test_penalties_of_raw_tensors():
    model = network()
    generator = torch.Generator().manual_seed(0)
    row_major = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
    params = list(model.to(memory_format=torch.channels_last).parameters())
    parts = [torch.empty_like(p).copy_(u) for p, u in zip(params, row_major, strict=True)]
    flat_u = torch.cat([u.flatten() for u in row_major])
    theta = flat(model)
    for u in (row_major, parts, flat_u):
        value = ck.rank1_ewc_penalty(params, lam=LAM, direction=u, curvature=2.0, anchor_projection=0.5)
        torch.testing.assert_close(value, LAM * (flat_u @ theta - 0.5).square(), rtol=1e-12, atol=0)
        squares = u.abs() if isinstance(u, Tensor) else [part.abs() for part in u]
        value = ck.diagonal_ewc_penalty(params, lam=LAM, fisher_diagonal=squares, anchor=u)
        torch.testing.assert_close(value, LAM / 2 * (flat_u.abs() @ (theta - flat_u).square()), rtol=1e-12, atol=0)
