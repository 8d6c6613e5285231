"""A setting that names torch-fidelity's Inception is judged in its features, from the files to the board. The weights are random."""

import dataclasses

import numpy as np
import pytest
import torch

from distillbench.cards import registry
from distillbench.cli.doctor import examine
from distillbench.errors import UserError
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.runs.suite import Context, JudgeContext
from distillbench.suites import image_generation as suite
from distillbench.suites.image_generation import published, reference, sampling
from distillbench.suites.metrics.images.extractors import FIDELITY_SHA256, NVIDIA_SHA256, PUBLISHED, fidelity_inception
from distillbench.suites.metrics.images.frechet import frechet_from_samples
from tests.suites.image_generation.fixtures import TINY, write_data, write_inception

NAME = "cifar10-fidelity"
CARD = suite.CARD.settings[NAME]
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SAMPLES = 20  # the fewest that an Inception score takes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's folder, and the SHA-256 of the network in it."""
    pytest.importorskip("torch_fidelity")
    root = tmp_path_factory.mktemp("fidelity")
    write_data(root, images=8)
    return root, write_inception(root / WEIGHTS)


@pytest.fixture
def small(folder, monkeypatch):
    """The card's setting cut down, with the random network as the published one."""
    _, digest = folder
    monkeypatch.setitem(PUBLISHED, "inception_fidelity", digest)
    options = {**CARD.options, "resolution": 8, "classes": 3, "samples": SAMPLES, "draws": 1, "compared": 6, "workers": 0}
    options["student"] = {"name": "edm-unet", "arguments": dict(TINY["song"])}
    setting = dataclasses.replace(
        CARD,
        options=options,
        training=dataclasses.replace(CARD.training, batch_size=4),
        assets={**CARD.assets, "inception": dataclasses.replace(CARD.assets["inception"], sha256=digest)},
    )
    monkeypatch.setattr(suite, "CARD", dataclasses.replace(suite.CARD, settings={**suite.CARD.settings, NAME: setting}))
    entry = registry.find("suite", "image-generation")
    monkeypatch.setattr(registry, "suite_card", lambda e: suite.CARD if e.slug == entry.slug else e.card)
    return setting


def test_the_card_pins_the_network_that_it_names():
    assert CARD.options["extractor"] == "inception_fidelity" and CARD.assets["inception"].sha256 == FIDELITY_SHA256
    assert suite.CARD.settings["cifar10"].assets["inception"].sha256 == NVIDIA_SHA256
    assert "extractor" not in suite.CARD.settings["cifar10"].options  # its identity is what it was
    assert not {"fid", "kid", "inception_score"} & set(CARD.metrics) and CARD.metrics[0] == "fd_inception_fidelity"
    assert {m.name for m in suite.CARD.at(NAME).metrics} == set(CARD.metrics)


@pytest.mark.slow
def test_a_run_is_judged_in_the_named_features(folder, small, tmp_path, capsys):
    data, digest = folder
    # Statistics in these features are made from the user's own images, once.
    assert reference.main([NAME, str(data)]) == 0
    path = data / "cifar10" / "reference-fidelity.npz"
    assert capsys.readouterr().out == f"{path}\n"
    assert reference.main([NAME, str(data)]) == 2
    assert "is there already; remove it" in capsys.readouterr().err

    spec = next(s for s in plan(f"image-generation/{NAME}", [], [0], data=str(data)) if s.method == "teacher_one_step")
    record = execute(spec, Store(tmp_path))
    assert record.status == "ok", record.reason
    assert {m.metric for m in record.measurements} == set(CARD.metrics)
    # By hand: the same samples against all images, through the network and without their statistics.
    network, images = fidelity_inception(data / WEIGHTS, sha256=digest), published.images_of(told(small, data))
    real = network.features(torch.stack([images.image(i) for i in range(len(images))]))
    truth = frechet_from_samples(network.features(_samples(small, data, record)), real, minimum=2)
    assert record.value("fd_inception_fidelity") == pytest.approx(truth, rel=1e-5)
    # What identifies the number.
    judged = record.setting.options
    assert (judged["extractor"], judged["resize"], judged["samples"]) == ("inception_fidelity", "tensorflow", SAMPLES)
    assert record.identity["setting"]["digests"]["inception"] == digest and len(record.identity["setting"]["digests"]["reference"]) == 64
    assert record.suite.primary == "fd_inception_fidelity"


