"""Reference trainer: class-incremental diffusion models, with replay and with penalties from `crl_kernels`.

A method is a value (`method.METHODS`); `loop.train` runs one of them, top to bottom; `report` reads the folders that
runs leave behind. The command line is `crl-diffusion`, or `python -m crl_diffusion`.
"""

from crl_diffusion.config.method import METHODS, Method, Penalty, Replay
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.errors import OptionError

__all__ = ["METHODS", "Method", "OptionError", "Penalty", "Replay", "RunConfig"]
