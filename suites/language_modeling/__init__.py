"""Language modelling: the judge of language models distilled from larger ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillbench.assets import Asset
from distillbench.cards.card import Budget, Metric, Setting, SuiteCard, Training, Variant
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
    summary="One language model, one smaller student, one pool of prompts: how close to the teacher's law does each method come?",
    metrics=[
        Metric(
            name="kl",
            unit="nats a token",
            better="lower",
            range=(0, None),
            meaning="KL of the teacher's law of whole responses to the student's, over the expected tokens of a teacher's response; exact",
        ),
        Metric(
            name="reverse_kl",
            unit="nats a token",
            better="lower",
            range=(0, None),
            meaning="KL of the student's law of whole responses to the teacher's, over the expected tokens of a student's response; exact",
        ),
        Metric(
            name="tv",
            unit="probability",
            better="lower",
            range=(0, 1),
            meaning="mean total variation of the two next-token laws where the teacher's responses go; exact",
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
            unit="nats a token",
            better="lower",
            range=(0, None),
            meaning="kl with the law that the teacher itself was estimated from in the teacher's place; exact",
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
            unit="nats a token of the teacher",
            better="lower",
            range=(0, None),
            meaning="KL of the teacher's law of whole texts to the student's, whatever tokens each writes them in; exact",
        ),
    ],
    primary="kl",
    controls=["scratch", "undistilled", "teacher"],
    settings={
        "markov": Setting(
            tier="analytic",
            summary="A chain of order 2 over 16 tokens with exact next-token laws; the student's logits have rank 6. 256 of 1,024 prompts "
            "have a reference.",
            budget=Budget(student_examples=9600, teacher_examples=19200),
            training=Training(batch_size=32, optimizer="adamw", learning_rate=0.005, schedule="cosine"),
            metrics=["kl", "reverse_kl", "tv", "acceptance"],
            options={
                "world": "markov",
                "chain": 0,
                "vocab": 16,
                "order": 2,
                "spread": 2.0,
                "mean_length": 12,
                "length": 16,
                "prompts": 1024,
                "references": 256,
                "validation": 64,
                "samples": 1,
                "student": {"name": "window-lm", "arguments": {"vocab": 16, "order": 2, "width": 6}},
            },
        ),
        "instruct-gpt2": Setting(
            tier="paper",
            summary="Instruction following on Dolly: GPT-2 XL (1.5B) teaches GPT-2 (120M), both fine-tuned on it. "
            "The schedule is DistiLLM's: 20 epochs in batches of 32.",
            budget=Budget(student_examples=250000, teacher_examples=500000),
            training=Training(
                batch_size=32,
                optimizer="adamw",
                learning_rate=0.0005,
                weight_decay=0.01,
                schedule="cosine",
                clip=1.0,
                precision="bfloat16",
            ),
            assets={
                "data": Asset(name="Dolly's raw.jsonl", source="MiniLLM/dolly on the hub", licence="CC BY-SA 3.0 (databricks-dolly-15k)"),
                "teacher": Asset(
                    name="the fine-tuned teacher with its tokenizer", source="docs/paper-settings.md names it", licence="as its page says"
                ),
                "student": Asset(
                    name="the student's initial weights with their tokenizer",
                    source="docs/paper-settings.md names them",
                    licence="as their page says",
                ),
                "dolly": Asset(name="Dolly's test set", source="valid.jsonl of MiniLLM/dolly on the hub", licence="CC BY-SA 3.0"),
                "selfinst": Asset(name="SelfInst", source="valid.jsonl of MiniLLM/self-inst on the hub", licence="as its page says"),
                "vicuna": Asset(name="Vicuna's prompts", source="valid.jsonl of MiniLLM/Vicuna on the hub", licence="as its page says"),
                "sni": Asset(
                    name="Super-Natural Instructions", source="11_/valid.jsonl of MiniLLM/sinst on the hub", licence="as its page says"
                ),
                "uinst": Asset(
                    name="Unnatural Instructions", source="11_/valid.jsonl of MiniLLM/uinst on the hub", licence="as its page says"
                ),
            },
            metrics=["rougel", "rougel_dolly", "rougel_selfinst", "rougel_vicuna", "rougel_sni", "rougel_uinst"],
            requires=["transformers", "rouge_score"],
            options={
                "world": "instruct",
                "data_path": ["instruct/dolly/raw.jsonl"],
                "dolly_path": ["instruct/dolly/valid.jsonl"],
                "selfinst_path": ["instruct/self-inst/valid.jsonl"],
                "vicuna_path": ["instruct/vicuna/valid.jsonl"],
                "sni_path": ["instruct/sinst/11_/valid.jsonl"],
                "uinst_path": ["instruct/uinst/11_/valid.jsonl"],
                "teacher_path": ["instruct/teacher-gpt2-1.5B"],
                "student_path": ["instruct/init-gpt2-120M"],
                "held_out": 1000,
                "judged": 10000,
                "max_prompt": 256,
                "max_length": 512,
                "draws": 5,
                "together": 64,
                "samples": 1,
            },
        ),
        "markov-bytes": Setting(
            tier="analytic",
            summary="The chain of markov, its symbols spelled with one or two of 8 letters, and a student over letters that sees as far "
            "back as the chain: no token is shared, and texts correspond one to one.",
            budget=Budget(student_examples=9600, teacher_examples=19200),
            training=Training(batch_size=32, optimizer="adamw", learning_rate=0.005, schedule="cosine"),
            metrics=["text_kl"],
            options={
                "world": "markov_bytes",
                "chain": 0,
                "vocab": 16,
                "single": 5,
                "letters": 8,
                "order": 2,
                "spread": 2.0,
                "mean_length": 12,
                "length": 16,
                "prompts": 1024,
                "references": 256,
                "validation": 64,
                "samples": 1,
                "student": {"name": "window-lm", "arguments": {"vocab": 9, "order": 5, "width": 6}},
            },
        ),
    },
    variants={
        "markov-estimated": Variant(
            of="markov",
            metrics=["truth_kl", "kl", "reverse_kl"],
            summary="The teacher is a chain counted from 2,000 texts of the true one, so coming closer to it may lead away from the truth.",
            options={"teacher_texts": 2000, "smoothing": 0.1},
        ),
        "instruct-gpt2-medium": Variant(
            of="instruct-gpt2",
            summary="Instruction following on Dolly: GPT-2 XL (1.5B) teaches GPT-2 medium (340M), both fine-tuned on it.",
            options={"student_path": ["instruct/init-gpt2-340M"]},
        ),
        "instruct-opt": Variant(
            of="instruct-gpt2",
            summary="Instruction following on Dolly: OPT-2.7B teaches OPT-125M, both fine-tuned on it. The schedule is DistiLLM's.",
            options={"teacher_path": ["instruct/sft-opt-2.7B"], "student_path": ["instruct/init-opt-125M"]},
            training={"learning_rate": 0.00005},
        ),
        "markov-limited": Variant(
            of="markov",
            metrics=["truth_kl", "kl", "reverse_kl"],
            summary="The teacher is the best approximation of the true chain by logits of rank 10, so it falls short of the truth itself.",
            options={"teacher_rank": 10},
        ),
    },
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


def network(student: Student) -> LanguageModel:
    """The network of an exported student, in evaluation mode. Raises UserError where weights and architecture do not fit."""
    from distillbench.suites.language_modeling.nets import rebuild

    return rebuild(student)


SUITE = LanguageSuite(Worlds(__name__, ("markov", "markov_bytes", "instruct")), network)
