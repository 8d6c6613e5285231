"""Records in, boards out: which rows there are, what they score, who is ahead, and by how much we are sure.

A board belongs to one *arena*: everything in an identity that all runs of a track share (suite, setting with its budget and the
digests of its assets, split, versions of suite, kind and engine). Numbers of different arenas are never ranked together. Within an arena
a row is one entry: a method, its version and hyper-parameters. Seeds are the unit of every statistic.

Where only versions differ, the newest ones make the board. A record of older ones joins it where :data:`.versions.JOINED` says that the
fingerprints of its cell (method x track) did not move when the version rose; elsewhere it stands below, unranked.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distillbench.cards.card import Card, Metric, Setting, SuiteCard
from distillbench.errors import UserError
from distillbench.identity import canonical, sha256
from distillbench.leaderboard.cards import method_of, remarks, suite_of
from distillbench.leaderboard.twins import Twins, repeated, twins
from distillbench.leaderboard.versions import JOINED, Rise, behind, differences, lifted, unversioned, versions
from distillbench.runs.identities import arena_of
from distillbench.runs.record import Record, Status
from distillbench.stats import Interval, gap_closed, mean_interval, ranks

METERS = ("wall_seconds", "training_flops", "student_examples", "teacher_examples", "generated_tokens", "parameters", "peak_memory_bytes")

Scores = Mapping[int, float]  # seed -> value


@dataclass(frozen=True)
class Trouble:
    """A run that gave no score, one over budget, one that contradicts itself, or one whose student is another seed's: ``settled`` where
    another record of it was scored."""

    seed: int
    status: Status | Literal["contradiction", "repeated"]
    reason: str
    settled: bool


def segment(name: str) -> str:
    """``name`` as one part of a path; a name from a record that could leave its folder becomes a hash."""
    return name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name) else f"x-{sha256(name.encode())[:16]}"


def method_page(problem: str, slug: str) -> str:
    """Path of a method's page in the site: a slug is unique within its problem only."""
    return f"methods/{segment(problem)}/{segment(slug)}.html"


@dataclass(frozen=True)
class Row:
    """One entry of a board.

    Attributes:
        key: SHA-256 of ``entry``.  name: what people call it; unique on its board.
        entry: the method's part of the identity: distribution, slug, version, hyper-parameters.
        older: which newer version there is a record of, for a row that is shown and not ranked; else empty.
        status: ``ok``; ``over_budget`` where any scored seed was; ``failed`` or ``skipped`` where no seed was scored.
        seeds: the scored ones, ascending.  troubles: the runs without a score, by seed, with their reasons.
        scores: metric -> seed -> value.  intervals: metric -> mean over seeds with its 95% interval, in the metric's unit.
        steps: metric -> the step in which a score can differ (1/n for means of 0/1 values), else 0.
        cost: meter -> mean over the scored seeds (seconds, FLOPs, examples, parameters, bytes); None where not metered.
        trials: records on the tune split for this method on this track.
        picture: base64 PNG of samples of its first scored seed, or None.
        commits: commits of the repository that the scored runs were made from.  machines: devices and versions of torch they ran on.
        digests: of the code of the scored runs, as a record keeps them.
        sources: module -> text of the method, and of loose modules, of its newest run.
        marks: what a metric's ``below`` says of its mean over seeds, and where machines differed between seeds.
        records: digests of the scored ones.  trust: the least of their levels (:mod:`.trust`).
        rank: 1 + how many are significantly better, or None where not ranked (controls, over budget, under two seeds).
        gap: gap closed as a ratio (1 is the teacher's level), or None with the reason in ``gap_reason``.
    """

    key: str
    name: str
    card: Card
    entry: dict[str, Any]
    control: bool
    status: Status
    seeds: tuple[int, ...]
    troubles: tuple[Trouble, ...]
    scores: dict[str, dict[int, float]]
    intervals: dict[str, Interval]
    steps: dict[str, float]
    cost: dict[str, float | None]
    trials: int
    commits: tuple[str, ...]
    machines: tuple[str, ...]
    digests: tuple[str, ...]
    sources: dict[str, str]
    created: str
    picture: str | None = None
    marks: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    trust: str = "self-reported"
    older: str = ""
    rank: int | None = None
    gap: Interval | None = None
    gap_reason: str = ""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The method's hyper-parameters, all of them."""
        return dict(self.entry["hyperparameters"])

    @property
    def loose(self) -> str:
        """The digest of the method's code where it counts by its bytes, else the row's key."""
        return str(self.entry.get("loose", self.key))

    @property
    def page(self) -> str:
        """Path of its method's page in the site."""
        return method_page(self.card.problem, self.card.slug)

    @property
    def changed(self) -> dict[str, Any]:
        """The hyper-parameters that differ from the card's defaults."""
        defaults = {name: hp.default for name, hp in self.card.hyperparameters.items()}
        return {k: v for k, v in sorted(self.hyperparameters.items()) if k not in defaults or defaults[k] != v}

    @property
    def reason(self) -> str:
        """Its marks, and why runs of it have no score or are over budget, in one line; empty where all is well."""
        by_reason: dict[str, list[str]] = defaultdict(list)
        for t in self.troubles:
            by_reason[f"{t.status.replace('_', ' ')}: {t.reason}{' (run again since)' if t.settled else ''}"].append(str(t.seed))
        return "; ".join(
            [
                *filter(None, [self.older]),
                *self.marks,
                *(f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)} {why}" for why, seeds in by_reason.items()),
            ]
        )


