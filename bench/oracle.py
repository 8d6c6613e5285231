"""The teacher behind one door: evaluation mode, no gradient, metered, cached by bytes."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.checkpoint import load_checkpoint, save_checkpoint
from bench.data import Arrays, Batch
from bench.diffusion import guided
from bench.errors import UserError
from bench.nets import Outputs, head, staged, trace
from bench.record import sha256
from bench.student import tensor_digest

CHUNK = 256  # rows per teacher call when a table is filled: fixed, so that tables are the same whatever asks first


class Meter:
    """Counts what a run uses. Plain numbers, so that a checkpoint can carry them."""

    FIELDS = (
        "student_examples",
        "student_steps",
        "teacher_examples",
        "teacher_forwards",
        "generated_tokens",
        "training_flops",
        "wall_seconds",
    )

    def __init__(self) -> None:
        self.counts: dict[str, float] = dict.fromkeys(self.FIELDS, 0)

    def add(self, name: str, amount: float) -> None:
        """Count ``amount`` more of ``name``."""
        self.counts[name] += amount


class Oracle:
    """A frozen network behind one door.

    Methods never touch the network: they ask, the oracle answers without a graph. ``examples`` asked are metered
    whether or not a cache holds the answer, so cost does not depend on who ran before; forwards computed are metered too.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module.eval().requires_grad_(False)
        self.meter = Meter()
        self.digest = tensor_digest(dict(module.state_dict()))

    def _asked(self, rows: int, computed: bool = True) -> None:
        self.meter.add("teacher_examples", rows)
        if computed:
            self.meter.add("teacher_forwards", rows)

    def trainable_copy(self) -> nn.Module:
        """A copy of the teacher that may be trained (teacher-side methods); the oracle itself stays as it is."""
        return copy.deepcopy(self._module).requires_grad_(True).train()

    def to(self, device: torch.device) -> None:
        """Move the network."""
        self._module.to(device)


