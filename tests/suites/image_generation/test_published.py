"""The paper settings from end to end, on small files in the real formats: a zip, EDM networks as safetensors, statistics as npz."""

import dataclasses

import numpy as np
import pytest
import torch

from distillbench.cli.doctor import examine
from distillbench.errors import UserError
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.runs.suite import Context, JudgeContext, TrainContext
from distillbench.suites import image_generation as suite
from distillbench.suites.image_generation import nets, published
from distillbench.suites.metrics.images.extractors import NVIDIA_SHA256, Extractor
from distillbench.training.student import Student
from tests.suites.image_generation.fixtures import TINY, write_data

FEATURES = 64


def stand_in(path, *, resize, device="cpu", name="inception_nvidia", sha256=NVIDIA_SHA256):
    """A feature network under Inception's identity: the weights themselves are not to be had here."""
    weight = torch.randn(192, FEATURES, generator=torch.Generator().manual_seed(0)) / 192**0.5

    def network(images):
        return (images.float() / 127.5 - 1).flatten(1) @ weight

    return Extractor(name, sha256, resize, network, lambda x: network(x)[:, :5].softmax(1), "round", device)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The user's folder, and the card's settings cut down to its size."""
    root = tmp_path / "data"
    write_data(root, images=24, features=FEATURES)
    (root / "inception-2015-12-05.pt").write_bytes(b"not read by the stand-in")
    monkeypatch.setattr(published, "nvidia_inception", stand_in)
    real = suite.CARD.settings

    def small(name, network):
        setting = real[name]
        options = {**setting.options, "resolution": 8, "classes": 3, "samples": 80, "draws": 2, "compared": 20, "workers": 0}
        options["student"] = {"name": "edm-unet", "arguments": dict(TINY[network])}
        options["teacher_steps"] = 3
        training = dataclasses.replace(setting.training, batch_size=4)
        return dataclasses.replace(setting, options=options, training=training)

    settings = {**real, "cifar10": small("cifar10", "song"), "imagenet64": small("imagenet64", "dhariwal")}
    monkeypatch.setattr(suite, "CARD", dataclasses.replace(suite.CARD, settings=settings))
    from distillbench.cards import registry

    entry = registry.find("suite", "image-generation")
    monkeypatch.setattr(registry, "suite_card", lambda e: suite.CARD if e.slug == entry.slug else e.card)
    return root


@pytest.mark.parametrize("setting", ["cifar10", "imagenet64"])
def test_a_run_goes_from_the_users_files_to_a_record(setting, data, tmp_path):
    specs = plan(
        f"image-generation/{setting}", ["dmd"], [0], data=str(data), budget={"student_examples": 8}, overrides={"dmd": {"pairs": 8}}
    )
    assert [s.method for s in specs] == ["scratch", "teacher", "teacher_one_step", "dmd"]
    for spec in specs:
        record = execute(spec, Store(tmp_path / "runs"))
        assert record.status == "ok", (spec.method, record.reason)
        values = {m.metric: m.value for m in record.measurements}
        assert set(values) == {"fid", "kid", "inception_score", "precision", "recall", "nfe"}
        assert values["nfe"] == (5 if spec.method == "teacher" else 1)
        assert record.picture
        digests = record.identity["setting"]["digests"]
        assert digests["inception"] == NVIDIA_SHA256 and len(digests["reference"]) == 64 and len(digests["teacher"]) == 64


def test_other_statistics_are_another_track(data):
    def digests():
        spec = plan("image-generation/cifar10", [], [0], data=str(data))[0]
        return spec.identity["setting"]["digests"], spec.id

    first = digests()
    np.savez(data / "cifar10/reference.npz", mu=np.ones(FEATURES), sigma=np.eye(FEATURES))
    other = digests()
    assert first[0]["reference"] != other[0]["reference"] and first[1] != other[1]
    assert first[0]["data"] == other[0]["data"]


def test_fid_of_a_real_gaussian_fit_is_the_closed_form(data):
    setting = suite.CARD.settings["cifar10"]
    samples = torch.rand(80, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = {m.metric: m.value for m in published.measure([(samples, torch.zeros(80))], JudgeContext("name", setting, {}, data=data))}
    seen = stand_in(None, resize="tensorflow").features(samples).double().numpy()
    values = np.linalg.eigvalsh(np.cov(seen.T))
    # against mu 0, sigma I the square root is that of the covariance alone
    truth = (seen.mean(0) ** 2).sum() + values.sum() + FEATURES - 2 * np.sqrt(values.clip(0)).sum()
    assert found["fid"] == pytest.approx(truth, rel=1e-6)


def test_too_few_samples_are_an_error_and_not_a_number(data):
    setting = suite.CARD.settings["cifar10"]
    with pytest.raises(UserError, match="60 samples are too few"):
        published.measure([(torch.rand(60, 3, 8, 8), torch.zeros(60))], JudgeContext("name", setting, {}, data=data))


def test_another_network_is_never_called_fid(data, monkeypatch, tmp_path):
    monkeypatch.setattr(published, "nvidia_inception", lambda path, **k: stand_in(path, **{**k, "sha256": "0" * 64}))
    spec = next(s for s in plan("image-generation/cifar10", [], [0], data=str(data)) if s.method == "teacher_one_step")
    record = execute(spec, Store(tmp_path / "runs"))
    assert record.status == "failed" and "did not score fid" in record.reason


@pytest.mark.parametrize(
    ("role", "said"),
    [
        ("reference.npz", "reference.npz: not found"),
        ("teacher.safetensors", "teacher.safetensors: not found"),
        ("train.zip", "train.zip: not found"),
    ],
)
def test_what_is_missing_is_said_at_planning_time(data, role, said):
    (data / "cifar10" / role).unlink()
    with pytest.raises(UserError, match=said):
        plan("image-generation/cifar10", ["dmd"], [0], data=str(data))
    assert any(role in f.remedy for f in examine(str(data)) if f.what == "image-generation/cifar10")


def test_a_missing_feature_network_is_said_before_any_training(data):
    (data / "inception-2015-12-05.pt").unlink()
    with pytest.raises(UserError, match=r"inception-2015-12-05\.pt: not found"):
        suite.SUITE.problem(TrainContext("cifar10", suite.CARD.settings["cifar10"], {"init": 0, "order": 0, "data": 0}, data=data))


def test_a_place_outside_the_folder_is_refused(data):
    setting = suite.CARD.settings["cifar10"]
    evil = dataclasses.replace(setting, options={**setting.options, "teacher_path": ["../../etc/passwd"]})
    with pytest.raises(UserError, match="outside the folder of data"):
        published.teacher(Context("cifar10", evil, {}, data=data))


def test_a_world_from_a_record_cannot_name_a_module():
    setting = suite.CARD.settings["digits"]
    evil = dataclasses.replace(setting, options={**setting.options, "world": "train_digits_teacher"})
    with pytest.raises(UserError, match="unknown world"):
        suite.SUITE.problem(TrainContext("digits", evil, {"init": 0, "order": 0, "data": 0}))


def test_the_cards_networks_are_edms():
    """Full size, on the meta device: parameters of the teachers that the card names."""
    from distillbench.suites.image_generation.nets import build

    for name, millions in (("cifar10", 55.7), ("cifar10-uncond", 55.7), ("imagenet64", 295.9)):
        about = suite.CARD.settings[name].options["student"]
        with torch.device("meta"):
            net = build(_architecture(about), 0)
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def _architecture(about):
    from distillbench.training.nets import Architecture

    return Architecture(about["name"], {k: list(v) if isinstance(v, tuple) else v for k, v in about["arguments"].items()})


def test_a_diffusers_teacher_is_a_teacher_too(data, tmp_path):
    pytest.importorskip("diffusers")
    from distillbench.suites.image_generation.diffusers_nets import from_diffusers
    from tests.suites.image_generation.fixtures import write_diffusers

    folder = tmp_path / "unet"
    write_diffusers(folder)
    student = from_diffusers(folder)
    again = nets.rebuild(Student.from_bytes(student.to_bytes()))
    x = torch.randn(2, *again.shape)
    assert torch.isfinite(again(x, torch.ones(2), torch.zeros(2, dtype=torch.int64))).all()
