"""Fingerprints of the paper settings, on small files in the real formats: data, initial student, teacher's answers, two students' scores.

``FINGERPRINTS=write`` (make fingerprints) writes ``tests/goldens/fingerprints_<suite>.json``; what moved without a raised version is
refused there too, unless it says ``force``.
"""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models import get_model

from distillbench.cards import registry
from distillbench.checks.fingerprint_values import of_setting, patterned, scattered
from distillbench.checks.fingerprints import line_of_setting, moved_setting, save, setting_versions
from distillbench.suites.image_classification import folders
from distillbench.suites.image_classification.cifar_nets import NETS
from distillbench.suites.image_generation import published
from distillbench.training.student import AVERAGE, Student
from tests.suites.image_generation import fixtures as edm
from tests.suites.image_generation.test_published import FEATURES, stand_in
from tests.suites.language_modeling import test_instruct as instruct
from tests.suites.language_modeling.fixtures import sentences, tokenizer, write_lines, write_llama

GOLDENS = Path(__file__).parents[1] / "goldens"


def small(track, **options):
    """The card's setting with other options, in batches of three."""
    slug, _, name = track.partition("/")
    setting = registry.suite_card(registry.find("suite", slug)).settings[name]
    training = dataclasses.replace(setting.training, batch_size=3, precision="float32")
    here = {"workers": 0} if "workers" in setting.options else {}
    return dataclasses.replace(setting, options={**setting.options, **here, **options}, training=training)


def write_images(folder, names, count, side, suffix):
    """Noise: compressed losslessly, or as JPEG."""
    rng = np.random.default_rng(len(folder.name))
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name / f"{name}_{i}{suffix}")


def smooth(folder):
    """Give every weight below ``folder`` a pattern that no random numbers made: processors differ in theirs."""
    for path in folder.rglob("model.safetensors"):
        weights = load_file(path)
        for k, (name, w) in enumerate(sorted(weights.items())):
            if w.dim() > 1:
                weights[name] = (scattered(w.numel(), k).view(w.shape) * math.sqrt(6 * len(w) / w.numel())).to(w)
        save_file(weights, path, metadata={"format": "pt"})


def cifar100(root, patch):
    names = ["apple", "baby", "worm"]
    write_images(root / "cifar100/train", names, 8, 32, ".png")
    write_images(root / "cifar100/test", names, 3, 32, ".png")
    (root / "teachers").mkdir()
    torch.manual_seed(0)  # draws the biases, to which the pattern is added
    save_file(patterned(NETS["resnet20"](3)).state_dict(), root / "teachers/resnet20.safetensors")
    path = ["teachers/resnet20.safetensors"]
    student = {"name": "resnet8x4", "arguments": {"outputs": 3}}
    return small("image-classification/cifar100", classes=3, teacher_net="resnet20", teacher_path=path, student=student)


def imagenet1k(root, patch):
    names = ["n01440764", "n01443537", "n01484850"]
    write_images(root / "imagenet/train", names, 2, 72, ".JPEG")
    write_images(root / "imagenet/val", names, 1, 64, ".JPEG")
    (root / "teachers").mkdir()
    torch.manual_seed(0)
    save_file(patterned(get_model("resnet18", weights=None, num_classes=3)).state_dict(), root / "teachers/resnet18.safetensors")
    path = ["teachers/resnet18.safetensors"]
    student = {"name": "torchvision:resnet18", "arguments": {"outputs": 3}}
    return small(
        "image-classification/imagenet1k",
        classes=3,
        teacher_net="resnet18",
        teacher_path=path,
        student=student,
    )


def generation(name, network):
    def made(root, patch):
        edm.write_data(root, images=24, features=FEATURES)
        for path in root.glob("*/teacher.safetensors"):
            kind = {"cifar10": "song", "imagenet64": "dhariwal"}[path.parent.name]
            path.write_bytes(Student.of(patterned(edm.tiny_edm(kind)), averaged=AVERAGE).to_bytes())
        (root / "inception-2015-12-05.pt").write_bytes(b"not read by the stand-in")
        patch.setattr(published, "nvidia_inception", stand_in)
        student = {"name": "edm-unet", "arguments": dict(edm.TINY[network])}
        return small(
            f"image-generation/{name}", resolution=8, classes=3, samples=80, draws=1, compared=20, teacher_steps=3, student=student
        )

    return made


