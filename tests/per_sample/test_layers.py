"""Per-sample gradients in one backward pass, against one backward pass per sample: every layer, and every trap."""

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crl_kernels.backends import reference
from crl_kernels.per_sample import recorder
from crl_kernels.per_sample.sample_gradients import SampleGradients

N = 6


def by_loop(model: nn.Module, losses_of: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """name -> (N, *shape) float64, one backward pass per sample."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rows = []
    for i in range(len(batch[0])):
        loss = losses_of(model, *(x[i : i + 1] for x in batch)).sum()
        rows.append(torch.autograd.grad(loss, [p for _, p in named], allow_unused=True))
    return {
        name: torch.stack([torch.zeros_like(p) if row[k] is None else row[k] for row in rows]).double()
        for k, (name, p) in enumerate(named)
    }


def squared(model: nn.Module, *batch: Tensor) -> Tensor:
    output = model(*batch).flatten(1)
    return (output - torch.arange(output.shape[1]).cos()).square().sum(1)


def close(actual: Tensor, expected: Tensor, tolerance: float, of: Tensor | None = None) -> None:
    """Relative to the largest element; of the whole model's, if given: some gradients are zero but for rounding."""
    scale = float((expected if of is None else of).abs().max()) or 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


def check(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    losses_of: Callable[..., Tensor] = squared,
    *,
    tolerance: float = 1e-10,
    expected: dict[str, Tensor] | None = None,
    weighted: bool = True,
) -> None:
    """All statistics, with every combination of options that changes which code runs."""
    expected = by_loop(model, losses_of, batch) if expected is None else expected
    rows = torch.cat([g.flatten(1) for g in expected.values()], 1)
    mean = rows.mean(0)
    generator = torch.Generator().manual_seed(1)
    shapes = {name: p.shape for name, p in model.named_parameters() if name in expected}
    dtype = next(iter(model.parameters())).dtype
    # Views of one matrix, which is what a Fisher keeps.
    matrix = torch.randn(2, rows.shape[1], generator=generator, dtype=torch.float64).to(dtype)
    pieces = matrix.split([shape.numel() for shape in shapes.values()], 1)
    u = {name: piece.view(2, *shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
    along = torch.cat([u[name].double().flatten(1) for name in expected], 1)
    for direction, single in ((None, None), (u, None), (u, 0)):
        for reduction in ("sum", "mean"):
            model.zero_grad()
            chosen = direction if single is None else {name: tensor[single] for name, tensor in u.items()}
            options = direction is None
            with SampleGradients(model, chosen, gram=options, loss_reduction=reduction, diagonal=options) as sg:
                losses = losses_of(model, *batch)
                getattr(losses, reduction)().backward()
            close(sg.sq_norms, rows.square().sum(1), tolerance)
            for name, gradient in expected.items():
                close(sg.mean[name], gradient.mean(0), tolerance, rows)
                scale = 1 if reduction == "mean" else len(losses)
                grad = dict(model.named_parameters())[name].grad
                close(
                    torch.zeros_like(gradient[0]) if grad is None else grad / scale, gradient.mean(0), tolerance, rows
                )
                close(sg.per_layer[name].sq_norms, gradient.flatten(1).square().sum(1), tolerance, sg.sq_norms)
            if direction is None:
                close(sg.projections, rows @ mean, tolerance)
                close(sg.gram, rows @ rows.T, tolerance)
                close(sg.gram.mean(0), sg.projections, tolerance)
                close(sg.projections.mean(), mean.square().sum(), tolerance)
                close(torch.linalg.eigvalsh(sg.gram).sum(), sg.sq_norms.sum(), tolerance)
                for name, gradient in expected.items():
                    close(sg.diagonal[name], gradient.square().mean(0), tolerance, rows.square())
            else:
                close(sg.projections, rows @ (along.T if single is None else along[single]), tolerance)
    if weighted:
        check_weighted_sums(model, batch, losses_of, tolerance, expected)


def check_weighted_sums(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    losses_of: Callable[..., Tensor],
    tolerance: float,
    expected: dict[str, Tensor],
) -> None:
    """After the block's backward pass, and instead of it."""
    weights = torch.randn(3, len(batch[0]), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    largest = torch.cat([g.flatten(1) for g in expected.values()], 1)
    for after in (True, False):
        model.zero_grad()
        with SampleGradients(model) as sg:
            losses = losses_of(model, *batch)
            if after:
                losses.sum().backward(retain_graph=True)
            else:
                sums = sg.weighted_sums(losses, weights)
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        sums = sg.weighted_sums(losses, weights) if after else sums
        assert list(sums) == list(expected)
        for name, gradient in expected.items():
            close(sums[name], torch.einsum("kn,n...->k...", weights, gradient), 10 * tolerance, largest)
        for p, grad in zip(model.parameters(), grads, strict=True):
            assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)


class Called(nn.Module):
    """A module that is its own function of its parts."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def images(channels: int = 4, size: int = 7) -> tuple[Tensor]:
    return (torch.randn(N, channels, size, size + 1),)


def tokens(count: int = 9, width: int = 6) -> tuple[Tensor]:
    return (torch.randn(N, count, width),)


def ids(*shape: int, below: int = 5) -> Tensor:
    return torch.randint(below, (N, *shape))


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 1.0 if self.out_features < 0 else self.weight, self.bias).tanh()


def attention(**options: object) -> nn.Module:
    return nn.MultiheadAttention(6, 2, batch_first=True, **options)


def tied(m: nn.Module, x: Tensor) -> Tensor:
    return F.linear(m.table(x).tanh(), m.table.weight)


CASES: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "linear": lambda: (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)), (torch.randn(N, 5),)),
    "linear, tokens": lambda: (nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)), tokens()),
    "linear, changed in place": lambda: (
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)),
        tokens(),
    ),
    "linear, few tokens": lambda: (nn.Linear(6, 4), tokens(2)),
    "linear, few tokens, wide": lambda: (nn.Linear(80, 70), tokens(2, 80)),
    "conv2d, few pixels": lambda: (nn.Conv2d(16, 128, 3, stride=2, padding=1), (torch.randn(N, 16, 3, 4),)),
    "linear, 4-D input": lambda: (nn.Linear(6, 4), (torch.randn(N, 3, 5, 6),)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (torch.randn(N, 4, 11),)),
    "conv2d": lambda: (
        nn.Sequential(nn.Conv2d(4, 20, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(20, 7, 1)),
        images(),
    ),
    "conv2d, strided": lambda: (nn.Conv2d(4, 7, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), images()),
    "conv2d, groups": lambda: (nn.Conv2d(4, 6, 3, groups=2), images()),
    "conv2d, depthwise": lambda: (nn.Conv2d(4, 8, 3, groups=4, padding=1), images()),
    "conv2d, wide": lambda: (nn.Conv2d(40, 13, 3, padding=1), images(40)),
    "conv2d, same": lambda: (nn.Conv2d(4, 5, (4, 3), padding="same", dilation=(1, 2)), images()),
    "conv2d, valid": lambda: (nn.Conv2d(4, 5, 3, padding="valid"), images()),
    "conv2d, reflect": lambda: (nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), images()),
    "conv2d, circular": lambda: (nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), images()),
    "conv transpose 1d": lambda: (
        nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
        (torch.randn(N, 4, 5),),
    ),
    "conv transpose 2d": lambda: (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        images(),
    ),
    "group norm": lambda: (nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(4, 8), nn.SiLU()), images()),
    "group norm, no affine": lambda: (nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(4, 8, affine=False)), images()),
    "layer norm": lambda: (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)), tokens()),
    "layer norm, one token": lambda: (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), (torch.randn(N, 6),)),
    "layer norm, two dimensions": lambda: (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm((9, 8), bias=False)), tokens()),
    "rms norm": lambda: (nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8)), tokens()),
    "batch norm in evaluation": lambda: (nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)).eval(), images()),
    "embedding": lambda: (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), (ids(7),)),
    "embedding, padding": lambda: (nn.Sequential(nn.Embedding(5, 4, padding_idx=2), nn.Linear(4, 3)), (ids(7),)),
    "embedding, class": lambda: (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), (ids(),)),
    "class embedding beside time embedding": lambda: (
        Called(
            lambda m, x, t, y: m.out(F.silu(m.conv(x) + (m.time(t) + m.label(y))[:, :, None, None])),
            conv=nn.Conv2d(4, 6, 3),
            time=nn.Sequential(nn.Linear(3, 6), nn.SiLU(), nn.Linear(6, 6)),
            label=nn.Embedding(5, 6),
            out=nn.Conv2d(6, 4, 3),
        ),
        (*images(), torch.randn(N, 3), ids()),
    ),
    "attention": lambda: (Called(lambda m, x: m.a(x, x, x)[0], a=attention()), tokens()),
    "attention, no weights": lambda: (
        Called(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=attention()),
        tokens(),
    ),
    "attention, cross": lambda: (
        Called(lambda m, x, y: m.a(x, y, y)[0], a=attention()),
        (*tokens(), *tokens(5)),
    ),
    "attention, three inputs": lambda: (
        Called(lambda m, x, y, z: m.a(x, y, z)[0], a=attention(kdim=4, vdim=3)),
        (*tokens(), *tokens(5, 4), *tokens(5, 3)),
    ),
    "attention, tokens first": lambda: (
        Called(lambda m, x: m.a(*3 * (x.transpose(0, 1),))[0].transpose(0, 1), a=nn.MultiheadAttention(6, 2)),
        tokens(N),
    ),
    "transformer layer": lambda: (
        nn.TransformerEncoderLayer(6, 2, 11, dropout=0.0, batch_first=True, norm_first=True),
        tokens(),
    ),
    "bare parameters": lambda: (
        Called(
            lambda m, x: (x + m.position) * m.scale - m.shift,
            position=nn.Parameter(torch.randn(1, 9, 6)),
            scale=nn.Parameter(torch.randn(6)),
            shift=nn.Parameter(torch.randn(9, 1)),
        ),
        tokens(),
    ),
    "class token": lambda: (
        Called(
            lambda m, x: m.out(torch.cat([m.token.expand(len(x), -1, -1), x], 1)),
            token=nn.Parameter(torch.randn(1, 1, 6)),
            out=nn.Linear(6, 3),
        ),
        tokens(),
    ),
    "x @ W": lambda: (
        Called(
            lambda m, x: torch.stack([(x @ m.w).tanh().sum(-1), x @ m.v], -1),
            w=nn.Parameter(torch.randn(6, 4)),
            v=nn.Parameter(torch.randn(6)),
        ),
        tokens(),
    ),
    "a layer used three times": lambda: (
        Called(lambda m, x: m.lin(m.lin(m.lin(x).tanh()).tanh()), lin=nn.Linear(6, 6)),
        tokens(),
    ),
    "a norm used twice": lambda: (
        Called(lambda m, x: m.norm(m.lin(m.norm(x))), lin=nn.Linear(6, 6), norm=nn.LayerNorm(6)),
        tokens(),
    ),
    "tied weights": lambda: (Called(tied, table=nn.Embedding(5, 4)), (ids(7),)),
    "tied modules": lambda: (
        Called(lambda m, x: m.b(m.a(x).tanh()), a=(a := nn.Linear(6, 6)), b=a),
        tokens(),
    ),
    "transposed use": lambda: (Called(lambda m, x: F.linear(m.a(x), m.a.weight.t()), a=nn.Linear(6, 4)), tokens()),
    "a subclass": lambda: (nn.Sequential(Subclass(6, 4), nn.Linear(4, 2)), tokens()),
    "an expanded parameter": lambda: (
        Called(lambda m, x: F.linear(x, m.p.expand(3, 4)), p=nn.Parameter(torch.randn(4))),
        (torch.randn(N, 4),),
    ),
    "overlapping windows of a parameter": lambda: (
        Called(lambda m, x: F.linear(x, m.p.unfold(0, 4, 2)), p=nn.Parameter(torch.randn(8))),
        (torch.randn(N, 4),),
    ),
    "a parameter of no elements": lambda: (
        Called(lambda m, x: torch.cat([m.a(x), x[:, :0] * m.p], 1), a=nn.Linear(5, 4), p=nn.Parameter(torch.randn(0))),
        (torch.randn(N, 5),),
    ),
    "a parameter without a gradient": lambda: (
        Called(lambda m, x: m.a(x), a=nn.Linear(6, 4), unused=nn.Linear(3, 3)),
        tokens(),
    ),
    "frozen parameters": lambda: (
        nn.Sequential(nn.Linear(6, 5).requires_grad_(False), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)),
        tokens(),
    ),
    "channels last": lambda: (
        nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3)).to(
            memory_format=torch.channels_last
        ),
        (images()[0].to(memory_format=torch.channels_last),),
    ),
    "no samples in common size": lambda: (
        nn.Sequential(nn.Flatten(), nn.Linear(224, 3), nn.Unflatten(1, (3, 1)), nn.Flatten()),
        images(),
    ),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def prepared(case: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model, batch = CASES[case]()
    for module in model.modules():  # running statistics and affine parameters that are not all 0 and 1
        for p in [*module._parameters.values(), *module._buffers.values()]:
            if p is not None and p.is_floating_point() and p.dim() == 1:
                with torch.no_grad():
                    p.copy_(torch.rand_like(p) + 0.5)
    return model.to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)


@pytest.mark.parametrize("case", CASES)
def test_equals_one_backward_pass_per_sample(case):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "there is no rule")
        check(*prepared(case, torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_float32(case):
    model, batch = prepared(case, torch.float64)
    expected = by_loop(model, squared, batch)
    as_float32 = tuple(x.float() if x.is_floating_point() else x for x in batch)
    check(model.float(), as_float32, tolerance=1e-5, expected=expected)


# Traps


def block() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model whose middle is checkpointed by the tests below."""
    model = Called(
        lambda m, x: m.out(m.middle(m.first(x))),
        first=nn.Conv2d(4, 6, 3, padding=1),
        middle=nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 6, 3, padding=1)),
        out=nn.Conv2d(6, 3, 1),
    )
    return model.double(), tuple(x.double() for x in images())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model, batch = block()
    expected = by_loop(model, squared, batch)
    middle = model.middle
    model.function = lambda m, x: m.out(checkpoint(middle, m.first(x), use_reentrant=reentrant))
    check(model, batch, expected=expected)


def test_checkpointed_shared_weights():
    model, batch = block()
    model.function = lambda m, x: m.out(m.middle(m.middle(m.first(x))))
    expected = by_loop(model, squared, batch)
    model.function = lambda m, x: m.out(
        checkpoint(m.middle, checkpoint(m.middle, m.first(x), use_reentrant=False), use_reentrant=False)
    )
    check(model, batch, expected=expected)
    model.function = lambda m, x: m.out(checkpoint(m.middle, m.middle(m.first(x)), use_reentrant=True))
    check(model, batch, expected=expected)
    model.function = lambda m, x: m.out(
        checkpoint(m.middle, checkpoint(m.middle, m.first(x), use_reentrant=True), use_reentrant=True)
    )
    check(model, batch, expected=expected)


def test_one_sample():
    model, batch = block()
    check(model, (batch[0][:1],))


def gradients_in_float64(case: str) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    model, batch = prepared(case, torch.float64)
    expected = by_loop(model, squared, batch)
    return model, batch, torch.cat([gradient.flatten(1) for gradient in expected.values()], 1)


@pytest.mark.parametrize("case", ["conv2d", "transformer layer", "group norm", "embedding, class", "rms norm"])
def test_bfloat16_model_with_float32_statistics(case):
    model, batch, rows = gradients_in_float64(case)
    model, batch = model.bfloat16(), tuple(x.bfloat16() if x.is_floating_point() else x for x in batch)
    with SampleGradients(model, gram=True) as sg:
        squared(model, *batch).sum().backward()
    assert all(mean.dtype == torch.float32 for mean in sg.mean.values())
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    torch.testing.assert_close(sg.sq_norms, rows.square().sum(1), rtol=0.1, atol=0)
    mean = torch.cat([mean.flatten() for mean in sg.mean.values()]).double()
    assert float(F.cosine_similarity(mean, rows.mean(0), dim=0)) > 0.99
    # The statistics agree with each other far beyond bfloat16.
    torch.testing.assert_close(sg.gram.diagonal(), sg.sq_norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(sg.gram.mean(0), sg.projections, rtol=0, atol=1e-5 * float(sg.sq_norms.max()))
    torch.testing.assert_close(mean.square().sum(), sg.projections.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "case", ["conv2d", "transformer layer", "group norm", "batch norm in evaluation", "layer norm"]
)
def test_autocast(case):
    model, batch, rows = gradients_in_float64(case)
    model, batch = model.float(), tuple(x.float() for x in batch)
    with torch.autocast("cpu", torch.bfloat16):
        plain = squared(model, *batch)
    plain.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with SampleGradients(model) as sg:
        with torch.autocast("cpu", torch.bfloat16):
            losses = squared(model, *batch)
        losses.sum().backward(retain_graph=True)
    weights = torch.stack([torch.ones(N), torch.rand(N)])
    with torch.autocast("cpu", torch.bfloat16):  # which does not round the sums
        sums = sg.weighted_sums(losses, weights)
    for name, mean in sg.mean.items():
        close(sums[name][0], N * mean, 1e-5, N * mean)
    torch.testing.assert_close(losses, plain, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(sg.sq_norms, rows.square().sum(1), rtol=0.15, atol=0)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad.dtype == torch.float32
        assert float((p.grad - grad).norm()) <= 0.05 * max(float(grad.norm()), 1e-2)


def odd(m: nn.Module, x: Tensor) -> Tensor:
    return (
        m.lin(x) * torch.sigmoid(m.gate) + m.out(torch.sin(m.lin.weight.mean() * x)) + F.hardtanh(F.prelu(x, m.slope))
    )


def without_rules() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """lin.weight is used by a rule and through a function of it in the same module, gate only so; prelu has no rule."""
    model = Called(
        odd,
        lin=nn.Linear(6, 6),
        gate=nn.Parameter(torch.randn(6)),
        slope=nn.Parameter(torch.rand(1)),
        out=nn.Linear(6, 6),
    )
    return nn.Sequential(nn.Linear(6, 6), model, nn.LayerNorm(6)).double(), (tokens()[0].double(),)


def test_a_use_without_a_rule_is_said_once():
    model, batch = without_rules()
    recorder._warned.clear()
    with pytest.warns(UserWarning, match=r"no rule for the per-sample gradients of '1.slope' in prelu: .* each sample"):
        check(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, batch)
        check(model, (batch[0][:1],))


@pytest.mark.filterwarnings("ignore:there is no rule")
def test_weighted_sums_of_other_losses_than_those_of_the_statistics():
    model, (x,) = without_rules()
    expected = by_loop(model, lambda m, x: squared(m[1], x), (x,))
    with SampleGradients(model) as sg:
        first, second = squared(model[1], x), squared(model[0], x)
        (first + second).sum().backward(retain_graph=True)
    ones = torch.ones(1, N)
    assert not bool(sg.weighted_sums(second, ones)["1.gate"].any())
    with torch.no_grad():  # the pass needs no graph of its own
        close(sg.weighted_sums(first, ones)["1.gate"][0], expected["1.gate"].sum(0), 1e-10)


def test_a_module_that_is_given_its_parameter():
    inner = Called(lambda m, x, p: x * torch.sigmoid(p) + torch.sin(m.p), p=nn.Parameter(torch.randn(6)))
    model = nn.Sequential(nn.Linear(6, 6), Called(lambda m, x: m.inner(x, m.inner.p), inner=inner)).double()
    check(model, (tokens()[0].double(),))


def test_a_module_that_changes_its_input():
    model = nn.Sequential(
        nn.Linear(6, 6), Called(lambda m, x: x.add_(1) * torch.sigmoid(m.p), p=nn.Parameter(torch.randn(6)))
    ).double()
    check(model, (tokens()[0].double(),))


def test_uses_without_a_rule_in_nested_modules_are_counted_once():
    inner = Called(
        lambda m, x: x * m.p.exp() + m.q.exp() * x, p=nn.Parameter(torch.randn(6)), q=nn.Parameter(torch.rand(6))
    )
    model = Called(lambda m, x: m.inner(m.inner(x)) * m.inner.p.exp(), inner=inner).double()
    check(model, (tokens()[0].double(),))


def test_one_use_by_a_rule_and_one_elsewhere_without():
    lin = nn.Linear(6, 6)
    model = nn.Sequential(lin, Called(lambda m, x: x * m.lin.weight.mean(0).exp() + m.lin.bias.exp(), lin=lin)).double()
    check(model, (tokens()[0].double(),))


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum((0, 1))


def hidden_use() -> nn.Module:
    return Called(lambda m, x: Scale.apply(m.lin(x), m.scale), lin=nn.Linear(6, 6), scale=nn.Parameter(torch.ones(6)))


@pytest.mark.parametrize("trained", [True, False])  # whether anything else is seen
def test_what_cannot_be_seen_takes_a_pass_a_sample(trained):
    model = hidden_use().double()
    model.lin.requires_grad_(trained)
    recorder._warned.clear()
    with pytest.warns(UserWarning, match="per-sample gradients of 'scale' cannot be read.*each sample"):
        check(model, (tokens()[0].double(),))


def test_functions_without_a_rule_in_a_reentrant_checkpoint():
    model = Called(lambda m, x: F.prelu(x * m.p.exp(), m.p[:1]), p=nn.Parameter(torch.randn(6)))
    again = Called(lambda m, x: checkpoint(m.inner, m.lin(x), use_reentrant=True), lin=nn.Linear(6, 6), inner=model)
    again, x = again.double(), tokens()[0].double()
    plain = Called(lambda m, x: m.inner(m.lin(x)), lin=again.lin, inner=model)
    check(again, (x,), expected=by_loop(plain, squared, (x,)))


@pytest.mark.filterwarnings("ignore:there is no rule")
def test_layers_of_other_kinds():
    model = nn.Sequential(nn.Conv3d(2, 3, 2), nn.PReLU(3), nn.Flatten(), nn.Bilinear(24, 24, 2)).double()
    model[3] = Called(lambda m, x: m.b(x, x), b=model[3])
    check(model, (torch.randn(N, 2, 3, 3, 3).double(),))


def test_parametrised_weights():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 2)).double()
    check(model, (tokens()[0].double(),))


def test_dropout_is_no_trap_where_there_are_rules():
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double().train()
    x = tokens()[0].double()
    with SampleGradients(model, gram=True) as sg:
        squared(model, x).sum().backward()
    torch.testing.assert_close(sg.gram.sum(), sum(p.grad.square().sum() for p in model.parameters()))


@pytest.mark.parametrize("case", ["conv2d", "attention", "tied weights", "group norm", "embedding", "bare parameters"])
def test_backward_passes_after_the_block_are_ordinary(case):
    """The weighted passes that give eigenvectors of the Fisher."""
    model, batch = prepared(case, torch.float64)
    expected = by_loop(model, squared, batch)
    weights = torch.randn(N, dtype=torch.float64)
    with SampleGradients(model) as sg:
        losses = squared(model, *batch)
        losses.sum().backward(retain_graph=True)
    before = sg.sq_norms.clone()
    found = torch.autograd.grad((weights * losses).sum(), list(model.parameters()), allow_unused=True)
    for gradient, rows in zip(found, expected.values(), strict=True):
        if gradient is not None:
            close(gradient, torch.einsum("n,n...->...", weights, rows), 1e-10, rows)
    assert torch.equal(sg.sq_norms, before)


@pytest.mark.parametrize("case", ["conv2d", "conv1d", "linear, tokens", "conv2d, groups"])
@pytest.mark.parametrize("tile", [1, 500])
def test_weighted_sums_hold_few_per_sample_gradients_at_a_time(case, tile, monkeypatch):
    """Where there are many tokens; other weighted sums of layers do without."""
    model, batch = prepared(case, torch.float64)
    expected = by_loop(model, squared, batch)
    held: list[int] = []
    reference_matrix = reference.sample_weight_gradient_matrix

    def matrix(*arguments: Any) -> Tensor:
        rows = reference_matrix(*arguments)
        held.append(len(rows))
        assert len(rows) == 1 or rows.numel() <= tile
        return rows

    monkeypatch.setattr(reference, "sample_weight_gradient_matrix", matrix)
    monkeypatch.setattr("crl_kernels.per_sample.layer_gradients._TILE", tile)
    weights = torch.randn(2, N, dtype=torch.float64)
    with SampleGradients(model) as sg:
        sums = sg.weighted_sums(squared(model, *batch), weights)
    assert bool(held) == case.startswith("conv")
    for name, gradient in expected.items():
        close(sums[name], torch.einsum("kn,n...->k...", weights, gradient), 1e-10, gradient)


@pytest.mark.parametrize("case", ["linear", "linear, tokens", "attention", "embedding"])
def test_weighted_sums_of_single_samples_and_of_none(case):
    """A stratum has few of a batch's samples."""
    model, batch = prepared(case, torch.float64)
    expected = by_loop(model, squared, batch)
    largest = torch.cat([g.flatten(1) for g in expected.values()], 1)
    with SampleGradients(model) as sg:
        sums = sg.weighted_sums(squared(model, *batch), torch.eye(N + 1)[:, :N])
    for name, gradient in expected.items():
        close(sums[name][:N], gradient, 1e-10, largest)
        assert not bool(sums[name][N].any())


@pytest.mark.parametrize("case", ["conv2d", "without rules"])
def test_nothing_waits_for_the_garbage_collector(case):
    model, batch = without_rules() if case == "without rules" else prepared(case, torch.float64)
    kept: list[Any] = []
    model[0].register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    gc.disable()
    try:
        for pass_in_block in (True, False):
            with warnings.catch_warnings(), SampleGradients(model) as sg:
                warnings.simplefilter("ignore")
                losses = squared(model, *batch)
                if pass_in_block:
                    losses.sum().backward(retain_graph=True)
                else:
                    sg.weighted_sums(losses, torch.ones(1, N))
            if pass_in_block:
                sg.weighted_sums(losses, torch.ones(1, N))
            del losses
            assert kept.pop()() is None
            gone = weakref.ref(sg)
            del sg
            assert gone() is None
    finally:
        gc.enable()


def test_wrong_uses_of_weighted_sums():
    model, batch = prepared("conv2d", torch.float64)
    ones = torch.ones(1, N)
    with pytest.raises(RuntimeError, match="computed in this SampleGradients block"):
        SampleGradients(model).weighted_sums(squared(model, *batch), ones)
    with SampleGradients(model) as sg:
        losses = squared(model, *batch)
        with pytest.raises(ValueError, match=r"weights has shape \(1, 5\); expected \(K, 6\)"):
            sg.weighted_sums(losses, ones[:, 1:])
        with pytest.raises(ValueError, match=r"weights has shape \(6,\); expected \(K, 6\)"):
            sg.weighted_sums(losses, ones[0])
        with pytest.raises(ValueError, match=r"losses has shape \(\); expected \(N,\)"):
            sg.weighted_sums(losses.mean(), ones)
        losses.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="when the block has ended"):
            sg.weighted_sums(losses, ones)
    again = sg.weighted_sums(losses, ones)
    for name, mean in sg.mean.items():
        torch.testing.assert_close(again[name][0], N * mean)
    with pytest.raises(RuntimeError, match="computed in this SampleGradients block"), SampleGradients(model) as sg:
        sg.weighted_sums(torch.zeros(N, requires_grad=True), ones)
    others = squared(model, *batch)
    with SampleGradients(model) as sg:
        sg.weighted_sums(squared(model, *batch), ones)
        for losses in (torch.zeros(N, requires_grad=True), others):
            with pytest.raises(RuntimeError, match="computed in this SampleGradients block"):
                sg.weighted_sums(losses, ones)
        with pytest.raises(TypeError, match=r"weights is a list; expected a tensor \(K, 6\)"):
            sg.weighted_sums(losses, [[1.0] * N])
        with pytest.raises(TypeError, match=r"losses is a list; expected a tensor \(6,\)"):
            sg.weighted_sums([1.0] * N, ones)
    assert sg.num_samples == N


