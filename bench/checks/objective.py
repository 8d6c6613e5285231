"""Checks of the pure objective: shapes, values, gradients, limits. They need no training and no data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillbench.checks.core import Failed, Objective, Skipped, Subject, check

B, C, D, K = 6, 5, 7, 3
Inputs = dict[str, Tensor]


def make_inputs(names: tuple[str, ...], seed: int = 0, dtype: torch.dtype = torch.float64, classes: int = C) -> Inputs:
    """Random inputs for arguments of the known names. Raises Skipped for a name that is not in the vocabulary."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    known: dict[str, Callable[[], Tensor]] = {
        **{n: (lambda: 2 * normal(B, classes)) for n in ("student_logits", "teacher_logits", "auxiliary_logits")},
        **{n: (lambda: normal(B, D)) for n in ("student_embedding", "teacher_embedding")},
        **{n: (lambda: normal(B, K, 4, 4)) for n in ("student_feature", "teacher_feature")},
        "labels": lambda: torch.randint(classes, (B,), generator=g),
        "class_means": lambda: normal(classes, D),
        "centroids": lambda: normal(classes, classes).softmax(1),
        "target": lambda: normal(B, classes).softmax(1),
    }
    missing = [n for n in names if n not in known]
    if missing:
        raise Skipped(f"arguments without a generated input: {', '.join(missing)}; known: {', '.join(sorted(known))}")
    return {n: known[n]() for n in names}


def learned(inputs: Inputs) -> list[str]:
    """The arguments that gradients flow to: the student's, or the logits of an objective that trains the teacher."""
    return [n for n in inputs if n.startswith(("student", "auxiliary"))] or [n for n in inputs if n.endswith("_logits")]


