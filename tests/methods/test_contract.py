"""Every method that is found, the controls included, keeps the contract: what ``distillbench check`` says of it."""

from __future__ import annotations

import pytest

from distillbench.cards import registry
from distillbench.checks import CHECKS, check_method


@pytest.mark.slow  # there are as many as methods, and each rests on little
@pytest.mark.parametrize("entry", [pytest.param(e, id=f"{e.path.parent.name}/{e.slug}") for e in registry.methods().values()])
def test_contract(entry: registry.Entry) -> None:
    results = check_method(str(entry.path))
    assert not [f"{r.name}: {r.message}" for r in results if r.outcome == "failed"]
    assert {r.name for r in results} >= set(CHECKS)
