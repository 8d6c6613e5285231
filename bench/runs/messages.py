"""What the processes of a run tell each other: JSON and bytes, so that nothing which a method's process sends is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from distillbench.cards.card import SuiteCard
from distillbench.runs.code_of import CodeOf
from distillbench.runs.suite import JudgeContext, TrainContext


@dataclass(frozen=True)
class Task:
    """What a worker is told: not the run's seed, from which that of the evaluation follows, and of the store its own folders alone.

    Attributes:
        suite, method: as the user named them.  context: of the problem.  code: what the run's code said when it was planned.
        folder: for checkpoints.  scratch: for whatever else is kept for the run.  temporary: for what libraries write; its path is short,
            because sockets lie there.  writable: folders that the user lets the method write to.
        done: the run has its record: the worker is there to say so to those of the other machines.
    """

    suite: str
    method: str
    context: TrainContext
    hyperparameters: Mapping[str, Any]
    code: CodeOf
    folder: Path
    scratch: Path
    temporary: Path
    checkpoint_seconds: float = 30.0
    writable: tuple[Path, ...] = ()
    done: bool = False

    @property
    def loose(self) -> bool:
        """Whether it imports what is nobody's word but a file's."""
        return self.code.method_loose is not None or self.code.suite_loose is not None


@dataclass(frozen=True)
class Case:
    """What a judge is told besides the student.

    Attributes:
        suite: as the user named it.  card: the suite's, at the setting.  context: without device and observer, which are the judge's own.
        yardstick: whether the method is a control, which may cost more than a student.
        planned: files that the run may import, or None where the suite is no loose one.
    """

    suite: str
    card: SuiteCard
    context: JudgeContext
    yardstick: bool
    planned: frozenset[Path] | None


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        kind: what it is about.  said: plain data.  blob: bytes that come with it.
    """

    kind: str
    said: Mapping[str, Any] = field(default_factory=dict)
    blob: bytes = b""


def send(connection: Connection, message: Message) -> None:
    """Send a message. Raises OSError where nobody listens any more."""
    head = json.dumps([message.kind, dict(message.said)]).encode()
    connection.send_bytes(len(head).to_bytes(8, "little") + head + message.blob)


def receive(connection: Connection) -> Message:
    """The next message.

    Raises:
        EOFError: the other side is gone.
        ValueError: it sent something else.
    """
    try:
        content = connection.recv_bytes()
    except ConnectionError as error:
        raise EOFError from error
    size = int.from_bytes(content[:8], "little")
    kind, said = json.loads(content[8 : 8 + size])
    if not isinstance(kind, str) or not isinstance(said, dict):
        raise ValueError("no message")
    return Message(kind, said, content[8 + size :])
