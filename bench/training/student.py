"""The student as it leaves a method: plain weights and how to rebuild them. No code of the method travels along."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from distillbench.errors import UserError
from distillbench.identity import sha256
from distillbench.training.nets import Architecture

Network = TypeVar("Network", bound=nn.Module)
Kind = Literal["trained", "averaged", "converted", "inherited", "untrained"]

ONLY = "student"  # the part of a student that is one network
AVERAGE = "average"  # the name of an average that says no more
FIXED = re.compile(r"average|ema [0-9.e+-]+")  # averages that a file marks with ``true``: their bytes stand in published records
TEXT = 2**20  # bytes of all parts' text together, at most
PART = re.compile(r"[a-z][a-z0-9_-]{0,63}")
TENSOR = re.compile(r"[!-.0-~]{1,512}")  # what is printed, but no space and no slash, which follows the part's name in a file
DIGEST = re.compile(r"[0-9a-f]{64}")
HOW = 200  # characters, at most


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes: the identity of a model or a data set in memory."""
    return sha256(save({k: v.detach().cpu().contiguous() for k, v in sorted(tensors.items())}))


@dataclass(frozen=True)
class Part:
    """One part of a student: a network, other tensors (a data set, a prefix, an adapter), or text.

    Attributes:
        architecture: what the suite builds a network from; None for what is no network.
        weights: name -> tensor of any type, on the CPU; empty where the part is text.
        kind: ``trained``; ``averaged`` over a training; ``converted`` after one (quantised, merged, masked); ``inherited`` from a
            teacher or another asset; ``untrained``.
        how: which average (``ema 0.999``) or which conversion (``int8``); empty for the other kinds.
        text: a prompt, JSON; None where the part is tensors.
        base: SHA-256 of the asset that the part is laid over (an adapter's model), or None where it stands alone.

    Raises:
        UserError: one of them is not what it is said to be here.
    """

    architecture: Architecture | None
    weights: dict[str, Tensor]
    kind: Kind
    how: str = ""
    text: str | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"kind {self.kind[:40]!r} is none of {', '.join(get_args(Kind))}")
        if (self.kind in ("averaged", "converted")) != bool(self.how):
            raise UserError(f"of kind {self.kind}, with how={self.how!r}: averaged and converted parts say how they were, others do not")
        if len(self.how) > HOW or not self.how.isprintable():
            raise UserError(f"how is to be a name of at most {HOW} characters, not {self.how[:40]!r}")
        if self.text is not None and (self.weights or self.architecture is not None):
            raise UserError("is text and has tensors or an architecture too: give them parts of their own")
        if self.base is not None and not DIGEST.fullmatch(self.base):
            raise UserError(f"its base is to be an asset's sha256, 64 hexadecimal digits, not {self.base[:80]!r}")
        for name in self.weights:
            if not TENSOR.fullmatch(name):
                raise UserError(f"tensor {name[:80]!r}: a name has printed ASCII characters, no space and no slash, at most 512")

    @staticmethod
    def of(module: nn.Module, kind: Kind = "trained", how: str = "", base: str | None = None) -> Part:
        """The network ``module`` as it is now.

        Raises:
            UserError: the module was not built by the problem (it has no ``architecture``), or a weight is not finite.
        """
        architecture = getattr(module, "architecture", None)
        if not isinstance(architecture, Architecture):
            raise UserError(
                "the student was not built by the problem: use problem.student or problem.new_student(...), "
                "so that it can be rebuilt without the method's code"
            )
        return Part(architecture, _copied(module.state_dict()), kind, how, base=base)

    @staticmethod
    def data(tensors: Mapping[str, Tensor], kind: Kind = "trained", how: str = "", base: str | None = None) -> Part:
        """Tensors that are no network, as they are now. Raises UserError where one is not finite."""
        return Part(None, _copied(tensors), kind, how, base=base)

    @staticmethod
    def words(text: str, kind: Kind = "trained", how: str = "") -> Part:
        """A prompt, JSON, or any other text."""
        return Part(None, {}, kind, how, text)

    @property
    def numbers(self) -> int:
        """How many numbers its tensors hold."""
        return sum(t.numel() for t in self.weights.values())


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    copies = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    for name, value in copies.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"the student's weight {name} is not finite")
    return copies


