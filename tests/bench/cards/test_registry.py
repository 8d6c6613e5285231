"""Methods of different problems may share a slug; within one problem they may not."""

import pytest

from distillbench.cards import registry
from distillbench.errors import UserError
from distillbench.runs.plan import plan

METHOD = """
from distillbench.cards.card import Card
CARD = Card(slug="{slug}", version=1, problem="{problem}", title="{title}", control={control})
def distill(problem, run): ...
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An installed package of methods beside the project's own; ``write(problem, slug)`` adds one."""
    root = tmp_path / "dropped_in"
    (root / "__init__.py").parent.mkdir()
    (root / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    real = registry.entry_points

    def points(group):
        found = list(real(group=group))
        return [*found, registry.EntryPoint("zz-dropped-in", "dropped_in", group)] if group.endswith("methods") else found

    monkeypatch.setattr(registry, "entry_points", points)

    def write(problem, slug, title="one", control=False):
        path = root / problem.replace("-", "_") / f"{slug}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(METHOD.format(slug=slug, problem=problem, title=title, control=control))
        registry.refresh()
        return path

    registry.refresh()
    yield write
    registry.refresh()


def test_controls_of_two_problems_coexist(folder):
    path = folder("painting", "scratch", control=True)
    keys = registry.methods()
    assert keys["painting/scratch"].path == path
    assert keys["classification/scratch"].path != path
    assert registry.find("method", "scratch", "painting").path == path
    assert registry.find("method", "scratch", "classification").path == keys["classification/scratch"].path
    assert registry.find("method", "painting/scratch").path == path


def test_a_slug_of_several_problems_alone_is_ambiguous_and_says_what_to_write(folder):
    folder("painting", "scratch", control=True)
    with pytest.raises(UserError, match=r"say .*classification/scratch or .*painting/scratch"):
        registry.find("method", "scratch")


def test_an_unambiguous_slug_is_found_without_its_problem_and_with_another(folder):
    path = folder("painting", "only-here")
    assert registry.find("method", "only-here").path == path
    assert registry.find("method", "only-here", "classification").path == path


def test_two_methods_of_one_problem_with_one_slug_are_an_error(folder):
    path = folder("classification", "kd")
    with pytest.raises(UserError, match="two methods are called 'classification/kd'") as caught:
        registry.find("method", "kd", "classification")
    assert str(path) in str(caught.value)


def test_a_broken_method_is_listed_under_its_folder(folder):
    path = folder("painting", "odd")
    path.write_text("CARD = 1 + 1")
    registry.refresh()
    assert registry.methods()["painting/odd"].error
    with pytest.raises(UserError, match=r"must be a Card|literal"):
        registry.find("method", "odd")


def test_an_unknown_name_suggests_the_nearest_slug():
    with pytest.raises(UserError, match="did you mean 'pseudo_label'"):
        registry.find("method", "pseudo_lable")


def test_a_plan_resolves_with_the_problem_of_its_suite(folder):
    folder("painting", "kd")
    folder("painting", "scratch", control=True)
    specs = plan("image-classification/blobs", ["kd"], [0])
    assert {s.cards["method"]["problem"] for s in specs} == {"classification"}
    assert [s.method for s in specs] == ["scratch", "pseudo_label", "teacher", "shuffled_teacher", "kd"]
    assert [s.id for s in plan("image-classification/blobs", ["classification/kd"], [0])] == [s.id for s in specs]
    assert not {"only-here", "scratch"} & {s.method for s in plan("image-classification/blobs", ["all"], [0], controls=False)}


def test_a_method_of_another_problem_is_named_as_such(folder):
    folder("painting", "only-here")
    with pytest.raises(UserError, match="only-here solves painting"):
        plan("image-classification/blobs", ["only-here"], [0])
