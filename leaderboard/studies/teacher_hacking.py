"""Teacher hacking: does the student come closer to its teacher while it goes away from the truth?

The teacher is a chain counted from 200 texts of the true one, so both distances are exact: ``kl`` to the teacher (the proxy) and
``truth_kl`` to the truth (the golden metric), each over all prompts and not over the pool alone. Every length is a run of its own with a
constant learning rate, so nothing is selected: a shorter run is the beginning of a longer one.

A rise of the golden distance is two different things, told apart by the proxy over the same stretch. While the proxy still falls, it is
hacking (Goodhart's law). Where the proxy rises too, it is plain overfitting to a few responses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from distillbench.cards.card import Paper
from distillbench.leaderboard.chart import Line, Panel, draw
from distillbench.runs.study import Cell, Curve, Done, Finding, Study, Verdict, curve_of
from distillbench.stats import Interval, mean_interval

PROMPTS = 64
PASSES = (4, 8, 16, 32, 64, 128, 256)
MARGIN = 0.01  # of the golden minimum: a change below it is no change

Trend = Literal["rises", "falls", "flat", "unclear"]

# The paper's loss is the token-level KL to the teacher's distributions; the likelihood of sampled tokens is the other common one. Within a
# loss only the source of the responses differs.
FORWARD_KL: dict[str, Any] = {"divergence": "forward_kl"}
OFFLINE, STUDENT = "offline, distributions", "online student, distributions"
OFFLINE_TOKENS, TEACHER = "offline, tokens", "online teacher, tokens"
MORE, FEWER = "offline, distributions, 4 responses per prompt", f"offline, distributions, {PROMPTS // 4} prompts x 4 responses"
ARMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    OFFLINE: ("gkd", {**FORWARD_KL, "on_policy": 0}, {}),
    MORE: ("gkd", {**FORWARD_KL, "on_policy": 0}, {"samples": 4}),
    FEWER: ("gkd", {**FORWARD_KL, "on_policy": 0}, {"prompts": PROMPTS // 4, "samples": 4}),
    STUDENT: ("gkd", {**FORWARD_KL, "on_policy": 1}, {}),
    OFFLINE_TOKENS: ("seqkd", {"fresh": False}, {}),
    TEACHER: ("seqkd", {"fresh": True}, {}),
}
ONLINE = (STUDENT, TEACHER)
ITSELF = "the teacher itself"

OPTIONS: dict[str, Any] = {
    "teacher_texts": 200,
    "prompts": PROMPTS,
    "references": PROMPTS // 4,
    "samples": 1,
    "student": {"name": "window-lm", "arguments": {"vocab": 16, "order": 2, "width": 16}},
}


def _cell(arm: str, method: str, passes: int, hyperparameters: Mapping[str, Any], options: Mapping[str, Any]) -> Cell:
    return Cell(
        arm=arm,
        at=passes,
        track="language-modeling/markov-estimated",
        method=method,
        hyperparameters=hyperparameters,
        budget={"student_examples": PROMPTS * passes, "teacher_examples": None},
        training={"schedule": "constant"},
        options={**OPTIONS, **options},
    )


STUDY = Study(
    slug="teacher_hacking",
    title="Teacher hacking",
    question="Does a student trained for long on fixed responses come closer to its teacher while it goes away from the truth?",
    paper=Paper(
        title="On Teacher Hacking in Language Model Distillation", year=2025, arxiv="2502.02671", catalogue="teacher_hacking", row=25
    ),
    cells=(
        _cell(ITSELF, "teacher", PASSES[0], {}, {}),
        *(_cell(arm, method, n, hyper, options) for arm, (method, hyper, options) in ARMS.items() for n in PASSES),
    ),
)


@dataclass(frozen=True)
class Turn:
    """What an arm does behind the minimum of its golden distance, paired over seeds.

    Attributes:
        at: length of that minimum (of the mean curve); ``proxy_at`` that of the proxy's.  floor: the golden minimum, nats per token.
        golden, proxy: change from the golden minimum to the end of the arm.
        hacked, gained: change of golden and of proxy from the golden minimum to the proxy's, where that is later; else 0.
    """

    at: float
    proxy_at: float
    floor: float
    golden: Interval
    proxy: Interval
    hacked: Interval
    gained: Interval

    def trend(self, change: Interval) -> Trend:
        """What a change is, once its interval lies on one side of the margin."""
        margin = MARGIN * self.floor
        if change.low > margin:
            return "rises"
        if change.high < -margin:
            return "falls"
        if change.low > -margin and change.high < margin:
            return "flat"
        return "unclear"

    @property
    def hacks(self) -> bool | None:
        """Whether golden rises while the proxy falls; None where the intervals leave it open."""
        if self.trend(self.hacked) == "rises" and self.trend(self.gained) == "falls":
            return True
        # Golden never rises, or only where the proxy rises as well.
        margin = MARGIN * self.floor
        never = self.golden.high < margin and self.hacked.high < margin
        return False if never or (self.hacked.high < margin and self.trend(self.proxy) == "rises") else None

    @property
    def overfits(self) -> bool | None:
        """Whether both rise from the golden minimum to the end; None where the intervals leave it open."""
        if self.trend(self.golden) == "rises" and self.trend(self.proxy) == "rises":
            return True
        margin = MARGIN * self.floor
        return False if self.golden.high < margin or self.proxy.high < margin else None


def turn(golden: Curve, proxy: Curve) -> Turn:
    """The turn of an arm. Each seed's minimum is looked for in the mean curve of the *other* seeds, so that noise makes no rise.

    Raises:
        ValueError: no seed has scores at every length.
    """
    lengths = sorted(golden)
    seeds = sorted(set.intersection(*(set(golden[x]) & set(proxy[x]) for x in lengths)))
    if not seeds:
        raise ValueError("no seed has scores at every length")
    g = np.asarray([[golden[x][s] for x in lengths] for s in seeds])
    p = np.asarray([[proxy[x][s] for x in lengths] for s in seeds])
    changes = []
    for i in range(len(seeds)):
        others = np.arange(len(seeds)) != i if len(seeds) > 1 else np.ones(1, bool)
        low, near = int(g[others].mean(0).argmin()), int(p[others].mean(0).argmin())
        stop = max(low, near)
        changes.append((g[i, -1] - g[i, low], p[i, -1] - p[i, low], g[i, stop] - g[i, low], p[i, stop] - p[i, low]))
    mean = g.mean(0)
    parts = [mean_interval([float(c[k]) for c in changes]) for k in range(4)]
    return Turn(lengths[int(mean.argmin())], lengths[int(p.mean(0).argmin())], float(mean.min()), *parts)


def analyse(done: Sequence[Done]) -> Finding:
    """The paper's claim: offline hacks, online does not. Both losses are judged; the verdict is on the paper's."""
    curves = {a: (curve_of(done, a, "truth_kl"), curve_of(done, a, "kl")) for a in ARMS}
    turns = {a: turn(*c) for a, c in curves.items()}
    offline, online = turns[OFFLINE].hacks, [turns[a].hacks for a in ONLINE]
    verdict: Verdict = "undecided"
    if offline and not any(o is not False for o in online):
        verdict = "reproduced"
    elif offline is False or any(online):
        verdict = "not reproduced"
    own = curve_of(done, ITSELF, "truth_kl")
    teacher = float(np.mean([v for by_seed in own.values() for v in by_seed.values()]))
    text = "\n".join([*(_sentence(a, t) for a, t in turns.items()), f"The teacher itself is {teacher:.3f} nats per token from the truth."])
    numbers = {
        "teacher_truth_kl": teacher,
        "margin": MARGIN,
        "arms": {
            a: {**_plain(asdict(t)), "hacks": t.hacks, "overfits": t.overfits, "curves": _curves(curves[a])} for a, t in turns.items()
        },
    }
    return Finding(verdict, text, numbers, _picture(curves, teacher))


def _sentence(arm: str, t: Turn) -> str:
    said = f"{arm}: golden is least ({t.floor:.3f}) after {t.at:g} passes"
    if t.hacks:
        said += f", then hacking: golden {_signed(t.hacked)} while the proxy {_signed(t.gained)}, up to {t.proxy_at:g} passes"
    if t.overfits:
        said += f"{' and' if t.hacks else ', then'} overfitting: golden {_signed(t.golden)} and the proxy {_signed(t.proxy)} by the end"
    if not t.hacks and not t.overfits:
        if (t.golden.low, t.golden.high) == (0, 0):
            said += ", the end of the arm for every seed: no hacking, no overfitting"
        else:
            settled = t.hacks is False and t.overfits is False
            said += f", golden {_signed(t.golden)} and the proxy {_signed(t.proxy)} by the end: "
            said += "no hacking, no overfitting" if settled else "undecided"
    return said[0].upper() + said[1:] + "."


def _signed(i: Interval) -> str:
    return f"{i.estimate:+.3f} [{i.low:+.3f}, {i.high:+.3f}]" if math.isfinite(i.low) else f"{i.estimate:+.3f} (one seed, no interval)"


def _plain(data: Any) -> Any:
    """Data for JSON: no NaN."""
    if isinstance(data, dict):
        return {k: _plain(v) for k, v in data.items()}
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _curves(pair: tuple[Curve, Curve]) -> dict[str, Any]:
    return {
        name: {f"{x:g}": _plain(asdict(mean_interval(list(v.values())))) for x, v in curve.items()}
        for name, curve in zip(("golden", "proxy"), pair, strict=True)
    }


def _picture(curves: Mapping[str, tuple[Curve, Curve]], teacher: float) -> str:
    def panel(which: int, title: str, label: str, across: tuple[tuple[float, str], ...]) -> Panel:
        lines = (Line(a, tuple(c[which]), tuple(mean_interval(list(v.values())) for v in c[which].values())) for a, c in curves.items())
        return Panel(title, f"passes over {PROMPTS} prompts", label, tuple(lines), across, log_x=True, log_y=True)

    return draw(
        [
            panel(0, "Golden: distance to the truth", "KL(truth, student), nats per token", ((teacher, "the teacher itself"),)),
            panel(1, "Proxy: distance to the teacher", "KL(teacher, student), nats per token", ()),
        ],
        "Distance to the truth and to the teacher against the length of training",
    )
