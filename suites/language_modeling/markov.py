"""The analytic settings: a Markov chain is the teacher. Every distribution is a table, so divergences of whole texts are exact sums."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distillbench.errors import UserError
from distillbench.identity import derive_seed, sha256
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.problems.language_modeling.oracle import LanguageOracle
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.sampling import respond
from distillbench.problems.language_modeling.texts import Prompts, Texts
from distillbench.runs.record import Measurement
from distillbench.runs.suite import Context, JudgeContext, TrainContext
from distillbench.suites.language_modeling.nets import Chain, Windowed, build
from distillbench.training.nets import Architecture

EOS = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """The chain, its texts, and what there is of them.

    Attributes:
        chain: which of all that may be drawn.  vocab: tokens, the end of sequence among them.  order: tokens that the next one depends on.
        spread: standard deviation of the logits.  mean_length, length: of responses in tokens, expected without a limit and at most.
        prompts: of which ``references`` have a response of the truth.  validation: responses apart.
        samples: responses of the teacher to a prompt.
        teacher_texts: the teacher is estimated from so many texts, each count raised by ``smoothing``; 0: the truth teaches.
        teacher_rank: the teacher is the truth's best approximation by logits of this rank; 0: the truth teaches.
    """

    chain: int
    vocab: int
    order: int
    spread: float
    mean_length: float
    length: int
    prompts: int
    references: int
    validation: int
    samples: int
    teacher_texts: int = 0
    smoothing: float = 0.0
    teacher_rank: int = 0
    student: Architecture = field(hash=False)


@dataclass(frozen=True)
class Chains:
    """The chain that is the truth, the teacher, and where texts begin.

    Attributes:
        truth: the chain that data come from.  teacher: what is distilled: the truth itself, or a chain estimated from it.
        start: (V ** order,) the distribution of prompts, which are contexts without the end of sequence; it sums to 1.
        length: tokens of a response at most.
    """

    truth: Chain
    teacher: Chain
    start: Tensor
    length: int


@functools.lru_cache(maxsize=8)
def chains(options: Options, split: str) -> Chains:
    """The chains of a split: hyper-parameters are tuned on another one than the one reported.

    They are made once and shared by all who only look at them: a limited teacher takes a second to fit.
    """
    vocab, order = options.vocab, options.order
    generator = torch.Generator().manual_seed(derive_seed(f"markov {split}", options.chain))
    logits = options.spread * torch.randn(vocab**order, vocab, generator=generator, dtype=torch.float64)
    logits[:, EOS] = -math.inf
    ends = 1 / options.mean_length
    distribution = (1 - ends) * logits.softmax(1)
    distribution[:, EOS] = ends
    start = torch.rand(vocab**order, generator=generator, dtype=torch.float64)
    index = torch.arange(vocab**order)
    for i in range(order):
        start[(index // vocab**i) % vocab == EOS] = 0
    truth = _chain(distribution.log(), vocab, order)
    found = Chains(truth, truth, start / start.sum(), options.length)
    if options.teacher_texts:
        return replace(found, teacher=_estimated(found, options, split))
    if options.teacher_rank:
        return replace(found, teacher=_chain(limited(distribution, found.start, found.length, options.teacher_rank), vocab, order))
    return found


def limited(distribution: Tensor, start: Tensor, length: int, rank: int) -> Tensor:
    """Log-probabilities (V ** order, V) nearest to ``distribution`` whose logits have rank ``rank`` beside a bias: the best teacher of a
    limited width.

    Nearest by the exact KL of whole texts, as far as L-BFGS gets from the truncated singular values of the weighted log-probabilities (the
    problem is not convex). Nothing is sampled: a distribution has one such approximation. From rank V - 1 on, it is exact.
    """
    if rank >= distribution.shape[1] - 1:
        return distribution.log()
    weight = visits(distribution, start, length)
    seen = weight > 0
    weight, target = weight[seen] / weight.sum(), distribution[seen]
    # Contexts that no text reaches keep the bias alone.
    logits = target.log()
    bias = (weight[:, None] * logits).sum(0)
    u, s, v = torch.linalg.svd(weight.sqrt()[:, None] * (logits - bias), full_matrices=False)
    left = (u[:, :rank] * s[:rank] / weight.sqrt()[:, None]).contiguous().requires_grad_()
    right, bias = v[:rank].contiguous().requires_grad_(), bias.requires_grad_()
    solver = torch.optim.LBFGS([left, right, bias], max_iter=500, history_size=20, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def cross_entropy() -> Tensor:
        solver.zero_grad()
        loss: Tensor = -(weight[:, None] * target * (left @ right + bias).log_softmax(1)).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(cross_entropy)
    fitted = bias.detach().log_softmax(0).repeat(len(distribution), 1)
    fitted[seen] = (left @ right + bias).detach().log_softmax(1)
    return fitted


def _chain(log_probs: Tensor, vocab: int, order: int) -> Chain:
    net = build(Architecture("chain", {"vocab": vocab, "order": order}), 0)
    assert isinstance(net, Chain)
    net.load_state_dict({"log_law": log_probs.float()})
    return net.eval().requires_grad_(False)


def _estimated(found: Chains, options: Options, split: str) -> Chain:
    """A chain counted from ``teacher_texts`` texts of the truth, each count raised by ``smoothing``."""
    truth = found.truth
    counts = torch.full((truth.vocab**truth.order, truth.vocab), options.smoothing, dtype=torch.float64)
    seed = derive_seed(f"teacher texts {split}", options.chain)
    texts = draw(found, truth, starts(found, options.teacher_texts, derive_seed("prompts", seed)), seed)
    batch = texts.take(torch.arange(len(texts)))
    states = batch.predicted.take(truth(batch.ids, batch.attention)).argmax(1)
    counts.index_put_((states, batch.predicted.labels), torch.ones(len(states), dtype=torch.float64), accumulate=True)
    return _chain((counts / counts.sum(1, keepdim=True)).log(), truth.vocab, truth.order)


def starts(found: Chains, count: int, seed: int) -> Prompts:
    """``count`` prompts from their distribution; each is a context of the chain."""
    index = torch.multinomial(found.start, count, replacement=True, generator=torch.Generator().manual_seed(seed))
    vocab, order = found.truth.vocab, found.truth.order
    tokens = torch.stack([(index // vocab**i) % vocab for i in reversed(range(order))], 1)
    return Prompts.of(tokens.tolist(), tokenizer(vocab), EOS)


def tokenizer(vocab: int) -> str:
    """The identity of the chain's alphabet."""
    return sha256(f"markov alphabet of {vocab}".encode())


