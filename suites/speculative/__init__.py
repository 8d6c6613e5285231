"""Speculative decoding: the judge of draft models, which propose tokens that a larger target verifies."""

from __future__ import annotations

from distillbench.cards.card import Metric, SuiteCard
from distillbench.cards.reading import read_settings
from distillbench.cards.worlds import Worlds
from distillbench.problems.language_modeling.suite import LanguageSuite
from distillbench.suites.language_modeling import network

CARD = SuiteCard(
    slug="speculative",
    version=1,
    problem="language-modeling",
    title="Speculative decoding",
    summary="One target, one small draft model, one budget: how many tokens does a call of the target give when the draft proposes? "
    "The output is the target's own whatever the draft, so only speed is at stake.",
    metrics=[
        Metric(
            name="acceptance",
            unit="probability",
            better="higher",
            range=(0, 1),
            meaning="mean over tokens of the target's texts of sum_v min(p(v), q(v)) = 1 - TV: the chance that a proposal made there "
            "is accepted. Decoding visits contexts at other rates, so it is not the fraction of proposals accepted at run time",
        ),
        Metric(
            name="acceptance_greedy",
            unit="fraction",
            better="higher",
            range=(0, 1),
            meaning="fraction of the same contexts (texts that the target sampled) where both have the same most probable token",
        ),
        Metric(
            name="block_efficiency_1",
            unit="tokens per call",
            better="higher",
            range=(1, 2),
            meaning="tokens per target call with 1 proposal per block, the correction or bonus token among them; all tokens over all "
            "calls, and the end of a text ends its block",
        ),
        Metric(
            name="block_efficiency_2",
            unit="tokens per call",
            better="higher",
            range=(1, 3),
            meaning="tokens per target call with 2 proposals per block, the correction or bonus token among them",
        ),
        Metric(
            name="block_efficiency_3",
            unit="tokens per call",
            better="higher",
            range=(1, 4),
            meaning="tokens per target call with 3 proposals per block, the correction or bonus token among them",
        ),
        Metric(
            name="block_efficiency_4",
            unit="tokens per call",
            better="higher",
            range=(1, 5),
            meaning="tokens per target call with 4 proposals per block, the correction or bonus token among them",
        ),
        Metric(
            name="block_efficiency_5",
            unit="tokens per call",
            better="higher",
            range=(1, 6),
            meaning="tokens per target call with 5 proposals per block, the correction or bonus token among them",
        ),
        Metric(
            name="block_efficiency_6",
            unit="tokens per call",
            better="higher",
            range=(1, 7),
            meaning="tokens per target call with 6 proposals per block, the correction or bonus token among them",
        ),
        Metric(
            name="block_efficiency_7",
            unit="tokens per call",
            better="higher",
            range=(1, 8),
            meaning="tokens per target call with 7 proposals per block, the correction or bonus token among them",
        ),
        Metric(
            name="block_efficiency_8",
            unit="tokens per call",
            better="higher",
            range=(1, 9),
            meaning="tokens per target call with 8 proposals per block, the correction or bonus token among them",
        ),
        Metric(
            name="accepted_length_4",
            unit="tokens per call",
            better="higher",
            range=(0, 4),
            meaning="accepted proposals per target call with 4 proposals per block, without the correction or bonus token",
        ),
        Metric(
            name="draft_cost",
            unit="ratio",
            better="lower",
            range=(0, None),
            meaning="FLOPs of one decoded token of the draft over those of the target, as torch counts them, projection included",
        ),
        Metric(
            name="predicted_speedup",
            unit="ratio",
            better="higher",
            range=(0, None),
            meaning="the largest block_efficiency_g / (g draft_cost + 1) over g in 1 to 8: predicted from FLOPs, where a call on g + 1 "
            "tokens is taken to cost as much as a call on 1",
        ),
        Metric(
            name="measured_speedup",
            unit="ratio",
            better="higher",
            range=(0, None),
            meaning="seconds of greedy decoding without the draft over those with it, prompt included, on the machine of the record. "
            "Under 1 the draft makes decoding slower",
            below=(1.0, "slower than its target"),
        ),
        Metric(
            name="lossless",
            unit="fraction",
            better="higher",
            range=(0, 1),
            meaning="fraction of prompts with the same greedy tokens with and without the draft; the others part at a tie of the target's "
            "logits and have no part in measured_speedup. Any other difference fails the run",
        ),
        Metric(
            name="acceptance_mt_bench",
            unit="probability",
            better="higher",
            range=(0, 1),
            meaning="acceptance on the first turns of MT-bench's 80 questions",
        ),
        Metric(
            name="acceptance_translation",
            unit="probability",
            better="higher",
            range=(0, 1),
            meaning="acceptance on 80 translations from German to English",
        ),
        Metric(
            name="acceptance_summarization",
            unit="probability",
            better="higher",
            range=(0, 1),
            meaning="acceptance on summaries of 80 news articles",
        ),
        Metric(
            name="acceptance_qa",
            unit="probability",
            better="higher",
            range=(0, 1),
            meaning="acceptance on 80 open questions",
        ),
        Metric(
            name="acceptance_math_reasoning",
            unit="probability",
            better="higher",
            range=(0, 1),
            meaning="acceptance on 80 word problems",
        ),
        Metric(
            name="acceptance_rag",
            unit="probability",
            better="higher",
            range=(0, 1),
            meaning="acceptance on 80 questions with retrieved passages",
        ),
    ],
    primary="acceptance",
    controls=["scratch", "undistilled", "teacher"],
    floor="scratch",
    ceiling="teacher",
    strongest=["scratch", "undistilled"],
    settings=read_settings(__file__),
)

# Options that make a fingerprint small (see distillbench.checks.fingerprints): the arithmetic is the same, on fewer examples.
FINGERPRINT = {
    "markov": {"prompts": 64, "references": 64, "validation": 16},
    "smollm2": {
        "prompt_length": 24,
        "length": 6,
        "test": 4,
        "tune": 2,
        "validation": 2,
        "samples": 1,
        "timed": 1,
        "timed_length": 4,
    },
}


# The target is the teacher, the draft the student.
SUITE = LanguageSuite(Worlds(__name__, ("markov", "smollm2", "spec_bench")), network)
