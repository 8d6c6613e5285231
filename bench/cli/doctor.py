"""What this machine can run, and what each missing thing would need."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from distillbench.assets import locate
from distillbench.cards import registry
from distillbench.errors import UserError
from distillbench.runs.plan import plan

EXTRAS = {
    "train": ("torch", "torchvision", "torchmetrics", "accelerate", "safetensors", "scikit-learn"),
    "lm": ("transformers", "lm-eval", "gguf", "rouge-score"),
    "images": ("diffusers", "clean-fid", "torch-fidelity"),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what it is, whether it is there, and how to get it where it is not."""

    what: str
    state: Literal["ok", "missing", "broken"]
    remedy: str = ""


def examine(data: str | None) -> list[Finding]:
    """Look at Python, packages, devices, the browser, every method and every setting; nothing is changed or downloaded."""
    found = [Finding(f"Python {platform.python_version()}", "ok" if sys.version_info >= (3, 11) else "broken", "3.11 or newer")]
    for extra, packages in EXTRAS.items():
        for package in packages:
            try:
                found.append(Finding(f"{package} {version(package)}", "ok"))
            except PackageNotFoundError:
                found.append(Finding(package, "missing", f"pip install 'distillbench[{extra}]'"))
    torch_there = importlib.util.find_spec("torch") is not None
    found.append(_device(torch_there))
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    found.append(Finding("a browser for the board's tests", "ok" if browser else "missing", "" if browser else "apt-get install chromium"))
    for kind, entries in (("method", registry.methods()), ("suite", registry.suites())):
        for name, entry in entries.items():
            try:
                if torch_there:
                    entry.load()
                elif entry.error:
                    raise UserError(entry.error)
                found.append(Finding(f"{kind} {name}", "ok"))
            except UserError as error:
                found.append(Finding(f"{kind} {name}", "broken", str(error)))
    for slug, entry in registry.suites().items():
        if entry.card is not None:
            found += [_setting(f"{slug}/{s}", data) for s in registry.suite_card(entry).settings]
    return found


def _device(torch_there: bool) -> Finding:
    if not torch_there:
        return Finding("GPU", "missing", "torch is not installed: pip install 'distillbench[train]'")
    import torch

    if torch.cuda.is_available():
        return Finding(f"GPU {torch.cuda.get_device_name(0)}", "ok")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding(
        f"GPU (there are {cores} CPU cores)", "missing", "analytic and embedded settings need none; paper settings take days without one"
    )


def _setting(track: str, data: str | None) -> Finding:
    suite, _, name = track.partition("/")
    card = registry.suite_card(registry.find("suite", suite))
    setting = card.settings[name]
    missing = [r for r in setting.requires if importlib.util.find_spec(r) is None]
    if missing:
        return Finding(track, "missing", f"install {', '.join(missing)}")
    wanted = []
    for role, asset in setting.assets.items():
        places = setting.options.get(f"{role}_path", ())
        if asset is None or not places or f"{role}_published" in setting.options:
            continue
        if f"{role}_package" in setting.options:
            try:
                locate(asset, setting.options, role, None if data is None else Path(data))
            except UserError as error:
                return Finding(track, "missing", str(error))
            continue
        if data is None or not any((Path(data) / str(p)).exists() for p in places):
            wanted.append(f"{asset.name} ({asset.source}) as {' or '.join(map(str, places))}")
    if wanted:
        return Finding(track, "missing", f"{' and '.join(wanted)} in the folder named by --data")
    try:
        if setting.tier != "paper":
            plan(track, card.controls, [0])
    except UserError as error:
        return Finding(track, "broken", str(error))
    return Finding(track, "ok")
