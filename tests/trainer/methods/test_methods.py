"""Methods are values: they compose, and all methods of one seed see the same data."""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace

import hypothesis
import pytest
import torch
from crl_diffusion.config import method, spelling
from crl_diffusion.config.curriculum import Stage, stages, task_classes
from crl_diffusion.config.method import METHODS, Method, Penalty, Replay
from crl_diffusion.config.settings import RunConfig, check
from crl_diffusion.config.spelling import parse_method, spell
from crl_diffusion.data.tasks import Data
from crl_diffusion.diffusion import sampling
from crl_diffusion.diffusion.network import predict
from crl_diffusion.errors import OptionError
from crl_diffusion.methods import regression
from crl_diffusion.training.fisher_batches import fisher_batches, per_sample_loss
from crl_diffusion.training.run import Run
from hypothesis import strategies as st
from torch import Tensor

MakeRun = Callable[[RunConfig], Run]
Short = Callable[..., RunConfig]


def _batches(run: Run, stage: Stage) -> list[regression.NoisedBatch]:
    images = run.data.train.of(stage.classes)
    batches = []
    for run.step in range(4):
        batches.append(run.batch(images, stage))
    return batches


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], list[float]]:
    """What a run's evaluation starts from."""

    def seen(run: Run) -> list[float]:
        found: list[float] = []

        class Enough(Exception):
            pass

        def ddim(predict: object, schedule: object, noise: Tensor, *rest: object) -> Tensor:
            found.extend(noise.flatten().tolist())
            raise Enough

        with monkeypatch.context() as patch, contextlib.suppress(Enough):
            patch.setattr(sampling, "ddim", ddim)
            run.evaluate(run.stages[0])
        assert found
        return found

    return seen


@pytest.mark.parametrize("name", [name for name, value in METHODS.items() if value.curriculum == "continual"])
def test_methods_of_one_seed_see_the_same_real_data(
    name: str, short: Short, make_run: MakeRun, latents: Callable[[Run], list[float]]
) -> None:
    plain, run = make_run(short("fine-tune", model="mini")), make_run(short(name, model="mini"))
    run.penalty = None  # batches are looked at, and 8 samples have no 50 directions
    assert task_classes(run.config) == task_classes(plain.config)
    assert latents(run) == latents(plain)
    for a, b in zip(plain.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(a, b)
    stage = plain.stages[1]
    run.remember(run.stages[0]) if run.method.replays else None
    n = plain.config.batch
    for a, b in zip(_batches(plain, stage), _batches(run, stage), strict=True):
        assert len(a.t) == n
        assert len(b.t) == n + run.config.replay_batch * len(run.method.replays)
        for x, y in zip(a[:-1], b[:-1], strict=True):
            assert torch.equal(x, y[:n])
        assert torch.equal(b.weight[:n], a.weight * (0.5 if run.method.weights == "tasks" else 1.0))


def test_replayed_data_is_the_same_where_teachers_are(short: Short, make_run: MakeRun) -> None:
    runs = [make_run(short(name)) for name in ("gd", "gd+rank1", "gd+diagonal")]
    for run in runs:
        teacher = Method(replays=run.method.replays)  # without the penalty, which has its own test
        run.method, run.penalty = teacher, None
        run.remember(run.stages[0])
    first, *others = [_batches(run, run.stages[1]) for run in runs]
    for batches in others:
        for a, b in zip(first, batches, strict=True):
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x, y)


def test_seeds_steps_and_stages_see_different_data(short: Short, make_run: MakeRun) -> None:
    run, other = make_run(short("fine-tune", seed=0)), make_run(short("fine-tune", seed=1))
    seen = [batch.noised for r in (run, other) for stage in r.stages for batch in _batches(r, stage)]
    assert len({tuple(x.flatten().tolist()) for x in seen}) == len(seen)


def test_an_epoch_takes_every_image_once(digits: Data) -> None:
    images = digits.tasks[0].train
    total, n = len(images.labels), 7
    numbered = replace(images, labels=torch.arange(total))
    taken = torch.cat(
        [regression.epoch_batch(numbered, n, regression.Moment(0, 0, step)).labels for step in range(2 * total)]
    )
    for epoch in range(2 * n):
        assert torch.equal(taken[epoch * total : (epoch + 1) * total].sort().values, torch.arange(total))
    assert not torch.equal(taken[:total], taken[total : 2 * total])


