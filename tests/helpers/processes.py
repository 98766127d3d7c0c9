"""Functions of test modules in processes of their own, which load the module from its file.

By its name they may find another: avalanche-lib installs a package ``tests``.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def spawn(function: Callable[..., object], *arguments: Any, count: int) -> None:
    """Calls ``function(rank, *arguments)``, of a test module's top level, in so many processes."""
    torch.multiprocessing.spawn(_call, (function.__code__.co_filename, function.__name__, arguments), nprocs=count)


def _call(rank: int, path: str, name: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, name)(rank, *arguments)
    # Not through the interpreter's end, where threads of gloo that outlive their group now and then abort the process.
    os._exit(0)