def instruct_gpt2(root, patch):
    instruct.write_data(root)
    smooth(root)
    return small("language-modeling/instruct-gpt2", held_out=8, max_prompt=250, max_length=330, draws=1, together=3, judged=3)


def spec_bench(root, patch):
    from distillbench.suites.speculative.spec_bench import SUBSETS

    folder = root / "spec-bench"
    categories = [c for subset in SUBSETS.values() for c in subset]
    rows = [{"question_id": 81 + i, "category": c, "turns": [s]} for i, (c, s) in enumerate(zip(categories, sentences(13), strict=True))]
    write_lines(folder / "question.jsonl", rows)
    write_lines(folder / "train.jsonl", [{"prompt": p, "response": p[::-1]} for p in sentences(15, seed=2)])
    words = tokenizer(beginning=True)
    write_llama(folder / "vicuna-7b-v1.3", 0, len(words) + 3, width=24, words=words)
    write_llama(folder / "vicuna-68m", 1, len(words) + 3, words=words)
    smooth(root)
    return small("speculative/spec-bench", max_prompt=120, length=6, gamma=2, timed=1, tuning=3, validation=2)


FIXTURES = {
    "image-classification/cifar100": cifar100,
    "image-classification/imagenet1k": imagenet1k,
    "image-generation/cifar10": generation("cifar10", "song"),
    "image-generation/imagenet64": generation("imagenet64", "dhariwal"),
    "language-modeling/instruct-gpt2": instruct_gpt2,
    "speculative/spec-bench": spec_bench,
}


def verify(track, root, patch):
    """None where the committed numbers of a paper setting hold on its fixture, else the line that says what moved."""
    slug, _, name = track.partition("/")
    entry = registry.suites()[slug]
    now = of_setting(entry, name, setting=FIXTURES[track](root, patch), data=root)
    path = GOLDENS / f"fingerprints_{slug.replace('-', '_')}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    today, asked = setting_versions(entry), os.environ.get("FINGERPRINTS")
    before = kept.get(name)
    what = moved_setting(before["values"], now) if before else []
    if asked and not (what and before["versions"] == today and asked != "force"):
        if what or not before or before["versions"] != today or set(before["values"]) != set(now):
            kept[name] = {"versions": today, "values": now if what or not before or set(before["values"]) != set(now) else before["values"]}
            save(path, {k: kept[k] for k in sorted(kept)}, 3)
        return None
    if before is None:
        return f"{track} has no fingerprint: make fingerprints writes it"
    if before["versions"] != today and not what:
        return f"the fingerprint of {track} is of {before['versions']}, now {today}: make fingerprints writes it anew"
    return line_of_setting(slug, name, what) if what else None


@pytest.mark.parametrize("track", FIXTURES)
def test_paper_setting(track, tmp_path, monkeypatch):
    assert verify(track, tmp_path, monkeypatch) is None


def test_another_crop_is_caught(tmp_path, monkeypatch):
    from tests.test_fingerprints import plant

    plant(monkeypatch, folders.cifar_transform, "padding=4", "padding=3")
    assert verify("image-classification/cifar100", tmp_path, monkeypatch).startswith("first batch of image-classification/cifar100 ")


def test_every_paper_world_has_a_fixture():
    """Settings that share data's format, networks' kind and judge with one above need none of their own."""
    for slug, entry in registry.suites().items():
        paper = {
            (s.options.get("reader"), s.options.get("world")) for s in registry.suite_card(entry).settings.values() if s.tier == "paper"
        }
        ours = [registry.suite_card(entry).settings[t.partition("/")[2]] for t in FIXTURES if t.startswith(f"{slug}/")]
        assert paper == {(s.options.get("reader"), s.options.get("world")) for s in ours}
