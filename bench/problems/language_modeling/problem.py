"""Language modelling: a causal language model, to be distilled into a smaller one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distillbench.errors import NotApplicable
from distillbench.problems.language_modeling.alignment import AlignedBatch, align, responses
from distillbench.problems.language_modeling.examples import EXAMPLES
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.problems.language_modeling.oracle import LanguageOracle, token_divergence, token_nll
from distillbench.problems.language_modeling.sampling import respond
from distillbench.problems.language_modeling.texts import Prompts, TextBatches, Texts, TokenBatch, retokenise, retokenise_prompts
from distillbench.problems.language_modeling.token_losses import Projection, Teacher
from distillbench.problems.language_modeling.tokenizers import Tokenizer
from distillbench.training.data import Batches, Request, epoch_rows
from distillbench.training.examples import Input
from distillbench.training.problem import Problem
from distillbench.training.run import Run
from distillbench.training.trees import Tree


@dataclass(frozen=True)
class LanguageModeling(Problem):
    """A language model to distil.

    ``student(ids, attention)`` gives states; :meth:`divergence` and :meth:`nll` compare what its projection makes of them, so that
    no (tokens, vocabulary) tensor is kept. Every method answers the same pool of prompts in the same order, on-policy ones too.

    Attributes:
        teacher: distributions of next tokens, states, responses; metered.
        prompts: the pool.  references: responses that the data carry, to some of the prompts (what ``scratch`` may use).
        validation: references to prompts outside the pool and outside the judged split, for methods that watch a loss.
        vocab: the student's entries that are no padding.  eos: its end of sequence.
        length: tokens of a response at most.  samples: responses per prompt in the teacher's text.
        batch_size, order: of every stream; the seed of its shuffling.
        tokenizer, teacher_tokenizer: None where student and teacher have the same one. Where they differ, everything here is in the
            student's tokens but what :meth:`teacher_view` gives; the teacher's text is made in its own tokens and written anew.
        teacher_length: tokens of a response of the teacher at most, where its tokenizer differs.
    """

    student: LanguageModel
    teacher: LanguageOracle
    prompts: Prompts
    references: Texts
    validation: Texts
    vocab: int
    eos: int
    length: int
    samples: int
    batch_size: int
    order: int
    tokenizer: Tokenizer | None = None
    teacher_tokenizer: Tokenizer | None = None
    teacher_length: int | None = None

    @classmethod
    def examples(cls) -> Mapping[str, Input]:
        """See :mod:`.examples`."""
        return EXAMPLES

    def __post_init__(self) -> None:
        self.teacher.remember(self.references)

    def call(self) -> tuple[Tree, ...] | None:
        """A prompt with a response of full length."""
        ids = torch.zeros(1, self.prompts.ids.shape[1] + self.length, dtype=torch.int64)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    # --- what to train on ---------------------------------------------------------------------------------------

    @property
    def data(self) -> TextBatches:
        """The references."""
        return TextBatches(self.references, self.batch_size, self.order)

    def teacher_text(self, *, temperature: float = 1.0, top_p: float = 1.0) -> TextBatches:
        """The teacher's own responses to the pool, generated once for all methods and seeds."""
        prompts, length, two = self.prompts, self.length, self._tokenizers
        if two is not None:
            prompts, length = retokenise_prompts(prompts, *two), self.teacher_length or self.length
        texts = self.teacher.responses(prompts, samples=self.samples, length=length, temperature=temperature, top_p=top_p)
        if two is not None:
            texts = retokenise(texts, two[1], two[0], self.prompts)
        return TextBatches(texts, self.batch_size, self.order)

    def sampled(
        self, run: Run, model: LanguageModel, *, fraction: float = 1.0, temperature: float = 1.0, top_p: float = 1.0, mixing: float = 0.0
    ) -> Sampled:
        """Responses of ``model`` as it is now, one batch per update; with chance 1 - ``fraction`` a batch of the teacher's text instead.

        Both answer the same prompts at the same step. ``mixing`` of every next-token distribution is the teacher's (MiniLLM).

        Raises:
            UserError: the teacher is to sample, and its tokenizer is another one.
        """
        if self._tokenizers is not None and (mixing or model is self.teacher.module):
            raise NotApplicable(
                "the teacher has another tokenizer than the student, so it cannot sample for it token by token; use teacher_text"
            )
        # The text is asked for here, ahead of the loop: a loop that resumes brings its meter along, and must not count it once more.
        # Its distributions too: a step whose operations are counted must not fill a table.
        fixed = self.teacher_text() if fraction < 1 else None
        if fixed is not None:
            self.teacher.remember(fixed.texts, now=True)
        return Sampled(self, run, model, fixed, fraction, temperature, top_p, mixing)

    def prompt_rows(self, position: int, size: int) -> Tensor:
        """The prompts (B,) of a batch of ``size``, in the order in which :meth:`teacher_text` has them."""
        count = self.samples * len(self.prompts)
        return epoch_rows(count, min(size, count), self.order, position) % len(self.prompts)

    # --- two tokenizers -------------------------------------------------------------------------------------------

    @property
    def _tokenizers(self) -> tuple[Tokenizer, Tokenizer] | None:
        """The student's and the teacher's, or None where they are the same."""
        if self.tokenizer is None or self.teacher_tokenizer is None or self.tokenizer.digest == self.teacher_tokenizer.digest:
            return None
        return self.tokenizer, self.teacher_tokenizer

    def teacher_view(self, batch: TokenBatch) -> TokenBatch:
        """The same texts in the teacher's tokens: the batch itself where the tokenizers are the same.

        Prompts and responses are written anew apart from each other, so that the same bytes count. Lives on the CPU.

        Raises:
            UserError: the teacher's tokenizer cannot write the student's text.
        """
        two = self._tokenizers
        if two is None:
            return batch
        real = batch.attention & ~batch.response
        prompts = Prompts.of([ids[kept].tolist() for ids, kept in zip(batch.ids, real, strict=True)], two[0].digest, two[0].eos)
        index = torch.arange(len(batch))
        texts = prompts.with_responses(responses(batch), index, pad=two[0].eos)
        view = retokenise(texts, *two, retokenise_prompts(prompts, *two)).take(index)
        return replace(view, index=batch.index, rows=torch.full_like(index, -1), text="")  # no cache knows texts made here

    def aligned(self, batches: TextBatches, *, space: bool = False) -> AlignedBatches:
        """``batches`` with the teacher's view of each and the chunks of both: see :mod:`language_modeling.alignment`."""
        return AlignedBatches(self, batches, space)

    # --- losses ---------------------------------------------------------------------------------------------------

    def divergence(
        self,
        batch: TokenBatch,
        mix: str | Mapping[str, float] = "forward_kl",
        *,
        teacher: Teacher | None = None,
        student: LanguageModel | None = None,
        temperature: float = 1.0,
        beta: float = 0.5,
        alpha: float = 0.1,
    ) -> Tensor:
        """A divergence of :mod:`language_modeling.token_losses` at each of the N tokens that count, (N,) nats.

        ``teacher`` defaults to its distributions: the cached ones where there are some and the temperature is 1 (a tail has no other), else
        the whole.
        """
        model = self.student if student is None else student
        theirs = self.teacher.distributions(batch, exact=temperature != 1) if teacher is None else teacher
        states = batch.predicted.take(model(batch.ids, batch.attention))
        return token_divergence(model, states, theirs, divergence=mix, beta=beta, alpha=alpha, softening=temperature, vocab=self.vocab)

    def compare(self, states: Tensor, theirs: Tensor, mix: str, *, alpha: float = 0.1) -> Tensor:
        """The same for n tokens of one's choice, of which student and teacher have the states (n, D) and (n, D'): (n,) nats."""
        teacher = Projection(theirs, *self.teacher.module.head)
        return token_divergence(self.student, states, teacher, divergence=mix, alpha=alpha, vocab=self.vocab)

    def nll(self, batch: TokenBatch, student: LanguageModel | None = None) -> Tensor:
        """-log q of each of the N tokens that count, (N,) nats."""
        model = self.student if student is None else student
        states = batch.predicted.take(model(batch.ids, batch.attention))
        return token_nll(model, states, batch.predicted.labels, vocab=self.vocab)


