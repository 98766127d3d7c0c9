"""Models with a batch for each: every kind of layer, and every way to use a parameter, by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.by_loop import Parts

N = 6  # samples in a batch


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
        Parts(
            lambda m, x, t, y: m.out(F.silu(m.conv(x) + (m.time(t) + m.label(y))[:, :, None, None])),
            conv=nn.Conv2d(4, 6, 3),
            time=nn.Sequential(nn.Linear(3, 6), nn.SiLU(), nn.Linear(6, 6)),
            label=nn.Embedding(5, 6),
            out=nn.Conv2d(6, 4, 3),
        ),
        (*images(), torch.randn(N, 3), ids()),
    ),
    "attention": lambda: (Parts(lambda m, x: m.a(x, x, x)[0], a=attention()), tokens()),
    "attention, no weights": lambda: (
        Parts(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=attention()),
        tokens(),
    ),
    "attention, cross": lambda: (
        Parts(lambda m, x, y: m.a(x, y, y)[0], a=attention()),
        (*tokens(), *tokens(5)),
    ),
    "attention, three inputs": lambda: (
        Parts(lambda m, x, y, z: m.a(x, y, z)[0], a=attention(kdim=4, vdim=3)),
        (*tokens(), *tokens(5, 4), *tokens(5, 3)),
    ),
    "attention, tokens first": lambda: (
        Parts(lambda m, x: m.a(*3 * (x.transpose(0, 1),))[0].transpose(0, 1), a=nn.MultiheadAttention(6, 2)),
        tokens(N),
    ),
    "transformer layer": lambda: (
        nn.TransformerEncoderLayer(6, 2, 11, dropout=0.0, batch_first=True, norm_first=True),
        tokens(),
    ),
    "bare parameters": lambda: (
        Parts(
            lambda m, x: (x + m.position) * m.scale - m.shift,
            position=nn.Parameter(torch.randn(1, 9, 6)),
            scale=nn.Parameter(torch.randn(6)),
            shift=nn.Parameter(torch.randn(9, 1)),
        ),
        tokens(),
    ),
    "class token": lambda: (
        Parts(
            lambda m, x: m.out(torch.cat([m.token.expand(len(x), -1, -1), x], 1)),
            token=nn.Parameter(torch.randn(1, 1, 6)),
            out=nn.Linear(6, 3),
        ),
        tokens(),
    ),
    "x @ W": lambda: (
        Parts(
            lambda m, x: torch.stack([(x @ m.w).tanh().sum(-1), x @ m.v], -1),
            w=nn.Parameter(torch.randn(6, 4)),
            v=nn.Parameter(torch.randn(6)),
        ),
        tokens(),
    ),
    "a layer used three times": lambda: (
        Parts(lambda m, x: m.lin(m.lin(m.lin(x).tanh()).tanh()), lin=nn.Linear(6, 6)),
        tokens(),
    ),
    "a norm used twice": lambda: (
        Parts(lambda m, x: m.norm(m.lin(m.norm(x))), lin=nn.Linear(6, 6), norm=nn.LayerNorm(6)),
        tokens(),
    ),
    "tied weights": lambda: (Parts(tied, table=nn.Embedding(5, 4)), (ids(7),)),
    "tied modules": lambda: (
        Parts(lambda m, x: m.b(m.a(x).tanh()), a=(a := nn.Linear(6, 6)), b=a),
        tokens(),
    ),
    "transposed use": lambda: (Parts(lambda m, x: F.linear(m.a(x), m.a.weight.t()), a=nn.Linear(6, 4)), tokens()),
    "a subclass": lambda: (nn.Sequential(Subclass(6, 4), nn.Linear(4, 2)), tokens()),
    "an expanded parameter": lambda: (
        Parts(lambda m, x: F.linear(x, m.p.expand(3, 4)), p=nn.Parameter(torch.randn(4))),
        (torch.randn(N, 4),),
    ),
    "overlapping windows of a parameter": lambda: (
        Parts(lambda m, x: F.linear(x, m.p.unfold(0, 4, 2)), p=nn.Parameter(torch.randn(8))),
        (torch.randn(N, 4),),
    ),
    "a parameter of no elements": lambda: (
        Parts(lambda m, x: torch.cat([m.a(x), x[:, :0] * m.p], 1), a=nn.Linear(5, 4), p=nn.Parameter(torch.randn(0))),
        (torch.randn(N, 5),),
    ),
    "a parameter without a gradient": lambda: (
        Parts(lambda m, x: m.a(x), a=nn.Linear(6, 4), unused=nn.Linear(3, 3)),
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


def prepared(case: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model, batch = CASES[case]()
    for module in model.modules():  # running statistics and affine parameters that are not all 0 and 1
        for p in [*module._parameters.values(), *module._buffers.values()]:
            if p is not None and p.is_floating_point() and p.dim() == 1:
                with torch.no_grad():
                    p.copy_(torch.rand_like(p) + 0.5)
    return model.to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)


def odd(m: nn.Module, x: Tensor) -> Tensor:
    return (
        m.lin(x) * torch.sigmoid(m.gate) + m.out(torch.sin(m.lin.weight.mean() * x)) + F.hardtanh(F.prelu(x, m.slope))
    )


def without_rules() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """lin.weight is used by a rule and through a function of it in the same module, gate only so; prelu has no rule."""
    model = Parts(
        odd,
        lin=nn.Linear(6, 6),
        gate=nn.Parameter(torch.randn(6)),
        slope=nn.Parameter(torch.rand(1)),
        out=nn.Linear(6, 6),
    )
    return nn.Sequential(nn.Linear(6, 6), model, nn.LayerNorm(6)).double(), (tokens()[0].double(),)