def draw(found: Chains, model: LanguageModel, prompts: Prompts, seed: int) -> Texts:
    """One response of ``model`` to every prompt."""
    uniforms = torch.rand(len(prompts), found.length, generator=torch.Generator().manual_seed(seed))
    ids, real = respond(model, prompts, uniforms, eos=EOS)
    return Texts.join(prompts, torch.arange(len(prompts)), ids, real)


def of(ctx: Context, split: str) -> Chains:
    """The chains of a context's setting."""
    return chains(ctx.options(Options), split)


def problem(ctx: TrainContext) -> LanguageModeling:
    """What a method gets: prompts, references to some of them, the chain as the teacher."""
    return posed(ctx, ctx.options(Options))


def posed(ctx: TrainContext, options: Options) -> LanguageModeling:
    """The problem of a chain."""
    seeds, found = ctx.seeds, chains(options, "tune" if ctx.tuning else "test")
    prompts = starts(found, options.prompts, seeds["data"])
    references = draw(found, found.truth, prompts, derive_seed("references", seeds["data"])).some(torch.arange(options.references))
    others = starts(found, options.validation, derive_seed("validation", seeds["data"]))
    return LanguageModeling(
        setting=ctx.name,
        student=build(options.student, seeds["init"]),
        build=functools.partial(build, seed=seeds["init"]),
        teacher=LanguageOracle(
            copy.deepcopy(found.teacher),
            tokenizer=tokenizer(found.truth.vocab),
            vocab=found.truth.vocab,
            eos=EOS,
            seed=seeds["teacher"],
            cache=ctx.cache,
        ),
        prompts=prompts,
        references=references,
        validation=draw(found, found.truth, others, derive_seed("validation references", seeds["data"])),
        vocab=found.truth.vocab,
        eos=EOS,
        length=found.length,
        samples=options.samples,
        batch_size=ctx.setting.training.batch_size,
        order=seeds["order"],
    )


def distributions(model: LanguageModel, vocab: int, order: int) -> Tensor:
    """The next-token distributions of a windowed model after every context, (V ** order, V), float64.

    Raises:
        UserError: the model looks at more than the chain does, so its distributions are no table.
    """
    if not isinstance(model, Windowed) or model.order > order:
        raise UserError(f"{type(model).__name__} looks at more than {order} tokens; the exact metrics of markov need a model that does not")
    index = torch.arange(vocab**order)
    context = torch.stack([(index // vocab**i) % vocab for i in reversed(range(order))], 1)[:, order - model.order :]
    with torch.no_grad():
        return model.project(model.of_contexts(context)).double().softmax(1)


def visits(distribution: Tensor, start: Tensor, length: int) -> Tensor:
    """How often a text of ``length`` tokens at most predicts at each context, (V ** order,): the expected number, exactly.

    distribution: (V ** order, V), texts begin at ``start`` and stop behind token 0.
    """
    size, vocab = distribution.shape
    behind = (torch.arange(size) * vocab % size)[:, None] + torch.arange(vocab)[None]  # the context after (context, token)
    now, total = start.double(), torch.zeros(size, dtype=torch.float64)
    for _ in range(length):
        total += now
        flow = now[:, None] * distribution
        flow[:, EOS] = 0
        now = torch.zeros(size, dtype=torch.float64).index_add_(0, behind.flatten(), flow.flatten())
    return total


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of rows (n, V), (n,) nats."""
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0).sum(1)


def divergences(p: Tensor, q: Tensor, start: Tensor, length: int) -> dict[str, float]:
    """Exact divergences of whole texts, by token: distributions p (reference) and q (model), (V ** order, V) each.

    ``kl`` is KL of the distributions of whole texts divided by the expected number of tokens of p's texts (the chain rule makes it a sum
    over contexts), ``reverse_kl`` the same with the two exchanged, over q's texts, ``tv`` the mean total variation at p's contexts.
    """
    of_p, of_q = visits(p, start, length), visits(q, start, length)
    return {
        "kl": float((of_p * kl(p, q)).sum() / of_p.sum()),
        "reverse_kl": float((of_q * kl(q, p)).sum() / of_q.sum()),
        "tv": float((of_p * (p - q).abs().sum(1) / 2).sum() / of_p.sum()),
    }


def measure(net: LanguageModel, ctx: JudgeContext) -> list[Measurement]:
    """Exact metrics; there is nothing to sample, so they have no spread within a run."""
    found = of(ctx, ctx.split)
    vocab, order = found.truth.vocab, found.truth.order
    q = distributions(net, vocab, order)
    scores = divergences(distributions(found.teacher, vocab, order), q, found.start, found.length)
    scores["acceptance"] = 1 - scores["tv"]
    if found.teacher is not found.truth:
        scores["truth_kl"] = divergences(distributions(found.truth, vocab, order), q, found.start, found.length)["kl"]
    return [Measurement(name, value, 1) for name, value in scores.items()]
