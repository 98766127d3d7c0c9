"""How methods and their variants are written: options, families, one spelling, and what is refused."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace

import hypothesis
import pytest
from crl_diffusion.config import method, spelling
from crl_diffusion.config.method import METHODS, Method, Penalty
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.config.spelling import VARIED, label, parse_method, parse_variant, spell
from crl_diffusion.config.systems import SYSTEMS
from crl_diffusion.errors import OptionError
from hypothesis import strategies as st


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


def test_interpolation_stands_by_itself_or_after_any_other_part() -> None:
    assert parse_method("interpolate0.5") == Method(interpolation=0.5)
    assert parse_method("masip+interpolate0.125") == replace(METHODS["masip"], interpolation=0.125)
    both = parse_method("gd+rank7+interpolate0.9:gradient,lam=3")
    assert both == replace(parse_method("gd+rank7:gradient,lam=3"), interpolation=0.9)
    assert spelling.with_penalty("gd+rank7+interpolate0.9:gradient", "bands8:top") == "gd+bands8+interpolate0.9:top"
    assert spelling.with_penalty("gd+interpolate0.00001", "rank1") == "gd+rank1+interpolate0.00001"


def test_interpolation_is_recorded_only_where_there_is_one() -> None:
    """A run of an earlier version has the same record, and can be resumed."""
    recipes = [RunConfig(method=name).as_json()["recipe"] for name in ("gd", "gd+interpolate0.5")]
    assert recipes[1] == {**recipes[0], "interpolation": 0.5}
    assert recipes[0].keys() == {"replays", "penalty", "curriculum", "weights"}


PENALTIES_DRAWN = st.one_of(
    st.sampled_from([*method.PENALTIES]),
    st.builds("{}{}".format, st.sampled_from(["rank", "bands"]), st.integers(2, 1000)),
)
REPLAYED = st.sampled_from(["replay", "gd", "masip"])
NAMES_OF_PARTS = st.one_of(st.sampled_from([*METHODS]), st.builds("{}+{}".format, REPLAYED, PENALTIES_DRAWN))
NAMES = st.one_of(
    NAMES_OF_PARTS,
    st.builds(
        "{}+interpolate{}".format,
        NAMES_OF_PARTS.filter(lambda name: name not in ("fine-tune", "joint", "adapters4")),
        st.integers(1, 999).map(lambda n: f"{n / 1000:g}"),
    ),
)


@hypothesis.given(
    name=NAMES,
    lam=st.none() | st.floats(0, allow_nan=False),
    mode=st.sampled_from([None, "decoupled", "gradient", "preconditioned", "damping", "once", "alone"]),
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
    hypothesis.assume(not (mode in ("gradient", "preconditioned", "damping", "alone") and lam == math.inf))
    hypothesis.assume(mode != "alone" or "slopes" in words)
    hypothesis.assume(penalty.is_estimated or mode in (None, "decoupled", "gradient"))
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
        ("+rank2", "after one of replay+, gd+, replay+gd+, masip+, ddgr+, guided-gd+"),
        ("generative-distillation+rank1", "'generative-distillation+rank1' is not known"),
        ("fine-tuning+interpolate0.5", "'fine-tuning+interpolate0.5' is not known"),
        ("generative-distillation:lam=3", "masip has no penalty"),
        ("ewc-guided-replay:slopes", "'slopes' is not an option of its penalty"),
        ("joint+rank1", "'joint+rank1' is not known"),
        ("", "method '' is not known; choose fine-tune, joint"),
        ("", "masip, ddgr, guided-gd, or a penalty (l2"),
        ("gd:lam=3", "method 'gd:lam=3': gd has no penalty"),
        ("fine-tune:", "fine-tune has no penalty"),
        ("rank1:", "'' is not an option"),
        ("rank1:lam=-1", "lam must be a number, 0 or more"),
        ("rank1:lam=nan", "lam must be a number, 0 or more"),
        ("rank1:lam=much", "'lam=much'; lam must be a number"),
        ("rank1:gradient,lam=inf", "a gradient needs a finite lam"),
        ("diagonal:lam=inf,preconditioned", "a gradient needs a finite lam"),
        ("rank1:alone", "alone is the first-order term only; it needs slopes"),
        ("rank1:slopes,alone,lam=inf", "it needs slopes and a finite lam"),
        ("diagonal:alone", "it needs slopes"),
        ("l2:damping", "'damping' is not an option of its penalty; choose among decoupled, gradient, lam=NUMBER"),
        ("gd+l2-average:once", "'once' is not an option of its penalty; choose among decoupled, gradient, lam=NUMBER"),
        ("l2:top", "'top' is not an option"),
        ("l2-average:gradient,lam=inf", "a gradient needs a finite lam"),
        ("l2average", "a penalty (l2, l2-average, diagonal"),
        ("gd+interpolate", "interpolate<w>, w above 0 and below 1, such as interpolate0.5"),
        ("interpolate0", "'interpolate0' is not known"),
        ("interpolate1", "'interpolate1' is not known"),
        ("interpolate0.50", "'interpolate0.50' is not known"),
        ("interpolate.5", "'interpolate.5' is not known"),
        ("interpolate-0.5", "'interpolate-0.5' is not known"),
        ("+interpolate0.5", "'+interpolate0.5' is not known"),
        ("interpolate0.5+gd", "'interpolate0.5+gd' is not known"),
        ("joint+interpolate0.5", "after any of them but fine-tune, joint and adapters<r>"),
        ("fine-tune+interpolate0.5", "after any of them but fine-tune, joint and adapters<r>"),
        ("gd+interpolate0.5+interpolate0.3", "'gd+interpolate0.5+interpolate0.3' is not known"),
        ("gdd+interpolate0.5", "method 'gdd+interpolate0.5' is not known"),
        ("adapters4+interpolate0.5", "without replay, penalty or interpolation; use adapters4"),
        ("gd+interpolate0.5:lam=3", "gd+interpolate0.5 has no penalty"),
        (
            "diagonal:slopes",
            "'slopes' is not an option of its penalty; choose among decoupled, gradient, preconditioned, damping, ",
        ),
        ("rank3:mean", "'mean' is not an option of its penalty"),
        (
            "rank1:Top",
            "damping, once, alone, lam=NUMBER, slopes, top, random, signs, mean",
        ),
    ],
)
def test_an_unknown_method_is_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_method(text)


@hypothesis.given(
    name=NAMES,
    values=st.fixed_dictionaries({}, optional={name: st.floats(allow_nan=False) for name in VARIED}),
    order=st.randoms(use_true_random=False),
)
def test_a_label_and_its_variant_are_one_to_one(name: str, values: dict[str, float], order: random.Random) -> None:
    words = [f"{setting.replace('_', '-')}={value!r}" for setting, value in values.items()]
    order.shuffle(words)
    method, parsed = parse_variant("@".join([name, *([",".join(words)] if words else [])]))
    assert (method, parsed) == (name, values)
    changed = {setting: value for setting, value in values.items() if value != VARIED[setting]}
    assert parse_variant(label(method, parsed)) == (name, changed)
    assert label(method, {**VARIED, **changed}) == label(method, parsed)


def test_a_label_has_what_differs_from_the_defaults() -> None:
    assert parse_variant("gd+rank1:lam=3.0,gradient@lr-later=.3,ema=0.9990") == (
        "gd+rank1:gradient,lam=3",
        {"lr_later": 0.3, "ema": 0.999},
    )
    assert label("gd", {"ema": 0.999, "lr_later": 0.3, "lr": 7.0}) == "gd@ema=0.999,lr-later=0.3"
    assert label("gd", {"ema": 0.0, "lr_later": 1.0}) == label("gd", {}) == "gd"
    assert label("gd", {"ema": 0.12345678}) != label("gd", {"ema": 0.12345679})
    assert str(parse_variant("gd@ema=-0")[1]["ema"]) == "0.0"  # config.json has one zero


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gd@", "method 'gd@': '' is not a setting of a variant; write METHOD@SETTING=VALUE,... with ema or lr-later"),
        ("gd@lr=0.1", "'lr=0.1' is not a setting of a variant"),
        ("gd@lr_later=0.1", "ema or lr-later, for example gd@ema=0.999"),
        ("gd@ema=0.9,", "'' is not a setting"),
        ("gd@ema", "method 'gd@ema': 'ema'; ema must be a number"),
        ("gd@ema=much", "'ema=much'; ema must be a number"),
        ("gd@ema=0.9@lr-later=0.1", "'ema=0.9@lr-later=0.1'; ema must be a number"),
        ("gd@ema=0.9,lr-later=1,ema=0.9", "gives ema twice; give it once"),
        ("gdd@ema=0.9", "method 'gdd' is not known"),
        ("@ema=0.9", "method '' is not known"),
        ("gd+rank1@ema=0.9:gradient", "'ema=0.9:gradient'; ema must be a number"),
    ],
)
def test_an_impossible_variant_is_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_variant(text)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_published_system_is_a_method_with_a_source(name: str) -> None:
    system = SYSTEMS[name]
    assert parse_method(name) == parse_method(system.method)
    assert spell(name) == spell(system.method) == system.method  # one label for one method
    assert parse_variant(f"{name}@ema=0.9") == (system.method, {"ema": 0.9})
    assert system.source
    assert system.differs.endswith(".")
    if parse_method(name).penalty is not None:
        lam = f"{system.method}{',' if ':' in system.method else ':'}lam=7"
        assert spell(f"{name}:lam=7") == spell(lam)


def test_tables_go_from_simple_to_rich() -> None:
    wanted = ["fine-tune", "joint", "gd", "masip", "diagonal", "gd+diagonal", "rank1", "gd+rank1", "gd+rank1:lam=60"]
    wanted += ["gd+rank1+interpolate0.5", "gd+rank3", "gd+rank10", "gd+bands8", "gd+bands12"]
    wanted[3:3] = ["gd+interpolate0.25", "gd+interpolate0.5"]
    wanted[6:6] = ["l2", "gd+l2", "gd+l2:gradient", "gd+l2-average"]
    assert spelling.in_order(reversed([*wanted, "gd"])) == wanted


def test_variants_follow_their_method_and_each_lam_of_a_variant_follows_the_others() -> None:
    wanted = ["fine-tune", "gd", "gd@lr-later=0.1", "gd@lr-later=0.3", "gd@ema=0.9", "gd@ema=0.9,lr-later=0.3"]
    wanted += ["gd@ema=0.999", "masip", "gd+rank1", "gd+rank1:lam=60", "gd+rank1@ema=0.9", "gd+rank1:lam=60@ema=0.9"]
    assert spelling.in_order(reversed(wanted)) == wanted
