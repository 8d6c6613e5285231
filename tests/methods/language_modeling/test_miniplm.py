"""Proof of miniplm: numpy oracle, the identities of Gu et al. 2024, numbers of the authors' code, and the whole method."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.methods.language_modeling.miniplm import best, differences
from distillbench.problems.language_modeling.oracle import LanguageOracle
from distillbench.problems.language_modeling.texts import Prompts
from distillbench.suites.language_modeling.nets import Chain, build
from distillbench.training.nets import Architecture
from tests.methods.language_modeling.short import distilled, track
from tests.oracles.language_modeling import miniplm as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "miniplm.json").read_text())


def scores(seed: int, m: int = 21) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal(m))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.77, 1.0])
def test_the_selection_equals_the_oracle_also_where_scores_are_equal(alpha: float) -> None:
    for s in (scores(0), scores(1).round(), torch.zeros(21)):
        assert best(s, alpha).tolist() == oracle.best(s.numpy(), alpha)


@pytest.mark.parametrize("ratio", ["0.3", "0.5", "1.0"])
def test_numbers_of_the_authors_code(ratio: str) -> None:
    small, large = (torch.tensor(GOLDEN["inputs"][k]) for k in ("small_losses", "large_losses"))
    assert best(small - large, float(ratio)).tolist() == GOLDEN["values"][ratio]


def test_the_scores_equal_the_oracle_on_texts_of_unequal_length() -> None:
    problem, _ = track()
    texts = problem.references.some(torch.arange(40))
    found = differences(problem, problem.student, texts)
    logs: list[list[list[float]]] = [[], []]
    for i in range(40):
        ids = texts.ids[i][texts.attention[i]]
        first = int(texts.attention[i].sum() - texts.response[i].sum())
        for kept, model in zip(logs, (problem.student, problem.teacher.module), strict=True):
            with torch.no_grad():
                distribution = model.logits(ids[None], torch.ones_like(ids[None], dtype=torch.bool))[0].log_softmax(1)
            kept.append([float(distribution[t - 1, ids[t]]) for t in range(first, len(ids))])
    assert len({len(x) for x in logs[0]}) > 3
    np.testing.assert_allclose(found.numpy(), oracle.differences(*logs), atol=1e-5)


# --- the identities of the sheet ---


def test_1_where_reference_and_teacher_agree_there_is_nothing_to_choose_by() -> None:
    problem, _ = track()
    assert differences(problem, problem.teacher.module, problem.references).abs().max() < 1e-5
    assert best(torch.zeros(7), 0.5).tolist() == [0, 1, 2]


def test_2_and_3_a_constant_changes_nothing_and_alpha_1_keeps_all() -> None:
    s = scores(2)
    assert best(s + 3.0, 0.5).tolist() == best(s, 0.5).tolist()
    assert best(s, 1.0).tolist() == list(range(21)) and len(best(s, 0.5)) == 10 and len(best(s, 1e-9)) == 1


def test_4_a_likelier_text_is_never_the_one_that_goes() -> None:
    s = scores(3)
    for i in best(s, 0.4).tolist():
        raised = s.clone()
        raised[i] += 0.5
        assert i in best(raised, 0.4)


def chain(distributions: list[list[float]]) -> Chain:
    net = build(Architecture("chain", {"vocab": len(distributions), "order": 1}), 0)
    assert isinstance(net, Chain)
    net.load_state_dict({"log_law": torch.tensor(distributions).log()})
    return net.eval()


def test_6_what_can_be_learned_is_kept_and_what_is_easy_or_noise_is_not() -> None:
    """Prompt 1: easy, both models know it. Prompt 2: hard, only the teacher does. Prompt 3: noise, neither does."""
    even, easy, hard = [0.25] * 4, [0.01, 0.97, 0.01, 0.01], [0.01, 0.01, 0.97, 0.01]
    teacher, reference = chain([even, easy, hard, even]), chain([even, easy, even, even])
    rng = np.random.default_rng(0)
    prompts = Prompts.of([[1 + i % 3] for i in range(60)], "toy", 0)
    known = {1: lambda: [1] * 6, 2: lambda: [2] * 6, 3: lambda: [3, *rng.integers(0, 4, 5).tolist()]}
    texts = prompts.with_responses([known[1 + i % 3]() for i in range(60)], pad=0)
    problem, _ = track()
    oracle_of = LanguageOracle(teacher, tokenizer="toy", vocab=4, eos=0, seed=0)
    toy = dataclasses.replace(problem, teacher=oracle_of, vocab=4)
    r = differences(toy, reference, texts)
    assert (r[1::3] - math.log(0.97 / 0.25)).abs().max() < 1e-4
    assert r[0::3].abs().max() < 1e-4 and r[1::3].min() > r[2::3].max()
    assert set(range(1, 60, 3)) == set(best(r, 1 / 3).tolist())


# --- the whole method ---


def test_3_with_all_texts_it_is_training_on_the_references_on_what_is_left_of_the_budget() -> None:
    ours, _, run = distilled("miniplm", examples=640, alpha=1.0, reference=0.25)
    assert run.phases["reference"]["student_examples"] == 160 and run.meter.counts["student_examples"] == 640
    assert run.meter.counts["teacher_examples"] == 256  # one pass, and 5: the student has no part in it
    scratch, *_ = distilled("scratch", examples=480)
    assert all(torch.equal(ours.weights[k], v) for k, v in scratch.weights.items())


def test_half_of_the_texts_make_another_student() -> None:
    half, *_ = distilled("miniplm", examples=640, alpha=0.5)
    whole, *_ = distilled("miniplm", examples=640, alpha=1.0)
    assert any(not torch.equal(half.weights[k], v) for k, v in whole.weights.items())
