"""Packages of other people, each with a kind of problem that distillbench does not know."""

import sys
from pathlib import Path

import pytest

from distillbench.cards import registry


@pytest.fixture
def outsider(monkeypatch):
    """``outsider(folder)`` installs the package in a folder beside this file: it is on ``sys.path``, with its entry points."""

    def install(name):
        monkeypatch.syspath_prepend(str(Path(__file__).parent / name))
        registry.refresh()

    yield install
    registry.refresh()
    for module in [m for m in sys.modules if m.startswith("outside_")]:
        del sys.modules[module]
