"""Links between pages, as GitHub resolves them: the file and its heading exist. `mkdocs --strict` checks the site."""

import re
from pathlib import Path

import pytest
from helpers.pages import ROOT

BLOB = "https://github.com/crl-kernels/crl-kernels/blob/main/"
TREE = "https://github.com/crl-kernels/crl-kernels/tree/main/"
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "python" / "README.md"]
CODE = r"^(```|~~~).*?^\1|`[^`\n]*`"


def links(page: Path) -> list[str]:
    text = re.sub(CODE, "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them, of explicit ids, and of objects that mkdocstrings writes into the page."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*?)#*$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}
    return (
        slugs
        | set(re.findall(r"(?:id=\"|\{ ?#)([\w.-]+)", text))
        | set(re.findall(r"^::: ([\w.]+)", text, re.MULTILINE))
    )


def has_anchor(page: Path, anchor: str) -> bool:
    present = anchors(page)
    return any(anchor == name or (name.startswith("crl_") and anchor.startswith(f"{name}.")) for name in present)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_to_files_and_headings_that_exist(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        if path.startswith((BLOB, TREE)):
            target = ROOT / path.removeprefix(BLOB).removeprefix(TREE)
        elif re.match(r"[a-z]+:", path):
            continue
        else:
            target = page.parent / path if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor and target.suffix == ".md":
            assert has_anchor(target, anchor), f"{link}: no such heading"
