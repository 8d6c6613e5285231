"""The check of what leaves a method: trained, or honest about what else it is, and rebuilt without the method's code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.checks.core import Failed, Subject, check
from distillbench.checks.trial import ROWS, Trial, first_training, train, updated
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.training.student import Part, Student


@check
def export(subject: Subject) -> None:
    """What is exported was trained, or says what else it is, and rebuilt without the method's code it answers as it did.

    Of what was converted after the training (quantised, merged, masked) the network before that must be the trained one; what is
    said to be untrained or inherited must be the same after a training on the same examples in another order.
    """
    trial = first_training(subject)
    if set(trial.exported) != set(trial.student.parts):
        raise Failed("nothing was exported through run.fit or run.export")
    rebuilt = trial.rebuild(Student.from_bytes(trial.student.to_bytes()))
    networks = rebuilt if isinstance(rebuilt, Mapping) else dict.fromkeys(trial.student.parts, rebuilt)
    for name, part in trial.student.parts.items():
        made, trained = trial.exported[name]
        if updated(trial) and part.kind == "converted":
            assert trained is not None
            if not any(average is trained for average, _ in trial.run._averages):
                _as_trained(trial, trained)
        elif updated(trial) and part.kind == "trained":
            if trained is None:
                _of_trained(trial, part)
            else:
                _as_trained(trial, trained)
        if made is not None:
            _answers_alike(networks.get(name), made, trial.problem, name)
    if updated(trial):
        _untouched(subject, {name: part for name, part in trial.student.parts.items() if part.kind in ("untrained", "inherited")})


def _untouched(subject: Subject, parts: Mapping[str, Part]) -> None:
    if not parts:
        return
    base = subject.spec.seeds
    others = train(subject, rows=ROWS, seeds={**base, "order": base["order"] + 1}).student.parts
    for name, part in parts.items():
        again = others.get(name)
        same = again is not None and again.text == part.text and again.weights.keys() == part.weights.keys()
        if again is None or not same or any(not torch.equal(t, again.weights[k]) for k, t in part.weights.items()):
            raise Failed(f"part {name!r} is declared as {part.kind}, and it changes with the order of the examples: it was trained")


def _answers_alike(rebuilt: nn.Module | None, made: nn.Module, problem: Any, name: str) -> None:
    if rebuilt is None:
        raise Failed(f"the suite does not rebuild the exported network {name!r}")
    made.eval()
    with torch.no_grad():
        ours, theirs = (_answer(net, problem) for net in (rebuilt, made))
    if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
        raise Failed(
            f"the rebuilt student answers differently (by {float((ours - theirs).abs().max()):.2g}) from the network that was exported"
        )


def _of_trained(trial: Trial, part: Part) -> None:
    """Fail unless each of the part's real tensors is a parameter of a network that a loop has trained, as it was after that loop."""
    ends = [p for end in trial.ends.values() for p in end.values()]
    for name, tensor in part.weights.items():
        if tensor.is_floating_point() and not any(torch.equal(tensor, end) for end in ends):
            raise Failed(f"the exported tensor {name} is declared as trained, and no loop left a parameter so; is it untrained?")


def _as_trained(trial: Trial, module: nn.Module) -> None:
    """Fail unless ``module`` is, or is part of, a network that a loop has trained, with the weights it had after that loop."""
    for trained, end in reversed(trial.ends.items()):
        prefix = next((f"{name}." if name else "" for name, part in trained.named_modules() if part is module), None)
        if prefix is None:
            continue
        if any(not torch.equal(p.detach().cpu(), end[prefix + name]) for name, p in module.named_parameters()):
            raise Failed(
                "the exported weights were changed after the training; an average is declared with run.export(..., averaged=True), "
                'what was converted with run.export(copy, converted="int8", of=network)'
            )
        return
    raise Failed(
        "the exported network, or what it is said to be converted from, is not one that was trained, and is not declared as an average "
        "(run.export(..., averaged=True))"
    )


def _answer(module: nn.Module, problem: Any) -> Tensor:
    """What a network says to a batch; where it is no function (a data set), what it holds."""
    if isinstance(module, LanguageModel):
        logits: Tensor = module.logits(problem.prompts.ids, problem.prompts.attention)
        return logits
    inputs = next(problem.batches.stream(0)).inputs
    try:
        answer: Tensor = module(inputs)
    except NotImplementedError:
        answer = torch.cat([t.flatten() for t in module.state_dict().values()])
    except TypeError:  # a denoiser also wants a noise level
        answer = module(inputs, torch.ones(len(inputs)), None)
    return answer
