"""Messages that the installation page quotes are those of the code."""

import ast
import re
from functools import cache

import pytest
from helpers.pages import DOCS, ROOT

VARIABLE = "…"
PAGE = (DOCS / "install.md").read_text()
SOURCES = [ROOT / "setup.py", *(ROOT / "crl_kernels").rglob("*.py"), *(ROOT / "python" / "crl_diffusion").rglob("*.py")]
QUOTED = re.findall(r"^\| `([^`]+)` \|.*\|.*\|$", PAGE.partition("## Troubleshooting")[2], re.MULTILINE)


@cache
def texts() -> list[str]:
    """All strings of the sources; what is put into one at run time is VARIABLE."""
    strings = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else VARIABLE for part in node.values)
                strings.append("".join(map(str, parts)))
    return strings


def test_every_table_quotes_messages():
    assert len(QUOTED) >= 35


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_in_the_code(message):
    """A VARIABLE of the page stands for anything, also for fixed text; everything else is verbatim, in one string."""
    pattern = re.compile(".+?".join(map(re.escape, message.strip(VARIABLE).split(VARIABLE))))
    assert any(pattern.search(text) for text in texts()), (
        f"docs/install.md quotes a message that the code does not have: {message}"
    )


def test_environment_variables_are_read():
    table = PAGE.partition("## Environment variables")[2].partition("\n## ")[0]
    sources = "\n".join(path.read_text() for path in [*SOURCES, *(ROOT / "csrc" / "cpu").glob("*.cpp")])
    names = set(re.findall(r"`([A-Z_]+)(?:=[^`]*)?`", table))
    assert len(names) >= 6
    assert all(f'"{name}"' in sources for name in names - {"PATH"})


def test_extras_are_those_of_the_project():
    table = PAGE.partition("## Optional parts")[2].partition("\n## ")[0]
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", project, re.DOTALL)[1]
    names = re.findall(r"^(\w+) = \[", extras, re.MULTILINE)
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(names)
