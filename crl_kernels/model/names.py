"""Parameter names: names without wrapper prefixes, patterns of names, and the layout of a flat vector."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..backends.int8 import scales_shape
from .arguments import shown

# Name of the wrapped child -> classes of wrappers. A wrapper adds that name to the names of all parameters. The name
# alone does not identify a wrapper, since a model may have a child called "module" itself.
_WRAPPERS = {
    "module": (
        "torch.nn.parallel.distributed.DistributedDataParallel",
        "torch.nn.parallel.data_parallel.DataParallel",
        "torch.optim.swa_utils.AveragedModel",
        "deepspeed.runtime.engine.DeepSpeedEngine",
    ),
    "_orig_mod": ("torch._dynamo.eval_frame.OptimizedModule",),
    "_checkpoint_wrapped_module": ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper",),
    "_fsdp_wrapped_module": ("torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",),
}


def is_instance_of(module: nn.Module, *names: str) -> bool:
    """Whether a module is of one of these classes, by their full names; their library need not be imported."""
    return not {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}.isdisjoint(names)


def _wrapped_child(module: nn.Module) -> str | None:
    """The attribute under which a wrapper has the wrapped module; None if ``module`` is no wrapper."""
    return next((child for child, wrappers in _WRAPPERS.items() if is_instance_of(module, *wrappers)), None)


class ParameterNames:
    """Removes wrapper prefixes from the names of a model's parameters: ``name_of`` maps a raw name of
    ``model.named_parameters()``, ``module._orig_mod.net.0.weight``, to ``net.0.weight``."""

    def __init__(self, model: nn.Module) -> None:
        modules = model.named_modules(remove_duplicate=False)
        wrapped = ((path, _wrapped_child(module)) for path, module in modules)
        self._wrapped = {f"{path}.{child}".removeprefix(".") for path, child in wrapped if child is not None}

    def name_of(self, raw: str) -> str:
        if not self._wrapped:
            return raw
        parts = raw.split(".")
        paths = accumulate(parts, lambda path, part: f"{path}.{part}")
        return ".".join(part for part, path in zip(parts, paths, strict=True) if path not in self._wrapped)


def without_outer_wrappers(names: Iterable[str]) -> Iterator[list[str]]:
    """Yields the names without the first prefix of a wrapper that all of them share, then without two, and so on."""
    names = list(names)
    while len(first := {name.partition(".")[0] for name in names}) == 1 and first <= _WRAPPERS.keys():
        names = [name.partition(".")[2] for name in names]
        yield names


def earlier_name(raw: str) -> str:
    """The name in files of earlier versions, which recognized wrappers by name alone."""
    name = ".".join(part for part in raw.split(".") if part == "module" or part not in _WRAPPERS)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def join_names(names: Iterable[str], limit: int = 5) -> str:
    """Names for an error message: the first few, and how many more."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(repr(name) for name in listed[:limit]) + more


class Layout:
    """Names and shapes of tensors with P elements in all, in the order in which a flat (P,) vector contains them."""

    def __init__(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        self.names = tuple(names)
        self.shapes = tuple(torch.Size(shape) for shape in shapes)
        self.lengths = [shape.numel() for shape in self.shapes]
        self.numel = sum(self.lengths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and (self.names, self.shapes) == (other.names, other.shapes)

    __hash__ = None  # type: ignore[assignment]

    def of_scales(self) -> "Layout":
        """The layout of the scales of a vector that is stored in int8."""
        return Layout(self.names, list(map(scales_shape, self.shapes)))

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat (..., P) tensor by name, each (..., *shape)."""
        leading = flat.shape[:-1]
        pieces = flat.split(self.lengths, dim=-1)
        return {n: piece.reshape(leading + s) for n, s, piece in zip(self.names, self.shapes, pieces, strict=True)}

    def flatten(self, tensors: Mapping[str, Tensor], leading: Sequence[int] = ()) -> Tensor:
        """The flat (*leading, P) tensor of a mapping that has been checked against this layout."""
        return torch.cat([tensors[name].reshape(*leading, -1) for name in self.names], dim=-1)

    def require_same_parameters(
        self, other: "Layout", this: str, that: str, *, if_missing: str = "", if_unknown: str = ""
    ) -> None:
        """Raises ValueError, naming the parameters, unless ``other`` has the same names and shapes in some order.

        ``if_missing`` and ``if_unknown`` are further advice for parameters that ``other`` lacks, or that only it has.
        """
        mine, theirs = (dict(zip(layout.names, layout.shapes, strict=True)) for layout in (self, other))
        if missing := [name for name in mine if name not in theirs]:
            raise ValueError(f"{that} lacks {join_names(missing)}, which {this} has. {if_missing}{_SAME_MODEL}")
        if unknown := [name for name in theirs if name not in mine]:
            raise ValueError(f"{that} has {join_names(unknown)}, which {this} lacks. {if_unknown}{_SAME_MODEL}")
        for name, shape in mine.items():
            if shape != theirs[name]:
                raise ValueError(
                    f"{name!r} has shape {tuple(theirs[name])} in {that} and {tuple(shape)} in {this}. {_SAME_MODEL}"
                )

    def reorder(self, flat: Tensor, source: "Layout") -> Tensor:
        """``flat``, laid out like ``source``, in this layout's order."""
        return flat if source == self else self.flatten(source.split(flat), flat.shape[:-1])


_SAME_MODEL = "Use the same model, and the same include= and exclude=, everywhere."


def matching(argument: str, patterns: Iterable[str] | None, names: Iterable[str]) -> set[str]:
    """The names that any of the patterns matches. Raises ValueError for a pattern that matches none."""
    known, matched = list(names), set()
    for pattern in as_patterns(argument, patterns) or ():
        pattern_matches = {name for name in known if matches(name, pattern)}
        if not pattern_matches:
            raise ValueError(
                f"{argument} pattern {pattern!r} matches none of the model's parameters: {join_names(known)}."
            )
        matched |= pattern_matches
    return matched


def as_patterns(argument: str, patterns: Iterable[str] | None) -> tuple[str, ...] | None:
    if isinstance(patterns, str):
        raise TypeError(f"{argument} is the string {patterns!r}; expected a list of patterns, such as [{patterns!r}].")
    if patterns is None:
        return None
    listed = tuple(patterns) if isinstance(patterns, Iterable) else None
    if listed is None or not all(isinstance(pattern, str) for pattern in listed):
        wrong = patterns if listed is None else next(x for x in listed if not isinstance(x, str))
        where = "is" if listed is None else "has"
        raise TypeError(f"{argument} {where} {shown(wrong)}; expected a list of patterns, which are strings.")
    return listed


def matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)
