"""The paper settings: instruction following on Dolly, judged by ROUGE-L on five test sets, as MiniLLM and DistiLLM have it.

Followed here: Gu et al. 2023 (arXiv 2306.08543; microsoft/LMOps at 4f2a9de, folder minillm) and Ko et al. 2024 (arXiv 2402.03898).
Files are theirs: ``raw.jsonl`` of Dolly with instruction, input and output, and test sets with prompt and output. Dolly's first
thousand lines are held out of training; half of them are judged on the split ``tune``, the others are the problem's validation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distillbench.errors import UserError
from distillbench.identity import derive_seed
from distillbench.problems.language_modeling.files import Vocabulary, json_lines, load_pair
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.problems.language_modeling.oracle import LanguageOracle
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.sampling import respond
from distillbench.problems.language_modeling.texts import Prompts, Texts
from distillbench.runs.record import Measurement
from distillbench.runs.suite import Context, JudgeContext, TrainContext
from distillbench.suites.language_modeling.nets import build
from distillbench.suites.language_modeling.rouge import rouge_l

SETS = ("dolly", "selfinst", "vicuna", "sni", "uinst")
INTRODUCTION = "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request.\n\n"
MORE = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Options:
    """The protocol.

    Attributes:
        held_out: lines of Dolly that are not trained on.  judged: prompts of each test set, at most.
        max_prompt, max_length: tokens of a prompt, and of a prompt with its response.
        draws: responses whose scores a prompt's value is the mean of.  together: prompts answered at once.
        samples: responses of the teacher to a prompt.
    """

    held_out: int
    judged: int
    max_prompt: int
    max_length: int
    draws: int
    together: int
    samples: int


@dataclass(frozen=True)
class Example:
    """A prompt as the model sees it, and the responses that are right."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Dolly:
    """The lines of Dolly by what they are for; no prompt is in two of them, and none of ``train`` is judged."""

    train: list[Example]
    validation: list[Example]
    tuning: list[Example]


def template(instruction: str, given: str) -> str:
    """The prompt for an instruction and what it is given, which may be empty: Alpaca's, that both papers use."""
    task = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
    return INTRODUCTION.format(more=MORE if given else "") + task + "### Response:\n"


def dolly(ctx: Context) -> Dolly:
    """Dolly's lines, the held-out ones first in the file, as the authors split it.

    A training line whose prompt is judged or held out is left out, which the authors' code does not look at.

    Raises:
        UserError: a file is missing or of another form, or too short to train on.
    """
    path, held = ctx.place("data"), ctx.options(Options).held_out
    rows = json_lines(path, {"instruction": str, "output": str})
    examples = [Example(template(r["instruction"], str(r.get("input") or "")), (r["output"],)) for r in rows]
    judged = {e.prompt for e in judged_set(ctx, "dolly")}
    kept = [e for e in dict.fromkeys(examples[:held]) if e.prompt not in judged]
    apart = judged | {e.prompt for e in kept}
    train = [e for e in examples[held:] if e.prompt not in apart]
    tuning = kept[0::2]
    tuned = {e.prompt for e in tuning}
    validation = [e for e in kept[1::2] if e.prompt not in tuned]
    if not train or not validation:
        raise UserError(f"{path}: has {len(rows)} lines, and the first {held} are held out of training; put the whole raw.jsonl there")
    return Dolly(train, validation, tuning)


def judged_set(ctx: Context, name: str) -> list[Example]:
    """The prompts of a test set with their references, as many as the protocol judges.

    Raises:
        UserError: the file is missing or of another form.
    """
    path = ctx.place(name)
    found = []
    for row in json_lines(path, {"prompt": str, "output": (str, list)})[: ctx.options(Options).judged]:
        references = row["output"] if isinstance(row["output"], list) else [row["output"]]
        if not references or not all(isinstance(r, str) for r in references):
            raise UserError(f"{path}: output of the prompt {row['prompt'][:60]!r} must be a text or a list of texts, not empty")
        found.append(Example(row["prompt"].replace("<n>", "\n"), tuple(references)))
    return found


