"""The program: `python -m crl_diffusion` is the same as `crl-diffusion`."""

import signal
import sys

# Before and after `main` handles signals, Ctrl-C ends the process as SIGTERM does, without a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from crl_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
