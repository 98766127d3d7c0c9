"""The pictures of the concepts' pages can be drawn again, and show what the pages say of them."""

import importlib.util

import pytest
from helpers.pages import DOCS

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra bench)")

spec = importlib.util.spec_from_file_location("pictures_of_the_docs", DOCS / "pictures.py")
pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pictures)


def test_the_script_draws_every_picture_that_is_there(tmp_path):
    drawn = {path.name for path in pictures.main(tmp_path)}
    assert drawn == {path.name for path in (DOCS / "pictures").glob("*.svg")}


@pytest.mark.parametrize("stiffness", [0.1, 1.8, 2.1])
def test_one_step_multiplies_the_drift_as_the_page_says(stiffness):
    """By 1 - s in the gradient, by 1 / (1 + s) decoupled."""
    for decoupled, factor in ((False, 1 - stiffness), (True, 1 / (1 + stiffness))):
        before, after = pictures.drift_after(stiffness, 1, decoupled)
        assert after / before == pytest.approx(factor, rel=1e-12)
