"""The device that tests run on, by ``pytest --device``: a CPU, a GPU, or a rehearsal of a GPU on the CPU.

Tests name no device. On a GPU, torch's factories put there what tests and the modules that they build create without
one. What the library creates without a device stays on the CPU, as for its users. Random numbers are drawn on the CPU,
so that both devices see the same ones.

A rehearsal shows on a CPU that tests and library keep their tensors together. All memory is the CPU's, and each storage
has a label: of the device, or of the host. What CUDA refuses is an error here too: an operator on tensors of both, or
numpy's view of a tensor of the device. ``cpu:0`` names the rehearsed device, plain ``cpu`` the host.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

import crl_kernels

CHOICES = ("cpu", "cuda", "rehearsal")
TESTS, TORCH = f"{Path(__file__).parents[1]}/", f"{Path(torch.__file__).parent}/"
MODULES, PACKAGES = f"{Path(nn.__file__).parent}/", f"{Path(torch.__file__).parents[1]}/"
LIBRARY = f"{Path(crl_kernels.__file__).parent}/"
RANDOM = ("rand", "randn", "randint", "randperm")
FACTORIES = (
    *RANDOM,
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "ones", "scalar_tensor"),
    *("sparse_coo_tensor", "tensor", "zeros"),
)

# Tests of the device that --device names; all others are of a CPU.
ON_DEVICE = (
    *("operators/", "penalty/", "optim/", "per_sample/", "fisher/", "backends/test_operators.py"),
    "backends/test_int8_blocks.py",
    *("backends/test_launches.py", "backends/test_sample_matrix.py", "backends/test_weight_gradients.py"),
)

name = "cpu"
_replaced: list[tuple[Any, str, Any]] = []  # (owner, attribute, what replaces it)


def use(choice: str) -> None:
    """From now on, until ``leave``."""
    global name
    if choice == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")
    name = choice
    if choice == "cpu":
        return
    from torch._decomp import decompositions_for_jvp  # noqa: F401  (scripts code that calls torch's own factories)

    torch.backends.cudnn.allow_tf32 = False  # float32 as on a CPU
    torch.backends.cudnn.deterministic = True
    _replaced.extend((torch, factory, _on_device(getattr(torch, factory))) for factory in FACTORIES)
    if choice == "cuda":
        _replaced.append((torch, "compile", functools.partial(_compile, torch.compile)))
    else:
        _replaced.extend(((torch, "compile", _compile_nothing), (torch.library, "opcheck", _compile_nothing)))
        _replaced.append((Tensor, "device", property(_device)))
        _replaced.extend((Tensor, way, _ways(getattr(Tensor, way))[way]) for way in ("to", "cpu", "numpy", "__array__"))
        Rehearsal().__enter__()
    _exchange()


def leave() -> None:
    """As torch was, but for a rehearsal's mode, which lasts as long as the process."""
    if name != "cpu":
        _exchange()
        _replaced.clear()


def type_() -> str:
    """``cpu`` or ``cuda``: what torch calls the device."""
    return "cuda" if name == "cuda" else "cpu"


def here() -> torch.device:
    """The device of a test's tensors."""
    return torch.device("cpu:0" if name == "rehearsal" else type_())


def _exchange() -> None:
    """Puts replacements in, or originals back."""
    for i, (owner, attribute, other) in enumerate(_replaced):
        _replaced[i] = (owner, attribute, getattr(owner, attribute))
        setattr(owner, attribute, other)


def _builds_modules(file: str) -> bool:
    """Of torch.nn, or of another package than torch and this library, such as diffusers."""
    return file.startswith(MODULES) or (file.startswith(PACKAGES) and not file.startswith((TORCH, LIBRARY)))


def _of_a_test() -> bool:
    """Whether a test's file, or a module that it builds, called the factory."""
    frame = sys._getframe(2)
    while frame is not None and _builds_modules(frame.f_code.co_filename):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(TESTS)


