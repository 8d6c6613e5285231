"""Instruction following from end to end, on small files in MiniLLM's formats and tiny GPT-2s as transformers saves them."""

import dataclasses
import json

import pytest
import torch

from distillbench.cards import registry
from distillbench.cli.doctor import examine
from distillbench.errors import UserError
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.runs.suite import Context, TrainContext
from distillbench.suites import language_modeling as suite
from distillbench.suites.language_modeling import instruct
from tests.suites.language_modeling.fixtures import sentences, tokenizer, write_gpt2, write_lines

TRACK = "language-modeling/instruct-gpt2"
METRICS = {"rougel", *(f"rougel_{name}" for name in instruct.SETS)}
PLACES = {"dolly": "dolly", "selfinst": "self-inst", "vicuna": "vicuna", "sni": "sinst/11_", "uinst": "uinst/11_"}


def write_data(root):
    folder = root / "instruct"
    raw = [{"instruction": f"Say where the boats are, {i}.", "input": "" if i % 2 else s, "output": s} for i, s in enumerate(sentences(40))]
    write_lines(folder / "dolly/raw.jsonl", raw)
    for i, (name, place) in enumerate(PLACES.items()):
        rows = []
        for j, s in enumerate(sentences(3, seed=i + 1)):
            about = {"instruction": s, "input": ""}
            output = [s, f"{s} again"] if name == "sni" else s
            rows.append({**about, "prompt": instruct.template(s, "").replace("\n", "<n>" if j else "\n"), "output": output})
        write_lines(folder / place / "valid.jsonl", rows)
    words = tokenizer()
    write_gpt2(folder / "teacher-gpt2-1.5B", 0, len(words) + 7, width=24, words=words)  # a projection with rows of padding
    write_gpt2(folder / "init-gpt2-120M", 1, len(words), words=words)


def cut(setting):
    options = {**setting.options, "held_out": 8, "max_prompt": 250, "max_length": 254, "draws": 2, "together": 2, "judged": 2}
    return dataclasses.replace(setting, options=options, training=dataclasses.replace(setting.training, batch_size=4))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    write_data(root)
    return root


@pytest.fixture
def data(made, tmp_path, monkeypatch):
    """The user's folder, and the card's settings cut down to its size."""
    import shutil

    root = tmp_path / "data"
    shutil.copytree(made, root)
    settings = {name: cut(s) if s.tier == "paper" else s for name, s in suite.CARD.settings.items()}
    monkeypatch.setattr(suite, "CARD", dataclasses.replace(suite.CARD, settings=settings))
    monkeypatch.setattr(registry, "suite_card", lambda e: suite.CARD if e.slug == "language-modeling" else e.card)
    return root


def problem(data, **options):
    setting = suite.CARD.settings["instruct-gpt2"]
    setting = dataclasses.replace(setting, options={**setting.options, **options})
    return suite.SUITE.problem(TrainContext("instruct-gpt2", setting, seeds_by_role(0), data=data))


def test_a_run_goes_from_the_users_files_to_a_record(data, tmp_path):
    specs = plan(TRACK, ["seqkd"], [0], data=str(data), budget={"student_examples": 8})
    assert [s.method for s in specs] == ["scratch", "undistilled", "teacher", "seqkd"]
    values = {}
    for spec in specs:
        record = execute(spec, Store(tmp_path / "runs"))
        assert record.status == "ok", (spec.method, record.reason)
        values[spec.method] = {m.metric: m.value for m in record.measurements}
        assert set(values[spec.method]) == METRICS
        sets = [m for m in record.measurements if m.metric != "rougel"]
        assert all(m.n == 2 and len(m.per_example) == 2 for m in sets)
        assert values[spec.method]["rougel"] == pytest.approx(sum(m.value for m in sets) / 5)
        assert set(record.identity["setting"]["digests"]) == {"data", "teacher", "student", *instruct.SETS}
    assert record.cost["total"]["student_examples"] == 8
    assert values["undistilled"] != values["teacher"]


def test_tuning_judges_held_out_prompts_of_dolly_alone(data, tmp_path):
    spec = plan(TRACK, ["undistilled"], [0], data=str(data), split="tune", controls=False)[0]
    record = execute(spec, Store(tmp_path / "runs"))
    assert record.status == "ok", record.reason
    assert {m.metric: m.n for m in record.measurements} == {"rougel": 4, "rougel_dolly": 4}


