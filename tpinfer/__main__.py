"""`python -m tpinfer` and `torchrun -m tpinfer`: the same as the `tpinfer` command."""

import sys

from tpinfer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
