"""`python -m tpprof` and the installed `tpprof`."""

import sys

from tpprof.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
