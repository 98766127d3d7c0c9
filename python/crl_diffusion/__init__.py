"""Reference trainer: class-incremental diffusion models, with replay and with penalties from `crl_kernels`.

A method is a value (`config.method.METHODS`). `training.loop.train` runs one method, and `reporting` reads the folders
of finished runs. The command line is `crl-diffusion` or `python -m crl_diffusion`.

The names below are imported when they are first used, so that a command handles signals from its first moment.
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it for true

if TYPE_CHECKING:
    from crl_diffusion.config.method import METHODS, Method, Penalty, Replay
    from crl_diffusion.config.settings import RunConfig
    from crl_diffusion.errors import OptionError

__all__ = ["METHODS", "Method", "OptionError", "Penalty", "Replay", "RunConfig"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from crl_diffusion import errors
    from crl_diffusion.config import method, settings

    return next(getattr(module, name) for module in (method, settings, errors) if hasattr(module, name))
