"""EDM's zips and folders: what is read, in which order, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import pickle
import stat
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distillbench.errors import UserError
from distillbench.files import digest_tree
from distillbench.suites.image_generation.edm_nets import EDMDenoiser
from distillbench.suites.image_generation.image_folders import EDMImages, FolderBatches, flipped
from distillbench.training.data import Batch
from distillbench.training.student import Student
from tests.suites.image_generation.fixtures import CLASSES, members, png, write_data, write_tree, write_zip

COUNT = 11
FIRST = "00000/img00000000.png"


@contextlib.contextmanager
def fails(*parts: str) -> Iterator[None]:
    """The block raises a UserError of one line that holds all of ``parts``."""
    with pytest.raises(UserError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.fixture(params=["zip", "folder"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Writes files as a zip or as a folder and returns its path."""

    def zipped(files: dict[str, bytes]) -> Path:
        write_zip(tmp_path / "train.zip", files)
        return tmp_path / "train.zip"

    def unpacked(files: dict[str, bytes]) -> Path:
        write_tree(tmp_path / "train", files)
        return tmp_path / "train"

    return zipped if request.param == "zip" else unpacked


@pytest.fixture
def images(tmp_path: Path) -> EDMImages:
    write_zip(tmp_path / "images.zip", members(COUNT))
    return EDMImages(tmp_path / "images.zip", 8, CLASSES)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("inputs", "labels", "index", "labelled"))


# --- images -----------------------------------------------------------------------------------------------------


def test_images_and_labels(write: Callable[..., Path]) -> None:
    files = members(COUNT)
    shuffled = dict(sorted(files.items(), key=lambda item: item[0][-6:]))  # the order in the zip does not matter
    images = EDMImages(write(shuffled), 8, CLASSES)
    assert len(images) == COUNT
    assert images.names == [f"00000/img{i:08d}.png" for i in range(COUNT)]
    assert (images.labels.dtype, images.labels.tolist()) == (torch.int64, [i % CLASSES for i in range(COUNT)])
    for i in (0, 7):
        truth = np.asarray(Image.open(io.BytesIO(files[images.names[i]])))
        assert images.image(i).dtype == torch.uint8
        assert np.array_equal(images.image(i).numpy(), truth.transpose(2, 0, 1))


def test_grey_images_and_no_labels(write: Callable[..., Path]) -> None:
    files = members(4, channels=1)
    del files["dataset.json"]
    images = EDMImages(write(files), 8, channels=1)
    assert images.image(3).shape == (1, 8, 8)
    assert images.labels.tolist() == [0] * 4
    with fails("dataset.json is missing", "dataset_tool.py"):
        EDMImages(images.path, 8, CLASSES, channels=1)


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    files = members(3)
    write_zip(tmp_path / "a.zip", files)
    write_zip(tmp_path / "b.zip", {**files, FIRST: files["00000/img00000001.png"]})
    write_tree(tmp_path / "c", files)
    write_tree(tmp_path / "d", files)
    a, b, c, d = (digest_tree(tmp_path / name) for name in ("a.zip", "b.zip", "c", "d"))
    assert a != b
    assert c == d
    (tmp_path / "d/dataset.json").write_text('{"labels": null}')
    assert digest_tree(tmp_path / "d") != c


def test_refused_members(write: Callable[..., Path]) -> None:
    good = members(2)
    path = write({**good, "notes.txt": b"hello"})
    with fails("'notes.txt' is neither"):
        EDMImages(path, 8, CLASSES)


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "00000/../../out.png", "..\\out.png", "C:/out.png"])
def test_paths_that_leave_the_zip(tmp_path: Path, name: str) -> None:
    write_zip(tmp_path / "t.zip", {**members(2), name: png(np.zeros((8, 8, 3), np.uint8))})
    with fails("t.zip", "leaves the folder"):
        EDMImages(tmp_path / "t.zip", 8, CLASSES)