def _on_device(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The factory, which puts what tests create on the device."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None)
        if factory.__name__ == "as_tensor" and isinstance(args[0], Tensor):
            return args[0].to(args[0].device if device is None else device, **kwargs)
        if device is None and "out" not in kwargs and _of_a_test():
            device = here()
        if device is None or factory.__name__ not in RANDOM or torch.device(device) != here():
            return _labelled(factory(*args, **kwargs, **({} if device is None else {"device": device})), device)
        requires_grad, generator = kwargs.pop("requires_grad", False), kwargs.get("generator")
        if generator is not None and generator.device.type != "cpu":
            return factory(*args, **kwargs, device=device, requires_grad=requires_grad)
        return factory(*args, **kwargs).to(device).requires_grad_(requires_grad)

    return create


def _compile(compile: Callable[..., Any], model: Any = None, **options: Any) -> Any:
    """torch.compile, whose code runs with torch's own factories: Dynamo would trace these."""
    if model is None:
        return functools.partial(_compile, compile, **options)
    compiled = compile(model, **options)
    if isinstance(model, nn.Module):
        return compiled

    @functools.wraps(model)
    def call(*args: Any, **kwargs: Any) -> Any:
        _exchange()
        try:
            return compiled(*args, **kwargs)
        finally:
            _exchange()

    return call


def _compile_nothing(*args: Any, **kwargs: Any) -> Any:
    pytest.skip("--device rehearsal: Dynamo does not trace under a TorchDispatchMode")


# What CUDA permits on tensors of both devices: copies, and indices that are on the host.
MIXED = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_", "aten::set_")


def _has_label(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, FakeTensor) and not x.is_meta


def _storage(tensor: Tensor) -> Any:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return (tensor._values() if tensor.layout == torch.sparse_coo else tensor).untyped_storage()


def _is_there(tensor: Tensor) -> bool | None:
    """None: C++ created it, such as autograd a gradient of zeros, and no one has said where."""
    return getattr(_storage(tensor), "on_device", None)


def _labelled(tensor: Tensor, device: Any) -> Tensor:
    if name == "rehearsal" and _has_label(tensor):
        _storage(tensor).on_device = device is not None and torch.device(device).index == 0
    return tensor


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Of an operator's arguments or results: values, and lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class Rehearsal(TorchDispatchMode):
    """Labels the results of operators, and refuses what CUDA refuses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((*args, *kwargs.values())))
        if not all(map(_has_label, inputs)):
            return func(*args, **kwargs)
        operator, labels = func._schema.name, [_is_there(x) for x in inputs]
        # A number may be on the host, as for CUDA's own operators.
        if operator not in MIXED and any(labels) and any(x.dim() > 0 for x in inputs if _is_there(x) is False):
            shapes = [(tuple(x.shape), "device" if there else "host") for x, there in zip(inputs, labels, strict=True)]
            raise RuntimeError(f"{operator}: tensors of the device and of the host: {shapes}")
        result = func(*args, **kwargs)
        if operator in MIXED:
            labels = labels[:1]
        there = True if any(labels) else False if False in labels else None
        known = {_storage(x)._cdata for x in inputs}
        for x in _tensors((result,)):
            if there is not None and _has_label(x) and _storage(x)._cdata not in known:
                _storage(x).on_device = there
        return result


_cpp_device = Tensor.device.__get__


def _device(tensor: Tensor) -> torch.device:
    return torch.device("cpu:0") if _has_label(tensor) and _is_there(tensor) else _cpp_device(tensor)


def _ways(original: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """From one device to the other, as methods of Tensor around the original one."""

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """An alias where torch gives one."""
        target = kwargs.pop("device", None)
        rest = list(args)
        if rest and isinstance(rest[0], Tensor):
            target, rest[0] = rest[0].device, rest[0].dtype
        elif rest and isinstance(rest[0], str | torch.device | None):
            target = rest.pop(0)
        if target is None or torch.device(target).type != "cpu" or not _has_label(self):
            return original(self, *args, **kwargs, **({} if target is None or args else {"device": target}))
        rest = [x for x in rest if isinstance(x, torch.dtype)]  # the others are None and non_blocking
        converted = original(self, *rest, **kwargs) if rest or kwargs else self
        if (torch.device(target).index == 0) == bool(_is_there(self)):
            return converted
        copy = _labelled(torch.ops.aten._to_copy(converted), target)
        if isinstance(target, torch.device) and target.index is None:  # from C++ too, for which all is the CPU's
            _storage(copy).on_device = None
        return copy

    def cpu(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _is_there(self):
            raise TypeError("can't convert a tensor of the device to numpy; use Tensor.cpu() first")
        return original(self, *args, **kwargs)

    return {"to": to, "cpu": cpu, "numpy": numpy, "__array__": numpy}