def gradients(objective: Objective, inputs: Inputs, **hyper: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Values, and gradients of their sum in the student's arguments."""
    names = learned(inputs)
    leaves = {n: (v.clone().requires_grad_(n in names) if v.is_floating_point() else v.clone()) for n, v in inputs.items()}
    terms = objective(leaves, **hyper)
    total = sum((t.sum() for t in terms), torch.zeros(()))
    if not (isinstance(total, Tensor) and total.requires_grad):
        raise Failed(f"{objective.name}: no gradient reaches {', '.join(names)}")
    found = torch.autograd.grad(total, [leaves[n] for n in names], allow_unused=True)
    return [t.detach() for t in terms], {n: torch.zeros_like(inputs[n]) if f is None else f for n, f in zip(names, found, strict=True)}


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
def per_example(subject: Subject) -> None:
    """One value per example: no reduction is hidden inside, and no example sees another."""
    for objective in subject.objectives:
        inputs = make_inputs(objective.arguments)
        batched = [n for n, v in inputs.items() if n not in ("class_means", "centroids")]
        whole = objective(inputs)
        halves = [objective({n: (v[part] if n in batched else v) for n, v in inputs.items()}) for part in (slice(0, 2), slice(2, B))]
        for i, term in enumerate(whole):
            if tuple(term.shape) != (B,):
                raise Failed(f"{objective.name} returns shape {tuple(term.shape)} for {B} examples; return (B,) and let run.loss reduce")
            if not torch.allclose(term, torch.cat([h[i] for h in halves]), rtol=1e-9, atol=1e-12):
                raise Failed(f"{objective.name}: an example's value changes with the rest of the batch")


@check
def oracle_value(subject: Subject) -> str:
    """The value equals an independent numpy oracle in float64."""
    worst = 0.0
    for objective in subject.objectives:
        for seed in range(3):
            inputs = make_inputs(objective.arguments, seed)
            for ours, theirs in zip(objective(inputs), _oracle(subject, objective, inputs), strict=True):
                difference = float(np.max(np.abs(ours.detach().numpy() - theirs) / (1 + np.abs(theirs))))
                worst = max(worst, difference)
                if not difference < 1e-9:
                    raise Failed(f"{objective.name} differs from its oracle by {difference:.2g}")
    return f"largest difference {worst:.1g}"


@check
def oracle_gradient(subject: Subject) -> str:
    """The gradient equals central differences of the numpy oracle in float64."""
    worst = 0.0
    for objective in subject.objectives:
        inputs = make_inputs(objective.arguments, 11)
        _, found = gradients(objective, inputs)
        for name, gradient in found.items():
            expected = _differences(subject, objective, inputs, name)
            difference = float(np.max(np.abs(gradient.numpy() - expected) / (1 + np.abs(expected))))
            worst = max(worst, difference)
            if not difference < 1e-5:
                raise Failed(f"{objective.name}: the gradient in {name} differs from the oracle's by {difference:.2g}")
    return f"largest difference {worst:.1g}"


def _oracle(subject: Subject, objective: Objective, inputs: Inputs) -> list[np.ndarray]:
    function = getattr(subject.oracle, objective.name, None)
    if function is None:
        raise Failed(f"the oracle has no function {objective.name}")
    out = function(**{n: v.numpy() for n, v in inputs.items()}, **objective.hyper)
    return [np.asarray(o) for o in (out if isinstance(out, tuple | list) else [out])]


def _differences(subject: Subject, objective: Objective, inputs: Inputs, name: str, step: float = 1e-5) -> np.ndarray:
    base = inputs[name].clone()
    slope = np.zeros(base.numel())
    for i in range(base.numel()):
        sides = []
        for sign in (1, -1):
            moved = base.clone()
            moved.view(-1)[i] += sign * step
            sides.append(sum(float(o.sum()) for o in _oracle(subject, objective, {**inputs, name: moved})))
        slope[i] = (sides[0] - sides[1]) / (2 * step)
    return slope.reshape(base.shape)


@check
def zero_at_match(subject: Subject) -> None:
    """A divergence is a divergence: zero with zero gradient where student and teacher agree, and never negative."""
    done = 0
    for objective in subject.objectives:
        inputs = make_inputs(objective.arguments)
        twins = [
            (n, n.replace("student", "teacher")) for n in inputs if n.startswith("student") and n.replace("student", "teacher") in inputs
        ]
        if not twins:
            continue
        done += 1
        if min(float(t.min()) for t in objective(inputs)) < -1e-9:
            raise Failed(f"{objective.name} is negative at a random point: not a divergence")
        for student, teacher in twins:
            inputs[teacher] = inputs[student].clone()
        values, found = gradients(objective, inputs)
        size = max(float(v.abs().max()) for v in values)
        slope = max(float(g.abs().max()) for g in found.values())
        if size > 1e-6:
            raise Failed(f"{objective.name} is {size:.3g} where student and teacher agree: a cross-entropy is not a divergence")
        if slope > 1e-6:
            raise Failed(f"{objective.name} has gradient {slope:.3g} where student and teacher agree")
    if not done:
        raise Skipped("no objective compares a student_... with a teacher_... of the same kind")


@check
def class_padding(subject: Subject) -> None:
    """Classes of probability zero change nothing: catches a mean over classes, and padded vocabularies."""
    done = 0
    for objective in subject.objectives:
        inputs = make_inputs(objective.arguments)
        logits = [n for n in inputs if n.endswith("_logits")]
        if not logits or any(n in inputs for n in ("centroids", "target", "class_means")):
            continue
        done += 1
        padded = {n: torch.cat([v, torch.full((B, 3), -1e4, dtype=v.dtype)], 1) if n in logits else v for n, v in inputs.items()}
        for before, after in zip(objective(inputs), objective(padded), strict=True):
            if not torch.allclose(before, after, rtol=1e-8, atol=1e-10):
                worst = float(((after - before).abs() / (before.abs() + 1e-12)).max())
                raise Failed(
                    f"{objective.name} changes by {worst:.2g} of itself when classes of probability 0 are added: a mean over classes?"
                )
    if not done:
        raise Skipped("no objective over logits alone")


@check
def batch_duplication(subject: Subject) -> None:
    """The batch twice over gives every example the same value (and a coupled term the same value)."""
    for objective in subject.objectives:
        inputs = make_inputs(objective.arguments)
        twice = {n: v if n in ("class_means", "centroids") else torch.cat([v, v]) for n, v in inputs.items()}
        for before, after in zip(objective(inputs), objective(twice), strict=True):
            expected = before if before.dim() == 0 else torch.cat([before, before])
            if after.shape != expected.shape or not torch.allclose(after, expected, rtol=1e-7, atol=1e-9):
                raise Failed(f"{objective.name} depends on how often an example is in the batch")


@check
def temperature_scale(subject: Subject) -> str:
    """The size of the gradient does not vanish with the temperature: T^2 is there, once."""
    ratios = []
    for objective in subject.objectives:
        if "temperature" not in objective.hyper:
            continue
        inputs = make_inputs(objective.arguments)
        sizes = [max(float(g.norm()) for g in gradients(objective, inputs, temperature=t)[1].values()) for t in (200.0, 400.0)]
        if sizes[0] == 0:
            raise Failed(f"{objective.name} has no gradient at temperature 200")
        ratio = sizes[1] / sizes[0]
        if not 0.8 < ratio < 1.25:
            raise Failed(f"{objective.name}: gradient times {ratio:.2f} when the temperature doubles: is T^2 missing or there twice?")
        ratios.append(ratio)
    if not ratios:
        raise Skipped("no objective has a hyper-parameter called temperature")
    return f"gradient at T=400 over T=200: {', '.join(f'{r:.3f}' for r in ratios)}"


@check
def hyperparameter_bounds(subject: Subject) -> None:
    """Finite at every inclusive bound of every hyper-parameter."""
    done = 0
    for objective in subject.objectives:
        inputs = make_inputs(objective.arguments)
        for name in objective.hyper:
            spec = subject.card.hyperparameters[name]
            for bound in (getattr(spec, "ge", None), getattr(spec, "le", None)):
                if bound is None:
                    continue
                done += 1
                if not all(bool(torch.isfinite(t).all()) for t in objective(inputs, **{name: bound})):
                    raise Failed(f"{objective.name} is not finite at {name}={bound}, which the card allows")
    if not done:
        raise Skipped("no objective has a bounded hyper-parameter")


@check
def extreme_logits(subject: Subject) -> None:
    """Value and gradient stay finite in float32 for very confident logits."""
    done = 0
    for objective in subject.objectives:
        inputs = make_inputs(objective.arguments, dtype=torch.float32)
        logits = [n for n in inputs if n.endswith("_logits")]
        if not logits:
            continue
        done += 1
        for flip in (1, -1):
            extreme = {n: (v.sign() * 1e4 * (flip if n.startswith("teacher") else 1) if n in logits else v) for n, v in inputs.items()}
            values, found = gradients(objective, extreme)
            if not all(bool(torch.isfinite(t).all()) for t in (*values, *found.values())):
                raise Failed(f"{objective.name} or its gradient is not finite at logits of +-1e4: use log_softmax, logsumexp or softplus")
    if not done:
        raise Skipped("no objective over logits")


@check
def inputs_intact(subject: Subject) -> None:
    """Inputs are not changed in place."""
    for objective in subject.objectives:
        inputs = make_inputs(objective.arguments)
        before = {n: v.clone() for n, v in inputs.items()}
        objective(inputs)
        changed = [n for n in inputs if not torch.equal(inputs[n], before[n])]
        if changed:
            raise Failed(f"{objective.name} changes {', '.join(changed)} in place")
