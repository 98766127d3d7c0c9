"""Per-sample gradients wherever the samples lie: in any dimension, in rows of other numbers, in no row of their own.

Every dimension that a layout has is as long as the batch, so that none can be taken for it. Each situation is a model,
a batch and losses; the truth is one backward pass per sample, on the graph of these losses, in float64.
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers.by_loop import (
    Parts,
    Rows,
    assert_close,
    assert_grads,
    assert_statistics,
    flat,
    random_directions,
    rows_by_loop,
    squared,
    swap,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, rnn
from torch.utils.checkpoint import checkpoint

from crl_kernels import SampleGradients, estimate_fisher

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore"),  # of slow ways to a gradient, and torch's deprecations
]
N = 6
D = 6  # features, as many as samples
TOLERANCE = 1e-9


class Situation(NamedTuple):
    model: nn.Module
    batch: tuple[Tensor, ...]
    losses: Callable[..., Tensor]


def given(model: nn.Module, *batch: Tensor, losses: Callable[..., Tensor] = squared) -> Situation:
    return Situation(model, batch, losses)


def case(
    function: Callable[..., Tensor],
    *batch: Tensor,
    losses: Callable[..., Tensor] = squared,
    **parts: nn.Module | nn.Parameter | Tensor,
) -> Situation:
    return Situation(Parts(function, **parts), batch, losses)


Table = dict[str, Callable[[], Situation]]


def normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def tokens(count: int = N, width: int = D) -> Tensor:
    return torch.randn(N, count, width)


def vectors(width: int = D) -> Tensor:
    return torch.randn(N, width)


def image(channels: int = D, size: int = 5) -> Tensor:
    return torch.randn(N, channels, size, size)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 9, (N, *shape))


def mlp(inputs: int = D, outputs: int = D) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


# As many tokens, queries, prompts, classes and prototypes as samples


def encoder_layer(**options: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 7, dropout=0.0, **options)


def encoder(**options: bool) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 9, dropout=0.0, **options), 2)


def decoder(**options: bool) -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 3, 9, dropout=0.0, **options), 1)


def transformer(**options: bool) -> nn.Module:
    return nn.Transformer(D, 2, 1, 1, 8, dropout=0.0, **options)


def on_sequences(make: Callable[..., nn.Module], inputs: int, batch_first: bool, **options: bool | int) -> Situation:
    def function(m: Parts, *x: Tensor) -> Tensor:
        return m.t(*x) if batch_first else swap(m.t(*map(swap, x)))

    return case(function, *(tokens() for _ in range(inputs)), t=make(batch_first=batch_first, **options))


def cross_attention(batch_first: bool, **options: bool | int) -> Situation:
    def function(m: Parts, q: Tensor, k: Tensor) -> Tensor:
        output, weights = m.a(q, k, k) if batch_first else m.a(swap(q), swap(k), swap(k))
        return torch.cat([(output if batch_first else swap(output)).flatten(1), weights.flatten(1)], 1)

    return case(function, tokens(), tokens(), a=nn.MultiheadAttention(D, 2, batch_first=batch_first, **options))


def class_prompts(text: nn.Module, pool: Callable[[Tensor], Tensor]) -> Situation:
    """CLIP with learned prompts: every sample's logits need the text encoder's row of every class."""

    def function(m: Parts, x: Tensor) -> Tensor:
        prompts = m.context + m.classes[:, None]  # (classes, tokens, D)
        features = F.normalize(pool(m.text(prompts)), dim=-1)
        return m.scale.exp() * F.normalize(m.image(x), dim=-1) @ features.T

    parts = {"context": normal(N, D), "classes": normal(N, D), "scale": nn.Parameter(torch.tensor(0.5))}
    return case(function, vectors(), text=text, image=nn.Linear(D, D), **parts)


def relative_bias(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    offsets = torch.arange(N)[:, None] - torch.arange(N)
    return ((q @ k.mT) + m.bias(offsets + N - 1).squeeze(-1)).softmax(-1) @ v


def mixture_of_gaussians(m: Parts, x: Tensor) -> Tensor:
    distances = ((x[:, None] - m.means) / m.scales.exp()).square().sum(-1)
    return (m.weights.log_softmax(0) - 0.5 * distances - m.scales.sum(-1)).logsumexp(-1)[:, None]


def rotated(m: Parts, x: Tensor) -> Tensor:
    angle = torch.arange(N)[:, None] * m.frequencies
    a, b = m.inside(x).chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def codebook(m: Parts, x: Tensor) -> Tensor:
    h = m.inside(x)
    nearest = m.codes[torch.cdist(h, m.codes).argmin(-1)]
    return torch.cat([m.out(h + (nearest - h).detach()), nearest - x], -1)


def heads(x: Tensor) -> Tensor:
    """(N, T, D) -> (N, D heads, T, 1), as many heads as samples"""
    return x.unflatten(-1, (D, 1)).transpose(1, 2)


TOKENS: Table = {
    **{
        f"{make.__name__} {'batch' if batch_first else 'sequence'}-first{', norm first' * norm_first}": partial(
            on_sequences, make, inputs, batch_first, norm_first=norm_first
        )
        for make, inputs in {encoder: 1, decoder: 2, transformer: 2}.items()
        for batch_first in (False, True)
        for norm_first in (False, True)
    },
    "cross-attention batch-first": lambda: cross_attention(True),
    "cross-attention sequence-first": lambda: cross_attention(False),
    "cross-attention with bias_kv and zeros": lambda: cross_attention(False, add_bias_kv=True, add_zero_attn=True),
    "cross-attention with kdim and vdim": lambda: cross_attention(False, kdim=D, vdim=D, bias=False),
    "encoder with padding": lambda: case(
        lambda m, x: swap(m.t(swap(x), src_key_padding_mask=torch.ones(N, N).triu(2).bool())), tokens(),
        t=encoder_layer()),
    "causal encoder": lambda: case(
        lambda m, x: swap(m.t(swap(x), nn.Transformer.generate_square_subsequent_mask(N), is_causal=True)), tokens(),
        t=encoder_layer()),
    "attention, as many heads as samples": lambda: case(
        lambda m, x: F.scaled_dot_product_attention(*map(heads, m.qkv(x).chunk(3, -1))), tokens(),
        qkv=nn.Linear(D, 3 * D)),
    "queries expanded": lambda: case(lambda m, x: m.a(m.q.expand(N, -1, -1), x, x)[0], tokens(),
        a=nn.MultiheadAttention(D, 2, batch_first=True), q=normal(N, D)),
    "queries repeated, sequence-first": lambda: case(
        lambda m, x: swap(m.a(m.q[:, None].repeat(1, N, 1), swap(x), swap(x))[0]), tokens(),
        a=nn.MultiheadAttention(D, 2), q=normal(N, D)),
    "queries projected before they are expanded": lambda: case(lambda m, x: attend(m.inside(m.q), m.keys(x), x),
        tokens(), inside=nn.Linear(D, D), keys=nn.Linear(D, D), q=normal(N, D)),
    "queries of an embedding": lambda: case(lambda m, x: attend(m.q.weight[None].expand(N, -1, -1), x, m.v(x)),
        tokens(), q=nn.Embedding(N, D), v=nn.Linear(D, D)),
    "latents by einsum": lambda: case(lambda m, x: m.out(torch.einsum("qd,ntd->nqt", m.q, x).softmax(-1) @ x), tokens(),
        q=normal(N, D), out=nn.Linear(D, 3)),
    "prompts before the tokens": lambda: case(lambda m, x: m.t(torch.cat([m.p.expand(len(x), -1, -1), x], 1)), tokens(),
        p=normal(N, D), t=encoder_layer(batch_first=True)),
    "prompts through an encoder of their own": lambda: case(
        lambda m, x: m.out(attend(x, torch.cat([m.e(m.p).expand(N, -1, -1), x], 1),
        torch.cat([m.e(m.p).expand(N, -1, -1), x], 1))), tokens(), p=normal(N, D), e=mlp(), out=nn.Linear(D, 2)),
    "class prompts, linear": lambda: class_prompts(nn.Linear(D, D), lambda h: h.tanh().mean(1)),
    "class prompts, encoder": lambda: class_prompts(encoder_layer(batch_first=True), lambda h: h[:, -1]),
    "class prompts, recurrent": lambda: class_prompts(Parts(lambda m, x: m.r(x)[0], r=nn.GRU(D, D, batch_first=True)),
        lambda h: h[:, -1]),
    "prototypes by distance": lambda: case(lambda m, x: torch.cdist(m.i(x), m.p), vectors(), i=nn.Linear(D, D),
        p=normal(N, D)),
    "prototypes by cosine": lambda: case(lambda m, x: F.cosine_similarity(m.i(x)[:, None], m.p[None], -1), vectors(),
        i=nn.Linear(D, D), p=normal(N, D)),
    "prototypes normalized": lambda: case(lambda m, x: F.linear(F.normalize(x), F.normalize(m.p)), vectors(),
        p=normal(N, D)),
    "prototypes by difference": lambda: case(lambda m, x: (x[:, None] - m.p).square().sum(-1), vectors(),
        p=normal(N, D)),
    "prototypes first": lambda: case(lambda m, x: (m.p @ x.T).T, vectors(), p=normal(N, D)),
    "codebook": lambda: case(codebook, vectors(), inside=nn.Linear(D, D), codes=normal(N, D), out=nn.Linear(D, 2)),
    "mixture of Gaussians": lambda: case(mixture_of_gaussians, vectors(), means=normal(N, D), scales=normal(N, D),
        weights=normal(N)),
    "positions (T, D)": lambda: case(lambda m, x: m.i(torch.tanh(x + m.p)), tokens(), p=normal(N, D),
        i=nn.Linear(D, 2)),
    "positions (1, T, D)": lambda: case(lambda m, x: m.i(torch.tanh(x + m.p)), tokens(), p=normal(1, N, D),
        i=nn.Linear(D, 2)),
    "positions (T, 1, D), sequence-first": lambda: case(lambda m, x: swap(m.i(torch.tanh(swap(x) + m.p))), tokens(),
        p=normal(N, 1, D), i=nn.Linear(D, 2)),
    "positions multiply": lambda: case(lambda m, x: x * m.p.sigmoid(), tokens(), p=normal(N, D)),
    "positions, scalars for tokens": lambda: case(lambda m, x: m.i(x.mT * m.p).tanh(), tokens(), p=normal(N),
        i=nn.Linear(N, 3)),
    "positions of an embedding": lambda: case(lambda m, x: torch.tanh(m.w(x) + m.p(torch.arange(x.shape[1]))), ids(N),
        w=nn.Embedding(9, D), p=nn.Embedding(N, D)),
    "positions of a buffer": lambda: case(lambda m, x: torch.tanh(m.w(x) + m.p(m.at)), ids(N), w=nn.Embedding(9, D),
        p=nn.Embedding(N, D), at=torch.arange(N)[None]),
    "positions expanded to ids": lambda: case(lambda m, x: torch.tanh(m.w(x) + m.p(torch.arange(N).expand(N, N))),
        ids(N), w=nn.Embedding(9, D), p=nn.Embedding(N, D)),
    "positions through layers": lambda: case(lambda m, x: torch.tanh(m.i(x) + m.p(m.at)), tokens(), i=nn.Linear(D, 3),
        p=mlp(2, 3), at=torch.randn(N, 2)),
    "positions through a norm": lambda: case(lambda m, x: torch.tanh(x + m.n(m.at)), tokens(), n=nn.LayerNorm(D),
        at=torch.randn(N, D)),
    "positions interpolated": lambda: case(
        lambda m, x: torch.tanh(m.i(x) + F.interpolate(m.p, (5, 5), mode="bilinear")),
        image(), p=normal(1, 4, 3, 3), i=nn.Conv2d(D, 4, 1)),
    "relative positions": lambda: case(relative_bias, tokens(), qkv=nn.Linear(D, 3 * D),
        bias=nn.Embedding(2 * N - 1, 1)),
    "slopes of heads": lambda: case(
        lambda m, x: (heads(x) @ heads(m.i(x)).mT + m.s.view(D, 1, 1) * torch.arange(N)).softmax(-1), tokens(),
        i=nn.Linear(D, D), s=normal(D)),
    "rotary with learned frequencies": lambda: case(rotated, tokens(), inside=nn.Linear(D, 4), frequencies=normal(2)),
    "weights for each token": lambda: case(lambda m, x: torch.einsum("ntd,tde->nte", x, m.w).tanh(), tokens(),
        w=normal(N, D, 3)),
    "tokens mixed by a weight": lambda: case(lambda m, x: m.b(m.a(x.mT).mT.tanh()), tokens(), a=nn.Linear(N, N),
        b=nn.Linear(D, 2)),
    "tokens mixed, sequence-first": lambda: case(
        lambda m, x: swap(m.b(torch.einsum("st,tnd->snd", m.w, swap(x)).tanh())),
        tokens(), w=normal(N, N), b=nn.Linear(D, 2)),
    "layers, sequence-first": lambda: case(lambda m, x: swap(m.b(m.n(m.a(swap(x))).tanh())), tokens(),
        a=nn.Linear(D, 4), n=nn.LayerNorm(4), b=nn.Linear(4, 2)),
    "embedding, sequence-first": lambda: case(lambda m, x: swap(m.b(m.w(swap(x)).tanh())), ids(N), w=nn.Embedding(9, D),
        b=nn.Linear(D, 2)),
    "samples in the last dimension": lambda: case(lambda m, x: (m.w @ x.permute(1, 2, 0)).tanh().permute(2, 0, 1),
        tokens(), w=normal(4, D)),
    "samples in the middle": lambda: case(lambda m, x: m.i(x.permute(1, 0, 2)[:, :, None]).tanh().permute(1, 0, 2, 3),
        tokens(), i=nn.Linear(D, 3)),
    "samples as positions of a pointwise convolution": lambda: case(lambda m, x: m.c(x.T[None])[0].T.tanh(), vectors(),
        c=nn.Conv1d(D, 3, 1)),
    "learned constant image": lambda: case(lambda m, x: m.c(m.k.expand(N, -1, -1, -1)) * m.s(x)[:, :, None, None],
        vectors(), k=normal(D, 4, 4), c=nn.Conv2d(D, 3, 3), s=nn.Linear(D, 3)),
    "tokens as samples": lambda: case(lambda m, x: m.i(x.view(2, 3, D)).view(N, -1), vectors(), i=mlp()),
}  # fmt: skip


# Recurrent


def recurrent(kind: type[nn.RNNBase], batch_first: bool, last: bool = False, **options: bool | int) -> Situation:
    def function(m: Parts, x: Tensor) -> Tensor:
        outputs, state = m.r(x if batch_first else swap(x))
        if last:  # (layers and directions, N, H), whatever batch_first is
            return swap(state[0] if isinstance(state, tuple) else state)
        return outputs if batch_first else swap(outputs)

    return case(function, tokens(), r=kind(D, 4, batch_first=batch_first, **options))


def packed(kind: type[nn.RNNBase], batch_first: bool, enforce_sorted: bool, **options: bool | int) -> Situation:
    lengths = torch.tensor([6, 5, 3, 3, 2, 1] if enforce_sorted else [2, 6, 1, 3, 5, 3])

    def function(m: Parts, x: Tensor) -> Tensor:
        x = x if batch_first else swap(x)
        outputs, _ = m.r(rnn.pack_padded_sequence(x, lengths, batch_first, enforce_sorted))
        return rnn.pad_packed_sequence(outputs, batch_first=True, total_length=N)[0]

    return case(function, tokens(), r=kind(D, 4, batch_first=batch_first, **options))


def cells(cell: nn.RNNCellBase) -> Situation:
    def function(m: Parts, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = m.c(x[:, t], state)
        return torch.stack(state, 1) if isinstance(state, tuple) else state

    return case(function, tokens(), c=cell)


RECURRENT: Table = {
    **{
        f"{kind.__name__} {'batch' if batch_first else 'sequence'}-first{', ' * bool(options)}{' '.join(options)}":
            partial(recurrent, kind, batch_first, **options)
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
        for batch_first in (False, True)
        for options in ({}, {"num_layers": 2, "bidirectional": True})
    },
    "LSTM with proj_size": lambda: recurrent(nn.LSTM, False, proj_size=3, num_layers=2),
    "last state of a GRU, batch-first": lambda: recurrent(nn.GRU, True, last=True),
    "last states of a bidirectional LSTM": lambda: recurrent(nn.LSTM, False, last=True, num_layers=2,
        bidirectional=True),
    "ReLU RNN without biases": lambda: recurrent(nn.RNN, False, nonlinearity="relu", bias=False),
    **{
        f"packed {kind.__name__} {'batch' if batch_first else 'sequence'}-first{', sorted' * enforce_sorted}": partial(
            packed, kind, batch_first, enforce_sorted
        )
        for kind in (nn.GRU, nn.LSTM)
        for batch_first in (False, True)
        for enforce_sorted in (False, True)
    },
    "packed bidirectional RNN": lambda: packed(nn.RNN, True, False, num_layers=2, bidirectional=True),
    "RNNCell": lambda: cells(nn.RNNCell(D, 4)),
    "GRUCell": lambda: cells(nn.GRUCell(D, 4)),
    "LSTMCell": lambda: cells(nn.LSTMCell(D, 4)),
    "learned first state": lambda: case(lambda m, x: m.r(x, m.h.expand(-1, N, -1).contiguous())[0], tokens(),
        r=nn.GRU(D, 4, batch_first=True), h=normal(1, 1, 4)),
    "rows of tokens to a recurrent layer": lambda: case(lambda m, x: m.r(x.flatten(0, 1))[1].view(N, -1),
        torch.randn(N, N, 3, D), r=nn.GRU(D, 4, batch_first=True)),
}  # fmt: skip


# Rows that are chosen, sorted, merged and dealt out


def experts(m: Parts, x: Tensor) -> Tensor:
    """Each row to the expert that the router likes best; one expert gets no row."""
    rows = x.reshape(-1, D)
    scores = m.router(rows).softmax(-1) * torch.tensor([1.0, 1.0, 0.0])
    best = scores.argmax(-1)
    out = torch.zeros_like(rows)
    for k, expert in enumerate(m.experts):
        chosen = best == k
        out[chosen] = expert(rows[chosen]) * scores[chosen, k, None]
    return out.view(x.shape)


def experts_by_index_add(m: Parts, x: Tensor) -> Tensor:
    weights, best = m.router(x).softmax(-1).topk(2, -1)
    out = torch.zeros_like(x)
    for k, expert in enumerate(m.experts):
        row, place = (best == k).nonzero(as_tuple=True)
        out = out.index_add(0, row, expert(x[row]) * weights[row, place, None])
    return out


def sorted_inside(m: Parts, x: Tensor) -> Tensor:
    order = x.flatten(1)[:, 0].argsort()
    return m.b(m.a(x[order]).tanh())[order.argsort()]


SIZES = torch.tensor([1, 3, 2, 3, 1, 2])  # of N graphs, or sequences; their sum is a multiple of N


def nodes_of_graphs(m: Parts, x: Tensor) -> Tensor:
    """Nodes of all graphs in one matrix, messages between neighbours in a graph, sums over graphs."""
    graph = torch.repeat_interleave(torch.arange(N), SIZES)
    h = m.a(x[torch.arange(3) < SIZES[:, None]]).tanh()
    h = m.norm(h + torch.zeros_like(h).index_add(0, graph.argsort(stable=True), m.b(h)))
    sums = torch.zeros(N, h.shape[1]).index_add(0, graph, h)
    return m.out(sums / SIZES[:, None])


def windows(x: Tensor) -> Tensor:
    """(N, 4, 6, D) -> (N * 6 windows, 4 tokens, D)"""
    return x.unflatten(1, (2, 2)).unflatten(3, (3, 2)).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, x.shape[-1])


def shifted_windows(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.qkv(windows(m.norm(x.roll((-1, -1), (1, 2))))).chunk(3, -1)
    scores = q @ k.mT + m.bias[torch.arange(4)[:, None] - torch.arange(4) + 3]
    scores = scores.unflatten(0, (N, 6)) + m.mask[:, None] * m.mask[:, :, None]
    return m.out(scores.flatten(0, 1).softmax(-1) @ v).view(N, -1)


def axial(m: Parts, x: Tensor) -> Tensor:
    """Attention along rows of pixels, then along columns; the batch is (N rows) and (N columns)."""
    for layer in (m.rows, m.columns):
        x = layer(x.flatten(0, 1)).view(x.shape).transpose(1, 2)
    return x


def modulated(m: Parts, x: Tensor) -> Tensor:
    """One convolution with a group for each sample, whose weights are scaled by the sample."""
    weight = m.weight * m.style(x.mean((2, 3)))[:, None, :, None, None]
    weight = weight * weight.square().sum((2, 3, 4), keepdim=True).rsqrt()
    return F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), padding=1, groups=N).view(N, -1)


ROUTES: Table = {
    "experts on samples": lambda: case(experts, vectors(), router=nn.Linear(D, 3),
        experts=nn.ModuleList([mlp(), nn.Linear(D, D), mlp()])),
    "experts on tokens": lambda: case(experts, tokens(), router=nn.Linear(D, 3),
        experts=nn.ModuleList([mlp(), nn.Linear(D, D), mlp()])),
    "experts by index_add": lambda: case(experts_by_index_add, vectors(), router=nn.Linear(D, 3),
        experts=nn.ModuleList([mlp() for _ in range(3)])),
    "experts' weights in one tensor": lambda: case(
        lambda m, x: torch.einsum("nd,nde->ne", x, m.w[m.router(x).argmax(-1)]) * m.router(x).amax(-1, keepdim=True),
        vectors(), w=normal(N, D, 4), router=nn.Linear(D, N)),
    "sorted inside": lambda: case(sorted_inside, vectors(), a=nn.Linear(D, 5), b=nn.Linear(5, 2)),
    "sorted inside, tokens": lambda: case(sorted_inside, tokens(), a=nn.Linear(D, 5), b=nn.Linear(5, 2)),
    "sorted inside, images": lambda: case(sorted_inside, image(2), a=nn.Conv2d(2, 3, 3), b=nn.Conv2d(3, 2, 1)),
    "flipped inside": lambda: case(lambda m, x: m.b(m.n(m.a(x).flip(0))).flip(0), vectors(), a=nn.Linear(D, 4),
        n=nn.LayerNorm(4), b=nn.Linear(4, 2)),
    "rolled inside": lambda: case(lambda m, x: (m.a(x.roll(1, 0)).roll(-1, 0) * m.g).tanh(), vectors(),
        a=nn.Linear(D, 4), g=normal(4)),
    "tokens sorted": lambda: case(lambda m, x: m.b(m.a(x).sort(1).values * m.g), tokens(), a=nn.Linear(D, 4),
        g=normal(N, 4), b=nn.Linear(4, 2)),
    "tokens gathered": lambda: case(lambda m, x: m.b(m.a(x).tanh().gather(1, x.argsort(1)[:, :3, :4])), tokens(),
        a=nn.Linear(D, 4), b=nn.Linear(4, 2)),
    "tokens scattered": lambda: case(
        lambda m, x: m.b(torch.zeros(N, N, 4).scatter_add(1, x.argsort(1)[..., :4], m.a(x).tanh())), tokens(),
        a=nn.Linear(D, 4), b=nn.Linear(4, 2)),
    "half of the tokens kept": lambda: case(
        lambda m, x: m.b(m.a(x)[torch.arange(N)[:, None], x.sum(-1).argsort(1)[:, :3]].tanh()), tokens(),
        a=nn.Linear(D, 4), b=nn.Linear(4, 2)),
    "graphs in one matrix": lambda: case(nodes_of_graphs, torch.randn(N, 3, D), a=nn.Linear(D, 4), b=nn.Linear(4, 4),
        norm=nn.LayerNorm(4), out=nn.Linear(4, 2)),
    "windows": lambda: case(shifted_windows, torch.randn(N, 4, 6, D), qkv=nn.Linear(D, 12), out=nn.Linear(4, 3),
        norm=nn.LayerNorm(D), bias=normal(7), mask=torch.randn(6, 4)),
    "axial attention": lambda: case(axial, torch.randn(N, N, N, D),
        **{name: encoder_layer(batch_first=True) for name in ("rows", "columns")}),
    "patches in the batch": lambda: case(
        lambda m, x: m.b(m.a(F.unfold(x, 2, stride=2).mT.flatten(0, 1)).tanh().view(N, -1)), image(2, 4),
        a=nn.Linear(8, 5), b=nn.Linear(20, 2)),
    "frames in the batch": lambda: case(lambda m, x: m.c(x.flatten(0, 1)).tanh().view(N, -1),
        torch.randn(N, N, 2, 5, 5), c=nn.Conv2d(2, 3, 3)),
    "frames in the batch, samples last": lambda: case(
        lambda m, x: swap(m.c(swap(x).flatten(0, 1)).tanh().unflatten(0, (N, N))), torch.randn(N, N, 2, 5, 5),
        c=nn.Conv2d(2, 3, 3)),
    "channels in the batch": lambda: case(lambda m, x: m.c(x.reshape(-1, 1, 8)).tanh().view(N, -1),
        torch.randn(N, N, 8), c=nn.Conv1d(1, 3, 3)),
    "sample-wise groups of one convolution": lambda: case(modulated, image(), weight=normal(4, D, 3, 3),
        style=nn.Linear(D, D)),
    "weights made from the sample": lambda: case(lambda m, x, y: torch.bmm(x[:, None], m.h(y).view(N, D, 3)).tanh(),
        vectors(), vectors(4), h=mlp(4, 3 * D)),
    "weights made from parameters": lambda: case(lambda m, x: F.linear(x, m.h(m.z), m.b).tanh(), vectors(), h=mlp(4, D),
        z=normal(N, 4), b=normal(N)),
    "pixels shuffled": lambda: case(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2).tanh()), image(2),
        a=nn.Conv2d(2, 12, 1), b=nn.Conv2d(3, 2, 3)),
    "batch cut and joined": lambda: case(lambda m, x: torch.cat([m.a(part) * m.g for part in x.split([1, 2, 3])]),
        vectors(), a=nn.Linear(D, 4), g=normal(4)),
    "one sample at a time": lambda: case(lambda m, x: torch.stack([m.a(row).tanh() @ m.w for row in x]), vectors(),
        a=nn.Linear(D, 4), w=normal(4, 2)),
    "one image at a time": lambda: case(lambda m, x: torch.stack([m.a(row) * m.g for row in x]), image(2),
        a=nn.Conv2d(2, 4, 3), g=normal(4, 1, 1)),
}  # fmt: skip


# Layers


def volume(*shape: int) -> Tensor:
    return torch.randn(N, *shape)


def layer(model: nn.Module, *batch: Tensor) -> Situation:
    return given(nn.Sequential(model, nn.Tanh()), *batch)


def with_statistics(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    return norm.eval()


LAYERS: Table = {
    "Conv1d, a group for each channel": lambda: layer(nn.Conv1d(D, 2 * D, 3, groups=D), volume(D, 7)),
    "Conv2d, a group for each channel": lambda: layer(nn.Conv2d(D, D, 3, groups=D, padding=1), image()),
    "Conv3d": lambda: layer(nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1), groups=2),
        volume(2, 3, 4, 5)),
    "Conv1d dilated": lambda: layer(nn.Conv1d(D, 4, 2, stride=2, dilation=3, padding="valid"), volume(D, 9)),
    "Conv1d padding same": lambda: layer(nn.Conv1d(D, 4, 4, padding="same"), volume(D, 7)),
    "Conv2d circular": lambda: layer(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), image(2)),
    "Conv2d reflect": lambda: layer(nn.Conv2d(2, 4, 3, padding=2, padding_mode="reflect"), image(2)),
    "Conv3d replicate": lambda: layer(nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), volume(2, 3, 3, 3)),
    "ConvTranspose1d": lambda: layer(nn.ConvTranspose1d(D, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        volume(D, 5)),
    "ConvTranspose2d": lambda: layer(nn.ConvTranspose2d(D, 3, 3, stride=2, dilation=2, groups=3), image(D, 3)),
    "ConvTranspose3d": lambda: layer(nn.ConvTranspose3d(2, 2, 2, stride=2, groups=2), volume(2, 2, 3, 2)),
    "Bilinear": lambda: given(nn.Bilinear(D, 4, 3), vectors(), vectors(4)),
    "Bilinear on tokens": lambda: given(nn.Bilinear(D, 4, 3), tokens(), tokens(N, 4)),
    "PReLU, one slope": lambda: given(nn.Sequential(nn.Linear(D, 4), nn.PReLU()), vectors()),
    "PReLU, a slope for each channel": lambda: given(nn.Sequential(nn.Conv2d(2, D, 3), nn.PReLU(D)), image(2)),
    "EmbeddingBag": lambda: case(lambda m, x: m.b(m.e(x)).tanh(), ids(4), e=nn.EmbeddingBag(9, 5), b=nn.Linear(5, 2)),
    "EmbeddingBag, sums": lambda: case(lambda m, x: m.e(x).tanh(), ids(N),
        e=nn.EmbeddingBag(9, 5, mode="sum", padding_idx=3)),
    "EmbeddingBag, largest": lambda: case(lambda m, x: m.e(x).tanh(), ids(3), e=nn.EmbeddingBag(9, 5, mode="max")),
    "EmbeddingBag, weights of samples": lambda: case(lambda m, x, w: m.e(x, per_sample_weights=w).tanh(), ids(3),
        volume(3), e=nn.EmbeddingBag(9, 5, mode="sum")),
    "EmbeddingBag with offsets": lambda: case(
        lambda m, x: m.e(x[torch.arange(3) < SIZES[:, None]], SIZES.cumsum(0) - SIZES).tanh(), ids(3),
        e=nn.EmbeddingBag(9, 5)),
    "Embedding, renormalized": lambda: case(lambda m, x: m.e(x).tanh(), ids(N),
        e=nn.Embedding(9, D, max_norm=1.0, padding_idx=0)),
    "Embedding, ids of samples": lambda: case(lambda m, x: m.e(x).tanh(), ids(), e=nn.Embedding(9, D)),
    "Embedding, sparse gradient": lambda: case(lambda m, x: m.e(x).tanh(), ids(N), e=nn.Embedding(9, D, sparse=True)),
    "InstanceNorm1d": lambda: layer(nn.InstanceNorm1d(D, affine=True), volume(D, 7)),
    "InstanceNorm2d, changed in place": lambda: given(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(inplace=True)), image(1)),
    "InstanceNorm3d with running statistics": lambda: layer(
        with_statistics(nn.InstanceNorm3d(2, affine=True, track_running_stats=True)), volume(2, 3, 3, 3)),
    "BatchNorm1d": lambda: layer(with_statistics(nn.BatchNorm1d(D)), vectors()),
    "BatchNorm1d on tokens": lambda: layer(with_statistics(nn.BatchNorm1d(D)), volume(D, N)),
    "BatchNorm2d": lambda: layer(nn.Sequential(nn.Conv2d(2, D, 3), with_statistics(nn.BatchNorm2d(D)), nn.ReLU(True)),
        image(2)),
    "BatchNorm3d": lambda: layer(with_statistics(nn.BatchNorm3d(2)), volume(2, 3, 3, 2)),
    "GroupNorm": lambda: layer(nn.GroupNorm(3, D), volume(D)),
    "GroupNorm, changed in place": lambda: layer(nn.Sequential(nn.GroupNorm(3, D), nn.SiLU(inplace=True)), image()),
    "LayerNorm over two dimensions": lambda: layer(nn.LayerNorm((N, D)), tokens()),
    "LayerNorm over three dimensions": lambda: layer(nn.LayerNorm((2, N, D)), volume(2, N, D)),
    "LayerNorm without bias": lambda: layer(nn.LayerNorm(D, bias=False), tokens()),
    "RMSNorm": lambda: layer(nn.RMSNorm(D), tokens()),
    "RMSNorm over two dimensions": lambda: layer(nn.RMSNorm((N, D)), tokens()),
    "adaptive softmax": lambda: given(nn.AdaptiveLogSoftmaxWithLoss(D, 9, [3, 6], div_value=2), vectors(), ids(),
        losses=lambda m, x, y: -m(x, y).output),
}  # fmt: skip


# Parameters that are not used as they are


def fourier(m: Parts, x: Tensor) -> Tensor:
    modes = torch.fft.rfft(x, dim=1)
    mixed = torch.einsum("nmi,mio->nmo", modes, torch.view_as_complex(m.w))
    return torch.fft.irfft(mixed, n=x.shape[1], dim=1)


def low_rank_update(m: Parts, x: Tensor) -> Tensor:
    """DoRA: a unit direction W + BA and its length."""
    weight = m.base.weight + m.b @ m.a
    return F.linear(x, m.length[:, None] * weight / weight.norm(dim=1, keepdim=True))


def split_vector(m: Parts, x: Tensor) -> Tensor:
    """A whole network in one vector, as a hypernetwork gives it."""
    w, b, v = m.theta.split([D * 4, 4, 8])
    return F.linear(F.linear(x, w.view(4, D), b).tanh(), v.view(2, 4))


def cached(model: nn.Module, *batch: Tensor) -> Tensor:
    with parametrize.cached():
        return squared(model, *batch)


def tied(m: Parts, x: Tensor) -> Tensor:
    return m.e(x) @ m.e.weight.T


REPARAMETRIZED: Table = {
    "weight_norm": lambda: given(nn.Sequential(parametrizations.weight_norm(nn.Linear(D, 4)), nn.Tanh()), vectors()),
    "weight_norm of a convolution": lambda: given(parametrizations.weight_norm(nn.Conv2d(2, 3, 3), dim=1), image(2)),
    "weight_norm twice, cached": lambda: given(
        Parts(lambda m, x: m.l(m.l(x).tanh()), l=parametrizations.weight_norm(nn.Linear(D, D))), vectors(),
        losses=cached),
    "weight_norm twice": lambda: case(lambda m, x: m.l(m.l(x).tanh()), tokens(),
        l=parametrizations.weight_norm(nn.Linear(D, D))),
    "weight_norm by hooks": lambda: given(nn.utils.weight_norm(nn.Linear(D, 4)), vectors()),
    "spectral_norm": lambda: given(parametrizations.spectral_norm(nn.Linear(D, 4)).eval(), tokens()),
    "spectral_norm in training": lambda: given(
        nn.Sequential(parametrizations.spectral_norm(nn.Linear(D, 4)), nn.Tanh(), nn.Linear(4, 2)), vectors()),
    "spectral_norm of a convolution in training": lambda: given(parametrizations.spectral_norm(nn.Conv1d(D, 4, 3)),
        tokens(D, 7)),
    "spectral_norm by hooks, in training": lambda: given(nn.utils.spectral_norm(nn.Linear(D, 4)), vectors()),
    "orthogonal": lambda: given(parametrizations.orthogonal(nn.Linear(D, D)), vectors()),
    "orthogonal by the Cayley map": lambda: given(parametrizations.orthogonal(nn.Linear(D, 4), orthogonal_map="cayley"),
        tokens()),
    "parametrization of a recurrent layer": lambda: case(lambda m, x: m.r(x)[0], tokens(),
        r=parametrizations.weight_norm(nn.GRU(D, 4, batch_first=True), "weight_hh_l0")),
    "length and direction": lambda: case(low_rank_update, vectors(), base=nn.Linear(D, 4, bias=False), a=normal(2, D),
        b=normal(4, 2), length=normal(4)),
    "low rank beside the weight": lambda: case(lambda m, x: m.base(x) + x @ m.a @ m.b, tokens(), base=nn.Linear(D, 4),
        a=normal(D, 2), b=normal(2, 4)),
    "weight standardized": lambda: case(
        lambda m, x: F.conv2d(x,
        (m.c.weight - m.c.weight.mean((1, 2, 3), keepdim=True)) / m.c.weight.std((1, 2, 3), keepdim=True), m.c.bias),
        image(2), c=nn.Conv2d(2, 4, 3)),
    "weight masked": lambda: case(lambda m, x: F.linear(x, m.l.weight * m.mask, m.l.bias).tanh(), tokens(),
        l=nn.Linear(D, 4), mask=torch.randn(4, D).sign()),
    "weight squashed": lambda: case(lambda m, x: F.linear(x, m.w.tanh()), vectors(), w=normal(N, D)),
    "weight lower triangular": lambda: case(lambda m, x: x @ m.w.tril() @ m.s.diag(), vectors(), w=normal(D, D),
        s=normal(D)),
    "weight from a matrix exponential": lambda: case(
        lambda m, x: x @ torch.linalg.matrix_exp(m.w.triu(1) - m.w.triu(1).T), vectors(), w=normal(D, D)),
    "weight inverted": lambda: case(lambda m, x: torch.linalg.solve(m.w + 9 * torch.eye(D), x.T).T, vectors(),
        w=normal(D, D)),
    "weight by kron": lambda: case(lambda m, x: x @ torch.kron(m.a, m.b), vectors(), a=normal(2, 2), b=normal(3, 3)),
    "softmax of weights": lambda: case(lambda m, x: torch.einsum("k,ntk->nt", m.w.softmax(0), m.i(x)), tokens(),
        w=normal(D), i=nn.Linear(D, D)),
    "cumulative sum of weights": lambda: case(lambda m, x: x + m.w.cumsum(0), vectors(), w=normal(D)),
    "tied embedding": lambda: case(tied, ids(N), e=nn.Embedding(9, D)),
    "tied layers": lambda: case(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight.T, m.b), vectors(), a=nn.Linear(D, 4),
        b=normal(D)),
    "called on inputs of different shapes": lambda: case(
        lambda m, x: m.a(x).mean(1) + m.a(x[:, 0]).tanh() * m.a(x.mean(1)), tokens(), a=nn.Linear(D, D)),
    "recurrent in depth": lambda: case(lambda m, x: m.t(m.t(x)), tokens(), t=encoder_layer(batch_first=True)),
    "slices of a weight": lambda: case(lambda m, x: F.linear(x, m.w[:3]) * F.linear(x, m.w[2:5], m.b[::2]).tanh(),
        vectors(), w=normal(5, D), b=normal(6)),
    "chunks of a weight": lambda: case(
        lambda m, x: attend(*(F.linear(y, w) for y, w in zip((x, x.tanh(), x), m.w.chunk(3), strict=True))), tokens(),
        w=normal(3 * D, D)),
    "a vector split into a network": lambda: case(split_vector, vectors(), theta=normal(D * 4 + 12)),
    "weight transposed and viewed": lambda: case(lambda m, x: (x @ m.w.view(4, D).T).tanh() @ m.w.view(D, 4).mT[:, :2],
        vectors(), w=normal(4 * D)),
    "weight expanded": lambda: case(lambda m, x: x @ m.w.expand(D, 4), vectors(), w=normal(1, 4)),
    "weight flipped and padded": lambda: case(
        lambda m, x: F.linear(F.pad(x, (1, 1)), F.pad(m.w.flip(1), (2, 0))).tanh(), vectors(), w=normal(3, D)),
    "view_as_complex": lambda: case(fourier, torch.randn(N, 10, D), w=normal(N, D, 4, 2)),
    "view_as_complex, times": lambda: case(
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(m.w), n=8, dim=1),
        torch.randn(N, 8, 4), w=normal(5, 4, 2)),
    "complex of two parameters": lambda: case(
        lambda m, x: torch.view_as_real(x.to(torch.complex128) @ torch.complex(m.a, m.b)), vectors(), a=normal(D, 4),
        b=normal(D, 4)),
    "polar of two parameters": lambda: case(lambda m, x: torch.view_as_real(x * torch.polar(m.a.exp(), m.b)), vectors(),
        a=normal(D), b=normal(D)),
    "a scalar times": lambda: case(lambda m, x: x * m.a, vectors(), a=normal()),
    "a scalar plus": lambda: case(lambda m, x: m.a + m.i(x), vectors(), a=normal(), i=nn.Linear(D, 2)),
    "a scalar's exponential": lambda: case(lambda m, x: m.i(x) / m.a.exp(), tokens(), a=normal(), i=nn.Linear(D, D)),
    "a scalar as an exponent": lambda: case(lambda m, x: (x.abs() + 1) ** m.a, vectors(), a=normal()),
    "a scalar mixes": lambda: case(lambda m, x: torch.lerp(x, m.i(x), m.a.sigmoid()), vectors(), a=normal(),
        i=nn.Linear(D, D)),
    "a scalar expanded": lambda: case(lambda m, x: torch.cat([x, m.a.expand(N, 1)], 1).square(), vectors(), a=normal()),
    "a scalar stacked": lambda: case(lambda m, x: x @ torch.stack([m.a, m.b, m.a * m.b, -m.b, m.a, m.b]),
        vectors()[:, None], a=normal(), b=normal()),
    "a scalar in addmm": lambda: case(lambda m, x: torch.addmm(m.a, x, m.w), vectors(), a=normal(), w=normal(D, 3)),
    "a scalar in the loss": lambda: case(lambda m, x: m.i(x), vectors(), a=normal(), i=nn.Linear(D, 2),
        losses=lambda m, x: squared(m, x) * m.a.exp() - m.a),
    "one number for all": lambda: case(lambda m, x: x * m.a, vectors(), a=normal(1)),
}  # fmt: skip


# Functions with a parameter in any place


def einsum(equation: str, x: Tensor, *shapes: tuple[int, ...], at: int = 0, output: str = "n") -> Situation:
    """x is operand ``at``; parameters are the others."""

    def function(m: nn.Module, x: Tensor) -> Tensor:
        operands = [*m.w]
        operands.insert(at, x)
        y = torch.einsum(equation, *operands)
        return y.movedim(equation.partition("->")[2].index(output), 0).tanh().reshape(N, -1)

    return case(function, x, w=nn.ParameterList([normal(*shape) for shape in shapes]))


FUNCTIONS: Table = {
    "einsum nd,od->no": lambda: einsum("nd,od->no", vectors(), (N, D)),
    "einsum od,nd->no": lambda: einsum("od,nd->no", vectors(), (N, D), at=1),
    "einsum do,nd->on": lambda: einsum("do,nd->on", vectors(), (D, N), at=1),
    "einsum ntd,do->nto": lambda: einsum("ntd,do->nto", tokens(), (D, D)),
    "einsum do,ntd->otn": lambda: einsum("do,ntd->otn", tokens(), (D, D), at=1),
    "einsum ntd,tdo->no": lambda: einsum("ntd,tdo->no", tokens(), (N, D, D)),
    "einsum nd,d->n": lambda: einsum("nd,d->n", vectors(), (D,)),
    "einsum nd,e->nde": lambda: einsum("nd,e->nde", vectors(), (N,)),
    "einsum nd,de,ef->nf": lambda: einsum("nd,de,ef->nf", vectors(), (D, N), (N, 3)),
    "einsum n...d,do->n...o": lambda: einsum("n...d,do->n...o", tokens(), (D, 3)),
    "einsum ntd,nsd with a parameter": lambda: case(lambda m, x: torch.einsum("ntd,nsd,ds->nts", x, x.tanh(), m.w),
        tokens(), w=normal(D, N)),
    "tensordot": lambda: case(lambda m, x: torch.tensordot(x, m.w, 2).tanh(), tokens(), w=normal(N, D, 3)),
    "tensordot, parameter first": lambda: case(lambda m, x: torch.tensordot(m.w, x, ([1], [2])).permute(1, 2, 0).tanh(),
        tokens(), w=normal(N, D)),
    "matmul, parameter first": lambda: case(lambda m, x: (m.w @ x.mT).tanh(), tokens(), w=normal(N, D)),
    "matmul, vector": lambda: case(lambda m, x: x @ m.w, tokens(), w=normal(D)),
    "matmul, vector first": lambda: case(lambda m, x: (m.w @ x).tanh(), tokens(), w=normal(N)),
    "matmul, batches of parameters": lambda: case(lambda m, x: (x[:, None] @ m.w).tanh(), tokens(), w=normal(N, D, 3)),
    "matmul, a parameter for each token": lambda: case(lambda m, x: swap((swap(x) @ m.w).tanh()), tokens(),
        w=normal(N, D, 3)),
    "mm": lambda: case(lambda m, x: torch.mm(x, m.w).tanh(), vectors(), w=normal(D, N)),
    "mm, parameter first": lambda: case(lambda m, x: torch.mm(m.w, x.T).T.tanh(), vectors(), w=normal(N, D)),
    "mv": lambda: case(lambda m, x: torch.mv(x, m.w)[:, None].tanh(), vectors(), w=normal(D)),
    "bmm, parameter expanded": lambda: case(lambda m, x: torch.bmm(x, m.w.expand(N, D, 3)).tanh(), tokens(),
        w=normal(D, 3)),
    "bmm, sequence-first": lambda: case(lambda m, x: swap(torch.bmm(swap(x), m.w)).tanh(), tokens(), w=normal(N, D, 3)),
    "baddbmm": lambda: case(lambda m, x: torch.baddbmm(m.b, x, m.w.expand(N, D, D), alpha=2.0).tanh(), tokens(),
        w=normal(D, D), b=normal(N, D)),
    "baddbmm, sequence-first": lambda: case(lambda m, x: swap(torch.baddbmm(m.b, swap(x), m.w)), tokens(),
        w=normal(N, D, 3), b=normal(N, 1, 3)),
    "addmm": lambda: case(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5).tanh(), vectors(), w=normal(D, 4),
        b=normal(4)),
    "addmm, matrix of biases": lambda: case(lambda m, x: torch.addmm(m.b, m.w, x.T).T.tanh(), vectors(), w=normal(N, D),
        b=normal(N, 1)),
    "addmv": lambda: case(lambda m, x: torch.addmv(m.b, x, m.w)[:, None].square(), vectors(), w=normal(D), b=normal(1)),
    "addcmul": lambda: case(lambda m, x: torch.addcmul(m.a, x, m.b, value=2.0).tanh(), tokens(), a=normal(N, D),
        b=normal(D)),
    "addcdiv": lambda: case(lambda m, x: torch.addcdiv(x, m.a, x.square() + 1).tanh(), tokens(), a=normal(N, D)),
    "multi_dot": lambda: case(lambda m, x: torch.linalg.multi_dot([x, m.a, m.b]), vectors(), a=normal(D, 3),
        b=normal(3, N)),
    "inner": lambda: case(lambda m, x: torch.inner(m.w, x).T.tanh(), vectors(), w=normal(N, D)),
    "vecdot": lambda: case(lambda m, x: torch.linalg.vecdot(x, m.w).tanh(), tokens(), w=normal(N, D)),
    "cross product": lambda: case(lambda m, x: torch.linalg.cross(x, m.w[None]), tokens(N, 3), w=normal(N, 3)),
    "where": lambda: case(lambda m, x: torch.where(x > 0, x, m.w).square(), tokens(), w=normal(N, D)),
    "where, mask token": lambda: case(lambda m, x: m.i(torch.where(x[..., :1] > 0, m.w, x)).tanh(), tokens(),
        w=normal(D), i=nn.Linear(D, 2)),
    "masked_fill": lambda: case(lambda m, x: m.i(x.masked_fill(x > 0, m.a)).tanh(), tokens(), a=normal(),
        i=nn.Linear(D, 2)),
    "cat": lambda: case(lambda m, x: m.i(torch.cat([m.c.expand(N, 1, D), x], 1)).tanh(), tokens(), c=normal(1, 1, D),
        i=nn.Linear(D, 2)),
    "cat, sequence-first": lambda: case(lambda m, x: swap(torch.cat([m.c.expand(2, N, D), swap(x)])).square(), tokens(),
        c=normal(2, 1, D)),
    "stack": lambda: case(lambda m, x: torch.stack([x, m.c.expand(N, N, D)], 2).square(), tokens(), c=normal(N, D)),
    "setitem": lambda: case(set_first, tokens(), i=nn.Linear(D, D), c=normal(D)),
    "setitem by mask": lambda: case(set_masked, tokens(), i=nn.Linear(D, D), c=normal(D)),
    "setitem, samples last": lambda: case(set_last, tokens(), i=nn.Linear(D, D), c=normal(N, 1)),
    "index_put": lambda: case(lambda m, x: m.i(x).index_put((torch.arange(N), torch.arange(N).flip(0)), m.c).square(),
        tokens(), i=nn.Linear(D, D), c=normal(D)),
    "index_copy": lambda: case(lambda m, x: m.i(x).index_copy(1, torch.tensor([4, 1]), m.c.expand(N, 2, D)).square(),
        tokens(), i=nn.Linear(D, D), c=normal(2, D)),
    "index_fill": lambda: case(lambda m, x: m.i(x).index_fill(1, torch.tensor([4, 1]), m.a).square(), tokens(),
        i=nn.Linear(D, D), a=normal()),
    "scatter": lambda: case(lambda m, x: m.i(x).scatter(1, x.argsort(1)[:, :2], m.c.expand(N, 2, D)).square(), tokens(),
        i=nn.Linear(D, D), c=normal(2, D)),
    "masked_scatter": lambda: case(
        lambda m, x: m.i(x).masked_scatter(torch.eye(N).bool()[..., None].expand(N, N, D), m.c.expand(N, D)).square(),
        tokens(), i=nn.Linear(D, D), c=normal(D)),
    "index_select of a table": lambda: case(lambda m, x: m.w.index_select(0, x.flatten()).view(N, N, D).tanh(), ids(N),
        w=normal(9, D)),
    "gather of a table": lambda: case(lambda m, x: m.w.gather(0, x).tanh(), ids(D), w=normal(9, D)),
    "take of a table": lambda: case(lambda m, x: m.w.take(x).tanh(), ids(N), w=normal(9)),
    "one-hot": lambda: case(lambda m, x: (F.one_hot(x, 9).double() @ m.w).tanh(), ids(N), w=normal(9, D)),
    "in place: add, multiply": lambda: case(in_place, tokens(), i=nn.Linear(D, D), a=normal(N, D), g=normal(D),
        o=nn.Linear(D, 2)),
    "maximum": lambda: case(lambda m, x: torch.maximum(x, m.w).square(), tokens(), w=normal(N, D)),
    "clamp": lambda: case(lambda m, x: x.clamp(min=m.a, max=m.b).square(), tokens(), a=normal(D),
        b=nn.Parameter(torch.ones(N, 1))),
    "minimum along a table": lambda: case(lambda m, x: (x[:, :, None] - m.w).abs().amin(2), tokens(), w=normal(N, D)),
    "grid_sample of a parameter": lambda: case(
        lambda m, x: F.grid_sample(m.p.expand(N, -1, -1, -1), x.view(N, 3, 1, 2).tanh(), align_corners=False),
        vectors(), p=normal(1, 3, 4, 4)),
    "convolution with parameters as the input": lambda: case(
        lambda m, x: F.conv1d(m.p[None], x[:, None, :3]).squeeze(0).tanh(), vectors(), p=normal(1, 9)),
    "convolution of a learned image": lambda: case(lambda m, x: torch.tanh(m.c(m.p) * x[:, :1, None, None]), vectors(),
        p=normal(1, 2, 5, 5), c=nn.Conv2d(2, 3, 3)),
    "functional norm": lambda: case(lambda m, x: F.layer_norm(x, (D,), m.g, m.b).tanh(), tokens(), g=normal(D),
        b=normal(D)),
    "functional group norm": lambda: case(lambda m, x: F.group_norm(x, 2, m.g.exp(), m.b).tanh(), tokens(), g=normal(D),
        b=normal(D)),
    "adaptive norm": lambda: case(lambda m, x, c: m.n(x) * (1 + m.s(c)[:, None]) + m.t(c)[:, None], tokens(), vectors(),
        n=nn.LayerNorm(D), s=nn.Linear(D, D), t=nn.Linear(D, D)),
    "unused and frozen parameters": lambda: case(lambda m, x: m.i(x) * m.f, vectors(), i=nn.Linear(D, D),
        f=nn.Parameter(torch.randn(D), requires_grad=False), u=normal(3), l=nn.Linear(2, 2)),
}  # fmt: skip


def set_first(m: Parts, x: Tensor) -> Tensor:
    h = m.i(x)
    h[:, 0] = m.c
    return h.square()


def set_masked(m: Parts, x: Tensor) -> Tensor:
    h = m.i(x)
    h[x.sum(-1) > 0] = m.c
    return h.square()


def set_last(m: Parts, x: Tensor) -> Tensor:
    h = m.i(x).permute(1, 2, 0).clone()  # (T, D, N)
    h[:, 0] = m.c
    return h.permute(2, 0, 1).square()


def in_place(m: Parts, x: Tensor) -> Tensor:
    h = m.i(x)
    h += m.a
    h.mul_(m.g)
    h[:, 1:] += m.a[1:]
    return m.o(h.tanh_())


# What runs a model's functions: checkpoints, scripts, dropout


class Gate(torch.autograd.Function):
    """x * sigmoid(w), w of (D,)"""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w.sigmoid()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        s = w.sigmoid()
        return grad * s, (grad * x * s * (1 - s)).reshape(-1, len(w)).sum(0)


class OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.flatten(0, -2).T @ x.flatten(0, -2)


def checkpointed(reentrant: bool) -> Situation:
    def block(m: Parts, x: Tensor) -> Tensor:
        return m.b(m.n(torch.tanh(m.a(x) + m.p)))

    return case(
        lambda m, x: m.o(checkpoint(lambda h: block(m, h), m.i(x), use_reentrant=reentrant)),
        tokens(),
        **{name: nn.Linear(D, D) for name in ("i", "a", "b", "o")},
        n=nn.LayerNorm(D),
        p=normal(N, D),
    )


def dropped_paths(m: Parts, x: Tensor) -> Tensor:
    keep = torch.rand(N, 1, 1) < 0.6 if m.training else torch.ones(N, 1, 1)
    return x + keep * m.g * m.i(x).tanh()


RUN: Table = {
    "checkpoint": lambda: checkpointed(False),
    "reentrant checkpoint": lambda: checkpointed(True),
    "dropout": lambda: given(nn.Sequential(nn.Linear(D, 9), nn.Dropout(0.4), nn.Linear(9, 3)), tokens()),
    "dropout in a sequence-first encoder": lambda: case(lambda m, x: swap(m.t(swap(x))), tokens(),
        t=nn.TransformerEncoderLayer(D, 2, 9, dropout=0.3)),
    "dropout in attention": lambda: case(lambda m, x: m.a(x, x, x)[0], tokens(),
        a=nn.MultiheadAttention(D, 2, dropout=0.3, batch_first=True)),
    "dropout of whole paths": lambda: case(dropped_paths, tokens(), i=nn.Linear(D, D), g=normal(D)),
    "dropout of channels": lambda: given(nn.Sequential(nn.Conv2d(2, D, 3), nn.Dropout2d(0.5), nn.Conv2d(D, 2, 1)),
        image(2)),
    "dropout in a recurrent layer": lambda: recurrent(nn.LSTM, True, num_layers=2, dropout=0.4),
    "scripted activation": lambda: given(
        nn.Sequential(nn.Linear(D, 4), torch.jit.script(nn.Sequential(nn.ReLU())), nn.Linear(4, 2)), vectors()),
    "scripted layers": lambda: given(
        nn.Sequential(nn.Linear(D, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.Tanh()))), vectors()),
    "an autograd.Function": lambda: case(lambda m, x: Gate.apply(m.i(x), m.w), tokens(), i=nn.Linear(D, D),
        w=normal(D)),
    "an autograd.Function of a weight": lambda: case(lambda m, x: OwnLinear.apply(x, m.w).tanh(), tokens(),
        w=normal(N, D)),
    "an autograd.Function of a changed weight": lambda: case(lambda m, x: OwnLinear.apply(x, m.w.tanh()), vectors(),
        w=normal(N, D)),
    "vmap over samples": lambda: case(lambda m, x: torch.vmap(m.i)(x) * m.g, tokens(), i=mlp(), g=normal(D)),
    "vmap over tokens": lambda: case(lambda m, x: torch.vmap(m.i, in_dims=1, out_dims=1)(x), tokens(), i=mlp()),
}  # fmt: skip


# N is the number of losses, and no number of rows


def noised(k_major: bool) -> Situation:
    draws = torch.randn(3, N, D)

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        rows = x + draws if k_major else swap(x + draws)
        return squared(m, rows.flatten(0, 1)).view(rows.shape[:2]).mean(0 if k_major else 1)

    return given(mlp(), vectors(), losses=losses)


def in_one_call(outputs: Callable[[list[Tensor]], Tensor], *rows: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Losses of len(rows) N rows in one call, one block of rows after another."""

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        return outputs(list(m(torch.cat([change(x) for change in rows])).chunk(len(rows))))

    return losses