@dataclass(frozen=True)
class Student:
    """What leaves a method: parts by name.

    Most students are one network: one part, called ``student``, that :attr:`weights` and :attr:`architecture` are short for.

    Attributes:
        recipe: how a generator is to be sampled (noise levels, step rule, guidance); empty elsewhere.

    Raises:
        UserError: there is no part, a part's name has odd characters, a part is empty, or their text is longer than 1 MiB in all.
    """

    parts: dict[str, Part]
    recipe: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError("a student has at least one part")
        for name, part in self.parts.items():
            if not PART.fullmatch(name):
                raise UserError(f"part {name[:80]!r}: a name has lower-case letters, digits, - and _, at most 64, and begins with a letter")
            if not self.plain and not part.weights and part.text is None:
                raise UserError(f"part {name!r} has neither tensors nor text")
        try:
            length = sum(len(part.text.encode()) for part in self.parts.values() if part.text is not None)
        except UnicodeEncodeError as error:
            raise UserError("the text of a part is not Unicode: it holds half of a surrogate pair") from error
        if length > TEXT:
            raise UserError(f"the text of the parts is {length:,} bytes long, {TEXT:,} at most")

    @staticmethod
    def of(module: nn.Module, recipe: dict[str, Any] | None = None, averaged: str = "") -> Student:
        """The student that the network ``module`` is now; ``averaged`` names the average that it is, or is empty.

        Raises:
            UserError: as :meth:`Part.of`.
        """
        return Student({ONLY: Part.of(module, "averaged" if averaged else "trained", averaged)}, dict(recipe or {}))

    @property
    def plain(self) -> bool:
        """Whether it is one network, trained or averaged: its file then says no more than that."""
        if set(self.parts) != {ONLY}:
            return False
        part = self.parts[ONLY]
        return part.architecture is not None and part.kind in ("trained", "averaged") and part.base is None

    @property
    def only(self) -> Part:
        """The part of a student that has one. Raises UserError where it has several."""
        if len(self.parts) > 1:
            raise UserError(f"this student has several parts ({', '.join(self.parts)}): ask for one of them, student.parts[name]")
        return next(iter(self.parts.values()))

    @property
    def weights(self) -> dict[str, Tensor]:
        """The tensors of the only part. Raises UserError as :attr:`only`."""
        return self.only.weights

    @property
    def architecture(self) -> Architecture:
        """The architecture of the only part. Raises UserError as :attr:`only`, or where that is no network."""
        part = self.only
        if part.architecture is None:
            raise UserError(f"the student's part {next(iter(self.parts))!r} is no network")
        return part.architecture

    @property
    def averaged(self) -> str:
        """What average of trained weights the only part is (``ema 0.999``), or empty where it is none. Raises UserError as :attr:`only`.

        A file says of an average with a fixed decay only that it is one, which reads as ``average``.
        """
        return self.only.how if self.only.kind == "averaged" else ""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by the names that a file has for them: where the student is not :attr:`plain`, ``part/name``."""
        if self.plain:
            return self.weights
        return {f"{name}/{k}": v for name, part in self.parts.items() for k, v in part.weights.items()}

    @property
    def size(self) -> int:
        """Bytes of its file: tensors, recipe, text and what says how to rebuild it."""
        return len(self.to_bytes())

    def to_bytes(self) -> bytes:
        """safetensors, with all that is no tensor in its metadata."""
        about = _network_about(self) if self.plain else {"recipe": self.recipe, "parts": {k: _about(p) for k, p in self.parts.items()}}
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.tensors.items()}
        return save(tensors, metadata={"distillbench": json.dumps(about, sort_keys=True)})

    @staticmethod
    def from_bytes(blob: bytes, where: str = "student") -> Student:
        """The student in a safetensors file. Raises UserError where the bytes are not one."""
        try:
            size = int.from_bytes(blob[:8], "little")
            about = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"]["distillbench"])
            tensors = load(blob)
            if "parts" in about:
                return Student(_parts(about["parts"], tensors), _typed(about["recipe"], dict))
            said = _typed(about["averaged"], bool | str)
            average = said if isinstance(said, str) else AVERAGE if said else ""
            part = Part(_architecture(about), tensors, "averaged" if average else "trained", average)
            return Student({ONLY: part}, _typed(about["recipe"], dict))
        except UserError as error:
            raise UserError(f"{where}: not a distillbench student: {error}") from error
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{where}: not a distillbench student (safetensors with its metadata)") from error

    @staticmethod
    def read(path: Path) -> Student:
        """The student in the file at ``path``. Raises UserError as :meth:`from_bytes`, or where the file cannot be read."""
        try:
            return Student.from_bytes(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error


# --- what a file says -----------------------------------------------------------------------------------------------


def _network_about(student: Student) -> dict[str, Any]:
    """Of a plain student. Published records name the SHA-256 of such files, so it says this and no more."""
    scheduled = student.averaged and not FIXED.fullmatch(student.averaged)
    averaged = student.averaged if scheduled else bool(student.averaged)
    return {"name": student.architecture.name, "arguments": student.architecture.arguments, "recipe": student.recipe, "averaged": averaged}


def _about(part: Part) -> dict[str, Any]:
    """Of a part, without its tensors."""
    built = part.architecture
    network = {} if built is None else {"name": built.name, "arguments": built.arguments}
    text = {} if part.text is None else {"text": part.text}
    return {"kind": part.kind, "how": part.how, "base": part.base, **network, **text}


def _parts(about: Any, tensors: dict[str, Tensor]) -> dict[str, Part]:
    """The parts that a file's metadata describes, each with its tensors. Raises UserError, KeyError or TypeError where it is not sound."""
    weights: dict[str, dict[str, Tensor]] = {name: {} for name in _typed(about, dict)}
    for key, tensor in tensors.items():
        name, _, rest = key.partition("/")
        if name not in weights:
            raise UserError(f"tensor {key[:80]!r} belongs to no part")
        weights[name][rest] = tensor
    parts = {}
    for name, said in about.items():
        _typed(said, dict)
        architecture = _architecture(said) if "name" in said else None
        text, base = _typed(said.get("text"), str | None), _typed(said["base"], str | None)
        try:
            parts[name] = Part(architecture, weights[name], _typed(said["kind"], str), _typed(said["how"], str), text, base)
        except UserError as error:
            raise UserError(f"part {name[:80]!r}: {error}") from error
    return parts


