"""Pages and benchmark results as text, and their tables as lists of cells."""

import json
import re
from typing import Any

from helpers.pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"
TABLE = r"(?:^\|.*\n)+"


def page(path: str) -> str:
    return (ROOT / path).read_text()


def prose(text: str) -> str:
    """The text with every run of white space as one space, so that a pattern may cross the end of a line."""
    return " ".join(text.split())


def result(path: str) -> str:
    return (RESULTS / path).read_text()


def records(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result(path).splitlines()]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table.splitlines()]


def tables(text: str) -> list[list[list[str]]]:
    return [cells(table) for table in re.findall(TABLE, text, re.MULTILINE)]


def table_after(text: str, mark: str) -> list[list[str]]:
    """The first table after a mark, which must be there."""
    assert mark in text
    return tables(text.partition(mark)[2])[0]
