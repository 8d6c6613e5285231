"""A clean method, and how bugs are planted in it."""

from __future__ import annotations

from pathlib import Path

from distillbench.checks import CHECKS, check_method

ROOT = Path(__file__).parents[3]
CLEAN = (ROOT / "bench/problems/classification/method.txt").read_text().replace("{slug}", "planted").replace("TODO: ", "")
ORACLE = """
import numpy as np
from scipy.special import log_softmax


def divergence(student_logits, teacher_logits, *, temperature):
    t, s = (log_softmax(z / temperature, axis=1) for z in (teacher_logits, student_logits))
    return temperature**2 * (np.exp(t) * (t - s)).sum(1)
"""
TRAINING = {"trains", "token_padding", "teacher_intact", "seeds", "resume", "micro_batches", "alignment", "export"}
LONG = {
    "data_intact",
    "updates",
    "terms",
    "averages",
    "memory",
    "teacher_matters",
    "no_memory",
    "arguments",
    "used",
    "held",
    "gains",
    "splits",
    "fresh_answers",
}

# What the bugs replace in the clean method.
TERM = "(teacher.exp() * (teacher - student)).sum(1)"
BODY = f"temperature**2 * {TERM}"
FIRST_LINE = "    student = F.log_softmax(student_logits / temperature, dim=1)\n"
ASK = "        teacher = problem.teacher.logits(batch)\n"
LOSS = "    def loss(batch: Batch) -> Losses:\n"
STUDENT = "        student = problem.student(batch.inputs)\n"
KD = "kd=divergence(student, teacher, temperature=temperature),"
CE = "ce=cross_entropy(student, batch.labels),"
FIT = "    return run.fit(problem.student, loss, problem.batches)\n"
IMPORT = "import torch.nn.functional as F\n"

Change = tuple[str, str]


def write(folder: Path, *changes: Change, oracle: str | None = None) -> str:
    """The clean method with ``changes`` (old text -> new text), written to ``folder``; its path."""
    text = CLEAN
    for old, new in (
        (IMPORT, f"import collections\nimport copy\nimport dataclasses\n\nimport numpy as np\nimport torch\n{IMPORT}"),
        *changes,
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "planted.py"
    path.write_text(text)
    if oracle is not None:
        (folder / "planted_oracle.py").write_text(oracle)
    return str(path)


def failures(method: str, only: set[str] | None = None) -> dict[str, str]:
    """Check -> message, of the checks that fail. All but beats_scratch, which takes longest, unless told otherwise."""
    chosen = [c for c in CHECKS if c in only] if only else [c for c in CHECKS if c != "beats_scratch"]
    return {r.name: r.message for r in check_method(method, only=chosen) if r.outcome == "failed"}
