"""Spec-Bench's questions and the prompts to train on, in their real forms; models are tiny Llamas as transformers saves them."""

import dataclasses
import json
import sys
import types

import pytest
import torch

from distillbench.cards.card import Budget, Training
from distillbench.cards.options import options_of
from distillbench.errors import UserError
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.record import Measurement
from distillbench.runs.suite import Context, JudgeContext, TrainContext
from distillbench.suites import speculative as suite
from distillbench.suites.speculative import spec_bench
from tests.suites.language_modeling.fixtures import sentences, tokenizer, write_gpt2, write_lines, write_llama

CATEGORIES = [c for categories in spec_bench.SUBSETS.values() for c in categories]
OPTIONS = {
    "world": "spec_bench",
    "data_path": ["spec-bench/train.jsonl"],
    "questions_path": ["spec-bench/question.jsonl"],
    "teacher_path": ["spec-bench/target"],
    "student_path": ["spec-bench/draft"],
    "template": "Be kind. USER: {turn} ASSISTANT:",
    "max_prompt": 40,
    "length": 6,
    "temperature": 1.0,
    "gamma": 2,
    "timed": 1,
    "tuning": 3,
    "validation": 2,
    "samples": 1,
}


def setting(**options):
    training = Training(batch_size=4, optimizer="adamw", learning_rate=0.001)
    real = suite.CARD.settings["spec-bench"]
    return dataclasses.replace(real, budget=Budget(student_examples=8), training=training, options={**OPTIONS, **options})