@dataclass(frozen=True)
class Board:
    """The table of one arena, best row first, judged in ``metric``.

    Attributes:
        key: SHA-256 of the arena.  arena: the shared part of the specs, as plain data.
        rows: ranked rows, then controls, then rows without a rank, then rows without a score.
        seeds: every seed that any row was run with.  created: of its newest record.
        differs: what distinguishes it from the track's newest board; empty for that one.
    """

    key: str
    arena: dict[str, Any]
    suite: SuiteCard
    setting_name: str
    setting: Setting
    metric: Metric
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    created: str
    differs: tuple[str, ...] = ()

    @property
    def track(self) -> str:
        """``suite/setting``."""
        return f"{self.suite.slug}/{self.setting_name}"

    @property
    def others(self) -> tuple[Metric, ...]:
        """What is shown beside the board's metric: the suite's other metrics, then those without a direction that any row has."""
        raw = (m for m in self.suite.shown if any(m.name in r.scores for r in self.rows))
        return tuple(m for m in (*self.suite.metrics, *raw) if m.name != self.metric.name)

    @property
    def leaders(self) -> tuple[Row, ...]:
        """The rows that share rank 1."""
        return tuple(r for r in self.rows if r.rank == 1)

    def reference(self, slug: str) -> Row | None:
        """The scored row that stands for ``slug`` in comparisons: card defaults before others, newest first."""
        return reference(self.rows, slug)


def reference(rows: Sequence[Row], slug: str) -> Row | None:
    """The scored row of ``slug`` that others are compared with, or None. Defaults first, so nobody picks the weakest.

    The method of the suite's own kind comes before one of a kind that it accepts.
    """
    own = [r for r in rows if r.card.slug == slug and r.seeds and not r.older]
    return max(own, key=lambda r: ("kind" not in r.entry, not r.changed, r.created, r.key)) if own else None


# --- reading ------------------------------------------------------------------------------------------------------


def boards(records: Iterable[Record], joined: Sequence[Rise] = JOINED) -> tuple[list[Board], list[str]]:
    """Every board that ``records`` give, by track and newest first, and a line for each record that fits none and each student that
    stands twice (:mod:`.twins`).

    The order of ``records`` does not matter. Only the test split makes rows; the tune split is counted as trials.
    """
    arenas: dict[tuple[str, bytes], list[Placed]] = defaultdict(list)  # two names may stand for one setting
    trials: Counter[tuple[str, str]] = Counter()
    records = list(records)
    same = twins(r for r in records if r.split == "test")
    bad = list(same.lines)
    for record in records:
        if record.split == "tune":
            trials[record.track, record.slug] += 1
        elif record.split == "test":
            identity = lifted(record, joined)
            arenas[record.track, unversioned(arena_of(identity))].append((identity, record))
        else:
            bad.append(f"record {record.id[:16]}: unknown split {record.split!r}")
    found: dict[str, list[tuple[Board, list[Record]]]] = defaultdict(list)
    for key in sorted(arenas):
        try:
            board = _board(arenas[key], trials, same, bad)
        except UserError as error:
            bad.extend(f"record {r.id[:16]}: {error}" for _, r in arenas[key])
            continue
        if board.rows:
            found[board.track].append((board, [r for _, r in arenas[key]]))
    out: list[Board] = []
    for _, made in sorted(found.items()):
        of_track = []
        for board, own in made:
            if roles := _uncontrolled(board, [b for b, _ in made]):
                why = f"no control was run on its {' and '.join(roles)} (those of others have another SHA-256); run them on the same files"
                bad.extend(f"record {r.id[:16]}: {why}" for r in own)
            else:
                of_track.append(board)
        newest, *older = sorted(sorted(of_track, key=lambda b: b.key), key=lambda b: b.created, reverse=True)
        out += [newest, *(dataclasses.replace(b, differs=differences(newest.arena, b.arena)) for b in older)]
    return out, sorted(bad)


