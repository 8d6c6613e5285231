"""Cards: what a method or a suite says about itself, as literal data.

A card is a nested constructor call with literal arguments, so :func:`reading.read_card` can read it from the source
without importing the module: ``distillbench list`` needs no torch, and a broken module still has a readable card.
Published cards are never edited in a way that changes results: raise ``version`` and say what it ``supersedes``.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from distillbench.assets import Asset
from distillbench.errors import unknown

LATER = {"later": True}  # a field added after records were made: see :func:`reading.to_data`

LARGEST = 2**53

MOST_PASSES = 8  # of every example through the network that is trained: no method known needs more than a few

SLUG = re.compile(r"[a-z][a-z0-9_-]{0,63}")


# --- hyper-parameters -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Real:
    """A real hyper-parameter with its default and the bounds it may take (``ge``/``le`` inclusive, ``gt``/``lt`` not)."""

    default: float
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    note: str = ""

    def parse(self, text: Any) -> float:
        """The value ``text`` (a string or a number) stands for. Raises ValueError where it is no finite number."""
        if isinstance(text, bool) or (isinstance(text, str) and not text.isascii()):  # float() also reads the digits of other scripts
            raise ValueError("not a number")
        value = float(text)
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError("not finite")
        _in_bounds(value, self)
        return value


@dataclass(frozen=True)
class Integer:
    """An integer hyper-parameter; the bounds as in :class:`Real`."""

    default: int
    ge: int | None = None
    gt: int | None = None
    le: int | None = None
    lt: int | None = None
    note: str = ""

    def parse(self, text: Any) -> int:
        """The integer ``text`` stands for. Raises ValueError otherwise, and past 2^53, where not every reader of JSON agrees."""
        if isinstance(text, bool) or (isinstance(text, float) and not text.is_integer()):
            raise ValueError("not an integer")
        if isinstance(text, str) and not (text.isascii() and len(text) <= 40):
            raise ValueError("not an integer" if len(text) <= 40 else "too long for an integer")
        value = int(text)
        if abs(value) > LARGEST:
            raise ValueError(f"must be within {LARGEST} of 0")
        _in_bounds(value, self)
        return value


@dataclass(frozen=True)
class Choice:
    """A hyper-parameter that takes one of a few strings."""

    default: str
    options: tuple[str, ...] | list[str] = ()
    note: str = ""

    def parse(self, text: Any) -> str:
        """``text`` if it is one of the options. Raises ValueError otherwise."""
        if text not in self.options:
            raise ValueError(f"not one of {', '.join(self.options)}")
        return str(text)


@dataclass(frozen=True)
class Flag:
    """A yes-or-no hyper-parameter."""

    default: bool
    note: str = ""

    def parse(self, text: Any) -> bool:
        """True or False from a bool or from ``true``/``false``. Raises ValueError otherwise."""
        if isinstance(text, bool):
            return text
        known = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if str(text).lower() not in known:
            raise ValueError("not true or false")
        return known[str(text).lower()]


Hyperparameter = Real | Integer | Choice | Flag


def _in_bounds(value: float, bounds: Real | Integer) -> None:
    for limit, holds, sign in (
        (bounds.ge, operator.ge, ">="),
        (bounds.gt, operator.gt, ">"),
        (bounds.le, operator.le, "<="),
        (bounds.lt, operator.lt, "<"),
    ):
        if limit is not None and not holds(value, limit):
            raise ValueError(f"must be {sign} {limit}")


# --- methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method comes from.

    ``code`` is a permalink to the authors' code, where there is any. ``catalogue`` and ``row`` are its name and row in
    the papers' catalogue; ``--method <catalogue name>`` runs every method of that paper.
    """

    title: str
    year: int
    arxiv: str | None = None
    code: str | None = None
    catalogue: str | None = None
    row: int | None = None


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A number a paper prints. ``source`` says where (Table 2). Values are in the metric's unit (fractions, not percent)."""

    suite: str
    metric: str
    value: float
    source: str
    setting: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Beats:
    """The claim that this method scores better than ``method`` (a slug), in ``metric`` or the suite's primary one."""

    method: str
    metric: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Gains:
    """The claim that this method scores better than itself with ``hyperparameter`` at ``over`` (two steps beat one)."""

    hyperparameter: str
    over: Any
    metric: str | None = None
    source: str = ""