def test_links_and_encrypted_members(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(np.zeros((8, 8, 3), np.uint8)))
    write_tree(tmp_path / "t", members(2))
    (tmp_path / "t/00000/img00000005.png").symlink_to(tmp_path / "secret.png")
    with fails("img00000005.png", "a link"):
        EDMImages(tmp_path / "t", 8)
    (tmp_path / "t/00000/img00000005.png").unlink()
    (tmp_path / "t/00001").symlink_to(tmp_path, target_is_directory=True)
    with fails("'00001'", "a link"):
        EDMImages(tmp_path / "t", 8)
    for name in ("link", "locked"):
        info = zipfile.ZipInfo("x.png")
        if name == "link":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(info, b"../secret.png")
    blob = bytearray((tmp_path / "locked.zip").read_bytes())
    blob[blob.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(blob)
    with fails("x.png", "a link"):
        EDMImages(tmp_path / "link.zip", 8)
    with fails("x.png", "encrypted"):
        EDMImages(tmp_path / "locked.zip", 8)


def bad_images() -> dict[str, tuple[bytes, str]]:
    rng = np.random.default_rng(0)
    jpeg = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(jpeg, format="JPEG")
    palette = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).convert("P").save(palette, format="PNG")
    whole = png(np.zeros((8, 8, 3), np.uint8))
    return {
        "size": (png(np.zeros((8, 9, 3), np.uint8)), "is 9x8 RGB where 8x8 RGB is expected"),
        "grey": (png(np.zeros((8, 8), np.uint8)), "is 8x8 L where"),
        "palette": (palette.getvalue(), "is 8x8 P where"),
        "jpeg": (jpeg.getvalue(), "is not a readable PNG"),
        "cut": (whole[: len(whole) // 2], "is not a readable PNG"),
        "large": (rng.bytes(10**5), "holds more than"),
    }


@pytest.mark.parametrize("kind", ["size", "grey", "palette", "jpeg", "cut", "large"])
def test_bad_images(write: Callable[..., Path], kind: str) -> None:
    blob, words = bad_images()[kind]
    images = EDMImages(write({**members(4), "00000/img00000002.png": blob}), 8, CLASSES)
    assert images.image(1).shape == (3, 8, 8)
    with fails(str(images.path), "img00000002.png", words):
        images.image(2)
    for workers in (0, 1):
        with fails("img00000002.png", words):
            next(FolderBatches(images, 4, 0, workers=workers).stream(0))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[FIRST, 0]], "img00000001.png the label None"),
        ([[FIRST, 0], ["00000/img00000001.png", CLASSES]], f"the label {CLASSES}, not one from 0 to {CLASSES - 1}"),
        ([[FIRST, 0], ["00000/img00000001.png", -1]], "the label -1"),
        ([[FIRST, 0], ["00000/img00000001.png", 1.0]], "the label 1.0"),
        ([[FIRST, True], ["00000/img00000001.png", 1]], "the label True"),
        (None, "is not {"),
        ([[[], 3]], "the label None"),
        ([3], "is not {"),
    ],
)
def test_bad_labels(tmp_path: Path, labels: Any, words: str) -> None:
    write_zip(tmp_path / "t.zip", {**members(2), "dataset.json": json.dumps({"labels": labels}).encode()})
    with fails("t.zip: dataset.json", words):
        EDMImages(tmp_path / "t.zip", 8, CLASSES)
    assert len(EDMImages(tmp_path / "t.zip", 8)) == 2  # without classes, labels are not read


def test_no_data_set(tmp_path: Path) -> None:
    with fails("t.zip", "No such file"):
        EDMImages(tmp_path / "t.zip", 8)
    (tmp_path / "t.zip").write_bytes(b"PK nothing")
    with fails("t.zip", "not a readable zip"):
        EDMImages(tmp_path / "t.zip", 8)
    (tmp_path / "t").mkdir()
    with fails("no images"):
        EDMImages(tmp_path / "t", 8)
    write_zip(tmp_path / "u.zip", members(3))
    blob = (tmp_path / "u.zip").read_bytes()
    at = blob.index(b"\x89PNG") + 40
    (tmp_path / "u.zip").write_bytes(blob[:at] + bytes(8) + blob[at + 8 :])  # the checksum no longer fits
    with fails("u.zip", FIRST):
        EDMImages(tmp_path / "u.zip", 8).image(0)


# --- batches ----------------------------------------------------------------------------------------------------


