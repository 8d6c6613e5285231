"""The bill follows the modules: what passes through a network is paid for, wherever it passes."""

import pytest

from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store

IMPORTS = "from distillbench.problems.classification.losses import cross_entropy, kl_divergence"
LOSS = """
def loss(batch, net=problem.student):
    return run.loss(batch, kd=kl_divergence(net(batch.inputs), problem.teacher.logits(batch)))
"""
FIT = "return run.fit(problem.student, loss, problem.batches)"

# What is spent beside the loop's 640 examples, and on what meter it must show.
MORE = {
    "extra batches in the loss": """
more = problem.batches.stream(100)
def greedy(batch):
    terms = run.loss(batch, kd=kl_divergence(problem.student(batch.inputs), problem.teacher.logits(batch)))
    for other in (next(more), next(more)):
        values = kl_divergence(problem.student(other.inputs), problem.teacher.logits(other))
        terms = {**terms, "kd": terms["kd"] + values.mean()}
    return terms
return run.fit(problem.student, greedy, problem.batches)
""",
    "a batch three times as large in one pass": """
more = problem.batches.stream(100)
def greedy(batch):
    extra = [next(more) for _ in range(2)]
    logits = problem.student.forward(torch.cat([batch.inputs, *(e.inputs for e in extra)]))
    theirs = torch.cat([problem.teacher.logits(b) for b in (batch, *extra)])
    return run.loss(batch, kd=kl_divergence(logits, theirs).view(3, -1).mean(0))
return run.fit(problem.student, greedy, problem.batches)
""",
    "an auxiliary learner that becomes the student": """
net = problem.new_student()
run.loop([Learner(net, lambda b: loss(b, net), counts=None)], problem.batches, steps=30)
return run.export(net)
""",
    "an auxiliary learner whose weights are copied": """
net = copy.deepcopy(problem.student)
run.loop([Learner(net, lambda b: loss(b, net), counts=None)], problem.batches, steps=20)
problem.student.load_state_dict(net.state_dict())
return run.fit(problem.student, loss, problem.batches)
""",
    "an auxiliary learner's average": """
net = problem.new_student()
learner = Learner(net, lambda b: loss(b, net), counts=None, ema=0.5)
run.loop([learner], problem.batches, steps=30)
return run.export(learner.average, averaged=True)
""",
    "a loop of its own, said to be a conversion": """
run.fit(problem.student, loss, problem.batches)
net = copy.deepcopy(problem.student)
own = torch.optim.AdamW(net.parameters(), lr=0.01)
for _, batch in zip(range(20), problem.batches.stream(100)):
    own.zero_grad()
    kl_divergence(net(batch.inputs), problem.teacher.logits(batch)).mean().backward()
    own.step()
return run.export(net, converted="int8", of=problem.student)
""",
}


@pytest.mark.parametrize("body", MORE.values(), ids=MORE)
def test_what_passes_through_the_student_is_billed_as_its_examples(attack, body):
    assert attack(LOSS + FIT, imports=IMPORTS, slug="honest").cost["total"]["student_examples"] == 640
    record = attack(LOSS + body, imports=IMPORTS)
    assert record.status == "over_budget" and record.reason == "student_examples 1920 of 640", (record.status, record.reason)
    assert record.cost["total"]["student_examples"] == 1920


@pytest.mark.parametrize("where", ["after", "before"])
def test_a_loop_of_its_own_over_the_student_is_no_training(attack, where):
    """Its passes are billed and its weights refused: whichever comes first says so in one line."""
    own = """
own = torch.optim.AdamW(problem.student.parameters(), lr=0.01)
more = problem.batches.stream(100)
def train(*_):
    batch = next(more)
    own.zero_grad()
    kl_divergence(problem.student(batch.inputs), problem.teacher.logits(batch)).mean().backward()
    own.step()
"""
    end = {"after": "return run.fit(problem.student, loss, problem.batches, after=train)", "before": f"for _ in range(20): train()\n{FIT}"}
    record = attack(LOSS + own + end[where], imports=IMPORTS)
    assert record.status == "failed" and "optimizer" in record.reason and "\n" not in record.reason, record.reason
    assert record.cost["total"]["student_examples"] > record.cost["total"]["student_steps"] * 64


