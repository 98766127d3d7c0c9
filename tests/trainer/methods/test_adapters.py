"""Adapters of each task: their steps, that nothing is forgotten, their size, and runs that are interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion import cli
from crl_diffusion.config.curriculum import reached, stages
from crl_diffusion.config.method import Method
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.config.spelling import in_order, parse_method, spell
from crl_diffusion.config.words import describe
from crl_diffusion.diffusion import noising, sampling
from crl_diffusion.diffusion.network import build
from crl_diffusion.errors import OptionError
from crl_diffusion.files import read_rows
from crl_diffusion.methods.adapters import AdaptedNetwork, base_weights
from crl_diffusion.reporting import penalty_tables, runs
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.checkpoint import Checkpoint
from crl_diffusion.run_folder.readers import read_samples, read_summary
from crl_diffusion.trained_model import drawing, weights
from crl_diffusion.training import run as run_module
from crl_diffusion.training import snapshot
from crl_diffusion.training.run import Run
from helpers.trainer_runs import SHORT, MakeRun, Short, TrainCommand, at_call, require_one_line, train
from torch import Tensor
from torch.func import functional_call

RANK, TASKS = 3, 3
THREE_TASKS: dict[str, Any] = {"method": f"adapters{RANK}", "model": "mlp", "tasks": TASKS, "ema": 0.5}
# The embedding of labels in each model.
EMBEDDING = {"mlp": "label_embedding.weight", "mini": "class_embedding.weight"}


@pytest.fixture(scope="module")
def adapted(extractor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run; not to be written to."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    train(RunConfig(**{**SHORT, **THREE_TASKS}), out, extractor_folder)
    return out


def _ends(run: Path) -> list[Checkpoint]:
    """The checkpoints of the ends of tasks."""
    return [checkpoint.load(checkpoint.end_of_stage(run / "checkpoints", number)) for number in range(TASKS)]


# Steps


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _trained(run: Run) -> dict[str, Tensor]:
    """What the task trains, by name."""
    return {name: p for name, p in run.model.named_parameters() if p.requires_grad}


def _plain_loss(run: Run, trained: dict[str, Tensor], batch: Any) -> Tensor:
    """The mean squared error with W + 2 B A in place of every weight W of a linear or convolutional layer."""
    network = build(run.config.model, run.data.shape, run.data.classes, 0).double()
    values = base_weights(run.model.state_dict())
    for name, a in trained.items():
        if ".lora_A." in name:
            layer = name.removeprefix("network.").partition(".lora_A.")[0]
            b = trained[name.replace(".lora_A.", ".lora_B.")]
            change = b @ a if a.dim() == 2 else torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
            values[f"{layer}.weight"] = values[f"{layer}.weight"] + 2 * change
        elif ".lora_B." not in name:
            values[name.removeprefix("network.")] = trained[name]
    prediction = functional_call(network, values, (batch.noised, batch.t), {"class_labels": batch.label})[0]
    return (prediction - batch.target).square().mean()


@pytest.mark.parametrize("clip", [0.05, 0.0])
@pytest.mark.parametrize("model", ["mlp", "mini"])
def test_consecutive_steps_are_those_of_plain_pytorch(short: Short, make_run: MakeRun, model: str, clip: float) -> None:
    """Adam's steps on A and B of the third task, and on the embeddings of its classes, in float64."""
    settings = {**THREE_TASKS, "model": model, "ema": 0.0, "lr_schedule": "constant", "precision": "fp64"}
    run = make_run(short(**settings, clip=clip))
    run.begin(run.stages[1])
    run.take_step(run.task_images(run.stages[1], "train"), run.stages[1])
    run.begin(run.stages[2])
    run.stage, run.step = 2, 0
    stage, before = run.stages[2], {name: p.detach().clone() for name, p in run.model.named_parameters()}
    images = run.task_images(stage, "train")
    names = [*_trained(run)]
    layers = [name for name in names if ".lora_A.task3." in name]
    assert set(names) == {
        f"network.{EMBEDDING[model]}",
        *layers,
        *(name.replace(".lora_A.", ".lora_B.") for name in layers),
    }
    assert all(bool((before[name] == 0).all()) == (".lora_B." in name) for name in names)  # no effect at first
    theta = {name: before[name] for name in names}
    mean, square = ({name: torch.zeros_like(value) for name, value in theta.items()} for _ in range(2))
    for step in range(1, 4):
        point = {name: value.clone().requires_grad_() for name, value in theta.items()}
        loss = _plain_loss(run, point, run.batch(images, stage))
        gradient = dict(zip(names, torch.autograd.grad(loss, [*point.values()]), strict=True))
        norm = float(torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt())
        shrink = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for name, g in gradient.items():
            mean[name] = 0.9 * mean[name] + 0.1 * shrink * g
            square[name] = 0.999 * square[name] + 0.001 * (shrink * g) ** 2
            denominator = (square[name] / (1 - 0.999**step)).sqrt() + 1e-8
            theta[name] = theta[name] - run.config.lr * mean[name] / (1 - 0.9**step) / denominator
        taken = run.take_step(images, stage)
        assert float(taken[0]) == pytest.approx(loss.item(), rel=1e-12)
        now = dict(run.model.named_parameters())
        moved = {name: value - before[name] for name, value in theta.items()}
        errors = [now[name].detach() - value for name, value in theta.items()]
        assert flat(errors).norm() <= 1e-8 * flat(moved.values()).norm()
        assert all(value.any() or (step == 1 and ".lora_A." in name) for name, value in moved.items())  # B was 0
        for name in before.keys() - theta.keys():
            assert torch.equal(now[name], before[name]), name