def texts(examples: Sequence[Example], vocabulary: Vocabulary, options: Options, where: Path) -> tuple[Prompts, Texts]:
    """Prompts as tokens, and with their first reference behind them, cut at ``max_length`` in all.

    Prompts of more than ``max_prompt`` tokens are left out. Prompt and response are tokenised as one text, as the authors do.

    Raises:
        UserError: no prompt is short enough.
    """
    prompts, responses = [], []
    for example in examples:
        ids = vocabulary.ids(example.prompt)
        if len(ids) <= options.max_prompt:
            whole = [*vocabulary.ids(example.prompt + example.references[0]), vocabulary.eos]
            prompts.append(ids)
            responses.append(whole[len(ids) : options.max_length])
    if not prompts:
        raise UserError(f"{where}: none of {len(examples)} prompts has {options.max_prompt} tokens or fewer")
    pool = Prompts.of(prompts, vocabulary.digest, vocabulary.eos)
    return pool, pool.with_responses(responses, pad=vocabulary.eos)


def problem(ctx: TrainContext) -> LanguageModeling:
    """What a method gets: Dolly's prompts and references, the fine-tuned teacher, and the student as it starts.

    What the judge will need is looked for now, and not after days of training.

    Raises:
        UserError: something is missing, of another form, or does not fit together; says what.
    """
    options, seeds = ctx.options(Options), ctx.seeds
    for one in SETS:
        judged_set(ctx, one)
    lines, pair = dolly(ctx), load_pair(ctx.place("teacher"), ctx.place("student"))
    vocabulary = pair.vocabulary
    prompts, references = texts(lines.train, vocabulary, options, ctx.place("data"))
    _, validation = texts(lines.validation, vocabulary, options, ctx.place("data"))
    return LanguageModeling(
        setting=ctx.name,
        student=pair.student,
        build=functools.partial(build, seed=seeds["init"]),
        teacher=LanguageOracle(
            pair.teacher, tokenizer=vocabulary.digest, vocab=vocabulary.size, eos=vocabulary.eos, seed=seeds["teacher"], cache=ctx.cache
        ),
        prompts=prompts,
        references=references,
        validation=validation,
        vocab=vocabulary.size,
        eos=vocabulary.eos,
        length=options.max_length - options.max_prompt,
        samples=options.samples,
        batch_size=ctx.setting.training.batch_size,
        order=seeds["order"],
    )


def measure(net: LanguageModel, ctx: JudgeContext) -> list[Measurement]:
    """ROUGE-L of sampled responses: on the five test sets, or on Dolly's held-out prompts alone where the split is for tuning.

    Every prompt's value is the mean over the card's number of draws; ``rougel`` is the mean over the sets, whatever their sizes.

    Raises:
        UserError: a file is missing, or the student's projection is smaller than the vocabulary.
    """
    vocabulary = Vocabulary.of(ctx.place("teacher"))
    if net.head[0].shape[0] < vocabulary.size:
        raise UserError(f"the student's projection has {net.head[0].shape[0]} rows; the setting's tokenizer has {vocabulary.size} entries")
    net = net.to(ctx.device)
    tuning = ctx.split == "tune"
    judged = {"dolly": dolly(ctx).tuning} if tuning else {name: judged_set(ctx, name) for name in SETS}
    found = [
        Measurement.mean(
            f"rougel_{name}", scores(net, examples, vocabulary, ctx.options(Options), derive_seed(name, ctx.seeds["evaluation"]))
        )
        for name, examples in judged.items()
    ]
    return [Measurement("rougel", math.fsum(m.value for m in found) / len(found), sum(m.n for m in found)), *found]


def scores(net: LanguageModel, examples: Sequence[Example], vocabulary: Vocabulary, options: Options, seed: int) -> list[float]:
    """ROUGE-L of each prompt, the mean over ``draws`` responses sampled at temperature 1. Every model gets the same random numbers.

    A prompt of more than ``max_prompt`` tokens loses its end, as in the authors' evaluation.
    """
    tokens = [vocabulary.ids(e.prompt)[: options.max_prompt] for e in examples]
    prompts = Prompts.of(tokens, vocabulary.digest, vocabulary.eos)
    length, draws = options.max_length - options.max_prompt, options.draws
    total = [0.0] * len(examples)
    for draw in range(draws):
        uniforms = torch.rand(len(prompts), length, generator=torch.Generator().manual_seed(derive_seed(f"draw {draw}", seed)))
        answers: list[str] = []
        for rows in torch.arange(len(prompts)).split(options.together):
            ids, real = respond(net, prompts.take(rows), uniforms[rows], eos=vocabulary.eos, vocab=vocabulary.size)
            answers += [vocabulary.text(i[r].tolist()).replace("<n>", "\n").strip() for i, r in zip(ids, real, strict=True)]
        for i, score in enumerate(rouge_l(answers, [e.references for e in examples])):
            total[i] += score / draws
    return total
