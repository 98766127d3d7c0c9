"""Functions of test modules in processes of their own, which load the module from its file.

By its name they may find another: avalanche-lib installs a package ``tests``.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist


def spawn(function: Callable[..., object], *arguments: Any, count: int) -> None:
    """Calls ``function(rank, *arguments)``, of a test module's top level, in so many processes."""
    torch.multiprocessing.spawn(_call, (function.__code__.co_filename, function.__name__, arguments), nprocs=count)


def processes(count: int, body: Callable[[int, int, Path], Any], folder: Path) -> list:
    """Runs ``body(rank, count, folder)`` in so many processes of a gloo group; returns what each of them has returned,
    through JSON."""
    folder.mkdir(exist_ok=True)
    arguments = (body.__code__.co_filename, body.__name__, count, str(folder))
    torch.multiprocessing.spawn(_in_group, arguments, nprocs=count)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def forked(function: Callable[[], str]) -> str:
    """What `function` returns in a fork of this process; an exception as Python writes it."""
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        try:
            said = function()
        except BaseException as error:
            said = repr(error)
        with open(sender, "w", encoding="utf-8", errors="backslashreplace") as writer:
            writer.write(said)
        os._exit(0)
    os.close(sender)
    with open(receiver, encoding="utf-8") as reader:
        said = reader.read()
    os.waitpid(child, 0)
    return said


def _call(rank: int, path: str, name: str, arguments: tuple[Any, ...]) -> None:
    getattr(_module_at(path), name)(rank, *arguments)
    # Not through the interpreter's end, where threads of gloo that outlive their group now and then abort the process.
    os._exit(0)


def _in_group(rank: int, path: str, name: str, count: int, folder: str) -> None:
    module = _module_at(path)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=count)
    try:
        result = getattr(module, name)(rank, count, Path(folder))
        (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)


def _module_at(path: str) -> ModuleType:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