def _architecture(about: dict[str, Any]) -> Architecture:
    return Architecture(_typed(about["name"], str), _typed(about["arguments"], dict))


def _typed(value: Any, kind: Any) -> Any:
    """``value``, where it is of ``kind``. Raises TypeError otherwise: what comes from a file may be anything."""
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in place of {kind}")
    return value


# --- networks again -------------------------------------------------------------------------------------------------


def rebuild(student: Student, build: Callable[[Architecture, int], Network]) -> Network:
    """The network of an exported student that is one network, in evaluation mode.

    Args:
        build: the suite's ``build(architecture, seed)``, which gives a network with fresh weights.

    Raises:
        UserError: the student has several parts or is no network, the architecture cannot be built, or the weights do not fit it.
    """
    if student.only.base is not None:
        raise UserError(f"the student is laid over {student.only.base}, which the suite puts together with it")
    return _network(student.architecture, student.weights, build)


def rebuild_parts(student: Student, build: Callable[[Architecture, int], Network]) -> dict[str, Network]:
    """The networks among a student's parts, by name, in evaluation mode; ``build`` as in :func:`rebuild`.

    What is laid over a base, and what is no network, is the suite's to put together.

    Raises:
        UserError: an architecture cannot be built, or the weights do not fit it.
    """
    networks = {name: part for name, part in student.parts.items() if part.architecture is not None and part.base is None}
    return {name: _network(part.architecture, part.weights, build) for name, part in networks.items() if part.architecture is not None}


def _network(about: Architecture, weights: dict[str, Tensor], build: Callable[[Architecture, int], Network]) -> Network:
    try:
        net = build(about, 0)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:  # arguments come from files, and may be anything
        why = " ".join(str(error).split())
        raise UserError(f"architecture {about.name} cannot be built from {about.arguments}: {type(error).__name__}: {why}") from error
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights do not fit architecture {about.name}: {str(error).splitlines()[-1].strip()}") from error
    return net.eval()