def preferences(m: Parts, chosen: Tensor, rejected: Tensor) -> Tensor:
    """DPO, with a frozen reference."""
    both = torch.cat([chosen, rejected])
    ratio = m.policy(both).sum(1) - m.reference(both).detach().sum(1)
    return -F.logsigmoid(0.3 * (ratio[:N] - ratio[N:]))


def preference_pair() -> Situation:
    policy = mlp()
    reference = copy.deepcopy(policy).requires_grad_(False)
    return case(
        lambda m, *x: preferences(m, *x), vectors(), vectors(), policy=policy, reference=reference, losses=preferences
    )


def flow(t: Tensor) -> Situation:
    """A velocity field f(t, x) with one time for all, whose embedding has layers of its own."""

    def field(m: Parts, t: Tensor, x: Tensor) -> Tensor:
        return m.b(torch.cat([x, m.time(t.reshape(-1, 1)).expand(len(x), 4)], 1).tanh())

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        for step in range(3):
            x = x + 0.3 * m(t + 0.1 * step, x)
        return x.square().sum(1)

    return case(field, vectors(), time=nn.Linear(1, 4), b=nn.Linear(D + 4, D), losses=losses)


def few_shot(m: nn.Module, x: Tensor) -> Tensor:
    """Classes are means of a support set, which goes through the model before the samples do."""
    support = torch.arange(8.0 * D).sin().view(8, D)
    centres = m(support).view(4, 2, -1).mean(1)
    return -torch.cdist(m(x), centres).square().log_softmax(-1)[:, 0]


