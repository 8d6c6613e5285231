"""Finding methods and suites of this and of other people's packages. (test_registry.py: slugs of several problems.)"""

import pytest

from distillbench.cards import registry
from distillbench.errors import UserError
from distillbench.runs.plan import plan

CARD = 'from distillbench.cards.card import Card\nCARD = Card(slug="{slug}", version=1, problem="classification", title="dropped in")\n'


def entries(slug):
    return [e for e in registry.methods().values() if e.slug == slug]


def test_a_file_dropped_into_a_package_is_found_and_loads(package):
    folder = package("dropped_pkg", {"classification/fresh.py": CARD.format(slug="fresh") + "def distill(problem, run): return 1\n"})
    entry = registry.find("method", "fresh")
    assert entry.path == folder / "classification" / "fresh.py" and entry.module == "dropped_pkg.classification.fresh"
    assert entry.card.title == "dropped in"
    assert entry.load().distill(None, None) == 1
    assert "fresh" in {s.method for s in plan("image-classification/blobs", ["all"], [0])}
    (folder / "classification" / "second.py").write_text(CARD.format(slug="second"))
    registry.refresh()
    assert registry.find("method", "second").slug == "second"


def test_broken_methods_are_listed_with_their_reason_and_the_rest_works(package):
    package(
        "broken_pkg",
        {
            "classification/no_card.py": "x = 1\n",
            "classification/no_python.py": "CARD = Card(\n",
            "classification/misnamed.py": CARD.format(slug="another"),
            "classification/a_suite.py": 'CARD = SuiteCard(slug="a_suite", version=1, problem="p", title="t", metrics=[], primary="m",'
            "controls=[], settings={})\n",
            "classification/_helper.py": "raise SystemExit\n",
        },
    )
    for slug, says in (
        ("no_card", "has no CARD"),
        ("no_python", "cannot be read as Python"),
        ("misnamed", "the card says slug 'another', the file's name says 'misnamed'"),
        ("a_suite", "expected a Card"),
    ):
        [entry] = entries(slug)
        assert entry.card is None and says in entry.error
        with pytest.raises(UserError, match="cannot be read|" + says):
            registry.find("method", slug)
    assert not entries("_helper")
    assert len(plan("image-classification/blobs", ["all"], [0])) >= 5


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise RuntimeError('on purpose')", "fails to import: RuntimeError: on purpose"),
        ("import no_such_package", "No module named 'no_such_package'; install what it needs"),
        ("raise SystemExit(3)", "fails to import: SystemExit: 3"),
        ("import distillbench.no_such_part", "fails to import: ModuleNotFoundError"),
    ],
)
def test_a_module_that_fails_to_import_says_so_when_it_is_used(package, body, says, tmp_path):
    package("failing_pkg", {"classification/fails.py": CARD.format(slug="fails") + body + "\n"})
    loose = tmp_path / "fails.py"
    loose.write_text(CARD.format(slug="fails") + body + "\n")
    for name in ("fails", str(loose)):
        with pytest.raises(UserError, match=says) as caught:
            registry.find("method", name).load()
        assert "\n" not in str(caught.value)
    assert registry.find("method", "kd").load().CARD.slug == "kd"


def test_two_of_one_name_are_an_error_that_names_both(package):
    ours = registry.find("method", "kd").path
    theirs = package("double_pkg", {"classification/kd.py": CARD.format(slug="kd")}) / "classification" / "kd.py"
    with pytest.raises(UserError, match="two methods are called") as caught:
        registry.find("method", "kd")
    assert str(ours) in str(caught.value) and str(theirs) in str(caught.value)
    assert registry.find("method", "dkd").error is None


def test_one_folder_named_twice_is_no_duplicate(package, monkeypatch):
    real = registry.entry_points
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [*real(group=group), registry.EntryPoint("again", group.split(".")[1], group)]
    )
    registry.refresh()
    assert registry.find("method", "kd").error is None
    assert registry.find("suite", "image-classification").error is None


@pytest.mark.parametrize(
    ("value", "init"), [("absent_pkg_x", ""), ("parent_pkg.methods", "raise RuntimeError('parent fails')"), ("parent_pkg.absent", "")]
)
def test_a_package_that_is_not_there_does_not_take_the_rest_down(package, value, init):
    package("parent_pkg", value=value, init=init)
    [entry] = entries("parent_pkg")
    assert "is not there" in entry.error
    assert registry.find("method", "kd").error is None


def test_suites_are_found_by_their_card_and_defined_by_all_modules_of_their_package(package):
    text = 'CARD = SuiteCard(slug="new-suite", version=1, problem="p", title="t", metrics=[], primary="m", controls=[], settings={})\n'
    files = {"new_suite/__init__.py": text, "new_suite/part.py": "x = 1\n", "new_suite/deeper/more.py": "", "metrics/__init__.py": ""}
    folder = package("suite_pkg", files, suites=True)
    entry = registry.find("suite", "new-suite")
    assert entry.card.slug == "new-suite" and entry.distribution is not None
    assert "metrics" not in registry.suites()
    assert entry.modules() == {
        "suite_pkg.new_suite": folder / "new_suite/__init__.py",
        "suite_pkg.new_suite.deeper.more": folder / "new_suite/deeper/more.py",
        "suite_pkg.new_suite.part": folder / "new_suite/part.py",
    }


def test_a_method_is_defined_by_its_file(package):
    folder = package("one_pkg", {"classification/a_method.py": CARD.format(slug="a_method")})
    path = folder / "classification" / "a_method.py"
    assert registry.find("method", "a_method").modules() == {"one_pkg.classification.a_method": path}
    loose = path.with_name("_loose.py")
    loose.write_text(CARD.format(slug="loose"))
    loose = loose.rename(folder / "loose.py")
    found = registry.find("method", str(loose))
    assert found.modules() == {"loose": loose} and found.distribution is None


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UserError, match="unknown suite 'image-clasification'; did you mean 'image-classification'"):
        registry.find("suite", "image-clasification")
    with pytest.raises(UserError, match=r"known: .*kd"):
        registry.find("method", "zzzzzzzzzzz")
