"""Attacks are methods as somebody would write them, in a file of their own, run through the public API."""

from pathlib import Path

import pytest

from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from tests.bench.conftest import child  # noqa: F401

HEAD = """
import copy
import torch
from distillbench.cards.card import Card
from distillbench.training.run import Learner
from distillbench.training.student import Part, Student
{imports}
CARD = Card(slug="{slug}", version=1, problem="{problem}", title="an attack"{card})


def distill(problem, run):
"""


@pytest.fixture
def attack(tmp_path):
    """``attack(body, track=..., examples=...)`` runs a method whose ``distill`` has that body, and returns its record."""

    def run(body, *, track="image-classification/blobs", problem="classification", examples=640, card="", imports="", slug="attack"):
        path = Path(tmp_path) / f"{slug}.py"
        head = HEAD.format(slug=slug, problem=problem, card=f", {card}" if card else "", imports=imports)
        path.write_text(head + "".join(f"    {line}\n" for line in body.strip("\n").splitlines()))
        [spec] = plan(track, [str(path)], [0], controls=False, budget={"student_examples": examples})
        return execute(spec, Store(tmp_path / "runs"))

    return run
