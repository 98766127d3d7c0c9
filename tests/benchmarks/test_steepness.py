"""`benchmarks.steepness`: quantities against plain formulas, what is read from a run's folder, refusals, the page."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crl_diffusion.config import networks
from crl_diffusion.config.curriculum import stages
from crl_diffusion.config.networks import MLPSize
from crl_diffusion.data.images import Images
from crl_diffusion.data.tasks import load
from crl_diffusion.diffusion import noising
from crl_diffusion.diffusion.mlp import ResidualMLP
from crl_diffusion.diffusion.network import build
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.checkpoint import Checkpoint
from crl_diffusion.run_folder.layout import digest_of
from crl_diffusion.run_folder.readers import read_run_config
from crl_diffusion.training.fisher_batches import fisher_batches, per_sample_loss
from helpers.by_loop import flat, rows_of_single_samples
from helpers.run_folders import fabricate
from torch import Tensor, nn

from benchmarks.steepness import __main__ as steepness
from benchmarks.steepness import displacement, report
from benchmarks.steepness.measurement import ESTIMATES, comparable, measure

TINY = MLPSize(width=8, blocks=1)
FISHER_SAMPLES = 64  # two batches: the first has the directions, the second the curvatures


# The loss along a displacement


class Problem:
    """A small network, draws in uneven batches, and a displacement of its weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = ResidualMLP((1, 4, 4), 3, TINY).double().eval()
        self.weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.delta = {name: 0.3 * torch.randn_like(p) for name, p in self.weights.items()}
        pixels = torch.randint(256, (5, 1, 4, 4), dtype=torch.uint8)
        images = Images(pixels, torch.tensor([0, 1, 2, 1, 0]))
        generator = noising.stream(0, "test")
        self.batches = displacement.draw(
            images, 7, noising.SCHEDULES["linear"], generator, self.weights["first.weight"]
        )
        self.all = tuple(torch.cat(parts) for parts in zip(*self.batches, strict=True))
        self.arguments = (self.model, self.weights, self.delta, self.batches)

    def flat_delta(self) -> Tensor:
        return torch.cat([part.flatten() for part in self.delta.values()])

    def jacobians(self) -> Tensor:
        """(N, d, P), by one backward pass for each sample and pixel."""
        rows = []
        for i in range(7):
            noised, t, label, _ = (part[i : i + 1] for part in self.all)
            prediction = self.model(noised, t, class_labels=label)[0].flatten()
            for output in prediction:
                gradients = torch.autograd.grad(output, [*self.model.parameters()], retain_graph=True)
                rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        return torch.stack(rows).view(7, 16, -1)


@pytest.fixture
def problem(monkeypatch):
    monkeypatch.setattr(displacement, "BATCH", 3)
    return Problem()


