"""The student as a file, and how any suite makes a network of it again."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from distillbench.cards.card import Budget, Training
from distillbench.errors import UserError
from distillbench.identity import sha256
from distillbench.runs.identities import seeds_by_role
from distillbench.training.nets import Architecture
from distillbench.training.run import Run
from distillbench.training.student import ONLY, Part, Student, rebuild, rebuild_parts


def build(architecture, seed):
    torch.manual_seed(seed)
    net = nn.Linear(**architecture.arguments)
    net.architecture = architecture
    return net


def student(**arguments):
    return Student.of(build(Architecture("line", {"in_features": 3, "out_features": 2, **arguments}), 1))


def only(student, **changes):
    """The student with another only part."""
    return Student({ONLY: dataclasses.replace(student.only, **changes)})


def test_a_rebuilt_network_has_the_weights_and_is_in_evaluation_mode():
    mine = student()
    net = rebuild(Student.from_bytes(mine.to_bytes()), build)
    assert not net.training
    assert all(torch.equal(v, mine.weights[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("arguments", [{"depth": 3}, {"in_features": "wide"}, {"out_features": -1}, {}])
def test_an_architecture_that_cannot_be_built_is_one_line(arguments):
    broken = only(student(), architecture=Architecture("line", arguments))
    with pytest.raises(UserError, match=r"architecture line cannot be built from .*: \w+Error: ") as error:
        rebuild(broken, build)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_one_line():
    broken = only(student(), weights={"weight": torch.zeros(2, 4), "bias": torch.zeros(2)})
    with pytest.raises(UserError, match="the weights do not fit architecture line: size mismatch") as error:
        rebuild(broken, build)
    assert "\n" not in str(error.value)


# --- one network: the file is what it always was ------------------------------------------------------------------

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3) / 7, "bias": torch.tensor([1.0, -2.0]), "count": torch.tensor(3)}
LINE = Architecture("line", {"in_features": 3, "out_features": 2})
WHOLE = (
    b'P\x01\x00\x00\x00\x00\x00\x00{"__metadata__":{"distillbench":"{\\"arguments\\": {\\"in_features\\": 3, \\"out_features\\": 2}, '
    b'\\"averaged\\": \\"ema halving\\", \\"name\\": \\"line\\", \\"recipe\\": {}}"},'
    b'"count":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
    b'"bias":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},"weight":{"dtype":"F32","shape":[2,3],"data_offsets":[16,40]}}'
    b"\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x80?\x00\x00\x00\xc0\x00\x00\x00\x00%I\x12>%I\x92>\xb7m\xdb>%I\x12?n\xdb6?"
)


def one(averaged="", recipe=None):
    return Student({ONLY: Part(LINE, WEIGHTS, "averaged" if averaged else "trained", averaged)}, recipe or {})


@pytest.mark.parametrize(
    ("averaged", "recipe", "digest"),
    [
        ("", {"rule": "heun", "sigmas": [2.0, 0.5]}, "80822672263d0d7cf23fc0d8ed0f63b713ae6657b42cfcac6fec5eee3d8822c1"),
        ("average", {}, "d37a0f85572d45012b98d1d02482b924247c4fb3b383aecfefbb1cf6f9197024"),
        ("ema 0.999", {}, "d37a0f85572d45012b98d1d02482b924247c4fb3b383aecfefbb1cf6f9197024"),
        ("ema halving", {}, "2509d2f789c9ec29199e510a250739f1b5de3617be85fe210d40064175d3a7da"),
    ],
)
def test_a_student_that_is_one_network_has_the_bytes_that_published_records_name(averaged, recipe, digest):
    blob = one(averaged, recipe).to_bytes()
    assert sha256(blob) == digest and one(averaged, recipe).size == len(blob)
    again = Student.from_bytes(blob)
    assert again.plain and again.to_bytes() == blob and again.architecture == LINE and again.recipe == recipe


def test_the_whole_file_of_a_student_that_is_one_network():
    assert one("ema halving").to_bytes() == WHOLE
    assert Student.from_bytes(WHOLE).averaged == "ema halving"


@pytest.mark.parametrize("suite", ["image_classification", "image_generation"])
def test_a_file_that_an_older_distillbench_wrote_is_written_again_byte_for_byte(suite):
    blob = (Path(__file__).parents[3] / "suites" / suite / "digits_teacher.safetensors").read_bytes()
    assert Student.from_bytes(blob).to_bytes() == blob


# --- several parts ------------------------------------------------------------------------------------------------

BASE = "ab" * 32


def several():
    return Student(
        {
            "set": Part.data({"images": torch.rand(2, 1, 3, 3), "labels": torch.tensor([0, 1])}),
            "codes": Part(LINE, {"weight": torch.tensor([[1, -2, 3], [4, 5, -6]], dtype=torch.int8)}, "converted", "int8"),
            "expert": Part.of(build(LINE, 1), "averaged", "ema 0.9"),
            "prefix": Part.data({"states": torch.zeros(4, dtype=torch.bfloat16)}, base=BASE),
            "adapter": Part(Architecture("lora", {"rank": 2}), {"down": torch.ones(2, 3)}, "trained", base=BASE),
            "prompt": Part.words('Think: "step by step"\n — 一步\x00'),
            "head": Part.of(build(LINE, 2), "inherited"),
            "labels": Part.data({"soft": torch.eye(2)}, "untrained"),
        },
        {"rule": "sum"},
    )


def test_several_parts_come_back_from_one_file():
    student = several()
    again = Student.from_bytes(student.to_bytes())
    assert again.to_bytes() == student.to_bytes() and again.size == student.size == len(student.to_bytes())
    assert again.recipe == {"rule": "sum"} and set(again.parts) == set(student.parts) and not again.plain
    for name, part in student.parts.items():
        other = again.parts[name]
        assert dataclasses.replace(part, weights={}) == dataclasses.replace(other, weights={})
        assert part.weights.keys() == other.weights.keys() and part.numbers == other.numbers
        assert all(torch.equal(v, other.weights[k]) and v.dtype == other.weights[k].dtype for k, v in part.weights.items())


def test_a_student_of_one_part_that_is_no_trained_network_says_so_in_its_file():
    for part in (
        Part.of(build(LINE, 1), "converted", "merged"),
        Part.of(build(LINE, 1), base=BASE),
        Part.words("do"),
        Part.of(build(LINE, 1)),
    ):
        name = "elsewhere" if part.kind == "trained" and part.base is None and part.text is None else ONLY
        again = Student.from_bytes(Student({name: part}).to_bytes())
        assert not again.plain and again.only.kind == part.kind and again.only.base == part.base and again.only.text == part.text


def test_what_is_longer_has_more_bytes():
    small, big = (Student({"prompt": Part.words("x" * n)}) for n in (10, 1000))
    assert big.size - small.size == pytest.approx(990, abs=8)
    assert Student(small.parts, {"rule": "y" * 500}).size > small.size + 490


def test_short_ways_are_for_the_only_part():
    for short in ("weights", "architecture", "averaged"):
        with pytest.raises(UserError, match=r"several parts \(set, codes, .*\): ask for one of them, student.parts\[name\]"):
            getattr(several(), short)
    with pytest.raises(UserError, match="'prompt' is no network"):
        _ = Student({"prompt": Part.words("do")}).architecture


def test_the_networks_among_the_parts_are_rebuilt():
    student = several()
    student = Student({k: v for k, v in student.parts.items() if k != "codes"})
    networks = rebuild_parts(Student.from_bytes(student.to_bytes()), build)
    assert set(networks) == {"expert", "head"} and not networks["head"].training
    assert torch.equal(networks["head"].weight, build(LINE, 2).weight)
    with pytest.raises(UserError, match="several parts"):
        rebuild(student, build)
    with pytest.raises(UserError, match="laid over abab"):
        rebuild(Student({ONLY: student.parts["adapter"]}), build)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (lambda: {}, "at least one part"),
        (lambda: {"A part": Part.words("x")}, "part 'A part': a name has lower-case letters"),
        (lambda: {"a/b": Part.words("x")}, "a name has lower-case letters"),
        (lambda: {"empty": Part.data({})}, "part 'empty' has neither tensors nor text"),
        (lambda: {"p": Part.words("é" * 2**19), "q": Part.words("x")}, "text of the parts is 1,048,577 bytes long, 1,048,576 at most"),
        (lambda: {"p": Part.words("\ud800")}, "not Unicode"),
        (lambda: {"p": Part(LINE, {}, "trained", text="x")}, "is text and has tensors or an architecture too"),
        (lambda: {"p": Part.data({"a b": torch.zeros(1)})}, "tensor 'a b': a name has printed ASCII"),
        (lambda: {"p": Part.data({"a/b": torch.zeros(1)})}, "tensor 'a/b'"),
        (lambda: {"p": Part.data({"a": torch.tensor([math.inf])})}, "weight a is not finite"),
        (lambda: {"p": Part.data({"a": torch.zeros(1)}, "pruned")}, "kind 'pruned' is none of trained, averaged, converted"),
        (lambda: {"p": Part.data({"a": torch.zeros(1)}, "converted")}, "say how they were"),
        (lambda: {"p": Part.data({"a": torch.zeros(1)}, "trained", "int8")}, "others do not"),
        (lambda: {"p": Part.data({"a": torch.zeros(1)}, "converted", "x" * 201)}, "at most 200 characters"),
        (lambda: {"p": Part.data({"a": torch.zeros(1)}, base="../weights")}, "64 hexadecimal digits"),
    ],
)
def test_parts_that_are_none_are_one_line(parts, says):
    with pytest.raises(UserError, match=says) as error:
        Student(parts())
    assert "\n" not in str(error.value)


def changed(**fields):
    """A file of two parts with other ``fields`` of the first one's description."""
    text = {"kind": "trained", "how": "", "base": None, "text": "x"}
    about = {"recipe": {}, "parts": {"p": {**text, **fields}, "q": {"kind": "trained", "how": "", "base": None}}}
    return save({"q/w": torch.zeros(1)}, metadata={"distillbench": json.dumps(about)})


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (changed(kind="pruned"), "part 'p': kind 'pruned' is none of"),
        (changed(kind=3), "safetensors with its metadata"),
        (changed(text=3), "safetensors with its metadata"),
        (changed(text="x" * 2**20 + "y"), "text of the parts is"),
        (changed(name="line", arguments={}), "part 'p': is text and has tensors or an architecture too"),
        (changed(name="line"), "safetensors with its metadata"),
        (changed(base="elsewhere"), "part 'p': its base is to be an asset's sha256"),
        (changed(text=None), "part 'p' has neither tensors nor text"),
        (several().to_bytes().replace(b"set/images", b"tes/images"), "tensor 'tes/images' belongs to no part"),
        (several().to_bytes().replace(b"set/images", b"set images"), "tensor 'set images' belongs to no part"),
        (several().to_bytes().replace(b"set/images", b"set/ima es"), "part 'set': tensor 'ima es': a name has"),
        (several().to_bytes()[:-1], "safetensors with its metadata"),
        (save({"w": torch.zeros(1)}, metadata={"distillbench": '{"recipe": {}, "parts": {}}'}), "tensor 'w' belongs to no part"),
        (save({}, metadata={"distillbench": '{"recipe": {}, "parts": {}}'}), "at least one part"),
        (save({}, metadata={"distillbench": '{"recipe": {}, "parts": {"p": 3}}'}), "safetensors with its metadata"),
        (save({}, metadata={"distillbench": '{"recipe": {}, "parts": ["p"]}'}), "safetensors with its metadata"),
        (save({}, metadata={"distillbench": '{"parts": {}}'}), "safetensors with its metadata"),
    ],
)
def test_a_damaged_or_foreign_file_of_parts_is_one_line(blob, says):
    with pytest.raises(UserError, match=r"somewhere: not a distillbench student") as error:
        Student.from_bytes(blob, "somewhere")
    assert says in str(error.value) and "\n" not in str(error.value)


