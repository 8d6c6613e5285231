"""Other people's packages with methods and suites in them."""

import sys

import pytest

from distillbench.cards import registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``package(name, {path: text}, value=...)`` installs another package with methods and suites in it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name, files=None, value=None, init="", suites=False):
        for path, text in {f"{name}/__init__.py": init, **{f"{name}/{p}": t for p, t in (files or {}).items()}}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        kinds = ["methods", *(["suites"] if suites else [])]
        (about / "entry_points.txt").write_text("".join(f"[distillbench.{k}]\n{name} = {value or name}\n" for k in kinds))
        registry.refresh()
        installed.append(name)
        return tmp_path / name

    installed = []
    yield install
    registry.refresh()
    for module in [m for m in sys.modules if m.split(".")[0] in installed]:
        del sys.modules[module]
