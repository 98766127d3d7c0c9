"""The names of a run's classes, from its config.json; a run without names calls its classes by their labels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from crl_diffusion.config.curriculum import task_classes
from crl_diffusion.config.settings import DATA_PLANS, RunConfig


@dataclass(frozen=True)
class ClassNames:
    """Names by label. Data sets without names, such as digits, and runs of earlier versions have none."""

    names: tuple[str, ...] = ()

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> ClassNames:
        """Those in the content of a config.json."""
        return cls(tuple(record.get("class_names") or ()))

    def of(self, c: int) -> str:
        return (self.names[c] if c < len(self.names) else "") or str(c)


def printable(name: str) -> str:
    """The name of a folder as text: a byte that is no UTF-8 becomes a replacement character, white space one blank."""
    return " ".join(os.fsencode(name).decode("utf-8", "replace").split())


UNNAMED = ClassNames()


def classes_by_task(record: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The labels of each task, in the order learnt, from the content of a config.json; none if another version of this
    package has written it, with a data set that this one does not know."""
    run = record["run"]
    if run["data"] not in DATA_PLANS:
        return []
    return task_classes(RunConfig(**{field.name: run[field.name] for field in fields(RunConfig) if field.name in run}))
