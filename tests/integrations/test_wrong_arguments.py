"""Arguments of the trainers' callbacks and plugins: refused where they are given, not when training begins or ends."""

import importlib
from typing import Any

import pytest
from torch import nn

import crl_kernels as ck

MODEL = nn.Linear(2, 2)
HISTORY = ck.LowRankHistory(MODEL)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((MODEL, 1.0), {}, TypeError, "history is a Linear; expected a LowRankHistory or a DiagonalHistory"),
        ((1.0, HISTORY), {}, TypeError, "history is a float"),
        ((HISTORY, "1"), {}, TypeError, "lam is a str; expected a float"),
        ((HISTORY, -1.0), {}, ValueError, "lam is -1.0; expected a finite value >= 0"),
        ((HISTORY, 1.0), {"decoupled": "no"}, ValueError, "decoupled is 'no'; expected True or False"),
    ],
)
@pytest.mark.parametrize(
    ("library", "module", "name"),
    [
        ("transformers", "hf_trainer", "EWCCallback"),
        ("lightning", "lightning", "EWCCallback"),
        ("avalanche", "avalanche", "EWCPlugin"),
    ],
)
def test_a_penalty_that_cannot_be_one_is_refused(
    library: str,
    module: str,
    name: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    pytest.importorskip(library, exc_type=ImportError)
    make = getattr(importlib.import_module(f"crl_kernels.integrations.{module}"), name)
    with pytest.raises(error, match=words):
        make(*arguments, **options)


@pytest.mark.parametrize(
    ("history", "options", "words"),
    [
        (HISTORY, {"rank": 0}, "rank is 0; expected an integer >= 1"),
        (ck.DiagonalHistory(MODEL), {"rank": 2}, "rank is 2, and history a DiagonalHistory, which has no rank"),
        (HISTORY, {"max_samples": 1}, "max_samples is 1; expected an integer >= 2"),
        (HISTORY, {"per_sample_loss": nn.MSELoss()}, r"per_sample_loss is MSELoss\(\); expected a function"),
    ],
)
def test_an_estimate_that_would_fail_after_training_is_refused_before(
    history: ck.LowRankHistory, options: dict[str, Any], words: str
) -> None:
    pytest.importorskip("avalanche", exc_type=ImportError)
    from crl_kernels.integrations.avalanche import EWCPlugin

    with pytest.raises((TypeError, ValueError), match=words):
        EWCPlugin(history, 1.0, **options)
