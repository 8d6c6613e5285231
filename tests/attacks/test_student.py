"""What a student may be: the setting's own form, no teacher, and weights that a loop's optimizer left."""

import pytest

CLASSIFIER = "from distillbench.problems.classification.losses import cross_entropy, kl_divergence"
LOSS = """
def loss(batch):
    return run.loss(batch, kd=kl_divergence(problem.student(batch.inputs), problem.teacher.logits(batch)))
"""

TEACHERS = {
    "itself": "return run.export(problem.teacher.trainable_copy())",
    "inherited": 'return run.export(parts={"student": Part.of(problem.teacher.trainable_copy(), "inherited")})',
    "without run.export": "return Student.of(problem.teacher.trainable_copy())",
    "as tensors that are renamed and cast": (
        "weights = problem.teacher.trainable_copy().state_dict()\n"
        'return run.export(parts={"data": Part.data({f"t{i}": t.half() for i, t in enumerate(reversed(weights.values()))}, "inherited")})'
    ),
}


@pytest.mark.parametrize("body", TEACHERS.values(), ids=TEACHERS)
@pytest.mark.parametrize("track", ["image-classification/digits", "language-modeling/markov"])
def test_the_teacher_itself_is_no_student(attack, body, track):
    problem = "classification" if "classification" in track else "language-modeling"
    record = attack(body, track=track, problem=problem)
    assert record.status == "failed" and "the teacher's network" in record.reason, record.reason
    assert not record.measurements and "\n" not in record.reason


def test_a_teacher_of_the_students_own_form_is_none_either(attack):
    """On images the two are one architecture, and its weights may be copied to begin with: not to end with."""
    body = """
problem.student.load_state_dict(problem.teacher.trainable_copy().state_dict())
return run.export(problem.student, recipe=problem.recipe())
"""
    record = attack(body, track="image-generation/digits", problem="image-generation")
    assert record.status == "failed" and "the teacher's network" in record.reason, record.reason


def test_a_yardstick_may_be_the_teacher(attack):
    record = attack("return run.export(problem.teacher.trainable_copy())", card="control=True")
    assert record.status == "ok", record.reason


LARGER = {
    "image-classification/digits": ("classification", "widths=[64, 128]", "widths"),
    "language-modeling/markov": ("language-modeling", "width=256", "width"),
}


@pytest.mark.parametrize("track", LARGER)
@pytest.mark.parametrize("trained", [True, False], ids=["as it is", "renamed to its setting's"])
def test_a_larger_student_is_refused(attack, track, trained):
    problem, argument, name = LARGER[track]
    # A network's own word of what it is does not make it smaller: it cannot be rebuilt so.
    body = f"net = problem.new_student({argument})\n" + ("" if trained else "net.architecture = problem.student.architecture\n")
    record = attack(body + "return run.export(net)", track=track, problem=problem)
    assert record.status == "failed", record.status
    assert (f"has {name} of its own" if trained else "do not fit") in record.reason and "\n" not in record.reason


def test_an_argument_that_the_setting_opens_has_a_cap_too(attack):
    fit = "net = problem.new_student(groups={})\n" + LOSS.replace("problem.student(", "net(") + "return run.fit(net, loss, problem.batches)"
    assert attack(fit.format(4), imports=CLASSIFIER).status == "ok"
    record = attack(fit.format(40), imports=CLASSIFIER, slug="many")
    assert record.status == "over_budget" and record.reason == "parameters 7944 of 2263"


HIDDEN = {
    "in after": """
def after(terms):
    with torch.no_grad():
        for p in problem.student.parameters():
            p.mul_(1.01)
return run.fit(problem.student, loss, problem.batches, after=after)
""",
    "in the loss": """
def other(batch):
    if run.meter.counts["student_steps"] >= 3:
        problem.student.get_parameter(next(n for n, _ in problem.student.named_parameters())).data.add_(1e-3)
    return loss(batch)
return run.fit(problem.student, other, problem.batches)
""",
    "in the stream": """
stream = problem.batches
class Stream(type(stream)):
    def take(self, request):
        for p in problem.student.parameters():
            p.data.mul_(0.99)
        return super().take(request)
return run.fit(problem.student, loss, Stream(stream.data, stream.chosen, stream.batch_size, stream.seed))
""",
    "by an optimizer of its own": """
own = torch.optim.SGD(problem.student.parameters(), lr=0.01)
def after(terms):
    own.step()
return run.fit(problem.student, loss, problem.batches, after=after)
""",
}


@pytest.mark.parametrize("body", HIDDEN.values(), ids=HIDDEN)
def test_weights_change_in_an_optimizers_step_and_nowhere_else(attack, body):
    record = attack(LOSS + body, imports=CLASSIFIER)
    assert record.status == "failed" and "changed between two steps" in record.reason, record.reason


BETWEEN = {
    "after the loop": """
run.fit(problem.student, loss, problem.batches)
with torch.no_grad():
    for p in problem.student.parameters():
        p.mul_(1.01)
return run.export(problem.student)
""",
    "between two loops": """
run.fit(problem.student, loss, problem.batches, share=0.5)
for p in problem.student.parameters():
    p.data.add_(0.01)
return run.fit(problem.student, loss, problem.batches)
""",
    "from a network of its own making": """
own = type(problem.student)(**problem.student.architecture.arguments)
problem.student.load_state_dict(own.state_dict())
return run.fit(problem.student, loss, problem.batches)
""",
    "without run.export": """
student = run.fit(problem.student, loss, problem.batches)
return Student({"student": Part(student.architecture, {k: t + 0.01 for k, t in student.weights.items()}, "trained")})
""",
}


@pytest.mark.parametrize("body", BETWEEN.values(), ids=BETWEEN)
def test_weights_come_from_somewhere(attack, body):
    record = attack(LOSS + body, imports=CLASSIFIER)
    assert record.status == "failed" and "weights that no optimizer of a loop left" in record.reason, record.reason


def test_a_teacher_that_is_changed_is_said(attack):
    body = (
        LOSS + "for p in problem.teacher._module.parameters():\n    p.data.mul_(2)\nreturn run.fit(problem.student, loss, problem.batches)"
    )
    record = attack(body, imports=CLASSIFIER, track="image-classification/digits")
    assert record.status == "failed" and "the teacher's own network was changed" in record.reason
