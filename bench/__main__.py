"""`python -m bench` is `python -m bench.timing`."""

import sys

from .timing.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
