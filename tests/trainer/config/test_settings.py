"""Settings that cannot run are refused, and the stages that a configuration has."""

from __future__ import annotations

import re

import pytest
from crl_diffusion.config.curriculum import Stage, stages
from crl_diffusion.config.settings import check
from crl_diffusion.errors import OptionError
from helpers.trainer_runs import Short


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "--steps is 0; it must be at least 1"),
        ({"tasks": 6}, "--tasks is 6 and --classes-per-task is 2, but digits has 10 classes"),
        ({"pool_steps": 1001}, "--pool-steps is 1001; it must be between 1 and 1000"),
        ({"lr": float("nan")}, "--lr is nan; it must be a finite number above 0"),
        ({"clip": -1.0}, "--clip is -1.0; it must be a finite number, 0 or more"),
        ({"method": "gd:lam=1"}, "gd has no penalty"),
        ({"fisher_samples": 3}, "--fisher-samples is 3; for gd+rank1 it must be at least 4, or 0 for all images"),
        ({"method": "rank9", "fisher_samples": 17}, "--fisher-samples is 17; for rank9 it must be at least 18"),
        ({"method": "rank9", "fisher_samples": 8, "fisher_estimate": "in-sample"}, "for rank9 it must be at least 9"),
    ],
)
def test_settings_that_cannot_run_are_refused(short: Short, settings: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        check(short(**settings))


def test_joint_has_one_stage_of_all_classes_and_all_steps(short: Short) -> None:
    assert stages(short("joint", tasks=3)) == [Stage(0, (0, 1, 2, 3, 4, 5), 3, 3)]
    assert stages(short("gd", tasks=3)) == [Stage(i, (2 * i, 2 * i + 1), i + 1, 1) for i in range(3)]
