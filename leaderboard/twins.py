"""Students that stand twice on a track: the bytes of one under two methods, or under two seeds of one method.

No two trainings end in the same bytes, so either a result was copied, or nothing was trained, or one method is another one in disguise.
Boards say so and accuse nobody. Runs of one seed may repeat (another version, a hyper-parameter that changes nothing), and so may those
of methods that train nothing, which every seed only judges again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from distillbench.runs.record import Record

Name = tuple[str, str]  # problem, slug
Holders = Mapping[Name, tuple[int, ...]]  # who has a student, with the seeds


@dataclass(frozen=True)
class Twins:
    """Who has the same students as others.

    Attributes:
        shared: track and SHA-256 of a student that several methods have -> its holders.
        lines: for people, one for each student that stands twice.
    """

    shared: Mapping[tuple[str, str], Holders] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    def mark(self, records: Iterable[Record]) -> tuple[str, ...]:
        """What the row of these records says: the methods whose students are the same, and at which of its seeds."""
        seeds: dict[str, set[int]] = defaultdict(set)
        for record in records:
            for problem, slug in self.shared.get((record.track, _student(record)), {}):
                if (problem, slug) != _name(record):
                    seeds[slug].add(record.seed)
        return tuple(f"the very student of {slug} at seed{_listed(found)}" for slug, found in sorted(seeds.items()))


def twins(records: Iterable[Record]) -> Twins:
    """What of ``records`` (of the test split) stands twice."""
    holders: dict[tuple[str, str], dict[Name, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record.finished and _student(record):
            holders[record.track, _student(record)][_name(record)][record.seed] = record
    shared, lines = {}, []
    for (track, student), found in sorted(holders.items()):
        said = [f"{slug} seed{_listed(seeds)}" for (_, slug), seeds in sorted(found.items())]
        if len(found) > 1:
            shared[track, student] = {name: tuple(sorted(seeds)) for name, seeds in found.items()}
            lines.append(f"{track}: {' and '.join(said)} have one student, {student[:16]}: their rows say so")
        elif any(len(seeds) > 1 and not idle(next(iter(seeds.values()))) for seeds in found.values()):
            lines.append(f"{track}: {said[0]} have one student, {student[:16]}: it counts once")
    return Twins(shared, tuple(lines))


def repeated(scored: Mapping[int, Record]) -> dict[int, int]:
    """Seed -> the first seed of the same row with the very same student, of those that are not the first; none where nothing trains."""
    first: dict[str, int] = {}
    found = {}
    for seed, record in sorted(scored.items()):
        if _student(record) and first.setdefault(_student(record), seed) != seed and not idle(record):
            found[seed] = first[_student(record)]
    return found


def idle(record: Record) -> bool:
    """Whether seeds may have one student: those of a method that trains nothing, and of a control, which is never ranked."""
    card = record.method
    return card.control or not card.trains or card.slug in record.suite.controls


def _name(record: Record) -> Name:
    kind = record.identity["method"].get("kind", record.identity["kind"])
    return (str(kind["slug"]), record.slug)


def _student(record: Record) -> str:
    return str((record.student or {}).get("sha256", ""))


def _listed(seeds: Iterable[int]) -> str:
    """``seeds`` after the word seed: `` 3`` or ``s 3, 4``."""
    listed = sorted(seeds)
    return f"{'s' * (len(listed) > 1)} {', '.join(map(str, listed))}"
