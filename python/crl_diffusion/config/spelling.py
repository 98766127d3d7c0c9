"""How a method is written, NAME or NAME:OPTION,OPTION,..., and how its variants are, METHOD@SETTING=VALUE,...

`gd+bands8:top,slopes,gradient,lam=60` is generative distillation with a penalty: eight bands of timesteps, top
eigenvectors as directions, the first-order term of each task kept, added to the gradient, lam = 60. `rank<k>` and
`bands<n>` accept any number from 2 to 1000. `interpolate<w>` is the last part of a name, with 0 < w < 1 written as
0.5: interpolate0.5, gd+interpolate0.5, gd+rank1+interpolate0.5:gradient. Of two options of one kind the last one
counts. `spell` gives the canonical spelling of a method, which tables and folder names use.

`gd@ema=0.999` is the method gd with an average of the weights, in a comparison with runs that have another average or
none. A run is labelled so in tables, pictures and folder names: `label`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from crl_diffusion.config.method import (
    ADAPTERS,
    FAMILIES,
    INTERPOLATION,
    L2_MODES,
    METHODS,
    NUMBERED,
    OF_ADAM,
    PENALTIES,
    REPLAYS,
    Method,
    Mode,
    Penalty,
)
from crl_diffusion.config.systems import SYSTEMS
from crl_diffusion.errors import OptionError

# Settings in which the runs of one comparison may differ, as they may in their method, with the defaults.
VARIED: dict[str, float] = {"ema": 0.0, "lr_later": 1.0}


def parse_method(text: str) -> Method:
    """The method that NAME or NAME:OPTION,... stands for; NAME may be that of a published system."""
    text = _of_system(text)
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
    if penalty.mode in ("gradient", *OF_ADAM) and math.isinf(penalty.lam):
        raise OptionError(f"method {text!r}: a gradient needs a finite lam; give one, or use the decoupled mode")
    if penalty.mode == "alone" and not (penalty.slopes and math.isfinite(penalty.lam)):
        raise OptionError(f"method {text!r}: alone is the first-order term only; it needs slopes and a finite lam")
    return replace(method, penalty=penalty)


def _of_system(text: str) -> str:
    """The method of a published system, with the options that follow its name; other methods as they are."""
    name, colon, options = text.partition(":")
    if name not in SYSTEMS:
        return text
    method = SYSTEMS[name].method
    return f"{method}{',' if ':' in method else ':'}{options}" if colon else method


def _named(name: str, asked: str = "") -> Method:
    """The method of a name without options: one of METHODS, adapters and a rank, or REPLAY+FAMILY and a number; all but
    adapters by themselves or before interpolate<w>. `asked`: what errors call unknown, if the name is a part of it.
    """
    asked = asked or name
    if name in METHODS:
        return METHODS[name]
    if adapters := ADAPTERS.fullmatch(name):
        return Method(adapter_rank=int(adapters[1]))
    if part := next((part for part in name.split("+") if ADAPTERS.fullmatch(part)), None):
        raise OptionError(
            f"method {asked!r}: adapters keep old tasks as they were, without replay, penalty or interpolation; use "
            f"{part}"
        )
    rest, plus, last = name.rpartition("+")
    weight = INTERPOLATION.fullmatch(last)
    if weight is not None and bool(rest) == bool(plus) and rest not in ("fine-tune", "joint"):
        method = _named(rest, asked) if rest else Method()
        if not method.interpolation:
            return replace(method, interpolation=float(weight[1]))
    replayed, penalty = rest, last
    family = NUMBERED.fullmatch(penalty)
    if family is None or replayed not in REPLAYS or (plus and not replayed):
        raise OptionError(
            f"method {asked!r} is not known; choose {', '.join(names_without_penalty())}, or a penalty "
            f"({', '.join(penalty_names())}; n from 2 to 1000, r from 1), by itself or after one of "
            f"{', '.join(f'{replay}+' for replay in REPLAYS if replay)}; interpolate<w>, w above 0 and below 1, such "
            "as interpolate0.5, stands by itself or, with a +, after any of them but fine-tune, joint and "
            "adapters<r>. Or choose a system of `crl-diffusion list`, whose name has no part before or after it"
        )
    return replace(REPLAYS[replayed], penalty=FAMILIES[family[1]](int(family[2])))


def with_penalty(text: str, penalty: str) -> str:
    """The method that replays what this one does, with another penalty; of a method without a replay, the penalty."""
    old = parse_method(text)
    without = replace(old, penalty=None, interpolation=0.0)
    replayed = next((name for name, method in REPLAYS.items() if method == without), "")
    weight = np.format_float_positional(old.interpolation, trim="-")
    interpolated = f"interpolate{weight}" if old.interpolation else ""
    name, colon, options = penalty.partition(":")
    return spell("+".join(part for part in (replayed, name, interpolated) if part) + colon + options)


def names_without_penalty() -> list[str]:
    """The names of all methods without a penalty, with one name for those with adapters."""
    names = [name for name, method in METHODS.items() if method.penalty is None]
    return ["adapters<r>" if METHODS[name].adapter_rank else name for name in names]


def penalty_names() -> list[str]:
    """The names of all penalties, with one name for each family."""
    return [*(name for name in PENALTIES if not NUMBERED.fullmatch(name)), *(f"{family}<n>" for family in FAMILIES)]


def _with_option(penalty: Penalty, option: str, text: str) -> Penalty:
    modes = get_args(Mode) if penalty.is_estimated else L2_MODES
    if option in modes:
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
    known = [*modes, "lam=NUMBER"]
    if penalty.fisher == "low_rank":
        known += ["slopes", "top", "random", "signs"] + (["mean"] if penalty.rank == 1 else [])
    raise OptionError(f"method {text!r}: {option!r} is not an option of its penalty; choose among {', '.join(known)}")


def spell(text: str, with_lam: bool = True) -> str:
    """The canonical spelling of a method: the options that differ from the defaults of its name, in a fixed order."""
    text = _of_system(text)
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
        words.append(f"lam={_shortest(asked.lam)}")
    return f"{name}:{','.join(words)}" if words else name


def _shortest(number: float) -> str:
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def add_lam(text: str, lam: float) -> str:
    """The canonical spelling of a method that has a penalty, with this lam."""
    return spell(f"{text}{',' if ':' in text else ':'}lam={lam!r}")


def parse_variant(text: str) -> tuple[str, dict[str, float]]:
    """The method of METHOD or METHOD@SETTING=VALUE,..., in canonical spelling, and the values of its settings."""
    name, at, assignments = text.partition("@")
    method, values = spell(name), dict[str, float]()
    settings = {_option(setting): setting for setting in VARIED}
    for assignment in assignments.split(",") if at else ():
        option, _, number = assignment.partition("=")
        if option not in settings:
            raise OptionError(
                f"method {text!r}: {assignment!r} is not a setting of a variant; write METHOD@SETTING=VALUE,... with "
                f"{' or '.join(settings)}, for example {method}@ema=0.999"
            )
        if settings[option] in values:
            raise OptionError(f"method {text!r} gives {option} twice; give it once")
        try:
            values[settings[option]] = float(number) + 0.0  # -0 becomes 0
        except ValueError:
            raise OptionError(f"method {text!r}: {assignment!r}; {option} must be a number") from None
    return method, values


def label(method: str, settings: Mapping[str, Any]) -> str:
    """METHOD or METHOD@SETTING=VALUE,...: what tells the runs of a comparison apart, besides the seed. `settings` are
    those of the run; the label has the values of `VARIED` that differ from the defaults."""
    values = {name: settings.get(name, default) for name, default in VARIED.items()}
    words = [f"{_option(name)}={_shortest(value + 0.0)}" for name, value in values.items() if value != VARIED[name]]
    return f"{method}@{','.join(words)}" if words else method


def _option(setting: str) -> str:
    return setting.replace("_", "-")


def in_order(texts: Iterable[str]) -> list[str]:
    """Methods and variants in the order of the tables: first those without a penalty, then from simple to rich
    penalties; variants after the method's own defaults."""
    known = [method for method in METHODS.values() if method.penalty is None]

    def key(text: str) -> tuple[Any, ...]:
        name, values = parse_variant(text)
        method, values = parse_method(name), VARIED | values
        variation = [(values[setting] != default, values[setting]) for setting, default in VARIED.items()]
        replayed = known.index(replace(method, penalty=None, interpolation=0.0, adapter_rank=0))
        p = method.penalty
        if p is None:
            return (False, method.adapter_rank, replayed, method.interpolation, variation, text)
        fisher = [kind.fisher for kind in PENALTIES.values()].index(p.fisher)
        kind = (fisher, p.bands, p.rank, replayed, method.interpolation, p.direction, p.slopes, p.mode)
        return (True, *kind, variation, p.lam, text)

    return sorted(dict.fromkeys(texts), key=key)
