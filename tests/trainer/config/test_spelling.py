"""How a method is written: options, families, one spelling, and what is refused."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace

import hypothesis
import pytest
from crl_diffusion.config import method, spelling
from crl_diffusion.config.method import METHODS, Method, Penalty
from crl_diffusion.config.spelling import parse_method, spell
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
    mode=st.sampled_from([None, "decoupled", "gradient", "preconditioned", "once", "alone"]),
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
    hypothesis.assume(not (mode in ("gradient", "preconditioned", "alone") and lam == math.inf))
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
        ("diagonal:lam=inf,preconditioned", "a gradient needs a finite lam"),
        ("rank1:alone", "alone is the first-order term only; it needs slopes"),
        ("rank1:slopes,alone,lam=inf", "it needs slopes and a finite lam"),
        ("diagonal:alone", "it needs slopes"),
        (
            "diagonal:slopes",
            "'slopes' is not an option of its penalty; choose among decoupled, gradient, preconditioned, once, alone, ",
        ),
        ("rank3:mean", "'mean' is not an option of its penalty"),
        (
            "rank1:Top",
            "choose among decoupled, gradient, preconditioned, once, alone, lam=NUMBER, slopes, top, random, mean",
        ),
    ],
)
def test_an_unknown_method_is_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_method(text)


def test_tables_go_from_simple_to_rich() -> None:
    wanted = ["fine-tune", "joint", "gd", "masip", "diagonal", "gd+diagonal", "rank1", "gd+rank1", "gd+rank1:lam=60"]
    wanted += ["gd+rank3", "gd+rank10", "gd+bands8", "gd+bands12"]
    assert spelling.in_order(reversed([*wanted, "gd"])) == wanted
