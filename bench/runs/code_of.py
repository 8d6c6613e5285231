"""The code of a run: what a record keeps of it, and when yesterday's result stands for today's code."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillbench import code
from distillbench.cards.registry import Entry
from distillbench.identity import canonical, sha256


@dataclass(frozen=True)
class CodeOf:
    """What a run's code says.

    Attributes:
        digest: of the abstract syntax of method, suite and all they import.
        fingerprint: digest of the committed fingerprints of the method and the setting, or None where one is missing.
        suite_loose, method_loose: digest of the bytes of the modules whose versions are nobody's word, or None where all are vouched
            for; what suite and method share counts for the suite.
        loose: those modules and settings, name -> SHA-256 of the bytes.
        files: the method's own file, and those of loose modules whose text no package and no commit gives again.
        planned: every file that may be imported.
        oracle: as ``oracle``, the SHA-256 of the independent oracle that the method's objective is tested against, None where there is
            none (it is unproven); empty where nobody can tell here: installed packages come without their tests.

    Two are equal where a run of either gives the same: comments and docstrings of vouched modules may differ.
    """

    digest: str
    fingerprint: str | None
    suite_loose: str | None
    method_loose: str | None
    loose: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    planned: frozenset[Path] = frozenset()
    oracle: dict[str, str | None] = field(default_factory=dict)

    def kept(self) -> dict[str, Any]:
        """What a record keeps of it."""
        return {"digest": self.digest, "fingerprint": self.fingerprint, "loose": self.loose, **self.oracle}

    def sources(self) -> dict[str, str]:
        """What a record keeps to be read: the text of :attr:`files`."""
        return {name: code.text(path).decode("utf-8", errors="replace") for name, path in self.files.items()}


def code_of(method: Entry, suite: Entry, setting: str) -> CodeOf:
    """The code of runs of ``method`` on a setting of ``suite``, as it is now."""
    for_suite, for_method = code.closure(suite.modules()), code.closure(method.modules())
    suite_loose = code.unvouched(for_suite)
    method_loose = {name: digest for name, digest in code.unvouched(for_method).items() if name not in suite_loose}
    both, loose = {**for_suite, **for_method}, {**suite_loose, **method_loose}
    return CodeOf(
        digest=code.syntax_digest(both),
        fingerprint=_fingerprint(method, suite, setting),
        suite_loose=sha256(canonical(suite_loose)) if suite_loose else None,
        method_loose=sha256(canonical(method_loose)) if method_loose else None,
        loose=loose,
        files={
            name: path
            for name, path in code.with_settings(both).items()
            if name in method.modules() or (name in loose and not code.recoverable(name, path))
        },
        planned=frozenset(both.values()),
        oracle={} if code.installed(method.path) else {"oracle": sha256(code.text(method.oracle)) if method.oracle is not None else None},
    )


def fingerprint_file(entry: Entry) -> Path:
    """Where the fingerprints of a method or a suite lie: beside it in its package, ``fingerprints/<problem>/<slug>.json`` or
    ``fingerprints/<suite>.json``."""
    if entry.kind == "method":
        return entry.path.parent.parent / "fingerprints" / entry.path.parent.name / f"{entry.slug}.json"
    return entry.path.parent.parent / "fingerprints" / f"{entry.path.parent.name}.json"


def _fingerprint(method: Entry, suite: Entry, setting: str) -> str | None:
    try:
        of_method, of_suite = (json.loads(fingerprint_file(entry).read_bytes()) for entry in (method, suite))
        return sha256(canonical([setting, of_method["versions"], of_method["runs"], of_suite[setting]]))
    except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one: nothing is held to it
        return None
