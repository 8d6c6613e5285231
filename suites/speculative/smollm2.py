"""The embedded setting: SmolLM2-135M-Instruct answers questions, and a draft of its first layers learns to guess what it will say."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distillbench.assets import cache_folder, made
from distillbench.code import digest_of
from distillbench.errors import UserError
from distillbench.identity import derive_seed
from distillbench.problems.language_modeling import models as language_models
from distillbench.problems.language_modeling.files import tokenizer_digest
from distillbench.problems.language_modeling.models import LanguageModel, TransformersLM
from distillbench.problems.language_modeling.oracle import LanguageOracle
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import Prompts, Texts
from distillbench.runs.record import Measurement
from distillbench.runs.suite import Context, JudgeContext, TrainContext
from distillbench.training.nets import Architecture

TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # the model's own chat format, without its default system prompt


@dataclass(frozen=True)
class Options:
    """The draft, and the questions.

    Attributes:
        layers: of the target that the draft starts as.  prompt_length, length: tokens of a prompt and of a response, at most.
        test, tune, validation: questions of these splits; the others are trained on.
        samples, top_k: responses of the target to a prompt, and how many of its probabilities per token are kept.
        timed, timed_length: prompts that the clock runs on, and tokens of their responses.  gamma: proposals per block.
    """

    layers: tuple[int, ...]
    prompt_length: int
    length: int
    test: int
    tune: int
    validation: int
    samples: int
    top_k: int
    timed: int
    timed_length: int
    gamma: int


def model_folder(ctx: Context) -> Path:
    """The target in transformers' format, converted once from the pinned GGUF file.

    Raises:
        UserError: the file is not here, or is another one.
    """
    gguf = ctx.locate("teacher")
    pinned = ctx.setting.assets["teacher"].sha256
    name = f"{pinned}-{digest_of(language_models.__name__)[:16]}"  # the bytes it comes from, and the code that converts
    return made(cache_folder() / "models" / name, lambda folder: _convert(gguf, folder))


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to float32. transformers refuses to save what it read from a GGUF file, so the weights move to a plain model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    language_models.adopt(loaded).causal().save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def questions(ctx: Context) -> list[tuple[str, str]]:
    """Questions and worked answers, in the file's order: the question alone, without its options.

    Raises:
        UserError: the file is not here, or is another one.
    """
    found = []
    for _, text in sorted(json.loads(ctx.locate("data").read_text(encoding="utf-8")).items()):
        for part in text.split("\n\nQ: ")[1:]:
            question, _, answer = part.partition("\nA: Let's think step by step. ")
            stem = re.split(r"\s\(A\)", question)[0].strip()
            answer = re.sub(r"^We refer to Wikipedia articles on [^.]* for help\.(\s*Let.s solve this problem step by step\.)?", "", answer)
            if answer.strip():
                found.append((stem, answer.strip()))
    return found


def splits(ctx: Context) -> tuple[Any, dict[str, list[tuple[list[int], list[int]]]]]:
    """The tokenizer, and prompts with references as token ids, by split: ``train``, ``validation``, ``tune`` and ``test``.

    The split is fixed by the setting, not by a run's seed; a question is in one of them only, and questions asked twice are taken once.
    """
    options = ctx.options(Options)
    tokenizer = language_models.load_tokenizer(str(model_folder(ctx)))
    pairs: dict[str, tuple[list[int], list[int]]] = {}
    for question, answer in questions(ctx):
        prompt = tokenizer(TURN.format(question))["input_ids"]
        reference = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        if len(prompt) <= options.prompt_length:
            pairs.setdefault(question, (prompt, reference[: options.length]))
    listed = list(pairs.values())
    order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(derive_seed("split", 0))).tolist()
    parts, begin = {}, 0
    for name, count in (("test", options.test), ("tune", options.tune), ("validation", options.validation)):
        parts[name] = [listed[i] for i in order[begin : begin + count]]
        begin += count
    parts["train"] = [listed[i] for i in order[begin:]]
    return tokenizer, parts


def problem(ctx: TrainContext) -> LanguageModeling:
    """What a method gets: the training questions, their references, the real target, and its first layers as the draft."""
    options, seeds = ctx.options(Options), ctx.seeds
    tokenizer, parts = splits(ctx)
    digest = tokenizer_digest(tokenizer)
    target = language_models.load(str(model_folder(ctx)))
    eos, vocab = int(tokenizer.eos_token_id), len(tokenizer)
    texts = {k: _texts(parts[k], digest, eos) for k in ("train", "validation")}  # nothing that is judged stays

    def build(architecture: Architecture, /, *, seed: int = seeds["init"]) -> TransformersLM:
        return _inherit(language_models.build(architecture, seed), target, options.layers)

    config = {**target.config, "num_hidden_layers": len(options.layers)}
    prompts, references = texts["train"]
    return LanguageModeling(
        setting=ctx.name,
        student=build(Architecture("transformers", {"config": config})),
        build=build,
        teacher=LanguageOracle(
            target, tokenizer=digest, vocab=vocab, eos=eos, seed=seeds["teacher"], cache=cache_folder(), top_k=options.top_k
        ),
        prompts=prompts,
        references=references,
        validation=texts["validation"][1],
        vocab=vocab,
        eos=eos,
        length=options.length,
        samples=options.samples,
        batch_size=ctx.setting.training.batch_size,
        order=seeds["order"],
    )


def _texts(pairs: list[tuple[list[int], list[int]]], digest: str, eos: int) -> tuple[Prompts, Texts]:
    prompts = Prompts.of([p for p, _ in pairs], digest, eos)
    return prompts, prompts.with_responses([r for _, r in pairs], pad=eos)


def _inherit(draft: TransformersLM, target: TransformersLM, layers: Sequence[int]) -> TransformersLM:
    """Give ``draft`` the target's embeddings (frozen: they are the projection as well), chosen layers and last norm."""
    theirs = dict(target.body.state_dict())
    names = {f"layers.{new}.": f"layers.{old}." for new, old in enumerate(layers)}
    weights = {}
    for name in draft.body.state_dict():
        prefix = next((p for p in names if name.startswith(p)), None)
        weights[name] = theirs[name if prefix is None else names[prefix] + name.removeprefix(prefix)].clone()
    draft.body.load_state_dict(weights)
    draft.body.get_input_embeddings().weight.requires_grad_(False)
    return draft


