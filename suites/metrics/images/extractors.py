"""Feature extractors with an identity, and the rule that only NVIDIA's file of Inception makes a Frechet distance an FID.

Nothing is downloaded: the user names the weights file. Its bytes are hashed first and refused unless the hash is the published one
(or one that the caller states), and what is loaded are the bytes that were hashed.

==================  ===============================  ==========================================================
extractor           file                             resize rules
==================  ===============================  ==========================================================
inception_nvidia    inception-2015-12-05.pt          clean (clean-fid), tensorflow (EDM, StyleGAN2-ADA)
inception_fidelity  pt_ or weights-inception-        tensorflow (torch-fidelity), antialias (torchmetrics)
                    2015-12-05-6726825d.pth
==================  ===============================  ==========================================================

The second is the first one's network, carried over by other hands: its numbers are close and not the same, so they have other names.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillbench.errors import UserError, unknown

# The TorchScript file by NVIDIA that clean-fid and StyleGAN2-ADA load; k-diffusion pins the same hash.
NVIDIA_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
# The state dict of pytorch-fid and torch-fidelity, one file under two names; both end in the first 8 digits.
FIDELITY_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PUBLISHED = {"inception_nvidia": NVIDIA_SHA256, "inception_fidelity": FIDELITY_SHA256}

Network = Callable[[Tensor], Tensor]


def quantise(images: Tensor, rule: str = "round") -> Tensor:
    """Images as uint8, which published metrics are taken on; uint8 passes unchanged.

    Args:
        images: any shape, uint8 or float with black at -1 and white at 1; what lies outside is clipped.
        rule: ``round``, floor(127.5 x + 128), as EDM and StyleGAN2 do; ``truncate``, floor(127.5 (x + 1)), as guided-diffusion does.

    Raises:
        UserError: values are not finite, another type, or an unknown rule.
    """
    offsets = {"round": 128.0, "truncate": 127.5}
    if rule not in offsets:
        raise unknown("uint8 rule", rule, offsets)
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise UserError(f"images are {images.dtype}: give uint8, or floats in [-1, 1]")
    if not bool(images.isfinite().all()):
        raise UserError("images hold values that are not finite: the generator diverged")
    return (images.float() * 127.5 + offsets[rule]).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Extractor:
    """A network that makes features, with everything that decides their values.

    Attributes:
        name: what a distance in these features is called by.
        weights_sha256: hash of the file that the weights come from.
        resize: rule by which images reach the network's size (``none`` where it takes them as they are).
        network: uint8 (N, C, H, W) -> features (N, D); resizes by the rule.
        classifier: uint8 (N, C, H, W) -> class probabilities (N, K); None where the network has no classes.
        uint8: rule of :func:`quantise`.
        device: where the network lives.
    """

    name: str
    weights_sha256: str
    resize: str
    network: Network
    classifier: Network | None = None
    uint8: str = "round"
    device: str = "cpu"

    @property
    def identity(self) -> dict[str, str]:
        """What has to be equal for two values to share a column, ready for a record."""
        return {"extractor": self.name, "weights_sha256": self.weights_sha256, "resize": self.resize, "uint8": self.uint8}

    def features(self, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """Features of images, uint8 or floats in [-1, 1].   (N, C, H, W) -> (N, D) float32 on the CPU."""
        return self._apply(self.network, images, batch_size)

    def probabilities(self, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """Class probabilities of images, for the Inception Score.   (N, C, H, W) -> (N, K) float32 on the CPU.

        Raises:
            UserError: the network has no classes.
        """
        if self.classifier is None:
            raise UserError(f"{self.name} has no classes, so it gives no Inception Score: use one of {', '.join(PUBLISHED)}")
        return self._apply(self.classifier, images, batch_size)

    @torch.no_grad()
    def _apply(self, network: Network, images: Tensor, batch_size: int) -> Tensor:
        if images.ndim != 4 or not len(images):
            raise UserError(f"images have shape {tuple(images.shape)}: at least one, as (N, C, H, W), is needed")
        parts = (quantise(part.to(self.device), self.uint8) for part in images.split(batch_size))
        return torch.cat([network(part).float().cpu() for part in parts])


def is_inception(identity: Mapping[str, str]) -> bool:
    """Whether the features are those of NVIDIA's file of Inception, with its published weights."""
    return identity["extractor"] == "inception_nvidia" and identity["weights_sha256"] == NVIDIA_SHA256


def frechet_name(identity: Mapping[str, str]) -> str:
    """``fid`` for NVIDIA's file of Inception, ``fd_<extractor>`` for every other feature space."""
    return "fid" if is_inception(identity) else feature_name("fd", identity)


def feature_name(metric: str, identity: Mapping[str, str]) -> str:
    """``metric`` itself for NVIDIA's file of Inception, ``<metric>_<extractor>`` for every other feature space."""
    return metric if is_inception(identity) else f"{metric}_{identity['extractor']}"


