"""Real on-disk formats, replayable augmentation, teachers and the converter, on fixtures the tests write."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pickle
import random
import subprocess
import sys
import urllib.error
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision import transforms

from distillbench.errors import UserError
from distillbench.suites.image_classification import convert, folders
from distillbench.suites.image_classification.cifar_nets import NETS
from distillbench.suites.image_classification.folders import (
    AugmentedView,
    cifar100,
    cifar_teacher,
    imagenet1k,
    imagenet_teacher,
    load,
    one_pass,
)

ROOT = Path(__file__).parents[3]
Batch = tuple[Tensor, Tensor, Tensor]


def write_images(folder: Path, names: list[str], count: int, side: int, suffix: str) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (side, side + 8 * (side > 32), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}_{i}{suffix}", format="PNG" if suffix == ".png" else "JPEG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        write_images(tmp_path / "cifar100" / split, ["apple", "baby", "worm"], 4, 32, ".png")
    for split in ("train", "val"):
        write_images(tmp_path / "imagenet" / split, ["n01440764", "n01443537", "n01484850"], 2, 48, ".JPEG")
    return tmp_path


@pytest.fixture
def view(root: Path) -> AugmentedView:
    return AugmentedView(cifar100(root, True, classes=3), folders.cifar_transform(True), seed=5)


@contextlib.contextmanager
def fails(*parts: str) -> Iterator[None]:
    """The block raises a UserError of one line that holds all of ``parts``."""
    with pytest.raises(UserError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


# --- data -------------------------------------------------------------------------------------------------------


def test_cifar_tree(root: Path) -> None:
    data = cifar100(root, True, classes=3)
    assert (len(data), data.classes) == (12, ["apple", "baby", "worm"])
    assert data.targets == [0] * 4 + [1] * 4 + [2] * 4
    image, label = data[5]
    assert (image.size, image.mode, label) == ((32, 32), "RGB", 1)
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(root / "cifar100/train/baby/baby_1.png")))


def test_imagenet_tree_equals_torchvisions_image_folder(root: Path) -> None:
    ours, theirs = imagenet1k(root, "val", classes=3), torchvision.datasets.ImageFolder(str(root / "imagenet/val"))
    assert (len(ours), ours.targets, ours.classes) == (6, theirs.targets, theirs.classes)
    for i in range(6):
        assert ours[i][1] == theirs[i][1]
        assert np.array_equal(np.asarray(ours[i][0]), np.asarray(theirs[i][0]))


def test_numbered_classes_keep_their_numbers(tmp_path: Path) -> None:
    names = [str(i) for i in range(12)]
    write_images(tmp_path / "cifar100/train", names, 1, 32, ".png")
    assert cifar100(tmp_path, True, classes=12).classes == names  # as text '10' would come before '2'


def test_missing_folders(tmp_path: Path) -> None:
    with fails("cifar-100-python", "unpack"):
        cifar100(tmp_path, True)
    with fails("imagenet/val", "No such file"):
        imagenet1k(tmp_path, "val")


def test_wrong_class_counts(root: Path) -> None:
    with fails("cifar100/test", "3 class folders", "100"):
        cifar100(root, False)
    with fails("imagenet/train", "3 class folders", "1000"):
        imagenet1k(root, "train")
    flat = root / "flat"
    write_images(flat / "imagenet", ["val"], 3, 48, ".JPEG")
    with fails("flat/imagenet/val", "0 class folders", "move each image"):
        imagenet1k(flat, "val")


def test_splits_with_other_classes_and_empty_classes(root: Path) -> None:
    (root / "cifar100/train/zebra").mkdir()
    with fails("'zebra'", "only in one of"):
        cifar100(root, True, classes=4)
    (root / "cifar100/test/zebra").mkdir()
    with fails("no images", "zebra"):
        cifar100(root, True, classes=4)


@pytest.mark.parametrize("damage", [b"", b"not an image", "truncated"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(view: AugmentedView, root: Path, damage: bytes | str, workers: int) -> None:
    path = root / "cifar100/train/baby/baby_2.png"
    path.write_bytes(path.read_bytes()[:200] if isinstance(damage, str) else damage)
    with fails(str(path), "not a readable image", "restore"):
        list(one_pass(view, range(12), 4, workers))


class Bomb:
    """Unpickling this touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_foreign_pickles_are_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "burst")))
    with fails("cifar-100-python", "MD5"):
        cifar100(tmp_path, True)
    assert not (tmp_path / "burst").exists()
    with fails("100 classes where 3"):
        cifar100(tmp_path, True, classes=3)


