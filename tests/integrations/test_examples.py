"""The example as a user meets it: a diffusers and accelerate loop, and the five lines that add rank-1 EWC to it."""

import difflib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (extra trainer)")
pytest.importorskip("diffusers", reason="diffusers is not installed (extra trainer)")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra trainer)")
pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")

EXAMPLES = Path(__file__).parent.parent.parent / "python" / "examples"
SMALL = ["--tasks", "2", "--steps", "12", "--batch", "16", "--pool", "4"]


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(name: str) -> list[str]:
    """The lines of an example after its docstring."""
    return (EXAMPLES / f"{name}.py").read_text().split('"""\n', 1)[1].splitlines()


def test_five_lines_and_no_more_add_the_penalty():
    changes = [
        line for line in difflib.ndiff(code("continual_unet"), code("continual_unet_ewc")) if line[:2] in ("+ ", "- ")
    ]
    assert all(line.startswith("+ ") for line in changes)
    assert len([line for line in changes if line[2:].strip()]) == 5


@pytest.mark.filterwarnings("ignore:only .* of the trace of the Fisher:UserWarning")
@pytest.mark.filterwarnings("ignore:the mean gradient is mostly noise:UserWarning")
def test_both_run_and_differ_in_the_second_task_only(tmp_path, capsys):
    printed, weights = {}, {}
    for name in ("continual_unet", "continual_unet_ewc"):
        model = example(name).main([*SMALL, "--out", str(tmp_path / name)])
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        printed[name] = capsys.readouterr().out.splitlines()
        weights[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert (tmp_path / name / "diffusion_pytorch_model.safetensors").exists()
    plain, penalized = printed.values()
    assert [line.partition(":")[0] for line in penalized] == ["task 1", "task 2"]
    assert plain[0] == penalized[0]  # the first task has no past
    assert not torch.equal(*weights.values())
    assert all(w.isfinite().all() for w in weights.values())


def test_the_sharded_loop_runs_in_two_processes(tmp_path):
    script, out = EXAMPLES / "sharded_loop.py", tmp_path / "checkpoint"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0", str(script), "--epochs", "2", "--out", str(out)]
    result = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    first, second = [line for line in result.stdout.splitlines() if line.startswith("task")]
    assert "penalty 0, LowRankHistory(tasks=1" in first
    assert "LowRankHistory(tasks=2" in second
    assert "penalty 0," not in second
    assert (out / ".metadata").exists()


def test_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["continual_unet_ewc.py", "--help"])
    with pytest.raises(SystemExit):
        example("continual_unet_ewc").main()
    assert "--pool" in capsys.readouterr().out
