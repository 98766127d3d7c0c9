"""Where a run comes from: its command and the state of its source code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from crl_diffusion.files import read_json
from crl_diffusion.run_folder import origin


def test_a_run_keeps_its_command_and_its_source_code_but_no_host(finished: Path) -> None:
    saved = read_json(finished / "config.json")
    assert saved["command"] == origin.command_line()
    assert saved["command"]
    assert saved["git"] == origin.git_state()
    assert os.uname().nodename not in json.dumps({k: v for k, v in saved.items() if k != "command"})


def test_the_state_of_the_source_code_is_gits(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    file = tmp_path / "code.py"
    file.write_text("a = 1\n")
    assert origin.git_state(file) is None
    git("init", "-q")
    assert origin.git_state(file) is None  # a copy that git does not keep
    git("add", "code.py")
    git("commit", "-q", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert origin.git_state(file) == {"commit": commit, "dirty": False}
    (tmp_path / "run.txt").write_text("no source")
    assert origin.git_state(file) == {"commit": commit, "dirty": False}
    file.write_text("a = 2\n")
    assert origin.git_state(file) == {"commit": commit, "dirty": True}


def test_the_command_can_be_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "crl_diffusion", "--out", "two words"])
    assert origin.command_line() == "python -m crl_diffusion --out 'two words'"
