"""``python -m distillbench``."""

import sys

from distillbench.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
