"""What each command does: from its arguments to its exit code. What a command needs is imported where it is needed."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillbench.cli.numbers import seeds
from distillbench.errors import UserError, brief

if TYPE_CHECKING:
    from distillbench.runs.plan import RunSpec
    from distillbench.runs.record import Record
    from distillbench.runs.store import Store


def table(rows: Iterable[Sequence[Any]], header: Sequence[str], widths: Sequence[int] | None = None) -> None:
    """Print rows: aligned for people on a terminal, tab-separated in a pipe. Where ``widths`` are given, each row as it comes."""
    terminal = sys.stdout.isatty()
    if widths is None:
        rows = [[str(c) for c in row] for row in rows]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in itertools.chain([header], rows):
        cells = [str(c) for c in row]
        print("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() if terminal else "\t".join(cells), flush=True)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, sort_keys=False))


def list_installed(args: argparse.Namespace) -> int:
    """The methods, suites or studies that are installed."""
    from distillbench.cards import registry
    from distillbench.cards.card import Card, SuiteCard
    from distillbench.cards.reading import to_data

    if args.kind == "studies":
        return _list_studies(args)
    entries = registry.methods() if args.kind == "methods" else registry.suites()
    listed = sorted(entries.values(), key=lambda e: (getattr(e.card, "problem", ""), getattr(e.card, "control", False), e.slug))
    if args.json:
        _print_json([{"slug": e.slug, "path": str(e.path), "error": e.error, "card": to_data(e.card)} for e in listed])
        return 0
    rows: list[list[Any]] = []
    for entry in listed:
        card = entry.card
        if isinstance(card, Card):
            paper = f"{card.paper.year} arXiv:{card.paper.arxiv}" if card.paper else ("control" if card.control else "")
            rows.append([card.slug, card.problem, paper, card.title])
        elif isinstance(card, SuiteCard):
            rows += [[f"{card.slug}/{name}", ", ".join(card.kinds), s.tier, s.summary] for name, s in card.settings.items()]
    table(rows, ["method", "problem", "paper", "title"] if args.kind == "methods" else ["track", "problem", "tier", "summary"])
    for entry in listed:
        if entry.error:
            print(f"distillbench: {args.kind[:-1]} {entry.slug} cannot be used: {entry.error}", file=sys.stderr)
    return 0


def _list_studies(args: argparse.Namespace) -> int:
    from distillbench.runs.study import studies

    listed = [found.study for found in studies().values()]
    if args.json:
        _print_json([{"slug": s.slug, "title": s.title, "question": s.question, "arxiv": s.paper.arxiv} for s in listed])
    else:
        table([[s.slug, f"{s.paper.year} arXiv:{s.paper.arxiv}", s.question] for s in listed], ["study", "paper", "question"])
    return 0


def _overrides(texts: Sequence[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        method, dot, parameter = name.rpartition(".")
        if not (equals and dot and method and parameter):
            raise UserError(f"--set {brief(text, 80)}: write METHOD.NAME=VALUE, for example kd.temperature=2")
        found.setdefault(method, {})[parameter] = value
    return found


def run(args: argparse.Namespace) -> int:
    """Plan, run and show; 1 where a run has no score within its budget."""
    from distillbench.runs.plan import plan
    from distillbench.runs.record import Record
    from distillbench.runs.store import Store

    specs = plan(
        args.track,
        args.method or ["all"],
        seeds(args.seeds),
        overrides=_overrides(args.overrides),
        controls=not args.no_controls,
        split=args.split,
        data=args.data,
        budget={"student_examples": args.budget} if args.budget else None,
    )
    store = Store(args.out)
    results = _do(specs, store, args.track, args)
    ordered = [(s, results[s.id]) for s in specs]
    if args.json:
        _print_json([_summary(s, r, store) for s, r in ordered])
    else:
        _scores(ordered)
        print(f"records: {store.root / 'records'}   board: distillbench board show {args.track} --records {store.root}", file=sys.stderr)
    for spec, outcome in ordered:
        if isinstance(outcome, Record) and outcome.status != "ok":
            print(f"{spec.name} {outcome.status}: {outcome.reason}", file=sys.stderr)
    return _failures(results.values(), fine=("ok", "skipped"))


def _do(specs: Sequence[RunSpec], store: Store, title: str, args: argparse.Namespace) -> dict[str, Record | UserError]:
    """The outcome of every spec by id: those done before are found, the others are run and shown while they go."""
    from distillbench.api import vouch
    from distillbench.runs.grid import complete
    from distillbench.runs.launcher import place

    if place()[0] > 0:
        # Of 'accelerate launch' the main process speaks for all: until this one ends, nothing that it prints is shown.
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    return complete(specs, store, title, workers=args.workers, checkpoint_seconds=args.checkpoint_seconds, vouch=vouch)


def _failures(outcomes: Iterable[Record | UserError], fine: Sequence[str] = ("ok",)) -> int:
    """Say what kept runs from having records; the exit code of all of them together, 0 where every status is ``fine``."""
    from distillbench.runs.record import Record

    kept = list(outcomes)
    errors = {str(r): r.exit_code for r in kept if isinstance(r, UserError)}
    for error in sorted(errors):
        print(f"distillbench: {' '.join(error.split())}", file=sys.stderr)
    if errors:
        return max(errors.values())
    return 0 if all(isinstance(r, Record) and r.status in fine for r in kept) else 1


def study(args: argparse.Namespace) -> int:
    """The runs of a study, its verdict and its files."""
    from distillbench.runs.record import Record
    from distillbench.runs.store import Store
    from distillbench.runs.study import Done, find, planned, summary, write

    found, chosen, store = find(args.study), seeds(args.seeds), Store(args.out)
    grid = planned(found.study, chosen, args.data)
    results = _do([s for _, specs in grid for s in specs], store, found.study.slug, args)
    for _, specs in grid:
        for spec in specs:
            outcome = results[spec.id]
            if isinstance(outcome, Record) and outcome.status != "ok":
                print(f"{spec.name} {outcome.status}: {outcome.reason}", file=sys.stderr)
    failed = _failures(results.values())
    if failed:
        print(f"distillbench: {found.study.slug}: no verdict without all of its runs", file=sys.stderr)
        return failed
    done = [Done(c, {s.seed: r for s in specs if isinstance(r := results[s.id], Record)}) for c, specs in grid]
    finding = found.analyse(done)
    told = summary(found.study, finding, chosen)
    paths = write(told, finding.picture, store.root / "studies")
    if args.json:
        _print_json({**told, "files": [str(p) for p in paths]})
    else:
        print(f"{found.study.title}: {finding.verdict}\n{finding.text}")
        print(" ".join(str(p) for p in paths), file=sys.stderr)
    return 0


def _summary(spec: Any, outcome: Any, store: Any) -> dict[str, Any]:
    from distillbench.runs.record import Record

    base = {"method": Path(spec.method).stem, "seed": spec.seed, "id": spec.id}
    if not isinstance(outcome, Record):
        return {**base, "status": "not run", "reason": str(outcome), "measurements": {}, "cost": None, "student": None}
    student = outcome.student and str(store.root / "students" / f"{outcome.student['sha256']}.safetensors")
    return {
        **base,
        "status": outcome.status,
        "reason": outcome.reason,
        "measurements": {m.metric: m.value for m in outcome.measurements},
        "cost": outcome.cost["total"],
        "student": student,
    }


def _scores(ordered: Sequence[tuple[Any, Any]]) -> None:
    """Mean of the primary metric by method, in the order of the plan."""
    from distillbench.runs.record import Record
    from distillbench.stats import mean_interval

    by_method: dict[str, list[Record]] = {}
    for spec, outcome in ordered:
        if isinstance(outcome, Record):
            by_method.setdefault(Path(spec.method).stem, []).append(outcome)
    rows = []
    primary = "score"
    for method, records in by_method.items():
        primary = records[0].suite.primary
        values = [v for r in records if (v := r.value(primary)) is not None]
        bad = [r.status for r in records if r.status != "ok"]
        if values:
            i = mean_interval(values)
            bounds = ["" if v != v else f"{v:.4f}" for v in (i.low, i.high)]  # one seed has no interval
            rows.append([method, len(values), f"{i.estimate:.4f}", *bounds, ",".join(sorted(set(bad))) or "ok"])
        else:
            rows.append([method, 0, "", "", "", ",".join(sorted(set(bad)))])
    table(rows, ["method", "seeds", primary, "low", "high", "status"])


def check(args: argparse.Namespace) -> int:
    """The contract checks of a method, each shown as it finishes; 3 where one fails."""
    from distillbench.checks import CHECKS, Result, results

    coming = results(args.method, track=args.suite)
    found: list[Result] = []

    def rows() -> Iterator[list[str]]:
        for result in coming:
            found.append(result)
            yield [result.outcome, result.name, result.message]

    if args.json:
        found += coming
        _print_json([{"check": r.name, "outcome": r.outcome, "message": r.message} for r in found])
    else:
        widths = [len("outcome"), max(map(len, (*CHECKS, "something_checked"))), 0]
        table(rows(), ["outcome", "check", "message"], widths)
    if unproven := [r.name for r in found if r.outcome == "unproven"]:
        print(f"distillbench: unproven, which is no pass: {', '.join(unproven)}", file=sys.stderr)
    return 3 if any(r.outcome == "failed" for r in found) else 0


def show(args: argparse.Namespace) -> int:
    """One record, for people or as JSON."""
    from distillbench.runs.record import Record

    record = Record.read(_record(args.record, Path(args.out)))
    if args.json:
        print(record.to_json(), end="")
        return 0
    if args.source:
        return _source(record)
    hyper = ", ".join(f"{k}={v}" for k, v in record.hyperparameters.items()) or "none"
    env = record.environment
    rows: list[list[Any]] = [
        ["id", record.id],
        ["track", f"{record.track} ({record.split} split)"],
        ["method", f"{record.slug} v{record.method.version}, hyper-parameters: {hyper}"],
        *([["passes per example", record.method.passes]] if record.method.passes > 1 else []),
        ["seed", record.seed],
        ["status", record.status + (f": {record.reason}" if record.reason else "")],
        *([m.metric, f"{m.value:.6g}{_bounds(m.per_example)} over {m.n}"] for m in record.measurements),
        *([k, f"{v:.6g}" if isinstance(v, float) else v] for k, v in record.cost["total"].items()),
        ["phases", ", ".join(f"{n} {c['wall_seconds']:.2f} s" for n, c in record.cost["phases"].items())],
        ["student", _student(record.student) if record.student else "none"],
        [
            "made",
            f"{record.created} on {env.get('device')}, commit {env.get('commit')}{' with uncommitted changes' if env.get('dirty') else ''}",
        ],
    ]
    table(rows, ["field", "value"])
    return 0


def _source(record: Record) -> int:
    """Print what was run, a line with its name above each file where there are several."""
    if not record.sources:
        commit = record.environment.get("commit")
        raise UserError(f"record {record.id[:16]} was made before records kept the text of a method; commit {commit or 'unknown'} has it")
    for name, text in record.sources.items():
        if len(record.sources) > 1:
            print(f"# {name}")
        print(text, end="" if text.endswith("\n") else "\n")
    return 0


def _record(name: str, store: Path) -> Path:
    """The file of the record that ``name`` is or begins the id of, in ``store`` or among the published ones; the store's comes first."""
    from distillbench.runs.published import folders
    from distillbench.runs.record import SUFFIX, Record

    with contextlib.suppress(OSError):  # a name too long for a file is none
        if Path(name).is_file():
            return Path(name)
    matches: list[Path] = []
    if re.fullmatch("[0-9a-f]{1,64}", name):
        # File names hold the first 16 digits of an id; anybody may give all 64.
        found = [p for folder in (*folders(), store / "records") for p in sorted(folder.glob(f"*/*/*/{name[:16]}*{SUFFIX}"))]
        matches = [p for p in found if len(name) <= 16 or Record.read(p).id.startswith(name)]
    if not matches:
        raise UserError(f"{brief(name, 80)}: neither a file nor the beginning of a record's id in {store} or of a published record")
    if len({m.name[:16] for m in matches}) > 1:
        raise UserError(f"{name}: several records in {store} and among the published ones begin so; give more digits of the id")
    return matches[-1]


