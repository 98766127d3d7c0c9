"""Derivatives of the penalties: any order, reverse and forward mode, vmap, torch.compile."""

import pytest
import torch
from helpers import device
from helpers.backends import int8_directions
from torch import nn
from torch._dynamo.utils import counters

import crl_kernels as ck
from crl_kernels.operators import definitions

SHAPES = [(3, 4), (), (5,), (0, 2), (2, 1, 3)]


def random_list(seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


DIRECTION, ANCHOR = random_list(1), random_list(2)
FISHER = [u.abs() for u in DIRECTION]
MATRIX = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))  # of per-sample gradients


def rank1(*params: torch.Tensor, lam: float | torch.Tensor = 3.0) -> torch.Tensor:
    return ck.rank1_ewc_penalty(list(params), direction=DIRECTION, curvature=0.7, anchor=ANCHOR, lam=lam)


def diagonal(*params: torch.Tensor, lam: float | torch.Tensor = 3.0) -> torch.Tensor:
    return ck.diagonal_ewc_penalty(list(params), fisher_diagonal=FISHER, anchor=ANCHOR, lam=lam)


def plain_rank1(*params: torch.Tensor) -> torch.Tensor:
    drift = sum((u * (x - m)).sum() for x, u, m in zip(params, DIRECTION, ANCHOR, strict=True))
    return 1.5 * 0.7 * drift**2


def plain_diagonal(*params: torch.Tensor) -> torch.Tensor:
    return 1.5 * sum((f * (x - m) ** 2).sum() for x, f, m in zip(params, FISHER, ANCHOR, strict=True))


PENALTIES = pytest.mark.parametrize(("penalty", "plain"), [(rank1, plain_rank1), (diagonal, plain_diagonal)])


@PENALTIES
def test_gradcheck_and_gradgradcheck(penalty, plain):
    params = [p.requires_grad_() for p in random_list(0)]
    assert torch.autograd.gradcheck(penalty, params, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(penalty, params, check_fwd_over_rev=True)


@PENALTIES
def test_lam_is_differentiable(penalty, plain):
    lam = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    penalty(*random_list(0), lam=lam).backward()
    torch.testing.assert_close(lam.grad, plain(*random_list(0)) / 3.0)


@PENALTIES
def test_transforms_equal_those_of_plain_pytorch(penalty, plain):
    params, tangents = tuple(random_list(0)), tuple(random_list(3))
    argnums = tuple(range(len(params)))
    for transformed in (
        lambda f: torch.func.grad(f, argnums)(*params),
        lambda f: torch.func.jvp(f, params, tangents),
        lambda f: torch.func.hessian(f, argnums=(0, 2))(*params),
        lambda f: torch.func.jvp(lambda *p: torch.func.grad(f, argnums)(*p), params, tangents),
        lambda f: torch.func.vmap(f)(*(torch.stack([p, 2 * p, -p]) for p in params)),
        lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(1, None, None, None, None))(
            torch.stack([params[0], 2 * params[0]], dim=1), *params[1:]
        ),
    ):
        torch.testing.assert_close(transformed(penalty), transformed(plain))