def _uncontrolled(board: Board, others: Sequence[Board]) -> list[str]:
    """The assets by which ``board``, without a control, is set apart from another one of its track that has some: nothing may be
    compared with it, and it must not take the place of the other one."""

    def controlled(b: Board) -> bool:
        return any(r.control and r.seeds and not r.older for r in b.rows)

    digests = board.arena["setting"]["digests"]
    there = [] if controlled(board) else [b.arena["setting"]["digests"] for b in others if controlled(b)]
    return sorted({role for d in there for role in d.keys() | digests.keys() if d.get(role) != digests.get(role)})


def by_metric(board: Board, name: str | None) -> Board:
    """``board`` judged in another metric of its suite; in one without a direction its rows keep their order and have no ranks.

    Raises:
        UserError: an unknown metric (with the nearest).
    """
    metric = board.suite.metric(name)
    return dataclasses.replace(board, metric=metric, rows=_judge(board.rows, metric, board.suite))


Placed = tuple[dict[str, Any], Record]  # a record with the identity that its cell holds for


def _board(placed: list[Placed], trials: Counter[tuple[str, str]], same: Twins, bad: list[str]) -> Board:
    """The board of arenas that differ in versions alone: the newest versions' rows, and the older ones below."""
    newest = max(versions(identity) for identity, _ in placed)
    current = [(i, r) for i, r in placed if versions(i) == newest]
    suite, name = suite_of(max(current, key=lambda ir: (ir[1].created, ir[1].id))[1])
    entries: dict[tuple[bool, tuple[int, ...], bytes], list[Placed]] = defaultdict(list)
    for identity, record in placed:
        entries[versions(identity) != newest, versions(identity), canonical(identity["method"])].append((identity, record))
    rows, used = [], []
    for entry in sorted(entries):
        own = [record for _, record in entries[entry]]
        older = behind(entry[1], newest) if entry[0] else ""
        try:
            rows.append(dataclasses.replace(_row(entries[entry], suite, trials, same), older=older))
            used += own
        except UserError as error:
            bad.extend(f"record {r.id[:16]}: {error}" for r in own)
    arena = arena_of(current[0][0])
    return Board(
        key=sha256(canonical(arena)),
        arena=arena,
        suite=suite,
        setting_name=name,
        setting=suite.settings[name],
        metric=suite.metric(),
        rows=_judge(_named(_superseded(rows)), suite.metric(), suite),
        seeds=tuple(sorted({r.seed for r in used})),
        created=max((r.created for r in used), default=""),
    )


def _superseded(rows: list[Row]) -> list[Row]:
    """The rows, with those marked whose method has a newer version on the board: it is that method now."""
    newest: dict[tuple[Any, ...], int] = defaultdict(int)
    names = {row.key: (row.entry["distribution"], row.card.problem, row.card.slug) for row in rows}
    for row in rows:
        if row.seeds and not row.older:
            newest[names[row.key]] = max(row.card.version, newest[names[row.key]])

    def marked(row: Row) -> Row:
        now = newest[names[row.key]]
        behind = not row.older and row.card.version < now
        return dataclasses.replace(row, older=f"older version: method {row.card.version} (now {now})") if behind else row

    return list(map(marked, rows))


