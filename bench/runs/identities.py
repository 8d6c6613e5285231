"""Identity: what determines a run's result, and nothing else. Prose, places of files, source digests and machines are provenance.

An identity is plain data with the parts ``engine``, ``kind``, ``suite``, ``setting``, ``split``, ``method``, ``seed`` and ``seeds``;
its id is the SHA-256 of its canonical JSON, the same before and after the run. Everything but method and seeds is the *arena*: two
records are compared on one board exactly when their arenas are the same.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distillbench.assets import PLACES
from distillbench.cards.card import SLUG, Card, SuiteCard
from distillbench.cards.reading import to_data
from distillbench.identity import ENGINE, ROLES, derive_seed

OWN = ("method", "seed", "seeds")  # the parts that are no arena
KINDS = Path(__file__).parents[1] / "problems"


def seeds_by_role(seed: int) -> dict[str, int]:
    """The seed of every role. The teacher's never follows the run's seed: a track has one teacher."""
    return {role: derive_seed(role, 0 if role == "teacher" else seed) for role in ROLES}


def kind_version(problem: str) -> int | None:
    """``VERSION`` of the room of a kind of problem, read without importing it; None for a kind that another package brings."""
    path = KINDS / problem.replace("-", "_") / "__init__.py"
    if not SLUG.fullmatch(problem) or not path.is_file():
        return None
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["VERSION"]:
            return int(ast.literal_eval(node.value))
    return None


def arena(
    card: SuiteCard,
    *,
    digests: Mapping[str, str],
    precision: str,
    split: str,
    distribution: str | None,
    kind: int | None,
    loose: str | None,
) -> dict[str, Any]:
    """The part of a run's identity that excludes method and seed. Only records with an equal arena are compared on one board.

    Args:
        card: of the suite, at the one setting that is run (:meth:`SuiteCard.at`).
        digests: role -> SHA-256 of every asset that the setting rests on.  precision: the one that is really computed in.
        distribution: the package that brings the suite, or None.  kind: version of the kind of problem.
        loose: digest of the suite's code where nobody's word is taken for its version, else None.
    """
    [setting] = card.settings.values()
    places = {f"{role}_{place}" for role in digests for place in PLACES}
    budget, training = (_fields(part) for part in (setting.budget, setting.training))
    return {
        "engine": ENGINE,
        "kind": {"slug": card.problem, "version": kind},
        "suite": {"distribution": distribution, "slug": card.slug, "version": card.version, **_loose(loose)},
        "setting": {
            "tier": setting.tier,
            "budget": budget,
            "training": {**training, "precision": precision},
            "options": {k: to_data(v) for k, v in setting.options.items() if k not in places},
            "metrics": [card.primary, *(m.name for m in card.metrics if m.name != card.primary)],
            "digests": dict(digests),
        },
        "split": split,
    }


def method_part(
    card: Card,
    hyperparameters: Mapping[str, Any],
    *,
    distribution: str | None,
    loose: str | None,
    kind: tuple[str, int | None] | None = None,
) -> dict[str, Any]:
    """The method's part of an identity; ``loose`` as in :func:`arena`, ``kind`` its kind of problem and that one's version where the
    suite's own is another one."""
    known = {"distribution": distribution, "slug": card.slug, "version": card.version, "hyperparameters": dict(hyperparameters)}
    return {**known, **({} if kind is None else {"kind": {"slug": kind[0], "version": kind[1]}}), **_loose(loose)}


def whole(arena: Mapping[str, Any], method: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The identity of one run."""
    return {**arena, "method": dict(method), "seed": seed, "seeds": seeds_by_role(seed)}


def arena_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The arena of an identity."""
    return {k: v for k, v in identity.items() if k not in OWN}


def fits(identity: Mapping[str, Any], method: Card, suite: SuiteCard, setting: str) -> bool:
    """Whether cards say what an identity says: a record that shows one method and is ranked as another is none."""
    versions = (identity["engine"], identity["kind"]["version"] or 0, identity["method"]["version"], identity["seed"])
    if set(suite.settings) != {setting} or any(type(v) is not int for v in versions):
        return False
    part, own = identity["setting"], identity["method"]
    again = arena(
        suite,
        digests=part["digests"],
        precision=part["training"]["precision"],
        split=identity["split"],
        distribution=identity["suite"]["distribution"],
        kind=identity["kind"]["version"],
        loose=identity["suite"].get("loose"),
    )
    again["engine"] = identity["engine"]
    kind = own["kind"]["slug"] if "kind" in own else suite.problem
    solves = method.problem == kind and kind in (suite.accepts if "kind" in own else [suite.problem])
    return again == arena_of(identity) and (own["slug"], own["version"]) == (method.slug, method.version) and solves


def _fields(part: Any) -> dict[str, Any]:
    return {k: v for k, v in to_data(part).items() if k != "_"}


def _loose(digest: str | None) -> dict[str, str]:
    return {} if digest is None else {"loose": digest}
