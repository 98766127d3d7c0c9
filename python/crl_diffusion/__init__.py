"""Reference trainer: class-incremental diffusion models, with replay and with penalties from `crl_kernels`.

A method is a value (`config.method.METHODS`). `training.loop.train` runs one method, and `reporting` reads the folders
of finished runs. The command line is `crl-diffusion` or `python -m crl_diffusion`.
"""

from crl_diffusion.config.method import METHODS, Method, Penalty, Replay
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.errors import OptionError

__all__ = ["METHODS", "Method", "OptionError", "Penalty", "Replay", "RunConfig"]
