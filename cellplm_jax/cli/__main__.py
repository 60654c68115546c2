"""``python -m cellplm_jax.cli``."""

import sys

from cellplm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
