"""What the processes of a run tell each other: JSON and bytes, so that nothing which a method's process sends is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any


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
