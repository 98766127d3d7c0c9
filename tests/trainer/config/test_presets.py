"""Presets resolve to the paper's numbers, written out here once more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from crl_diffusion.cli import options, parser
from crl_diffusion.comparison import cells
from crl_diffusion.config import presets
from crl_diffusion.config.curriculum import stages
from crl_diffusion.config.method import METHODS, Penalty
from crl_diffusion.config.presets import OURS, PRESETS, UNUSED
from crl_diffusion.config.settings import RunConfig, Settings, check
from crl_diffusion.config.spelling import parse_method, parse_variant, spell
from crl_diffusion.methods.optimizers import new_optimizer
from crl_diffusion.training.plan import resolve

# arXiv 2509.23593: data, tasks, classes a task, epochs a task, replay images a class.
PAPER = {
    "paper-mnist": ("mnist", 5, 2, 200, 5000),
    "paper-fashion-mnist": ("fashion_mnist", 5, 2, 200, 5000),
    "paper-cifar10": ("cifar10", 5, 2, 200, 5000),
    "paper-imagenet32": ("imagenet32", 20, 50, 100, 1300),
}


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_of_the_paper_has_its_numbers(name: str) -> None:
    data, tasks, classes, epochs, pool = PAPER[name]
    config = resolve(RunConfig(method="gd", **PRESETS[name].settings))
    assert (config.data, config.tasks, config.classes_per_task) == (data, tasks, classes)
    assert (config.epochs, config.pool) == (epochs, pool)
    assert (config.batch, config.lr, config.lr_schedule, config.image_size) == (128, 2e-4, "constant", 32)
    assert (config.pool_steps, config.eval_steps, config.schedule) == (50, 50, "linear")
    assert (config.fisher_samples, config.fisher_estimate, config.fisher_images) == (0, "in-sample", "train")
    assert (config.model, config.class_order, config.per_class, config.held_out) == ("paper", -1, 0, "test")
    first, *_, last = stages(config)
    assert first.classes == tuple(range(classes))  # labels in their own order
    assert last.classes == tuple(range(tasks * classes - classes, tasks * classes))
    assert (PRESETS[name].seeds, PRESETS[name].extractor) == ((0, 1, 2), "inception")


def test_the_paper_has_its_network_its_noise_and_its_optimizer() -> None:
    import torch
    from crl_diffusion.config.networks import MODELS
    from crl_diffusion.diffusion import noising

    unet = MODELS["paper"]
    assert (unet.channels, unet.layers) == ((128, 256, 256, 256), 2)
    assert noising.TIMESTEPS == 1000
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(noising.SCHEDULES["linear"].alpha_bar, torch.cumprod(1 - beta, 0))
    assert type(new_optimizer(torch.nn.Linear(1, 1))) is torch.optim.Adam


def test_the_papers_methods_have_its_replays_and_penalties() -> None:
    gd, rank1 = METHODS["gd"].replays, Penalty("low_rank", 15000.0, "gradient")
    diagonal = Penalty("diagonal", 15000.0, "gradient")
    recipes = [parse_method(text) for text in presets.PAPER_METHODS.values()]
    assert [(m.replays, m.penalty, m.curriculum) for m in recipes] == [
        ((), None, "joint"),
        ((), None, "continual"),
        ((), diagonal, "continual"),
        ((), rank1, "continual"),
        (gd, None, "continual"),
        (gd, diagonal, "continual"),
        (gd, rank1, "continual"),
    ]
    code, *rank_k = presets.PAPER_VARIANTS.values()
    assert parse_method(code).replays == METHODS["replay+gd"].replays
    assert parse_method(code).penalty == rank1
    assert [parse_method(text).penalty for text in rank_k] == [
        Penalty("low_rank", 15000.0, "gradient", rank=k, direction="top") for k in (2, 3, 4, 5)
    ]
    for text in [*presets.PAPER_METHODS.values(), *presets.PAPER_VARIANTS.values()]:
        assert spell(text) == text  # as folders and tables will call it


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_run_and_has_only_settings_that_differ(name: str) -> None:
    preset, default = PRESETS[name], RunConfig(method="gd")
    settings = Settings(**{**preset.settings, "device": "cpu"})  # wherever this runs
    work = cells.cells(settings, preset.methods, preset.seeds, Path("x"))
    assert {cell.config.label for cell in work} == {*preset.methods}  # as folders and tables will call them
    for cell in work:
        check(resolve(cell.config))
    for option, value in preset.settings.items():
        assert getattr(default, option) != value, f"{option} is the default"
    assert preset.settings.keys() & {*UNUSED} == set()
    assert {*OURS} <= vars(default).keys()


def test_the_demo_preset_has_the_default_settings() -> None:
    assert RunConfig(method="gd", **PRESETS["demo"].settings) == RunConfig(method="gd")
    parsed = parser.parse(["compare", "--out", "x"])
    assert isinstance(parsed, options.Compare)
    assert (parsed.methods, parsed.seeds, parsed.preset) == (("fine-tune", "gd", "gd+rank1"), (0,), "demo")


def test_the_forgetting_preset_compares_rank_1_with_an_average_at_a_constant_rate() -> None:
    preset = PRESETS["forgetting"]
    config = resolve(RunConfig(method="gd", **preset.settings))
    assert (config.data, config.model, config.steps, config.epochs) == ("digits", "mlp", 2000, 0)
    assert (config.lr, config.lr_schedule, config.clip, config.ema, config.lr_later) == (0.003, "constant", 0, 0, 1)
    assert (config.batch, config.replay_batch, config.fisher_samples) == (16, 16, 4000)
    variants = [parse_variant(text) for text in preset.methods]
    assert [values for _, values in variants] == [{}, {}, {}, {"ema": 0.999}]
    fine_tune, gd, rank1, average = (parse_method(method) for method, _ in variants)
    assert (fine_tune, gd, average) == (METHODS["fine-tune"], METHODS["gd"], METHODS["gd"])
    assert rank1.replays == gd.replays
    assert rank1.penalty is not None
    assert replace(rank1.penalty, lam=0) == Penalty("low_rank", 0, "gradient")


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_line_starts_from_a_preset_and_options_win(name: str) -> None:
    asked = ["--preset", name, "--out", "x", "--batch", "7"]
    train = parser.parse(["train", "--method", "gd", *asked])
    compare = parser.parse(["compare", *asked, "--seeds", "4"])
    assert isinstance(train, options.Train)
    assert isinstance(compare, options.Compare)
    for parsed in (train, compare):
        wanted = {**PRESETS[name].settings, "batch": 7}
        assert {option: getattr(parsed, option) for option in wanted} == wanted
        assert parsed.preset == name
    assert (compare.methods, compare.seeds) == (PRESETS[name].methods, (4,))
    before = parser.parse(["train", "--batch", "7", "--method", "gd", "--out", "x", f"--preset={name}"])
    assert before == train  # wherever the option stands
