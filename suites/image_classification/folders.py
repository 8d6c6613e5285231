"""CIFAR-100 and ImageNet-1k from the user's folders, augmentation that can be replayed, and pretrained teachers.

    <root>/cifar100/{train,test}/<class>/*.png      CIFAR-100 as images (preferred: nothing is unpickled)
    <root>/cifar-100-python/{train,test,meta}       CIFAR-100 as published; torchvision checks the MD5 sums first
    <root>/imagenet/{train,val}/<wnid>/*.JPEG       ImageNet-1k (ILSVRC 2012)

Labels number the classes in sorted order of their folder names, which is the order of the published CIFAR-100 labels (fine names,
alphabetical) and of torchvision's ImageNet weights (wnids). Names that are all decimal numbers are sorted as numbers.

One pass over the training data is ``one_pass(AugmentedView(cifar100(root, True), cifar_transform(True), seed), rows, ...)``.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, models
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import v2

from distillbench.errors import UserError, unknown
from distillbench.suites.image_classification.cifar_nets import NETS

CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # as in RepDistiller's dataset/cifar100.py
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- data -------------------------------------------------------------------------------------------------------


class LabelledImages(Protocol):
    """What the readers return: ``dataset[i]`` is an RGB PIL image and its label; both lists are complete without decoding."""

    classes: list[str]
    targets: list[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


class ImageTree:
    """One folder a class, images below it, as torchvision's ``ImageFolder`` lays them out; sorted, so order is reproducible.

    Raises:
        UserError: the folder is missing, has another number of classes than ``classes``, or a class without images.
    """

    def __init__(self, folder: Path, classes: int) -> None:
        self.classes = _class_names(folder)
        if len(self.classes) != classes:
            loose = not self.classes and any(p.suffix.lower() in IMG_EXTENSIONS for p in folder.iterdir())
            mend = "move each image into a folder named after its class" if loose else "unpack the whole data set there"
            raise UserError(f"{folder}: {len(self.classes)} class folders where {classes} are expected; {mend}")
        try:
            samples = make_dataset(str(folder), {name: i for i, name in enumerate(self.classes)}, IMG_EXTENSIONS)
        except FileNotFoundError:
            empty = [n for n in self.classes if not any(p.suffix.lower() in IMG_EXTENSIONS for p in (folder / n).rglob("*"))]
            raise UserError(f"{folder}: no images in class folder {', '.join(empty[:3])}; unpack the data set again") from None
        self.paths: list[str] = [path for path, _ in samples]
        self.targets: list[int] = [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """The image (RGB) and its label. Raises UserError, naming the file, where it cannot be decoded."""
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB"), self.targets[index]
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # decoders raise all of these
            raise UserError(f"{path}: not a readable image ({_line(error)}); restore this file from the data set") from error


def cifar100(root: Path, train: bool, classes: int = 100) -> LabelledImages:
    """CIFAR-100 with fine labels: 50,000 training or 10,000 test images of 32 x 32.

    ``<root>/cifar100`` is read where it exists, otherwise the published ``<root>/cifar-100-python``. The latter are pickles:
    torchvision opens them only if their MD5 sums are those of the genuine files, and so do we. Nothing is downloaded.

    Args:
        root: the user's data folder.
        train: the training split, otherwise the test split.
        classes: number of classes expected; only fixtures have another one.

    Raises:
        UserError: a missing folder, a wrong number of classes, class names that differ between the splits, foreign pickles.
    """
    tree = root / "cifar100"
    if tree.is_dir():
        _same_classes(tree / "train", tree / "test")
        return ImageTree(tree / ("train" if train else "test"), classes)
    published = root / "cifar-100-python"
    if not published.is_dir():
        raise UserError(f"{root}: neither cifar100/ nor cifar-100-python/ in it; unpack cifar-100-python.tar.gz there")
    if classes != 100:
        raise UserError(f"{published}: holds 100 classes where {classes} are expected; write the images to {tree} instead")
    try:
        data: LabelledImages = datasets.CIFAR100(str(root), train=train, download=False)
    except RuntimeError as error:
        raise UserError(f"{published}: files missing or not the published ones (MD5); unpack cifar-100-python.tar.gz again") from error
    return data


def imagenet1k(root: Path, split: Literal["train", "val"], classes: int = 1000) -> LabelledImages:
    """ImageNet-1k (ILSVRC 2012) from ``<root>/imagenet/<split>/<wnid>/*.JPEG``.

    Args:
        root: the user's data folder.
        split: ``train`` (1,281,167 images) or ``val`` (50,000, sorted into wnid folders).
        classes: number of classes expected; only fixtures have another one.

    Raises:
        UserError: a missing folder, a wrong number of classes, or class names that differ between the splits.
    """
    tree = root / "imagenet"
    _same_classes(tree / "train", tree / "val")
    return ImageTree(tree / split, classes)


def _class_names(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UserError(f"{folder}: {_line(error.strerror)}; put the data set there, one folder a class") from error
    # '10' sorts before '2' as text, which would renumber the classes against a published teacher without any error.
    return sorted(names, key=int) if all(n.isdecimal() for n in names) else names


def _same_classes(one: Path, other: Path) -> None:
    if one.is_dir() and other.is_dir():
        differing = sorted(set(_class_names(one)) ^ set(_class_names(other)))
        if differing:
            raise UserError(f"{one.parent}: class folder {differing[0]!r} is only in one of {one.name}/ and {other.name}/; add the other")


def _line(error: object) -> str:
    return " ".join(str(error).split())


# --- transforms -------------------------------------------------------------------------------------------------

Transform = Callable[[Image.Image], Tensor]


def cifar_transform(train: bool) -> Transform:
    """PIL image -> float32 ``(3, 32, 32)``, normalised. Training: zero-pad by 4, random crop of 32, random flip."""
    return _transform([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if train else [], CIFAR_MEAN, CIFAR_STD)


def imagenet_transform(train: bool) -> Transform:
    """PIL image -> float32 ``(3, 224, 224)``, normalised. Training: random resized crop and flip; otherwise resize 256, centre crop."""
    steps = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()] if train else [v2.Resize(256), v2.CenterCrop(224)]
    return _transform(steps, IMAGENET_MEAN, IMAGENET_STD)


def _transform(steps: list[Any], mean: tuple[float, ...], std: tuple[float, ...]) -> Transform:
    # Geometry runs on the PIL image, as in the published recipes: PIL and tensor resizing differ in their last bits.
    transform: Transform = v2.Compose([*steps, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    return transform


class AugmentedView:
    """A data set under a random transform whose outcome depends on ``(seed, epoch, index)`` and on nothing else.

    So neither the number of workers, nor the order, nor where a run was resumed changes a pixel. The transform may use torch's
    CPU generator and Python's ``random``; both are put back afterwards. It must not use NumPy's global generator.
    """

    def __init__(self, dataset: LabelledImages, transform: Transform, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def get(self, epoch: int, index: int) -> tuple[Tensor, int]:
        """Example ``index`` as it looks in ``epoch``: float32 ``(C, H, W)`` and its label. Raises UserError for a bad image."""
        image, label = self.dataset[index]
        digest = hashlib.sha256(f"augment:{self.seed}:{epoch}:{index}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little")
        outer = random.getstate()
        try:
            with torch.random.fork_rng(devices=[]):
                # Not torch.manual_seed: that would also reseed the GPUs, whose state is not put back here.
                torch.default_generator.manual_seed(seed)
                random.seed(seed)
                return self.transform(image), int(label)
        finally:
            random.setstate(outer)


class _Views(Dataset[Any]):
    """A view by (epoch, index); a bad image comes back as a value, because a worker would wrap the raised one in its traceback."""

    def __init__(self, view: AugmentedView) -> None:
        self.view = view

    def __getitem__(self, wanted: tuple[int, int]) -> tuple[Tensor, int, int] | UserError:
        epoch, index = wanted
        try:
            image, label = self.view.get(epoch, index)
        except UserError as error:
            return UserError(str(error))  # without the cause, which may not be picklable
        return image, label, index


def _collate(examples: list[tuple[Tensor, int, int] | UserError]) -> tuple[Tensor, Tensor, Tensor] | UserError:
    good = []
    for example in examples:
        if isinstance(example, UserError):
            return example
        good.append(example)
    images, labels, indices = zip(*good, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(indices)


def load(view: AugmentedView, wanted: Iterable[Sequence[tuple[int, int]]], workers: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A batch for each list of (epoch, index): ``(inputs (B, C, H, W) float32, labels (B,) int64, indices (B,) int64)``.

    The bytes depend on the view and on what is wanted alone: not on ``workers``, and no global generator is read or moved.

    Args:
        workers: decoding processes, which read ahead; 0 decodes here, when a batch is asked for.

    Raises:
        UserError: an image cannot be decoded; one line that names the file.
    """
    loader = DataLoader(
        _Views(view),
        batch_sampler=wanted,  # type: ignore[arg-type]  # any iterable of what the data set takes will do, an endless one as well
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),  # else the loader draws its workers' base seed from the global generator
    )
    return _raising(loader)


def one_pass(
    view: AugmentedView, rows: Sequence[int] | Tensor, batch_size: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The given rows once, as they look in epoch 0, as :func:`load` gives them; the last batch may be smaller."""
    listed = [(0, int(i)) for i in (rows.tolist() if isinstance(rows, Tensor) else rows)]
    return load(view, [listed[i : i + batch_size] for i in range(0, len(listed), batch_size)], workers)


def _raising(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        inputs, labels, indices = batch
        yield inputs, labels, indices


# --- pretrained teachers ----------------------------------------------------------------------------------------

IMAGENET_TEACHERS = ("resnet18", "resnet34", "resnet50")


def cifar_teacher(name: str, path: Path, num_classes: int = 100) -> nn.Module:
    """The net ``name`` of :data:`cifar_nets.NETS` with the weights at ``path``, frozen, in eval mode.

    Args:
        name: for example ``resnet32x4``.
        path: a safetensors file; ``python -m distillbench.suites.image_classification.convert`` makes one from a published ``.pth``.
        num_classes: outputs of the net.

    Raises:
        UserError: an unknown name, or a file that is missing, unreadable, or does not fit exactly.
    """
    if name not in NETS:
        raise unknown("CIFAR network", name, NETS)
    return _load(NETS[name](num_classes), name, path, _read(path))


def imagenet_teacher(name: str = "resnet34", path: Path | None = None, num_classes: int = 1000) -> nn.Module:
    """A torchvision ResNet with ImageNet-1k weights, frozen, in eval mode, with ``stage_names`` and ``head_name`` for taps.

    The stem's tap is ``maxpool``: torchvision uses one ``relu`` module several times in a block, but the stem's pooling once.

    Args:
        name: one of :data:`IMAGENET_TEACHERS`.
        path: a safetensors file with torchvision's names, or None for torchvision's ``IMAGENET1K_V1`` weights through torch.hub.
        num_classes: outputs of the net; only fixtures have another number than 1000.

    Raises:
        UserError: an unknown name, a file that does not fit, or weights that can be neither fetched nor found.
    """
    if name not in IMAGENET_TEACHERS:
        raise unknown("ImageNet teacher", name, IMAGENET_TEACHERS)
    state = _hub_weights(name) if path is None else _read(path)
    net = models.get_model(name, weights=None, num_classes=num_classes)
    net.stage_names = ("maxpool", "layer1", "layer2", "layer3", "layer4")
    net.head_name = "fc"
    return _load(net, name, path or Path(f"torchvision:{name}"), state)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; put the teacher's safetensors file there or name another one")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        mend = f"'python -m distillbench.suites.image_classification.convert {path.name} {path.stem}.safetensors' converts a published .pth"
        raise UserError(f"{path}: not a safetensors file ({_line(error)}); {mend}") from error


def _load(net: nn.Module, name: str, path: Path, state: dict[str, Tensor]) -> nn.Module:
    own = net.state_dict()
    common = {k: (v, state[k]) for k, v in own.items() if k in state}
    # num_batches_tracked came with torch 0.4.1; older checkpoints lack it, and no result depends on it.
    faults = {
        "missing": [k for k in own if k not in state and not k.endswith("num_batches_tracked")],
        "unknown": sorted(state.keys() - own.keys()),
        "of another shape": [f"{k} {tuple(v.shape)} for {tuple(o.shape)}" for k, (o, v) in common.items() if o.shape != v.shape],
        "not finite": [k for k, (o, v) in common.items() if o.is_floating_point() and not (v.is_floating_point() and v.isfinite().all())],
    }
    found = [f"{len(keys)} {what} ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})" for what, keys in faults.items() if keys]
    if found:
        raise UserError(f"{path}: does not fit {name}: {'; '.join(found)}; use a file that was saved from this network")
    complete = {k: state.get(k, v) for k, v in own.items()}
    net.load_state_dict(complete, strict=True)
    return net.eval().requires_grad_(False)


def _hub_weights(name: str) -> dict[str, Tensor]:
    weights = models.get_model_weights(name)["IMAGENET1K_V1"]
    file = weights.url.rsplit("/", 1)[-1]
    prefix = file.removesuffix(".pth").rsplit("-", 1)[-1]  # torchvision's files carry the start of their SHA-256
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    try:
        # torch.hub checks the hash of what it downloads, but neither that of a file it finds in its cache nor what is in the pickle.
        if cached.exists():
            with cached.open("rb") as stream:
                if not hashlib.file_digest(stream, "sha256").hexdigest().startswith(prefix):
                    raise UserError(f"{cached}: its SHA-256 does not begin with {prefix}; delete the file")
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except UserError:
        raise
    except Exception as error:  # network, proxy, disk, hash, unpickling: all mended in the same way
        mend = f"fetch {weights.url} elsewhere, put it at {cached}, or convert it to safetensors and give its path"
        raise UserError(f"{name}: torchvision's weights cannot be fetched ({_line(error)[:120]}); {mend}") from error
    return state