Claim = Reported | Beats | Gains


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a method says about itself.

    Attributes:
        slug: the file's name.  version: raised whenever results may change.
        problem: the kind of problem it solves, for example ``classification``.
        objective: the pure function (or functions) in the module that state its loss.
        equations: function name -> the equation it implements, in plain text.
        hyperparameters: name -> :class:`Real`, :class:`Integer`, :class:`Choice` or :class:`Flag`. Defaults live here only.
        claims: what the paper says it achieves; the board measures each.
        deviations: every known difference from the paper or the authors' code.
        exempt: check name -> the reason why that contract check cannot hold. A stale exemption fails.
        passes: how often a loss sends every example through the network it trains, with gradients; what passes more often is billed as
            further examples (:mod:`training.watch`). Boards and records show it.
        trains: False where nothing is trained (a teacher as it is, weight arithmetic, a sampler): checks of training do not apply.
        control: True for a yardstick that every board carries (scratch, teacher, ...); never ranked.
        notes: why a default is what it is, where that was tried on a tune split. What the method achieves here is never written: the
            leaderboard computes it from records (:mod:`distillbench.leaderboard.measured`).
        frozen: function of the module -> its arguments through which no gradient passes (a consistency target, a fake score), or
            ``return`` for what it gives. Those that the kind of problem calls frozen need not be named.
    """

    slug: str
    version: int
    problem: str
    title: str
    paper: Paper | None = None
    objective: str | tuple[str, ...] | None = None
    equations: dict[str, str] = field(default_factory=dict)
    hyperparameters: dict[str, Hyperparameter] = field(default_factory=dict)
    claims: tuple[Claim, ...] | list[Claim] = ()
    deviations: tuple[str, ...] | list[str] = ()
    exempt: dict[str, str] = field(default_factory=dict)
    trains: bool = field(default=True, metadata=LATER)
    passes: int = field(default=1, metadata=LATER)
    control: bool = False
    supersedes: int | None = None
    notes: str = field(default="", metadata=LATER)
    frozen: dict[str, tuple[str, ...] | list[str]] = field(default_factory=dict, metadata=LATER)

    def __post_init__(self) -> None:
        if isinstance(self.passes, bool) or not isinstance(self.passes, int) or not 1 <= self.passes <= MOST_PASSES:
            raise ValueError(f"passes={self.passes!r}: a whole number from 1 to {MOST_PASSES}")
        for function, held in self.frozen.items():
            if isinstance(held, str) or not all(isinstance(name, str) for name in held):
                raise ValueError(f'frozen: {function} has a list of names, as in {{"{function}": ["target"]}}, not {held!r}')
        for name, hyperparameter in self.hyperparameters.items():
            try:
                hyperparameter.parse(hyperparameter.default)
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"the default of hyper-parameter {name}: {error}") from error

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of the objective functions, always as a tuple."""
        if self.objective is None:
            return ()
        return (self.objective,) if isinstance(self.objective, str) else tuple(self.objective)


