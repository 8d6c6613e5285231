"""What a launcher (``accelerate launch``, torchrun) says of this process: which it is of how many."""

from __future__ import annotations

import os

from distillbench.errors import UserError

SAID = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # in the environment


def place() -> tuple[int, int]:
    """(number of this process, how many there are); (0, 1) where nobody launched several.

    Raises:
        UserError: the environment says something else than numbers.
    """
    found = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    for name, text in found.items():
        if not text.isdecimal():
            raise UserError(f"the environment has {name}={text!r}, which a launcher sets to a number; unset it to run as one process")
    rank, count = int(found["RANK"]), int(found["WORLD_SIZE"])
    return (rank, count) if count > 1 else (0, 1)  # a rank alone is some other program's
