"""Language modelling: the judge of language models distilled from larger ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillbench.cards.card import Metric, SuiteCard
from distillbench.cards.reading import read_settings
from distillbench.cards.worlds import Worlds
from distillbench.problems.language_modeling.suite import LanguageSuite

if TYPE_CHECKING:
    from distillbench.problems.language_modeling.models import LanguageModel
    from distillbench.training.student import Student

CARD = SuiteCard(
    slug="language-modeling",
    version=1,
    problem="language-modeling",
    title="Language modelling",
    summary="One language model, one smaller student, one pool of prompts: how close to the teacher's distribution does each method come?",
    metrics=[
        Metric(
            name="kl",
            unit="nats per token",
            better="lower",
            range=(0, None),
            meaning="KL of the teacher's distribution of whole responses to the student's, over the expected tokens of a teacher's "
            "response; exact",
        ),
        Metric(
            name="reverse_kl",
            unit="nats per token",
            better="lower",
            range=(0, None),
            meaning="KL of the student's distribution of whole responses to the teacher's, over the expected tokens of a student's "
            "response; exact",
        ),
        Metric(
            name="tv",
            unit="probability",
            better="lower",
            range=(0, 1),
            meaning="mean total variation of the two next-token distributions where the teacher's responses go; exact",
        ),
        Metric(
            name="acceptance",
            unit="probability",
            better="higher",
            range=(0, 1),
            meaning="1 - tv: the chance that a token proposed by the student is accepted in speculative sampling; exact",
        ),
        Metric(
            name="truth_kl",
            unit="nats per token",
            better="lower",
            range=(0, None),
            meaning="kl with the distribution that the teacher itself was estimated from in the teacher's place; exact",
        ),
        Metric(
            name="rougel",
            unit="fraction",
            better="higher",
            range=(0, 1),
            meaning="mean of the ROUGE-L of five test sets, whatever their sizes; on the split tune that of Dolly's held-out prompts. "
            "The papers print a hundred times this",
        ),
        Metric(
            name="rougel_dolly",
            unit="fraction",
            better="higher",
            range=(0, 1),
            meaning="ROUGE-L on Dolly's 500 test prompts: mean over prompts and five draws",
        ),
        Metric(
            name="rougel_selfinst",
            unit="fraction",
            better="higher",
            range=(0, 1),
            meaning="ROUGE-L on SelfInst's prompts: mean over prompts and five draws",
        ),
        Metric(
            name="rougel_vicuna",
            unit="fraction",
            better="higher",
            range=(0, 1),
            meaning="ROUGE-L on Vicuna's 80 prompts: mean over prompts and five draws",
        ),
        Metric(
            name="rougel_sni",
            unit="fraction",
            better="higher",
            range=(0, 1),
            meaning="ROUGE-L on Super-Natural Instructions, the subset 11_ of long references: mean over prompts and five draws",
        ),
        Metric(
            name="rougel_uinst",
            unit="fraction",
            better="higher",
            range=(0, 1),
            meaning="ROUGE-L on Unnatural Instructions, the subset 11_ of long references: mean over prompts and five draws",
        ),
        Metric(
            name="text_kl",
            unit="nats per token of the teacher",
            better="lower",
            range=(0, None),
            meaning="KL of the teacher's distribution of whole texts to the student's, whatever tokens each writes them in; exact",
        ),
    ],
    primary="kl",
    controls=["scratch", "undistilled", "teacher"],
    floor="scratch",
    ceiling="teacher",
    strongest=["scratch", "undistilled"],
    settings=read_settings(__file__),
)

# Options that make a fingerprint small (see distillbench.checks.fingerprints): the arithmetic is the same, on fewer examples.
FINGERPRINT = {
    "markov": {"prompts": 64, "references": 64, "validation": 16},
    "markov-estimated": {"prompts": 64, "references": 64, "validation": 16, "teacher_texts": 200},
    "markov-limited": {
        "prompts": 64,
        "references": 64,
        "validation": 16,
        "vocab": 5,  # so small that the fit converges: at full size, processors part at 1e-4
        "spread": 1.0,
        "length": 8,
        "teacher_rank": 2,
        "student": {"name": "window-lm", "arguments": {"vocab": 5, "order": 2, "width": 2}},
    },
    "markov-bytes": {
        "prompts": 64,
        "references": 64,
        "validation": 16,
        "vocab": 10,
        "single": 3,
        "letters": 5,
        "student": {"name": "window-lm", "arguments": {"vocab": 6, "order": 5, "width": 6}},
    },
}


def rebuild(student: Student) -> LanguageModel:
    """The network of an exported student, in evaluation mode. Raises UserError where weights and architecture do not fit."""
    from distillbench.suites.language_modeling.nets import rebuild as network

    return network(student)


SUITE = LanguageSuite(Worlds(__name__, ("markov", "markov_bytes", "instruct")), rebuild)
problem, evaluate = SUITE.problem, SUITE.evaluate