def test_batches(images: EDMImages) -> None:
    found = list(islice(FolderBatches(images, 4, seed=3).stream(0), 6))
    for batch in found:
        assert (batch.inputs.shape, batch.inputs.dtype, batch.labels.dtype) == ((4, 3, 8, 8), torch.float32, torch.int64)
        assert batch.labels.tolist() == [i % CLASSES for i in batch.index.tolist()]
        assert bool(batch.labelled.all())
        for row, index in zip(batch.inputs, batch.index.tolist(), strict=True):
            truth = images.image(index).double().numpy() / 127.5 - 1
            np.testing.assert_allclose(row.double().numpy(), truth, atol=1e-6)
    for epoch in (found[:2], found[2:4], found[4:]):  # 11 images make two batches of 4 per epoch, none of them twice
        assert len(set(torch.cat([b.index for b in epoch]).tolist())) == 8
    assert len({tuple(torch.cat([b.index for b in found[i : i + 2]]).tolist()) for i in (0, 2, 4)}) == 3
    other = next(FolderBatches(images, 4, seed=4).stream(0))
    assert other.index.tolist() != found[0].index.tolist()


def test_the_range_is_minus_one_to_one(tmp_path: Path) -> None:
    write_zip(tmp_path / "t.zip", {"a.png": png(np.zeros((8, 8, 3), np.uint8)), "b.png": png(np.full((8, 8, 3), 255, np.uint8))})
    batch = next(FolderBatches(EDMImages(tmp_path / "t.zip", 8), 2, 0).stream(0))
    assert sorted(batch.inputs.flatten(1).mean(1).tolist()) == [-1.0, 1.0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_function_of_seed_and_step(images: EDMImages, workers: int) -> None:
    """Entered at any step, with any number of workers, the batches are the same; no global generator is read or moved."""
    whole = list(islice(FolderBatches(images, 4, 3, flip=True).stream(0), 5))
    state = torch.get_rng_state()
    for start in (1, 3):
        rest = list(islice(FolderBatches(images, 4, 3, flip=True, workers=workers).stream(start), 5 - start))
        assert all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_flips(images: EDMImages) -> None:
    """Exactly the images that the coin says, and about half of them."""
    seen = []
    for step, batch in enumerate(islice(FolderBatches(images, 11, 3, flip=True).stream(0), 12)):
        for row, index in zip(batch.inputs, batch.index.tolist(), strict=True):
            pixels = images.image(index).float() / 127.5 - 1
            seen.append(torch.equal(row, pixels.flip(2)))
            assert seen[-1] == flipped(3, step, index)
            assert seen[-1] != torch.equal(row, pixels)
    assert 0.35 < sum(seen) / len(seen) < 0.65
    assert [flipped(3, 0, i) for i in range(40)] != [flipped(3, 1, i) for i in range(40)]
    assert [flipped(3, 0, i) for i in range(40)] != [flipped(4, 0, i) for i in range(40)]


def test_rows_and_small_data_sets(images: EDMImages) -> None:
    few = FolderBatches(images, 100, 0, chosen=torch.tensor([2, 5, 7]))
    assert few.batch_size == 3
    assert sorted(next(few.stream(4)).index.tolist()) == [2, 5, 7]


def _sums(images: EDMImages, rows: list[int]) -> list[int]:
    return [int(images.image(i).sum()) for i in rows]


def test_each_process_opens_the_zip_for_itself(images: EDMImages) -> None:
    truth = _sums(images, list(range(COUNT)))  # the handle is open here
    assert _sums(pickle.loads(pickle.dumps(images)), list(range(COUNT))) == truth
    with multiprocessing.get_context("fork").Pool(2) as pool:
        parts = [pool.apply_async(_sums, (images, [i] * 20)) for i in range(COUNT)]
        own = _sums(images, list(range(COUNT)) * 5)
        assert [p.get()[0] for p in parts] == truth
    assert own == truth * 5


def test_the_whole_data_folder(tmp_path: Path) -> None:
    """What the end-to-end tests of the paper settings rest on: each file is what its reader expects."""
    write_data(tmp_path)
    for name, network in (("cifar10", "song"), ("imagenet64", "dhariwal")):
        images = EDMImages(tmp_path / name / "train.zip", 8, CLASSES)
        student = Student.from_bytes((tmp_path / name / "teacher.safetensors").read_bytes())
        assert (student.architecture.name, student.architecture.arguments["network"]) == ("edm-unet", network)
        net = EDMDenoiser(**student.architecture.arguments)
        net.load_state_dict(student.weights)
        batch = next(FolderBatches(images, 4, 0).stream(0))
        assert net(batch.inputs, torch.ones(4), batch.labels).shape == (4, *net.shape)
        with np.load(tmp_path / name / "reference.npz") as reference:
            assert (reference["mu"].shape, reference["sigma"].shape) == ((64,), (64, 64))
