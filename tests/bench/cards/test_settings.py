"""Settings in a file beside the suite: the same as written on the card, as data, with one line for what is wrong."""

import subprocess

import pytest

from distillbench import code
from distillbench.assets import Asset
from distillbench.cards import registry
from distillbench.cards.card import Budget, Setting, Training
from distillbench.cards.reading import read_card, read_settings, to_data
from distillbench.errors import UserError
from distillbench.runs.plan import plan

CARD = """
from distillbench.cards.card import Metric, SuiteCard
from distillbench.cards.reading import read_settings

CARD = SuiteCard(
    slug="s",
    version=1,
    problem="classification",
    title="t",
    metrics=[Metric(name="top1", unit="fraction", better="higher"), Metric(name="nll", unit="nats", better="lower")],
    primary="top1",
    controls=[],
    settings=read_settings(__file__),
)
"""
BASE = """
[base]
tier = "analytic"
summary = "base"
budget = { student_examples = 64_000 }
training = { batch_size = 10, optimizer = "sgd", learning_rate = 0.1, milestones = [0.5] }

[base.assets.data]
name = "d"
source = "s"
licence = "l"

[base.assets.reference]
name = "r"
source = "s"
licence = "l"

[base.options]
width = 3
net = { name = "a", deep = [1, 2] }
"""


@pytest.fixture
def suite(tmp_path):
    """``suite(toml)`` writes a suite with these settings; the path of its module."""

    def write(toml, card=CARD):
        folder = tmp_path / "s"
        folder.mkdir(exist_ok=True)
        (folder / "settings.toml").write_text(toml)
        (folder / "__init__.py").write_text(card)
        return folder / "__init__.py"

    return write


def test_a_table_is_the_setting_that_a_card_would_write(suite):
    assert read_card(suite(BASE)).settings == {
        "base": Setting(
            tier="analytic",
            summary="base",
            budget=Budget(student_examples=64000),
            training=Training(batch_size=10, optimizer="sgd", learning_rate=0.1, milestones=(0.5,)),
            assets={name: Asset(name=name[0], source="s", licence="l") for name in ("data", "reference")},
            options={"width": 3, "net": {"name": "a", "deep": (1, 2)}},
        )
    }


def test_the_module_has_the_card_that_is_read_without_running_it(suite):
    path = suite(BASE)
    scope = {"__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    assert to_data(scope["CARD"]) == to_data(read_card(path))


def test_one_with_of_changes_an_earlier_one_in_what_it_says(suite):
    more = """
[wide]
of = "base"
summary = "other"
training = { learning_rate = 0.2 }
options = { net = { name = "b" } }

[wider]
of = "wide"
summary = "of another"
metrics = ["nll"]
options = { width = 9 }
assets = { noise = { name = "n", source = "s", licence = "l" } }
"""
    card = read_card(suite(BASE + more))
    base, wide, wider = card.settings.values()
    assert wide.summary == "other" and wide.budget == base.budget and wide.assets == base.assets
    assert wide.options == {"width": 3, "net": {"name": "b"}} and base.options["net"]["name"] == "a"
    assert (wide.training.learning_rate, wide.training.batch_size, base.training.learning_rate) == (0.2, 10, 0.1)
    assert wider.options == {"width": 9, "net": {"name": "b"}} and list(wider.assets) == ["data", "reference", "noise"]
    assert (wider.metrics, wide.metrics, card.at("wider").primary) == (("nll",), (), "nll")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("[base", "cannot be read as TOML"),
        ("x = 3", "setting x: is no table"),
        ("[x]\nof = 'nothing'\nsummary = 's'", "setting x: unknown setting above it 'nothing'"),
        ("[x]\nof = 'base'", "setting x: it has no summary of its own"),
        ("[x]\nof = 'base'\nsummary = 's'\nbudget = {}", "setting x: beside 'of' it cannot change budget"),
        ("[x]\nof = 'base'\nsummary = 's'\ntraining = { speed = 3 }", "setting x: .*unexpected keyword argument 'speed'"),
        ("[x]\ntier = 'analytic'", "setting x: the table has no budget"),
        ("[x]\nof = 'base'\nsummary = 's'\noptions = { day = 2026-01-01 }", "setting x: 2026-01-01 has no place in JSON"),
        ("[x]\nof = 'base'\nsummary = 's'\noptions = { far = inf }", "setting x: inf has no place in JSON"),
        ("[x]\nof = 'base'\nsummary = 's'\nassets = 3", "setting x: "),
    ],
)
def test_what_is_wrong_is_one_line_that_names_file_and_setting(suite, more, says):
    with pytest.raises(UserError, match=rf"settings\.toml: {says}") as caught:
        read_card(suite((more + "\n" if more.startswith("x") else "") + BASE + ("" if more.startswith("x") else more)))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_another_call_are_one_line(suite):
    path = suite(BASE)
    path.with_name("settings.toml").unlink()
    with pytest.raises(UserError, match=r"settings\.toml: cannot be read"):
        read_card(path)
    for call in ("read_settings('/etc/passwd')", "read_settings(__name__)", "read_settings()"):
        with pytest.raises(UserError, match=r"a card may only call .* and read_settings\(__file__\)"):
            read_card(suite(BASE, CARD.replace("read_settings(__file__)", call)))


def test_the_file_counts_where_the_card_counted(suite, tmp_path, monkeypatch):
    """By its bytes for a suite whose versions are nobody's word, by its commit for the text; not in the digest of the code's syntax."""
    path = suite(BASE)
    toml = path.with_name("settings.toml").resolve()

    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words], check=True, capture_output=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    code.forget()
    before, syntax = code.unvouched({"s": path}), code.syntax_digest({"s": path})
    assert set(before) == {"s", "s/settings.toml"} and code.recoverable("s/settings.toml", toml)
    suite(BASE.replace("width = 3", "width = 4"))
    code.forget()
    after = code.unvouched({"s": path})
    assert after["s"] == before["s"] and after["s/settings.toml"] != before["s/settings.toml"]
    assert code.syntax_digest({"s": path}) == syntax and not code.recoverable("s/settings.toml", toml)


def test_a_run_of_such_a_suite_rests_on_the_file(package, monkeypatch):
    toml = registry.find("suite", "image-classification").path.with_name("settings.toml").read_text()
    init = CARD.replace('slug="s"', 'slug="mine"').replace("version=1", "version=3")
    folder = package("toml_pkg", {"mine/__init__.py": init, "mine/settings.toml": toml}, suites=True)

    def spec():
        registry.refresh()
        return plan("mine/blobs", ["kd"], [0], controls=False)[0]

    first = spec()
    assert first.code.loose["toml_pkg.mine/settings.toml"] and "[blobs]" in first.code.sources()["toml_pkg.mine/settings.toml"]
    (folder / "mine" / "settings.toml").write_text(toml + "\n# a comment\n")
    assert spec().id != first.id and spec().code.digest == first.code.digest


def test_installed_suites_have_theirs_there_and_are_whole():
    for entry in registry.suites().values():
        card = registry.suite_card(entry)
        assert read_settings(str(entry.path)) == card.settings
        assert to_data(entry.load().CARD) == to_data(card)
