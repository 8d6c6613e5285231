"""The paper settings of image classification, on small fixtures in the real formats."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import get_model

from distillbench.cards.card import Budget, Setting
from distillbench.cli import main as cli
from distillbench.methods.classification import kd
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.plan import plan
from distillbench.runs.record import read_records
from distillbench.runs.suite import JudgeContext, TrainContext
from distillbench.suites import image_classification as suite
from distillbench.suites.image_classification.cifar_nets import CIFAR_PAIRS, NETS
from distillbench.suites.image_classification.nets import build
from distillbench.training.learner import rate
from distillbench.training.nets import Architecture
from distillbench.training.run import Run
from distillbench.training.student import Student
from tests.suites.image_classification.test_suite import SETTINGS, fails


def test_settings_are_the_benchmarks_pairs() -> None:
    found = {(s.options["teacher_net"], s.options["student"]["name"]): s for n, s in SETTINGS.items() if n.startswith("cifar100")}
    assert set(found) == {(p.teacher, p.student) for p in CIFAR_PAIRS} and len(found) == 13
    for pair in CIFAR_PAIRS:
        setting = found[pair.teacher, pair.student]
        training = setting.training
        assert list(setting.options["teacher_path"]) == [f"teachers/{pair.teacher}.safetensors"]
        assert training.learning_rate == pair.learning_rate
        assert (training.batch_size, training.optimizer, training.momentum, training.weight_decay) == (64, "sgd", 0.9, 5e-4)
        epoch = 50_000 // 64
        steps = setting.budget.student_examples // 64
        assert (epoch, steps, setting.budget.student_examples % 64) == (781, 240 * 781, 0)
        drops = [s for s in range(1, 241) if rate(training, s * epoch, steps) != rate(training, s * epoch - 1, steps)]
        assert drops == [150, 180, 210]
        assert rate(training, steps - 1, steps) == pytest.approx(1e-3)


def write_images(folder: Path, classes: list[str], count: int, size: tuple[int, int], suffix: str) -> None:
    rng = np.random.default_rng(len(str(folder)))
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name / f"{name}_{i}{suffix}")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    names = [f"class{i:02d}" for i in range(100)]
    write_images(root / "cifar100/train", names, 2, (32, 32), ".png")
    write_images(root / "cifar100/test", names, 1, (32, 32), ".png")
    (root / "teachers").mkdir()
    for name in ("resnet32x4", "resnet56"):
        torch.manual_seed(0)
        save_file(NETS[name](100).state_dict(), root / "teachers" / f"{name}.safetensors")
    return root


def run(track: str, data: Path, out: Path, *more: str) -> int:
    return cli.main(["run", f"image-classification/{track}", "-m", "kd", "--data", str(data), "--out", str(out), "--budget", "128",
                     "--seeds", "1", "--workers", "1", *more])  # fmt: skip


@pytest.mark.slow
def test_cifar100_end_to_end(cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cifar100", cifar, tmp_path, "--no-controls", "--json") == 0
    [summary] = json.loads(capsys.readouterr().out)
    [record], bad = read_records(tmp_path / "records")
    assert not bad and record.status == "ok" and record.id == summary["id"]
    assert {m.metric: m.n for m in record.measurements} == dict.fromkeys(("top1", "nll", "ece", "agreement"), 100)
    total = record.cost["total"]
    assert (total["student_examples"], total["student_steps"], total["teacher_examples"]) == (128, 2, 128)
    assert record.student is not None and record.student["architecture"] == "resnet8x4"


@pytest.mark.slow
def test_cifar100_controls(cifar: Path, tmp_path: Path) -> None:
    assert run("cifar100-resnet56-resnet20", cifar, tmp_path) == 0
    records, _ = read_records(tmp_path / "records")
    assert {r.slug: r.status for r in records} == dict.fromkeys(("kd", "scratch", "pseudo_label", "teacher", "shuffled_teacher"), "ok")
    [teacher] = [r for r in records if r.slug == "teacher"]
    assert teacher.value("agreement") == 1


def test_planned_identity_follows_the_bytes(cifar: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(cifar, root)

    def planned(folder: Path, track: str = "cifar100") -> str:
        return plan(f"image-classification/{track}", ["kd"], [0], controls=False, data=str(folder))[0].id

    first = planned(cifar)
    assert planned(root) == first  # the same bytes elsewhere
    image = next((root / "cifar100/train").rglob("*.png"))
    before = image.read_bytes()
    Image.new("RGB", (32, 32)).save(image)
    assert planned(root) != first
    image.write_bytes(before)
    assert planned(root) == first
    image.rename(image.with_name("zzz.png"))
    assert planned(root) != first
    image.with_name("zzz.png").rename(image)
    torch.manual_seed(1)
    save_file(NETS["resnet32x4"](100).state_dict(), root / "teachers/resnet32x4.safetensors")
    assert planned(root) != first
    assert planned(root, "cifar100-resnet56-resnet20") == planned(cifar, "cifar100-resnet56-resnet20")  # another track's teacher


def test_cifar100_tune_split(cifar: Path) -> None:
    setting = dataclasses.replace(SETTINGS["cifar100"], options={**SETTINGS["cifar100"].options, "workers": 0})
    seen: dict[str, set[int]] = {}
    for split in ("test", "tune"):
        problem = suite.SUITE.problem(TrainContext("cifar100", setting, seeds_by_role(0), tuning=split == "tune", data=cifar))
        stream = problem.batches.stream(0)
        epoch = len(problem.batches.chosen) // 64
        seen[split] = set(problem.batches.chosen.tolist())
        assert {int(i) for _ in range(epoch) for i in next(stream).index} <= seen[split]
    held_out = seen["test"] - seen["tune"]
    assert seen["test"] == set(range(200)) and 5 < len(held_out) < 50
    student = Student.of(build(Architecture("resnet8x4", {"outputs": 100}), 0))
    light = dataclasses.replace(
        setting, options={**setting.options, "teacher_net": "resnet56", "teacher_path": ["teachers/resnet56.safetensors"]}
    )
    found = suite.SUITE.evaluate(student, JudgeContext("cifar100", light, seeds_by_role(0), split="tune", data=cifar)).measurements
    assert found[0].n == len(held_out)


def test_missing_data_and_teachers(
    cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISTILLBENCH_DATA", raising=False)
    track = "image-classification/cifar100"
    assert cli.main(["run", track, "-m", "kd", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--data" in error and "CIFAR-100" in error
    assert cli.main(["run", track, "-m", "kd", "--out", str(tmp_path), "--data", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not found" in error
    assert run("cifar100-vgg13-vgg8", cifar, tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "vgg13.safetensors: not found" in error
    assert run("imagenet1k", cifar, tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "imagenet: not found" in error


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    names = ["n01440764", "n01443537", "n01484850"]
    write_images(root / "imagenet/train", names, 12, (80, 64), ".JPEG")
    write_images(root / "imagenet/val", names, 2, (64, 80), ".JPEG")
    (root / "teachers").mkdir()
    torch.manual_seed(0)
    save_file(get_model("resnet34", weights=None, num_classes=3).state_dict(), root / "teachers/resnet34.safetensors")
    return root


def imagenet_setting(**training: Any) -> Setting:
    """The card's setting, but for three classes and batches of four."""
    setting = SETTINGS["imagenet1k"]
    options = {**setting.options, "classes": 3, "workers": 0, "student": {"name": "torchvision:resnet18", "arguments": {"outputs": 3}}}
    return dataclasses.replace(
        setting,
        budget=Budget(student_examples=8),
        training=dataclasses.replace(setting.training, batch_size=4, learning_rate=0.01, **training),
        options=options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_imagenet1k_end_to_end(imagenet: Path, precision: str) -> None:
    setting = imagenet_setting(**({} if precision == "bfloat16" else {"precision": precision}))
    assert setting.training.precision == precision
    seeds = seeds_by_role(0)
    problem = suite.SUITE.problem(TrainContext("imagenet1k", setting, seeds, data=imagenet))
    seen: list[tuple[torch.dtype, torch.Size]] = []
    problem.student.conv1.register_forward_hook(lambda m, i, o: seen.append((o.dtype, i[0].shape)))
    run = Run(seeds=seeds, budget=setting.budget, training=setting.training, oracles=[problem.teacher])
    student = kd.distill(problem, run, temperature=4.0, ce_weight=0.1, kd_weight=0.9)
    assert seen == [(getattr(torch, precision), torch.Size([4, 3, 224, 224]))] * 2
    assert {v.dtype for v in student.weights.values()} <= {torch.float32, torch.int64}
    found = suite.SUITE.evaluate(student, JudgeContext("imagenet1k", setting, seeds, data=imagenet)).measurements
    assert {m.metric: m.n for m in found} == dict.fromkeys(("top1", "nll", "ece", "agreement"), 6)
    with torch.no_grad():
        batch = next(problem.batches.stream(0))
        assert problem.teacher.outputs(batch).embedding.shape == (4, 512)


def test_imagenet1k_tune_split_and_teachers(imagenet: Path, tmp_path: Path) -> None:
    setting = imagenet_setting()
    told = {tuning: TrainContext("imagenet1k", setting, seeds_by_role(0), tuning=tuning, data=imagenet) for tuning in (False, True)}
    train = {tuning: set(suite.SUITE.problem(ctx).batches.chosen.tolist()) for tuning, ctx in told.items()}  # type: ignore[attr-defined]
    held_out = train[False] - train[True]
    assert len(train[False]) == 36 and 0 < len(held_out) < 12
    student = Student.of(build(Architecture("torchvision:resnet18", {"outputs": 3}), 0))
    ctx = JudgeContext("imagenet1k", setting, seeds_by_role(0), split="tune", data=imagenet)
    assert suite.SUITE.evaluate(student, ctx).measurements[0].n == len(held_out)
    thousand = dataclasses.replace(setting, options={**setting.options, "classes": 1000})
    with fails("resnet34.safetensors: does not fit resnet34", "fc.weight"):
        suite.SUITE.problem(TrainContext("imagenet1k", thousand, seeds_by_role(0), data=imagenet))
    (tmp_path / "teachers").mkdir()
    (tmp_path / "imagenet").symlink_to(imagenet / "imagenet")
    save_file(get_model("resnet34", weights=None).state_dict(), tmp_path / "teachers/resnet34.safetensors")
    with fails("3 class folders where 1000 are expected"):
        suite.SUITE.problem(TrainContext("imagenet1k", thousand, seeds_by_role(0), data=tmp_path))
