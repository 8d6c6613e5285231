"""What a student may be: the setting's own architecture, within caps on its size, and with weights that are not the teacher's.

The one who judges measures the setting's own student and teachers from a problem that no method has touched, and then asks about what a
method left. Yardsticks (``control=True`` on a card) are not asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench.cards.card import Caps
from distillbench.cards.reading import to_data
from distillbench.errors import UserError
from distillbench.identity import canonical
from distillbench.training.flops import flops_per_row
from distillbench.training.nets import Architecture, parameters
from distillbench.training.oracle import ModuleOracle
from distillbench.training.problem import Problem
from distillbench.training.student import Student, tensor_digest
from distillbench.training.trees import Tree

CASTS = (torch.float64, torch.float16, torch.bfloat16)  # that a teacher's weights may have gone through


@dataclass(frozen=True)
class Own:
    """A setting's own students and teachers, as they are before a method has them.

    Attributes:
        architectures: those of its students, as plain data.  parameters: of all its students together.  numbers: these and all
            else that their state holds, which counts where a student has parts that are no networks.
        call: what one call of a student gets, one row of it; None where the kind does not say.
        flops: floating-point operations of that call, of the largest of its students; None without a call.
        teachers: for each teacher, the digests of its tensors.
    """

    caps: Caps
    architectures: tuple[tuple[str, dict[str, object]], ...]
    parameters: int
    numbers: int
    call: tuple[Tree, ...] | None
    flops: float | None
    teachers: tuple[frozenset[str], ...]

    @staticmethod
    def of(problem: Problem, caps: Caps) -> Own:
        """Measure ``problem``, on the device where its networks are."""
        students = list(problem.students.values())
        call = problem.call()
        built = (getattr(network, "architecture", None) for network in students)
        return Own(
            caps,
            tuple(_plain(found) for found in built if isinstance(found, Architecture)),
            sum(map(parameters, students)),
            sum(t.numel() for network in students for t in network.state_dict().values()),
            call,
            max((_flops(network, call) for network in students), default=None) if call is not None else None,
            tuple(
                frozenset(d for t in oracle._module.state_dict().values() if t.is_floating_point() for d in _digests(t))
                for oracle in problem.teachers.values()
                if isinstance(oracle, ModuleOracle)
            ),
        )

    def refuse(self, student: Student) -> None:
        """Raise UserError where a part is no network of the setting's own architecture, or where its weights are a teacher's."""
        for name, part in student.parts.items():
            weights = [t for t in part.weights.values() if t.is_floating_point() and t.numel() > 1]  # counters may have been cast
            if weights and any(all(_digests(t)[0] in known for t in weights) for known in self.teachers):
                raise UserError(f"the student's part {name!r} is the teacher's network: its tensors are the teacher's, one by one")
            if part.architecture is not None and part.base is None and self.architectures:
                self._same(name, *_plain(part.architecture))

    def _same(self, part: str, name: str, arguments: dict[str, object]) -> None:
        differing = [
            sorted(a for a in own.keys() | arguments.keys() if canonical([own.get(a)]) != canonical([arguments.get(a)]))
            for known, own in self.architectures
            if known == name
        ]
        if not differing:
            known = ", ".join(sorted({known for known, _ in self.architectures}))
            raise UserError(f"the student's part {part!r} is a {name}, and this setting's student is a {known}: train problem.student")
        closed = min(([a for a in changed if a not in self.caps.opens] for changed in differing), key=len)
        if closed:
            may = f"only {', '.join(self.caps.opens)}" if self.caps.opens else "none"
            raise UserError(
                f"the student's part {part!r} has {', '.join(closed)} of its own; of the arguments of its architecture this setting "
                f"lets a method choose {may}"
            )

    def over(self, student: Student, networks: nn.Module | Mapping[str, nn.Module]) -> str | None:
        """Which cap a student passes, as ``cap value of limit``, or None. ``networks``: as the suite rebuilds them."""
        if not self.parameters:
            return None
        rebuilt = [networks] if isinstance(networks, nn.Module) else list(networks.values())
        others = sum(part.numbers for part in student.parts.values() if part.architecture is None)
        has, most = sum(map(parameters, rebuilt)) + others, int(self.caps.parameters * (self.numbers if others else self.parameters))
        if has > most:
            return f"parameters {has} of {most}"
        if self.call is None or self.flops is None or not rebuilt:
            return None
        spent, limit = max(_flops(network, self.call) for network in rebuilt), self.caps.flops * self.flops
        return f"flops_per_call {spent:.6g} of {limit:.6g}" if spent > limit else None


def _plain(architecture: Architecture) -> tuple[str, dict[str, object]]:
    return architecture.name, to_data(architecture.arguments)


def _flops(network: nn.Module, call: tuple[Tree, ...]) -> float:
    training = network.training
    network.eval()  # one row is too few for batch normalisation that trains
    try:
        return flops_per_row(network, call)
    finally:
        network.train(training)


def _digests(tensor: Tensor) -> list[str]:
    """Of a tensor's numbers, whatever their shape, and of what they are after a cast and back."""
    flat = tensor.detach().cpu().flatten()
    return [tensor_digest({"": flat.to(cast).double()}) for cast in CASTS]