def test_draws_are_in_batches_and_repeat(problem):
    assert [len(batch[0]) for batch in problem.batches] == [3, 3, 1]
    for first, second in zip(problem.all, Problem().all, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert problem.all[0].dtype == torch.float64


def test_the_loss_is_that_of_the_trainer_at_any_weights(problem):
    moved = displacement.shifted(problem.weights, problem.delta, 0.5)
    values = [displacement.loss(problem.model, weights, problem.batches) for weights in (problem.weights, moved)]
    assert values[0] == pytest.approx(float(per_sample_loss(problem.model, problem.all).detach().mean()), rel=1e-13)
    problem.model.load_state_dict({name: p + 0.5 * problem.delta[name] for name, p in problem.weights.items()})
    assert values[1] == pytest.approx(float(per_sample_loss(problem.model, problem.all).detach().mean()), rel=1e-13)
    assert abs(values[1] - values[0]) > 1e-3


def test_first_order_gauss_newton_and_fisher_equal_explicit_gradients_and_jacobians(problem):
    actual = displacement.first_and_second_order(*problem.arguments)
    delta = problem.flat_delta()
    slopes = (
        flat(rows_of_single_samples(problem.model, lambda m, *batch: per_sample_loss(m, batch), problem.all)) @ delta
    )
    moved = problem.jacobians() @ delta  # (N, d)
    assert actual == {
        "first_order": pytest.approx(float(slopes.mean()), rel=1e-12),
        "gauss_newton": pytest.approx(float((2 / 16 * moved.square().sum(1)).mean() / 2), rel=1e-12),
        "fisher": pytest.approx(float(slopes.square().mean() / 2), rel=1e-12),
    }


@pytest.mark.parametrize("times", [1, 2])
def test_the_second_difference_is_a_product_with_the_hessian(problem, times):
    base = displacement.loss(problem.model, problem.weights, problem.batches)
    actual = displacement.curvature(*problem.arguments, base, times * displacement.STEP)
    parameters = [*problem.model.parameters()]
    mean = per_sample_loss(problem.model, problem.all).mean()
    gradients = torch.autograd.grad(mean, parameters, create_graph=True)
    parts = [*zip(gradients, problem.delta.values(), strict=True)]
    products = torch.autograd.grad(sum((g * d).sum() for g, d in parts), parameters)
    expected = sum(float((h * d).sum()) for h, (_, d) in zip(products, parts, strict=True)) / 2
    assert actual == pytest.approx(expected, rel=1e-5)
    gauss_newton = displacement.first_and_second_order(*problem.arguments)["gauss_newton"]
    assert abs(gauss_newton / expected - 1) > 1e-3  # the Hessian has more than Gauss-Newton's part


# A run


def finished(folder: Path, seed: int = 0, method: str = "gd", **settings: object) -> Path:
    """A fabricated run with a checkpoint at the end of each stage, whose weights are random."""
    fabricate(folder, method, seed, **{"tasks": 3, "model": "mlp", "precision": "fp64", **settings})
    config = read_run_config(folder)
    model = build(config.model, (1, 8, 8), 10, config.seed).double()
    generator = torch.Generator().manual_seed(seed)
    (folder / "checkpoints").mkdir()
    for stage in stages(config):
        state = {f"model/{name}": value.clone() for name, value in model.state_dict().items()}
        digest = digest_of(config)
        checkpoint.save(folder / "checkpoints", Checkpoint(stage.number + 1, 0, {}, state, digest))
        with torch.no_grad():
            for p in model.parameters():
                p += 0.03 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return folder


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(networks.MODELS, "mlp", TINY)


def state_of(run: Path, number: int) -> dict[str, Tensor]:
    return checkpoint.load(checkpoint.end_of_stage(run / "checkpoints", number)).part("model")


def by_loop(model: nn.Module, batches: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Of each batch the per-sample gradients, (N, P)."""
    return [
        flat(rows_of_single_samples(model, lambda m, *batch: per_sample_loss(m, batch), batch)) for batch in batches
    ]


def test_a_run_is_measured_as_plain_formulas_say(tmp_path, tiny):
    run = finished(tmp_path / "gd-seed0")
    result = measure(comparable([run])[0], Path("unused"), samples=20, fisher_samples=FISHER_SAMPLES)
    assert (result["run"], result["lr_schedule"]) == (f"{tmp_path.name}/gd-seed0", "one-cycle")
    assert [(pair["task"], pair["after_task"]) for pair in result["pairs"]] == [(1, 2), (1, 3), (2, 3)]

    config = replace(read_run_config(run), fisher_samples=FISHER_SAMPLES)
    data, schedule = load(config, Path("unused")), noising.SCHEDULES[config.schedule]
    model = build("mlp", data.shape, 10, 0).double().eval()
    for number, later, pair in ((0, 2, result["pairs"][1]), (1, 2, result["pairs"][2])):
        like = next(model.parameters())
        row, stage, task = result["tasks"][number], stages(config)[number], data.tasks[number]
        losses = {}
        for part, images in (("train", task.train), ("held out", task.held_out)):
            (batch,) = displacement.draw(images, 20, schedule, noising.stream(0, f"steepness, {part}", number), like)
            assert set(batch[2].tolist()) <= set(task.classes)
            for end in (number, later):
                model.load_state_dict(state_of(run, end))
                losses[part, end] = float(per_sample_loss(model, batch).detach().mean())
        assert row["loss"] == pytest.approx(losses["train", number], rel=1e-12)
        assert row["held_out_loss"] == pytest.approx(losses["held out", number], rel=1e-12)
        assert pair["rise"] == pytest.approx(losses["train", later] - losses["train", number], rel=1e-9)
        assert pair["held_out_rise"] == pytest.approx(losses["held out", later] - losses["held out", number], rel=1e-9)

        then, now = (state_of(run, end) for end in (number, later))
        delta = torch.cat([(now[name] - then[name]).flatten() for name, _ in model.named_parameters()])
        assert pair["displacement_sq"] == pytest.approx(float(delta @ delta), rel=1e-12)
        assert pair["quadratic"] == pair["first_order"] + pair["curvature"]
        assert pair["curvature_at_twice_the_step"] == pytest.approx(pair["curvature"], rel=1e-4)
        assert pair["curvature_at_twice_the_step"] != pair["curvature"]

        model.load_state_dict(state_of(run, number))
        batches = fisher_batches(task.train, stage, config, schedule, like)
        first, second = by_loop(model, batches)
        u = first.mean(0) / first.mean(0).norm()
        top = torch.linalg.svd(first, full_matrices=False).Vh[:10]
        expected = {
            "rank1": (second @ u).square().mean() * (u @ delta) ** 2 / 2,
            "rank10": ((second @ top.T).square().mean(0) * (top @ delta).square()).sum() / 2,
            "diagonal": (torch.cat([first, second]).square().mean(0) * delta.square()).sum() / 2,
        }
        for name, value in expected.items():
            assert pair[name] == pytest.approx(float(value), rel=1e-6), name
        assert row["rho"] == pytest.approx(
            float((second @ u).square().mean() / second.square().sum(1).mean()), rel=1e-6
        )
        assert row["trace"] == pytest.approx(float(second.square().sum(1).mean()), rel=1e-6)
        assert row["mean_gradient_sq"] == pytest.approx(float(first.mean(0) @ second.mean(0)), rel=1e-6)
        assert row["kappa"] == pytest.approx(row["mean_gradient_sq"] / row["trace"], rel=1e-12)

        banded = 0.0  # a direction for each of eight bands of timesteps
        halves = [(rows, batch[1] // 125) for rows, batch in zip((first, second), batches, strict=True)]
        for band in range(8):
            (early, late) = (rows[t == band] for rows, t in halves)
            if len(early):
                u = early.mean(0) / early.mean(0).norm()
                banded += float((late @ u).square().sum() / len(second) * (u @ delta) ** 2 / 2)
        assert pair["bands8"] == pytest.approx(banded, rel=1e-6)


# Wrong input


def refusal(monkeypatch, capsys, *words: object) -> str:
    """The command's message."""
    monkeypatch.setattr(sys, "argv", ["steepness", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        steepness.main()
    assert end.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "gd+rank1"}, "was trained with a penalty (gd+rank1)"),
        ({"method": "joint"}, "has one stage; give runs that learn several tasks"),
        ({"seed": 0}, "have the same seed and lr_schedule; give one"),
        ({"lr": 0.5}, "these runs differ in their lr (lr is 0.002 in "),
        ({"steps": 20, "ema": 0.9}, "these runs differ in their steps, ema (steps is 300 in "),
    ],
)
def test_runs_that_do_not_compare_are_refused(tmp_path, monkeypatch, capsys, change, message):
    runs = [fabricate(tmp_path / "a", "gd", 0), fabricate(tmp_path / "b", **{"method": "gd", "seed": 1, **change})]
    assert message in refusal(monkeypatch, capsys, *runs, "--out", tmp_path)


