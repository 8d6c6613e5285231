"""Files that settings pin by hash, and where they are looked for: the user's folder, the hub's cache, an installed package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from distillbench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Asset:
    """Bytes a setting rests on. ``sha256`` pins them; None where the user's own folder is hashed at planning time."""

    name: str
    source: str
    licence: str
    sha256: str | None = None


PLACES = ("path", "package", "hub", "published")  # options["<role>_<place>"] say where an asset may lie; its digest says what it is


def cache_folder() -> Path:
    """Where what is computed once lies (converted models, teachers' responses): $DISTILLBENCH_CACHE, or ~/.cache/distillbench."""
    return Path(os.environ.get("DISTILLBENCH_CACHE") or Path.home() / ".cache" / "distillbench")


def locate(asset: Asset, options: dict[str, Any], role: str, data: Path | None) -> Path:
    """The file of a pinned asset: below ``data`` at ``options["<role>_path"]``, in the hub's cache as ``options["<role>_hub"]``
    (repository, file), or in the installed package ``options["<role>_package"]`` (module, file).

    Raises:
        UserError: it is nowhere, what is there has other bytes than the pinned ones, or the options point outside these places.
    """
    named = [*options.get(f"{role}_path", ()), *options.get(f"{role}_package", ("", ""))[1:]]
    if any(Path(n).is_absolute() or ".." in Path(n).parts for n in named):  # a setting may come from somebody's record
        raise UserError(f"the setting looks for its {role} outside the folder of data or of a package: {', '.join(named)}")
    tried = []
    for name in options.get(f"{role}_path", ()):
        tried.append(f"--data {name}")
        if data is not None and (data / name).is_file():
            return _checked(data / name, asset)
    if f"{role}_hub" in options:
        repository, name = options[f"{role}_hub"]
        tried.append(f"{name} of {repository} in the hub's cache")
        found = _in_hub_cache(repository, name)
        if found is not None:
            return _checked(found, asset)
    if f"{role}_package" in options:
        module, name = options[f"{role}_package"]
        tried.append(f"{name} of the package {module}")
        spec = importlib.util.find_spec(module)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(place) / name).is_file():
                return _checked(Path(place) / name, asset)
    raise UserError(f"{asset.name} is not here ({asset.source}); looked for {'; '.join(tried)}")


def place(options: dict[str, Any], role: str, data: Path | None) -> Path:
    """What the user's folder holds of an asset: the first place of ``options["<role>_path"]`` that is there, a file or a folder.

    Raises:
        UserError: no folder was named, none of the places is there, or one lies outside the folder.
    """
    places = [str(p) for p in options[f"{role}_path"]]
    if data is None:
        raise UserError(f"name the folder that holds {' or '.join(places)} with --data DIR")
    if any(Path(p).is_absolute() or ".." in Path(p).parts for p in places):  # a setting may come from somebody's record
        raise UserError(f"the setting looks for {role} outside the folder of data: {', '.join(places)}")
    there = [data / p for p in places if (data / p).exists()]
    if not there:
        raise UserError(f"{data / places[0]}: not found; docs/paper-settings.md says how the folder is laid out")
    return there[0]


def _in_hub_cache(repository: str, name: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def _checked(path: Path, asset: Asset) -> Path:
    if asset.sha256 is not None:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != asset.sha256:
            raise UserError(f"{path}: is not {asset.name}: its SHA-256 is {digest[:16]}..., the setting pins {asset.sha256[:16]}...")
    return path


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, made by ``make(path)`` where it is not there yet: whole or not at all, and once, however many ask at the same time."""
    import shutil

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            half = folder.with_name(f"{folder.name}.half")
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            make(half)
            half.rename(folder)
    return folder
