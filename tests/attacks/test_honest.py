"""No method of ours is billed for more than its loops count, or refused: short runs of all, on the analytic tracks."""

import pytest

from distillbench.cards import registry
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.training.watch import Watch

TRACKS = {
    "classification": ("image-classification/blobs", 640),
    "image-generation": ("image-generation/gaussians", 2560),
    "language-modeling": ("language-modeling/markov", 320),
}
METHODS = sorted((c.problem, c.slug) for c in map(registry.method_card, registry.methods().values()))


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "slug"), METHODS)
def test_an_honest_method_is_billed_what_its_loops_count(problem, slug, tmp_path, monkeypatch):
    more = []
    bill = Watch._more
    monkeypatch.setattr(Watch, "_more", lambda *a: (more.append(a[2:]) if a[3] > 0 else None, bill(*a)))
    track, examples = TRACKS[problem]
    [spec] = plan(track, [slug], [0], controls=False, budget={"student_examples": examples})
    record = execute(spec, Store(tmp_path))
    assert record.status == "ok", record.reason
    assert {meter for meter, _ in more} <= {"auxiliary_examples"}
