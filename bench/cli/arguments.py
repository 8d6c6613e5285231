"""What may be written on the command line. Building the parser imports no torch."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import entry_points
from typing import Any

from distillbench.cli import commands as do
from distillbench.cli import numbers
from distillbench.errors import UserError, unknown
from distillbench.version import VERSION

EXIT_CODES = "exit codes: 0 done, 1 a run failed or went over budget, 2 bad input, 3 a check failed, 4 could not be saved, 130 interrupted"


class _Parser(argparse.ArgumentParser):
    """Errors of usage are one line like every other error; nearest command names come from :mod:`difflib`."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; '{self.prog} --help' shows the usage")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = str(action.metavar or action.dest).lower()
            raise unknown(what, str(value), map(str, action.choices), f"('{self.prog} --help' shows the usage)")


def _grid(command: argparse.ArgumentParser) -> None:
    """What every command that does runs is told."""
    command.add_argument("--seeds", default="3", metavar="N", help="how many seeds, or a range as 5-9 (default 3)")
    command.add_argument("--out", default="runs", metavar="DIR", help="the store (default runs)")
    command.add_argument("--data", metavar="DIR", help="folder of data sets and teachers (default: $DISTILLBENCH_DATA)")
    workers = numbers.count(numbers.WORKERS)
    command.add_argument("--workers", type=workers, metavar="N", help="runs at once (default: the cores; 1 on a GPU)")
    seconds = numbers.amount(numbers.SECONDS, "a number of seconds")
    lost = "the most work a kill can lose (default 30)"
    command.add_argument("--checkpoint-seconds", type=seconds, default=30.0, metavar="S", help=lost)
    command.add_argument("--json", action="store_true", help="JSON on stdout")


def parser() -> argparse.ArgumentParser:
    """The whole parser. Building it imports no torch."""
    top = _Parser(
        prog="distillbench",
        description="Which distillation method makes the better student, at equal cost, and how sure are we?",
        epilog=EXIT_CODES,
    )
    top.add_argument("--version", action="version", version=f"distillbench {VERSION}")
    top.set_defaults(call=lambda _: print(top.format_help(), end="") or 0)  # the name alone asks what there is
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    lists = commands.add_parser("list", help="the methods, the suites or the studies that are installed")
    lists.add_argument("kind", choices=["methods", "suites", "studies"])
    lists.add_argument("--json", action="store_true", help="JSON on stdout")
    lists.set_defaults(call=do.list_installed)

    run = commands.add_parser("run", help="distil and judge: one record for every method and seed, controls included")
    run.add_argument("track", metavar="SUITE/SETTING")
    run.add_argument(
        "--method",
        "-m",
        nargs="+",
        action="extend",
        default=[],
        metavar="M",
        help="slugs, files, or 'all'; controls are added by themselves",
    )
    run.add_argument("--set", action="append", default=[], metavar="M.NAME=VALUE", dest="overrides", help="a hyper-parameter of a method")
    run.add_argument(
        "--split", choices=["test", "tune"], default="test", help="tune: for choosing hyper-parameters; shown as trials, never ranked"
    )
    run.add_argument(
        "--budget", type=numbers.count(numbers.EXAMPLES), metavar="EXAMPLES", help="another number of student examples; makes another board"
    )
    run.add_argument("--no-controls", action="store_true", help="leave out scratch, teacher and the other yardsticks")
    _grid(run)
    run.set_defaults(call=do.run)

    study = commands.add_parser("study", help="do the runs that answer a paper's question; a picture and a verdict")
    study.add_argument("study", metavar="STUDY", help="its name ('distillbench list studies' shows them)")
    _grid(study)
    study.set_defaults(call=do.study)

    check = commands.add_parser("check", help="the contract checks every method gets without writing one")
    check.add_argument("method", metavar="FILE|SLUG")
    check.add_argument("--suite", metavar="SUITE/SETTING", help="the analytic track to train on (default: the problem's own)")
    check.add_argument("--json", action="store_true", help="JSON on stdout")
    check.set_defaults(call=do.check)

    show = commands.add_parser("show", help="one record, for people")
    show.add_argument("record", metavar="FILE|ID", help="a file, or the beginning of an id: of a record in the store or of a published one")
    show.add_argument("--out", default="runs", metavar="DIR", help="the store an id is looked up in (default runs)")
    show.add_argument("--json", action="store_true", help="the record as it is")
    show.add_argument("--source", action="store_true", help="the text of the method as it was run")
    show.set_defaults(call=do.show)

    guard = commands.add_parser("guard", help="judge a student's weights again: exit 3 if they are worse than a record")
    guard.add_argument("student", metavar="STUDENT.safetensors")
    guard.add_argument("--record", required=True, metavar="FILE", help="what the student must live up to")
    guard.add_argument(
        "--margin",
        type=numbers.amount(numbers.MARGIN, "a loss that is tolerated"),
        default=0.02,
        metavar="X",
        help="loss tolerated, in the metric's unit (default 0.02)",
    )
    guard.add_argument("--metric", action="append", metavar="M", help="what must hold (default: the suite's primary metric)")
    guard.add_argument("--data", metavar="DIR", help="folder of data sets and teachers (default: $DISTILLBENCH_DATA)")
    guard.add_argument("--json", action="store_true", help="JSON on stdout")
    guard.set_defaults(call=do.guard)

    records = commands.add_parser("records", help="bring records of an earlier version up to date")
    kinds = records.add_subparsers(dest="records_command", metavar="COMMAND", required=True, parser_class=_Parser)
    migrate = kinds.add_parser("migrate", help="records of schema 1 become records of schema 2; nothing is run, nothing is lost")
    migrate.add_argument("folder", metavar="DIR", help="a store, or a folder of records")
    migrate.add_argument(
        "--older",
        nargs="+",
        default=[],
        metavar="CELL",
        help="cells ('suite/setting method') that today's code does not give again: they stay below the board, unranked",
    )
    migrate.add_argument("--json", action="store_true", help="JSON on stdout")
    migrate.set_defaults(call=do.migrate)

    doctor = commands.add_parser("doctor", help="what this machine can run, and what each missing thing would need")
    doctor.add_argument("--data", metavar="DIR", help="folder of data sets and teachers (default: $DISTILLBENCH_DATA)")
    doctor.add_argument("--json", action="store_true", help="JSON on stdout")
    doctor.set_defaults(call=do.doctor)

    new = commands.add_parser("new", help="a skeleton of a method or a suite that passes the checks but for what you fill in")
    new.add_argument("kind", choices=["method", "suite"])
    new.add_argument("slug")
    new.add_argument("--problem", default="classification", help="the kind of problem (default classification)")
    new.add_argument("--into", metavar="DIR", default=".", help="folder to write into (default: here)")
    new.set_defaults(call=do.new)

    for point in sorted(entry_points(group="distillbench.commands"), key=lambda p: p.name):
        try:
            point.load().add(commands)
        except Exception as error:  # another package's command must not take ours down
            print(f"distillbench: command {point.name!r} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    return top
