"""A decoder with the shapes of Llama 3 in plain PyTorch, and its shards.

RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases, embedding and head of their own. Each block is
sharded by ``fully_shard``, and then the rest, with forward and backward in bfloat16 and float32 everything else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional

TOKENS = 16  # of the one sequence in a forward pass; no count below depends on it


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    layers: int
    width: int
    hidden: int  # of SwiGLU
    heads: int
    key_heads: int  # query heads share keys and values
    vocabulary: int


LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128256)
# Of the same form, for real processes on one machine; 8 processes do not divide its vocabulary.
SMALL = Shape(2, 64, 224, 8, 2, 250)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.size = shape.width // shape.heads
        self.query = nn.Linear(shape.width, shape.heads * self.size, bias=False)
        self.key = nn.Linear(shape.width, shape.key_heads * self.size, bias=False)
        self.value = nn.Linear(shape.width, shape.key_heads * self.size, bias=False)
        self.output = nn.Linear(shape.heads * self.size, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(
            _rotated(query), _rotated(key), value, is_causal=True, enable_gqa=True
        )
        return self.output(attended.transpose(1, 2).flatten(2))


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions, for (batch, heads, length, size)."""
    length, size = x.shape[-2:]
    rates = 500_000.0 ** (-torch.arange(0, size, 2, device=x.device) / size)
    angles = torch.arange(length, device=x.device)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
        self.attention = Attention(shape)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        y = self.mlp_norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mesh_of(replicas: int, shards: int) -> DeviceMesh:
    """replicas x shards processes: FSDP2's mesh with one replica, HSDP's with more."""
    if replicas == 1:
        return init_device_mesh("cpu", (shards,), mesh_dim_names=("shard",))
    return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))


def sharded_decoder(shape: Shape, mesh: DeviceMesh) -> Decoder:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    decoder = Decoder(shape)
    for block in decoder.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(decoder, mesh=mesh, mp_policy=policy)
    return decoder


def loss_of(decoder: Decoder) -> Tensor:
    tokens = torch.arange(TOKENS)[None]
    return functional.cross_entropy(decoder(tokens).float().flatten(0, 1), tokens.flatten())
