"""Checks of the pure objectives: shapes, values, gradients, limits. All but one need no training and no data.

What the arguments are comes from the kind of problem (``Problem.examples()``); no kind, argument or method is known here. An
objective is a loss, or a *target*: what a loss is made of, such as a direction or the probabilities to learn. A target has no
argument that is trained, or the shape of a sample and no graph; it is asked for values, and that no gradient passes through it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distillbench.cards.card import Choice, Flag, Real
from distillbench.checks.core import Failed, Objective, Skipped, Subject, Unproven, check
from distillbench.checks.trial import ROWS as TRAINED
from distillbench.checks.trial import train
from distillbench.checks.watch import Watch
from distillbench.imports import refused
from distillbench.problems.classification.problem import Classification
from distillbench.training.examples import CLASSES, ROWS, Role

_T, _S = r"(?:\w*_t|teacher|p)\b", r"(?:\w*_s|student|q)\b"
WAYS = {  # whose distribution a KL divergence starts from -> how equations write it
    "teacher": (rf"KL\({_T}[^|]*\|\|\s*{_S}", rf"{_T}\S* ?[(\[]\s*log {_T}\S* ?- ?log {_S}"),
    "student": (rf"KL\({_S}[^|]*\|\|\s*{_T}", rf"{_S}\S* ?[(\[]\s*log {_S}\S* ?- ?log {_T}"),
}
Values = Mapping[str, Tensor]
Array = NDArray[np.float64]


def arguments(objective: Objective, *roles: Role) -> list[str]:
    """Its arguments of these roles."""
    return [n for n, x in objective.inputs.items() if x.role in roles]


def traced(objective: Objective, values: Values, names: list[str], **hyper: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The terms, and the leaves ``names`` that they were computed from."""
    leaves = {n: v.clone().requires_grad_(n in names and v.is_floating_point()) for n, v in values.items()}
    return objective(leaves, **hyper), {n: leaves[n] for n in names if leaves[n].requires_grad}