# --- suites -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number a suite measures. ``range`` is inclusive; ``better`` is 'higher' or 'lower', never guessed from the name.

    ``better`` None is for raw values of which neither more nor less is better, or which must rank nothing: they are measured where the
    suite has them and shown, never ranked, and decide no claim.
    ``below`` is a level and what boards say of a row whose mean lies under it: ``(1.0, "slower than its target")``.
    """

    name: str
    unit: str
    better: Literal["higher", "lower"] | None
    range: tuple[float, float | None] | None = None
    meaning: str = ""
    below: tuple[float, str] | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        level, text = self.below or (0.0, "")
        if isinstance(level, bool) or not isinstance(level, int | float) or not isinstance(text, str):
            raise ValueError(f'metric {self.name}: below is a level and a text, as in (1.0, "slower than its target")')


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one run may use. None is no cap. A run past any cap is ``over_budget`` and not ranked.

    Attributes:
        student_examples: examples the student (or generator) is updated on.
        teacher_examples: examples the teacher is asked about; a two-pass solver asks twice.
        student_tokens, teacher_tokens: that student and teacher generate.  pairs, queries, renders: see :mod:`training.meter`.
        training_flops: as torch counts them on sampled steps.
        auxiliary_examples, teacher_flops: see :mod:`training.meter`.
        pace: the meter that steps and schedules go by; its cap is used up, and may be passed by the last step. All others only bound.
        hard: meters whose cap ends a run at once, instead of being looked at when it is over.
    """

    student_examples: int
    teacher_examples: int | None = None
    training_flops: float | None = None
    wall_seconds: float | None = None
    student_tokens: int | None = field(default=None, metadata=LATER)
    teacher_tokens: int | None = field(default=None, metadata=LATER)
    pairs: int | None = field(default=None, metadata=LATER)
    queries: int | None = field(default=None, metadata=LATER)
    renders: int | None = field(default=None, metadata=LATER)
    auxiliary_examples: int | None = field(default=None, metadata=LATER)
    teacher_flops: float | None = field(default=None, metadata=LATER)
    pace: str = field(default="student_examples", metadata=LATER)
    hard: tuple[str, ...] | list[str] = field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        caps = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("pace", "hard")}
        for name, cap in caps.items():
            if cap is not None and not (isinstance(cap, int | float) and not isinstance(cap, bool) and cap >= 0):
                raise ValueError(f"budget: the cap {name} is a number from 0 on, or none, not {cap!r}")
        if not isinstance(self.hard, tuple | list):
            raise ValueError(f"budget: hard is a list of meters, not {self.hard!r}")
        for name in (self.pace, *self.hard):
            if not isinstance(name, str) or caps.get(name) is None:
                raise ValueError(f"budget: {name!r} has no cap, so it can be neither the pace nor hard")


