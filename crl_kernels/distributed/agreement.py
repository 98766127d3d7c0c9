"""The processes that share one model agree on what they do to its history, before any of them does it.

They compare through the key-value store of torch.distributed. A collective call that one process does not make pairs
with the next call that it makes, and numbers are wrong. A key that one process does not set is missing, and an error
once the timeout of ``init_process_group`` is over.
"""

import hashlib
import json
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_CHUNK = 2**20
_MIX = (-7046029254386353131, -4658895280553007687)  # odd: a product with them modulo 2^64 keeps its factor apart
_OVER = "over"  # a verdict


class Agreement:
    """The processes with these ranks of the present world share one model; without any, this process has its own."""

    def __init__(self, ranks: Sequence[int] = ()) -> None:
        self._ranks = list(ranks)
        self._prefix = f"crl_kernels/{hashlib.sha256(repr(self._ranks).encode()).hexdigest()[:16]}"
        self._world = weakref.ref(distributed.group.WORLD) if self._ranks else None

    @property
    def several(self) -> bool:
        """Whether there are others, as long as the world is the same."""
        if len(self._ranks) < 2 or self._world is None or not distributed.is_initialized():
            return False
        return self._world() is distributed.group.WORLD

    @contextmanager
    def on(self, call: str, advice: str) -> Generator[dict[str, str], None, None]:
        """The block describes what this process is about to do, in the dict that it is given. After the block, all
        processes have described the same.

        Calls are numbered, in each process by itself. A call has one verdict, the first that a process writes: that of
        the lowest rank, or that the call is over, of one that has waited too long.

        Raises:
            RuntimeError: in all processes, if they have described different things, if the block of another one has
                raised, or if another one has not come within the timeout. What is wrong, in which ranks, and
                ``advice``.
        """
        facts: dict[str, str] = {}
        if not self.several:
            yield facts
            return
        store, own, first = _store(), distributed.get_rank(), self._ranks[0]

        def settle(verdict: str | None) -> str | None:
            """The verdict that was written first."""
            kept: str | None = json.loads(store.compare_set(f"{place}/verdict", "", json.dumps(verdict)))
            return kept

        while True:
            number = store.add(f"{self._prefix}/{own}", 1)
            place = f"{self._prefix}/{number}"
            if not (store.check([f"{place}/verdict"]) and json.loads(store.get(f"{place}/verdict")) == _OVER):
                break
        try:
            yield facts
        except Exception as error:
            failure = f"{call} has failed in rank {own}, and nothing has changed in the others: {error}"
            store.set(f"{place}/{own}", json.dumps({"failure": failure}))
            if own == first:
                settle(failure)
            raise
        store.set(f"{place}/{own}", json.dumps({"call": call} | facts))
        waited: RuntimeError | None = None
        try:
            if own == first:
                keys = [f"{place}/{rank}" for rank in self._ranks]
                store.wait(keys)
                described = dict(zip(self._ranks, map(json.loads, map(store.get, keys)), strict=True))
                verdict = settle(_verdict(described, advice))
            else:
                store.wait([f"{place}/verdict"])
                verdict = json.loads(store.get(f"{place}/verdict"))
        except RuntimeError as error:
            waited, verdict = error, settle(_OVER)
        if verdict == _OVER:
            absent = [rank for rank in self._ranks if not store.check([f"{place}/{rank}"])]
            raise RuntimeError(
                f"{call}: rank {own} has waited {store.timeout} (the timeout of init_process_group) for "
                f"{_in_ranks(absent) if absent else 'the others'}, and nothing has changed. The processes "
                f"{self._ranks} share the model, and all of them make this call together."
            ) from waited
        if number > 1:  # everyone has read those of the last call
            store.delete_key(f"{self._prefix}/{number - 1}/{own}")
            if own == first:
                store.delete_key(f"{self._prefix}/{number - 1}/verdict")
        if verdict is not None:
            raise RuntimeError(verdict)

    @contextmanager
    def told_errors(self, call: str) -> Generator[None, None, None]:
        """An error in the block is raised as it is, and in the others by the next ``on``, which is of the same call."""
        try:
            yield
        except Exception:
            with self.on(call, ""):
                raise


def agreement_in(group: Any) -> Agreement:
    """Of the processes of a group."""
    return Agreement(distributed.get_process_group_ranks(group) if _has_store(group) else ())


def agreement_on(mesh: "DeviceMesh") -> Agreement:
    """Of the processes of a mesh."""
    return Agreement(mesh.mesh.flatten().tolist() if _has_store(mesh.get_group(0)) else ())


def _has_store(group: Any) -> bool:
    """The other processes of torch's fake group do not exist, and MPI has no key-value store."""
    return distributed.get_backend(group) not in ("fake", "mpi")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """8 digits of the names, shapes and bits of tensors, on any device and in any memory order; without the bits of
    those that are no plain dense tensors, such as DTensors, or complex."""
    known = sorted((name, t) for name, t in tensors.items() if isinstance(t, Tensor))
    lines = [f"{name} {t.dtype} {tuple(t.shape)}" for name, t in known]
    real = [t for _, t in known if type(t) in (Tensor, nn.Parameter) and not (t.is_complex() or t.is_meta)]
    if checksums := [_checksum(t) for t in real if t.layout == torch.strided]:
        lines.append(str(torch.stack([checksum.to(checksums[0].device) for checksum in checksums]).tolist()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def _checksum(tensor: Tensor) -> Tensor:
    """sum_i h((2 i + 1) (x_i + 1)) modulo 2^64, of the elements' bits as integers x_i: the same in any order of
    summation. h mixes the bits of a product, so that changes which many elements have in common, such as a sign or a
    factor of 2, do not cancel."""
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for i, chunk in enumerate(bits.split(_CHUNK)):
        factors = 2 * torch.arange(i * _CHUNK, i * _CHUNK + len(chunk), device=bits.device) + 1
        mixed = (chunk.long() + 1) * factors * _MIX[0]
        mixed = (mixed ^ (mixed >> 32)) * _MIX[1]
        total += (mixed ^ (mixed >> 29)).sum()
    return total


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()


def _verdict(described: Mapping[int, Mapping[str, str]], advice: str) -> str | None:
    """What is wrong with the descriptions of these ranks; None if they are the same."""
    for facts in described.values():
        if "failure" in facts:
            return facts["failure"]
    for name in next(iter(described.values())):
        ranks: dict[str | None, list[int]] = {}
        for rank, facts in described.items():
            ranks.setdefault(facts.get(name), []).append(rank)
        if len(ranks) > 1:
            listed = ", and ".join(f"{value} in {_in_ranks(where)}" for value, where in ranks.items())
            return (
                f"the processes that share the model differ in the {name}: {listed}. Nothing has changed in any of "
                f"them. {advice}"
            )
    return None


def _in_ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