def _row(placed: list[Placed], suite: SuiteCard, trials: Counter[tuple[str, str]], same: Twins) -> Row:
    records = sorted((r for _, r in placed), key=lambda r: (r.created, r.id))
    card = method_of(records[-1])  # prose as the newest record has it
    by_seed: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        if record.finished and record.value(suite.primary) is not None:
            by_seed[record.seed].append(record)
    # One identity, one student: where records of a seed disagree, none of them counts, and the row says so.
    torn = {seed: made for seed, made in by_seed.items() if len({_weights(r) for r in made}) > 1}
    trained = {seed: made[-1] for seed, made in by_seed.items() if seed not in torn}
    again = repeated(trained)
    scored = {seed: record for seed, record in trained.items() if seed not in again}
    seeds = tuple(sorted(scored))
    chosen = [scored[s] for s in seeds]
    troubles = {
        Trouble(r.seed, r.status, r.reason or f"{suite.primary} was not scored", scored.get(r.seed) is not r and r.seed in scored)
        for r in records
        if not r.finished or r.value(suite.primary) is None or (r.status == "over_budget" and scored.get(r.seed) is r)
    }
    troubles |= {Trouble(seed, "contradiction", _contradiction(made, suite.primary), False) for seed, made in torn.items()}
    troubles |= {Trouble(seed, "repeated", f"the very student of seed {first}, so it counts once", False) for seed, first in again.items()}
    scores: dict[str, dict[int, float]] = {}
    steps: dict[str, float] = {}
    for metric in (*suite.metrics, *suite.shown):
        found = {s: m for s in seeds for m in scored[s].measurements if m.metric == metric.name}
        if found:
            scores[metric.name] = {s: float(m.value) for s, m in found.items()}
            binary = all(m.binary and m.n for m in found.values())
            steps[metric.name] = 1 / min(m.n for m in found.values()) if binary else 0.0
    intervals = {name: mean_interval(list(by_seed.values())) for name, by_seed in scores.items()}
    return Row(
        key=sha256(canonical([versions(placed[0][0]), placed[0][0]["method"]])),
        name=card.slug,
        card=card,
        entry=placed[0][0]["method"],
        control=card.control or card.slug in suite.controls,
        status=_status(records, chosen),
        seeds=seeds,
        troubles=tuple(sorted(troubles, key=lambda t: (t.seed, t.status, t.reason, t.settled))),
        scores=scores,
        intervals=intervals,
        steps=steps,
        cost={m: _mean([_spent(r, m) for r in chosen]) for m in METERS},
        trials=trials[records[0].track, card.slug],
        commits=tuple(sorted({str(c) for r in chosen if (c := r.environment.get("commit"))})),
        machines=tuple(sorted({f"{_device(r)}, torch {_torch(r)}" for r in chosen})),
        digests=tuple(sorted({str(d) for r in chosen if (d := r.code.get("digest"))})),
        sources={str(name): str(text) for name, text in sorted(records[-1].sources.items())},
        created=max(r.created for r in records),
        picture=next((r.picture for r in chosen if r.picture), None),
        records=tuple(str(r.digest) for r in chosen),
        marks=(
            *(
                f"{m.below[1]} ({m.name} {intervals[m.name].estimate:.3g})"
                for m in suite.metrics
                if m.below and m.name in intervals and intervals[m.name].estimate < m.below[0]
            ),
            *same.mark(chosen),
            *remarks(card, chosen),
            *_mixed(chosen),
        ),
    )


def _weights(record: Record) -> str | None:
    return (record.student or {}).get("sha256")


def _contradiction(records: list[Record], metric: str) -> str:
    shown = ", ".join(f"{r.value(metric):.6g} on {_device(r)} ({r.created[:10]})" for r in records)
    return f"{len(records)} records of one identity have different students: {shown}"


def _device(record: Record) -> str:
    return str(record.environment.get("device", "a machine it does not name"))


def _torch(record: Record) -> str:
    return str(record.environment.get("packages", {}).get("torch", "unknown"))


def _mixed(records: list[Record]) -> tuple[str, ...]:
    """What differed between the machines of a row's seeds, of what may change the last digits: devices, minor versions of torch."""
    torch = {".".join(_torch(r).split(".")[:2]) for r in records}
    named = (("devices", {_device(r) for r in records}), ("versions of torch", torch))
    return tuple(f"mixed {what}: {', '.join(sorted(values))}" for what, values in named if len(values) > 1)


def _status(records: list[Record], scored: list[Record]) -> Status:
    """One seed over budget spoils the comparison at equal cost for the whole row."""
    if scored:
        return "over_budget" if any(r.status == "over_budget" for r in scored) else "ok"
    return "skipped" if all(r.status == "skipped" for r in records) else "failed"