def test_the_first_task_is_that_of_fine_tuning(short: Short, extractor_folder: Path, tmp_path: Path) -> None:
    for name in ("fine-tune", "adapters1"):
        train(short(name, model="mlp", tasks=1), tmp_path / name, extractor_folder)
    first, second = (
        base_weights(checkpoint.load(checkpoint.end_of_stage(tmp_path / name / "checkpoints", 0)).part("model"))
        for name in ("fine-tune", "adapters1")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


# Forgetting


def _images(run: Path, after: int, classes: tuple[int, ...]) -> Tensor:
    """Ten DDIM steps with the weights of the end of a task; floating-point images, not their pixels."""
    trained = weights.read(run, after, "cpu", lambda line: None)
    label = torch.tensor(classes).repeat_interleave(2)
    latents = sampling.draw_latents(5, "test", label, trained.shape)
    with trained.precision.autocast():
        return sampling.draw_share(trained.model, noising.SCHEDULES["linear"], latents, label, 10)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "settings",
    [
        {"model": "mlp"},
        {"model": "mini", "ema": 0.0},
        {"model": "mini", "precision": "bf16"},
        {"model": "mlp", "precision": "fp64", "optimizer": "sgd", "lr": 0.2, "class_order": 3},
    ],
    ids=str,
)
def test_nothing_that_was_learnt_changes(
    settings: dict[str, Any], short: Short, extractor_folder: Path, tmp_path: Path
) -> None:
    config = short(**{**THREE_TASKS, **settings})
    train(config, tmp_path, extractor_folder)
    tasks = [stage.classes for stage in stages(config)]
    for learnt, classes in enumerate(tasks, start=1):
        first, stored = _images(tmp_path, learnt, classes), read_samples(tmp_path, learnt)
        assert stored is not None
        for later in range(learnt + 1, TASKS + 1):
            assert torch.equal(_images(tmp_path, later, classes), first)
            again = read_samples(tmp_path, later)
            assert again is not None
            for c in classes:
                assert (again[0][again[1] == c] == stored[0][stored[1] == c]).all()

    rows = read_rows(tmp_path / "metrics.jsonl")
    for kind, keys in (("evaluation", ("fid", "accuracy", "class_kl")), ("held_out_loss", ("by_band",))):
        for task in range(1, TASKS + 1):
            measured = [row for row in rows if row["kind"] == kind and row["task"] == task]
            assert len(measured) == TASKS + 1 - task
            assert all(row[key] == measured[0][key] for row in measured for key in keys)
    summary = read_summary(tmp_path)
    assert (summary["forgetting"], summary["accuracy_forgetting"]) == (0, 0)

    # The tasks did learn: their adapters and embeddings are not what they were.
    table = f"network.{EMBEDDING[config.model]}"
    ends = [end.part("model") for end in _ends(tmp_path)]
    for task, (before, after) in enumerate(pairwise(ends), start=2):
        kept, now = base_weights(before), base_weights(after)
        assert all(torch.equal(value, now[name]) for name, value in kept.items() if f"network.{name}" != table)
        changed = (before[table] != after[table]).any(1).nonzero().flatten().tolist()
        assert sorted(changed) == sorted(tasks[task - 1])
        new = {name: value for name, value in after.items() if f".task{task}." in name}
        assert new
        assert all(value.any() for value in new.values())
        assert all(torch.equal(value, after[name]) for name, value in before.items() if ".lora_" in name)


