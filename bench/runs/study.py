"""A study: a question that a grid of ordinary runs answers, with a picture and a verdict.

A study is a file of its own, found through the entry-point group ``distillbench.studies`` (a package with one module a study). It
holds ``STUDY``, the grid, and ``analyse``, a pure function from the records of that grid to a :class:`Finding`. Torch is not imported
here, and an analysis needs none: it reads records, as a board does.
"""

from __future__ import annotations

import dataclasses
import html
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distillbench.cards.card import Paper
from distillbench.errors import UserError, unknown
from distillbench.runs.record import Record

if TYPE_CHECKING:
    from distillbench.runs.plan import RunSpec

Verdict = Literal["reproduced", "not reproduced", "undecided"]
Curve = dict[float, dict[int, float]]  # where on the arm's axis -> seed -> value of a metric


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the grid: a method on a track, done once for every seed.

    Attributes:
        arm: which curve it belongs to.  at: where on the curve it lies (a length, a size).
        hyperparameters: of the method, over its defaults.
        budget, training, options: fields of the track's setting to replace, as :func:`plan.plan` takes them.
    """

    arm: str
    at: float
    track: str
    method: str
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is asked, by whose paper, and the grid that answers it. ``slug`` is the file's name."""

    slug: str
    title: str
    question: str
    paper: Paper
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Done:
    """A cell with its records, one per seed."""

    cell: Cell
    records: Mapping[int, Record]


@dataclass(frozen=True)
class Finding:
    """What the records say.

    Attributes:
        verdict: on the paper's claim.  text: the reasons, sentences with their numbers and intervals.
        numbers: everything the verdict rests on, plain JSON data.  picture: an SVG.
    """

    verdict: Verdict
    text: str
    numbers: dict[str, Any]
    picture: str


@dataclass(frozen=True)
class Found:
    """A study with its analysis, as a module brings them."""

    study: Study
    analyse: Callable[[Sequence[Done]], Finding]


def studies() -> dict[str, Found]:
    """Every study of the packages that the entry-point group names, by slug.

    Raises:
        UserError: a module without ``STUDY`` and ``analyse``, or whose slug is not its name.
    """
    found = {}
    for point in sorted(entry_points(group="distillbench.studies"), key=lambda p: p.name):
        package = importlib.import_module(point.value)
        for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")):
            loaded = importlib.import_module(f"{point.value}.{module}")
            study, analyse = getattr(loaded, "STUDY", None), getattr(loaded, "analyse", None)
            if not isinstance(study, Study) or not callable(analyse) or study.slug != module:
                raise UserError(f"{loaded.__file__}: a study has STUDY = Study(slug={module!r}, ...) and a function analyse")
            found[module] = Found(study, analyse)
    return found


def find(name: str) -> Found:
    """The study called ``name``; '-' and '_' are the same. Raises UserError where there is none, with the nearest name."""
    known, slug = studies(), name.replace("-", "_")
    if slug not in known:
        raise unknown("study", name, known, "('distillbench list studies' shows them)")
    return known[slug]


def planned(study: Study, seeds: Sequence[int], data: str | None = None) -> list[tuple[Cell, list[RunSpec]]]:
    """Every cell with its runs, one per seed. Raises UserError as :func:`plan.plan`."""
    from distillbench.runs.plan import plan

    def runs(c: Cell) -> list[RunSpec]:
        over = {c.method: c.hyperparameters} if c.hyperparameters else {}
        changes: dict[str, Any] = {"budget": c.budget, "training": c.training, "options": c.options}
        specs = plan(c.track, [c.method], seeds, overrides=over, controls=False, data=data, **changes)
        return [dataclasses.replace(s, label=f"{c.arm} at {c.at:g}") for s in specs]

    return [(c, runs(c)) for c in study.cells]


def curve_of(done: Sequence[Done], arm: str, metric: str) -> Curve:
    """The values of ``metric`` along an arm; a seed whose run has no score is left out."""
    return {
        d.cell.at: {seed: value for seed, record in d.records.items() if (value := record.value(metric)) is not None}
        for d in sorted(done, key=lambda d: d.cell.at)
        if d.cell.arm == arm
    }


def summary(study: Study, finding: Finding, seeds: Sequence[int]) -> dict[str, Any]:
    """What is written beside the picture, and printed by ``--json``."""
    paper = dataclasses.asdict(study.paper)
    return {
        "study": study.slug,
        "title": study.title,
        "question": study.question,
        "paper": {k: v for k, v in paper.items() if v is not None},
        "seeds": list(seeds),
        "verdict": finding.verdict,
        "text": finding.text,
        "numbers": finding.numbers,
    }


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }}
.text {{ white-space: pre-line; }} pre {{ overflow-x: auto; font-size: .8rem; }} svg {{ width: 100%; height: auto; }}
</style>
<h1>{title}</h1><p>{question} {paper}</p>
<p><strong>{verdict}</strong></p><p class="text">{text}</p>
{picture}
<details><summary>Numbers ({seeds} seeds)</summary><pre>{numbers}</pre></details>
"""


def write(told: Mapping[str, Any], picture: str, folder: Path) -> tuple[Path, Path, Path]:
    """Write a study's picture, page and numbers into ``folder``; their paths. Text is escaped; the picture is ours.

    Raises:
        SaveError: the folder cannot be written.
    """
    from distillbench.files import write_atomic

    paper = told["paper"]
    words = {k: html.escape(str(told[k])) for k in ("title", "question", "verdict", "text")}
    page = PAGE.format(
        **words,
        paper=html.escape(f"{paper['title']} ({paper['year']}, arXiv {paper.get('arxiv', 'none')})"),
        seeds=len(told["seeds"]),
        numbers=html.escape(json.dumps(told["numbers"], indent=1)),
        picture=picture,
    )
    texts = {"svg": picture, "html": page, "json": json.dumps(told, indent=1) + "\n"}
    paths = tuple(folder / f"{told['study']}.{kind}" for kind in texts)
    for path, text in zip(paths, texts.values(), strict=True):
        write_atomic(path, text.encode())
    return paths[0], paths[1], paths[2]
