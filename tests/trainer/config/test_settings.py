"""Settings that cannot run are refused, and the stages that a configuration has."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from crl_diffusion.config.curriculum import Stage, stages
from crl_diffusion.config.networks import require_size
from crl_diffusion.config.settings import ADDED, RunConfig, check
from crl_diffusion.errors import OptionError
from crl_diffusion.run_folder.layout import digest_of
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
        ({"method": "ddgr:lam=1"}, "ddgr has no penalty"),
        ({"guidance": -0.5}, "--guidance is -0.5; it must be a finite number, 0 or more"),
        ({"guidance": math.nan}, "--guidance is nan; it must be a finite number, 0 or more"),
        ({"guidance": math.inf}, "--guidance is inf; it must be a finite number, 0 or more"),
        ({"fisher_samples": 3}, "--fisher-samples is 3; for gd+rank1 it must be at least 4, or 0 for all images"),
        ({"method": "rank9", "fisher_samples": 17}, "--fisher-samples is 17; for rank9 it must be at least 18"),
        ({"method": "rank9", "fisher_samples": 8, "fisher_estimate": "in-sample"}, "for rank9 it must be at least 9"),
    ],
)
def test_settings_that_cannot_run_are_refused(short: Short, settings: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        check(short(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_later": 0.0}, "--lr-later is 0.0; it must be a finite number above 0"),
        ({"lr_later": -0.1}, "--lr-later is -0.1; it must be a finite number above 0"),
        ({"lr_later": math.nan}, "--lr-later is nan; it must be a finite number above 0"),
        ({"lr_later": math.inf}, "--lr-later is inf; it must be a finite number above 0"),
        (
            {"method": "gd+diagonal:preconditioned", "optimizer": "sgd"},
            "--optimizer is sgd, and the mode preconditioned of gd+diagonal:preconditioned needs Adam's second "
            "moments; use --optimizer adam, or the mode gradient or decoupled",
        ),
        (
            {"method": "rank1:preconditioned,lam=inf"},
            "method 'rank1:preconditioned,lam=inf': a gradient needs a finite lam; give one, or use the decoupled mode",
        ),
    ],
)
def test_refusals_name_the_option_and_what_to_do(short: Short, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        check(short(**settings))
    assert str(error.value) == message


@pytest.mark.parametrize("method", ["gd", "rank1", "gd+rank1:gradient", "diagonal:decoupled", "rank1:slopes,alone"])
def test_other_methods_take_either_optimizer_and_any_share_of_the_rate(short: Short, method: str) -> None:
    for optimizer in ("adam", "sgd"):
        check(short(method, optimizer=optimizer, lr_later=2.5))
    check(short("rank1:preconditioned"))


def test_images_of_any_size_suit_a_model_that_does_not_halve_them(short: Short) -> None:
    for size in (8, 9, 16):
        require_size(short(model="mlp", image_size=size))
    message = "--image-size is 9, and --model mini halves images 1 time(s); choose a multiple of 2, or another model"
    with pytest.raises(OptionError) as error:
        require_size(short(model="mini", image_size=9))
    assert str(error.value) == message


def test_a_run_of_an_earlier_version_has_the_same_configuration(short: Short) -> None:
    """Its config.json lacks the options that came later: with their defaults, they are left out still."""
    config = short("gd+rank1")
    saved = config.as_json()
    assert saved.keys() == {field.name for field in fields(RunConfig)} - {*ADDED} | {"recipe"}
    assert RunConfig.from_json(json.loads(json.dumps(saved))) == config
    assert (config.lr_later, config.optimizer, config.pool_latents) == (1.0, "adam", "per-class")
    assert {field.name: field.default for field in fields(RunConfig) if field.name in ADDED} == ADDED
    digests = {digest_of(config)}
    for changed in ({"lr_later": 0.1}, {"optimizer": "sgd"}, {"pool_latents": "shared"}, {"guidance": 2.0}):
        other = replace(config, **changed)
        (name, value), saved = *changed.items(), other.as_json()
        assert saved[name] == value
        assert RunConfig.from_json(json.loads(json.dumps(saved))) == other
        digests.add(digest_of(other))
    assert len(digests) == 5


def test_joint_has_one_stage_of_all_classes_and_all_steps(short: Short) -> None:
    assert stages(short("joint", tasks=3)) == [Stage(0, (0, 1, 2, 3, 4, 5), 3, 3)]
    assert stages(short("gd", tasks=3)) == [Stage(i, (2 * i, 2 * i + 1), i + 1, 1) for i in range(3)]
