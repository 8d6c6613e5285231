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


@pytest.fixture
def further(monkeypatch, tmp_path):
    """The meters that were billed rows beyond what loops count: noted in a file, since a worker is another process than the test's."""
    path, bill = tmp_path / "further", Watch._more

    def noted(watch, ledger, meter, rows):
        if rows > 0:
            with path.open("a") as stream:
                stream.write(f"{meter}\n")
        bill(watch, ledger, meter, rows)

    monkeypatch.setattr(Watch, "_more", noted)
    return lambda: set(path.read_text().split()) if path.exists() else set()


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "slug"), METHODS)
def test_an_honest_method_is_billed_what_its_loops_count(problem, slug, tmp_path, further):
    track, examples = TRACKS[problem]
    [spec] = plan(track, [slug], [0], controls=False, budget={"student_examples": examples})
    record = execute(spec, Store(tmp_path))
    assert record.status == "ok", record.reason
    assert further() <= {"auxiliary_examples"}


def test_a_further_pass_is_seen(attack, further):
    """What the test above looks at is there where something is wrong."""
    body = """
def loss(batch):
    more = problem.student(batch.inputs.flip(0)).sum(1)
    return run.loss(batch, kd=kl_divergence(problem.student(batch.inputs), problem.teacher.logits(batch)) + 0 * more)
return run.fit(problem.student, loss, problem.batches)
"""
    record = attack(body, imports="from distillbench.problems.classification.losses import kl_divergence")
    assert record.status == "over_budget" and further() == {"student_examples"}