def measure(net: LanguageModel, ctx: JudgeContext) -> list[Measurement]:
    """Judge a draft on texts that the target sampled for the split's questions: the same ones for every method and seed.

    Wall-clock speed is measured with transformers' assisted generation, on a few of them.

    Raises:
        UserError: the student is no transformers model of the target's vocabulary, or decoding with it is not lossless.
    """
    from distillbench.suites.speculative.decoding import measured_speedup
    from distillbench.suites.speculative.judge import judge

    options = ctx.options(Options)
    tokenizer, parts = splits(ctx)
    target = language_models.load(str(model_folder(ctx)))
    if not isinstance(net, TransformersLM) or net.head[0].shape[0] != target.head[0].shape[0]:
        raise UserError(f"a draft of this setting is a transformers model over {target.head[0].shape[0]} tokens, the target's")
    eos, vocab = int(tokenizer.eos_token_id), len(tokenizer)
    prompts, _ = _texts(parts[ctx.split], tokenizer_digest(tokenizer), eos)
    oracle = LanguageOracle(
        target, tokenizer=prompts.tokenizer, vocab=vocab, eos=eos, seed=derive_seed("judge", ctx.seeds["teacher"]), cache=cache_folder()
    )
    texts = oracle.responses(prompts, samples=1, length=options.length, role=f"judge {ctx.split}")
    found = judge(target, net, texts, vocab=vocab)
    timed = prompts.take(torch.arange(options.timed))
    return [
        *found,
        *measured_speedup(target, copy.deepcopy(net), timed, length=options.timed_length, gamma=options.gamma, eos=eos),
    ]