def _spent(record: Record, meter: str) -> float | None:
    """What a record says of a meter; generated tokens are the student's and the teacher's together, as in older records."""
    total = record.cost.get("total", {})
    if meter == "generated_tokens" and meter not in total:
        both = [total[m] for m in ("student_tokens", "teacher_tokens") if m in total]
        return sum(both) if both else None
    value: float | None = total.get(meter)
    return value


def _mean(values: list[Any]) -> float | None:
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return statistics.fmean(numbers) if numbers else None


def _named(rows: list[Row]) -> list[Row]:
    """Slug, then what differs from the card's defaults, then as much of a hash as still tells rows apart."""

    def unique(rows: list[Row], suffix: str) -> list[Row]:
        shared = Counter(r.name for r in rows)
        return [dataclasses.replace(r, name=f"{r.name} @{getattr(r, suffix)[:8]}") if shared[r.name] > 1 else r for r in rows]

    labels = [", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in r.changed.items()) for r in rows]
    named = [dataclasses.replace(r, name=f"{r.name} ({text})") if text else r for r, text in zip(rows, labels, strict=True)]

    def aged(row: Row) -> Row:
        suffix = f" v{row.card.version}" if " method " in row.older else " (older)" if row.older else ""
        return dataclasses.replace(row, name=row.name + suffix)

    return unique(unique(list(map(aged, named)), "loose"), "key")


# --- judging ------------------------------------------------------------------------------------------------------


def _comparable(scores: dict[str, dict[int, float]], metric: Metric) -> dict[str, dict[int, float]]:
    """Scores as the tests compare them: those of a distance (range from 0 without end) by their logarithm, so as ratios.

    The seeds of a method that is a hundred times worse scatter a hundred times as much; without the logarithm a t test cannot
    tell it from the best one.
    """
    if metric.range != (0, None) or any(v <= 0 for by_seed in scores.values() for v in by_seed.values()):
        return scores
    return {k: {seed: math.log(v) for seed, v in by_seed.items()} for k, by_seed in scores.items()}


def _judge(rows: Sequence[Row], metric: Metric, suite: SuiteCard) -> tuple[Row, ...]:
    """Ranks of ``rows`` in ``metric`` and gaps between the suite's floor and ceiling, best first."""
    name = metric.name
    if metric.better is None:
        return tuple(dataclasses.replace(r, rank=None, gap=None, gap_reason=f"neither more nor less {name} is better") for r in rows)
    entrants = {r.key: r for r in rows if not r.control and not r.older and r.status == "ok" and len(r.scores.get(name, {})) >= 2}
    steps = [r.steps[name] for r in entrants.values()]
    place = ranks(
        _comparable({k: r.scores[name] for k, r in entrants.items()}, metric),
        higher_is_better=metric.better == "higher",
        resolution=max(steps) if steps and all(steps) else 0.0,
    )
    ends = {slug: reference(rows, slug) for slug in (suite.floor, suite.ceiling)}
    judged = []
    for row in rows:
        gap, reason = _gap(row, ends, name)
        judged.append(dataclasses.replace(row, rank=place.get(row.key), gap=gap, gap_reason=reason))

    def order(row: Row) -> tuple[float, ...]:
        score = row.intervals[name].estimate if name in row.intervals else 0.0
        group = 4 if row.older else 0 if row.rank else 3 if name not in row.intervals else 1 if row.control else 2
        return (group, row.rank or 0, -score if metric.better == "higher" else score)

    return tuple(sorted(judged, key=lambda r: (*order(r), r.name)))


def _gap(row: Row, ends: Mapping[str, Row | None], metric: str) -> tuple[Interval | None, str]:
    """The gap closed by a row, or None and the reason why there is no such number; ``ends`` are floor and ceiling by their slugs."""
    if len(ends) < 2 or "" in ends:
        return None, "the suite does not name both a floor and a ceiling"
    scores = []
    for slug, end in ends.items():
        if end is None or metric not in end.scores:
            return None, f"no scored {slug} on this board"
        scores.append(end.scores[metric])
    if row.key in {end.key for end in ends.values() if end}:
        return None, "an end of the gap itself"
    if metric not in row.scores:
        return None, "no score"
    low, high = scores
    between = " and ".join(ends)
    if len(row.scores[metric].keys() & low.keys() & high.keys()) < 2:
        return None, f"fewer than two seeds shared with {between}"
    gap = gap_closed(row.scores[metric], low, high)
    return gap, "" if gap else f"{between} are not separated"
