"""Token sequences: prompts, prompts with responses, and batches of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from distillbench.errors import NotApplicable, UserError
from distillbench.problems.language_modeling.token_losses import NextTokens, next_tokens
from distillbench.problems.language_modeling.tokenizers import Tokenizer
from distillbench.training.data import Batches, Examples, Request, epoch_rows
from distillbench.training.student import tensor_digest


@dataclass(frozen=True)
class TokenBatch(Examples):
    """Prompts with responses: prompts end, and responses begin, at the same position in every row.

    Its units are rows and ``tokens``, the response tokens that a state predicts.

    Attributes:
        ids: (B, T) int64.  attention: (B, T) bool, false on padding (left of a prompt, right of a response).
        response: (B, T) bool, true on response tokens, the end-of-sequence token among them.
        index: (B,) int64, rows of the prompt pool.
        rows: (B,) int64, rows of the :class:`Texts` these are from; -1 where the text is fresh and no cache can know it.
        tokenizer: digest of the tokenizer that the ids belong to.
        text: digest of the :class:`Texts`, or "" for fresh text.
    """

    ids: Tensor
    attention: Tensor
    response: Tensor
    index: Tensor
    rows: Tensor
    tokenizer: str = ""
    text: str = ""

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @staticmethod
    def fresh(prompts: Prompts, index: Tensor, ids: Tensor, response: Tensor) -> TokenBatch:
        """Responses ``ids`` (B, R) with their mask (B, R) to the prompts of ``index`` (B,), as text that no cache can know."""
        batch = Texts.join(prompts, index, ids, response).take(torch.arange(len(index)))
        return replace(batch, index=index, rows=torch.full_like(index, -1), text="")

    @property
    def _device(self) -> torch.device:
        return self.ids.device

    def units(self) -> dict[str, int]:
        """``rows`` and ``tokens``."""
        return {"rows": len(self), "tokens": int(self.response[:, 1:].sum())}

    def part(self, start: int, stop: int) -> Self:
        """Rows ``start:stop``."""
        return replace(self._with(lambda x: x[start:stop]), **self._sliced(start, stop))

    def to(self, device: torch.device) -> Self:
        """The same batch on ``device``."""
        return self if self.ids.device == device else self._with(lambda x: x.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            ids=change(self.ids),
            attention=change(self.attention),
            response=change(self.response),
            index=change(self.index),
            rows=change(self.rows),
        )

    @functools.cached_property
    def predicted(self) -> NextTokens:
        """The predictions that count: N of them."""
        return next_tokens(self.ids, self.response)

    def per_sequence(self, values: Tensor) -> Tensor:
        """Token values (N,) -> (B,): the mean over each row's own tokens, so that every sequence weighs the same.

        Raises:
            UserError: ``values`` is not one per token that counts.
        """
        if values.shape != self.predicted.rows.shape:
            raise UserError(
                f"token losses have shape {tuple(values.shape)}; give one value per token that counts: ({self.predicted.count},)"
            )
        summed = values.new_zeros(len(self)).index_add_(0, self.predicted.rows // self.ids.shape[1], values)
        return summed / self.response[:, 1:].sum(1).clamp(min=1)


@dataclass(frozen=True)
class Prompts:
    """A pool of prompts, padded on the left.   ids: (P, L) int64.  attention: (P, L) bool.  digest: of its bytes."""

    ids: Tensor
    attention: Tensor
    tokenizer: str
    digest: str

    @staticmethod
    def of(prompts: Sequence[Sequence[int]], tokenizer: str, pad: int) -> Prompts:
        """Prompts as lists of token ids.

        Raises:
            UserError: there are none, or one is empty: its first token would have no state before it.
        """
        if not all(prompts) or not len(prompts):
            raise UserError("a pool of prompts needs prompts of at least one token each; begin empty ones with a begin-of-sequence token")
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        attention = torch.arange(width)[None] >= width - torch.tensor([len(p) for p in prompts])[:, None]
        return Prompts(ids, attention, tokenizer, tensor_digest({"ids": ids, "attention": attention}))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Tensor) -> Prompts:
        """The prompts of ``index`` (B,), without the columns that are padding in all of them."""
        ids, attention = self.ids[index], self.attention[index]
        first = int(attention.any(0).long().argmax())
        return Prompts(ids[:, first:], attention[:, first:], self.tokenizer, "")

    def with_responses(self, responses: Sequence[Sequence[int]], index: Tensor | None = None, *, pad: int) -> Texts:
        """Responses (lists of token ids, the end-of-sequence token at the end where there is one) to the prompts of ``index``."""
        index = torch.arange(len(self)) if index is None else index
        width = max(1, *map(len, responses))
        ids = torch.tensor([[*r, *([pad] * (width - len(r)))] for r in responses])
        response = torch.arange(width)[None] < torch.tensor([len(r) for r in responses])[:, None]
        return Texts.join(self, index, ids, response)


@dataclass(frozen=True)
class Texts:
    """Prompts with responses in memory. ``digest`` identifies their bytes; ``index`` (M,) names each row's prompt in the pool."""

    ids: Tensor
    attention: Tensor
    response: Tensor
    index: Tensor
    tokenizer: str
    digest: str

    @staticmethod
    def join(prompts: Prompts, index: Tensor, ids: Tensor, response: Tensor) -> Texts:
        """Responses ``ids`` (M, R) with their mask (M, R) behind the prompts of ``index`` (M,)."""
        whole = torch.cat([prompts.ids[index], ids], 1)
        mask = torch.cat([torch.zeros_like(prompts.attention[index]), response], 1)
        attention = torch.cat([prompts.attention[index], response], 1)
        digest = tensor_digest({"ids": whole, "attention": attention, "response": mask})
        return Texts(whole, attention, mask, index, prompts.tokenizer, digest)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor) -> TokenBatch:
        """Rows (B,) as a batch, without the columns that are padding in all of them."""
        attention, response = self.attention[rows], self.response[rows]
        used = attention.any(0).nonzero().squeeze(1)
        low, high = int(used[0]), int(used[-1]) + 1
        return TokenBatch(
            self.ids[rows, low:high],
            attention[:, low:high],
            response[:, low:high],
            self.index[rows],
            rows,
            self.tokenizer,
            self.digest,
        )

    def some(self, rows: Tensor) -> Texts:
        """The rows of ``rows`` (M,) as texts of their own.

        Raises:
            UserError: there are not that many texts.
        """
        if len(rows) and int(rows.max()) >= len(self):
            raise UserError(f"row {int(rows.max())} of {len(self)} texts is asked for: are there more references than prompts?")
        ids, attention, response = self.ids[rows], self.attention[rows], self.response[rows]
        digest = tensor_digest({"ids": ids, "attention": attention, "response": response})
        return Texts(ids, attention, response, self.index[rows], self.tokenizer, digest)


