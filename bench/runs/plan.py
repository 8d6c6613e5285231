"""From what a user asks for to runs with an identity. Torch is not imported here, so a cached grid re-plans in milliseconds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillbench.assets import Asset
from distillbench.cards import registry
from distillbench.cards.card import Card, Setting, SuiteCard, Training
from distillbench.cards.reading import from_data, resolve, to_data
from distillbench.errors import UserError, unknown
from distillbench.files import digest_tree
from distillbench.identity import LAST_SEED, SEEDS, canonical, sha256
from distillbench.runs import identities
from distillbench.runs.code_of import CodeOf, code_of


@dataclass(frozen=True)
class RunSpec:
    """One run to do: a method on a track with one seed.

    Attributes:
        method: a slug or the path of a file.  data: the user's folder of data sets, or None.
        identity: plain data that the run's id is computed from; see :mod:`.identities`.
        cards: ``method`` and ``suite`` (at the setting), as plain data.
        code: what the run's code says today.
        label: what tells it apart, for people, from runs of the same method and seed: its cell of a study.
    """

    suite: str
    setting: str
    method: str
    seed: int
    split: str
    data: str | None
    identity: dict[str, Any] = field(repr=False)
    cards: dict[str, Any] = field(repr=False)
    code: CodeOf = field(repr=False)
    label: str = field(default="", repr=False, compare=False)

    @property
    def id(self) -> str:
        """The id that the record of this run will have."""
        return sha256(canonical(self.identity))

    @property
    def name(self) -> str:
        """A short name for people: method and seed, after the label."""
        return f"{self.label}{', ' if self.label else ''}{self.slug} seed {self.seed}"

    @property
    def slug(self) -> str:
        """The method's slug."""
        return str(self.identity["method"]["slug"])

    @property
    def track(self) -> str:
        """``suite/setting``."""
        return f"{self.suite}/{self.setting}"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """All of the method's hyper-parameters."""
        return dict(self.identity["method"]["hyperparameters"])

    @property
    def seeds(self) -> dict[str, int]:
        """Role -> seed."""
        return dict(self.identity["seeds"])

    @property
    def suite_card(self) -> SuiteCard:
        """The suite's card at the setting, as it is run."""
        card: SuiteCard = from_data(self.cards["suite"])
        return card

    @property
    def setting_card(self) -> Setting:
        """The setting as it is run."""
        return self.suite_card.settings[self.setting]


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
    if len(seeds) > SEEDS or any(type(seed) is not int or not 0 <= seed <= LAST_SEED for seed in seeds):  # so many take minutes to look at
        raise UserError(f"seeds are whole numbers from 0 to {LAST_SEED:,}, at most {SEEDS:,} at once")
    overrides = dict(overrides or {})
    data = data or os.environ.get("DISTILLBENCH_DATA")
    if split not in ("test", "tune"):
        raise UserError(f"unknown split {split!r}; 'test' is reported, 'tune' is for choosing hyper-parameters")
    slugs = list(dict.fromkeys(s for m in methods for s in _expand(m, card.kinds)))
    wanted = [*card.controls, *(s for s in slugs if s not in card.controls)] if controls else slugs
    chosen = {w: registry.find("method", w, *card.kinds) for w in wanted}
    for over in overrides:
        if over not in {e.slug for e in chosen.values()}:
            raise unknown("method in --set", over, [e.slug for e in chosen.values()])
    setting = _changed(name, setting, budget or {}, training or {}, options or {})
    shown = dataclasses.replace(card, settings={setting_name: setting}).at(setting_name)
    specs = []
    planned: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], CodeOf]] = {}
    digests = _digests(setting, data)
    for w, found in chosen.items():
        method = registry.method_card(found)
        if method.problem not in card.kinds:
            fitting = [s for s, e in registry.suites().items() if isinstance(e.card, SuiteCard) and method.problem in e.card.kinds]
            raise UserError(
                f"method {method.slug} solves {method.problem}, suite {card.slug} asks for {' or '.join(card.kinds)}; "
                f"it runs on: {', '.join(fitting) or 'no installed suite'}"
            )
        about = code_of(found, entry, setting_name)
        arena = identities.arena(
            shown,
            digests=digests,
            precision=precision(setting.training),
            split=split,
            distribution=entry.distribution,
            kind=identities.kind_version(card.problem),
            loose=about.suite_loose,
        )
        hyperparameters = resolve(method, dict(overrides.get(method.slug, {})))
        kind = None if method.problem == card.problem else (method.problem, identities.kind_version(method.problem))
        part = identities.method_part(method, hyperparameters, distribution=found.distribution, loose=about.method_loose, kind=kind)
        planned[w] = (arena, part, {"method": to_data(method), "suite": to_data(shown)}, about)
    for seed in seeds:
        for w in wanted:
            arena, part, cards, about = planned[w]
            identity = identities.whole(arena, part, seed)
            specs.append(RunSpec(card.slug, setting_name, w, seed, split, data, identity, cards, about))
    return specs


def precision(training: Training) -> str:
    """What a run of today computes in here: bfloat16 where the track asks for it and the device has it, float32 elsewhere."""
    if training.precision == "float32" or not os.path.exists("/dev/nvidia0"):
        return training.precision  # every CPU build of torch has bfloat16
    import torch

    from distillbench.training.run import has_bfloat16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bfloat16" if has_bfloat16(device) else "float32"


def _changed(name: str, setting: Setting, budget: Mapping[str, Any], training: Mapping[str, Any], options: Mapping[str, Any]) -> Setting:
    """``setting`` with some fields replaced; only what it has can be, so that a slip of the pen never runs unnoticed."""
    parts = {"budget": vars(setting.budget), "training": vars(setting.training), "option": setting.options}
    for part, changes in zip(parts, (budget, training, options), strict=True):
        for field_name in changes:
            if field_name not in parts[part]:
                raise unknown(f"{part} of {name}", field_name, parts[part])
    try:
        return dataclasses.replace(
            setting,
            budget=dataclasses.replace(setting.budget, **budget),
            training=dataclasses.replace(setting.training, **training),
            options={**setting.options, **options},
        )
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _expand(name: str, kinds: Sequence[str]) -> list[str]:
    """What a name stands for: ``all``, the catalogue's name of a paper with several methods, or itself.

    ``problem/`` is left off where the slug alone means the same method.
    """
    found = [e.card for e in registry.methods().values() if isinstance(e.card, Card) and e.card.problem in kinds]
    cards = {c.slug: c for c in sorted(found, key=lambda c: kinds.index(c.problem), reverse=True)}  # of one slug the first kind's stays
    if name == "all":
        return [s for s in dict.fromkeys(c.slug for c in found) if not cards[s].control]
    problem, slash, slug = name.rpartition("/")
    if name in cards or (slash and slug in cards and cards[slug].problem == problem):
        return [slug]
    return [s for s, c in cards.items() if c.paper and c.paper.catalogue == name] or [name]


def _digests(setting: Setting, data: str | None) -> dict[str, str]:
    """Role -> digest of every asset that the setting rests on."""
    return {role: _digest(asset, setting, data, role) for role, asset in setting.assets.items()}


def _digest(asset: Asset, setting: Setting, data: str | None, role: str) -> str:
    """The pinned digest of an asset, or that of the bytes in the user's folder where the setting pins none."""
    if asset.sha256 is not None:
        return asset.sha256
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
