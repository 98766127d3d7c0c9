"""The written list of data sets, models, methods and presets is what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from crl_diffusion import cli
from crl_diffusion.config.presets import PRESETS
from crl_diffusion.config.settings import DATA_PLANS
from helpers.trainer_runs import child_environment

PRESETS_FILE = Path(__file__).parents[3] / "python" / "PRESETS.md"


def test_the_written_list_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["list", "--markdown"]) == 0
    assert PRESETS_FILE.read_text(encoding="utf-8") == capsys.readouterr().out, (
        "write it again: crl-diffusion list --markdown > python/PRESETS.md"
    )
    for name, value in child_environment().items():
        monkeypatch.setenv(name, value)
    assert cli.main(["list"]) == 0
    output = capsys.readouterr().out
    for name in [*PRESETS, *DATA_PLANS, "gd+rank1:gradient,lam=15000", "rank<n>", "35,751,427", "117,889"]:
        assert name in output