def warmed(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        mean = m(torch.ones(2, D)).mean(0)
    return (m(x) - mean).square().sum(1)


def crops(m: nn.Module, x: Tensor) -> Tensor:
    """Two large crops and four small ones of each image, each size in one call."""
    large, small = torch.cat([x, x.flip(-1)]), torch.cat([x[..., i : i + 3, j : j + 3] for i in (0, 2) for j in (0, 2)])
    large, small = m(large).view(2, N, -1), m(small).view(4, N, -1)
    return (large[:, None] - small).square().sum(-1).mean((0, 1))


def after_context(m: nn.Module, x: Tensor) -> Tensor:
    return m(torch.cat([torch.ones(3, D), x]))[3:].square().sum(1)


def beside_context(m: nn.Module, x: Tensor) -> Tensor:
    """Rows of a context, in the samples' call, that every loss needs."""
    outputs = m(torch.cat([x, torch.arange(3.0 * D).sin().view(3, D)]))
    return (outputs[:N, None] - outputs[N:]).square().sum((1, 2))


COUNT: Table = {
    "noise draws in the batch, draws first": lambda: noised(True),
    "noise draws in the batch, samples first": lambda: noised(False),
    "conditional and unconditional": lambda: given(mlp(), vectors(),
        losses=in_one_call(lambda y: (3 * y[0] - 2 * y[1]).square().sum(1), lambda x: x, torch.zeros_like)),
    "pairs": lambda: given(mlp(), vectors(),
        losses=in_one_call(lambda y: (y[0] - y[1]).square().sum(1), lambda x: x, torch.neg)),
    "triplets": lambda: given(mlp(), vectors(),
        losses=in_one_call(lambda y: (1 + (y[0] - y[1]).norm(dim=1) - (y[0] - y[2]).norm(dim=1)).exp(), lambda x: x,
        torch.neg, torch.sin)),
    "pairs side by side": lambda: given(mlp(), vectors(),
        losses=lambda m, x: m(torch.stack([x, x.sin()], 1).flatten(0, 1)).view(N, 2,
        -1).diff(dim=1).square().sum((1, 2))),
    "pairs of images": lambda: given(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)), image(2),
        losses=in_one_call(lambda y: (y[0] - y[1]).square().sum(1), lambda x: x, torch.neg)),
    "pairs of sequences, sequence-first": lambda: case(lambda m, x: m.t(x), tokens(),
        t=encoder_layer(),
        losses=lambda m, x: (lambda y: (y[:, :N] - y[:, N:]).square().sum((0, 2)))(m(swap(torch.cat([x, -x]))))),
    "chosen and rejected": preference_pair,
    "one time, of no dimension": lambda: flow(torch.tensor(0.1)),
    "one time, of one dimension": lambda: flow(torch.tensor([0.1])),
    "one time through an embedding": lambda: case(lambda m, t, x: m.b(x + m.time(t)).tanh(), vectors(),
        time=nn.Embedding(9, D), b=nn.Linear(D, D),
        losses=lambda m, x: (m(torch.tensor([3]), x) + x * m(torch.tensor(5), x)).square().sum(1)),
    "one time for all, as many as samples": lambda: case(
        lambda m, t, x: torch.einsum("kd,nd->nk", m.time(t).tanh(), m.b(x)), vectors(), time=nn.Linear(1, D),
        b=nn.Linear(D, D), losses=lambda m, x: m(torch.linspace(0, 1, N)[:, None], x).square().sum(1)),
    "support set before the samples": lambda: given(mlp(), vectors(), losses=few_shot),
    "first on two rows without gradients": lambda: given(mlp(), vectors(), losses=warmed),
    "first on one row with gradients": lambda: given(mlp(), vectors(),
        losses=lambda m, x: (m(x) - m(torch.ones(1, D))).square().sum(1)),
    "first on as many other rows": lambda: given(mlp(), vectors(),
        losses=lambda m, x: (m(x) - m(torch.eye(N)).mean(0)).square().sum(1)),
    "crops of two sizes": lambda: given(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), image(2),
        losses=crops),
    "after rows of a context": lambda: given(mlp(), vectors(), losses=after_context),
    "beside rows of a context": lambda: given(mlp(), vectors(), losses=beside_context),
    "called twice": lambda: given(mlp(), vectors(), losses=lambda m, x: (m(m(x)) + m(-x)).square().sum(1)),
    "called on parts of the batch": lambda: given(mlp(), vectors(),
        losses=lambda m, x: torch.cat([squared(m, part) for part in x.split([1, 2, 3])])),
    "called on one sample at a time": lambda: given(mlp(), vectors(),
        losses=lambda m, x: torch.stack([m(row).square().sum() for row in x])),
    "bags of rows": lambda: case(lambda m, x: m.b((m.s(x).view(N, 4, 1).softmax(1) * m.a(x).view(N, 4, -1)).sum(1)),
        torch.randn(N, 4, D), a=nn.Linear(D, 3), s=nn.Linear(D, 1), b=nn.Linear(3, 2),
        losses=lambda m, x: m(x.flatten(0, 1)).square().sum(1)),
}  # fmt: skip