def _student(about: dict[str, Any]) -> str:
    if "parts" in about:
        named = ", ".join(f"{name} ({part['kind']})" for name, part in about["parts"].items())
        return f"{named} sha256 {about['sha256']}"
    average = f", {about['average']}" if about.get("average") else ""
    return f"{about['architecture']} sha256 {about['sha256']}{average}"


def _bounds(values: Sequence[float] | None) -> str:
    """The 95% interval of a mean over examples or draws, where there are at least two."""
    from distillbench.stats import mean_interval

    if values is None or len(values) < 2:
        return ""
    i = mean_interval(values)
    return f" [{i.low:.6g}, {i.high:.6g}]"


def guard(args: argparse.Namespace) -> int:
    """Judge weights again; 3 where they do not live up to the record."""
    from distillbench.runs.guard import guard
    from distillbench.runs.record import Record

    data = args.data or os.environ.get("DISTILLBENCH_DATA")
    verdicts = guard(
        Path(args.student), Record.read(Path(args.record)), margin=args.margin, metrics=args.metric, data=Path(data) if data else None
    )
    if args.json:
        _print_json([vars(v) for v in verdicts])
    else:
        state = {True: "holds", False: "WORSE", None: "shown"}
        rows = [[state[v.holds], v.metric, *(f"{x + 0.0:.4f}" for x in (v.recorded, v.now, v.worse_by, v.at_most))] for v in verdicts]
        table(rows, ["state", "metric", "record", "now", "worse by", "at most (95%)"])
    return 3 if any(v.holds is False for v in verdicts) else 0


