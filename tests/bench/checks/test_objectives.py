"""The generated objective checks of every kind of problem against wrong objectives: each is caught by the check that is meant for it.

A bug is one change in the text of a real method, or an objective of one's own in place of what it imports.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from distillbench.checks import CHECKS, check_method, objective
from distillbench.problems.classification.problem import Classification
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.training.examples import PADDING, ROWS, Draw

ROOT = Path(__file__).parents[3]
OBJECTIVE = [name for name, check in CHECKS.items() if check.__module__ == objective.__name__ and name not in ("card", "imports")]
KINDS = [Classification, ImageGeneration, LanguageModeling]


def plant(folder: Path, method: str, *changes: tuple[str, str], oracle: bool = True) -> str:
    """The file of ``method`` (problem/slug) with ``changes`` (old text -> new text), and its oracle beside it."""
    text = (ROOT / "methods" / f"{method}.py").read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / Path(method).with_suffix(".py").name
    path.write_text(text)
    if oracle:
        shutil.copy(ROOT / "tests" / "oracles" / f"{method}.py", folder / f"{path.stem}_oracle.py")
    return str(path)


def failures(method: str) -> dict[str, str]:
    """Check -> message, of the objective checks that fail."""
    return {r.name: r.message for r in check_method(method, only=OBJECTIVE) if r.outcome == "failed" and r.name in OBJECTIVE}


def own(source: str, name: str = "token_divergence") -> tuple[str, str]:
    """A function ``name`` of one's own in place of the shared one."""
    line = f"from distillbench.problems.language_modeling.oracle import {name} as {name}\n"
    return line, f"import torch\nfrom distillbench.problems.language_modeling.oracle import real_logits\n\n\n{source}\n"


def matching(value: str) -> tuple[str, str]:
    """A direction of one's own in place of the kind's."""
    function = f"def matching_gradient(generated, real_denoised, fake_denoised):\n    return {value}\n"
    return MATCHING, f"{MATCHING.replace('matching_gradient, ', '')}\n\n{function}\n\n"


MATCHING = "from distillbench.problems.image_generation.matching import Matching, matching_gradient, surrogate_loss\n"
VALUES = {"oracle_value", "oracle_gradient"}
TOKENS = "def token_divergence(model, states, teacher, *, vocab):\n"
BOTH = "    p, q = teacher(slice(0, len(states)))[:, :vocab].detach().softmax(1), real_logits(model, states, vocab).softmax(1)\n"
KL = "(p * (p.log() - q.log()))"

LOSSES = "from distillbench.problems.classification.losses import cross_entropy, kl_divergence\n"
TWICE = """import torch
from distillbench.problems.classification import losses
from distillbench.problems.classification.losses import cross_entropy


def kl_divergence(student_logits, teacher_logits, *, temperature):
    return temperature**2 * losses.kl_divergence(student_logits, teacher_logits, temperature=temperature)


"""
MEANT = "soft_cross_entropy(student_logits, target) - entropy"
ENTROPY = """    p = towards(slice(0, len(states))).softmax(1)
    return -(p * real_logits(model, states, vocab).log_softmax(1)).sum(1)
"""
PEARSON = """    difference = fake_answer - real_answer
    law = 2 * law if divergence == "pearson" else law
"""

