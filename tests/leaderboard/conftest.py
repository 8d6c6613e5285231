"""Synthetic records: real cards through distillbench.cards.reading.to_data, numbers from a seeded generator."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distillbench.assets import Asset
from distillbench.cards.card import Beats, Budget, Card, Metric, Paper, Real, Reported, Setting, SuiteCard, Training
from distillbench.cards.reading import to_data
from distillbench.identity import ENGINE, sha256
from distillbench.runs import identities
from distillbench.runs.record import Measurement, Record

METRICS = (
    Metric(name="top1", unit="fraction", better="higher", range=(0, 1), meaning="fraction of test images whose first class is right"),
    Metric(name="nll", unit="nats", better="lower", meaning="mean negative log-likelihood"),
)


def suite(slug: str = "image-classification", settings: Sequence[str] = ("digits",), examples: int = 10_000, **fields: Any) -> SuiteCard:
    one = Setting(
        tier="embedded",
        summary="handwritten digits, 8x8",
        budget=Budget(student_examples=examples),
        training=Training(batch_size=64, optimizer="adamw", learning_rate=3e-3),
        assets={"data": Asset(name="digits", source="https://example.org/digits", licence="CC BY 4.0", sha256="ab" * 32)},
    )
    given = {
        "version": 1,
        "problem": "classification",
        "title": "Image classification",
        "metrics": METRICS,
        "primary": "top1",
        "controls": ("scratch", "teacher"),
        "settings": dict.fromkeys(settings, one),
        "summary": "A small student learns from a larger teacher.",
    }
    return SuiteCard(slug=slug, **(given | fields))


def card(slug: str, **fields: Any) -> Card:
    given: dict[str, Any] = {
        "version": 1,
        "problem": "classification",
        "title": slug.upper().replace("_", " "),
        "control": slug in ("scratch", "teacher", "pseudo_label"),
        "hyperparameters": {"temperature": Real(4.0, gt=0)},
    }
    return Card(slug=slug, **(given | fields))


def record(
    method: Card,
    judge: SuiteCard,
    seed: int,
    score: float | dict[str, float] | None = 0.5,
    *,
    setting: str = "digits",
    status: str = "ok",
    reason: str | None = None,
    split: str = "test",
    loose: str | None = None,
    kind: int = 1,
    engine: int = ENGINE,
    student: str | None = None,
    created: str = "2026-01-01T00:00:00Z",
    n: int | None = None,
    wall: float = 10.0,
    data_digest: str = "ab" * 32,
    **hyperparameters: Any,
) -> Record:
    """One record; ``n`` adds 0/1 per-example values with the nearest mean."""
    shown = dataclasses.replace(judge, settings={setting: judge.settings[setting]})
    values = {judge.primary: score} if isinstance(score, int | float) else score or {}
    measured = []
    for name, value in values.items():
        if n:
            right = round(value * n)
            measured.append(Measurement.mean(name, [1.0] * right + [0.0] * (n - right)))
        else:
            measured.append(Measurement(name, value, 100))
    total = {
        "student_examples": 10_000,
        "teacher_examples": 0 if method.slug == "scratch" else 10_000,
        "training_flops": 0.0 if method.slug == "teacher" else wall * 1e10,
        "wall_seconds": 0.0 if method.slug == "teacher" else wall,
        "peak_memory_bytes": 3 * 2**26,
        "parameters": 62_500 if method.slug == "teacher" else 3_700,
    }
    arena = identities.arena(
        shown, digests={"data": data_digest}, precision="float32", split=split, distribution="distillbench", kind=kind, loose=None
    )
    chosen = {k: h.default for k, h in method.hyperparameters.items()} | hyperparameters
    part = identities.method_part(method, chosen, distribution=None if loose else "distillbench", loose=loose)
    identity = {**identities.whole(arena, part, seed), "engine": engine}
    return Record(
        identity=identity,
        setting_name=setting,
        cards={"method": to_data(method), "suite": to_data(shown)},
        code={"digest": sha256(method.slug.encode()), "fingerprint": None, "loose": {}},
        status=status,  # type: ignore[arg-type]
        reason=reason,
        measurements=tuple(measured),
        cost={"total": total, "phases": {}},
        student={"sha256": student} if student else None,
        environment={"commit": "0123456789abcdef0123", "dirty": False},
        created=created,
    )


def runs(method: Card, judge: SuiteCard, scores: Sequence[float], **fields: Any) -> list[Record]:
    """A record for each score, seeds 0, 1, ..."""
    return [record(method, judge, seed, score, **fields) for seed, score in enumerate(scores)]


def spread(mean: float, n: int = 5, sd: float = 0.004, salt: int = 0) -> list[float]:
    """``n`` scores about ``mean``, the same at every call."""
    chance = random.Random(f"{mean}/{salt}")
    return [mean + chance.gauss(0, sd) for _ in range(n)]


def full_board(judge: SuiteCard | None = None, setting: str = "digits") -> list[Record]:
    """Controls, three methods (two close), one over budget, one that fails, one that lost a seed, two tune trials."""
    judge = judge or suite()
    kd = card(
        "kd",
        title="Knowledge distillation",
        paper=Paper(title="Distilling the knowledge in a neural network", year=2015, arxiv="1503.02531", code="https://example.org/kd"),
        objective="kd_loss",
        equations={"kd_loss": "T^2 KL(softmax(t/T) || softmax(s/T))"},
        claims=(
            Beats("scratch", source="Table 1"),
            Beats("dist", source="made up"),
            Beats("absent"),
            Reported(suite="image-classification", metric="top1", value=0.95, source="Table 2"),
            Reported(suite="imagenet-1k", metric="top1", value=0.7166, source="Table 3"),
        ),
        deviations=("no data augmentation",),
        exempt={"limits": "has none"},
        notes="The temperature was chosen on the tune split.",
    )
    out: list[Record] = []
    for seed in range(5):

        def both(mean: float, salt: int, seed: int = seed) -> dict[str, float]:
            return {"top1": spread(mean, salt=salt)[seed], "nll": 1.2 - spread(mean, salt=salt + 50)[seed]}

        def add(method: Card, mean: float, salt: int, seed: int = seed, **fields: Any) -> None:
            out.append(record(method, judge, seed, both(mean, salt), setting=setting, **fields))

        add(card("scratch"), 0.86, 1)
        add(card("pseudo_label", title="Pseudo-labels"), 0.93, 2, wall=11.0)
        add(card("teacher"), 0.99, 3)
        add(kd, 0.948, 4, wall=12.0)
        add(kd, 0.940, 5, wall=12.5, temperature=1.0)
        add(card("dist", title="DIST", claims=(Beats("kd"),)), 0.97, 6, wall=30.0)
        add(card("greedy", title="Greedy"), 0.98, 7, wall=300.0, status="over_budget", reason="student_examples 20000 of 10000")
        if seed:
            add(card("lossy", title="Lossy"), 0.95, 8, wall=14.0)
        else:
            out.append(record(card("lossy", title="Lossy"), judge, 0, None, setting=setting, status="failed", reason="loss is not finite"))
        out.append(record(card("broken", title="Broken"), judge, seed, None, setting=setting, status="failed", reason="out of memory"))
        if seed < 2:
            out.append(record(kd, judge, 900 + seed, 0.9, setting=setting, split="tune", temperature=2.0))
    return out


def write(folder: Path, records: Sequence[Record]) -> Path:
    """The records as files; the names are of no account."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, item in enumerate(records):
        (folder / f"{i:05}.record").write_bytes(item.to_bytes())
    return folder


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The functions above, for tests: pytest's importlib mode imports no helpers by name."""
    return SimpleNamespace(suite=suite, card=card, record=record, runs=runs, spread=spread, full_board=full_board, write=write)
