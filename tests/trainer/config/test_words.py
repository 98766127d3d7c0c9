"""Methods in words."""

from __future__ import annotations

import pytest
from crl_diffusion.config import words
from crl_diffusion.config.method import METHODS
from crl_diffusion.config.settings import RunConfig

NAMES = [*METHODS, "gd+rank10:signs", "gd+bands8:top,slopes,alone", "interpolate0.25", "gd+l2+interpolate0.5:gradient"]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_described_by_its_parts(name: str) -> None:
    config = RunConfig(method=name)
    text = words.describe(config.as_json()["recipe"], vars(config))
    parts, penalty = text.count("images of old classes"), config.recipe.penalty
    assert parts == bool(config.recipe.replays)
    assert ("EWC penalty" in text) == (penalty is not None and penalty.is_estimated)
    assert ("L2 penalty" in text) == (penalty is not None and not penalty.is_estimated)
    share = config.recipe.interpolation
    assert (f"weights move {share:g} of the way back" in text) == bool(share)
    assert ("does nothing against forgetting" in text) == (name == "fine-tune")
    if penalty is not None:
        assert f"lam {penalty.lam:g}: {words.MODES[penalty.mode].removeprefix(words.CONTROL)}." in text
        assert ("ontrol, not a method" in text) == (penalty.direction == "signs" or penalty.mode == "alone")
    assert words.describe(config.as_json()["recipe"], {**vars(config), "ema": 0.9}) == (
        f"{text} An average of the weights, with decay 0.9, replaces them at the end of a task."
    )


def test_parts_that_this_version_does_not_know_are_named_as_they_are() -> None:
    penalty = {"fisher": "low_rank", "lam": 3, "mode": ["tilted"], "direction": {"of": 1}, "rank": "two"}
    recipe = {
        "curriculum": "continual",
        "replays": [{"source": "attic", "target": "gist", "weight": 0.5}],
        "penalty": penalty,
    }
    assert words.describe(recipe, {}) == (
        "Trains also on images of old classes that the old model draws attic, gist, with weight 0.5. EWC penalty on "
        "two directions of each old task ({'of': 1}), lam 3: ['tilted']."
    )