@pytest.mark.parametrize("form", ["list", "flat", "int8"])
def test_opcheck(form):
    params, flat = [p.requires_grad_() for p in random_list(0)], form == "flat"
    terms = [DIRECTION, ANCHOR]
    if flat:
        directions = [torch.cat([x.flatten() for x in u]) for u in terms]
    elif form == "list":
        directions = [x for u in terms for x in u]
    else:
        directions, _ = int8_directions(params, len(terms), torch.float32, 1)
    coefficients = torch.tensor([0.3, -2.0], dtype=torch.float64)
    one = torch.tensor(0.3, dtype=torch.float64)
    state = (FISHER, ANCHOR)
    moments = [[t.abs() for t in random_list(seed)] for seed in (5, 6)]
    adamw = (random_list(0), random_list(4), *moments, torch.rand(len(SHAPES), 8, dtype=torch.float64))
    operators = torch.ops.crl_kernels
    checks = {
        operators.low_rank_projections: (params, directions, 2),
        operators.low_rank_combine: (directions, coefficients.clone().requires_grad_(), params),
        operators.low_rank_accumulate_: (random_list(4), directions, coefficients),
        operators.low_rank_penalty_accumulate_: (
            random_list(4),
            random_list(0),
            directions,
            one.expand(2),
            coefficients,
            one,
        ),
        operators.diagonal_quadratic: (params, *state),
        operators.diagonal_gradient: (params, *state, one.clone().requires_grad_()),
        operators.diagonal_accumulate_: (random_list(4), random_list(0), *state, one),
        operators.diagonal_shrink_: (random_list(4), *state, one),
        operators.low_rank_adamw_: (*adamw, None if flat else torch.zeros(()), directions, coefficients, flat),
        operators.diagonal_adamw_: (*adamw, None if flat else torch.zeros(()), *state, flat),
        operators.sample_gradient_stats: (MATRIX, MATRIX[:2] if flat else None, flat),
        operators.sample_gram: (MATRIX,),
        operators.sample_weight_gradients: (
            *(torch.randn(3, 4, 6, 5), torch.randn(3, 6, 4, 3), (3, 3), (1, 1), (0, 0), (1, 1), 2),
            *(torch.randn(2, 6, 2, 3, 3) if flat else None, flat, not flat),
        ),
    }
    assert {str(op).removeprefix("crl_kernels.") for op in checks} == set(definitions.NAMES)
    for operator, arguments in checks.items():
        torch.library.opcheck(operator, arguments)


