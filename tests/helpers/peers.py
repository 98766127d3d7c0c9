"""Peers, and a network that their tests share."""

import itertools
from typing import Any

import pytest
from torch import nn


def peer(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed (extra peers)")


def lines(*widths: int, between: type[nn.Module] | None = None, flatten: bool = False) -> nn.Module:
    """Linear layers of these widths."""
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b)] + ([between()] if between else [])
    return nn.Sequential(*(parts[:-1] if between else parts), *([nn.Flatten()] if flatten else []))
