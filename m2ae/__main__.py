"""`python -m m2ae` is `m2ae`."""

import sys

from m2ae.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
