"""How a method is written: NAME or NAME:OPTION,OPTION,...

`gd+bands8:top,slopes,gradient,lam=60` is generative distillation with a penalty: eight bands of timesteps, top
eigenvectors as directions, the first-order term of each task kept, added to the gradient, lam = 60. `rank<k>` and
`bands<n>` accept any number from 2 to 1000. Of two options of one kind the last one counts. `spell` gives the canonical
spelling of a method, which tables and folder names use.
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
    if penalty.mode in ("gradient", "preconditioned") and math.isinf(penalty.lam):
        raise OptionError(f"method {text!r}: a gradient needs a finite lam; give one, or use the decoupled mode")
    if penalty.mode == "alone" and not (penalty.slopes and math.isfinite(penalty.lam)):
        raise OptionError(f"method {text!r}: alone is the first-order term only; it needs slopes and a finite lam")
    return replace(method, penalty=penalty)


def _named(name: str) -> Method:
    """The method of a name without options: one of METHODS, or REPLAY+FAMILY and a number."""
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
    """The names of all penalties, with one name for each family."""
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
        if option in ("top", "random", "signs") or (option == "mean" and penalty.rank == 1):
            return replace(penalty, direction=option)  # type: ignore[arg-type]
    known = [*get_args(Mode), "lam=NUMBER"]
    if penalty.fisher == "low_rank":
        known += ["slopes", "top", "random", "signs"] + (["mean"] if penalty.rank == 1 else [])
    raise OptionError(f"method {text!r}: {option!r} is not an option of its penalty; choose among {', '.join(known)}")


def spell(text: str, with_lam: bool = True) -> str:
    """The canonical spelling of a method: the options that differ from the defaults of its name, in a fixed order."""
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


def add_lam(text: str, lam: float) -> str:
    """The canonical spelling of a method that has a penalty, with this lam."""
    return spell(f"{text}{',' if ':' in text else ':'}lam={lam!r}")


def in_order(texts: Iterable[str]) -> list[str]:
    """Methods in the order of the tables: first those without a penalty, then from simple to rich penalties."""
    known = [method for method in METHODS.values() if method.penalty is None]

    def key(text: str) -> tuple[Any, ...]:
        method = parse_method(text)
        replayed, p = known.index(replace(method, penalty=None)), method.penalty
        if p is None:
            return (False, replayed, text)
        return (True, p.fisher != "diagonal", p.bands, p.rank, replayed, p.direction, p.slopes, p.mode, p.lam, text)

    return sorted(dict.fromkeys(texts), key=key)
