"""`python -m hfdiff` and `accelerate launch --module hfdiff`: the `hfdiff` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