@pytest.mark.parametrize("in_block", [True, False])
def test_weighted_sums_do_not_call_hooks_on_parameters(in_block):
    model, batch = prepared("conv2d", torch.float64)
    calls: list[None] = []
    for p in model.parameters():
        p.register_hook(lambda gradient: calls.append(None) or gradient.clamp_(-1e-9, 1e-9))
    with SampleGradients(model) as sg:
        losses = squared(model, *batch)
        if in_block:
            sums = sg.weighted_sums(losses, torch.ones(1, N))
        else:
            losses.sum().backward(retain_graph=True)
    found = len(calls)
    if not in_block:
        sums = sg.weighted_sums(losses, torch.ones(1, N))
    assert len(calls) == found
    assert all(float(value.abs().max()) > 1e-3 for value in sums.values())


def test_gradients_that_were_there_are_added_to():
    model, batch = prepared("conv2d", torch.float64)
    squared(model, *batch).sum().backward()
    grads = [p.grad for p in model.parameters()]
    copies = [grad.clone() for grad in grads]
    with SampleGradients(model) as sg:
        squared(model, *batch).sum().backward()
    for p, grad, copy, mean in zip(model.parameters(), grads, copies, sg.mean.values(), strict=True):
        assert p.grad is grad
        torch.testing.assert_close(grad, 2 * copy)
        torch.testing.assert_close(mean * N, copy)


