"""Runs the library's code on one rank of a sharded decoder and keeps what it does, see ``ledger``.

The same functions run on fake tensors in a fake process group of any size, and on real ones in real processes.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.distributed.device_mesh import DeviceMesh

import crl_kernels as ck
from crl_kernels import files
from crl_kernels.distributed.agreement import Agreement
from crl_kernels.distributed.shards import local_part

from ..trainers import History, adamw, after_the_step, attached, in_the_gradient, in_the_loss, inside
from .decoder import Decoder, Shape, loss_of, sharded_decoder
from .ledger import Ledger

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Kind:
    """A history: so many low-rank terms in a storage dtype, or all tasks' diagonal."""

    terms: int
    dtype: str
    diagonal: bool = False

    @property
    def name(self) -> str:
        return "diagonal" if self.diagonal else f"K = {self.terms}, {self.dtype}"


KINDS = [
    *(Kind(terms, dtype) for terms in (1, 10) for dtype in DTYPES),
    Kind(1, "fp32", diagonal=True),
]


# Where the penalty goes in a step, and the update without it, which is subtracted: the difference is the penalty's.
PLACEMENTS: dict[str, tuple[Callable[..., Callable[[], Any]], str]] = {
    "in the loss": (in_the_loss, "AdamW"),
    "add_penalty_grad_": (in_the_gradient, "AdamW"),
    "attach": (attached, "AdamW"),
    "FusedAdamW": (inside, "FusedAdamW"),
    "decoupled_step_": (after_the_step, "AdamW"),
    "attach, decoupled": (lambda model, history: attached(model, history, decoupled=True), "AdamW"),
    "FusedAdamW, decoupled": (lambda model, history: inside(model, history, decoupled=True), "FusedAdamW"),
}
UPDATES: dict[str, Callable[[Decoder], Callable[[], Any]]] = {
    "AdamW": lambda model: adamw(model).step,
    "FusedAdamW": lambda model: ck.FusedAdamW(model.parameters()).step,
}


def costs(shape: Shape, mesh: DeviceMesh, kinds: Sequence[Kind] = KINDS) -> dict[str, Any]:
    """What this rank keeps and does: bytes of state, and the records of a training step and of all that is done with
    each history."""
    gc.freeze()  # so that a collection looks at what is made here alone, and is quick
    try:
        decoder = sharded_decoder(shape, mesh)
        loss_of(decoder).backward()  # creates the gradients
        return {
            "shape": asdict(shape),
            "processes": list(mesh.shape),
            "parameters": sum(parameter.numel() for parameter in decoder.parameters()),
            "state": _state(decoder),
            "forward and backward": _recorded(lambda: loss_of(decoder).backward()),
            "updates": {name: _second(make(decoder)) for name, make in UPDATES.items()},
            "whole_parameters": _recorded(lambda: _enter_whole_parameters(decoder)),
            "histories": {kind.name: _costs_of(decoder, kind) for kind in kinds},
        }
    finally:
        gc.unfreeze()


def _state(decoder: Decoder) -> dict[str, int]:
    """Bytes in this rank."""
    params = list(decoder.parameters())
    optimizer = ck.FusedAdamW(params)
    optimizer.step()
    tensors = {
        "parameters": params,
        "gradients": [parameter.grad for parameter in params],
        "AdamW": [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")],
    }
    return {name: sum(local_part(tensor).nbytes for tensor in part) for name, part in tensors.items()}


def _costs_of(decoder: Decoder, kind: Kind) -> dict[str, Any]:
    history: History = ck.DiagonalHistory(decoder) if kind.diagonal else ck.LowRankHistory(decoder)
    history._binding.agreement = Agreement()  # fake processes compare no digest of the Fisher
    if kind.diagonal or kind.terms > 1:
        history.append(_fisher(decoder, kind, max(1, kind.terms - 1)))
    last = _fisher(decoder, kind, 1)
    found: dict[str, Any] = {"append": _recorded(partial(history.append, last)), "state": history.nbytes}
    del last
    if kind.terms == 1:  # of more terms, each is saved like the first
        with mock.patch.object(files, "write"):  # what is written does not matter here, but what is gathered for it
            found["save"] = _recorded(lambda: history.save("history.safetensors"))
    for name, (place, _) in PLACEMENTS.items():
        found[name] = _second(place(decoder, history))
        if name.startswith("attach"):
            history.detach()
    return found


def _fisher(decoder: Decoder, kind: Kind, terms: int) -> ck.LowRankFisher | ck.DiagonalFisher:
    """A whole Fisher, as from a file or a block of whole_parameters; its values do not matter."""
    shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    anchor = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if kind.diagonal:
        return ck.DiagonalFisher({name: torch.ones(shape) for name, shape in shapes.items()}, anchor)
    generator = torch.Generator().manual_seed(0)
    directions = {name: torch.randn(terms, *shape, generator=generator) for name, shape in shapes.items()}
    return ck.LowRankFisher(directions, torch.ones(terms), anchor, storage_dtype=DTYPES[kind.dtype])


def _enter_whole_parameters(decoder: Decoder) -> None:
    with ck.whole_parameters(decoder):
        pass


def _recorded(call: Callable[[], Any]) -> dict[str, Any]:
    with Ledger() as ledger:
        call()
    return ledger.record()


def _second(call: Callable[[], Any]) -> dict[str, Any]:
    """The record of a second call; the first creates moments, and sums that later steps carry on."""
    call()
    return _recorded(call)