def test_settings_that_change_no_result_may_differ(tmp_path):
    for name, settings in (("a", {}), ("b", {"lr_schedule": "constant", "log_every": 7, "checkpoint_every": 9})):
        fabricate(tmp_path / name, "gd", 0, **settings)
    assert [run.path.name for run in comparable([tmp_path])] == ["a", "b"]


def test_folders_without_a_finished_run_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty' holds no run" in refusal(monkeypatch, capsys, tmp_path / "empty")
    (fabricate(tmp_path / "run", "gd", 0) / "summary.json").unlink()
    assert "run' is not finished" in refusal(monkeypatch, capsys, tmp_path / "run")


def test_a_run_needs_the_checkpoint_of_each_stage(tmp_path, monkeypatch, capsys, tiny):
    run = finished(tmp_path / "run")
    words = [run, "--samples", 4, "--fisher-samples", 40, "--out", tmp_path]
    path = checkpoint.end_of_stage(run / "checkpoints", 1)
    saved, content = checkpoint.load(path), path.read_bytes()
    checkpoint.save(path.parent, saved._replace(run="another"))
    assert "02-00000000.safetensors' belongs to a run of another configuration" in refusal(monkeypatch, capsys, *words)
    path.write_bytes(content[:-8] + bytes(8))
    assert "02-00000000.safetensors' is damaged (its contents" in refusal(monkeypatch, capsys, *words)
    path.unlink()
    assert "02-00000000.safetensors' is missing; repeat the run" in refusal(monkeypatch, capsys, *words)