def test_a_batch_larger_than_the_data_goes_round(digits: Data) -> None:
    few = replace(digits.tasks[0].train.take(torch.arange(3)), labels=torch.arange(3))
    labels = regression.epoch_batch(few, 10, regression.Moment(0, 0, 1)).labels
    assert len(labels) == 10
    assert labels.bincount(minlength=3).min() >= 2


def test_parts_compose_into_a_method_that_is_not_in_the_table(
    short: Short, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Method(
        (Replay("pool", "noise", 0.5), Replay("pool", "teacher", 2.0)), Penalty("low_rank", 5.0, "gradient")
    )
    monkeypatch.setitem(METHODS, "mine", recipe)
    run = make_run(short("mine"))
    run.remember(run.stages[0])
    assert len(run.sources) == 1  # two replays of one pool
    batch = run.batch(run.data.train.of((2, 3)), run.stages[1])
    real, n = run.config.batch, run.config.replay_batch
    sums = [batch.weight[part].sum().item() for part in (slice(real), slice(real, real + n), slice(real + n, None))]
    assert sums == pytest.approx([1.0, 0.5, 2.0])
    assert set(batch.label[:real].tolist()) <= {2, 3}
    assert set(batch.label[real:].tolist()) <= {0, 1}
    before = [p.clone() for p in run.model.parameters()]
    assert run.take_step(run.data.train.of((2, 3)), run.stages[1]).isfinite().all()
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_the_pool_is_drawn_from_the_teacher_for_every_old_class(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("gd", tasks=3))
    run.remember(run.stages[1])
    images = run.sources["pool"].images
    assert images.labels.bincount().tolist() == [3, 3, 3, 3]

    def draw() -> Tensor:
        label = torch.tensor([2])
        from crl_diffusion.data import images
        from crl_diffusion.diffusion import sampling

        latents = sampling.draw_latents(0, "pool", label, (1, 8, 8), task=1)
        assert run.teacher is not None
        return images.to_pixels(sampling.draw_images(run.teacher, run.schedule, latents, label, 2))

    assert torch.equal(images.of([2]).pixels[:1], draw())
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1.0)
    assert torch.equal(images.of([2]).pixels[:1], draw())  # training the model leaves the teacher alone


def test_the_fisher_matrix_sees_its_task_and_the_samples_asked_for(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("rank1", fisher_samples=70))
    stage = run.stages[1]
    batches = fisher_batches(run.data.train.of(stage.classes), stage, run.config, run.schedule, run.like)
    assert [len(batch[0]) for batch in batches] == [32, 32, 6]
    noised, t, label, noise = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert set(label.tolist()) == set(stage.classes)
    assert len(set(t.tolist())) > 50
    trained = _batches(run, stage)[0].noised.flatten(1)
    assert torch.cdist(noised.flatten(1), trained).min() > 0.1  # not what it was trained on
    expected = (noise - predict(run.model, noised, t, label)).square().mean((1, 2, 3))
    torch.testing.assert_close(per_sample_loss(run.model, (noised, t, label, noise)), expected)


def test_joint_has_one_stage_of_all_classes_and_all_steps(short: Short) -> None:
    assert stages(short("joint", tasks=3)) == [Stage(0, (0, 1, 2, 3, 4, 5), 3, 3)]
    assert stages(short("gd", tasks=3)) == [Stage(i, (2 * i, 2 * i + 1), i + 1, 1) for i in range(3)]


def test_options_change_the_penalty_and_nothing_else() -> None:
    recipe = parse_method("gd+rank1:lam=3,gradient,slopes,top")
    wanted = Penalty("low_rank", 3.0, "gradient", direction="top", slopes=True)
    assert recipe == Method(METHODS["gd"].replays, wanted)
    assert METHODS["gd+rank1"].penalty == Penalty("low_rank", method.LOW_RANK_LAM, "decoupled")
    assert parse_method("rank1:gradient,decoupled,lam=1,lam=2").penalty == Penalty("low_rank", 2.0)


