"""A language model as a teacher: distributions of next tokens, states, and responses that are generated once and kept."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distillbench.code import digest_of
from distillbench.errors import NotApplicable, UserError
from distillbench.identity import derive_seed, sha256
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.problems.language_modeling.sampling import respond
from distillbench.problems.language_modeling.texts import Prompts, Texts, TokenBatch
from distillbench.problems.language_modeling.token_losses import Projection, Teacher, TopK, token_losses
from distillbench.problems.language_modeling.topk_cache import Layout, TopKTable, top_k
from distillbench.training.checkpoint import load_checkpoint, save_checkpoint
from distillbench.training.oracle import ModuleOracle

ROWS = 64  # responses generated together, and the most that a kill can lose
CHUNK = 16  # texts in a forward when distributions are cached
TOKENS = 128  # tokens whose logits are there at a time


class LanguageOracle(ModuleOracle):
    """A causal language model as a teacher.

    Args:
        module: the model.  tokenizer: digest of its tokenizer; batches of another one are refused.
        vocab: entries of its projection that are no padding.  eos: its end-of-sequence token.
        seed: of the role ``teacher``: the same for every run of a track, so that all methods see the same responses.
        cache: folder for responses and distributions, keyed by the bytes they come from, or None.
        top_k: entries kept per distribution of texts that stay the same, which are then computed once; 0 keeps all and computes them anew.
            A vocabulary that has no more than ``top_k`` entries keeps all as well.
    """

    _module: LanguageModel

    def __init__(
        self, module: LanguageModel, *, tokenizer: str, vocab: int, eos: int, seed: int, cache: Path | None = None, top_k: int = 0
    ) -> None:
        super().__init__(module)
        self.tokenizer = tokenizer
        self.vocab = vocab
        self.eos = eos
        self._seed = seed
        self._cache = cache
        self._layout = Layout(top_k, vocab) if 0 != top_k < vocab else None
        self._generated: dict[str, Texts] = {}
        self._tables: dict[str, TopKTable] = {}

    @property
    def module(self) -> LanguageModel:
        """The frozen model itself, for mixed sampling (``respond(..., other=problem.teacher.module)``)."""
        return self._module

    @property
    def _identity(self) -> str:
        """Part of every key: equal weights do not make equal networks (rotary bases, activations), nor every device equal sums, nor does
        the text that yesterday's code made stand for today's."""
        written = digest_of(type(self._module).__module__, __name__, *self._module.libraries)
        model = f"{self.digest}/{type(self._module).__qualname__}/{getattr(self._module, 'architecture', None)}/{written}"
        return sha256(f"{model}/{self._module.head[0].device.type}/{self.tokenizer}/{self.vocab}".encode())

    def distributions(self, batch: TokenBatch, *, exact: bool = False) -> Teacher:
        """The next-token distributions at the N tokens of ``batch`` that count, as :func:`token_losses.token_losses` takes them. Counts
        B examples.

        Where ``top_k`` was given and the texts are known (:meth:`remember`), their k most probable entries at temperature 1, from the
        cache. Fresh texts get the whole distribution, and so does everything with ``exact``.

        Raises:
            UserError: the batch was made with another tokenizer.
        """
        if not exact:
            known = self._known(batch)
            if known is not None:
                return known
        return Projection(batch.predicted.take(self.states(batch)), *self._module.head)

    def remember(self, texts: Texts, *, now: bool = False) -> None:
        """Say that these texts will be asked about again: their distributions are cached from the first time on, or from ``now``.

        Responses of this oracle are remembered anyway.
        """
        if self._layout is not None and texts.digest not in self._tables:
            folder = None if self._cache is None else self._cache / "distributions"
            self._tables[texts.digest] = TopKTable(texts, self._layout, self._top_k, teacher=self._identity, folder=folder)
        if now and self._layout is not None:
            self._tables[texts.digest].fill()

    def _known(self, batch: TokenBatch) -> TopK | None:
        self._check(batch)
        table = self._tables.get(batch.text)
        found = None if table is None or bool((batch.rows < 0).any()) else table.find(batch)
        if found is not None:
            self._asked(len(batch), computed=False)
            self._cost(batch)
        return found

    def _top_k(self, batch: TokenBatch) -> tuple[TopK, Tensor]:
        """What :class:`TopKTable` keeps, in fixed chunks; nobody has asked for it yet, so forwards are counted and examples are not."""
        assert self._layout is not None
        self._check(batch)
        weight, bias = self._module.head
        weight, bias = weight[: self.vocab].float(), None if bias is None else bias[: self.vocab].float()
        parts = []
        for start in range(0, len(batch), CHUNK):
            part = batch.part(start, start + CHUNK).to(weight.device)
            states = part.predicted.take(self._states(part))
            parts += [top_k(torch.nn.functional.linear(s.float(), weight, bias), self._layout.k) for s in states.split(TOKENS)]
        self.meter.add("teacher_forwards", len(batch))
        ids, logs, tail, lse = (torch.cat(x) for x in zip(*((x.ids, x.log_probs, x.tail, lse) for x, lse in parts), strict=True))
        return TopK(ids, logs, tail), lse

    def states(self, batch: TokenBatch) -> Tensor:
        """The last states (B, T, D), in the teacher's own precision, without a graph. Counts B examples.

        Raises:
            UserError: as :meth:`distributions`.
        """
        self._check(batch)
        self._asked(len(batch))
        self._cost(batch)
        return self._states(batch)

    def _cost(self, batch: TokenBatch) -> None:
        """Bill the operations of the states of ``batch``, and of the projection where they are compared."""
        self._worth(len(batch), batch.ids, batch.attention)
        self.meter.add("teacher_flops", 2 * self._module.head[0].numel() * len(batch.predicted.rows))

    def _states(self, batch: TokenBatch) -> Tensor:
        with torch.no_grad(), torch.autocast(batch.ids.device.type, enabled=False):
            states: Tensor = self._module(batch.ids, batch.attention)
            return states

    def _check(self, batch: TokenBatch) -> None:
        if batch.tokenizer != self.tokenizer:
            raise NotApplicable(
                "the batch's token ids belong to another tokenizer than the teacher's: token-level methods need one tokenizer; "
                "use a method that matches across tokenizers, such as alm"
            )

    def log_probs(self, batch: TokenBatch) -> Tensor:
        """log p of each of the N tokens that count, (N,) nats. Counts B examples."""
        states = batch.predicted.take(self.states(batch))
        return chosen_log_probs(self._module, states, batch.predicted.labels, vocab=self.vocab)

    def responses(
        self, prompts: Prompts, *, samples: int, length: int, temperature: float = 1.0, top_p: float = 1.0, role: str = "text"
    ) -> Texts:
        """``samples`` responses to every prompt: row i answers prompt i mod P. Generated once, in parts that survive a kill.

        The tokens count as generated when a run first asks, whoever generated them; asking again is free.

        Args:
            length: tokens at most; a response that reaches it has no end-of-sequence token.
            role: which random numbers; the same role gives the same responses to every method and seed.

        Raises:
            UserError: the prompts were made with another tokenizer; there are none; a range of :func:`generation.respond`.
        """
        if prompts.tokenizer != self.tokenizer:
            raise NotApplicable("the prompts belong to another tokenizer than the teacher's; ask problem.teacher_text for its responses")
        total = samples * len(prompts)
        if total < 1:
            raise UserError(f"{samples} samples of {len(prompts)} prompts; ask for at least one response")
        index = torch.arange(total) % len(prompts)
        seed = derive_seed(role, self._seed)
        sampling = f"{float(temperature)}/{float(top_p)}"
        about = f"{self._identity}/{prompts.digest}/{self.eos}/{seed}/{length}/{sampling}/{ROWS}"
        if f"{about}/{total}" in self._generated:
            return self._generated[f"{about}/{total}"]
        folder = None if self._cache is None else self._cache / "texts" / sha256(about.encode())
        parts: list[dict[str, Tensor]] = []
        for rows in index.split(ROWS):
            number = len(parts)
            path = None if folder is None else folder / f"{number:05d}-{len(rows)}.part"
            with FileLock(_made(path).with_suffix(".lock")) if path is not None else contextlib.nullcontext():
                found = None
                if path is not None and path.exists():
                    with contextlib.suppress(UserError, OSError):  # a damaged part is made anew, never trusted
                        found = load_checkpoint(path)
                if found is None:
                    uniforms = torch.rand(len(rows), length, generator=torch.Generator().manual_seed(derive_seed(f"part {number}", seed)))
                    with self.billed():
                        ids, real = respond(
                            self._module, prompts.take(rows), uniforms, eos=self.eos, temperature=temperature, top_p=top_p, vocab=self.vocab
                        )
                    found = {"ids": ids, "real": real}
                    if path is not None:
                        save_checkpoint(path, found)
            parts.append(found)
        width = max(p["ids"].shape[1] for p in parts)
        ids = torch.cat([torch.nn.functional.pad(p["ids"], (0, width - p["ids"].shape[1]), value=self.eos) for p in parts])
        real = torch.cat([torch.nn.functional.pad(p["real"], (0, width - p["real"].shape[1])) for p in parts])
        # What was asked for counts, whether or not it was there already: cost does not depend on who ran before.
        self.meter.add("teacher_tokens", int(real.sum()))
        texts = self._generated[f"{about}/{total}"] = Texts.join(prompts, index, ids, real)
        row = texts.take(torch.arange(1))  # one token after the other costs what all of them at once cost
        self._worth(total, row.ids, row.attention)
        self.meter.add("teacher_flops", 2 * self._module.head[0].numel() * int(real.sum()))
        self.remember(texts)
        return texts


def real_logits(model: LanguageModel, states: Tensor, vocab: int) -> Tensor:
    """The logits (n, vocab) of states (n, D), without what pads the projection; in float32, or in float64 where the states are."""
    weight, bias = model.head
    dtype = torch.promote_types(states.dtype, torch.float32)
    with torch.autocast(states.device.type, enabled=False):
        return torch.nn.functional.linear(states.to(dtype), weight[:vocab].to(dtype), None if bias is None else bias[:vocab].to(dtype))


def chosen_log_probs(model: LanguageModel, states: Tensor, labels: Tensor, *, vocab: int, chunk: int = 512) -> Tensor:
    """log softmax(logits)[label] of states (N, D), (N,) nats, ``chunk`` rows of logits at a time; differentiable."""
    parts = []
    for s, y in zip(states.split(chunk), labels.split(chunk), strict=True):
        parts.append(-torch.nn.functional.cross_entropy(real_logits(model, s, vocab), y, reduction="none"))
    return torch.cat(parts) if parts else states.new_zeros(0)


def token_nll(model: LanguageModel, states: Tensor, labels: Tensor, *, vocab: int) -> Tensor:
    """-log q of the tokens ``labels`` (N,) that come after ``states`` (N, D), (N,) nats: next-token training."""
    return -chosen_log_probs(model, states, labels, vocab=vocab)


def token_divergence(
    model: LanguageModel,
    states: Tensor,
    teacher: Teacher,
    *,
    divergence: str | Mapping[str, float] = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    softening: float = 1.0,
    vocab: int,
) -> Tensor:
    """:func:`token_losses.token_losses` between what ``model`` makes of its ``states`` (N, D) and the teacher, (N,) nats.

    Args:
        divergence: a name, or weights by name.  beta: of ``js``.  alpha: of the skewed ones.
        softening: the temperature that both are taken at; methods' hyper-parameters of that name are of sampling.
    """
    weight, bias = model.head
    return token_losses(states, weight, teacher, divergence, bias=bias, temperature=softening, beta=beta, alpha=alpha, vocab=vocab)


def top_log_probs(model: LanguageModel, states: Tensor, ids: Tensor, *, vocab: int, chunk: int = 192) -> Tensor:
    """log softmax(logits) of chosen entries, (N, K) nats; differentiable.   states: (N, D), ids: (N, K) int64.

    Logits exist for ``chunk`` rows at a time, and are made once more in backward.
    """

    def some(s: Tensor, i: Tensor) -> Tensor:
        return real_logits(model, s, vocab).log_softmax(1).gather(1, i)

    pairs = zip(states.split(chunk), ids.split(chunk), strict=True)
    parts = [checkpoint(some, s, i, use_reentrant=False, preserve_rng_state=False) for s, i in pairs]
    return torch.cat(parts) if parts else states.new_zeros(ids.shape)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