def test_too_few_samples_are_refused(tmp_path, monkeypatch, capsys):
    run = fabricate(tmp_path / "run", "gd", 0)
    assert "--samples is 0" in refusal(monkeypatch, capsys, run, "--samples", 0)
    assert "--fisher-samples is 19; for rank10" in refusal(monkeypatch, capsys, run, "--fisher-samples", 19)


# The page


def pair(rise: float, **values: float) -> dict[str, float]:
    keys = {**report.MEASURED, **report.PREDICTED, **report.DISPLACEMENT}
    known = {"rise": rise, "curvature": rise, "curvature_at_twice_the_step": 1.002 * rise, "fisher": 4 * rise}
    return {"task": 1, "after_task": 2, **dict.fromkeys(keys, 2 * rise), **known, **values}


def record_of(*runs: tuple[str, int, list[dict[str, float]], float]) -> dict[str, object]:
    """A record of runs: schedule, seed, pairs, kappa."""
    rows = [
        {
            "run": f"{schedule}/gd-seed{seed}", "lr_schedule": schedule, "seed": seed, "pairs": pairs,
            "tasks": [{**dict.fromkeys(report.AT_THE_END, 0.25), "kappa": kappa}],
        }
        for schedule, seed, pairs, kappa in runs
    ]  # fmt: skip
    head = dict.fromkeys(("command", "date", "commit", "machine", "torch", "options"), "known")
    return {**head, "samples": 4096, "fisher_samples": 4000, "runs": rows}


