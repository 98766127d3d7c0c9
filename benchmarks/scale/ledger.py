"""What a block of code does, as torch's dispatcher sees it: every operator and every collective call goes through it,
on real and on fake tensors alike.

- Collective calls: name, number of processes, bytes. The bytes are those of the larger of what goes in and what comes
  out in one process.
- Bytes that operators read and write. An operator of this library counts as one pass over its operands, and views and
  allocations as none. Temporaries inside an operator are not seen.
- The peak of the memory that the block allocates, and what it leaves allocated.
- Numbers that the host reads from a tensor: on a GPU, it waits for the device there.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLLECTIVES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "barrier": "barrier",
}  # any other keeps its operator's name
_ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_FILLS = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "zero_", "fill_")
_HOST_READS = ("tolist", "item", "cpu", "__float__", "__int__", "__bool__")


class Ledger(TorchDispatchMode):
    """Keeps the entries of a ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[tuple[str, int, int]] = Counter()  # (name, processes, bytes) -> calls
        self.moved = self.peak = self.allocated = self.host_reads = 0
        self._reads = _counted_reads(self)
        self._live: set[int] = set()

    def record(self) -> dict[str, Any]:
        """The entries, for JSON."""
        return {
            "collectives": [[*call, number] for call, number in sorted(self.collectives.items())],
            "moved": self.moved,
            "peak": self.peak,
            "left": self.allocated,
            "host_reads": self.host_reads,
        }

    def __enter__(self) -> "Ledger":
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls operators on its local part, which come here again
        kwargs = kwargs or {}
        known = {tensor.untyped_storage()._cdata for tensor in _tensors([args, kwargs])}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.namespace in ("c10d", "_c10d_functional"):
            if processes := _processes(func._schema, args):  # waiting for a call has none
                sizes = [sum(t.nbytes for t in _tensors(part)) for part in (*args, *kwargs.values(), result)]
                self.collectives[COLLECTIVES.get(name, name), processes, max(sizes)] += 1
        elif name not in _ALLOCATES:
            self.moved += _bytes_moved(func._schema, name, args, kwargs, result, known)
        for tensor in _tensors(result):
            self._add(tensor.untyped_storage(), known)
        return result

    def _add(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        """Counts a storage until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in known or key in self._live:
            return
        self._live.add(key)
        weakref.finalize(storage, self._free, key, size)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.allocated -= size


@contextmanager
def _counted_reads(ledger: Ledger) -> Iterator[None]:
    """In the block, methods by which the host reads numbers count their calls."""

    def counting(method: Any) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            ledger.host_reads += 1
            return method(tensor, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in _HOST_READS:
            stack.enter_context(mock.patch.object(Tensor, name, counting(getattr(Tensor, name))))
        yield


@contextmanager
def fake_tensors() -> Iterator[None]:
    """In the block, tensors have shapes and dtypes and no values: the host reads zeros."""

    def answering(method: Any, zero: Any) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            return zero(tensor) if isinstance(tensor, FakeTensor) else method(tensor, *args, **kwargs)

        return call

    answers = {
        "tolist": lambda tensor: _zeros(tensor.shape),
        "item": lambda tensor: 0.0,
        "__float__": lambda tensor: 0.0,
        "__int__": lambda tensor: 0,
        "__bool__": lambda tensor: False,
        "data_ptr": id,  # asked for to see which tensors lie in one buffer; fake tensors do not
    }
    with ExitStack() as stack:
        for name, zero in answers.items():
            stack.enter_context(mock.patch.object(Tensor, name, answering(getattr(Tensor, name), zero)))
        # FakeTensor's own tolist would read element by element.
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda tensor: Tensor.tolist(tensor)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _zeros(shape: torch.Size) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0.0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _processes(schema: Any, args: Any) -> int:
    """The number of processes of an operator's group, which is an argument as an object or as a name; 0 without."""
    for argument, value in zip(schema.arguments, args, strict=False):
        if argument.name == "process_group":
            return distributed.ProcessGroup.unbox(value).size()
        if argument.name == "group_name":
            return distributed.distributed_c10d._resolve_process_group(value).size()
    return 0


def _bytes_moved(schema: Any, name: str, args: Any, kwargs: Any, result: Any, known: set[int]) -> int:
    def size(tree: Any) -> int:
        return sum(tensor.nbytes for tensor in _tensors(tree))

    def operands() -> Iterator[tuple[Any, bool]]:
        for i, argument in enumerate(schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.name != "like":  # of which only the shape is looked at
                yield value, argument.alias_info is not None and argument.alias_info.is_write

    new = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in known]
    written = sum(size(value) for value, is_written in operands() if is_written)
    is_view = not new and not written
    if is_view:
        return 0
    read = 0 if name in _FILLS else sum(size(value) for value, _ in operands())
    return read + written + size(new)