def gradients(objective: Objective, values: Values, **hyper: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Values, and gradients of their sum in all arguments that are trained."""
    names = arguments(objective, "trained")
    terms, leaves = traced(objective, values, names, **hyper)
    total = sum((t.sum() for t in terms), torch.zeros(()))
    if not total.requires_grad:
        raise Failed(f"{objective.name}: no gradient reaches {', '.join(names)}")
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [t.detach() for t in terms], dict(zip(leaves, found, strict=True))


def is_target(objective: Objective, terms: list[Tensor]) -> bool:
    """Whether it is what a loss is made of, and no loss. ``terms``: as :func:`traced` in what is trained."""
    return not arguments(objective, "trained") or all(t.dim() > 1 and not t.requires_grad for t in terms)


def losses(subject: Subject) -> list[Objective]:
    """The objectives that are losses. Raises Skipped where none is."""
    found = [o for o in subject.objectives if not is_target(o, traced(o, o.values(), arguments(o, "trained"))[0])]
    if not found:
        raise Skipped("no objective is a loss")
    return found


def some_rows(objective: Objective, values: Values, rows: Any) -> dict[str, Tensor]:
    """``values`` with ``rows`` of those that have one for each example."""
    return {n: v[rows] if objective.inputs[n].rows else v for n, v in values.items()}


def choices(subject: Subject, objective: Objective) -> Iterator[dict[str, Any]]:
    """Every other value of each of its hyper-parameters that has only a few; the defaults are not among them."""
    for name, default in objective.hyper.items():
        spec = subject.card.hyperparameters[name]
        options = spec.options if isinstance(spec, Choice) else (False, True) if isinstance(spec, Flag) else ()
        yield from ({name: option} for option in options if option != default)


def elsewhere(subject: Subject, objective: Objective) -> list[dict[str, Any]]:
    """Its number-valued hyper-parameters at other values within their bounds, at once: where two of them are equal by default, or one
    is in the middle, what is exchanged would not show."""
    found = []
    for up in (True, False):
        changed: dict[str, Any] = {}
        for place, (name, default) in enumerate(objective.hyper.items()):
            spec = subject.card.hyperparameters[name]
            if isinstance(spec, Real):
                tries = [default * (1.3 + 0.2 * place if up else 0.7 - 0.1 * (place % 3)), 0.3 + 0.05 * place, 0.7]
                if fits := [value for value in tries if _allowed(spec, value)]:
                    changed[name] = fits[0]
        if changed:
            found.append(changed)
    return found


def _allowed(spec: Real, value: float) -> bool:
    try:
        return spec.parse(value) == value
    except ValueError:
        return False


@check
def card(subject: Subject) -> str:
    """The card is complete and points at real functions."""
    card = subject.card
    texts = [card.title, card.notes, *card.equations.values(), *card.deviations, *([card.paper.title] if card.paper else [])]
    if any("TODO" in t for t in texts):
        raise Failed("fill in what is marked TODO on the card")
    if not card.control and card.paper is None:
        raise Failed("say where the method comes from: paper=Paper(title=..., year=...)")
    if not card.control and not card.equations:
        raise Failed('state the objective: equations={"function": "L = ..."}')
    for name in (*card.objectives, *card.equations):
        if not callable(getattr(subject.module, name, None)):
            raise Failed(f"the card names {name}, which is not a function of the module")
    distill = getattr(subject.module, "distill", None)
    if distill is None:
        raise Failed("the module has no distill(problem, run, *, ...)")
    keywords = {p.name for p in inspect.signature(distill).parameters.values() if p.kind is p.KEYWORD_ONLY}
    if keywords != set(card.hyperparameters):
        odd = ", ".join(sorted(keywords ^ set(card.hyperparameters)))
        raise Failed(f"the card's hyper-parameters and the keyword-only arguments of distill differ: {odd}")
    return f"{len(card.hyperparameters)} hyper-parameters, {len(card.equations)} equations"


@check
def imports(subject: Subject) -> None:
    """The method's file, and the loose ones that it imports, import no suite, nothing that runs or judges, and no package of data."""
    if lines := refused(subject.entry.path, subject.entry.module):
        raise Failed(f"{subject.entry.path.name} {'; '.join(lines[:3])}")


@check
def per_example(subject: Subject) -> None:
    """One value per example: no reduction is hidden inside, and no example sees another."""
    for objective in subject.objectives:
        values = objective.values()
        whole, _ = traced(objective, values, arguments(objective, "trained"))
        halves = [objective(some_rows(objective, values, part)) for part in (slice(0, 2), slice(2, ROWS))]
        target = is_target(objective, whole)
        for i, term in enumerate(whole):
            if (tuple(term.shape[:1]) if target else tuple(term.shape)) != (ROWS,):
                raise Failed(f"{objective.name} returns shape {tuple(term.shape)} for {ROWS} examples; return (B,) and let run.loss reduce")
            if not torch.allclose(term, torch.cat([h[i] for h in halves]), rtol=1e-9, atol=1e-12):
                raise Failed(f"{objective.name}: an example's value changes with the rest of the batch")


@check
def oracle_value(subject: Subject) -> str:
    """The value equals an independent numpy oracle in float64, at every option of hyper-parameters, and at other numbers too."""
    worst, points = 0.0, 0
    for objective in subject.objectives:
        others = [*choices(subject, objective), *elsewhere(subject, objective)]
        for seed, changed in [*((seed, {}) for seed in range(3)), *((0, c) for c in others)]:
            values = objective.values(seed)
            for ours, theirs in zip(objective(values, **changed), _oracle(subject, objective, values, **changed), strict=True):
                difference = _difference(ours.detach().numpy(), theirs)
                worst, points = max(worst, difference), points + 1
                if not difference < 1e-9:
                    raise Failed(f"{objective.name}{_at(changed)} differs from its oracle by {difference:.2g}")
    return f"largest difference {worst:.1g} at {points} points"


@check
def oracle_gradient(subject: Subject) -> str:
    """The gradient equals central differences of the numpy oracle in float64; what the oracle calls held does not move."""
    worst = 0.0
    for objective in losses(subject):
        for changed in ({}, *choices(subject, objective), *elsewhere(subject, objective)[:1]):
            values = objective.values(11)
            for name, gradient in gradients(objective, values, **changed)[1].items():
                difference = _difference(gradient.numpy(), _differences(subject, objective, values, name, **changed))
                worst = max(worst, difference)
                if not difference < 1e-5:
                    raise Failed(
                        f"{objective.name}{_at(changed)}: the gradient in {name} differs from the oracle's by {difference:.2g}; "
                        "is something held still in the one and not in the other?"
                    )
    return f"largest difference {worst:.1g}"


def _at(changed: dict[str, Any]) -> str:
    return "".join(f" at {name}={value}" for name, value in changed.items())


def _difference(ours: Array, theirs: Array) -> float:
    if ours.shape != theirs.shape:
        raise Failed(f"shape {ours.shape}, and the oracle's is {theirs.shape}")
    return float(np.max(np.abs(ours - theirs) / (1 + np.abs(theirs))))


def _oracle(subject: Subject, objective: Objective, values: Values, held: Values | None = None, **changed: Any) -> list[Array]:
    """What the oracle says; ``held`` are the values at which everything is taken that the equations hold constant."""
    function = getattr(subject.oracle, objective.name, None)
    if function is None:
        raise Unproven(f"the oracle has no function {objective.name}")
    given = {**_arrays(values), **objective.hyper, **changed}
    if "held" in inspect.signature(function).parameters:
        given["held"] = _arrays(held or values)
    out = function(**given)
    return [np.asarray(o) for o in (out if isinstance(out, tuple | list) else [out])]


def _arrays(values: Values) -> dict[str, Any]:
    return {n: v.numpy() if v.dim() else v.item() for n, v in values.items()}


def _differences(subject: Subject, objective: Objective, values: Values, name: str, step: float = 1e-5, **changed: Any) -> Array:
    slope = np.zeros(values[name].numel())
    for i in range(len(slope)):
        sides = []
        for sign in (1, -1):
            moved = values[name].clone()
            moved.view(-1)[i] += sign * step
            sides.append(sum(float(o.sum()) for o in _oracle(subject, objective, {**values, name: moved}, values, **changed)))
        slope[i] = (sides[0] - sides[1]) / (2 * step)
    return slope.reshape(tuple(values[name].shape))


@check
def frozen_arguments(subject: Subject) -> str:
    """The gradient is exactly 0 in every argument that is a teacher's answer, a target or a weight, with whatever graph it arrives."""
    seen = []
    for objective in subject.objectives:
        names = arguments(objective, "frozen")
        terms, leaves = traced(objective, objective.values(5), [*arguments(objective, "trained"), *names])
        frozen = {n: leaves[n] for n in names}
        seen += [f"{objective.name}.{n}" for n in frozen]
        # weights of their own, so that no two leaks cancel
        total = sum(((t * torch.linspace(1, 2, t.numel()).view(t.shape)).sum() for t in terms), torch.zeros(()))
        if not (frozen and total.requires_grad):
            continue
        for name, gradient in zip(frozen, torch.autograd.grad(total, list(frozen.values()), allow_unused=True), strict=True):
            if gradient is not None and bool(gradient.ne(0).any()):
                raise Failed(
                    f"{objective.name}: a gradient of {float(gradient.abs().max()):.2g} reaches {name}, which does not learn by it: "
                    f"write {name}.detach() where it enters"
                )
    if not seen:
        raise Skipped("no objective has an argument that is held")
    return ", ".join(seen)


@check
def zero_at_match(subject: Subject) -> None:
    """A divergence is a divergence: zero with zero gradient where student and teacher agree, and never negative.

    The kind says which arguments are compared with which. Who has none is a surrogate, whose value is asked of the oracle alone.
    """
    done = 0
    for objective in losses(subject):
        values = objective.values()
        found = {n: x.match(values) for n, x in objective.inputs.items() if x.match is not None}
        twins = {n: v.clone() for n, v in found.items() if v is not None}
        if not twins or any(x.draws for x in objective.inputs.values()):
            continue
        done += 1
        if min(float(t.min()) for t in objective(values)) < -1e-9:
            raise Failed(f"{objective.name} is negative at a random point: not a divergence")
        terms, slopes = gradients(objective, {**values, **twins})
        size = max(float(v.abs().max()) for v in terms)
        slope = max(float(g.abs().max()) for g in slopes.values())
        if size > 1e-6:
            raise Failed(f"{objective.name} is {size:.3g} where student and teacher agree: a cross-entropy is not a divergence")
        if slope > 1e-6:
            raise Failed(f"{objective.name} has gradient {slope:.3g} where student and teacher agree")
    if not done:
        raise Skipped("no objective compares what is trained with what it is to be")


@check
def direction(subject: Subject) -> str:
    """A KL divergence goes the way that the card's equation writes it: from the teacher's distribution, or from the student's.

    One that starts from the teacher is large where the student is sure of a class that the teacher is not sure of; the other way round
    it is large where the teacher is sure.
    """
    found = []
    for objective in losses(subject):
        equation = subject.card.equations.get(objective.name, "")
        wanted = {way for way, forms in WAYS.items() if any(re.search(form, equation) for form in forms)}
        if len(wanted) != 1 or not {"student_logits", "teacher_logits"} <= objective.inputs.keys():
            continue
        values = objective.values(3)
        sure = 30 * torch.nn.functional.one_hot(torch.arange(ROWS) % CLASSES, CLASSES).to(values["student_logits"])
        flat = torch.zeros_like(sure)
        student, teacher = (
            sum(float(t.sum()) for t in objective({**values, "student_logits": a, "teacher_logits": b}))
            for a, b in ((sure, flat), (flat, sure))
        )
        if min(student, teacher) < 0 or max(student, teacher) < 2 * min(student, teacher):
            continue  # no divergence that has a way
        way = "teacher" if student > teacher else "student"
        if way not in wanted:
            raise Failed(
                f"{objective.name} is a KL divergence from the {way}'s distribution, and the card's equation has it from the other's"
            )
        found.append(f"{objective.name} from the {way}'s")
    if not found:
        raise Skipped("no equation on the card writes one KL divergence of logits")
    return ", ".join(found)


@check
def class_padding(subject: Subject) -> None:
    """Classes of probability zero change nothing, and what pads a vocabulary neither: catches a mean over classes."""
    done = 0
    for objective in losses(subject):
        pads = {n: x.pads for n, x in objective.inputs.items() if x.pads}
        values = objective.values()
        for way in range(max(map(len, pads.values()), default=0)):
            done += 1
            padded = {n: pads[n][way](v) if n in pads else v for n, v in values.items()}
            for before, after in zip(objective(values), objective(padded), strict=True):
                if not torch.allclose(before, after, rtol=1e-8, atol=1e-10):
                    worst = float(((after - before).abs() / (before.abs() + 1e-12)).max())
                    raise Failed(
                        f"{objective.name} changes by {worst:.2g} of itself when classes that do not count are added: a mean over classes?"
                    )
    if not done:
        raise Skipped("no objective has an argument with a dimension of classes")


@check
def class_order(subject: Subject) -> None:
    """Classes have no order: renamed in all arguments alike, they change no value. Catches a class that is left out by its number."""
    done = 0
    for objective in subject.objectives:
        moves = {n: x.renamed for n, x in objective.inputs.items() if x.renamed is not None}
        values = objective.values(7)
        if (
            not moves
            or any(x.draws for x in objective.inputs.values())
            or any(t.shape[1:] not in ((), (CLASSES,)) for t in objective(values))
        ):
            continue
        done += 1
        order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(5))
        renamed = {n: moves[n](v, order) if n in moves else v for n, v in values.items()}
        for before, after in zip(objective(values), objective(renamed), strict=True):
            if not torch.allclose(before[:, order] if before.dim() == 2 else before, after, rtol=1e-8, atol=1e-10):
                raise Failed(
                    f"{objective.name} changes when classes change places: is a class left out by its number, or another than the label?"
                )
    if not done:
        raise Skipped("no objective has an argument with a dimension of classes")