class ClassifierOracle(Oracle):
    """A classifier as a teacher.

    Args:
        module: gives logits (B, C); with ``head_name`` and ``stage_names`` also embeddings and feature maps.
        data: the data set that batches index into, where its examples are always the same pixels; its answers are then
            computed once and kept, in memory and under ``cache``, keyed by the bytes of model and data.
        cache: folder for tables of answers, or None.
    """

    def __init__(self, module: nn.Module, data: Arrays | None = None, cache: Path | None = None) -> None:
        super().__init__(module)
        self._data = data
        self._cache = cache
        self._tables: dict[str, Tensor] = {}

    def logits(self, batch: Batch) -> Tensor:
        """Teacher logits (B, C)."""
        if self._data is None:
            self._asked(len(batch))
            with torch.no_grad():
                logits: Tensor = self._module(batch.inputs)
            return logits
        self._asked(len(batch), computed=False)
        return self._rows(("logits",), batch)[0]

    def outputs(self, batch: Batch) -> Outputs:
        """Logits (B, C), embedding (B, D) and stages of a batch."""
        if self._data is None:
            self._asked(len(batch))
            with torch.no_grad():
                return trace(self._module, batch.inputs).detach()
        self._asked(len(batch), computed=False)
        stages = tuple(f"stage{i}" for i in range(len(getattr(self._module, "stage_names", ()))))
        logits, embedding, *maps = self._rows(("logits", "embedding", *stages), batch)
        return Outputs(logits, embedding, tuple(maps))

    def _rows(self, fields: tuple[str, ...], batch: Batch) -> list[Tensor]:
        """What the tables hold about the examples of a batch, on its device."""
        tables = self._table(fields)
        index = batch.index.to(tables[fields[0]].device)
        return [tables[f][index].to(batch.inputs.device) for f in fields]

    @property
    def head_weight(self) -> Tensor:
        """The weight (C, D) of the teacher's last linear layer, without its bias."""
        return head(self._module).weight.detach().clone()

    def retaught(self, module: nn.Module) -> ClassifierOracle:
        """An oracle over another network (a retrained teacher) with the same data, cache and meter."""
        other = ClassifierOracle(module, self._data, self._cache)
        other.meter = self.meter
        return other

    def _table(self, fields: tuple[str, ...]) -> dict[str, Tensor]:
        """Answers for every row of the data set; computed in fixed chunks so that they do not depend on the batches."""
        if all(f in self._tables for f in fields):
            return self._tables
        assert self._data is not None
        device = next(iter(self._module.state_dict().values())).device
        # Equal weights do not make equal networks (strides, activations): the architecture is part of the key.
        model = f"{self.digest}/{type(self._module).__qualname__}/{getattr(self._module, 'architecture', None)}"
        answers = f"{','.join(fields)}/{self._data.inputs.dtype}/{device.type}/{CHUNK}"
        path = None if self._cache is None else self._cache / f"{sha256(f'{model}/{self._data.digest}/{answers}'.encode())}.table"
        table: dict[str, Tensor] = {}
        if path is not None and path.exists():
            with contextlib.suppress(UserError, OSError):  # a damaged cache is computed anew, never trusted
                table = {k: v.to(device) for k, v in load_checkpoint(path).items()}
        if not table:
            rows = self._data.inputs.to(device).split(CHUNK)
            with torch.no_grad():
                if fields == ("logits",):
                    table = {"logits": torch.cat([self._module(r) for r in rows])}
                else:
                    seen = [trace(self._module, r) for r in rows]
                    table = {"logits": torch.cat([o.logits for o in seen]), "embedding": torch.cat([o.embedding for o in seen])}
                    for i in range(len(seen[0].stages)):
                        table[f"stage{i}"] = torch.cat([o.stages[i] for o in seen])
            self.meter.add("teacher_forwards", len(self._data))
            if path is not None:
                save_checkpoint(path, table)
        if not all(bool(torch.isfinite(v).all()) for v in table.values()):
            raise UserError("the teacher's outputs are not finite; check its weights file")
        self._tables.update(table)
        return self._tables


class DenoiserOracle(Oracle):
    """A diffusion model as a teacher: x0 prediction at any noise level of the variance-exploding family.

    Args:
        guidance: g of classifier-free guidance, D_none + g (D_label - D_none), with labels None for D_none: 1 is the
            conditional model alone, 0 the unconditional one. (Where a paper writes (1 + w) D_label - w D_none, g = 1 + w.)
    """

    def __init__(self, module: nn.Module, guidance: float = 1.0) -> None:
        super().__init__(module)
        self.guidance = guidance

    def denoise(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None, *, differentiable: bool = False) -> Tensor:
        """E[x0 | x0 + sigma eps = noisy], guided.   noisy: (B, ...), sigma: (B,) > 0, labels: (B,) int64 or None -> (B, ...).

        Every call counts B teacher examples, 2 B where guidance is not 1: a Heun step asks twice. ``differentiable`` keeps the
        graph from ``noisy``; the weights are frozen either way.
        """
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            self._asked(noisy.shape[0])
            if self.guidance == 1.0 or labels is None:
                answer: Tensor = self._module(noisy, sigma, labels)
                return answer
            self._asked(noisy.shape[0])
            return guided(self._module, self.guidance)(noisy, sigma, labels)

    def stages(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        """The network's feature maps, (B, K, H, W) or (B, K) each, with the graph from ``noisy``; never guided. Counts B examples.

        Raises:
            UserError: the network declares none (an exact teacher); see :func:`bench.diffusion.frozen`.
        """
        self._asked(noisy.shape[0])
        return staged(self._module, noisy, sigma, labels)[1]

    def over(self, module: nn.Module) -> DenoiserOracle:
        """An unguided oracle over another network, on the same meter."""
        other = DenoiserOracle(module)
        other.meter = self.meter
        return other