def test_the_published_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published layout, with the MD5 sums of a small stand-in put in place of the genuine ones."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rows = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    content = {
        "train": {"data": rows, "fine_labels": [7, 99]},
        "test": {"data": rows[:1], "fine_labels": [3]},
        "meta": {"fine_label_names": [f"c{i:02d}" for i in range(100)]},
    }
    sums = {}
    for name, value in content.items():
        (folder / name).write_bytes(pickle.dumps(value))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    theirs = torchvision.datasets.CIFAR100
    monkeypatch.setattr(theirs, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(theirs, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(theirs, "meta", {**theirs.meta, "md5": sums["meta"]})
    data = cifar100(tmp_path, True)
    assert (len(data), len(data.classes), data.targets) == (2, 100, [7, 99])
    image, label = data[1]
    assert (image.size, label) == ((32, 32), 99)
    assert np.array_equal(np.asarray(image), rows[1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert next(one_pass(AugmentedView(data, folders.cifar_transform(True), 0), [1, 0], 2))[1].tolist() == [99, 7]


# --- transforms and order ---------------------------------------------------------------------------------------


def test_transforms_equal_the_published_ones(root: Path) -> None:
    image = cifar100(root, True, classes=3)[0][0]
    old = transforms.Compose([transforms.ToTensor(), transforms.Normalize(folders.CIFAR_MEAN, folders.CIFAR_STD)])
    torch.testing.assert_close(folders.cifar_transform(False)(image), old(image), rtol=0, atol=1e-6)
    photo = imagenet1k(root, "val", classes=3)[0][0]
    norm = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    old = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), norm])
    torch.testing.assert_close(folders.imagenet_transform(False)(photo), old(photo), rtol=0, atol=1e-6)
    assert folders.imagenet_transform(True)(photo).shape == (3, 224, 224)


def test_cifar_augmentation_is_a_padded_crop_or_its_mirror(view: AugmentedView) -> None:
    mean, std = torch.tensor(folders.CIFAR_MEAN).view(3, 1, 1), torch.tensor(folders.CIFAR_STD).view(3, 1, 1)
    image = torch.from_numpy(np.array(view.dataset[0][0])).permute(2, 0, 1).float() / 255
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    seen = set()
    for epoch in range(40):
        pixels = view.get(epoch, 0)[0] * std + mean
        crops = {(y, x): padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)}
        hits = [(k, flip) for k, c in crops.items() for flip in (0, 1) if torch.allclose(c.flip(2) if flip else c, pixels, atol=1e-5)]
        assert len(hits) == 1
        seen.add(hits[0])
    assert len(seen) > 25
    assert {flip for _, flip in seen} == {0, 1}


def test_augmentation_depends_on_seed_epoch_and_index_alone(view: AugmentedView) -> None:
    first = view.get(3, 7)[0]
    assert first.dtype == torch.float32
    torch.manual_seed(123)
    random.seed(9)
    view.get(0, 1)
    assert torch.equal(view.get(3, 7)[0], first)
    again = pickle.loads(pickle.dumps(view))
    assert torch.equal(again.get(3, 7)[0], first)
    other = AugmentedView(view.dataset, view.transform, seed=6)
    assert not all(torch.equal(view.get(3, i)[0], other.get(3, i)[0]) for i in range(12))
    assert not all(torch.equal(view.get(3, i)[0], view.get(4, i)[0]) for i in range(12))


def jitter(image: Image.Image) -> Tensor:
    """Uses both generators."""
    return torch.full((1, 1, 1), random.random()) + torch.rand(1)