def test_a_test_split_that_misses_a_set_is_no_score(data, tmp_path, monkeypatch):
    monkeypatch.setattr(instruct, "SETS", instruct.SETS[:-1])
    record = execute(plan(TRACK, ["undistilled"], [0], data=str(data), controls=False)[0], Store(tmp_path / "runs"))
    assert record.status == "failed" and "did not score rougel_uinst" in record.reason


def test_the_student_starts_from_its_folder_and_padding_is_never_sampled(data):
    found = problem(data)
    assert found.teacher.module.head[0].shape[0] == found.vocab + 7
    assert found.student.head[0].shape[0] == found.vocab == len(tokenizer())
    batch = next(found.data.stream(0))
    for teacher in (found.teacher.distributions(batch), None):
        assert torch.isfinite(found.divergence(batch, teacher=teacher)).all()
    with torch.no_grad():  # rows of padding that would win everywhere
        found.teacher.module.head[0][found.vocab :] = 100.0
    answers = found.teacher.responses(found.prompts, samples=1, length=4)
    assert int(answers.ids.max()) < found.vocab
    from safetensors.torch import load_file

    stored = load_file(data / "instruct/init-gpt2-120M/model.safetensors")
    assert torch.equal(found.student.head[0], stored["transformer.wte.weight"])
    assert found.length == 4 and found.samples == 1


def test_prompts_and_responses_are_the_authors(data):
    found, words = problem(data, max_length=512, max_prompt=256), tokenizer()
    texts, rows = found.references, torch.arange(len(found.references))
    raw = [json.loads(line) for line in (data / "instruct/dolly/raw.jsonl").read_text().splitlines()]
    assert len(texts) == len(found.prompts) == 32 and torch.equal(texts.index, rows)
    for i in (0, 1, 31):
        row = raw[8 + i]
        ids = words.decode(texts.ids[i][texts.attention[i]].tolist())
        given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        tail = f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n{row['output']}<|endoftext|>"
        assert ids.endswith(tail) and ids.startswith("Below is an instruction that describes a task")
        assert ("paired with an input" in ids) == bool(row["input"])
        assert words.decode(texts.ids[i][texts.response[i]].tolist()) == row["output"] + "<|endoftext|>"


