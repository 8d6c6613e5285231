"""The paper settings' files in small: EDM's zip and pickles, a diffusers folder, reference statistics, a teacher.

``write_data(root)`` makes a complete ``--data`` folder::

    cifar10/train.zip  cifar10/reference.npz  cifar10/teacher.safetensors
    imagenet64/train.zip  imagenet64/reference.npz  imagenet64/teacher.safetensors
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from distillbench.suites.image_generation.edm_nets import ARCHITECTURE, EDMDenoiser
from distillbench.training.nets import Architecture
from distillbench.training.student import AVERAGE, Student

CLASSES = 3

# --- images -----------------------------------------------------------------------------------------------------


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    """The bytes of a PNG of ``pixels`` (S, S, 3) or (S, S) uint8."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def members(count: int, side: int = 8, classes: int = CLASSES, channels: int = 3) -> dict[str, bytes]:
    """The files of a data set in EDM's format; image i has class i % ``classes``, which sets its mean brightness."""
    rng = np.random.default_rng(0)
    files, labels = {}, []
    for i in range(count):
        shape = (side, side, 3) if channels == 3 else (side, side)
        pixels = rng.integers(0, 100, shape, dtype=np.uint8) + np.uint8(150 * (i % classes) // max(1, classes - 1))
        name = f"{i // 1000:05d}/img{i:08d}.png"
        files[name] = png(pixels)
        labels.append([name, i % classes])
    return {**files, "dataset.json": json.dumps({"labels": labels}).encode()}


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    """As dataset_tool.py of NVlabs/edm: stored, not compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, blob in files.items():
            archive.writestr(name, blob)


def write_tree(folder: Path, files: dict[str, bytes]) -> None:
    """The same files unpacked."""
    for name, blob in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(blob)


# --- networks ---------------------------------------------------------------------------------------------------

TINY: dict[str, dict[str, Any]] = {
    "song": {"network": "song", "img_resolution": 8, "channels": 3, "classes": CLASSES, "augment_dim": 9, "model_channels": 8},
    "dhariwal": {"network": "dhariwal", "img_resolution": 8, "channels": 3, "classes": CLASSES, "model_channels": 16},
}
for _about in TINY.values():
    _about |= {"channel_mult": [1, 2], "channel_mult_emb": 2, "num_blocks": 1, "attn_resolutions": [4]}


def tiny_edm(network: str, **changes: Any) -> EDMDenoiser:
    """A tiny denoiser of random weights, none of them zero, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = EDMDenoiser(**{**TINY[network], **changes})
        with torch.no_grad():
            for value in net.parameters():
                value.add_(0.05 * torch.randn_like(value))
    net.architecture = Architecture(ARCHITECTURE, {**TINY[network], **changes})  # type: ignore[assignment]
    return net.eval()


# --- EDM's pickles ----------------------------------------------------------------------------------------------


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    raise AssertionError("a converter must not call this")


class EasyDict(dict[str, Any]):
    """Stands for dnnlib.util.EasyDict."""


class _Persistent:
    """Pickles as torch_utils.persistence makes a module pickle."""

    def __init__(self, meta: dict[str, Any]) -> None:
        self.meta = meta

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct_persistent_obj, (self.meta,), None


@contextmanager
def _their_modules() -> Iterator[None]:
    """Their module names for the time of pickling."""
    made = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")}
    made["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    made["dnnlib.util"].EasyDict = EasyDict  # type: ignore[attr-defined]
    own = _reconstruct_persistent_obj.__module__
    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = "torch_utils.persistence", "dnnlib.util"
    sys.modules.update(made)
    try:
        yield
    finally:
        _reconstruct_persistent_obj.__module__ = EasyDict.__module__ = own
        for name in made:
            del sys.modules[name]


def _persistent(module: nn.Module, source: str, kind: str | None = None, **state: Any) -> Any:
    children = OrderedDict((name, _persistent(child, source)) for name, child in module.named_children())
    inside = {
        **{"training": False, "_parameters": OrderedDict(module._parameters), "_buffers": OrderedDict(module._buffers)},
        **{"_non_persistent_buffers_set": set(), "_backward_hooks": OrderedDict(), "_modules": children},
    }
    if isinstance(module, nn.ModuleDict):
        made = nn.ModuleDict()  # torch's own class: pickled in the ordinary way
        made.__dict__ = inside
        return made
    inside |= {"_init_args": (), "_init_kwargs": {}, "skip_scale": np.sqrt(0.5), **state}
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": kind or type(module).__name__, "state": inside}
    return _Persistent(meta)


def edm_pickle(
    net: EDMDenoiser,
    *,
    protocol: int = 4,
    source: str = "raise SystemExit",
    kind: str = "EDMPrecond",
    changes: dict[str, Any] | None = None,
    **state: Any,
) -> bytes:
    """A network snapshot as NVlabs/edm writes it.

    Args:
        source: the embedded source code.  kind: the recorded class.  changes: to the recorded arguments.  state: more of it.
    """
    architecture = net.architecture
    assert isinstance(architecture, Architecture)
    ours = dict(architecture.arguments)
    given: dict[str, Any] = EasyDict(
        model_type={"song": "SongUNet", "dhariwal": "DhariwalUNet"}[ours.pop("network")],
        img_channels=ours.pop("channels"),
        label_dim=ours.pop("classes"),
        use_fp16=False,
        dropout=0.13,
        **ours,
    )
    if given["model_type"] == "SongUNet":
        given |= {"embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard", "resample_filter": [1, 1]}
    given |= changes or {}
    node = _persistent(net, source, kind, _init_kwargs=given, sigma_data=0.5, **state)
    loss = _Persistent({"type": "class", "version": 6, "module_src": source, "class_name": "EDMLoss", "state": {"P_mean": -1.2}})
    with _their_modules():
        return pickle.dumps(
            {"ema": node, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": EasyDict(path="x.zip")}, protocol=protocol
        )


# --- diffusers --------------------------------------------------------------------------------------------------


def write_diffusers(folder: Path, **schedule: Any) -> None:
    """A tiny class-conditional DDPM as ``save_pretrained`` writes it: ``unet/`` and ``scheduler/``. Needs diffusers."""
    from diffusers import DDPMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            num_class_embeds=CLASSES,
        )
    net.save_pretrained(folder / "unet")
    DDPMScheduler(**schedule).save_pretrained(folder / "scheduler")


# --- the whole folder -------------------------------------------------------------------------------------------


def write_data(root: Path, *, images: int = 24, features: int = 64) -> Path:
    """A complete ``--data`` folder for ``cifar10`` and ``imagenet64``: 8x8 images of three classes, tiny random teachers.

    Args:
        images: in each data set.  features: size of the reference statistics, that of the feature extractor in use.
    """
    for name, network in (("cifar10", "song"), ("imagenet64", "dhariwal")):
        write_zip(root / name / "train.zip", members(images))
        net = tiny_edm(network)
        (root / name / "teacher.safetensors").write_bytes(Student.of(net, averaged=AVERAGE).to_bytes())
        np.savez(root / name / "reference.npz", mu=np.zeros(features), sigma=np.eye(features))
    return root


# --- torch-fidelity's Inception ---------------------------------------------------------------------------------


def write_inception(path: Path) -> str:
    """A state dict of torch-fidelity's Inception with random weights; its SHA-256. Needs torch-fidelity."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state: Any, **_: Any) -> None:
            """Keep the random weights."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(Untrained("inception-v3-compat", ["2048"], nothing).state_dict(), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()
