"""A checkpoint with a good digest that does not fit its run is passed over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.checkpoint import Checkpoint
from crl_diffusion.training import snapshot
from crl_diffusion.training.plan import resolve
from helpers.trainer_runs import MakeRun, Short, few_samples
from torch import Tensor


def _forge(path: Path, change: Callable[[Checkpoint], Checkpoint]) -> None:
    """Writes a checkpoint anew, with a digest that fits it."""
    changed = change(checkpoint.load(path))
    start = path.with_name(f"{changed.stage:02d}-00000000.safetensors")
    assert changed.step == 0 or start.exists()
    checkpoint.save(path.parent, changed)


def _without(saved: Checkpoint, name: str) -> Checkpoint:
    assert any(key.startswith(name) for key in saved.tensors)
    return saved._replace(tensors={k: v for k, v in saved.tensors.items() if not k.startswith(name)})


def _with(saved: Checkpoint, name: str, change: Callable[[Tensor], Tensor]) -> Checkpoint:
    key = next(key for key in saved.tensors if key.startswith(name))
    return saved._replace(tensors={**saved.tensors, key: change(saved.tensors[key])})


FORGERIES: dict[str, tuple[str, Callable[[Checkpoint], Checkpoint], str]] = {
    "shape": ("01-00000006", lambda s: _with(s, "model/", lambda t: t[:1]), "its model has torch.float32 (1,"),
    "dtype": ("01-00000006", lambda s: _with(s, "model/", lambda t: t.double()), "its model has torch.float64"),
    "name": ("01-00000006", lambda s: _without(s, "model/conv_in.bias"), "its model lacks or has too many: conv_in"),
    "moments": ("01-00000006", lambda s: _without(s, "optimizer/exp_avg_sq"), "its optimizer lacks or has too many"),
    "run": ("01-00000006", lambda s: s._replace(run="another"), "it belongs to a run of another configuration"),
    "log": ("01-00000006", lambda s: s._replace(rows={"metrics": 1}), "no 'timings'"),
    "teacher": ("01-00000000", lambda s: _without(s, "memory/teacher"), "its teacher lacks or has too many"),
    "pool": ("01-00000000", lambda s: _without(s, "memory/source"), "no 'pixels'"),
    "penalty": ("01-00000000", lambda s: _without(s, "memory/penalty"), "no 'penalty'"),
    "directions": (
        "01-00000000",
        lambda s: _with(s, "memory/penalty/directions.0.conv_in.weight", lambda t: t[..., :1]),
        "conv_in.weight",
    ),
}


@few_samples
@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_checkpoint_that_does_not_fit_the_run_is_skipped(
    forgery: str, finished: Path, tmp_path: Path, short: Short, make_run: MakeRun
) -> None:
    name, change, complaint = FORGERIES[forgery]
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    names = sorted(path.stem for path in (finished / "checkpoints").iterdir())
    for kept in names[: names.index(name) + 1]:
        (folder / f"{kept}.safetensors").write_bytes((finished / "checkpoints" / f"{kept}.safetensors").read_bytes())
    _forge(folder / f"{name}.safetensors", change)
    config = resolve(short())
    run = make_run(config)
    newest, complaints = checkpoint.latest(folder, partial(snapshot.require_fits, run))
    assert f"checkpoint {name}.safetensors is damaged" in complaints[0]
    assert complaint in complaints[0]
    if name == "01-00000006":
        assert newest is not None
        assert (newest.stage, newest.step) == (1, 4)
    else:
        assert newest is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: _without(s, "memory/source/guided/guide/"), "its guide lacks or has too many: first.bias"),
        (lambda s: _without(s, "memory/source/guided/guide/head.bias"), "its guide lacks or has too many: head"),
        (lambda s: _with(s, "memory/source/guided/guide/head", lambda t: t[:1]), "its guide has torch.float32 (1,"),
        (lambda s: _without(s, "memory/source/guided/labels"), "no 'labels'"),
    ],
)
def test_the_classifier_of_guided_replay_must_fit(
    change: Callable[[Checkpoint], Checkpoint], complaint: str, tmp_path: Path, short: Short, make_run: MakeRun
) -> None:
    run = make_run(short("ddgr", model="mlp"))
    run.remember(run.stages[0])
    run.stage = 1
    snapshot.save(run)
    folder, fits = tmp_path / "checkpoints", partial(snapshot.require_fits, run)
    assert checkpoint.latest(folder, fits)[1] == []
    _forge(folder / "01-00000000.safetensors", change)
    newest, complaints = checkpoint.latest(folder, fits)
    assert newest is None
    assert complaint in complaints[0]


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        (
            "01-00000001",
            lambda s: _without(s, "optimizer/momentum_buffer/first.bias"),
            "its optimizer lacks or has too",
        ),
        ("01-00000000", lambda s: _without(s, "memory/teacher/first.bias"), "its teacher lacks or has too many: first"),
        ("01-00000000", lambda s: _with(s, "memory/teacher/", lambda t: t[:1]), "its teacher has torch.float32 (1,"),
        ("01-00000000", lambda s: _without(s, "memory/teacher"), None),  # as an earlier version wrote it
    ],
)
def test_momentum_and_the_start_of_a_stage_must_fit_without_replays_too(
    name: str,
    change: Callable[[Checkpoint], Checkpoint],
    complaint: str | None,
    tmp_path: Path,
    short: Short,
    make_run: MakeRun,
) -> None:
    run = make_run(short("fine-tune", model="mlp", optimizer="sgd"))
    run.remember(run.stages[0])
    run.stage = 1
    snapshot.save(run)
    run.losses.append(run.take_step(run.task_images(run.stages[1], "train"), run.stages[1]))
    snapshot.save(run)
    folder = tmp_path / "checkpoints"
    fits = partial(snapshot.require_fits, run)
    newest, complaints = checkpoint.latest(folder, fits)
    assert newest is not None
    assert ((newest.stage, newest.step), complaints) == ((1, 1), [])
    if name == "01-00000000":
        (folder / "01-00000001.safetensors").unlink()
    _forge(folder / f"{name}.safetensors", change)
    newest, complaints = checkpoint.latest(folder, fits)
    if complaint is None:
        assert newest is not None
        assert ((newest.stage, newest.step), complaints) == ((1, 0), [])
    else:
        assert f"checkpoint {name}.safetensors is damaged" in complaints[0]
        assert complaint in complaints[0]
