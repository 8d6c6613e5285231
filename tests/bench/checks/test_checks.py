"""The contract checks against planted bugs: each is caught, and by the check that is meant to catch it."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillbench.checks import CHECKS, check_method
from distillbench.cli import main as cli
from tests.bench.checks.planted import (
    ASK,
    BODY,
    CE,
    FIRST_LINE,
    FIT,
    KD,
    LONG,
    LOSS,
    ORACLE,
    STUDENT,
    TERM,
    TRAINING,
    Change,
    failures,
    write,
)

# --- the clean method ---------------------------------------------------------------------------------------------


SKIPPED = {"hyperparameter_bounds", "token_padding", "averages"}


def test_skeleton_passes_everything_but_the_card(tmp_path: Path) -> None:
    assert cli.main(["new", "method", "fresh", "--into", str(tmp_path)]) == 0
    results = {r.name: r for r in check_method(str(tmp_path / "fresh.py"))}
    assert {n for n, r in results.items() if r.outcome == "failed"} == {"card"}
    assert "TODO" in results["card"].message
    assert {n for n, r in results.items() if r.outcome == "skipped"} == SKIPPED
    assert {n for n, r in results.items() if r.outcome == "unproven"} == {"oracle_value", "oracle_gradient", "gains"}
    assert "no gain in top1 is shown over pseudo_label" in results["gains"].message
    assert "write fresh_oracle.py beside the method" in results["oracle_value"].message


def test_clean_method_with_an_oracle_passes(tmp_path: Path) -> None:
    results = check_method(write(tmp_path, oracle=ORACLE))
    assert {r.name: r.outcome for r in results if r.outcome != "passed"} == {**dict.fromkeys(SKIPPED, "skipped"), "gains": "unproven"}
    assert {r.name for r in results} == set(CHECKS)


# --- bugs of the objective: exactly these checks fail --------------------------------------------------------------

OBJECTIVE: dict[str, tuple[list[Change], set[str], str]] = {
    "cross-entropy called KL": ([(TERM, "-(teacher.exp() * student).sum(1)")], {"zero_at_match"}, "cross-entropy is not a divergence"),
    "mean over classes": ([(TERM, TERM.replace("sum", "mean"))], {"class_padding"}, "mean over classes"),
    "temperature squared missing": ([(BODY, TERM)], {"temperature_scale"}, "is T^2 missing or there twice"),
    "temperature squared twice": ([(BODY, f"temperature**4 * {TERM}")], {"temperature_scale"}, "is T^2 missing or there twice"),
    "student's logits centred in place": (
        [(FIRST_LINE, f"    student_logits -= student_logits.mean(1, keepdim=True)\n{FIRST_LINE}")],
        {"inputs_intact"},
        "changes student_logits in place",
    ),
    "teacher's logits scaled in place": (
        [
            (
                "teacher = F.log_softmax(teacher_logits.detach() / temperature",
                "teacher = F.log_softmax(teacher_logits.detach().div_(temperature)",
            )
        ],
        {"inputs_intact"},
        "changes teacher_logits in place",
    ),
    "mean over the batch inside": ([(BODY, f"{BODY}.mean()")], {"per_example"}, "shape ()"),
    "sum over classes forgotten": ([(TERM, TERM.removesuffix(".sum(1)"))], {"per_example"}, "shape (6, 5)"),
    "an example sees the others": (
        [(FIRST_LINE, FIRST_LINE.replace("student_logits /", "(student_logits - student_logits.mean(0)) /"))],
        {"per_example"},
        "changes with the rest of the batch",
    ),
    "size of the batch in the value": ([(BODY, f"{BODY} / len(student)")], {"batch_duplication"}, "how often an example is in the batch"),
    "softmax, then log": (
        [(FIRST_LINE, FIRST_LINE.replace("log_softmax(", "softmax(").replace("dim=1)", "dim=1).log()"))],
        {"extreme_inputs"},
        "not finite",
    ),
    "a bound at which it is infinite": ([("Real(4.0, gt=0)", "Real(4.0, ge=0)")], {"hyperparameter_bounds"}, "temperature=0"),
    "gradient into the teacher": (
        [("teacher_logits.detach()", "teacher_logits")],
        {"frozen_arguments"},
        "reaches teacher_logits",
    ),
    "stopped gradient": ([(TERM, TERM.replace("- student", "- student.detach()"))], {"temperature_scale"}, "no gradient reaches"),
}


@pytest.mark.parametrize("bug", OBJECTIVE)
def test_objective(tmp_path: Path, bug: str) -> None:
    changes, expected, message = OBJECTIVE[bug]
    failed = failures(write(tmp_path, *changes), set(CHECKS) - TRAINING - LONG - {"beats_scratch"})
    assert expected <= set(failed)
    assert any(message in failed[c] for c in expected), failed


def test_objective_against_an_oracle_that_disagrees(tmp_path: Path) -> None:
    wrong = ORACLE.replace("temperature**2", "temperature")
    assert set(failures(write(tmp_path, oracle=wrong), {"oracle_value", "oracle_gradient"})) == {"oracle_value", "oracle_gradient"}


def test_right_value_with_the_wrong_gradient(tmp_path: Path) -> None:
    method = write(tmp_path, (TERM, TERM.replace("- student", "- student / 2 - student.detach() / 2")), oracle=ORACLE)
    failed = failures(method, {"oracle_value", "oracle_gradient", "zero_at_match", "temperature_scale"})
    assert set(failed) == {"oracle_gradient"}


def test_oracle_without_the_function(tmp_path: Path) -> None:
    [result, *_] = check_method(write(tmp_path, oracle="x = 1\n"), only=["oracle_value"])
    assert result.outcome == "unproven" and "no function divergence" in result.message


# --- bugs of the training -------------------------------------------------------------------------------------------

MODULE = "problem.teacher._module"
DIRECT = f"        teacher = {MODULE}(batch.inputs)\n"
OWN_EXPORT = "    run.loop([Learner(problem.student, loss)], problem.batches)\n"
DETACHED = "teacher_logits.detach() /"
LEARNER: Change = ("from distillbench.training.run import Losses, Run", "from distillbench.training.run import Learner, Losses, Run")
CONVERTED = (
    f"{OWN_EXPORT}    other = copy.deepcopy(problem.student)\n    with torch.no_grad():\n        for p in other.parameters():\n"
    "            p.copy_((p * 127 / p.abs().max()).round() * p.abs().max() / 127)\n"
)
TOUCHED = "    with torch.no_grad():\n        problem.student.head.bias.add_(0.1)\n"
HISTORY = "(1 + sum(history))"

TRAINED: dict[str, tuple[list[Change], set[str], str]] = {
    "teacher put into train mode": ([(LOSS, f"    {MODULE}.train()\n\n{LOSS}")], {"teacher_intact"}, "answered in train mode"),
    "teacher put into train mode and asked directly": (
        [(LOSS, f"    {MODULE}.train()\n\n{LOSS}"), (ASK, f"        with torch.no_grad():\n    {DIRECT}")],
        {"teacher_intact"},
        "answered in train mode",
    ),
    "teacher in train mode for each answer alone": (
        [(ASK, f"        with torch.no_grad():\n            teacher = {MODULE}.train()(batch.inputs)\n        {MODULE}.eval()\n")],
        {"teacher_intact"},
        "answered in train mode",
    ),
    "a part of the teacher in train mode": ([(LOSS, f"    {MODULE}.head.train()\n\n{LOSS}")], {"teacher_intact"}, "answered in train mode"),
    "teacher left in train mode": (
        [(FIT, f"    done = run.fit(problem.student, loss, problem.batches)\n    {MODULE}.train()\n    return done\n")],
        {"teacher_intact"},
        "left in train mode",
    ),
    "teacher asked with gradients": ([(ASK, DIRECT)], {"teacher_intact"}, "asked with gradients on"),
    "teacher's forward called past its hooks": (
        [(ASK, DIRECT.replace("_module(", "_module.forward("))],
        {"teacher_intact"},
        "gradients on",
    ),
    "gradient into the teacher": (
        [(LOSS, f"    {MODULE}.requires_grad_(True)\n\n{LOSS}"), (ASK, DIRECT), (DETACHED, "teacher_logits /")],
        {"teacher_intact"},
        "a gradient reached its parameters",
    ),
    "teacher trained along": (
        [
            (LOSS, f"    {MODULE}.requires_grad_(True)\n\n{LOSS}"),
            (ASK, DIRECT),
            (FIT, FIT.replace("problem.batches", f"problem.batches, extra=[{MODULE}]")),
            (DETACHED, "teacher_logits /"),
        ],
        {"teacher_intact"},
        "weights or buffers were changed",
    ),
    "own fixed seed for the initial weights": (
        [
            (LOSS, f"    torch.manual_seed(0)\n    for part in problem.student.blocks:\n        part[0].reset_parameters()\n\n{LOSS}"),
            (FIT, "    problem.student.head.reset_parameters()\n" + FIT),
        ],
        {"seeds"},
        "another seed for 'init'",
    ),
    "entropy of the operating system": (
        [(STUDENT, STUDENT.replace("batch.inputs", "batch.inputs + float(np.random.default_rng().normal()) / 100"))],
        {"seeds", "resume", "micro_batches", "alignment"},
        "same seeds differ",
    ),
    "own fixed order of the data": (
        [
            ("from distillbench.training.data import Batch\n", "from distillbench.training.data import Batch, Shuffled\n"),
            (FIT, FIT.replace("problem.batches", "Shuffled(problem.train, torch.arange(len(problem.train)), 64, 0)")),
        ],
        {"seeds"},
        "another seed for 'order'",
    ),
    "state in the module": (
        [
            ("def distill", "CALLS: list[int] = []\n\n\ndef distill"),
            (STUDENT, f"{STUDENT}        CALLS.append(1)\n"),
            (KD, KD.replace("divergence", "len(CALLS) / 10 * divergence")),
        ],
        {"seeds", "resume", "micro_batches", "alignment"},
        "same seeds differ",
    ),
    "a term of shape (B, C)": ([(KD, "kd=(student - teacher) ** 2,")], TRAINING, "shape (64, 5)"),
    "a list of what was seen in the loss": (
        [
            (LOSS, f"    history: list[float] = []\n\n{LOSS}"),
            (KD, KD.replace("divergence", f"{HISTORY} * divergence")),
            (STUDENT, f"{STUDENT}        history.append(float(student.detach().std()) / 10)\n"),
        ],
        {"resume", "micro_batches"},
        "state outside modules",
    ),
    "a deque of what was seen in the loss": (
        [
            (LOSS, f"    history = collections.deque([0.0], maxlen=2)\n\n{LOSS}"),
            (KD, KD.replace("divergence", f"{HISTORY} * divergence")),
            (STUDENT, f"{STUDENT}        history.append(float(student.detach().std()))\n"),
        ],
        {"resume", "micro_batches"},
        "state outside modules",
    ),
    "a counter in the loss": (
        [
            (LOSS, f"    step = 0\n\n{LOSS}        nonlocal step\n        step += 1\n"),
            (KD, KD.replace("divergence", "step / 24 * divergence")),
        ],
        {"resume", "micro_batches"},
        "state outside modules",
    ),
    "divided by its own batch sum": (
        [(KD, "kd=(lambda w: len(w) * w * divergence(student, teacher, temperature=temperature) / w.sum())(teacher.softmax(1).amax(1)),")],
        {"micro_batches"},
        "divide by nothing that is summed over a batch",
    ),
    "divided by the number of labels in the batch": (
        [(CE, "ce=len(batch) * batch.labelled * cross_entropy(student, batch.labels) / batch.labelled.sum().clamp(min=1),")],
        {"micro_batches"},
        "divide by nothing that is summed over a batch",
    ),
    "its own mean, past run.loss": (
        [
            ("        return run.loss(\n            batch,\n", "        return dict(\n"),
            (CE, CE.removesuffix(",") + ".mean(),"),
            (KD, KD.removesuffix(",") + ".mean(),"),
        ],
        {"micro_batches"},
        "reduce with run.loss",
    ),
    "teacher's rows rolled by one": (
        [(ASK, ASK.replace("(batch)", "(batch).roll(1, 0)"))],
        {"alignment", "micro_batches"},
        "another answer of the teacher",
    ),
    "labels rolled by one": ([(CE, CE.replace("batch.labels", "batch.labels.roll(1)"))], {"alignment", "micro_batches"}, "another label"),
    "teacher asked about the next example": (
        [(ASK, ASK.replace("(batch)", "(dataclasses.replace(batch, index=(batch.index + 1) % len(problem.train)))"))],
        {"alignment"},
        "another answer of the teacher",
    ),
    "teacher's rows in another order": (
        [
            (
                LOSS,
                "    order = torch.randperm(len(problem.train), generator=torch.Generator().manual_seed(0))\n"
                f"    table = problem.teacher.logits(problem.train.take(order))\n\n{LOSS}",
            ),
            (ASK, "        teacher = table[batch.index]\n"),
        ],
        {"alignment", "seeds"},
        "another answer of the teacher",
    ),
    "teacher's rows matched by step": (
        [
            (
                LOSS,
                "    table = problem.teacher.logits(problem.train.take(torch.arange(len(problem.train))))\n"
                f"    order = iter(range(0, 100_000, 64))\n\n{LOSS}",
            ),
            (ASK, "        teacher = table[(next(order) + torch.arange(len(batch))) % len(table)]\n"),
        ],
        {"alignment", "resume", "micro_batches"},
        "another answer of the teacher",
    ),
    "exports a perturbed copy": (
        [
            LEARNER,
            (
                FIT,
                f"{OWN_EXPORT}    other = copy.deepcopy(problem.student)\n    with torch.no_grad():\n"
                "        other.head.bias.add_(0.1)\n    return run.export(other)\n",
            ),
        ],
        {"export"},
        "not one that was trained",
    ),
    "exports the student changed after training": (
        [
            LEARNER,
            (
                FIT,
                f"{OWN_EXPORT}    net = problem.student\n    with torch.no_grad():\n"
                "        net.head.bias.add_(0.1)\n    return run.export(net)\n",
            ),
        ],
        {"export"},
        "changed after the training",
    ),
    "exports an average without saying so": (
        [
            LEARNER,
            (
                FIT,
                "    learner = Learner(problem.student, loss, ema=0.9)\n    run.loop([learner], problem.batches)\n"
                "    return run.export(learner.average)\n",
            ),
        ],
        {"export"},
        "not declared as an average",
    ),
    "exports another network than it trained": (
        [LEARNER, (FIT, f"{OWN_EXPORT}    return run.export(problem.new_student())\n")],
        {"export", "seeds"},
        "not one that was trained",
    ),
    "converts what it trained without saying so": (
        [LEARNER, (FIT, f"{CONVERTED}    return run.export(other)\n")],
        {"export"},
        "not one that was trained",
    ),
    "says of another network that it was converted": (
        [LEARNER, (FIT, f"{CONVERTED}    return run.export(other, converted='int8', of=problem.new_student())\n")],
        {"export"},
        "what it is said to be converted from, is not one that was trained",
    ),
    "changes what it trained before it converts": (
        [LEARNER, (FIT, f"{CONVERTED}{TOUCHED}    return run.export(other, converted='int8', of=problem.student)\n")],
        {"export"},
        "changed after the training",
    ),
    "swaps the weights of what was exported": (
        [
            (
                FIT,
                "    done = run.fit(problem.student, loss, problem.batches)\n"
                "    swapped = dataclasses.replace(done.only, weights={k: v * 1.01 for k, v in done.weights.items()})\n"
                "    return dataclasses.replace(done, parts={'student': swapped})\n",
            )
        ],
        {"export"},
        "answers differently",
    ),
    "a hook that does not travel with the weights": (
        [(LOSS, f"    problem.student.head.register_forward_hook(lambda m, i, o: 2 * o)\n\n{LOSS}")],
        {"export"},
        "answers differently",
    ),
    "returns the network itself": ([(FIT, f"{FIT.replace('return ', '')}    return problem.student\n")], TRAINING, "distill returned MLP"),
}


@pytest.mark.parametrize("bug", TRAINED)
def test_training(tmp_path: Path, bug: str) -> None:
    changes, expected, message = TRAINED[bug]
    failed = failures(write(tmp_path, *changes), TRAINING)
    assert set(failed) == expected, failed
    assert any(message in text for text in failed.values()), failed


def test_a_declared_average_and_a_trained_copy_of_the_teacher_are_no_bugs(tmp_path: Path) -> None:
    folder = tmp_path / "average"
    folder.mkdir()
    assert not failures(write(folder, (FIT, FIT.replace("problem.batches", "problem.batches, ema=0.9"))), TRAINING)
    retrained = (
        LOSS,
        "    mine = problem.teacher.trainable_copy()\n"
        "    run.loop([Learner(mine, lambda b: run.loss(b, ce=cross_entropy(mine(b.inputs), b.labels)),"
        f" learning_rate=1e-4)], problem.batches, share=0.5)\n    teacher_of = problem.teacher.retaught(mine.eval())\n\n{LOSS}",
    )
    folder = tmp_path / "retrained"
    folder.mkdir()
    assert not failures(write(folder, LEARNER, retrained, (ASK, ASK.replace("problem.teacher", "teacher_of"))), TRAINING)


@pytest.mark.parametrize(
    "said",
    [
        f"{CONVERTED}    return run.export(other, converted='int8', of=problem.student)\n",
        CONVERTED.replace(OWN_EXPORT, f"    player = Learner(problem.student, loss, ema=0.9)\n{OWN_EXPORT}").replace(
            "Learner(problem.student, loss)]", "player]"
        )
        + "    return run.export(other, converted='int8', of=player.average)\n",
    ],
)
def test_a_declared_conversion_of_what_was_trained_or_of_its_average_is_no_bug(tmp_path: Path, said: str) -> None:
    assert not failures(write(tmp_path, LEARNER, (FIT, said)), TRAINING)


def test_beats_scratch(tmp_path: Path) -> None:
    useless = [(CE, ""), (KD, "kd=0 * cross_entropy(student, batch.labels),")]
    failed = failures(write(tmp_path, *useless), {"beats_scratch"})
    assert "scratch" in failed["beats_scratch"]


def test_a_crash_is_a_failed_check(tmp_path: Path) -> None:
    failed = failures(write(tmp_path, (STUDENT, f"{STUDENT}        raise ZeroDivisionError('planted')\n")))
    assert set(failed) == TRAINING | LONG | {"temperature_scale"}
    assert all("ZeroDivisionError: planted" in m for m in failed.values())
