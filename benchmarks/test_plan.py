"""A grid of 100 runs that are all done is planned again, and found, in under a second."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from distillbench.cards import registry
from distillbench.runs.plan import plan
from distillbench.runs.record import Measurement, Record
from distillbench.runs.store import Store

TRACK = "image-classification/digits"


def test_cached_grid(benchmark: Any, tmp_path: Path) -> None:
    specs = plan(TRACK, ["kd"], range(20))
    store = Store(tmp_path)
    for spec in specs:
        values = [float(i % 7 > 0) for i in range(400)]  # as many per-example values as the real judge leaves
        measured = tuple(Measurement.mean(m, values) for m in ("top1", "nll", "ece", "agreement"))
        now = datetime.datetime.now(datetime.UTC).isoformat()
        store.save(
            Record(
                spec.identity, spec.setting, spec.cards, spec.code.kept(), "ok", None, measured, {"total": {}, "phases": {}}, None, {}, now
            )
        )

    def replan() -> int:
        registry.refresh()  # as a new process would
        store = Store(tmp_path)
        return sum(store.find(s) is not None for s in plan(TRACK, ["kd"], range(20)))

    found = benchmark.pedantic(replan, rounds=5, warmup_rounds=1)
    assert found == len(specs) == 100
    assert benchmark.stats.stats.median < 1.0
