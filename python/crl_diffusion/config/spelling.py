"""How a method is written: NAME or NAME:OPTION,OPTION,...

`gd+bands8:top,slopes,gradient,lam=60` is generative distillation with a penalty of eight bands of timesteps, top
eigenvectors as directions, each task's slope kept, added to the gradient, lam = 60. `rank<k>` and `bands<n>` stand for
any number: METHODS lists the usual ones. Of two options of one kind the last counts. `spell` writes every method in one
way only, which names it in tables and folders.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, get_args

from crl_diffusion.config.method import FAMILIES, METHODS, NUMBERED, PENALTIES, REPLAYS, Method, Mode, Penalty
from crl_diffusion.errors import OptionError


def parse_method(text: str) -> Method:
    """The method that NAME or NAME:OPTION,... stands for."""
    name, colon, options = text.partition(":")
    method = _named(name)
    if not colon:
        return method
    if method.penalty is None:
        raise OptionError(
            f"method {text!r}: {name} has no penalty, so {options!r} means nothing; options belong to methods that end "
            f"in {', '.join(penalty_names())}"
        )
    penalty = method.penalty
    for option in options.split(","):
        penalty = _with_option(penalty, option, text)
    if penalty.mode == "gradient" and math.isinf(penalty.lam):
        raise OptionError(f"method {text!r}: a gradient needs a finite lam; give one, or the decoupled mode")
    if penalty.mode == "alone" and not (penalty.slopes and math.isfinite(penalty.lam)):
        raise OptionError(f"method {text!r}: alone is the slopes' pull alone; it needs slopes and a finite lam")
    return replace(method, penalty=penalty)


def _named(name: str) -> Method:
    """The method of a name alone: one of METHODS, or REPLAY+FAMILY and a number."""
    if name in METHODS:
        return METHODS[name]
    replayed, plus, penalty = name.rpartition("+")
    family = NUMBERED.fullmatch(penalty)
    if family is None or replayed not in REPLAYS or (plus and not replayed):
        raise OptionError(
            f"method {name!r} is not known; choose {', '.join(n for n, m in METHODS.items() if m.penalty is None)}, or "
            f"a penalty ({', '.join(penalty_names())}; n from 2 to 1000), by itself or after one of "
            f"{', '.join(f'{replay}+' for replay in REPLAYS if replay)}"
        )
    return replace(REPLAYS[replayed], penalty=FAMILIES[family[1]](int(family[2])))


def penalty_names() -> list[str]:
    """All penalties, a family as one name."""
    return [*(name for name in PENALTIES if not NUMBERED.fullmatch(name)), *(f"{family}<n>" for family in FAMILIES)]


def _with_option(penalty: Penalty, option: str, text: str) -> Penalty:
    if option in get_args(Mode):
        return replace(penalty, mode=option)  # type: ignore[arg-type]
    if option.startswith("lam="):
        try:
            lam = float(option[4:])
        except ValueError:
            lam = math.nan
        if not lam >= 0:
            raise OptionError(f"method {text!r}: {option!r}; lam must be a number, 0 or more (inf is one)")
        return replace(penalty, lam=lam + 0.0)  # -0 becomes 0
    if penalty.fisher == "low_rank":
        if option == "slopes":
            return replace(penalty, slopes=True)
        if option in ("top", "random") or (option == "mean" and penalty.rank == 1):
            return replace(penalty, direction=option)  # type: ignore[arg-type]
    known = [*get_args(Mode), "lam=NUMBER"]
    if penalty.fisher == "low_rank":
        known += ["slopes", "top", "random"] + (["mean"] if penalty.rank == 1 else [])
    raise OptionError(f"method {text!r}: {option!r} is not an option of its penalty; choose among {', '.join(known)}")


def spell(text: str, with_lam: bool = True) -> str:
    """A method's one spelling: options that differ from the name's own, in a fixed order; without lam, if asked."""
    method, name = parse_method(text), text.partition(":")[0]
    if method.penalty is None:
        return name
    own, asked = _named(name).penalty, method.penalty
    assert own is not None
    words = []
    if asked.direction != own.direction:
        words.append(asked.direction)
    if asked.slopes:
        words.append("slopes")
    if asked.mode != own.mode:
        words.append(asked.mode)
    if with_lam and asked.lam != own.lam:
        short = f"{asked.lam:g}"
        words.append(f"lam={short if float(short) == asked.lam else repr(asked.lam)}")
    return f"{name}:{','.join(words)}" if words else name


def in_order(texts: Iterable[str]) -> list[str]:
    """Methods in the order in which tables show them: without a penalty, then penalties from simple to rich."""

    def key(text: str) -> tuple[Any, ...]:
        method = parse_method(text)
        bare, known = replace(method, penalty=None), [METHODS["fine-tune"], METHODS["joint"], *REPLAYS.values()]
        replayed = known.index(bare) if bare in known else len(known)
        p = method.penalty
        if p is None:
            return (False, replayed, text)
        return (True, p.fisher != "diagonal", p.bands, p.rank, replayed, p.direction, p.slopes, p.mode, p.lam, text)

    return sorted(dict.fromkeys(texts), key=key)
