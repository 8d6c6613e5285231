"""Language modelling: the judge of language models distilled from larger ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.card import Budget, Metric, Setting, SuiteCard, Training, Variant

if TYPE_CHECKING:
    from bench.problems.language_modeling import LanguageModeling
    from bench.record import Measurement
    from bench.student import Student

WORLDS = ("markov",)

CARD = SuiteCard(
    slug="language-modeling",
    version=1,
    problem="language-modeling",
    title="Language modelling",
    summary="One language model, one smaller student, one pool of prompts: how close to the teacher's law does each method come?",
    metrics=[
        Metric(
            name="kl",
            unit="nats a token",
            better="lower",
            range=(0, None),
            meaning="KL of the teacher's law of whole responses to the student's, over the expected tokens of a teacher's response; exact",
        ),
        Metric(
            name="reverse_kl",
            unit="nats a token",
            better="lower",
            range=(0, None),
            meaning="KL of the student's law of whole responses to the teacher's, over the expected tokens of a student's response; exact",
        ),
        Metric(
            name="tv",
            unit="probability",
            better="lower",
            range=(0, 1),
            meaning="mean total variation of the two next-token laws where the teacher's responses go; exact",
        ),
        Metric(
            name="acceptance",
            unit="probability",
            better="higher",
            range=(0, 1),
            meaning="1 - tv: the chance that a token proposed by the student is accepted in speculative sampling; exact",
        ),
        Metric(
            name="truth_kl",
            unit="nats a token",
            better="lower",
            range=(0, None),
            meaning="kl with the law that the teacher itself was estimated from in the teacher's place; exact",
        ),
    ],
    primary="kl",
    controls=["scratch", "undistilled", "teacher"],
    settings={
        "markov": Setting(
            tier="analytic",
            summary="A chain of order 2 over 16 tokens with exact next-token laws; the student's logits have rank 6. 256 of 1,024 prompts "
            "have a reference.",
            budget=Budget(student_examples=9600, teacher_examples=19200),
            training=Training(batch_size=32, optimizer="adamw", learning_rate=0.005, schedule="cosine"),
            metrics=["kl", "reverse_kl", "tv", "acceptance"],
            options={
                "world": "markov",
                "chain": 0,
                "vocab": 16,
                "order": 2,
                "spread": 2.0,
                "mean_length": 12,
                "length": 16,
                "prompts": 1024,
                "references": 256,
                "validation": 64,
                "samples": 1,
                "student": {"name": "window-lm", "arguments": {"vocab": 16, "order": 2, "width": 6}},
            },
        ),
    },
    variants={
        "markov-estimated": Variant(
            of="markov",
            metrics=["truth_kl", "kl", "reverse_kl"],
            summary="The teacher is a chain counted from 2,000 texts of the true one, so coming closer to it may lead away from the truth.",
            options={"teacher_texts": 2000, "smoothing": 0.1},
        ),
        "markov-limited": Variant(
            of="markov",
            metrics=["truth_kl", "kl", "reverse_kl"],
            summary="The teacher is the best approximation of the true chain by logits of rank 10, so it falls short of the truth itself.",
            options={"teacher_rank": 10},
        ),
    },
)


def problem(
    name: str, setting: Setting, seeds: Mapping[str, int], *, split: str = "test", data: Path | None = None, cache: Path | None = None
) -> LanguageModeling:
    """The problem of one setting for one set of seeds.

    Args:
        split: where the student will be judged.  data: the user's folder of data sets and models.
        cache: for the teacher's responses and laws, keyed by the bytes they come from.
    """
    found: LanguageModeling = _world(setting).problem(name, setting, seeds, split=split, data=data, cache=cache)
    return found


def _world(setting: Setting) -> Any:
    """The module that knows a setting's data, teacher and metrics."""
    import importlib

    from bench.errors import unknown

    name = str(setting.options["world"])
    if name not in WORLDS:  # a setting may come from somebody's record
        raise unknown("world", name, WORLDS)
    return importlib.import_module(f"suites.language_modeling.{name}")


def rebuild(student: Student) -> Any:
    """The network of an exported student, in evaluation mode. Raises UserError where weights and architecture do not fit."""
    from suites.language_modeling.nets import rebuild as network

    return network(student)


def evaluate(
    student: Student, name: str, setting: Setting, seeds: Mapping[str, int], *, split: str = "test", data: Path | None = None
) -> list[Measurement]:
    """Judge plain weights on a split.

    Raises:
        UserError: the student cannot be rebuilt, or looks at more than the setting's exact metrics allow.
    """
    found: list[Measurement] = _world(setting).measure(rebuild(student), setting, seeds, split, data)
    return found
