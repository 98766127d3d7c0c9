"""The material that peers test themselves with, and their Gramians and second moments.

Layers, shapes and architectures are those of the peers' own tests, rewritten here: the parameter grids of Opacus's
grad-sample tests, BackPACK's problems and TorchJD's architectures. All are held to one float64 backward pass per
sample, and need no peer but for the layers that are Opacus's own. TorchJD's Gramian and BackPACK's second moments then
say the same of them (``pip install crl-kernels[peers]``).

Left out, with the reason:

- Opacus: batches of no sample (a mean over none is no number); ghost norms, accountants, data loaders, optimizers and
  unfold2d (no per-sample gradients of a model); layers against torch's (they are Opacus's own).
- BackPACK: Jacobians of single layers by their inputs, second-order quantities and their Monte Carlo samples (GGN,
  Hessian, KFAC: no gradients), WideResNet50 (memory), the converter's own errors.
- TorchJD: AlexNet, SqueezeNet, both MobileNets and the large Transformer (memory: each is the same layers as others
  here, hundreds of times over), InstanceNorm ResNet18 at 224 pixels (here at 64); modules without any output for the
  losses alone are covered by those whose output is not used; autojac and aggregators (no per-sample gradients).
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.by_loop import Parts, assert_close, assert_statistics, flat, rows_by_loop, swap
from helpers.peers import lines, peer
from torch import Tensor, nn
from torch.nn.utils import rnn

from crl_kernels import SampleGradients

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore"),  # of slow ways to a gradient, small batches, and the peers' own
]
TOLERANCE = 1e-9


def squared(output: Tensor) -> Tensor:
    return output.flatten(1).square().sum(1)


def assert_right(model: nn.Module, losses: Callable[[], Tensor]) -> SampleGradients:
    rows = rows_by_loop(model, losses())
    with SampleGradients(model, gram=True, diagonal=True) as sg:
        losses().sum().backward()
    assert_statistics(sg, rows, TOLERANCE)
    return sg


# Opacus: layers of parameters drawn from grids

DRAWS = 80
Choice = dict[str, Any]
Layer = Callable[..., tuple[nn.Module, Tensor] | None]  # None: no such layer


def laid_out(module: nn.Module, batch_first: bool) -> nn.Module:
    """From and to (N, T, ...), whatever the module takes."""
    return Parts(lambda m, x: m.layer(x) if batch_first else swap(m.layer(swap(x))), layer=module)


def convolution(
    kind: type[nn.Module], n: int, c: int, wider: bool, w: int, h: int = 0, d: int = 0, **options: Any
) -> Any:
    out = 2 * c if wider else max(1, c // 2)
    if c % options["groups"] or out % options["groups"] or (options["padding"] == "same" and options["stride"] != 1):
        return None
    return kind(c, out, **options), torch.randn(n, c, *(size for size in (d, h, w) if size))


def linear(n: int, t: int, h: int, w: int, dims: int, bias: bool, batch_first: bool = True) -> Any:
    if dims == 2 and not batch_first:
        return None
    x = torch.randn(*{2: (n, w), 3: (n, t, w), 4: (n, t, h, w)}[dims])
    return laid_out(nn.Linear(w, w + 2, bias=bias), batch_first), x


def embedding(n: int, t: int, q: int, r: int, v: int, d: int, dims: int, batch_first: bool = True) -> Any:
    return laid_out(nn.Embedding(v, d), batch_first), torch.randint(v, (n, t, q, r)[:dims])


def embedding_bag(n: int, longest: int, v: int, d: int, mode: str) -> Any:
    sizes = torch.randint(1, longest + 1, (n,))
    ids = torch.cat([torch.randperm(v)[:size] for size in sizes])
    bag = nn.EmbeddingBag(v, d, mode=mode)
    return Parts(lambda m, x: m.bag(x, sizes.cumsum(0) - sizes), bag=bag), ids


def group_norm(n: int, c: int, h: int, w: int, groups: int | str) -> Any:
    groups = c if groups == "c" else groups
    return None if c % groups else (nn.GroupNorm(groups, c), torch.randn(n, c, h, w))


def instance_norm(kind: type[nn.Module], n: int, c: int, w: int, h: int = 0, z: int = 0) -> Any:
    return kind(c, affine=True), torch.randn(*(size for size in (n, c, z, h, w) if size))


def last_dims_norm(kind: type[nn.Module], n: int, z: int, h: int, w: int, dims: int, normed: int) -> Any:
    shape = {2: (w,), 3: (z, w), 4: (z, h, w)}[dims]
    return None if normed >= dims else (kind(shape[-normed:]), torch.randn(n, *shape))


def recurrent(
    kind: type[nn.Module],
    n: int,
    t: int,
    d: int,
    h: int,
    batch_first: bool,
    packed: bool,
    ordered: bool,
    **options: Any,
) -> Any:
    layer = kind(d, h, batch_first=batch_first, **options)
    x = torch.randn(n, t, d)
    if not packed:
        return laid_out(Parts(lambda m, x: m.r(x)[0], r=layer), batch_first), x
    lengths = torch.randint(1, t + 1, (n,))
    lengths = lengths.sort(descending=True).values if ordered else lengths

    def function(m: Parts, x: Tensor) -> Tensor:
        given = rnn.pack_padded_sequence(x if batch_first else swap(x), lengths, batch_first, enforce_sorted=ordered)
        return rnn.pad_packed_sequence(m.r(given)[0], batch_first=True)[0]

    return Parts(function, r=layer), x


def attention(
    kind: type[nn.Module], n: int, t: int, heads: int, own_dims: bool, batch_first: bool, **options: Any
) -> Any:
    dims = {"kdim": 4, "vdim": 4} if own_dims else {}
    layer = kind(4, heads, **dims, **options, batch_first=batch_first)
    return laid_out(Parts(lambda m, x: m.a(*x.unbind(-1))[0], a=layer), batch_first), torch.randn(n, t, 4, 3)


def sequence_bias(n: int, t: int, d: int, batch_first: bool) -> Any:
    layer = peer("opacus.layers").SequenceBias(d, batch_first)
    return laid_out(layer, batch_first), torch.randn(n, t, d)


def of_opacus(builder: Layer, name: str) -> Layer:
    return lambda **choice: builder(getattr(peer("opacus.layers"), name), **choice)


NORM = {"n": range(1, 5), "z": range(1, 5), "h": range(1, 4), "w": range(5, 11), "dims": (2, 3, 4), "normed": (1, 2, 3)}
BOTH = (False, True)
RNN = {
    **{"n": range(1, 4), "t": range(1, 4), "d": (4, 5), "h": (8, 9, 10), "num_layers": (1, 2), "bias": BOTH},
    **{"bidirectional": BOTH, "packed": BOTH, "ordered": BOTH},
}
ATTENTION = {
    **{"n": range(1, 5), "t": range(16, 21), "heads": (1, 2), "bias": BOTH, "add_bias_kv": BOTH},
    **{"add_zero_attn": BOTH, "own_dims": BOTH},
}
CONV = {"n": range(1, 5), "c": (1, 3, 32), "wider": BOTH}
FLAT = {"n": range(1, 5), "c": (1, 2, 3), "w": range(5, 11)}
IN_BATCH_ORDER: dict[str, tuple[Layer, dict[str, Any]]] = {
    "Conv1d": (
        partial(convolution, nn.Conv1d),
        {
            **CONV,
            **{"w": range(6, 11), "kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1, 2, "same", "valid")},
            **{"dilation": (1, 2), "groups": range(1, 13)},
        },
    ),
    "Conv2d": (
        partial(convolution, nn.Conv2d),
        {
            **CONV,
            **{"h": range(11, 18), "w": range(11, 18), "kernel_size": (2, 3, 4), "stride": (1, 2)},
            **{"padding": (0, 2, "same", "valid"), "dilation": (1, 2, 3), "groups": range(1, 17)},
        },
    ),
    "Conv3d": (
        partial(convolution, nn.Conv3d),
        {
            **CONV,
            **{"d": range(3, 7), "h": range(6, 11), "w": range(6, 11), "kernel_size": (2, 3, (1, 2, 3))},
            **{"stride": (1, 2, (1, 2, 3)), "padding": (0, 2, (1, 2, 3), "same", "valid"), "dilation": (1, (1, 2, 2))},
            "groups": range(1, 17),
        },
    ),
    "EmbeddingBag": (
        embedding_bag,
        {"n": range(4, 9), "longest": range(3, 8), "v": range(10, 33), "d": range(10, 18), "mode": ("sum", "mean")},
    ),
    "GroupNorm": (
        group_norm,
        {"n": range(1, 5), "c": range(1, 9), "h": range(5, 11), "w": range(4, 9), "groups": (1, 4, "c")},
    ),
    "InstanceNorm1d": (partial(instance_norm, nn.InstanceNorm1d), FLAT),
    "InstanceNorm2d": (partial(instance_norm, nn.InstanceNorm2d), {**FLAT, "h": range(4, 9)}),
    "InstanceNorm3d": (partial(instance_norm, nn.InstanceNorm3d), {**FLAT, "h": range(4, 9), "z": range(1, 5)}),
    "LayerNorm": (partial(last_dims_norm, nn.LayerNorm), NORM),
    "RMSNorm": (partial(last_dims_norm, nn.RMSNorm), NORM),
}
IN_ANY_ORDER: dict[str, tuple[Layer, dict[str, Any]]] = {
    "Linear": (
        linear,
        {"n": range(1, 5), "t": range(1, 5), "h": (1, 2, 3), "w": range(10, 18), "dims": (2, 3, 4), "bias": BOTH},
    ),
    "Embedding": (
        embedding,
        {
            **{"n": range(1, 5), "t": range(1, 6), "q": range(1, 5), "r": (1, 2), "v": range(2, 33)},
            **{"d": range(10, 18), "dims": (2, 3, 4)},
        },
    ),
    "RNN": (partial(recurrent, nn.RNN), RNN),
    "GRU": (partial(recurrent, nn.GRU), RNN),
    "LSTM": (partial(recurrent, nn.LSTM), RNN),
    "DPRNN": (of_opacus(recurrent, "DPRNN"), RNN),
    "DPGRU": (of_opacus(recurrent, "DPGRU"), RNN),
    "DPLSTM": (of_opacus(recurrent, "DPLSTM"), RNN),
    "MultiheadAttention": (partial(attention, nn.MultiheadAttention), ATTENTION),
    "DPMultiheadAttention": (of_opacus(attention, "DPMultiheadAttention"), ATTENTION),
    "SequenceBias": (sequence_bias, {"n": range(1, 5), "t": range(10, 21), "d": range(4, 9)}),
}
GRIDS = [
    *((kind, "batch-first") for kind in IN_BATCH_ORDER | IN_ANY_ORDER),
    *((kind, order) for kind in IN_ANY_ORDER for order in ("sequence-first", "batch-first, T = N",
        "sequence-first, T = N")),
]  # fmt: skip


def draws(kind: str, order: str) -> Iterator[tuple[Choice, nn.Module, Tensor]]:
    """The same in each run."""
    build, grid = (IN_BATCH_ORDER | IN_ANY_ORDER)[kind]
    generator = random.Random(f"{kind} {order}")
    count = 0
    while count < DRAWS:
        choice = {name: generator.choice(values) for name, values in grid.items()}
        if kind in IN_ANY_ORDER:
            choice["batch_first"] = order.startswith("batch-first")
        if order.endswith("T = N"):
            choice["n"] = choice["t"] = generator.randint(2, 6)
        try:
            built = build(**choice)
            if built is None:
                continue
            model, x = built
            model(x)
        except RuntimeError as error:  # a kernel larger than the image
            if "Kernel size" not in str(error):
                raise
            continue
        count += 1
        yield choice, model, x


@pytest.mark.parametrize(("kind", "order"), GRIDS)
def test_grids_of_opacus(kind, order, record_property):
    wrong = []
    for choice, model, x in draws(kind, order):
        try:
            assert_right(model, lambda model=model, x=x: squared(model(x)))
        except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
            wrong.append(f"{choice}: {type(error).__name__}: {error}")
    record_property("count", f"Opacus's {kind}, {order}: {DRAWS - len(wrong)} of {DRAWS} right")
    assert not wrong, f"{len(wrong)} of {DRAWS} are wrong, the first {wrong[0]}"


# BackPACK: problems

Problem = tuple[nn.Module, Tensor, str]  # a model, inputs, a loss


def after(layer: nn.Module, x: Tensor, *more: nn.Module) -> Problem:
    """The layer, an activation, and a last layer that is frozen."""
    body = nn.Sequential(layer, *(more or (nn.ReLU(),)), nn.Flatten())
    last = nn.Linear(body(x).shape[1], 5).requires_grad_(False)
    return nn.Sequential(*body, last), x, "classes"


def layers_of(
    kind: type[nn.Module], *cases: tuple[tuple[int, ...], tuple[Any, ...]]
) -> dict[str, Callable[[], Problem]]:
    return {
        f"{kind.__name__}{arguments} on {shape}": lambda shape=shape, arguments=arguments: after(
            kind(*arguments), torch.rand(shape)
        )
        for shape, arguments in cases
    }


def pooled(dims: int, kind: str, size: int, *arguments: Any) -> Problem:
    conv, pool = getattr(nn, f"Conv{dims}d")(3, 2, 2), getattr(nn, f"{kind}Pool{dims}d")(*arguments)
    return after(conv, torch.rand(3, 3, *[size] * dims), nn.ReLU(), pool)


def evaluated(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers)
    for layer in model:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight)
            nn.init.uniform_(layer.bias)
    return model.eval()


def first_output(layer: nn.RNNBase, channels_first: bool) -> nn.Module:
    return Parts(lambda m, x: m.r(x)[0].mT if channels_first else m.r(x)[0], r=layer)


def characters(kind: type[nn.RNNBase]) -> Problem:
    """A model of characters; dropout does nothing in evaluation mode."""
    parts = {"e": nn.Embedding(25, 16), "r": kind(16, 16, 2, batch_first=True, dropout=0.36), "o": nn.Linear(16, 25)}
    for name in ("bias_ih_l0", "bias_ih_l1"):
        getattr(parts["r"], name).requires_grad_(False)
    return Parts(lambda m, x: m.o(m.r(m.e(x))[0]).mT, **parts).eval(), torch.randint(25, (8, 15)), "classes"


def added(m: Parts, x: Tensor) -> Tensor:
    h = m.a(x)
    b, c = m.b(h), m.c(h)
    return F.relu(b + c).add(c)


def resnet18(norm: Callable[..., nn.Module], size: int) -> Problem:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed (extra trainer)")
    model = models.resnet18(num_classes=4, norm_layer=norm).eval()
    model.layer4.requires_grad_(False)  # three quarters of the parameters, and nothing that the others lack
    return model, torch.rand(2, 3, size, size), "squares"


BACKPACK: dict[str, Callable[[], Problem]] = {
    "one layer": lambda: (lines(10, 5), torch.rand(3, 10), "classes"),
    "two layers": lambda: (lines(10, 7, 5), torch.rand(3, 10), "classes"),
    "two layers, ReLU": lambda: (lines(10, 7, 5, between=nn.ReLU), torch.rand(3, 10), "classes"),
    "two layers, sigmoid": lambda: (lines(10, 7, 5, between=nn.Sigmoid), torch.rand(3, 10), "squares"),
    **{
        f"{len(shape) - 2} more dimensions, {loss}": lambda shape=shape, loss=loss: (
            lines(5, 3, 2, between=nn.Sigmoid, flatten=loss == "classes"), torch.rand(shape), loss,
        )
        for shape in ((3, 4, 5), (3, 4, 2, 5), (3, 4, 2, 3, 5))
        for loss in ("squares", "classes")
    },
    "classes of many dimensions": lambda: (lines(5, 3, 2, between=nn.ReLU), torch.rand(3, 4, 2, 3, 5), "classes"),
    "soft binary labels": lambda: (lines(6, 4, 1, between=nn.ReLU), torch.rand(3, 6), "binary"),
    **layers_of(
        nn.Conv1d, ((3, 3, 7), (3, 2, 2)), ((3, 2, 7), (2, 3, 2, 2, 0, 2)), ((3, 3, 7), (3, 2, 2, 2, 1)),
        ((3, 3, 8), (3, 6, 2, 4, 2, 3)), ((3, 3, 7), (3, 2, 2, 4, 2, 1, 1, False)), ((3, 6, 7), (6, 4, 2, 1, 0, 1, 2)),
        ((3, 3, 7), (3, 9, 2, 1, 1, 1, 3, False)), ((3, 4, 7), (4, 8, 2, 1, 1, 1, 4, False)),
        ((1, 3, 8), (3, 6, 2, 4, 2, 3, 3)),
    ),
    **layers_of(
        nn.Conv2d, ((3, 3, 7, 7), (3, 2, 2)), ((3, 2, 7, 7), (2, 3, 2, 2, 0, 2)), ((3, 3, 7, 7), (3, 2, 2, 2, 1)),
        ((3, 3, 8, 8), (3, 6, 2, 4, 2, 3)), ((3, 3, 7, 7), (3, 2, 2, 4, 2, 1, 1, False)),
        ((3, 6, 7, 5), (6, 3, 2, 1, 0, 1, 3)),
        ((3, 4, 7, 7), (4, 12, 2, 1, 1, 1, 4)), ((3, 6, 7, 7), (6, 9, 2, 1, 1, 1, 3)),
        ((1, 2, 8, 8), (2, 4, 2, 4, 2, 3, 2)),
    ),
    **layers_of(
        nn.Conv3d, ((3, 3, 2, 7, 7), (3, 2, 2)), ((3, 2, 3, 7, 7), (2, 3, 2, 2, 0, 2)),
        ((3, 3, 2, 7, 7), (3, 2, 2, 3, 2)),
        ((3, 3, 4, 8, 8), (3, 6, 2, 4, 2, 3)), ((3, 3, 2, 7, 7), (3, 2, 2, 4, 2, 1, 1, False)),
        ((3, 4, 7, 5, 6), (4, 2, 2, 1, 0, 2, 2)),
    ),
    **layers_of(
        nn.ConvTranspose1d, ((3, 3, 7), (3, 2, 2)), ((3, 2, 7), (2, 3, 2, 2, 0, 0, 1, True, 2)),
        ((3, 3, 7), (3, 2, 2, 2, 1)),
        ((3, 3, 8), (3, 6, 2, 4, 2, 0, 1, True, 3)), ((3, 3, 7), (3, 2, 2, 4, 2, 0, 1, False)),
        ((3, 6, 8), (6, 3, 2, 4, 2, 0, 3, True, 3)),
    ),
    **layers_of(
        nn.ConvTranspose2d, ((3, 3, 7, 7), (3, 2, 2)), ((3, 2, 9, 9), (2, 4, 2, 1, 0, 0, 1, True, 2)),
        ((3, 3, 7, 7), (3, 2, 2, 2, 1)),
        ((3, 3, 7, 7), (3, 2, 2, 4, 2, 0, 1, False)), ((3, 4, 9, 9), (4, 2, 2, 1, 0, 0, 2, True, 2)),
    ),
    **layers_of(
        nn.ConvTranspose3d, ((3, 3, 2, 7, 7), (3, 2, 2)), ((3, 2, 3, 5, 5), (2, 3, 2, 2, 2, 0, 1, True, 2)),
        ((3, 3, 2, 7, 7), (3, 2, 2, 4, 2, 0, 1, False)), ((3, 4, 3, 5, 5), (4, 2, (2, 2, 1), 2, 2, 0, 2, True, 2)),
    ),
    **{
        f"{act.__name__} after a convolution{' without bias' * (not bias)}": lambda act=act, bias=bias: after(
            nn.Conv2d(3, 2, 2, bias=bias), torch.rand(3, 3, 7, 7), act()
        )
        for act in (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.LogSigmoid, nn.ELU, nn.SELU)
        for bias in BOTH
    },
    **{
        f"{kind}Pool{dims}d{arguments}": partial(pooled, dims, kind, size, *arguments)
        for dims in (1, 2, 3)
        for kind, size, arguments in (
            ("Max", 11 if dims == 2 else 7, (2, 1)), ("Max", 7, (2, 1, 0, 2)), ("Max", 7, (2, 1, 0, 2, False, True)),
            ("Avg", 11 if dims == 2 else 7, (2, 1)), ("Avg", 7, (2, 1, 0, True)), ("Avg", 7, (2, 1, 0, False)),
            ("AdaptiveAvg", 7, (2,)),
        )
    },
    "zeros around, then strides": lambda: (
        nn.Sequential(nn.Conv2d(3, 2, 2), nn.ConstantPad2d((1, 1, 0, 2), 0.0), nn.Conv2d(2, 2, 3, 2), nn.Flatten(),
        nn.Linear(8, 2)),
        torch.rand(5, 3, 4, 4), "squares",
    ),
    "ones around, channels too": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), Parts(lambda m, x: F.pad(x, (1, 1, 2, 0, 1, 2), value=1.0)),
            nn.Conv2d(5, 2, 3, 2),
            nn.ReLU(), nn.Flatten(), nn.Linear(8, 3),
        ),
        torch.rand(5, 3, 4, 4), "classes",
    ),
    "slices": lambda: (
        nn.Sequential(nn.Conv2d(3, 2, 2, padding=1), Parts(lambda m, x: x[:, 0, ::2, :2]), nn.ReLU(), nn.Flatten(),
        nn.Linear(6, 4)),
        torch.rand(3, 3, 4, 5), "classes",
    ),
    "slices of slices": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 2, 2, padding=1), Parts(lambda m, x: x[:, :, 2]), nn.ReLU(), Parts(lambda m, x: x[:, 1]),
            nn.Linear(6, 4)
        ),
        torch.rand(3, 3, 4, 5), "squares",
    ),
    "BatchNorm1d": lambda: (evaluated(nn.BatchNorm1d(3)), torch.rand(2, 3, 4), "classes"),
    "BatchNorm2d": lambda: (evaluated(nn.BatchNorm2d(2)), torch.rand(3, 2, 4, 3), "classes"),
    "BatchNorm3d": lambda: (evaluated(nn.BatchNorm3d(3)), torch.rand(3, 3, 4, 1, 2), "classes"),
    "BatchNorm3d thrice": lambda: (
        evaluated(nn.BatchNorm3d(3), nn.Linear(2, 3), nn.BatchNorm3d(3), nn.ReLU(), nn.BatchNorm3d(3)),
        torch.rand(3, 3, 4, 1, 2), "classes",
    ),
    "RNN, classes of tokens": lambda: (first_output(nn.RNN(6, 3, batch_first=True), True), torch.rand(8, 5, 6),
        "classes"),
    "RNN, squares": lambda: (first_output(nn.RNN(6, 3, batch_first=True), True), torch.rand(8, 5, 6), "squares"),
    "LSTM": lambda: (nn.Sequential(first_output(nn.LSTM(3, 4, batch_first=True), False), nn.Flatten()),
        torch.rand(4, 5, 3), "classes"),
    "Embedding of samples": lambda: (nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4)), torch.randint(5, (6,)),
        "classes"),
    "Embedding of rows": lambda: (nn.Sequential(nn.Embedding(3, 5), nn.Flatten()), torch.randint(3, (4, 2, 2)),
        "classes"),
    "characters by LSTM": lambda: characters(nn.LSTM),
    "characters by RNN": lambda: characters(nn.RNN),
    "ResNet18": lambda: resnet18(nn.BatchNorm2d, 7),
    "activation in place": lambda: (nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True), nn.Linear(2, 2)),
        torch.rand(3, 3), "squares"),
    "one activation thrice": lambda: (
        Parts(lambda m, x: m.r(m.b(m.r(m.a(m.r(x))))), r=nn.ReLU(), a=nn.Linear(3, 2), b=nn.Linear(2, 2)),
        torch.rand(3, 3), "squares",
    ),
    "flattened by function and by method": lambda: (
        Parts(lambda m, x: m.b(torch.flatten(m.a(x), 2)).flatten(1), a=nn.Linear(4, 3), b=nn.Linear(6, 3)),
        torch.rand(3, 2, 2, 4), "squares",
    ),
    "multiplied by numbers": lambda: (Parts(lambda m, x: (0.5 * m.a(x * 2.5)).multiply(3.1415), a=nn.Linear(4, 3)),
        torch.rand(2, 4), "squares"),
    "two branches added": lambda: (
        Parts(added, a=nn.Linear(3, 3), b=nn.Linear(3, 2), c=nn.Linear(3, 2)), torch.rand(3, 3), "squares",
    ),
    "permuted": lambda: (
        Parts(lambda m, x: torch.permute(m.b(m.a(x).permute(0, 2, 1)), (0, 2, 1)), a=nn.Linear(3, 2),
        b=nn.Linear(5, 2)), torch.rand(3, 5, 3), "classes",
    ),
    "transposed": lambda: (
        Parts(lambda m, x: torch.transpose(m.b(m.a(x).transpose(1, 2)), 1, 2), a=nn.Linear(3, 2), b=nn.Linear(5, 3)),
        torch.rand(3, 5, 3), "classes",
    ),
}  # fmt: skip


def losses_of(model: nn.Module, x: Tensor, loss: str) -> Callable[[], Tensor]:
    """Of random targets; a factor is all that a mean in place of a sum would change."""
    with torch.no_grad():
        output = model(x)
    if loss == "classes":
        target = torch.randint(output.shape[1], (len(x), *output.shape[2:]))
        return lambda: F.cross_entropy(model(x), target, reduction="none").reshape(len(x), -1).sum(1)
    target = torch.rand_like(output)
    error = F.mse_loss if loss == "squares" else F.binary_cross_entropy_with_logits
    return lambda: error(model(x), target, reduction="none").flatten(1).sum(1)


@pytest.mark.parametrize("name", BACKPACK)
def test_problems_of_backpack(name):
    model, x, loss = BACKPACK[name]()
    assert_right(model, losses_of(model, x, loss))


# It changes a hook's output, which is a view; BackPACK's converter makes another model of it; BackPACK has recurrent
# layers of one layer only.
NOT_FOR_BACKPACK = {"activation in place", "ResNet18", "characters by LSTM", "characters by RNN"}


@pytest.mark.parametrize("name", [name for name in BACKPACK if name not in NOT_FOR_BACKPACK])
def test_second_moments_of_backpack(name):
    """SumGradSquared is N times the diagonal, and BatchL2Grad the square norms, wherever BackPACK has them: of weights
    with groups, the latter are wrong (test_peers.py)."""
    backpack, extensions = peer("backpack"), peer("backpack.extensions")
    model, x, loss = BACKPACK[name]()
    losses = losses_of(model, x, loss)
    with SampleGradients(model, diagonal=True) as sg:
        losses().sum().backward()
    backpack.extend(model)
    with backpack.backpack(extensions.SumGradSquared(), extensions.BatchL2Grad()):
        losses().sum().backward()
    grouped = any(getattr(module, "groups", 1) > 1 for module in model.modules())
    computed = {n: p for n, p in model.named_parameters() if hasattr(p, "sum_grad_squared")}
    assert computed
    for parameter_name, p in computed.items():
        assert_close(
            sg.diagonal[parameter_name], p.sum_grad_squared / len(x), TOLERANCE, f"diagonal[{parameter_name!r}]"
        )
        if not grouped or p.dim() == 1:
            assert_close(sg.per_layer[parameter_name].sq_norms, p.batch_l2, TOLERANCE, f"per_layer[{parameter_name!r}]")


# TorchJD: architectures

SIZE = 4  # of a batch


def nested() -> nn.Module:
    inner = nn.Sequential(nn.Sequential(nn.Linear(9, 10), nn.ReLU()), nn.Linear(10, 11))
    return nn.Sequential(
        nn.Sequential(nn.Sequential(inner, nn.ReLU(), nn.Linear(11, 12)), nn.ReLU(), nn.Linear(12, 13)),
        nn.Linear(13, 14),
    )


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / shape[0] ** 0.5)


def matrices(*shapes: tuple[int, int]) -> dict[str, nn.Parameter]:
    """Of the module itself: TorchJD does not see those of a ParameterList, which nobody calls."""
    return {f"w{i}": matrix(*shape) for i, shape in enumerate(shapes)}


def tree_to_tree() -> nn.Module:
    """A module from a tree of tensors to one."""

    def function(m: Parts, tree: dict[str, Any]) -> dict[str, Any]:
        ((a, (b, c)), d), e = tree["one"], tree["two"]
        return {"first": (a @ m.w0, [b @ m.w1, c @ m.w2]), "second": d @ m.w3, "third": ([(e @ m.w4,)],)}

    inner = Parts(function, **matrices((2, 5), (3, 6), (4, 7), (2, 8), (3, 9)))

    def outer(m: Parts, x: Tensor) -> Tensor:
        a, b, c, d, e = x.split([2, 3, 4, 2, 3], 1)
        out = m.inner({"one": [(a, [b, c]), d], "two": e})
        return torch.cat([out["first"][0], *out["first"][1], out["second"], out["third"][0][0][0]], 1)

    return Parts(outer, inner=inner)


def mixed_tree(keyword: bool) -> nn.Module:
    """A module whose argument is a tree of tensors, numbers and strings."""
    inner = Parts(
        lambda m, tree: tree["one"][0][1] * tree["one"][0][0] @ m.w0 + tree["two"] @ m.w1 * tree["three"],
        **matrices((4, 3), (6, 3)),
    )

    def outer(m: Parts, x: Tensor) -> Tensor:
        a, b = m.linear(x).split([4, 6], 1)
        tree = {"zero": "unused", "one": [(a, 0.2, "unused")], "two": b, "three": 0.5}
        return m.inner.function(m.inner, tree=tree) if keyword else m.inner(tree)

    return Parts(outer, linear=nn.Linear(10, 10), inner=inner)


def shared_matrix() -> nn.Module:
    w = matrix(8, 5)
    a, b = (Parts(lambda m, x: x @ m.w, w=w) for _ in range(2))
    return Parts(lambda m, x: m.a(x) + m.b(x**2 / 5), a=a, b=b)


def unused_outputs() -> nn.Module:
    def function(m: Parts, x: Tensor) -> Tensor:
        m.unused(x)
        m.nothing(x)
        return m.linear(x)

    nothing = Parts(lambda m, x: None, w=matrix(9, 2))
    return Parts(function, unused=nn.Linear(9, 12), nothing=nothing, linear=nn.Linear(9, 10))


def frozen_branches() -> nn.Module:
    def function(m: Parts, x: Tensor) -> Tensor:
        return torch.cat([m.all_frozen(x) + m.none_frozen(x**2 / 5), x @ m.frozen, (x @ m.frozen) @ m.w], 1)

    frozen = nn.Parameter(torch.randn(9, 5), requires_grad=False)
    return Parts(
        function,
        all_frozen=nn.Linear(9, 4).requires_grad_(False),
        none_frozen=nn.Linear(9, 4),
        frozen=frozen,
        w=matrix(5, 3),
        unused=matrix(9, 5),
    )


def side_effect(m: Parts, x: Tensor) -> Tensor:
    m.seen = m.seen + 1.0
    return (x + m.seen - m.seen.detach().max()) @ m.w


def scale_of_noise(m: Parts, x: Tensor) -> Tensor:
    return (x * torch.zeros_like(x).normal_()) @ m.w


Architecture = tuple[nn.Module, tuple[tuple[int, ...], ...]]  # a model, and the shapes of one sample's inputs
TORCHJD: dict[str, Callable[[], Architecture]] = {
    "nested": lambda: (nested(), ((9,),)),
    "two inputs, one output": lambda: (Parts(lambda m, x, y: x @ m.w0 + y @ m.w1, **matrices((8, 6), (8, 6))),
        ((8,), (8,))),
    "two inputs, two outputs": lambda: (
        Parts(lambda m, x, y: torch.cat([x @ m.w0 + y @ m.w1, x @ m.w2 + y @ m.w3], 1),
        **matrices((8, 6), (8, 6), (8, 7), (8, 7))), ((8,), (8,)),
    ),
    "branches": lambda: (
        Parts(
            lambda m, x: (lambda h: m.c(F.relu(m.b(h))) + m.d(h))(F.relu(m.a(x))), a=nn.Linear(9, 13),
            b=nn.Linear(13, 14), c=nn.Linear(14, 15), d=nn.Linear(13, 15)
        ), ((9,),),
    ),
    "trees": lambda: (tree_to_tree(), ((14,),)),
    "trees with numbers and strings": lambda: (mixed_tree(False), ((10,),)),
    "trees by keyword": lambda: (mixed_tree(True), ((10,),)),
    "a string argument": lambda: (
        Parts(lambda m, x: m.inner("two", x),
        inner=Parts(lambda m, s, x: x @ m.w * (2.0 if s == "two" else 1.0), w=matrix(2, 3))), ((2,),),
    ),
    "a string output": lambda: (
        Parts(lambda m, x: m.inner(x)[1], inner=Parts(lambda m, x: ("test", x @ m.w), w=matrix(2, 3))), ((2,),)),
    "a parameter twice in a module": lambda: (Parts(lambda m, x: x @ m.w + (x**2 / 5) @ m.w, w=matrix(8, 5)), ((8,),)),
    "a parameter in two modules": lambda: (shared_matrix(), ((8,),)),
    "a module twice": lambda: (Parts(lambda m, x: m.a(x) + m.a(x**2 / 5), a=nn.Linear(8, 5)), ((8,),)),
    "unused outputs, and none": lambda: (unused_outputs(), ((9,),)),
    "frozen and unused parameters": lambda: (frozen_branches(), ((9,),)),
    "a buffer": lambda: (Parts(lambda m, x: m.a(x * m.b), a=nn.Linear(9, 5), b=torch.tensor(1.5)), ((9,),)),
    "a buffer that changes": lambda: (Parts(side_effect, w=matrix(9, 5), seen=torch.randn(9)), ((9,),)),
    "random numbers": lambda: (Parts(scale_of_noise, w=matrix(9, 5)), ((9,),)),
    "output of no dimension": lambda: (Parts(lambda m, x: m.a(x).squeeze(1) / 5, a=nn.Linear(5, 1)), ((5,),)),
    "output of two dimensions": lambda: (
        Parts(lambda m, x: torch.stack([m.a(x), m.b(x)], 1), a=nn.Linear(5, 3), b=nn.Linear(5, 3)), ((5,),)),
    "output of three dimensions": lambda: (
        Parts(lambda m, x: torch.einsum("bi,icde->bcde", x, m.w), w=matrix(6, 2, 3, 4)), ((6,),)),
    "output of four dimensions": lambda: (
        Parts(lambda m, x: torch.einsum("bi,icdef->bcdef", x, m.w), w=matrix(6, 2, 3, 4, 5)), ((6,),)),
    "RNN": lambda: (Parts(lambda m, x: m.r(x)[0], r=nn.RNN(8, 5, batch_first=True)), ((20, 8),)),
    "dropout": lambda: (nn.Sequential(nn.Dropout2d(0.5), nn.Conv2d(3, 3, 3), nn.Dropout2d(0.5)), ((3, 6, 6),)),
    "a submodule's parameters alone": lambda: (Parts(lambda m, x: x @ m.l.weight.T + m.l.bias, l=nn.Linear(2, 3)),
        ((2,),)),
    "a submodule's parameters and itself": lambda: (
        Parts(lambda m, x: x @ m.l.weight.T + m.l.bias + m.l(x), l=nn.Linear(2, 3)), ((2,),)),
    "MultiheadAttention": lambda: (
        Parts(lambda m, q, k, v: m.a(q, k, v)[0], a=nn.MultiheadAttention(8, 2, batch_first=True, kdim=9, vdim=11)),
        ((20, 8), (10, 9), (10, 11)),
    ),
    "Transformer": lambda: (nn.Transformer(8, 2, 2, 2, 32, dropout=0.0, batch_first=True), ((10, 8), (20, 8))),
    "Transformer, T = N": lambda: (nn.Transformer(8, 2, 2, 2, 32, dropout=0.0, batch_first=True),
        ((SIZE, 8), (SIZE, 8))),
    "a free parameter first": lambda: (
        Parts(lambda m, x: m.rest(F.relu(x @ m.w)), w=matrix(15, 16), rest=lines(16, 50, 60, 70, 80, between=nn.ReLU)),
        ((15,),),
    ),
    "no free parameter": lambda: (
        nn.Sequential(nn.Linear(15, 16, bias=False), nn.ReLU(), *lines(16, 50, 60, 70, 80, between=nn.ReLU)), ((15,),)),
    "for CIFAR-10": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, groups=32), nn.Sequential(nn.MaxPool2d(2), nn.ReLU()),
            nn.Conv2d(64, 64, 3, groups=64),
            nn.Sequential(nn.MaxPool2d(3), nn.ReLU(), nn.Flatten()), nn.Linear(1024, 128), nn.ReLU(),
            nn.Linear(128, 10),
        ), ((3, 32, 32),),
    ),
    "InstanceNorm ResNet18": lambda: (resnet18(partial(nn.InstanceNorm2d, affine=True), 64)[0], ((3, 64, 64),)),
}  # fmt: skip


def built(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    model, shapes = TORCHJD[name]()
    count = 2 if name == "InstanceNorm ResNet18" else SIZE
    inputs = [torch.randn(count, *shape) for shape in shapes]

    def losses() -> Tensor:
        torch.manual_seed(1)
        return model(*inputs).reshape(count, -1).square().sum(1)

    return model, losses


@pytest.mark.parametrize("name", TORCHJD)
def test_architectures_of_torchjd(name):
    assert_right(*built(name))


# What the Engine documents that it does not take, or takes without a batch dimension only.
NOT_FOR_TORCHJD = {
    *("a submodule's parameters alone", "a submodule's parameters and itself", "RNN", "random numbers"),
    *("a buffer that changes", "trees by keyword", "a parameter in two modules"),
}


@pytest.mark.parametrize("name", [name for name in TORCHJD if name not in NOT_FOR_TORCHJD])
def test_gramian_of_torchjd(name):
    engine_type = peer("torchjd.autogram").Engine
    model, losses = built(name)
    with SampleGradients(model, gram=True) as sg:
        losses().sum().backward()
    engine = engine_type(model, batch_dim=0)
    assert_close(sg.gram, engine.compute_gramian(losses()), TOLERANCE, "gram")


def test_torchjd_takes_a_parameter_of_two_modules_for_two():
    """Silently: products of the two uses are missing."""
    engine_type = peer("torchjd.autogram").Engine
    model, losses = built("a parameter in two modules")
    gradients = flat(rows_by_loop(model, losses()))
    gram = engine_type(model, batch_dim=0).compute_gramian(losses())
    assert (gram / (gradients @ gradients.T) - 1).abs().max() > 0.1