def questions():
    """Two questions of every category, of which those of MT-bench have two turns and most others a reference, as in the real file."""
    asked = sentences(2 * len(CATEGORIES), seed=1)
    rows = []
    for i, q in enumerate(asked):
        category = CATEGORIES[i // 2]
        turns = [q, "And now in one word."] if category in spec_bench.SUBSETS["mt_bench"] else [f"{category}: {q}"]
        rows.append({"question_id": 81 + i, "category": category, "turns": turns, **({"reference": ["yes"]} if i % 3 else {})})
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    folder = root / "spec-bench"
    write_lines(folder / "question.jsonl", questions())
    train = sentences(10, seed=2)
    rows = [{"prompt": p, "response": p[::-1]} if i % 2 else {"prompt": p} for i, p in enumerate(train)]
    chat = [{"from": "human", "value": f"{train[0]}?"}, {"from": "gpt", "value": "Seven."}, {"from": "human", "value": "Why?"}]
    rows.append({"id": "x_0", "conversations": chat})
    rows.append({"id": "x_1", "conversations": chat[1:]})
    write_lines(folder / "train.jsonl", rows)
    words = tokenizer(beginning=True)
    write_llama(folder / "target", 0, len(words) + 3, width=24, words=words)
    write_llama(folder / "draft", 1, len(words) + 3, words=words)
    return root


@pytest.fixture
def data(made, tmp_path):
    import shutil

    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def judge(monkeypatch):
    """Stand-ins for the judge and the clock, which are tested where they are; they note what they were asked."""
    asked = []

    def judged(target, draft, texts, *, vocab, temperature, gammas=range(1, 9)):
        asked.append(("judge", texts, vocab, temperature))
        return [Measurement.mean("acceptance", [float(len(texts))] * len(texts)), Measurement("draft_cost", 0.1, 1)]

    def clock(target, draft, prompts, *, length, gamma, eos):
        asked.append(("clock", prompts, length, gamma))
        return [Measurement("measured_speedup", 1.0, len(prompts)), Measurement("lossless", 1.0, len(prompts))]

    for name, function in (("judge", judged), ("decoding", clock)):
        module = types.ModuleType(f"distillbench.suites.speculative.{name}")
        setattr(module, {"judge": "judge", "decoding": "measured_speedup"}[name], function)
        monkeypatch.setitem(sys.modules, f"distillbench.suites.speculative.{name}", module)
    return asked


def test_categories_are_six_subsets_and_only_first_turns_are_asked(data):
    found = spec_bench.load_questions(data / "spec-bench/question.jsonl")
    assert {name: len(q) for name, q in found.items()} == {
        "mt_bench": 16,
        "translation": 2,
        "summarization": 2,
        "qa": 2,
        "math_reasoning": 2,
        "rag": 2,
    }
    rows = questions()
    assert found["mt_bench"] == [r["turns"][0] for r in rows[:16]]
    assert found["rag"] == [r["turns"][0] for r in rows[-2:]] and found["rag"][0].startswith("rag: ")


def test_prompts_to_train_on_have_either_form(data):
    found = spec_bench.load_examples(data / "spec-bench/train.jsonl")
    train = sentences(10, seed=2)
    assert [e.prompt for e in found] == [*train, f"{train[0]}?"]
    assert [e.response for e in found[:2]] == [None, train[1][::-1]] and found[-1].response == "Seven."


def test_what_is_asked_or_held_out_is_not_trained_on(data):
    path = data / "spec-bench/train.jsonl"
    asked = questions()[0]["turns"][0]
    path.write_text(json.dumps({"prompt": asked, "response": "leak"}) + "\n" + path.read_text())
    train, held, tuning = spec_bench.training(Context("spec-bench", setting(), {}, data=data))
    everything = [e.prompt for e in spec_bench.load_examples(path)]
    assert asked in everything and everything[1:4] == tuning and [e.prompt for e in held] == everything[4:6]
    assert [e.prompt for e in train] == everything[6:]


def test_the_problem_has_templates_beginnings_and_the_responses_there_are(data):
    words = tokenizer(beginning=True)
    found = spec_bench.problem(TrainContext("spec-bench", setting(max_prompt=200), seeds_by_role(0), data=data))
    train = spec_bench.training(Context("spec-bench", setting(), {}, data=data))[0]
    assert len(found.prompts) == len(train) == 6 and found.length == 6 and found.vocab == len(words)
    for i, example in enumerate(train):
        ids = found.prompts.ids[i][found.prompts.attention[i]].tolist()
        assert words.decode(ids) == f"<s>Be kind. USER: {example.prompt} ASSISTANT:"
    answered = [i for i, e in enumerate(train) if e.response is not None]
    assert found.references.index.tolist() == answered and len(answered) == 4
    assert int(found.references.response.sum(1).max()) == 6
    held = spec_bench.training(Context("spec-bench", setting(), {}, data=data))[1]
    assert [e.response for e in held].count(None) == 1 and len(found.validation) == 1
    batch = next(found.data.stream(0))
    assert torch.isfinite(found.divergence(batch)).all()
    assert found.student.architecture.name == "transformers" and found.student.head[0].shape[0] == found.vocab + 3


def test_prompts_alone_are_enough_but_no_references_to_train_on(data):
    write_lines(data / "spec-bench/train.jsonl", [{"prompt": p} for p in sentences(12, seed=4)])
    found = spec_bench.problem(TrainContext("spec-bench", setting(), seeds_by_role(0), data=data))
    assert len(found.references) == 0 and len(found.validation) == 0
    assert int(next(found.teacher_text().stream(0)).response.sum()) > 0
    with pytest.raises(UserError, match="prompts without responses"):
        found.data  # noqa: B018


def test_long_prompts_keep_their_first_and_last_half(data):
    vocabulary = spec_bench.Vocabulary.of(data / "spec-bench/target")
    long = " ".join(sentences(20))
    whole = vocabulary.ids(OPTIONS["template"].replace("{turn}", long), special=True)
    found = spec_bench.pool([long, "a {turn} {x}"], vocabulary, options_of(setting(max_prompt=41), spec_bench.Options))
    assert found.ids[0].tolist() == whole[:20] + whole[-21:]
    assert "a {turn} {x}" in vocabulary.text(found.ids[1][found.attention[1]].tolist())


def test_measures_are_overall_and_by_subset(data, judge):
    net = spec_bench.load(str(data / "spec-bench/draft"))
    seeds = seeds_by_role(0)
    found = {m.metric: m for m in spec_bench.measure(net, JudgeContext("name", setting(), seeds, data=data))}
    subsets = {f"acceptance_{name}": 16.0 if name == "mt_bench" else 2.0 for name in spec_bench.SUBSETS}
    assert {name: found[name].value for name in subsets} == subsets
    assert found["acceptance"].n == 26 and set(found) == {"acceptance", "draft_cost", "measured_speedup", "lossless", *subsets}
    kinds = [a[0] for a in judge]
    assert kinds == ["judge"] * 7 + ["clock"]
    whole, vocab, temperature = judge[0][1], judge[0][2], judge[0][3]
    assert (len(whole), vocab, temperature) == (26, len(tokenizer()), 1.0) and int(whole.ids.max()) < vocab
    parts = torch.cat([a[1].ids for a in judge[1:7]])
    assert torch.equal(parts, whole.ids)  # the subsets are the whole, in order
    clock = judge[-1]
    assert len(clock[1]) == 6 and clock[2:] == (6, 2)
    spec_bench.measure(net, JudgeContext("name", setting(), {**seeds_by_role(1), "teacher": seeds["teacher"]}, data=data))
    assert judge[8][1].digest == whole.digest  # the same texts for every seed


def test_tuning_never_sees_the_questions(data, judge):
    net = spec_bench.load(str(data / "spec-bench/draft"))
    found = {m.metric: m for m in spec_bench.measure(net, JudgeContext("name", setting(), seeds_by_role(0), split="tune", data=data))}
    assert found["acceptance"].n == 3 and not [name for name in found if name.startswith("acceptance_")]


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("question.jsonl", '{"question_id": 1, "turns": ["x"]}', r"question\.jsonl:1: field 'category' is missing"),
        ("question.jsonl", '{"question_id": 1, "category": "ragg", "turns": ["x"]}', "unknown category 'ragg'; did you mean 'rag'"),
        ("question.jsonl", '{"question_id": 7, "category": "rag", "turns": []}', "question 7: turns must begin with a text"),
        ("question.jsonl", '{"question_id": 7, "category": "rag", "turns": ["x"]}', "has no question of mt_bench, translation"),
        ("train.jsonl", '{"instruction": "x"}', "a line has the fields instruction; a prompt"),
        ("train.jsonl", '{"prompt": "x", "response": 3}', "are wanted as texts"),
        ("train.jsonl", '{"conversations": [{"from": "gpt", "value": "x"}]}', "no line holds what a user asks first"),
        ("train.jsonl", '{"prompt": "x"}', "has 1 prompts, and the first 5 are held out"),
    ],
)
def test_a_file_of_another_form_is_one_clear_line(data, file, line, said):
    (data / "spec-bench" / file).write_text(line + "\n")
    with pytest.raises(UserError, match=said) as error:
        spec_bench.problem(TrainContext("spec-bench", setting(), seeds_by_role(0), data=data))
    assert "\n" not in str(error.value)


def test_a_draft_needs_the_targets_tokenizer(data):
    write_gpt2(data / "spec-bench/draft", 1, 400, words=tokenizer(entries=320, seed=3))
    with pytest.raises(UserError, match="its tokenizer is not that of the teacher"):
        spec_bench.problem(TrainContext("spec-bench", setting(), seeds_by_role(0), data=data))


def test_a_projection_with_other_padding_is_refused_before_the_clock_would(data):
    write_llama(data / "spec-bench/draft", 1, len(tokenizer()))
    with pytest.raises(UserError, match=r"its projection has 330 rows and the target's 333"):
        spec_bench.problem(TrainContext("spec-bench", setting(), seeds_by_role(0), data=data))