TEACHER = {
    "the raw network": ("net = problem.teacher._module.requires_grad_(True)", 1280),
    "a copy": ("net = problem.teacher.trainable_copy()", 1280),
    "a copy of the raw network": ("net = copy.deepcopy(problem.teacher._module).requires_grad_(True)", 1280),
}


@pytest.mark.parametrize(("net", "rows"), TEACHER.values(), ids=TEACHER)
def test_a_loop_of_its_own_over_the_teacher_is_billed(attack, net, rows):
    body = f"""
{net}
for _, batch in zip(range(20), problem.batches.stream(0)):
    cross_entropy(net(batch.inputs), batch.labels).mean().backward()
    net.zero_grad()
{LOSS}
{FIT}
"""
    honest = attack(LOSS + FIT, imports=IMPORTS, track="image-classification/digits", slug="honest").cost["total"]
    total = attack(body, imports=IMPORTS, track="image-classification/digits").cost["total"]
    assert total["teacher_examples"] == honest["teacher_examples"] + rows
    assert total["teacher_flops"] == pytest.approx(honest["teacher_flops"] * (640 + rows) / 640)


def test_answers_of_the_raw_teacher_are_billed_without_a_gradient_too(attack):
    body = """
net = problem.teacher._module
def sly(batch):
    with torch.no_grad():
        theirs = net(batch.inputs)
    return run.loss(batch, kd=kl_divergence(problem.student(batch.inputs), theirs))
return run.fit(problem.student, sly, problem.batches)
"""
    record = attack(body, imports=IMPORTS, track="image-classification/digits")
    assert record.status == "ok" and record.cost["total"]["teacher_examples"] == 640


def test_an_auxiliary_network_has_a_meter_of_its_own(attack):
    body = (
        LOSS
        + """
net = problem.new_student()
run.loop([Learner(net, lambda b: loss(b, net), counts=None)], problem.batches, steps=5)
"""
        + FIT
    )
    total = attack(body, imports=IMPORTS).cost["total"]
    assert total["student_examples"] == 640 and total["auxiliary_examples"] == 5 * 64


def test_passes_that_the_card_declares_are_no_extra_examples(attack):
    body = """
def twice(batch):
    both = problem.student(batch.inputs), problem.student(-batch.inputs)
    return run.loss(batch, kd=sum(kl_divergence(x, problem.teacher.logits(batch)) for x in both))
return run.fit(problem.student, twice, problem.batches)
"""
    assert attack(body, imports=IMPORTS, card="passes=2").cost["total"]["student_examples"] == 640
    assert attack(body, imports=IMPORTS, slug="silent").status == "over_budget"


def test_a_table_answers_at_the_price_of_the_teacher_and_pairs_are_no_gift(tmp_path):
    """The second run finds the answers that the first one left, and pays the same; pairs made outside of loops have a price."""
    store = Store(tmp_path)
    first, second = (
        execute(spec, store).cost["total"]
        for spec in plan("image-classification/digits", ["kd", "nkd"], [0], controls=False, budget={"student_examples": 640})
    )
    assert first["teacher_forwards"] > 0 == second["teacher_forwards"]
    assert first["teacher_flops"] == second["teacher_flops"] > 0
    [spec] = plan("image-generation/gaussians", ["ode_pairs"], [0], controls=False, budget={"student_examples": 512})
    phases = execute(spec, store).cost["phases"]
    assert phases["pairs"]["teacher_examples"] == 245000 and phases["pairs"]["teacher_flops"] > 0 == phases["pairs"]["training_flops"]
