"""What a user can cause. The command line prints these as one line and exits with their code; everything else is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend. The message says what, where and how, in one line."""

    exit_code = 2


class SaveError(UserError):
    """Something could not be written (full disk, no permission). Its own exit code, because work may be lost."""

    exit_code = 4


class WorkerDied(UserError):
    """A worker process went away under its run: no fault of the input, so it counts as a failed run."""

    exit_code = 1


class Diverged(Exception):
    """Training left the finite numbers; becomes a ``failed`` record that names the step.

    Attributes:
        step: 0-based step of the loop at which the loss stopped being finite.
    """

    def __init__(self, step: int, phase: str, terms: str) -> None:
        super().__init__(f"loss is not finite at step {step} of phase {phase!r} ({terms})")
        self.step = step


class NotApplicable(UserError):
    """A method and a setting do not fit each other (no stages, no labels, another tokenizer): the run is skipped with this reason."""

    exit_code = 0


class OverBudget(Exception):
    """A hard cap of the budget was passed; becomes a record that is ``over_budget``."""


def brief(text: str, most: int = 40) -> str:
    """``text`` as it may stand in a message: its beginning, where it is long."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def unknown(what: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """A :class:`UserError` for an unknown name, with the nearest known one (for example a misspelt slug)."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names) or 'none'}"
    return UserError(f"unknown {what} {brief(name, 80)!r}{guess}{' ' + hint if hint else ''}")