def _verified(path: Path, expected: str) -> io.BytesIO:
    """The file's bytes, once their hash is right."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read Inception's weights at {path}: {error.strerror or error}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != expected.lower():
        raise UserError(f"{path} has sha256 {found[:16]}... where {expected[:16]}... is expected: get the published file again")
    return io.BytesIO(content)


def _three_channels(images: Tensor) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise UserError(f"Inception takes 1 or 3 channels, not {images.shape[1]}")
    return images.expand(-1, 3, -1, -1)  # grey as equal red, green and blue


def _missing(package: str, error: ImportError) -> UserError:
    return UserError(f"{package} is needed for these features ({error}): pip install 'distillbench[images]'")


def _resize_clean(images: Tensor) -> Tensor:
    """clean-fid's rule: each channel as float through Pillow's antialiased bicubic filter to 299 x 299, clipped, not rounded."""
    try:
        from cleanfid.resize import build_resizer
    except ImportError as error:
        raise _missing("clean-fid", error) from error
    resizer = build_resizer("clean")
    resized = [resizer(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device)


def nvidia_inception(
    path: Path, *, resize: str = "clean", uint8: str = "round", sha256: str = NVIDIA_SHA256, device: str = "cpu"
) -> Extractor:
    """Inception from NVIDIA's TorchScript file ``inception-2015-12-05.pt``, features (N, 2048).

    TorchScript is code, so the file runs only if its hash is ``sha256``. Features under another hash than the published one are
    not called FID.

    Args:
        path: the file.
        resize: ``clean``, as clean-fid; ``tensorflow``, the bilinear filter inside the file, as EDM and StyleGAN2-ADA.
        uint8: rule of :func:`quantise`.
        sha256: hash that the file has to have.
        device: where to run it.

    Raises:
        UserError: no such file, another hash, not this network, an unknown rule, or a package is missing.
    """
    if resize not in ("clean", "tensorflow"):
        raise unknown("resize rule", resize, ("clean", "tensorflow"))
    content = _verified(path, sha256)
    try:
        base: Any = torch.jit.load(content, map_location=device).eval()
        layers = base.layers
    except (RuntimeError, AttributeError):
        raise UserError(f"{path} is not the TorchScript Inception that clean-fid uses (it has no layers to run)") from None

    def features(images: Tensor) -> Tensor:
        x = _three_channels(images)
        if resize == "tensorflow":
            made: Tensor = base(x, return_features=True)
        else:
            made = layers((_resize_clean(x) - 128) / 128)
        return made.flatten(1)

    def classes(images: Tensor) -> Tensor:
        x = _three_channels(images)
        # Without the bias of the last layer, as the first Inception Score was computed.
        made: Tensor = base(_resize_clean(x) if resize == "clean" else x, no_output_bias=True)
        return made

    quantise(torch.zeros(0), uint8)  # refuse an unknown rule now
    return Extractor("inception_nvidia", sha256.lower(), resize, features, classes, uint8, device)


def fidelity_inception(
    path: Path, *, resize: str = "tensorflow", uint8: str = "round", sha256: str = FIDELITY_SHA256, device: str = "cpu"
) -> Extractor:
    """Inception from the state dict of pytorch-fid and torch-fidelity, in torchmetrics' network, features (N, 2048).

    Args:
        path: ``pt_inception-2015-12-05-6726825d.pth`` or ``weights-inception-2015-12-05-6726825d.pth``.
        resize: ``tensorflow``, as torch-fidelity; ``antialias``, as torchmetrics does by default: it gives other values.
        uint8: rule of :func:`quantise`.
        sha256: hash that the file has to have; another than the published one is for tests.
        device: where to run it.

    Raises:
        UserError: no such file, another hash, no state dict of this network, an unknown rule, or a package is missing.
    """
    if resize not in ("tensorflow", "antialias"):
        raise unknown("resize rule", resize, ("tensorflow", "antialias"))
    content = _verified(path, sha256)
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        # torch-fidelity unpickles the file it is given, so it gets tensors that were read safely and written again here.
        rewritten = io.BytesIO()
        torch.save(torch.load(content, map_location="cpu", weights_only=True), rewritten)
        rewritten.seek(0)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], rewritten, antialias=resize == "antialias").to(device)
    except ImportError as error:
        raise _missing("torch-fidelity", error) from error
    except (pickle.UnpicklingError, RuntimeError, AttributeError, TypeError, EOFError):
        raise UserError(f"{path} is not a state dict of torch-fidelity's Inception") from None

    def features(images: Tensor) -> Tensor:
        made: Tensor = network(_three_channels(images))
        return made

    def classes(images: Tensor) -> Tensor:
        # Without the bias of the last layer, as the first Inception Score was computed.
        logits: Tensor = features(images) @ network.fc.weight.T
        return logits.softmax(1)

    quantise(torch.zeros(0), uint8)  # refuse an unknown rule now
    return Extractor("inception_fidelity", sha256.lower(), resize, features, classes, uint8, device)