def retokenise_prompts(prompts: Prompts, source: Tokenizer, target: Tokenizer) -> Prompts:
    """The same prompts, one by one, in the tokens of ``target``.

    Raises:
        UserError: ``target`` cannot write them, or special tokens that spell nothing leave one empty.
    """
    rows = [_written(ids[real].tolist(), source, target) for ids, real in zip(prompts.ids, prompts.attention, strict=True)]
    if not all(rows):
        raise UserError(f"prompt {rows.index([])} spells no text, so another tokenizer cannot write it; give its special tokens a spelling")
    return Prompts.of(rows, target.digest, target.eos)


def retokenise(texts: Texts, source: Tokenizer, target: Tokenizer, prompts: Prompts) -> Texts:
    """The same responses in the tokens of ``target``, behind ``prompts``, which are in those already.

    A response ends with the end of sequence where it did before; what was cut short stays so.

    Raises:
        UserError: the texts are not in tokens of ``source``, or ``target`` cannot write them.
    """
    if texts.tokenizer != source.digest or prompts.tokenizer != target.digest:
        raise UserError(
            "texts are written anew from the tokens of one tokenizer to those of another, whose prompts they follow; these are not"
        )
    rows = [_written(ids[real].tolist(), source, target) for ids, real in zip(texts.ids, texts.response, strict=True)]
    return prompts.with_responses(rows, texts.index, pad=target.eos)


def _written(ids: list[int], source: Tokenizer, target: Tokenizer) -> list[int]:
    ended = ids[-1:] == [source.eos]
    return target.encode(b"".join(source.spell(ids[:-1] if ended else ids))) + [target.eos] * ended


@dataclass(frozen=True)
class TextBatches(Batches[TokenBatch]):
    """Epochs over :class:`Texts`, each a permutation drawn from (seed, epoch); short tails are dropped.

    Raises:
        UserError: there are no texts, as where a user's prompts carry no responses.
    """

    texts: Texts
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not len(self.texts):
            raise NotApplicable("there are no texts to train on: the setting's data carry prompts without responses")
        object.__setattr__(self, "batch_size", min(self.batch_size, len(self.texts)))

    def rows(self, position: int) -> Tensor:
        """Rows of the texts."""
        return epoch_rows(len(self.texts), self.batch_size, self.seed, position)

    def take(self, request: Request) -> TokenBatch:
        """Rows of the texts as a batch."""
        return self.texts.take(request.rows)