@check
def batch_duplication(subject: Subject) -> None:
    """The batch twice over gives every example the same value (and a coupled term the same value)."""
    for objective in subject.objectives:
        values = objective.values()
        twice = some_rows(objective, values, torch.arange(2 * ROWS) % ROWS)
        for before, after in zip(objective(values), objective(twice), strict=True):
            expected = before if before.dim() == 0 else torch.cat([before, before])
            if after.shape != expected.shape or not torch.allclose(after, expected, rtol=1e-7, atol=1e-9):
                raise Failed(f"{objective.name} depends on how often an example is in the batch")


@check
def temperature_scale(subject: Subject) -> str:
    """The size of the gradient does not vanish with the temperature: T^2 is there, once."""
    ratios = []
    for objective in losses(subject):
        if "temperature" not in objective.hyper:
            continue
        values = objective.values()
        sizes = [max(float(g.norm()) for g in gradients(objective, values, temperature=t)[1].values()) for t in (200.0, 400.0)]
        if sizes[0] == 0:
            raise Failed(f"{objective.name} has no gradient at temperature 200")
        ratio = sizes[1] / sizes[0]
        if not 0.8 < ratio < 1.25:
            raise Failed(f"{objective.name}: gradient times {ratio:.2f} when the temperature doubles: is T^2 missing or there twice?")
        ratios.append(ratio)
    said = [f"{r:.3f}" for r in ratios] + _terms_by_temperature(subject)
    if not said:
        raise Skipped("no objective has a hyper-parameter called temperature")
    return f"gradient at T=400 over T=200: {', '.join(said)}"


