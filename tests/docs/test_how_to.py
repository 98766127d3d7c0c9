"""The Python blocks of each how-to page, and of the reference, run one after the other, as they stand there."""

import warnings

import pytest
import torch
from helpers.pages import DOCS, run_python_blocks

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
PAGES = [*sorted((DOCS / "how-to").glob("*.md")), DOCS / "reference" / "per-sample.md"]
WITHOUT_BLOCKS = {"fsdp2", "what-to-use"}  # the first includes sharded_loop.py, which has a test of its own
# Sections that run in tests/integrations, which compare them with plain loops.
TESTED_ELSEWHERE = {"other-trainers": ["Lightning", "Avalanche", "DeepSpeed"]}
NEEDS = {"other-trainers": ["accelerate", "transformers"], "resume": ["safetensors"]}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run_one_after_the_other(page, tmp_path, monkeypatch):
    for library in NEEDS.get(page.stem, []):
        pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # The pages' data are random, and their estimates say so.
        warnings.filterwarnings("ignore", message="only .* of the trace|.*mostly noise")
        namespace = run_python_blocks(page, without=TESTED_ELSEWHERE.get(page.stem, ()))
        assert bool(namespace) == (page.stem not in WITHOUT_BLOCKS)