# Losses with a derivative in them


def slope(m: nn.Module, x: Tensor) -> Tensor:
    """The gradient of m by its input."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(m(x).sum(), x, create_graph=True)[0]


def penalized(m: nn.Module, x: Tensor) -> Tensor:
    return m(x).flatten(1).sum(1) + 10 * (slope(m, x).flatten(1).norm(dim=1) - 1).square()


def score_matched(m: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """Hutchinson's estimate of the divergence of a score, plus half its square."""
    x = x.clone().requires_grad_()
    score = m(x)
    (along,) = torch.autograd.grad((score * v).sum(), x, create_graph=True)
    return (along * v).flatten(1).sum(1) + 0.5 * score.square().flatten(1).sum(1)


def divergence(m: nn.Module, x: Tensor) -> Tensor:
    """Exact, one derivative for each coordinate."""
    x = x.clone().requires_grad_()
    y = m(x)
    parts = [torch.autograd.grad(y[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(y.shape[1])]
    return torch.stack(parts).sum(0) + 0.5 * y.square().sum(1)


def heat_equation(m: nn.Module, x: Tensor) -> Tensor:
    """(u_t - u_xx)^2 of u(t, x)."""
    t, x = (part.clone().requires_grad_() for part in x.split(1, 1))
    u = m(torch.cat([t, x], 1)).sum()
    (u_t, u_x) = torch.autograd.grad(u, (t, x), create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    return (u_t - u_xx).square().sum(1)


def jacobian_penalty(m: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    h = m(x)
    rows = [torch.autograd.grad(h[:, i].sum(), x, create_graph=True)[0] for i in range(h.shape[1])]
    return torch.stack(rows).square().sum((0, 2)) + h.square().sum(1)


def forward_mode(m: nn.Module, x: Tensor) -> Tensor:
    y, tangent = torch.func.jvp(m, (x,), (torch.ones_like(x),))
    return (y + tangent).square().sum(1)


def energy_by_vmap(m: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(torch.func.grad(lambda row: m(row).sum()))(x).square().sum(1)


DERIVATIVES: Table = {
    "gradient penalty": lambda: given(mlp(D, 1), vectors(), losses=penalized),
    "gradient penalty of a convolution": lambda: given(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(36, 1)), image(2),
        losses=penalized),
    "gradient penalty of attention": lambda: case(lambda m, x: m.o(attend(*m.qkv(x + m.p).chunk(3, -1)).mean(1)),
        tokens(), qkv=nn.Linear(D, 3 * D), p=normal(N, D), o=nn.Linear(D, 1), losses=penalized),
    "gradient penalty, sequence-first": lambda: case(lambda m, x: m.o(m.n(m.i(swap(x)).tanh()).mean(0)), tokens(),
        i=nn.Linear(D, D), n=nn.LayerNorm(D), o=nn.Linear(D, 1), losses=penalized),
    "gradient penalty of a recurrent cell": lambda: case(lambda m, x: m.o(m.c(x[:, 1], m.c(x[:, 0]))), tokens(),
        c=nn.GRUCell(D, 4), o=nn.Linear(4, 1), losses=penalized),
    "gradient penalty alone": lambda: given(mlp(D, 1), vectors(), losses=lambda m, x: slope(m, x).square().sum(1)),
    "score matching": lambda: given(mlp(), vectors(), vectors().sign(), losses=score_matched),
    "score matching of an image": lambda: given(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 1)), image(2), image(2).sign(),
        losses=score_matched),
    "divergence": lambda: given(mlp(), vectors(), losses=divergence),
    "heat equation": lambda: given(nn.Sequential(mlp(2, 4), nn.Tanh(), nn.Linear(4, 1)), vectors(2),
        losses=heat_equation),
    "contractive": lambda: given(nn.Sequential(nn.Linear(D, 3), nn.Sigmoid()), vectors(), losses=jacobian_penalty),
    "force of an energy": lambda: case(lambda m, x: m.e(x) * m.a, vectors(), e=mlp(D, 1), a=normal(),
        losses=lambda m, x: (x + slope(m, x)).square().sum(1)),
    "derivative through a parameter's function": lambda: case(lambda m, x: (F.linear(x, m.w.tanh()).square()).sum(1),
        vectors(), w=normal(N, D), losses=lambda m, x: slope(m, x).square().sum(1)),
    "derivative in forward mode": lambda: given(mlp(), vectors(), losses=forward_mode),
    "derivative under vmap": lambda: given(mlp(D, 1), vectors(), losses=energy_by_vmap),
}  # fmt: skip


SITUATIONS: Table = {
    f"{kind}: {name}": make
    for kind, table in {
        "tokens": TOKENS,
        "recurrent": RECURRENT,
        "routes": ROUTES,
        "layers": LAYERS,
        "reparametrized": REPARAMETRIZED,
        "functions": FUNCTIONS,
        "run": RUN,
        "count": COUNT,
        "derivative": DERIVATIVES,
    }.items()
    for name, make in table.items()
}


def build(name: str, *, training: bool = True) -> Situation:
    """The same each time: a forward pass may change a model, as spectral_norm does."""
    torch.manual_seed(0)
    situation = SITUATIONS[name]()
    if not training:
        situation.model.eval()
    return situation


def losses_of(situation: Situation) -> Tensor:
    torch.manual_seed(1)
    return situation.losses(situation.model, *situation.batch)


@cache
def truth(name: str, *, training: bool = True) -> Rows:
    situation = build(name, training=training)
    return rows_by_loop(situation.model, losses_of(situation))


def block(name: str, ending: str, **options: object) -> tuple[SampleGradients, nn.Module]:
    situation = build(name)
    with SampleGradients(situation.model, **options) as sg:
        losses = losses_of(situation)
        if ending == "sg.backward(losses)":
            sg.backward(losses)
        elif options.get("loss_reduction") == "mean":
            losses.mean().backward()
        else:
            losses.sum().backward()
    return sg, situation.model


def assert_right(name: str, ending: str) -> None:
    rows = truth(name)
    sg, model = block(name, ending, gram=True, diagonal=True)
    assert_statistics(sg, rows, TOLERANCE)
    assert_grads(model, rows, N, TOLERANCE)
    along = random_directions(rows, 2)
    reduction = "sum" if ending == "sg.backward(losses)" else "mean"
    sg, model = block(name, ending, direction=along, loss_reduction=reduction)
    assert_close(sg.projections, flat(rows) @ flat(along).T, TOLERANCE, "projections on directions")
    assert_close(sg.sq_norms, flat(rows).square().sum(1), TOLERANCE, "sq_norms")
    assert_grads(model, rows, N if reduction == "sum" else 1, TOLERANCE)


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("ending", ["losses.sum().backward()", "sg.backward(losses)"])
def test_statistics(name, ending):
    assert_right(name, ending)


@pytest.mark.parametrize("name", SITUATIONS)
def test_fisher(name):
    """The diagonal, and the top eigenvector with its eigenvalue, of one batch."""
    rows = truth(name, training=False)
    gradients = flat(rows)
    situation = build(name, training=False)
    loader = [situation.batch]
    fisher = estimate_fisher(situation.model, lambda m, b: situation.losses(m, *b), loader, kind="diagonal")
    assert_close(fisher.fisher_diagonal, gradients.square().mean(0), TOLERANCE, "diagonal")
    situation = build(name, training=False)
    fisher = estimate_fisher(
        situation.model, lambda m, b: situation.losses(m, *b), loader, direction="top", unbiased=False
    )
    values, vectors = torch.linalg.eigh(gradients @ gradients.T / N)
    top = vectors[:, -1] @ gradients / (N * values[-1]).sqrt()
    assert_close(fisher.curvatures, values[-1:], TOLERANCE, "curvature")
    assert_close((fisher.directions[0] @ top).abs(), torch.tensor(1.0), TOLERANCE, "cosine with the top eigenvector")
    assert abs(fisher.statistics.rho / float(values[-1] / values.sum()) - 1) < TOLERANCE
