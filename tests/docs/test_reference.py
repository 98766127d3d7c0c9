"""The reference has every public name, once."""

import ast
import re

from helpers.pages import DOCS, ROOT

import crl_kernels

PAGES = sorted((DOCS / "reference").glob("*.md"))
DOCUMENTED = [name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.MULTILINE)]


def public_names_of_integrations() -> list[str]:
    """What each module defines itself. They are parsed: to import them needs the libraries that they serve."""
    names = []
    for path in (ROOT / "crl_kernels" / "integrations").glob("[!_]*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined = [node.name]
            elif isinstance(node, ast.Assign):
                defined = [target.id for target in node.targets if isinstance(target, ast.Name)]
            else:
                defined = []
            names += [f"crl_kernels.integrations.{path.stem}.{name}" for name in defined if not name.startswith("_")]
    return names


def test_every_public_name_is_in_one_reference_page():
    public = [f"crl_kernels.{name}" for name in crl_kernels.__all__] + public_names_of_integrations()
    assert sorted(DOCUMENTED) == sorted(public)