def told(setting, data):
    return Context(NAME, setting, {}, data=data)


def _samples(setting, data, record):
    from distillbench.training.nets import Architecture
    from distillbench.training.student import ONLY, Part, Student

    teacher = published.teacher(told(setting, data))
    about = record.student
    part = Part(Architecture(about["architecture"], about["arguments"]), dict(teacher.state_dict()), "trained")
    student = Student({ONLY: part}, about["recipe"])
    ctx = JudgeContext(NAME, setting, record.identity["seeds"], data=data)
    options = ctx.options(published.Options)
    [(samples, _)], _ = sampling.drawn(suite.SUITE.rebuild(student, ctx), student, options, ctx, teacher=lambda: teacher)
    return samples


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"extractor": "inception_fidelty"}, "unknown extractor 'inception_fidelty'; did you mean 'inception_fidelity'"),
        ({"extractor": "os"}, "unknown extractor 'os'; known: inception_fidelity, inception_nvidia"),
        ({"extractor": "inception_nvidia"}, "pins SHA-256 .* for its feature network, where inception_nvidia has f58cb9b6ec323ed6"),
        ({"resize": "bicubic"}, "unknown resize rule 'bicubic'"),
    ],
    ids=str,
)
def test_a_setting_names_only_what_is_on_the_list_and_what_it_pins(folder, small, options, said):
    changed = dataclasses.replace(small, options={**small.options, **options})
    with pytest.raises(UserError, match=said):
        published.extractor(told(changed, folder[0]), "cpu")
    rest = {role: a if role != "inception" else dataclasses.replace(a, sha256=None) for role, a in small.assets.items()}
    with pytest.raises(UserError, match="pins SHA-256 none"):
        published.extractor(told(dataclasses.replace(small, assets=rest), folder[0]), "cpu")


def test_another_file_in_its_place_is_refused(folder, small, tmp_path):
    (tmp_path / WEIGHTS).write_bytes(b"another network")
    with pytest.raises(UserError, match="has sha256"):
        published.extractor(told(small, tmp_path), "cpu")


@pytest.mark.slow
def test_statistics_of_another_network_are_refused(folder, small, tmp_path):
    data, _ = folder
    images = torch.zeros(SAMPLES, 3, 8, 8)
    there = dataclasses.replace(small, options={**small.options, "reference_path": ["cifar10/reference.npz"]})  # of 64 features
    with pytest.raises(UserError, match="2048 features against 64 in the reference"):
        published.measure([(images, torch.zeros(SAMPLES))], JudgeContext("name", there, {}, data=data))


def test_two_rules_or_two_networks_are_two_tracks(folder, small):
    data, _ = folder
    np.savez(data / "cifar10" / "reference-fidelity.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    try:
        track = f"image-generation/{NAME}"
        ids = {plan(track, [], [0], data=str(data), options=o)[0].id for o in ({}, {"resize": "antialias"}, {"samples": 5})}
        np.savez(data / "cifar10" / "reference-fidelity.npz", mu=np.ones(2048), sigma=np.eye(2048))
        ids.add(plan(track, [], [0], data=str(data))[0].id)
    finally:
        (data / "cifar10" / "reference-fidelity.npz").unlink()
    assert len(ids) == 4


def test_the_doctor_says_what_is_missing(tmp_path):
    [found] = [f for f in examine(str(tmp_path)) if f.what == f"image-generation/{NAME}"]
    assert found.state == "missing" and WEIGHTS in found.remedy and "reference-fidelity.npz" in found.remedy


def test_a_slip_at_the_command_is_one_line(capsys, tmp_path):
    assert reference.main(["cifar10-fidelty", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "did you mean 'cifar10-fidelity'" in err and err.count("\n") == 1
