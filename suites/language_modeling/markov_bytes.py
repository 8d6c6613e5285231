"""A Markov chain over symbols that are spelled with letters, and a student that reads and writes letters.

The chain is that of :mod:`language_modeling.markov`. Some symbols have one letter and some two, and no spelling begins another,
so that text and symbols correspond one to one: distributions of texts can be compared exactly although the two models share no token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distillbench.errors import UserError
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.problems.language_modeling.oracle import LanguageOracle
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import Prompts, retokenise, retokenise_prompts
from distillbench.problems.language_modeling.tokenizers import Alphabet
from distillbench.runs.record import Measurement
from distillbench.runs.suite import JudgeContext, TrainContext
from distillbench.suites.language_modeling import markov
from distillbench.suites.language_modeling.markov import EOS


@dataclass(frozen=True, kw_only=True)
class Options(markov.Options):
    """Those of the chain, and how many of its ``letters`` are symbols alone."""

    single: int
    letters: int


def alphabets(vocab: int, single: int, letters: int) -> tuple[Alphabet, Alphabet]:
    """The letters, and ``vocab`` - 1 symbols spelled with them: the first ``single`` letters alone, then pairs.

    A pair begins with one of the other letters and ends with one of those, so where symbols begin can be seen from the middle of a text.

    Raises:
        UserError: there are too few letters for so many symbols.
    """
    signs = [bytes([ord("a") + i]) for i in range(letters)]
    pairs = [b"".join(p) for p in itertools.product(signs[single:], signs[:single])]
    wanted = vocab - 1 - single
    if not 0 < wanted <= len(pairs):
        raise UserError(f"{letters} letters, {single} of them symbols alone, do not spell {vocab - 1} symbols; give others")
    # spread over the pairs, so that all letters are used
    return Alphabet([b"", *signs], EOS), Alphabet([b"", *signs[:single], *(pairs[i * len(pairs) // wanted] for i in range(wanted))], EOS)


def _alphabets(options: Options) -> tuple[Alphabet, Alphabet]:
    return alphabets(options.vocab, options.single, options.letters)


def problem(ctx: TrainContext) -> LanguageModeling:
    """What a method gets: the problem of markov with every text in letters, and a teacher that answers in symbols."""
    options = ctx.options(Options)
    letters, symbols = _alphabets(options)
    found = markov.posed(ctx, options)
    begun = Prompts.of(found.validation.ids[:, : options.order].tolist(), symbols.digest, EOS)
    prompts, others = (retokenise_prompts(replace(p, tokenizer=symbols.digest), symbols, letters) for p in (found.prompts, begun))
    references, validation = (replace(texts, tokenizer=symbols.digest) for texts in (found.references, found.validation))
    return replace(
        found,
        teacher=LanguageOracle(
            found.teacher.module, tokenizer=symbols.digest, vocab=symbols.vocab, eos=EOS, seed=ctx.seeds["teacher"], cache=ctx.cache
        ),
        prompts=prompts,
        references=retokenise(references, symbols, letters, prompts),
        validation=retokenise(validation, symbols, letters, others),
        vocab=letters.vocab,
        length=found.length * max(map(len, symbols.spellings)),
        tokenizer=letters,
        teacher_tokenizer=symbols,
        teacher_length=found.length,
    )


def text_kl(p: Tensor, q: Tensor, start: Tensor, length: int, spelled: Sequence[Sequence[int]]) -> float:
    """KL of the distribution of whole texts of ``length`` symbols at most under p to that under q, nats per symbol of p's texts; exact.

    The two share the text and no token, so the state of a text is what both can see of it: p's context and q's window. By the chain
    rule KL is a sum over the symbols, and q's probability of a symbol is the product of those of its letters.

    Args:
        p: (V ** order, V) distributions of the next symbol.  start: (V ** order,) the distribution of the contexts that texts begin with.
        q: (K ** window, K) distributions of the next letter; letter 0 is also what is before the text.
        spelled: the letters of each symbol; those of the end of sequence, symbol 0, are its end of sequence.
    """
    (contexts, vocab), (windows, kinds) = p.shape, q.shape
    # what a symbol does to a window: its letters come in at the end
    scale = torch.tensor([kinds ** len(s) for s in spelled])
    value = torch.tensor([sum(t * kinds**i for i, t in enumerate(reversed(s))) for s in spelled])
    log_q = q.clamp(min=1e-300).log()
    of_symbol = torch.zeros(windows, vocab, dtype=torch.float64)
    for column, tokens in enumerate(spelled):
        window = torch.arange(windows)
        for token in tokens:
            of_symbol[:, column] += log_q[window, token]
            window = (window * kinds + token) % windows
    context = start.nonzero().squeeze(1)
    weight, window = start[context].double(), torch.zeros_like(context)
    unit = contexts // vocab
    while unit:
        symbol = context // unit % vocab
        window = (window * scale[symbol] + value[symbol]) % windows
        unit //= vocab
    total, count = 0.0, 0.0
    others = torch.tensor([s for s in range(vocab) if s != EOS])
    for _ in range(length):
        distribution = p[context]
        gap = torch.where(distribution > 0, distribution * (distribution.clamp(min=1e-300).log() - of_symbol[window]), 0.0).sum(1)
        total, count = total + float((weight * gap).sum()), count + float(weight.sum())
        context = (context[:, None] * vocab + others) % contexts
        window = (window[:, None] * scale[others] + value[others]) % windows
        state, where = torch.unique((context * windows + window).flatten(), return_inverse=True)
        flow = (weight[:, None] * distribution[:, others]).flatten()
        weight = torch.zeros(len(state), dtype=torch.float64).index_add_(0, where, flow)
        context, window = state // windows, state % windows
    return total / count


def measure(net: LanguageModel, ctx: JudgeContext) -> list[Measurement]:
    """The exact metric, of a student over letters or, as the teacher is, over symbols.

    Raises:
        UserError: the student's vocabulary is neither, or it looks further back than the setting's students do.
    """
    options = ctx.options(Options)
    letters, symbols = _alphabets(options)
    found, order = markov.chains(options, ctx.split), options.order
    size = len(net.head[0])
    if size == symbols.vocab:
        q, spelled = markov.distributions(net, symbols.vocab, order), [[i] for i in range(symbols.vocab)]
    elif size == letters.vocab:
        q = markov.distributions(net, letters.vocab, max(map(len, symbols.spellings)) * (order + 1) - 1)
        spelled = [[EOS] if i == EOS else letters.encode(s) for i, s in enumerate(symbols.spellings)]
    else:
        raise UserError(f"a student of {size} tokens is judged here neither over {letters.vocab} letters nor over {symbols.vocab} symbols")
    p = markov.distributions(found.teacher, symbols.vocab, order)
    return [Measurement("text_kl", text_kl(p, q, found.start, found.length, spelled), 1)]