def test_an_image_is_the_same_bits_whatever_task_is_drawn_beside_it(adapted: Path, tmp_path: Path) -> None:
    trained = weights.read(adapted, None, "cpu", lambda line: None)
    labels, numbers = [5, 0, 2, 4, 1, 3], [0, 1, 0, 1, 0, 1]
    together = drawing.draw(trained, labels, numbers, 5, 4)
    for i, (c, n) in enumerate(zip(labels, numbers, strict=True)):
        assert torch.equal(drawing.draw(trained, [c], [n], 5, 4)[0], together[i])
    assert cli.main(["sample", str(adapted), "--out", str(tmp_path / "images"), "--count", "2"]) == 0
    assert len([*(tmp_path / "images").glob("class-*.png")]) == 2 * 6
    with pytest.raises(OptionError, match="class 4 has not been learnt after task 2"):
        drawing.chosen_classes(["4"], weights.read(adapted, 2, "cpu", lambda line: None))


# Records


def test_the_records_have_the_bytes_of_the_adapters_of_all_tasks(adapted: Path) -> None:
    width, pixels = 112, 64
    square, others = 2 + 2 * 3, [(pixels, width), (width, pixels), (width, 1)]
    one_task = 4 * RANK * (square * 2 * width + sum(a + b for a, b in others))
    rows = [row for row in read_rows(adapted / "metrics.jsonl") if row["kind"] == "adapters"]
    assert [(row["task"], row["state_bytes"]) for row in rows] == [(i + 1, i * one_task) for i in range(TASKS)]
    assert read_summary(adapted)["state_bytes"] == 2 * one_task
    for saved, row in zip(_ends(adapted), rows, strict=True):
        stored = [value for name, value in saved.part("model").items() if ".lora_" in name]
        assert sum(value.nbytes for value in stored) == row["state_bytes"]
    sheet = penalty_tables.costs(runs.grouped(runs.find([adapted])[0]))
    assert sheet.body[0][-1] == f"{2 * one_task / 2**20:,.2f}"


def test_diagnose_says_that_there_is_nothing_to_diagnose(adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diagnose", str(adapted)]) == 2
    require_one_line(capsys.readouterr().err, f"a run of adapters{RANK}", "give a run of another method")
    assert not (adapted / "diagnosis").exists()


def test_without_peft_nothing_is_trained_and_one_line_says_what_to_install(
    train_command: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert train_command(**THREE_TASKS) == 2
    require_one_line(capsys.readouterr().err, "'peft' is missing", 'pip install "crl-kernels[trainer]"')
    assert not (tmp_path / "run" / "checkpoints").exists()


# Spelling


def test_a_name_has_the_rank(short: Short) -> None:
    for rank in (1, 4, 17, 1000):
        name = f"adapters{rank}"
        assert parse_method(name) == Method(adapter_rank=rank)
        assert spell(name) == name
        assert short(name).as_json()["recipe"]["adapter_rank"] == rank
        assert f"rank {rank}:" in describe(short(name).as_json()["recipe"], {})
    assert "adapter_rank" not in short("gd").as_json()["recipe"]  # as earlier versions wrote it
    names = ["rank1", "adapters12", "gd", "adapters4", "fine-tune", "adapters5"]
    assert in_order(names) == ["fine-tune", "gd", "adapters4", "adapters5", "adapters12", "rank1"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "use adapters4") for name in ("gd+adapters4", "adapters4+rank1", "replay+gd+adapters4+diagonal")),
        ("adapters4:lam=3", "adapters4 has no penalty"),
        *((f"adapters{rank}", "adapters<r>, replay, gd") for rank in ("0", "04", "1001", "-1", "4x")),
    ],
)
def test_another_name_is_refused_in_one_line(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--method", name, "--out", str(tmp_path / "run")]) == 2
    require_one_line(capsys.readouterr().err, repr(name), message)


# Interruptions


class _Killed(Exception):
    pass


def _kill() -> None:
    raise _Killed


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("task", [1, 2, 3])
def test_a_run_interrupted_in_any_task_resumes_to_the_same_bits(
    task: int, adapted: Path, extractor_folder: Path, tmp_path: Path, short: Short, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = short(**THREE_TASKS), tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, run_module, "training_step", 6 * task, _kill)  # the last step of the task
        with pytest.raises(_Killed):
            train(config, out, extractor_folder)
    lines = train(config, out, extractor_folder)
    assert f"resuming after {task - 1} finished stage(s) and 4 steps of the next" in lines
    _require_same(adapted, out)


def _require_same(wanted: Path, out: Path) -> None:
    assert (out / "metrics.jsonl").read_bytes() == (wanted / "metrics.jsonl").read_bytes()
    for first, second in zip(_ends(wanted), _ends(out), strict=True):
        assert first.tensors.keys() == second.tensors.keys()
        assert all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())
    for learnt in range(1, TASKS + 1):
        name = f"samples/after-task-{learnt}.safetensors"
        assert (out / name).read_bytes() == (wanted / name).read_bytes()