# What is wrong -> method, its changes, exactly the checks that fail, and part of what one of them says.
BUGS: dict[str, tuple[str, list[tuple[str, str]], set[str], str]] = {
    # a reduction hidden inside, or an example that sees others
    "a mean over the batch's pixels": (
        "image_generation/ode_pairs",
        [("row_mean((output - target.detach()) ** 2) / 2", "((output - target.detach()) ** 2).mean() / 2")],
        {"per_example", *VALUES},
        "shape ()",
    ),
    "every sample has the batch's error": (
        "image_generation/progressive_distillation",
        [("row_mean((denoised - target.detach()) ** 2)", "((denoised - target.detach()) ** 2).mean()")],
        {"per_example", *VALUES},
        "changes with the rest of the batch",
    ),
    "a value for every pixel": (
        "image_generation/ode_pairs",
        [("row_mean((output - target.detach()) ** 2) / 2", "(output - target.detach()) ** 2 / 2")],
        {"per_example", *VALUES},
        "shape (6, 2, 3)",
    ),
    "a mean over tokens": (
        "language_modeling/first",
        [("(log_p.exp() * (log_p - log_q)).sum(1)", "(log_p.exp() * (log_p - log_q)).sum(1).mean()")],
        {"per_example", *VALUES},
        "shape ()",
    ),
    "advantages centred over the tokens at hand": (
        "language_modeling/minillm",
        [("advantage.detach()\n", "advantage.detach() - advantage.mean().detach()\n")],
        {"per_example", *VALUES},
        "changes with the rest of the batch",
    ),
    "divided by the number of samples": (
        "image_generation/ode_pairs",
        [("row_mean((output - target.detach()) ** 2) / 2", "row_mean((output - target.detach()) ** 2) / 2 / len(output)")],
        {"per_example", "batch_duplication", *VALUES},
        "how often an example is in the batch",
    ),
    "divided by the number of chunks": (
        "language_modeling/alm",
        [("    return tau * (cross", "    return tau / len(a) * (cross")],
        {"per_example", "batch_duplication", *VALUES},
        "how often an example is in the batch",
    ),
    # a gradient that leaks, or does not arrive
    "a consistency target that is trained": (
        "image_generation/consistency_distillation",
        [("output - target.detach()", "output - target")],
        {"frozen_arguments"},
        "write target.detach()",
    ),
    "a surrogate through both scores": (
        "image_generation/diff_instruct",
        [("(fake_denoised - real_denoised).detach()", "(fake_denoised - real_denoised)")],
        {"frozen_arguments"},
        "reaches real_denoised",
    ),
    "a tangent that is trained": (
        "image_generation/sana_sprint",
        [("- tangent.detach())", "- tangent)")],
        {"frozen_arguments"},
        "reaches tangent",
    ),
    "an importance weight that is trained": (
        "language_modeling/minillm",
        [("weight.detach(), advantage", "weight, advantage")],
        {"frozen_arguments"},
        "reaches weight",
    ),
    "a teacher that follows": (
        "language_modeling/first",
        [("teacher_top.detach()", "teacher_top")],
        {"frozen_arguments"},
        "reaches teacher_top",
    ),
    "likelihoods that the teacher may change": (
        "language_modeling/alm",
        [("teacher_likelihood.detach()", "teacher_likelihood")],
        {"frozen_arguments"},
        "reaches teacher_likelihood",
    ),
    "words that the teacher may change": (
        "language_modeling/adaspec",
        [own(f"{TOKENS}{BOTH.replace('.detach()', '')}    return {KL}.sum(1)")],
        {"frozen_arguments", "class_padding", "extreme_inputs"},
        "reaches teacher",
    ),
    "a direction with a graph": (
        "image_generation/dmd",
        [matching("(fake_denoised - real_denoised) / (generated - real_denoised).abs().mean((1, 2), keepdim=True)")],
        {"frozen_arguments", "per_example"},
        "shape (6, 2, 3)",
    ),
    "a direction divided by the batch's size": (
        "image_generation/dmd",
        [matching("((fake_denoised - real_denoised) / (generated - real_denoised).abs().mean()).detach()")],
        {"per_example", "oracle_value"},
        "changes with the rest of the batch",
    ),
    "a divisor that is differentiated": (
        "image_generation/sid",
        [("residual.detach().abs()", "residual.abs()")],
        {"oracle_gradient"},
        "held still in the one and not in the other",
    ),
    "half of the gradient stopped": (
        "image_generation/sim",
        [("(fake_answer - generated).flatten(1)", "(fake_answer - generated / 2 - generated.detach() / 2).flatten(1)")],
        {"oracle_gradient"},
        "gradient in generated",
    ),
    "no gradient at all": (
        "image_generation/ode_pairs",
        [("(output - target.detach())", "(output.detach() - target.detach())")],
        {"oracle_gradient", "zero_at_match", "extreme_inputs"},
        "no gradient reaches output",
    ),
    # scales
    "T squared lost": (
        "classification/dhkd",
        [("    return temperature**2 * divergence", "    return divergence")],
        {"temperature_scale", *VALUES},
        "T^2",
    ),
    "T squared twice": (
        "classification/kd",
        [(LOSSES, TWICE)],
        {"temperature_scale", *VALUES},
        "T^2",
    ),
    "tau lost": ("language_modeling/alm", [("    return tau * (cross", "    return (cross")], VALUES, "differs from its oracle"),
    # classes and vocabularies
    "a mean over subclasses": (
        "classification/lelp",
        [("    return soft_cross_entropy(student_logits, target) - entropy", f"    return ({MEANT}) / target.shape[1]")],
        {"class_padding", *VALUES},
        "a mean over classes",
    ),
    "a mean over the vocabulary": (
        "language_modeling/adaspec",
        [own(f"{TOKENS}{BOTH}    return {KL}.nansum(1) / vocab")],
        {"class_padding", "extreme_inputs", *VALUES},
        "a mean over classes",
    ),
    "padding of the vocabulary that counts": (
        "language_modeling/adaspec",
        [own(f"{TOKENS}    weight, bias = model.head\n    z, w = states @ weight.T + bias, teacher(slice(0, len(states))).detach()\n"
             "    return (w.softmax(1) * (w.log_softmax(1) - z.log_softmax(1))).sum(1)")],
        {"class_padding"},
        "classes that do not count",
    ),
    # another divergence than the card's
    "KL the other way round": (
        "language_modeling/first",
        [("(log_p.exp() * (log_p - log_q))", "(log_q.exp() * (log_q - log_p))")],
        VALUES,
        "differs from its oracle",
    ),
    "reverse KL for forward KL": (
        "language_modeling/adaspec",
        [own(f"{TOKENS}{BOTH.replace('.softmax(1)', '.log_softmax(1)')}    return (q.exp() * (q - p)).sum(1)")],
        VALUES,
        "differs from its oracle",
    ),
    "a cross-entropy for a divergence": (
        "language_modeling/taid",
        [("    return token_divergence(model, states, towards, vocab=vocab)\n", ENTROPY)],
        {"oracle_value", "zero_at_match"},
        "a cross-entropy is not a divergence",
    ),
    "teacher and fake score exchanged": (
        "image_generation/diff_instruct",
        [("(fake_denoised - real_denoised).detach()", "(real_denoised - fake_denoised).detach()")],
        VALUES,
        "differs from its oracle",
    ),
    "another metric at one option alone": (
        "image_generation/consistency_distillation",
        [("difference.abs() if metric", "difference.abs() / 2 if metric")],
        VALUES,
        "at metric=l1 differs from its oracle",
    ),
    "the ratio's curvature at one divergence alone": (
        "image_generation/uni_instruct",
        [("    difference = fake_answer - real_answer\n", PEARSON)],
        VALUES,
        "at divergence=pearson differs from its oracle",
    ),
    # limits
    "no number at one option": (
        "image_generation/progressive_distillation",
        [('"snr": snr,', '"snr": (snr - snr).log(),')],
        {"hyperparameter_bounds", *VALUES},
        "not finite at weight=snr",
    ),
    "exp of what is far out": (
        "image_generation/gdd_i",
        [("    return fake.shape[1] * logistic_generator_loss(fake)", "    return (1 + (-fake).exp()).log().sum(1)")],
        {"extreme_inputs"},
        "not finite far out in fake",
    ),
    "a likelihood brought back to a probability": (
        "language_modeling/alm",
        [("    cross = -(x * b + rest * log1mexp(b))", "    cross = -(x * b.exp().log() + rest * log1mexp(b))")],
        {"extreme_inputs"},
        "not finite far out in teacher_likelihood, student_likelihood",
    ),
    # inputs
    "samples changed in place": (
        "image_generation/ode_pairs",
        [("    return row_mean((output", "    target.sub_(target.mean())\n    return row_mean((output")],
        {"inputs_intact", "per_example", "oracle_gradient", "frozen_arguments", "zero_at_match"},
        "changes target in place",
    ),
    "log-probabilities changed in place": (
        "language_modeling/minillm",
        [("    old, weight, advantage = old.detach()", "    old.clamp_(min=-2)\n    old, weight, advantage = old.detach()")],
        {"inputs_intact", "oracle_gradient", "frozen_arguments"},
        "changes old in place",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_objective_is_caught_by_its_check(tmp_path: Path, bug: str) -> None:
    method, changes, expected, message = BUGS[bug]
    failed = failures(plant(tmp_path, method, *changes))
    assert set(failed) == expected, failed
    assert any(message in text for text in failed.values()), failed


@pytest.mark.parametrize("method", sorted({method for method, *_ in BUGS.values()}))
def test_the_methods_that_are_changed_are_right_before(tmp_path: Path, method: str) -> None:
    assert not failures(plant(tmp_path, method))


# --- what is not there ----------------------------------------------------------------------------------------------


def test_a_missing_oracle_is_unproven_and_no_pass(tmp_path: Path) -> None:
    results = {r.name: r for r in check_method(plant(tmp_path, "image_generation/ode_pairs", oracle=False), only=OBJECTIVE)}
    assert {n for n, r in results.items() if r.outcome == "unproven"} == VALUES
    assert "write ode_pairs_oracle.py" in results["oracle_value"].message
    assert {r.outcome for r in results.values()} == {"passed", "skipped", "unproven"}


def test_an_argument_nobody_knows_leaves_all_unproven(tmp_path: Path) -> None:
    method = plant(
        tmp_path, "image_generation/ode_pairs", ("def pair_loss(output", "def pair_loss(outputt"), ("row_mean((output", "row_mean((outputt")
    )
    results = check_method(method, only=OBJECTIVE)
    assert {r.outcome for r in results if r.name in OBJECTIVE} == {"unproven"}
    assert "pair_loss takes outputt" in results[0].message and "output, " in results[0].message
    assert [r.name for r in results if r.outcome == "failed"] == ["something_checked"]


def test_a_method_that_does_not_say_its_kind_is_told_how(tmp_path: Path) -> None:
    method = plant(tmp_path, "classification/pseudo_label", ("problem: Classification,", "problem,"))
    assert "def distill(problem: Classification" in check_method(method, only=["per_example"])[0].message


OUTSIDE = '''"""A kind of problem that nobody here has heard of, and a method for it."""

from distillbench.cards.card import Card, Paper
from distillbench.training.problem import Problem
from distillbench.training.examples import Input, like

CARD = Card(
    slug="outside",
    version=1,
    problem="graphs",
    title="Outside",
    paper=Paper(title="Graphs", year=2026),
    objective=("direction", "edge_loss"),
    equations={"edge_loss": "L = mean over k of (a - b)_k^2"},
)


class Graphs(Problem):
    @classmethod
    def examples(cls):
        return {
            "edges": Input(lambda d: d.normal(d.rows, 4)),
            "wanted_edges": Input(lambda d: d.normal(d.rows, 4), "frozen", match=like("edges")),
            "shared": Input(lambda d: d.normal(4), "frozen", rows=False),
        }


def direction(edges, wanted_edges):
    return (edges - wanted_edges).detach()


def edge_loss(edges, wanted_edges, shared):
    return ((edges - wanted_edges.detach()) * shared.detach()).square().mean(1)


def distill(problem: Graphs, run):
    raise NotImplementedError
'''
ITS_ORACLE = """
def direction(edges, wanted_edges):
    return edges - wanted_edges


def edge_loss(edges, wanted_edges, shared):
    return (((edges - wanted_edges) * shared) ** 2).mean(1)
"""


def test_a_kind_from_elsewhere_says_itself_what_its_objectives_take(tmp_path: Path) -> None:
    path, oracle = tmp_path / "outside.py", tmp_path / "outside_oracle.py"
    path.write_text(OUTSIDE)
    oracle.write_text(ITS_ORACLE)
    outcomes = {r.name: r.outcome for r in check_method(str(path), only=OBJECTIVE)}
    cannot = {"class_padding", "class_order", "temperature_scale", "hyperparameter_bounds", "extreme_inputs", "direction"}
    assert {n for n, o in outcomes.items() if o == "passed"} == set(OBJECTIVE) - cannot
    path.write_text(OUTSIDE.replace("(edges - wanted_edges.detach())", "(edges - wanted_edges)"))
    assert set(failures(str(path))) == {"frozen_arguments"}
    path.write_text(OUTSIDE.replace("shared.detach()).square().mean(1)", "shared.detach()).square().mean()"))
    assert set(failures(str(path))) == {"per_example", *VALUES}


# --- the kinds' own lists -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_kinds_inputs_are_what_they_say(kind: type) -> None:
    known = kind.examples()  # type: ignore[attr-defined]
    values = {name: x.draw(Draw(3)) for name, x in known.items()}
    for name, x in known.items():
        value = values[name]
        assert value.dtype in (torch.float64, torch.int64, torch.bool), name
        assert torch.equal(value, x.draw(Draw(3))) and (not value.dim() or not torch.equal(value, x.draw(Draw(4)))), name
        assert x.rows == (value.dim() > 0 and len(value) == ROWS), name
        assert all(far(value).shape == value.shape for far in x.extremes or ()), name
        assert all(
            pad(value).dim() == value.dim() and pad(value).numel() >= value.numel() + PADDING * (value.dim() > 0) for pad in x.pads
        ), name
        assert x.match is None or x.role == "frozen", name
        assert x.match is None or x.match({n: v for n, v in values.items() if n != name}) is not None or kind is Classification, name
        assert x.role != "frozen" or value.is_floating_point(), name
    assert {len(x.pads) for x in known.values() if x.pads} in ({1}, {2}, set())