@dataclass(frozen=True, kw_only=True)
class Training:
    """The optimizer every method of a track uses, unless its paper's method is about the optimizer.

    ``schedule``: ``constant``, ``cosine`` (to 0 over the run) or ``steps`` (times ``gamma`` at each fraction in ``milestones``).
    ``warmup`` is the fraction of the run with a linearly rising rate. ``precision`` bfloat16 is automatic mixed precision
    where the device has it, float32 elsewhere; the record says which.
    """

    batch_size: int
    optimizer: Literal["sgd", "adam", "adamw", "radam"]
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "cosine", "steps"] = "constant"
    milestones: tuple[float, ...] | list[float] = ()
    gamma: float = 0.1
    warmup: float = 0.0
    clip: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What a student may be, measured at the setting's own. They decide what is ranked and no result, so no identity holds them.

    Attributes:
        parameters, flops: how many times those of the setting's own student a student may have at most: its numbers, and its
            floating-point operations per call.
        opens: arguments of the student's architecture that a method may choose (``groups``); all others are the setting's.
    """

    parameters: float = 1.05
    flops: float = 1.05
    opens: tuple[str, ...] | list[str] = ()

    def __post_init__(self) -> None:
        for name, factor in (("parameters", self.parameters), ("flops", self.flops)):
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor >= 1:
                raise ValueError(f"caps: {name} is a factor from 1 on, not {factor!r}")
        if not isinstance(self.opens, tuple | list) or not all(isinstance(name, str) for name in self.opens):
            raise ValueError(f"caps: opens is a list of names, not {self.opens!r}")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a suite judges: data, teacher, student and budget. ``options`` is read by the suite alone.

    ``metrics`` names those of the suite's metrics that are judged here, the primary one first; none named means all of them.
    ``assets`` maps a role (``data``, ``teacher``, reference statistics, a feature network) to the bytes that scores rest on. The file of
    role R is the first existing path of ``options["R_path"]`` under --data.
    """

    tier: Literal["analytic", "embedded", "paper"]
    summary: str
    budget: Budget
    training: Training
    assets: dict[str, Asset] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    requires: tuple[str, ...] | list[str] = ()
    device: Literal["any", "cuda"] = "any"
    supersedes: int | None = None
    metrics: tuple[str, ...] | list[str] = field(default=(), metadata=LATER)
    caps: Caps = field(default=Caps(), metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class SuiteCard:
    """What a suite says about itself. ``controls`` are slugs that every board of the suite carries.

    Its yardsticks are among them: ``floor`` is what every gain is measured from, ``ceiling`` the other end of the gap, and ``strongest``
    those of which the best one on a board is what a method must beat. A card that names none, as those in older records, has the floor
    ``scratch``, the ceiling ``teacher`` (empty where that is no control of it) and, as strongest, all controls but the ceiling.

    ``accepts`` are further kinds whose methods run here: their problem is one that this suite's problem also is. A slug that several of
    its :attr:`kinds` have is that of the first.

    Metrics without a direction are written among ``metrics``; on reading they stand apart in ``shown``, so that nothing that judges
    meets them. No setting names them: a suite measures them wherever they make sense, and a run without one is whole.
    Where ``settings`` are longer than the suite's code they stand in a file beside it: ``settings=read_settings(__file__)``, see
    :func:`reading.read_settings`.
    """

    slug: str
    version: int
    problem: str
    title: str
    metrics: tuple[Metric, ...] | list[Metric]
    primary: str
    controls: tuple[str, ...] | list[str]
    settings: dict[str, Setting]
    summary: str = ""
    shown: tuple[Metric, ...] | list[Metric] = field(default=(), metadata=LATER)
    floor: str = field(default="", metadata=LATER)
    ceiling: str = field(default="", metadata=LATER)
    strongest: tuple[str, ...] | list[str] = field(default=(), metadata=LATER)
    accepts: tuple[str, ...] | list[str] = field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        for role, named in (("floor", [self.floor]), ("ceiling", [self.ceiling]), ("strongest", self.strongest)):
            if isinstance(named, str) or not {*named} <= {"", *self.controls}:
                raise ValueError(f"{role}={getattr(self, role)!r}: a yardstick is one of the controls ({', '.join(self.controls)})")
        if isinstance(self.accepts, str):
            raise ValueError(f"accepts={self.accepts!r}: write a list of kinds")
        for role, slug in (("floor", "scratch"), ("ceiling", "teacher")):
            if not getattr(self, role) and slug in self.controls:
                object.__setattr__(self, role, slug)
        if not self.strongest:
            object.__setattr__(self, "strongest", tuple(c for c in self.controls if c != self.ceiling))
        if not isinstance(self.settings, dict):
            raise ValueError("settings are a dict, name -> Setting")
        written = (*self.metrics, *self.shown)
        if shown := tuple(m for m in written if isinstance(m, Metric) and m.better is None):
            object.__setattr__(self, "metrics", tuple(m for m in written if m not in shown))
            object.__setattr__(self, "shown", shown)
        raw = {m.name for m in shown}
        for name in (self.primary, *(m for setting in self.settings.values() for m in setting.metrics)) if raw else ():
            if name in raw:
                raise ValueError(f"metric {name} has no direction (better=None): it is shown, and nothing is judged by it")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of problem whose methods run on it, its own first."""
        return (self.problem, *self.accepts)

    def metric(self, name: str | None = None) -> Metric:
        """The metric called ``name`` (the primary one by default). Raises UserError for an unknown name."""
        wanted = name or self.primary
        measured: tuple[Metric, ...] = (*self.metrics, *self.shown)
        for metric in measured:
            if metric.name == wanted:
                return metric
        raise unknown("metric", wanted, [m.name for m in measured])

    def at(self, name: str) -> SuiteCard:
        """The card as it is for setting ``name``: that setting alone, with the metrics and the primary one that it names.

        What is :attr:`shown` stays: it is no part of what a setting judges.
        """
        setting = self.settings[name]
        judged = [self.metric(m) for m in setting.metrics] or self.metrics
        return dataclasses.replace(self, settings={name: setting}, metrics=judged, primary=(*setting.metrics, self.primary)[0])