def rows_of(page: str, title: str) -> dict[str, list[str]]:
    """The cells of the table below a title, by row."""
    lines = page.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()
    cells = [[part.strip() for part in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in cells}


def page_of(record: dict[str, object]) -> str:
    return report.markdown(record, report.picture(record))


def test_the_page_averages_pairs_and_takes_seeds_as_replicates():
    # Rank 1 orders the pairs rightly, the diagonal in the reverse order.
    def pairs(scale: float) -> list[dict[str, float]]:
        return [pair(scale * i, rank1=scale * i**2, diagonal=-scale * i) for i in (1.0, 2.0, 3.0)]

    constant = [("constant", seed, pairs(seed + 2), 0.1 * (seed + 1)) for seed in range(3)]
    record = record_of(*constant, *(("one-cycle", seed, pairs(1), 0.1) for seed in range(3)))
    page = page_of(record)
    # Means over pairs are 4, 6, 8 and 2, 2, 2; t(0.975, 2) = 4.303, and 4.303 * 2 / sqrt(3) = 4.97.
    measured = rows_of(page, "Measured and predicted rise")
    assert measured[""] == ["constant rate", "one-cycle", "difference", "p"]
    assert measured["measured rise, training images"] == ["6 [1.03, 11]", "2 [2, 2]", "4 [−0.968, 8.97]", "0.25"]
    relative = rows_of(page, "Relative to the Fisher matrix along the displacement")
    assert relative["rank 1"][0] == "0.583 [0.583, 0.583]"  # (1 + 4 + 9) / 4 (1 + 2 + 3)
    over = rows_of(page, "Predicted over measured")
    assert over["rank 1"][:2] == ["2.33 [2.33, 2.33]", "2.33 [2.33, 2.33]"]  # (1 + 4 + 9) / (1 + 2 + 3)
    order = rows_of(page, "Order of the pairs")
    assert order["rank 1"][3:] == ["1 [1, 1]", "1 [1, 1]"]
    assert order["diagonal"] == ["−1", "−1", "−1", "−1 [−1, −1]", "−1 [−1, −1]"]
    assert 0.9 < float(order["rank 1"][2]) < 1  # scales of seeds mix
    kappa = rows_of(page, "The old task's gradient")["kappa"]
    assert kappa == ["0.2 [−0.0484, 0.448]", "0.1 [0.1, 0.1]", "0.1 [−0.148, 0.348]", "0.5"]
    assert "with twice that step it differs by 0.2 % at most" in page
    assert "nan" not in page


def test_ratios_that_are_not_defined_are_left_out_and_counted():
    fell = [pair(-1.0), pair(0.5)]
    record = record_of(*(("constant", seed, [pair(1.0), pair(2.0)] if seed else fell, 0.1) for seed in range(3)))
    page = page_of(record)
    assert rows_of(page, "Predicted over measured")[""] == ["constant rate"]  # no difference to show
    assert rows_of(page, "Predicted over measured")["rank 1"] == ["2 [2, 2] (2 of 3 seeds)"]
    assert rows_of(page, "Order of the pairs")["rank 1"][-1] == "– (0 of 3 seeds)"  # of two pairs a run
    assert rows_of(page, "Measured and predicted rise")["rank 1"] == ["1.83 [−3.19, 6.85]"]
    assert "7 of 42 points have a value that is not above 0" in page


def test_a_single_seed_has_no_interval():
    page = page_of(record_of(("one-cycle", 3, [pair(1.0), pair(2.0), pair(3.0)], 0.1)))
    assert rows_of(page, "Measured and predicted rise")["measured rise, training images"] == ["2"]


def test_the_command_measures_runs_of_both_rates(tmp_path, monkeypatch, capsys, tiny):
    for schedule, seed in (("constant", 0), ("constant", 1), ("one-cycle", 0)):
        finished(tmp_path / "runs" / f"{schedule}-seed{seed}", seed, tasks=2, lr_schedule=schedule)
    words = [tmp_path / "runs", "--samples", 8, "--fisher-samples", 32, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["steepness", *map(str, words)])
    steepness.main()
    record = json.loads((tmp_path / "steepness.json").read_text())
    assert [(run["lr_schedule"], run["seed"]) for run in record["runs"]] == [
        ("constant", 0), ("constant", 1), ("one-cycle", 0)
    ]  # fmt: skip
    assert record["options"].startswith("--data digits --method gd ")
    assert "--tasks 2" in record["options"]
    page = (tmp_path / "steepness.md").read_text()
    assert page in capsys.readouterr().out
    assert {*ESTIMATES} <= record["runs"][0]["pairs"][0].keys()
    rises = [run["pairs"][0]["rise"] for run in record["runs"][:2]]
    shown = rows_of(page, "Measured and predicted rise")["measured rise, training images"][0]
    assert shown.partition(" ")[0] == report.short(sum(rises) / 2)
    assert (tmp_path / "steepness.png").stat().st_size > 0