@pytest.mark.usefixtures("no_pictures")
def test_lost_images_of_an_earlier_task_are_drawn_again(
    adapted: Path, extractor_folder: Path, tmp_path: Path, short: Short
) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    for path in (*adapted.glob("*.json*"), *adapted.glob("checkpoints/*")):
        if path.name != "summary.json":
            (out / path.relative_to(adapted)).write_bytes(path.read_bytes())
    lines = train(short(**THREE_TASKS), out, extractor_folder)
    assert sum("its images are drawn again" in line for line in lines) == TASKS
    _require_same(adapted, out)


FORGERIES: dict[str, tuple[str, Callable[[str], bool], str]] = {
    "an adapter": ("03-00000000", lambda name: name.endswith("first.lora_B.task2.weight"), "its model lacks"),
    "all of a task": ("02-00000006", lambda name: ".task2." in name and name.startswith("model/"), "its model lacks"),
    "moments": ("02-00000006", lambda name: "exp_avg_sq/network.last.lora_A.task3" in name, "its optimizer lacks"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_checkpoint_that_lacks_adapters_is_passed_over(
    forgery: str, adapted: Path, tmp_path: Path, short: Short, make_run: MakeRun
) -> None:
    name, lost, complaint = FORGERIES[forgery]
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for path in (adapted / "checkpoints").iterdir():
        if path.stem <= name:
            (folder / path.name).write_bytes(path.read_bytes())
    fits = partial(snapshot.require_fits, make_run(short(**THREE_TASKS)))
    newest, complaints = checkpoint.latest(folder, fits)
    assert newest is not None
    assert ((newest.stage, newest.step), complaints) == ((int(name[:2]), int(name[3:])), [])
    kept = {key: value for key, value in newest.tensors.items() if not lost(key)}
    assert len(kept) < len(newest.tensors)
    checkpoint.save(folder, newest._replace(tensors=kept))
    older, complaints = checkpoint.latest(folder, fits)
    assert f"checkpoint {name}.safetensors is damaged" in complaints[0]
    assert complaint in complaints[0]
    assert older is not None
    assert (older.stage, older.step) < (newest.stage, newest.step)


def test_a_model_has_adapters_of_the_tasks_that_it_has_reached(short: Short, make_run: MakeRun) -> None:
    run = make_run(short(**THREE_TASKS))
    plan = run.stages
    for finished, step, learnt in ((0, 3, 1), (1, 0, 1), (1, 1, 2), (2, 0, 2), (2, 6, 3), (3, 0, 3)):
        stage = reached(plan, finished, step)
        model = run.new_model(stage.learnt)
        assert isinstance(model, AdaptedNetwork)
        assert stage.learnt == model.tasks == learnt
        tasks = {name.split(".")[-2] for name in model.state_dict() if ".lora_" in name}
        assert tasks == {f"task{task}" for task in range(2, learnt + 1)}