def test_nothing_is_left_behind():
    model, batch = prepared("transformer layer", torch.float64)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.grad for p in model.parameters()]

    def hooks() -> int:
        return sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
        ) + sum(len(p._backward_hooks or ()) for p in model.parameters())

    def failing() -> None:
        with SampleGradients(model):
            squared(model, *batch).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert hooks() == 0
    assert not torch.overrides._get_current_function_mode_stack()
    for p, grad in zip(model.parameters(), before, strict=True):
        assert p.grad is grad
    reference = squared(model, *batch)
    with SampleGradients(model, gram=True):
        losses = squared(model, *batch)
        losses.sum().backward()
    torch.testing.assert_close(losses, reference, rtol=1e-12, atol=0)
    assert hooks() == 0


def test_a_compiled_model_runs_eagerly():
    model, batch = prepared("conv2d", torch.float64)
    expected = by_loop(model, squared, batch)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with SampleGradients(compiled) as sg:
        squared(compiled, *batch).sum().backward()
    assert set(sg.mean) == set(expected)
    rows = torch.cat([gradient.flatten(1) for gradient in expected.values()], 1)
    close(sg.sq_norms, rows.square().sum(1), 1e-10)


def test_bitwise_run_to_run_and_for_any_number_of_threads():
    model, batch = prepared("conv2d, wide", torch.float32)

    def run() -> list[Tensor]:
        model.zero_grad()
        with SampleGradients(model, gram=True, diagonal=True) as sg:
            squared(model, *batch).sum().backward()
        return [sg.sq_norms, sg.projections, sg.gram, *sg.mean.values(), *sg.diagonal.values()]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, second = run(), run()
        torch.set_num_threads(2)
        third = run()
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_include_and_exclude():
    model, batch = prepared("conv2d", torch.float64)
    expected = by_loop(model, squared, batch)
    with SampleGradients(model, exclude=["0"]) as sg:
        squared(model, *batch).sum().backward()
    assert set(sg.mean) == {"2.weight", "2.bias"}
    rows = torch.cat([expected[name].flatten(1) for name in sg.mean], 1)
    close(sg.sq_norms, rows.square().sum(1), 1e-10)
    for name, p in model.named_parameters():
        close(p.grad, expected[name].sum(0), 1e-10)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda m, x: SampleGradients(m, loss_reduction="max"), ValueError, "loss_reduction is 'max'"),
        (
            lambda m, x: SampleGradients(m, direction=torch.ones(3)),
            TypeError,
            "direction is a Tensor; expected a mapping",
        ),
        (
            lambda m, x: SampleGradients(m, direction={"x": torch.ones(3)}),
            ValueError,
            "direction has 'x', which are no",
        ),
        (lambda m, x: SampleGradients(m, direction={}), ValueError, "direction is empty"),
        (
            lambda m, x: SampleGradients(m, direction={"bias": torch.ones(3)}),
            ValueError,
            r"has shape \(3,\); expected \(4,\)",
        ),
        (lambda m, x: SampleGradients(m, direction={"bias": 1}), TypeError, "is a int; expected a tensor"),
        (
            lambda m, x: SampleGradients(m, direction={"bias": torch.ones(4), "weight": torch.ones(2, 4, 6)}),
            ValueError,
            "different numbers K",
        ),
    ],
)
def test_bad_arguments(run, error, message):
    with pytest.raises(error, match=message):
        run(nn.Linear(6, 4), tokens()[0])


def test_bad_blocks():
    model, x = nn.Linear(6, 4), tokens()[0]
    with pytest.raises(RuntimeError, match="no gradient reached the model's parameters"), SampleGradients(model):
        model(x)
    with SampleGradients(model):
        losses = squared(model, x)
        losses.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second backward pass"):
            losses.sum().backward()
    sg = SampleGradients(model)
    with sg:
        squared(model, x).sum().backward()
    with pytest.raises(RuntimeError, match="serves one block"), sg:
        pass
    normed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False))
    with pytest.raises(ValueError, match="BatchNorm in training mode mixes the samples"), SampleGradients(normed):
        normed(x[:, 0])