class Histories(nn.Module):
    """A small model with both histories, anchored away from where it stands."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2))
        named = dict(self.net.named_parameters())
        self.low_rank, self.diagonal = ck.LowRankHistory(self.net), ck.DiagonalHistory(self.net)
        self.int8 = ck.LowRankHistory(self.net)
        for _ in range(2):
            anchor = {name: torch.randn_like(p) for name, p in named.items()}
            gradient = {name: torch.randn_like(p) for name, p in named.items()}
            self.low_rank.append(ck.LowRankFisher.from_mean_gradient(gradient, 2.0, anchor))
            self.int8.append(ck.LowRankFisher.from_mean_gradient(gradient, 2.0, anchor, storage_dtype=torch.int8))
            self.diagonal.append(ck.DiagonalFisher({n: g**2 for n, g in gradient.items()}, anchor))


@pytest.mark.parametrize("kind", ["low_rank", "diagonal", "int8"])
def test_compile_fullgraph_equals_eager(kind):
    model = Histories()
    penalty = ck.diagonal_ewc_penalty if kind == "diagonal" else ck.rank1_ewc_penalty
    history = getattr(model, kind)
    x = torch.randn(6, 4)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model.net(x).square().mean() + penalty(history, lam=3.0)

    values, gradients = [], []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        value = function(x)
        value.backward()
        values.append(value.detach())
        gradients.append([p.grad.clone() for p in model.net.parameters()])
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)


def test_compilers_keep_operators_with_tables_out_of_cuda_graphs():
    """Their tables would be in the memory pool of a graph that inductor records."""
    for name, schema in zip(definitions.NAMES, definitions.SCHEMAS, strict=True):
        arguments = schema.partition(" -> ")[0]
        tags = getattr(torch.ops.crl_kernels, name).default.tags
        assert (torch.Tag.cudagraph_unsafe in tags) == ("[] " in arguments.replace("int[] ", "")), name


def test_compile_with_inductor():
    model = Histories()

    def value() -> torch.Tensor:
        return ck.rank1_ewc_penalty(model.low_rank, lam=3.0) + ck.diagonal_ewc_penalty(model.diagonal, lam=2.0)

    compiled = torch.compile(value, fullgraph=True)()
    compiled.backward()
    torch.testing.assert_close(compiled, value())
    eager = torch.autograd.grad(value(), list(model.net.parameters()))
    torch.testing.assert_close(tuple(p.grad for p in model.net.parameters()), eager)


@pytest.mark.parametrize("kind", ["low_rank", "diagonal", "int8"])
def test_gradient_of_autograd_equals_add_penalty_grad(kind):
    model = Histories().double()
    history = getattr(model, kind)
    for p in model.net.parameters():
        p.grad = torch.ones_like(p)
    value = history.add_penalty_grad_(3.0)
    autograd = history.penalty(3.0)
    torch.testing.assert_close(value, autograd.detach(), rtol=1e-12, atol=0)
    for p, g in zip(model.net.parameters(), torch.autograd.grad(autograd, list(model.net.parameters())), strict=True):
        torch.testing.assert_close(p.grad, 1 + g, rtol=1e-12, atol=1e-12)


def test_in_place_operators_bump_versions():
    """Autograd must notice that a tensor which it saved has changed."""
    model = Histories()
    weight = model.net[0].weight
    weight.grad = torch.zeros_like(weight)
    for touch, tensor in (
        (lambda: model.low_rank.add_penalty_grad_(1.0), weight.grad),
        (lambda: model.diagonal.add_penalty_grad_(1.0), weight.grad),
        (lambda: model.low_rank.decoupled_step_(1.0, 0.1), weight),
        (lambda: model.diagonal.decoupled_step_(1.0, 0.1), weight),
    ):
        before = tensor._version
        touch()
        assert tensor._version > before


KINDS = pytest.mark.parametrize(
    ("kind", "penalty"),
    [("low_rank", ck.rank1_ewc_penalty), ("int8", ck.rank1_ewc_penalty), ("diagonal", ck.diagonal_ewc_penalty)],
)


@KINDS
def test_autocast_does_not_lower_the_penaltys_precision(kind, penalty):
    model = Histories()
    history = getattr(model, kind)
    expected = penalty(history, lam=3.0)
    gradients = torch.autograd.grad(expected, list(model.net.parameters()))
    with torch.autocast(device.type_(), dtype=torch.bfloat16):
        loss = model.net(torch.randn(6, 4)).float().square().mean()
        value = penalty(history, lam=3.0)
        assert torch.equal(value, expected)
        added = history.add_penalty_grad_(3.0)
    torch.testing.assert_close(added.float(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close([p.grad for p in model.net.parameters()], list(gradients), rtol=1e-6, atol=1e-7)
    model.zero_grad()
    (loss + value).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.net.parameters())


@KINDS
def test_a_scaled_loss_scales_the_penaltys_gradient(kind, penalty):
    """With the penalty in the loss a GradScaler needs to know nothing of it."""
    model = Histories()
    history = getattr(model, kind)
    params = list(model.net.parameters())
    expected = [
        p.detach() - 0.1 * g for p, g in zip(params, torch.autograd.grad(history.penalty(3.0), params), strict=True)
    ]
    optimizer = torch.optim.SGD(params, lr=0.1)
    scaler = torch.amp.GradScaler(device.type_(), init_scale=2.0**16)
    scaler.scale(penalty(history, lam=3.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close([p.detach() for p in params], expected, rtol=1e-5, atol=1e-6)


@KINDS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(kind, penalty, use_reentrant):
    model = Histories()
    history = getattr(model, kind)
    x = torch.randn(6, 4, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model.net(x).square().mean() + penalty(history, lam=3.0)

    gradients = []
    for call in (loss, lambda x: torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        call(x).backward()
        gradients.append([p.grad.clone() for p in model.net.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@KINDS
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_lam_changes_without_recompilation(kind, penalty, backend):
    """A 0-dim tensor never recompiles; a float, at its first change only."""
    model = Histories()
    history = getattr(model, kind)
    compiled = torch.compile(lambda lam: penalty(history, lam=lam), fullgraph=True, backend=backend)
    for as_lam, recompilations in ((torch.tensor, 0), (float, 1)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for lam in (1.0, 2.5, 7.0, 0.1, 1e4):
            torch.testing.assert_close(compiled(as_lam(lam)), penalty(history, lam=lam))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1 + recompilations


@pytest.mark.parametrize("kind", ["low_rank", "diagonal", "int8"])
@pytest.mark.parametrize("entry", ["add_penalty_grad_", "decoupled_step_"])
def test_steps_change_lam_and_rate_without_recompilation(kind, entry):
    """Floats: one more graph at the first change."""

    def states(compiled: bool) -> list[torch.Tensor]:
        model = Histories()
        history = getattr(model, kind)
        for parameter in model.net.parameters():
            parameter.grad = torch.ones_like(parameter)

        def step(lam: float, lr: float) -> None:
            history.add_penalty_grad_(lam) if entry == "add_penalty_grad_" else history.decoupled_step_(lam, lr)

        call = torch.compile(step, backend="aot_eager") if compiled else step
        torch._dynamo.reset()
        counters.clear()
        for i in range(5):
            call(0.1 * (i + 1), 0.01 / (i + 1))
        return [tensor for p in model.net.parameters() for tensor in (p.detach(), p.grad)]

    plain = states(compiled=False)
    torch.testing.assert_close(states(compiled=True), plain)
    assert 0 < counters["stats"]["unique_graphs"] <= 2


@PENALTIES
def test_transforms_inside_compiled_code(penalty, plain):
    """Where a custom operator alone would give a tangent of zero."""
    params, tangents = tuple(random_list(0)), tuple(random_list(3))
    for transformed in (
        lambda f: torch.func.jvp(f, params, tangents),
        lambda f: torch.func.grad(f, (0, 2))(*params),
        lambda f: torch.func.jvp(lambda *p: torch.func.grad(f, (0, 2))(*p), params, tangents),
        lambda f: torch.func.vmap(f)(*(torch.stack([p, 2 * p, -p]) for p in params)),
    ):
        compiled = torch.compile(lambda f=penalty, t=transformed: t(f), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(), transformed(plain))


@KINDS
def test_compiled_code_around_the_in_place_entry_points(kind, penalty):
    """torch.compile of a whole training step, with the in-place penalty in it."""
    ends = []
    for compiled in (False, True):
        model = Histories()
        history = getattr(model, kind)
        optimizer = torch.optim.SGD(model.net.parameters(), lr=0.01)

        def step(x: torch.Tensor, model: Histories = model, history: ck.LowRankHistory = history) -> torch.Tensor:
            model.net(x).square().mean().backward()
            return history.add_penalty_grad_(0.1)

        call = torch.compile(step, backend="aot_eager") if compiled else step
        for i in range(3):
            optimizer.zero_grad()
            value = call(torch.randn(5, 4, generator=torch.Generator().manual_seed(i)))
            optimizer.step()
            history.decoupled_step_(0.1, 0.01)
        ends.append([value, *(p.detach() for p in model.net.parameters())])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)


def whole_step(entry: str):
    """(parameters, a training step with the penalty in it by that entry point, or with none)."""
    model = Histories()
    history = model.low_rank
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=0.01, fused=True)
    if entry.startswith("FusedAdamW"):
        decoupled = "decoupled" in entry
        optimizer = ck.FusedAdamW(model.net.parameters(), lr=0.01, history=history, lam=0.1, decoupled=decoupled)
    elif entry.startswith("attach"):
        history.attach(optimizer, 0.1, decoupled="decoupled" in entry)

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model.net(x).square().mean()
        if entry == "rank1_ewc_penalty":
            loss = loss + ck.rank1_ewc_penalty(history, lam=0.1)
        loss.backward()
        if entry == "add_penalty_grad_":
            history.add_penalty_grad_(0.1)
        optimizer.step()
        if entry == "decoupled_step_":
            history.decoupled_step_(0.1, optimizer.param_groups)
        return loss

    return list(model.net.parameters()), step


@pytest.mark.parametrize(
    "entry",
    [
        *("rank1_ewc_penalty", "add_penalty_grad_", "decoupled_step_"),
        *("attach", "attach, decoupled", "FusedAdamW", "FusedAdamW, decoupled"),
    ],
)
def test_a_compiled_training_step_breaks_no_more_than_without_a_penalty(entry):
    """torch breaks its graph at loss.backward() and around the optimizer's step; and it is the same step."""
    batches = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def breaks(entry: str) -> int:
        _, step = whole_step(entry)
        step(batches[0])  # whose moments and projections exist from now on
        torch._dynamo.reset()
        counters.clear()
        torch.compile(step, backend="eager")(batches[0])
        return sum(counters["graph_break"].values())

    plain = breaks("none")
    assert plain > 0
    assert breaks(entry) <= plain

    _, step = whole_step(entry)
    step(batches[0])
    torch._dynamo.reset()
    reasons = torch._dynamo.explain(step)(batches[0]).break_reasons
    assert reasons
    for reason in reasons:
        torchs_optimizer = reason.user_stack[-1].filename.endswith("torch/optim/optimizer.py")
        assert "Tensor.backward()" in reason.reason or torchs_optimizer, reason

    ends = []
    for compiled in (False, True):
        params, step = whole_step(entry)
        call = torch.compile(step, backend="aot_eager") if compiled else step
        ends.append([*(call(x).detach() for x in batches), *(p.detach() for p in params)])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)