def test_long_prompts_are_not_trained_on_and_long_texts_are_cut(data):
    words = tokenizer()
    lengths = sorted(int(n) for n in problem(data, max_prompt=256, max_length=512).prompts.attention.sum(1))
    limit = lengths[len(lengths) // 2]
    found = problem(data, max_prompt=limit, max_length=limit + 3)
    assert len(found.prompts) == sum(n <= limit for n in lengths) == len(found.references)
    assert int(found.references.attention.sum(1).max()) == limit + 3
    assert found.vocab == len(words)


def test_what_is_judged_or_held_out_is_not_trained_on(data):
    path = data / "instruct/dolly/raw.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    test = json.loads((data / "instruct/dolly/valid.jsonl").read_text().splitlines()[1])
    rows[20] = {"instruction": test["instruction"], "input": "", "output": "a judged prompt"}
    rows[21] = dict(rows[2], output="a held-out prompt")
    rows[3] = {"instruction": test["instruction"], "input": "", "output": "a judged prompt"}
    write_lines(path, rows)
    found = instruct.dolly(Context("instruct-gpt2", suite.CARD.settings["instruct-gpt2"], {}, data=data))
    assert (len(found.train), len(found.tuning), len(found.validation)) == (30, 4, 3)
    parts = [{e.prompt for e in part} for part in (found.train, found.tuning, found.validation)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert test["prompt"].replace("<n>", "\n") not in set().union(*parts)


def test_a_model_that_knows_the_answer_scores_one_and_the_draws_follow_the_seed(data, monkeypatch):
    ctx, seen = Context("instruct-gpt2", suite.CARD.settings["instruct-gpt2"], {}, data=data), []
    words = tokenizer()
    examples = instruct.judged_set(ctx, "sni")
    answers = [[*words.encode(e.references[1]), 0] for e in examples]

    def parrot(net, prompts, uniforms, *, eos, vocab):
        assert vocab == len(words) and eos == 0
        seen.append(uniforms)
        ids = [answers[i] for i in range(len(prompts))]
        width = max(map(len, ids))
        return torch.tensor([i + [0] * (width - len(i)) for i in ids]), torch.tensor([[j < len(i) for j in range(width)] for i in ids])

    monkeypatch.setattr(instruct, "respond", parrot)
    vocabulary = instruct.Vocabulary.of(data / "instruct/init-gpt2-120M")
    assert instruct.scores(None, examples, vocabulary, ctx.options(instruct.Options), 5) == [1.0, 1.0]
    instruct.scores(None, examples, vocabulary, ctx.options(instruct.Options), 5)
    assert len(seen) == 4 and not torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("role", "said"),
    [("dolly/raw.jsonl", "raw.jsonl: not found"), ("vicuna/valid.jsonl", "valid.jsonl: not found"), ("init-gpt2-120M", "120M: not found")],
)
def test_what_is_missing_is_said_at_planning_time(data, role, said):
    place = data / "instruct" / role
    place.rename(data / "gone")
    with pytest.raises(UserError, match=said):
        plan(TRACK, ["seqkd"], [0], data=str(data))
    finding = next(f for f in examine(str(data)) if f.what == TRACK)
    assert finding.state == "missing" and f"instruct/{role}" in finding.remedy


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "p", "response": "r"}', r"valid\.jsonl:1: field 'output' is missing \(there are: prompt, response\)"),
        ('{"prompt": 3, "output": "r"}', r"valid\.jsonl:1: field 'prompt' is int; str is wanted"),
        ("prompt,output", r"valid\.jsonl:1: is no JSON"),
        ("[1]", r"valid\.jsonl:1: is list"),
        ('{"prompt": "p", "output": []}', "must be a text or a list of texts"),
        ("", r"valid\.jsonl: is empty"),
    ],
)
def test_a_file_of_another_form_is_one_clear_line(data, line, said):
    (data / "instruct/vicuna/valid.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=said) as error:
        problem(data)
    assert "\n" not in str(error.value)


def test_a_file_too_short_to_train_on(data):
    with pytest.raises(UserError, match=r"has 40 lines, and the first 40 are held out"):
        problem(data, held_out=40)
    with pytest.raises(UserError, match=r"none of 32 prompts has 3 tokens or fewer"):
        problem(data, max_prompt=3)


def test_teacher_and_student_need_one_tokenizer(data):
    other = tokenizer(entries=320, seed=3)
    write_gpt2(data / "instruct/init-gpt2-120M", 1, 400, words=other)
    with pytest.raises(UserError, match="its tokenizer is not that of the teacher"):
        problem(data)


def test_another_length_or_padding_is_the_same_tokenizer(data):
    other = tokenizer()
    other.model_max_length = 77
    other.pad_token = other.eos_token
    other.padding_side = "left"
    other.save_pretrained(data / "instruct/init-gpt2-120M")
    problem(data)


def test_a_projection_smaller_than_the_vocabulary_is_refused(data):
    write_gpt2(data / "instruct/init-gpt2-120M", 1, len(tokenizer()) - 1)
    with pytest.raises(UserError, match=r"its projection has 329 rows, but its tokenizer has 330 entries"):
        problem(data)


def test_a_tokenizer_without_an_end_is_refused(data):
    place = data / "instruct/teacher-gpt2-1.5B/tokenizer_config.json"
    about = json.loads(place.read_text())
    del about["eos_token"]
    place.write_text(json.dumps(about))
    with pytest.raises(UserError, match="names no end of sequence"):
        problem(data)


def test_a_place_outside_the_folder_is_refused(data):
    with pytest.raises(UserError, match="outside the folder of data"):
        problem(data, teacher_path=["../../etc"])


def test_every_pair_of_the_card_has_places_for_all_its_roles():
    for name in ("instruct-gpt2", "instruct-gpt2-medium", "instruct-opt"):
        setting = registry.suite_card(registry.find("suite", "language-modeling")).settings[name]
        assert setting.tier == "paper" and set(setting.metrics) == METRICS and setting.metrics[0] == "rougel"
        for role in setting.assets:
            assert setting.options[f"{role}_path"]


def test_damaged_or_missing_weights_are_never_made_up(data):
    from safetensors.torch import load_file, save_file

    path = data / "instruct/init-gpt2-120M/model.safetensors"
    weights, whole = load_file(path), path.read_bytes()
    name = "transformer.h.0.mlp.c_fc.weight"
    save_file({k: v for k, v in weights.items() if k != name}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"weights are missing from it, for example {name}"):
        problem(data)
    save_file({**weights, name: weights[name].T.contiguous()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="damaged or of another shape"):
        problem(data)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or of another shape"):
        problem(data)
    # the base model's own names, without the prefix, are how some folders have them
    save_file({k.removeprefix("transformer."): v for k, v in weights.items()}, path, metadata={"format": "pt"})
    assert torch.equal(problem(data).student.head[0], weights["transformer.wte.weight"])