def doctor(args: argparse.Namespace) -> int:
    """What this machine can run."""
    from distillbench.cli.doctor import examine

    findings = examine(args.data or os.environ.get("DISTILLBENCH_DATA"))
    if args.json:
        _print_json([{"what": f.what, "state": f.state, "remedy": f.remedy} for f in findings])
    else:
        table([[f.state, f.what, f.remedy] for f in findings], ["state", "what", "remedy"])
    return 0


def new(args: argparse.Namespace) -> int:
    """Write a skeleton and print its path."""
    from distillbench.cards.scaffold import write_method, write_suite

    path = write_method(args.slug, args.problem, Path(args.into)) if args.kind == "method" else write_suite(args.slug, Path(args.into))
    print(path)
    return 0


def migrate(args: argparse.Namespace) -> int:
    """Bring a folder of records to today's schema; one line per record, old id and new, where ``--json`` or a pipe asks."""
    from distillbench.runs.migrate import migrate

    done = migrate(Path(args.folder), args.older)
    if args.json:
        _print_json([{"file": str(path), "before": old, "id": new} for path, old, new in done])
    else:
        table([[old, new, path] for path, old, new in done], ["before", "id", "file"])
        print(f"{len(done)} records of schema 1 migrated", file=sys.stderr)
    return 0
