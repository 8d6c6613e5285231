"""The command: one line for a user's mistake, and the exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from distillbench.cli.arguments import parser
from distillbench.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; print a user's mistake as one line and return the exit code."""
    try:
        arguments = parser().parse_args(argv)
        code: int = arguments.call(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"distillbench: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("distillbench: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
