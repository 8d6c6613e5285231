"""The paper setting: draft models of a chat model, judged on the six subsets of Spec-Bench.

Followed here: Xia et al. 2024 (arXiv 2401.07851; hemingkx/Spec-Bench at fd2c1cd). Questions are its ``question.jsonl``: question_id,
category and turns. Only the first turn of a question is asked, so that every draft is judged on the same texts; the authors go on with
the second turn of MT-bench behind whatever was answered to the first.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distillbench.errors import UserError, unknown
from distillbench.problems.language_modeling.files import Vocabulary, json_lines, load_pair
from distillbench.problems.language_modeling.models import TransformersLM, load
from distillbench.problems.language_modeling.oracle import LanguageOracle
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import Prompts, Texts
from distillbench.runs.record import Measurement
from distillbench.runs.suite import Context, JudgeContext, TrainContext

SUBSETS = {
    "mt_bench": ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"),
    "translation": ("translation",),
    "summarization": ("summarization",),
    "qa": ("qa",),
    "math_reasoning": ("math_reasoning",),
    "rag": ("rag",),
}


@dataclass(frozen=True)
class Options:
    """The protocol.

    Attributes:
        template: what a question stands in, at ``{turn}``.  max_prompt, length: tokens of a prompt and of a response, at most.
        temperature: that the target samples at.  gamma: proposals per block.  timed: prompts of each subset that the clock runs on.
        tuning, validation: prompts of the training file that the split tune judges, and that are held out.
        samples: responses of the target to a prompt.
    """

    template: str
    max_prompt: int
    length: int
    temperature: float
    gamma: int
    timed: int
    tuning: int
    validation: int
    samples: int


@dataclass(frozen=True)
class Example:
    """What a user asks first, and the answer to it where there is one."""

    prompt: str
    response: str | None


def load_questions(path: Path) -> dict[str, list[str]]:
    """The first turns of Spec-Bench's questions by subset, in the file's order; MT-bench's eight categories are one subset.

    Raises:
        UserError: the file is missing or of another form, has a category of no subset, or no question of one.
    """
    subset = {category: name for name, categories in SUBSETS.items() for category in categories}
    found: dict[str, list[str]] = {name: [] for name in SUBSETS}
    for row in json_lines(path, {"category": str, "turns": list}):
        if row["category"] not in subset:
            raise unknown("category", row["category"], subset, f"in {path}")
        if not row["turns"] or not isinstance(row["turns"][0], str):
            raise UserError(f"{path}: question {row.get('question_id')}: turns must begin with a text")
        found[subset[row["category"]]].append(row["turns"][0])
    empty = [name for name, prompts in found.items() if not prompts]
    if empty:
        raise UserError(f"{path}: has no question of {', '.join(empty)}; the whole question.jsonl of Spec-Bench is wanted")
    return found


def load_examples(path: Path) -> list[Example]:
    """Prompts to train on, one JSON object a line, each prompt once.

    A line is ``{"prompt": ..., "response": ...}``, where the response may be missing, or has ShareGPT's form
    ``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}``, of which the first two are taken;
    conversations that do not begin with a human are passed over.

    Raises:
        UserError: the file is missing, of another form, or holds no prompt.
    """
    found: dict[str, Example] = {}
    for row in json_lines(path, {}):
        example = _conversation(row["conversations"]) if isinstance(row.get("conversations"), list) else _example(row, path)
        if example is not None and example.prompt.strip():
            found.setdefault(example.prompt, example)
    if not found:
        raise UserError(f"{path}: no line holds what a user asks first")
    return list(found.values())


def _example(row: Mapping[str, Any], path: Path) -> Example:
    prompt, response = row.get("prompt"), row.get("response")
    if not isinstance(prompt, str) or not isinstance(response, str | None):
        raise UserError(
            f"{path}: a line has the fields {', '.join(sorted(row)) or 'none'}; a prompt (and a response) are wanted as texts, "
            f"or conversations as ShareGPT has them"
        )
    return Example(prompt, response)


def _conversation(turns: Sequence[Any]) -> Example | None:
    said = [(t.get("from"), t.get("value")) for t in turns[:2] if isinstance(t, dict)]
    if not said or said[0][0] not in ("human", "user") or not isinstance(said[0][1], str):
        return None
    answered = len(said) > 1 and said[1][0] in ("gpt", "assistant") and isinstance(said[1][1], str)
    return Example(said[0][1], said[1][1] if answered else None)


def training(ctx: Context) -> tuple[list[Example], list[Example], list[str]]:
    """Examples to train on, examples for validation, and prompts that the split for tuning judges; none is a question of Spec-Bench.

    Raises:
        UserError: a file is missing or of another form, or too short.
    """
    path, options = ctx.place("data"), ctx.options(Options)
    questions = {q for subset in load_questions(ctx.place("questions")).values() for q in subset}
    examples = [e for e in load_examples(path) if e.prompt not in questions]
    tuning, held = options.tuning, options.tuning + options.validation
    if len(examples) <= held:
        raise UserError(f"{path}: has {len(examples)} prompts, and the first {held} are held out of training")
    return examples[held:], examples[tuning:held], [e.prompt for e in examples[:tuning]]


def pool(prompts: Sequence[str], vocabulary: Vocabulary, options: Options) -> Prompts:
    """Prompts in the chat model's template as tokens. Of more than ``max_prompt`` tokens the first and last halves are kept.

    What the tokenizer puts before a text by itself is there too, as in the authors' code.
    """
    most = options.max_prompt
    tokens = []
    for prompt in prompts:
        ids = vocabulary.ids(options.template.replace("{turn}", prompt), special=True)
        tokens.append(ids if len(ids) <= most else ids[: most // 2] + ids[-(most - most // 2) :])
    return Prompts.of(tokens, vocabulary.digest, vocabulary.eos)


def references(prompts: Prompts, examples: Sequence[Example], vocabulary: Vocabulary, length: int) -> Texts:
    """The responses that ``examples`` have, behind their prompts, cut at ``length`` tokens; it may be none."""
    rows = [i for i, e in enumerate(examples) if e.response is not None]
    if not rows:
        none = torch.zeros(0, 1, dtype=torch.int64)
        return Texts.join(prompts, none[:, 0], none, none.bool())
    responses = [[*vocabulary.ids(examples[i].response or ""), vocabulary.eos][:length] for i in rows]
    return prompts.with_responses(responses, torch.tensor(rows), pad=vocabulary.eos)


def problem(ctx: TrainContext) -> LanguageModeling:
    """What a method gets: the user's prompts, the target as the teacher, the draft as the student.

    Raises:
        UserError: something is missing, of another form, or does not fit together; says what.
    """
    from distillbench.suites.language_modeling.nets import build

    train, held, _ = training(ctx)
    options, pair = ctx.options(Options), load_pair(ctx.place("teacher"), ctx.place("student"))
    rows = [m.head[0].shape[0] for m in (pair.teacher, pair.student)]
    if rows[0] != rows[1]:
        raise UserError(
            f"{ctx.place('student')}: its projection has {rows[1]} rows and the target's {rows[0]}; "
            f"the library's assisted decoding, which the clock runs, needs as many (resize_token_embeddings pads them)"
        )
    vocabulary, length = pair.vocabulary, options.length
    prompts = pool([e.prompt for e in train], vocabulary, options)
    return LanguageModeling(
        setting=ctx.name,
        student=pair.student,
        build=functools.partial(build, seed=ctx.seeds["init"]),
        teacher=_oracle(pair.teacher, vocabulary, ctx.seeds, ctx.cache),
        prompts=prompts,
        references=references(prompts, train, vocabulary, length),
        validation=references(pool([e.prompt for e in held], vocabulary, options), held, vocabulary, length),
        vocab=vocabulary.size,
        eos=vocabulary.eos,
        length=length,
        samples=options.samples,
        batch_size=ctx.setting.training.batch_size,
        order=ctx.seeds["order"],
    )


def _oracle(target: TransformersLM, vocabulary: Vocabulary, seeds: Mapping[str, int], cache: Path | None) -> LanguageOracle:
    return LanguageOracle(
        target, tokenizer=vocabulary.digest, vocab=vocabulary.size, eos=vocabulary.eos, seed=seeds["teacher"], cache=cache
    )


def measure(net: TransformersLM, ctx: JudgeContext) -> list[Measurement]:
    """The judge's metrics over all questions, the acceptance on each subset, and the measured speed-up.

    The target answers every question once, and these texts are the same for every draft and seed. On the split for tuning they answer
    held-out prompts of the training file, which have no subsets. The clock runs on the first ``timed`` prompts of each subset.

    Raises:
        UserError: a file is missing, or the draft's projection is smaller than the vocabulary.
    """
    from distillbench.suites.speculative.decoding import measured_speedup
    from distillbench.suites.speculative.judge import judge

    options, folder = ctx.options(Options), ctx.place("teacher")
    vocabulary, length, temperature = Vocabulary.of(folder), options.length, options.temperature
    if net.head[0].shape[0] < vocabulary.size:
        raise UserError(f"the draft's projection has {net.head[0].shape[0]} rows; the target's tokenizer has {vocabulary.size} entries")
    tuning = ctx.split == "tune"
    asked = {"held_out": training(ctx)[2]} if tuning else load_questions(ctx.place("questions"))
    target, draft = load(str(folder)).to(ctx.device), net.to(ctx.device)
    prompts = pool([q for questions in asked.values() for q in questions], vocabulary, options)
    texts = _oracle(target, vocabulary, ctx.seeds, None).responses(
        prompts, samples=1, length=length, temperature=temperature, role="questions"
    )
    found = judge(target, draft, texts, vocab=vocabulary.size, temperature=temperature)
    begin, timed = 0, []
    for name, questions in asked.items():
        rows = torch.arange(begin, begin + len(questions))
        begin += len(questions)
        timed += rows[: options.timed].tolist()
        if not tuning:
            of_subset = judge(target, draft, texts.some(rows), vocab=vocabulary.size, temperature=temperature, gammas=[1])
            found += [Measurement(f"acceptance_{name}", m.value, m.n, m.examples) for m in of_subset if m.metric == "acceptance"]
    clock = prompts.take(torch.tensor(timed))
    return [*found, *measured_speedup(target, draft, clock, length=length, gamma=options.gamma, eos=vocabulary.eos)]
