"""A classifier as a teacher: its answers to a data set are computed once and kept, keyed by bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import Tensor, nn

from distillbench.code import digest_of
from distillbench.errors import UserError
from distillbench.identity import sha256
from distillbench.training.checkpoint import load_checkpoint, save_checkpoint
from distillbench.training.data import Arrays, Batch
from distillbench.training.nets import Outputs, head, outputs_of
from distillbench.training.oracle import ModuleOracle

CHUNK = 256  # rows per teacher call when a table is filled: fixed, so that tables are the same whatever asks first


class ClassifierOracle(ModuleOracle):
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
        self._each: float | None = None  # operations of an answer to one example of the data set

    def logits(self, batch: Batch) -> Tensor:
        """Teacher logits (B, C)."""
        if self._data is None:
            self._asked(len(batch))
            self._worth(len(batch), batch.inputs)
            with torch.no_grad():
                logits: Tensor = self._module(batch.inputs)
            return logits
        self._found(len(batch))
        return self._rows(("logits",), batch)[0]

    def outputs(self, batch: Batch) -> Outputs:
        """Logits (B, C), embedding (B, D) and stages of a batch."""
        if self._data is None:
            self._asked(len(batch))
            self._worth(len(batch), batch.inputs)
            with torch.no_grad():
                return outputs_of(self._module, batch.inputs).detach()
        self._found(len(batch))
        stages = tuple(f"stage{i}" for i in range(len(getattr(self._module, "stage_names", ()))))
        logits, embedding, *maps = self._rows(("logits", "embedding", *stages), batch)
        return Outputs(logits, embedding, tuple(maps))

    def _found(self, rows: int) -> None:
        """Count an answer to ``rows`` examples of the data set, which are all of one shape."""
        if self._each is None:
            assert self._data is not None
            self._each = self._price(self._data.inputs)
        self.meter.counts["teacher_examples"] += rows
        self.meter.counts["teacher_flops"] += rows * self._each

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
        other.meter, other.watch = self.meter, self.watch
        return other

    def _table(self, fields: tuple[str, ...]) -> dict[str, Tensor]:
        """Answers for every row of the data set; computed in fixed chunks so that they do not depend on the batches."""
        if self._tables.keys() >= set(fields):
            return self._tables
        assert self._data is not None
        device = next(iter(self._module.state_dict().values())).device
        # Equal weights do not make equal networks (strides, activations): the architecture is part of the key.
        written = digest_of(type(self._module).__module__, __name__)  # nor does equal code of yesterday make today's
        model = f"{self.digest}/{type(self._module).__qualname__}/{getattr(self._module, 'architecture', None)}/{written}"
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
                    seen = [outputs_of(self._module, r) for r in rows]
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
