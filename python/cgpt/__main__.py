"""`python -m cgpt` is `cgpt`."""

import sys

from cgpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
