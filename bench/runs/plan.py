"""From what a user asks for to resolved specs. Torch is not imported here, so a cached grid re-plans in milliseconds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillbench.cards import registry
from distillbench.cards.card import Card, Setting, SuiteCard
from distillbench.cards.reading import resolve, to_data
from distillbench.errors import UserError, unknown
from distillbench.files import digest_tree
from distillbench.identity import ENGINE, ROLES, derive_seed, identity
from distillbench.runs.record import SCHEMA


@dataclass(frozen=True)
class RunSpec:
    """One run to do: a method on a track with one seed. ``resolved`` is what its identity is computed from.

    Attributes:
        method: a slug or the path of a file.  data: the user's folder of data sets, or None.
        resolved: plain data: cards, source digests, hyper-parameters, budget, seeds, digests of data and teacher.
        label: what tells it apart, for people, from runs of the same method and seed: its cell of a study.
    """

    suite: str
    setting: str
    method: str
    seed: int
    split: str
    data: str | None
    resolved: dict[str, Any] = field(repr=False)
    label: str = field(default="", repr=False, compare=False)

    @property
    def id(self) -> str:
        """The identity that the record of this run will have."""
        return identity(self.resolved)

    @property
    def name(self) -> str:
        """A short name for people: method and seed, after the label."""
        slug = Path(self.method).stem if self.method.endswith(".py") else self.method
        return f"{self.label}{', ' if self.label else ''}{slug} seed {self.seed}"


def seeds_by_role(seed: int) -> dict[str, int]:
    """The seed of every role. The teacher's never follows the run's seed: a track has one teacher."""
    return {role: derive_seed(role, 0 if role == "teacher" else seed) for role in ROLES}


def track(name: str) -> tuple[registry.Entry, SuiteCard, Setting, str]:
    """The suite and setting that ``suite/setting`` names.

    Raises:
        UserError: no slash, unknown suite or setting (with the nearest name).
    """
    suite_slug, slash, setting = name.partition("/")
    entry = registry.find("suite", suite_slug)
    card = registry.suite_card(entry)
    if not slash:
        raise UserError(f"{name!r} names a suite; a track is suite/setting: {', '.join(f'{name}/{s}' for s in card.settings)}")
    if setting not in card.settings:
        raise unknown(f"setting of {suite_slug}", setting, card.settings)
    return entry, card, card.settings[setting], setting


def plan(
    name: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    controls: bool = True,
    split: str = "test",
    data: str | None = None,
    budget: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[RunSpec]:
    """The runs that ``methods`` (slugs, files, or ``all``) on track ``name`` need, controls first, seed by seed.

    Args:
        overrides: method -> hyper-parameter -> value, as text or value.
        split: ``test`` is reported; ``tune`` is for choosing hyper-parameters and is never ranked.
        data: folder of data sets for settings that need one; the environment's DISTILLBENCH_DATA by default.
        budget, training: fields of the setting's budget and training to replace (another budget is another board).
        options: entries of the setting's options to replace; likewise another board.

    Raises:
        UserError: an unknown name, a method that does not solve the suite's problem, a value out of range,
            a missing data folder.
    """
    entry, card, setting, setting_name = track(name)
    overrides = dict(overrides or {})
    data = data or os.environ.get("DISTILLBENCH_DATA")
    if split not in ("test", "tune"):
        raise UserError(f"unknown split {split!r}; 'test' is reported, 'tune' is for choosing hyper-parameters")
    slugs = list(dict.fromkeys(s for m in methods for s in _expand(m, card.problem)))
    wanted = [*card.controls, *(s for s in slugs if s not in card.controls)] if controls else slugs
    chosen = {w: registry.find("method", w, card.problem) for w in wanted}
    for over in overrides:
        if over not in {e.slug for e in chosen.values()}:
            raise unknown("method in --set", over, [e.slug for e in chosen.values()])
    setting = _changed(name, setting, budget or {}, training or {}, options or {})
    frame = _frame(entry, card, setting, setting_name, split, data)
    specs = []
    resolved_methods = {}
    for w, found in chosen.items():
        method = registry.method_card(found)
        if method.problem != card.problem:
            fitting = [s for s, e in registry.suites().items() if e.card and e.card.problem == method.problem]
            raise UserError(
                f"method {method.slug} solves {method.problem}, suite {card.slug} asks for {card.problem}; "
                f"it runs on: {', '.join(fitting) or 'no installed suite'}"
            )
        resolved_methods[w] = _method(found, method, overrides.get(method.slug, {}))
    for seed in seeds:
        roles = seeds_by_role(seed)
        for w in wanted:
            resolved = {**frame, "method": resolved_methods[w], "seed": seed, "seeds": roles}
            specs.append(RunSpec(card.slug, setting_name, w, seed, split, data, resolved))
    return specs


def _changed(name: str, setting: Setting, budget: Mapping[str, Any], training: Mapping[str, Any], options: Mapping[str, Any]) -> Setting:
    """``setting`` with some fields replaced; only what it has can be, so that a slip of the pen never runs unnoticed."""
    parts = {"budget": vars(setting.budget), "training": vars(setting.training), "option": setting.options}
    for part, changes in zip(parts, (budget, training, options), strict=True):
        for field_name in changes:
            if field_name not in parts[part]:
                raise unknown(f"{part} of {name}", field_name, parts[part])
    return dataclasses.replace(
        setting,
        budget=dataclasses.replace(setting.budget, **budget),
        training=dataclasses.replace(setting.training, **training),
        options={**setting.options, **options},
    )


def _expand(name: str, problem: str) -> list[str]:
    """What a name stands for: ``all``, the catalogue's name of a paper with several methods, or itself (``problem/`` left off)."""
    cards = {e.slug: e.card for e in registry.methods().values() if isinstance(e.card, Card) and e.card.problem == problem}
    if name == "all":
        return [s for s, c in cards.items() if not c.control]
    slug = name.removeprefix(f"{problem}/")
    if slug in cards:
        return [slug]
    return [s for s, c in cards.items() if c.paper and c.paper.catalogue == name] or [name]


