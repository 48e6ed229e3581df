"""`python -m l4cli`, the `l4` script and torchrun's target are this one call."""

import sys

from l4cli.cli import main

if __name__ == "__main__":
    sys.exit(main())