def _terms_by_temperature(subject: Subject) -> list[str]:
    """The same of every term of the losses in a training, where the card's temperature divides logits."""
    if not issubclass(subject.problem, Classification) or not isinstance(subject.card.hyperparameters.get("temperature"), Real):
        return []
    sizes = []
    for t in (200.0, 400.0):
        seen = train(subject, rows=TRAINED, closely=True, hyper={"temperature": t}).seen
        assert isinstance(seen, Watch)
        sizes.append({key: felt.first for key, felt in seen.felt.items() if felt.first})
    found = []
    for key in sizes[0].keys() & sizes[1].keys():
        ratio = float(sizes[1][key] or 0) / float(sizes[0][key] or 1)
        if not 0.8 < ratio < 1.25:
            raise Failed(f"the term {key[1]!r}: gradient times {ratio:.2f} when the temperature doubles: is T^2 missing or there twice?")
        found.append(f"{key[1]} {ratio:.3f}")
    return sorted(found)


@check
def hyperparameter_bounds(subject: Subject) -> None:
    """Finite at every inclusive bound and every option of every hyper-parameter."""
    done = 0
    for objective in subject.objectives:
        values = objective.values()
        specs = {name: subject.card.hyperparameters[name] for name in objective.hyper}
        bounds = [{n: b} for n, x in specs.items() for b in (getattr(x, "ge", None), getattr(x, "le", None)) if b is not None]
        for changed in (*bounds, *choices(subject, objective)):
            done += 1
            if not all(bool(torch.isfinite(t).all()) for t in objective(values, **changed)):
                raise Failed(f"{objective.name} is not finite{_at(changed)}, which the card allows")
    if not done:
        raise Skipped("no objective has a hyper-parameter with a bound or options")


@check
def extreme_inputs(subject: Subject) -> None:
    """Value and gradient stay finite in float32 for very confident logits, and for samples far out."""
    done = 0
    for objective in losses(subject):
        values = objective.values(dtype=torch.float32)
        extremes = {n: x.extremes for n, x in objective.inputs.items() if x.extremes is not None}
        if not extremes:
            continue
        done += 1
        for i in (0, 1):
            terms, slopes = gradients(objective, {n: extremes[n][i](v) if n in extremes else v for n, v in values.items()})
            if not all(bool(torch.isfinite(t).all()) for t in (*terms, *slopes.values())):
                raise Failed(
                    f"{objective.name} or its gradient is not finite far out in {', '.join(extremes)}: "
                    "use log_softmax, logsumexp or softplus"
                )
    if not done:
        raise Skipped("no objective has an argument with extremes")


@check
def inputs_intact(subject: Subject) -> None:
    """Inputs are not changed in place."""
    for objective in subject.objectives:
        values = objective.values()
        before = {n: v.clone() for n, v in values.items()}
        objective(values)
        changed = [n for n in values if not torch.equal(values[n], before[n])]
        if changed:
            raise Failed(f"{objective.name} changes {', '.join(changed)} in place")
