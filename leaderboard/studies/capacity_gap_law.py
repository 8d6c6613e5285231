"""The law of the capacity gap: is the best teacher of a student of size S one of size k S, with the same k for every S?

Size is the rank of the logits: a student is a window-lm of width S, a teacher the best approximation of the true chain by logits of rank T
(rank 15 is the chain itself). Students are judged by ``truth_kl``, their exact distance to the truth, never by that to their own teacher.

Not the paper's setting in one respect that matters: there, students are cut out of each teacher by pruning, so that a larger teacher also
means a harsher cut. Here every student of a size starts from the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillbench.cards.card import Paper
from distillbench.leaderboard.chart import Line, Panel, draw
from distillbench.runs.study import Cell, Curve, Done, Finding, Study, Verdict, curve_of
from distillbench.stats import Interval, mean_interval

STUDENTS = (1, 2, 3, 4, 6)
TEACHERS = (1, 2, 3, 4, 6, 8, 10, 12, 15)
TRACK = "language-modeling/markov-limited"
ITSELF = "the teacher itself"
DRAWS = 4000
ENOUGH = 3  # students that a law takes

Floats = NDArray[np.float64]


def _arm(size: int) -> str:
    return f"student of width {size}"


def _cell(size: int, rank: int) -> Cell:
    student = {"name": "window-lm", "arguments": {"vocab": 16, "order": 2, "width": size}}
    return Cell(
        arm=_arm(size),
        at=rank,
        track=TRACK,
        method="gkd",
        hyperparameters={"divergence": "forward_kl", "on_policy": 0},
        options={"teacher_rank": rank, "student": student},
    )


STUDY = Study(
    slug="capacity_gap_law",
    title="The law of the capacity gap",
    question="Is the best teacher of a student always the same factor larger than the student?",
    paper=Paper(
        title="Towards the Law of Capacity Gap in Distilling Language Models",
        year=2023,
        arxiv="2311.07052",
        catalogue="capacity_gap_law",
        row=43,
    ),
    cells=(
        *(Cell(arm=ITSELF, at=t, track=TRACK, method="teacher", options={"teacher_rank": t}) for t in TEACHERS),
        *(_cell(s, t) for s in STUDENTS for t in TEACHERS),
    ),
)


@dataclass(frozen=True)
class Best:
    """The best teacher of one student.

    Attributes:
        teacher: its size, by the mean over seeds.
        draws: (DRAWS,) its size in each draw of :func:`best_teacher`; empty with one seed.
        small, large: how much worse the teachers at the two ends of the grid are, nats per token, paired over seeds; for each seed against
            the teacher that is best for the others, so that noise makes no advantage.
    """

    teacher: float
    draws: Floats
    small: Interval
    large: Interval

    @property
    def inside(self) -> bool:
        """Whether the optimum lies inside the grid: both ends are worse beyond the noise."""
        return self.small.low > 0 and self.large.low > 0


def best_teacher(quality: Curve, generator: np.random.Generator) -> Best:
    """The teacher size of the smallest distance, and how it varies with the seeds' noise.

    The noise is what is left of seed x teacher after the effect of either (the seeds share initial weights and texts, so their offsets
    cancel). The means are drawn again around what was seen with that noise, by Student's t; and the best size is drawn between the
    geometric midpoints to its neighbours, because the grid says no more than that.

    Raises:
        ValueError: no seed has scores at every size.
    """
    sizes = sorted(quality)
    seeds = sorted(set.intersection(*(set(quality[t]) for t in sizes)))
    if not seeds:
        raise ValueError("no seed has scores at every size")
    x = np.asarray([[quality[t][s] for t in sizes] for s in seeds])
    mean = x.mean(0)
    n, k = x.shape
    ends = []
    for i in range(n):
        others = np.arange(n) != i if n > 1 else np.ones(1, bool)
        ends.append(x[i, [0, -1]] - x[i, int(x[others].mean(0).argmin())])
    draws = np.empty(0)
    if n > 1:
        degrees = (n - 1) * (k - 1)
        rest = x - mean - x.mean(1, keepdims=True) + x.mean()
        spread = math.sqrt(float((rest**2).sum()) / degrees / n)
        heavy = np.sqrt(generator.chisquare(degrees, (DRAWS, 1)) / degrees)
        chosen = (mean + spread * generator.standard_normal((DRAWS, k)) / heavy).argmin(1)
        logs = np.log(sizes)
        limits = np.concatenate([logs[:1], (logs[1:] + logs[:-1]) / 2, logs[-1:]])
        draws = np.exp(generator.uniform(limits[chosen], limits[chosen + 1]))
    small, large = (mean_interval([float(e[j]) for e in ends]) for j in (0, 1))
    return Best(float(sizes[int(mean.argmin())]), draws, small, large)


def through_origin(students: Floats, teachers: Floats) -> Floats:
    """Slope k of T = k S by least squares, sum S T / sum S^2, for teachers (..., students)."""
    slope: Floats = (teachers * students).sum(-1) / (students**2).sum()
    return slope


def exponent(students: Floats, teachers: Floats) -> Floats:
    """Slope of log T against log S, for teachers (..., students): 1 for a linear law, 0 where the best teacher does not depend on S."""
    x = np.log(students) - np.log(students).mean()
    found: Floats = (np.log(teachers) * x).sum(-1) / (x**2).sum()
    return found


def analyse(done: Sequence[Done]) -> Finding:
    """Slope and exponent over the students whose optimum lies inside the grid; fewer than three of them decide nothing."""
    curves = {s: curve_of(done, _arm(s), "truth_kl") for s in STUDENTS}
    generator = np.random.default_rng(0)
    best = {s: best_teacher(c, generator) for s, c in curves.items()}
    inside = [s for s in STUDENTS if best[s].inside]
    verdict: Verdict = "undecided"
    fits: dict[str, Interval] = {}
    if len(inside) >= ENOUGH:
        sizes = np.asarray(inside, dtype=float)
        point = np.asarray([best[s].teacher for s in inside])
        drawn = np.stack([best[s].draws for s in inside], -1)
        fits = {
            name: _percentiles(fit(sizes, point), fit(sizes, drawn)) for name, fit in (("slope", through_origin), ("exponent", exponent))
        }
        e = fits["exponent"]
        if e.excludes(1.0):
            verdict = "not reproduced"
        elif e.excludes(0.0):
            verdict = "reproduced"
    itself = curve_of(done, ITSELF, "truth_kl")
    numbers = {
        "students": {str(s): _plain(b) | {"inside": b.inside, "curve": _curve(curves[s])} for s, b in best.items()},
        "fits": {name: asdict(i) for name, i in fits.items()},
        "teachers": {f"{t:g}": float(np.mean(list(v.values()))) for t, v in itself.items()},
    }
    return Finding(verdict, _text(best, inside, fits), numbers, _picture(curves, best, itself))


def _percentiles(estimate: Floats, drawn: Floats) -> Interval:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(estimate), float(low), float(high))


def _text(best: Mapping[int, Best], inside: Sequence[int], fits: Mapping[str, Interval]) -> str:
    said = [
        f"Width {s}: best teacher {b.teacher:g} ({'inside the grid' if b.inside else 'undecidable: an end of the grid may be as good'}); "
        f"the smallest is worse by {_signed(b.small)}, the largest by {_signed(b.large)} nats per token."
        for s, b in best.items()
    ]
    if fits:
        slope, e = fits["slope"], fits["exponent"]
        said.append(
            f"Widths {', '.join(map(str, inside))}: slope through the origin {slope.estimate:.2f} [{slope.low:.2f}, {slope.high:.2f}], "
            f"exponent of T in S {e.estimate:.2f} [{e.low:.2f}, {e.high:.2f}] (the law says 1)."
        )
    else:
        said.append(f"Only {len(inside)} of {len(best)} students have their optimum inside the grid; a law takes {ENOUGH}.")
    return "\n".join(said)


def _signed(i: Interval) -> str:
    return f"{i.estimate:.4f} [{i.low:.4f}, {i.high:.4f}]" if math.isfinite(i.low) else f"{i.estimate:.4f} (one seed, no interval)"


def _plain(b: Best) -> dict[str, Any]:
    ends = {
        name: {k: v if math.isfinite(v) else None for k, v in asdict(i).items()} for name, i in (("small", b.small), ("large", b.large))
    }
    drawn = np.quantile(b.draws, [0.025, 0.975]).tolist() if len(b.draws) else None
    return {"teacher": b.teacher, "teacher_interval": drawn, **ends}


def _curve(curve: Curve) -> dict[str, float]:
    return {f"{t:g}": float(np.mean(list(v.values()))) for t, v in curve.items()}


def _picture(curves: Mapping[int, Curve], best: Mapping[int, Best], itself: Curve) -> str:
    def line(name: str, curve: Curve) -> Line:
        return Line(name, tuple(curve), tuple(mean_interval(list(v.values())) for v in curve.values()))

    left = Panel(
        "Distance of the student to the truth",
        "rank of the teacher (15: the truth itself)",
        "KL(truth, student), nats per token",
        (*(line(_arm(s), c) for s, c in curves.items()), line(ITSELF, itself)),
    )
    argmin = tuple(
        Interval(b.teacher, *np.quantile(b.draws, [0.025, 0.975]).tolist()) if len(b.draws) else Interval(b.teacher, math.nan, math.nan)
        for b in best.values()
    )
    law = tuple(Interval(2.5 * s, math.nan, math.nan) for s in best)
    right = Panel(
        "Best teacher of each student",
        "width of the student",
        "rank of the best teacher",
        (Line("best teacher", tuple(best), argmin), Line("2.5 times the student", tuple(best), law)),
    )
    return draw(
        [left, right], "Distance to the truth against the size of the teacher, and the best teacher against the size of the student"
    )
