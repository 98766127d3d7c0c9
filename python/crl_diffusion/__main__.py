"""`python -m crl_diffusion` is the same as `crl-diffusion`."""

import sys

from crl_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
