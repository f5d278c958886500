"""`python -m dtem` is `dtem`; torchrun needs a module."""

import sys

from dtem.main import main

if __name__ == "__main__":
    sys.exit(main())
