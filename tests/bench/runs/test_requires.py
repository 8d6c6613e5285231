"""A setting whose packages are missing says so in one line, before anything is loaded."""

from __future__ import annotations

import importlib.util

import pytest

from distillbench.errors import UserError
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store


def test_missing_packages_are_named(tmp_path, monkeypatch):
    [spec] = plan("speculative/smollm2", ["scratch"], [0], controls=False)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else real(name, *a))
    with pytest.raises(UserError, match="smollm2 needs gguf, which is not installed here: pip install"):
        execute(spec, Store(tmp_path))