def test_global_generators_are_left_alone(view: AugmentedView) -> None:
    both = AugmentedView(view.dataset, jitter, seed=1)
    before = torch.get_rng_state(), random.getstate()
    values = [float(both.get(0, i)[0]) for i in range(3)]
    for workers in (0, 2):
        list(one_pass(view, range(12), 5, workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert [float(both.get(0, i)[0]) for i in range(3)] == values
    assert len(set(values)) == 3


def test_generators_are_restored_after_an_error(view: AugmentedView) -> None:
    def broken(image: Image.Image) -> Tensor:
        random.random()
        torch.rand(1)
        raise RuntimeError

    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(RuntimeError):
        AugmentedView(view.dataset, broken, seed=1).get(0, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


ORDER = [5, 0, 11, 3, 3, 8, 1, 10, 2, 7, 4]


def wanted(epoch: int, size: int = 4) -> list[list[tuple[int, int]]]:
    """``ORDER`` as it is in ``epoch``, in batches."""
    return [[(epoch, i) for i in ORDER[at : at + size]] for at in range(0, len(ORDER), size)]


def test_batches(view: AugmentedView) -> None:
    found = list(load(view, wanted(2)))
    assert [len(b[0]) for b in found] == [4, 4, 3]
    assert torch.cat([b[2] for b in found]).tolist() == ORDER
    assert torch.cat([b[1] for b in found]).tolist() == [view.dataset.targets[i] for i in ORDER]
    assert found[0][0].shape == (4, 3, 32, 32)
    assert torch.equal(found[1][0][2], view.get(2, 1)[0])
    assert list(load(view, [])) == []
    mixed = next(load(view, [[(2, 0), (0, 0), (1, 5)]]))  # an epoch is an example's, not a batch's
    assert all(torch.equal(x, view.get(epoch, i)[0]) for x, (epoch, i) in zip(mixed[0], ((2, 0), (0, 0), (1, 5)), strict=True))


def test_one_pass_is_the_rows_in_order_as_they_look_in_epoch_0(view: AugmentedView) -> None:
    whole = list(one_pass(view, ORDER, 4))
    assert same(whole, list(load(view, wanted(0)))) and same(whole, list(one_pass(view, torch.tensor(ORDER), 4)))
    assert list(one_pass(view, [], 4)) == []
    with pytest.raises(ValueError):
        one_pass(view, ORDER, 0)


@pytest.mark.parametrize("step", [1, 2])
def test_workers_and_resuming_give_the_same_bytes(view: AugmentedView, step: int) -> None:
    whole = list(load(view, wanted(1)))
    assert same(whole, list(load(view, wanted(1), workers=2)))
    for workers in (0, 2):
        torch.manual_seed(step)
        assert same(whole[step:], list(load(view, wanted(1)[step:], workers)))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_wanted_may_have_no_end(view: AugmentedView, workers: int) -> None:
    endless = load(view, ([(n, n % 12)] for n in itertools.count()), workers)
    assert [index.tolist() for _, _, index in itertools.islice(endless, 15)] == [[n % 12] for n in range(15)]


# --- teachers ---------------------------------------------------------------------------------------------------


def test_cifar_teacher_round_trip(tmp_path: Path) -> None:
    net = NETS["resnet8x4"](10)
    path = tmp_path / "t.safetensors"
    # as written before torch 0.4.1
    save_file({k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    teacher = cifar_teacher("resnet8x4", path, num_classes=10)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(teacher(x), net.eval()(x))


def test_cifar_teacher_errors(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with fails("unknown CIFAR network 'resnet32x5'", "resnet32x4"):
        cifar_teacher("resnet32x5", path)
    with fails("t.safetensors", "no such file"):
        cifar_teacher("resnet20", path)
    path.write_bytes(b"\x80\x02}q\x00.")
    with fails("not a safetensors file", "convert"):
        cifar_teacher("resnet20", path)
    state = NETS["resnet20"](10).state_dict()
    save_file(state, path)
    with fails("does not fit resnet20", "2 of another shape (fc.weight (10, 64) for (100, 64)"):
        cifar_teacher("resnet20", path)
    with fails("does not fit vgg8", "missing (block0.0.weight", "unknown (bn1.bias"):
        cifar_teacher("vgg8", path, 10)
    save_file({**state, "fc.bias": torch.full((10,), torch.nan)}, path)
    with fails("1 not finite (fc.bias)"):
        cifar_teacher("resnet20", path, 10)


def test_imagenet_teacher_from_a_file(tmp_path: Path) -> None:
    net = torchvision.models.resnet18(weights=None)
    path = tmp_path / "r.safetensors"
    save_file(net.state_dict(), path)
    teacher = imagenet_teacher("resnet18", path)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in teacher.stage_names:
        teacher.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: shapes.__setitem__(name, tuple(y.shape)))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(teacher(x), net.eval()(x))
    assert [s[1:] for s in shapes.values()] == [(64, 16, 16), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert teacher.get_submodule(teacher.head_name).out_features == 1000
    with fails("does not fit resnet34", "missing"):
        imagenet_teacher("resnet34", path)
    with fails("unknown ImageNet teacher 'resnet35'", "did you mean"):
        imagenet_teacher("resnet35", path)


def test_imagenet_teacher_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked: dict[str, Any] = {}

    def offline(url: str, **options: Any) -> None:
        asked.update(options, url=url)
        raise urllib.error.URLError("no\nroute")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    cached = tmp_path / "hub/checkpoints/resnet34-b627a593.pth"
    with fails("resnet34", "no route", str(cached), "safetensors"):
        imagenet_teacher()
    assert asked["check_hash"] is True
    assert asked["weights_only"] is True
    cached.parent.mkdir(parents=True)
    cached.write_bytes(pickle.dumps(Bomb(tmp_path / "burst")))
    with fails(str(cached), "b627a593", "delete"):
        imagenet_teacher()
    assert not (tmp_path / "burst").exists()


# --- converter --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_convert_round_trip(tmp_path: Path, key: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    state = NETS["resnet20"](100).state_dict()
    parallel = OrderedDict((f"module.{k}", v) for k, v in state.items())
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"epoch": 240, key: parallel, "accuracy": torch.tensor(0.7)} if key else parallel, source)
    assert convert.main([str(source), str(target)]) == 0
    assert capsys.readouterr().out == f"{hashlib.sha256(target.read_bytes()).hexdigest()}  {target}\n"
    assert load_file(target).keys() == state.keys()
    teacher = cifar_teacher("resnet20", target)
    assert all(torch.equal(teacher.state_dict()[k], v) for k, v in state.items())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")] == []
    assert convert.convert(source, tmp_path / "again.safetensors") == hashlib.sha256(target.read_bytes()).hexdigest()


def test_convert_accepts_the_old_format_and_shared_tensors(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": shared, "b": shared.T}, tmp_path / "in.pth", _use_new_zipfile_serialization=False)
    convert.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["b"], shared.T)


@pytest.mark.parametrize("plain", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, plain: bool) -> None:
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    target.write_bytes(b"old")
    bad = {"model": {"w": Bomb(tmp_path / "burst")}}
    source.write_bytes(pickle.dumps(bad)) if plain else torch.save(bad, source)
    with fails("in.pth", "refused"):
        convert.convert(source, target)
    assert not (tmp_path / "burst").exists()
    assert target.read_bytes() == b"old"


def test_convert_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    with fails("in.pth", "cannot be read"):
        convert.convert(source, target)
    source.write_bytes(b"")
    with fails("refused"):
        convert.convert(source, target)
    torch.save({"model": {"w": 3}}, source)
    with fails("no dict of tensors"):
        convert.convert(source, target)
    torch.save([torch.zeros(1)], source)
    with fails("no dict of tensors"):
        convert.convert(source, target)
    torch.save({"w": torch.zeros(1), "module.w": torch.ones(1)}, source)
    with fails("two entries are called 'w'"):
        convert.convert(source, target)
    with fails("must end in .safetensors"):
        convert.convert(source, source)
    assert convert.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not target.exists()


def test_convert_runs_as_a_module(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pth")
    command = [sys.executable, "-m", "distillbench.suites.image_classification.convert", tmp_path / "in.pth", tmp_path / "out.safetensors"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == hashlib.sha256((tmp_path / "out.safetensors").read_bytes()).hexdigest()