@pytest.mark.parametrize("n", [2, 3, 12, 999, 1000])
def test_families_take_any_number(n: int) -> None:
    lam = method.LOW_RANK_LAM
    assert parse_method(f"rank{n}") == Method(penalty=Penalty("low_rank", lam, rank=n, direction="top"))
    assert parse_method(f"replay+gd+bands{n}:top") == Method(
        METHODS["replay+gd"].replays, Penalty("low_rank", lam, bands=n, direction="top")
    )


PENALTIES_DRAWN = st.one_of(
    st.sampled_from([*method.PENALTIES]),
    st.builds("{}{}".format, st.sampled_from(["rank", "bands"]), st.integers(2, 1000)),
)
NAMES = st.one_of(
    st.sampled_from([*METHODS]), st.builds("{}+{}".format, st.sampled_from(["replay", "gd", "masip"]), PENALTIES_DRAWN)
)


@hypothesis.given(
    name=NAMES,
    lam=st.none() | st.floats(0, allow_nan=False),
    mode=st.sampled_from([None, "decoupled", "gradient", "once", "alone"]),
    direction=st.sampled_from([None, "mean", "top", "random"]),
    slopes=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_spelling_round_trips(
    name: str, lam: float | None, mode: str | None, direction: str | None, slopes: bool, order: random.Random
) -> None:
    penalty = parse_method(name).penalty
    if penalty is None:
        assert spell(name) == name
        return
    words = [word for word in (mode, None if lam is None else f"lam={lam!r}") if word]
    if penalty.fisher == "low_rank":
        if direction and not (direction == "mean" and penalty.rank > 1):
            words.append(direction)
        words += ["slopes"] if slopes else []
    hypothesis.assume(not (mode in ("gradient", "alone") and lam == math.inf))
    hypothesis.assume(mode != "alone" or "slopes" in words)
    order.shuffle(words)
    text = ":".join([name, *([",".join(words)] if words else [])])
    asked = parse_method(text)
    assert asked.penalty is not None
    assert asked.penalty.lam == (penalty.lam if lam is None else lam)
    assert asked.penalty.mode == (mode or penalty.mode)
    spelled = spell(text)
    assert parse_method(spelled) == asked
    assert spell(spelled) == spelled
    order.shuffle(words)
    assert spell(":".join([name, *([",".join(words)] if words else [])])) == spelled  # one way only
    assert replace(asked.penalty, lam=penalty.lam) == parse_method(spell(text, with_lam=False)).penalty


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gd+rank0", "method 'gd+rank0' is not known"),
        ("rank01", "'rank01' is not known"),
        ("bands1", "n from 2 to 1000"),
        ("bands1001", "diagonal, rank1, rank<n>, bands<n>"),
        ("+rank2", "after one of replay+, gd+, replay+gd+, masip+"),
        ("joint+rank1", "'joint+rank1' is not known"),
        ("", "method '' is not known; choose fine-tune, joint"),
        ("gd:lam=3", "method 'gd:lam=3': gd has no penalty"),
        ("fine-tune:", "fine-tune has no penalty"),
        ("rank1:", "'' is not an option"),
        ("rank1:lam=-1", "lam must be a number, 0 or more"),
        ("rank1:lam=nan", "lam must be a number, 0 or more"),
        ("rank1:lam=much", "'lam=much'; lam must be a number"),
        ("rank1:gradient,lam=inf", "a gradient needs a finite lam"),
        ("rank1:alone", "alone is the slopes' pull alone; it needs slopes"),
        ("rank1:slopes,alone,lam=inf", "it needs slopes and a finite lam"),
        ("diagonal:alone", "it needs slopes"),
        (
            "diagonal:slopes",
            "'slopes' is not an option of its penalty; choose among decoupled, gradient, once, alone, ",
        ),
        ("rank3:mean", "'mean' is not an option of its penalty"),
        ("rank1:Top", "choose among decoupled, gradient, once, alone, lam=NUMBER, slopes, top, random, mean"),
    ],
)
def test_what_is_no_method_is_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_method(text)


def test_tables_go_from_simple_to_rich() -> None:
    wanted = ["fine-tune", "joint", "gd", "masip", "diagonal", "gd+diagonal", "rank1", "gd+rank1", "gd+rank1:lam=60"]
    wanted += ["gd+rank3", "gd+rank10", "gd+bands8", "gd+bands12"]
    assert spelling.in_order(reversed([*wanted, "gd"])) == wanted


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
def test_what_cannot_run_is_refused(short: Short, settings: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        check(short(**settings))