# --- the export of a run ------------------------------------------------------------------------------------------


def a_run():
    training = Training(batch_size=1, optimizer="sgd", learning_rate=0.1)
    return Run(seeds=seeds_by_role(0), budget=Budget(student_examples=1), training=training)


def test_an_export_of_parts_takes_networks_and_parts():
    net, other = build(LINE, 1), build(LINE, 2)
    student = a_run().export(parts={"net": net, "prompt": Part.words("do"), "int": Part.of(other, "converted", "int8")}, of={"int": net})
    assert {k: v.kind for k, v in student.parts.items()} == {"net": "trained", "prompt": "trained", "int": "converted"}
    assert torch.equal(student.parts["net"].weights["bias"], net.bias)


def test_an_export_that_was_converted_is_declared():
    net, copy_of = build(LINE, 1), build(LINE, 1)
    student = a_run().export(copy_of, converted="int8", of=net)
    assert student.only.kind == "converted" and student.only.how == "int8" and Student.from_bytes(student.to_bytes()).only.how == "int8"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda net: {}, "one network, or parts="),
        (lambda net: {"module": net, "parts": {"p": net}}, "one network, or parts="),
        (lambda net: {"parts": {"p": net}, "converted": "int8"}, "parts say it as Part.of"),
        (lambda net: {"module": net, "averaged": True, "converted": "int8", "of": net}, "of=... names an average that was converted"),
        (lambda net: {"module": net, "converted": "int8"}, "for each part that is converted and no other, .*: student"),
        (lambda net: {"module": net, "of": build(LINE, 2)}, "for each part that is converted and no other, .*: student"),
        (lambda net: {"parts": {"p": Part.of(net, "converted", "int8")}}, "that is converted and no other, .*: p"),
        (lambda net: {"module": net, "converted": "int8", "of": net}, "converted in place"),
        (lambda net: {"parts": {"p": nn.Linear(1, 1)}}, "not built by the problem"),
        (lambda net: {"parts": {}}, "at least one part"),
    ],
)
def test_an_export_that_says_too_little_is_one_line(given, says):
    with pytest.raises(UserError, match=says) as error:
        a_run().export(**given(build(LINE, 1)))
    assert "\n" not in str(error.value)
