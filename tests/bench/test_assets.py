"""Where pinned files are looked for, and that nothing half made is ever found."""

from __future__ import annotations

import hashlib
import threading
import time

import pytest

from distillbench.assets import Asset, cache_folder, locate, made
from distillbench.errors import UserError

BYTES = b"the very file"
ASSET = Asset(name="the file", source="pip install it", licence="MIT", sha256=hashlib.sha256(BYTES).hexdigest())


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "carrier"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('looking for a file must not run the package')")
    (folder / "file.bin").write_bytes(BYTES)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return {"teacher_path": ["mine/file.bin"], "teacher_package": ["carrier", "file.bin"]}


def test_the_users_folder_comes_first(tmp_path, package):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file.bin").write_bytes(BYTES)
    assert locate(ASSET, package, "teacher", tmp_path) == tmp_path / "mine" / "file.bin"
    assert locate(ASSET, package, "teacher", None).parent.name == "carrier"


def test_other_bytes_are_refused_with_both_hashes(tmp_path, package):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file.bin").write_bytes(b"another file")
    with pytest.raises(UserError, match=rf"is not the file: its SHA-256 is .*pins {ASSET.sha256[:16]}"):
        locate(ASSET, package, "teacher", tmp_path)


def test_the_hubs_cache_comes_before_the_package(tmp_path, package, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    held = tmp_path / "hub.bin"
    held.write_bytes(BYTES)
    asked = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: asked.append(a) or str(held))
    assert locate(ASSET, {**package, "teacher_hub": ["owner/name", "file.bin"]}, "teacher", None) == held
    assert asked == [("owner/name", "file.bin")]


def test_what_is_nowhere_says_where_it_was_looked_for(tmp_path):
    options = {"teacher_path": ["a.bin"], "teacher_package": ["no_such_package_here", "b.bin"]}
    with pytest.raises(UserError, match=r"the file is not here \(pip install it\); looked for --data a.bin; b.bin of the package no_such"):
        locate(ASSET, options, "teacher", tmp_path)


@pytest.mark.parametrize("options", [{"teacher_path": ["../a.bin"]}, {"teacher_path": ["/a.bin"]}, {"teacher_package": ["os", "../a.bin"]}])
def test_nothing_outside_is_looked_at(tmp_path, options):
    (tmp_path / "a.bin").write_bytes(BYTES)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="outside"):
        locate(ASSET, options, "teacher", tmp_path / "data")


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLBENCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("DISTILLBENCH_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "distillbench")


def test_what_is_made_is_whole_and_made_once(tmp_path):
    count = []

    def make(place):
        count.append(1)
        (place / "one").write_text("1")
        time.sleep(0.2)
        (place / "two").write_text("2")

    threads = [threading.Thread(target=made, args=(tmp_path / "thing", make)) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert count == [1] and sorted(p.name for p in (tmp_path / "thing").iterdir()) == ["one", "two"]


def test_what_failed_half_way_is_made_anew(tmp_path):
    def fail(place):
        (place / "one").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        made(tmp_path / "thing", fail)
    assert not (tmp_path / "thing").exists()
    assert [p.name for p in made(tmp_path / "thing", lambda place: (place / "two").write_text("2") and None).iterdir()] == ["two"]