@dataclass(frozen=True)
class AlignedBatches(Batches[AlignedBatch]):
    """Batches with both tokenizations and their chunks: see :meth:`LanguageModeling.aligned`."""

    problem: LanguageModeling
    batches: TextBatches
    space: bool
    batch_size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", self.batches.batch_size)

    def rows(self, position: int) -> Tensor:
        """As those of the batches."""
        return self.batches.rows(position)

    def take(self, request: Request) -> AlignedBatch:
        """A batch with its chunks. Without tokenizers every token is a chunk.

        Raises:
            UserError: chunks are to end at white space, and the problem carries no tokenizer.
        """
        student, teacher = self.problem.tokenizer, self.problem.teacher_tokenizer or self.problem.tokenizer
        if self.space and student is None:
            raise NotApplicable(f"chunks cannot end at white space: {self.problem.setting} has no tokenizer that spells its tokens")
        batch = self.batches.take(request)
        return align(
            batch,
            self.problem.teacher_view(batch),
            _letters if student is None else student.spell,
            _letters if teacher is None else teacher.spell,
            space=self.space,
        )


def _letters(ids: list[int]) -> list[bytes]:
    """Any spelling does where both sides have the same tokens."""
    return [b"x"] * len(ids)


@dataclass(frozen=True)
class Sampled(Batches[TokenBatch]):
    """Batches of fresh responses, a pure function of (seed, position, weights): see :meth:`LanguageModeling.sampled`."""

    problem: LanguageModeling
    run: Run
    model: LanguageModel
    fixed: TextBatches | None = None
    fraction: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    mixing: float = 0.0
    batch_size: int = field(init=False)

    regular = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", min(self.problem.batch_size, self.problem.samples * len(self.problem.prompts)))

    def rows(self, position: int) -> Tensor:
        """Rows of the teacher's text, whose prompts are answered."""
        problem = self.problem
        return epoch_rows(problem.samples * len(problem.prompts), self.batch_size, problem.order, position)

    def take(self, request: Request) -> TokenBatch:
        """Responses sampled now, or the teacher's."""
        if self.fixed is not None and request.coin("whose text") >= self.fraction:
            return self.fixed.take(request)
        index = request.rows % len(self.problem.prompts)
        uniforms = request.uniform((len(index), self.problem.length), "responses")
        return TokenBatch.fresh(self.problem.prompts, index, *self.responses(index, uniforms))

    def responses(self, index: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Responses to the prompts of ``index`` (B,), as tokens (B, R) and which of them are real (B, R), without the prompts.

        uniforms: (B, length) in [0, 1), the random number of every token.
        """
        problem = self.problem
        other = problem.teacher.module if self.mixing else None
        with problem.teacher.billed():
            ids, real = respond(
                self.model,
                problem.prompts.take(index),
                uniforms,
                eos=problem.eos,
                temperature=self.temperature,
                top_p=self.top_p,
                vocab=problem.vocab,
                other=other,
                mixing=self.mixing,
            )
        self.run.meter.add("teacher_tokens" if self.model is problem.teacher.module else "student_tokens", int(real.sum()))
        return ids, real