def _method(entry: registry.Entry, card: Card, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"card": to_data(card), "source": entry.source_digest(), "hyperparameters": resolve(card, dict(given))}


def _frame(entry: registry.Entry, card: SuiteCard, setting: Setting, name: str, split: str, data: str | None) -> dict[str, Any]:
    """What every run of a track shares: two records are on one board exactly when this is the same."""
    shown = dataclasses.replace(card, settings={name: setting}).at(name)
    return {
        "schema": SCHEMA,
        "engine": ENGINE,
        "suite": {"card": to_data(shown), "source": entry.source_digest()},
        "setting": name,
        "split": split,
        "digests": {
            "data": _digest(setting.data, setting, data, "data"),
            "teacher": _digest(setting.teacher, setting, data, "teacher"),
            **{role: _digest(asset, setting, data, role) for role, asset in setting.others.items()},
        },
    }


def _digest(asset: Any, setting: Setting, data: str | None, role: str) -> str | None:
    """The pinned digest of an asset, or that of the bytes in the user's folder where the setting pins none."""
    if asset is None or asset.sha256 is not None:
        return None if asset is None else str(asset.sha256)
    places: list[str] = list(setting.options[f"{role}_path"])
    if data is None:
        raise UserError(
            f"this setting needs {asset.name} ({asset.source}): name the folder that holds {' or '.join(places)} with --data DIR "
            f"or the environment variable DISTILLBENCH_DATA"
        )
    there = [p for p in places if (Path(data) / p).exists()]
    if not there and f"{role}_published" in setting.options:
        return str(setting.options[f"{role}_published"])  # the library's own weights, identified by the hash in their name
    return digest_tree(Path(data) / (there or places)[0], asset.name, asset.source)
