"""A diffusers ``UNet2DModel`` trained as DDPM, asked as every denoiser here: x_0 under variance-exploding noise.

With alpha the cumulative product of 1 - beta, a DDPM sees x_vp = sqrt(alpha) x_0 + sqrt(1 - alpha) eps. Divided by sqrt(alpha) that is
x_0 + sigma eps with sigma = sqrt((1 - alpha) / alpha), so x_vp = x / sqrt(1 + sigma^2) (Song et al. 2021, DDIM, section 4.3).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distillbench.errors import UserError
from distillbench.problems.image_generation.edm import per_row
from distillbench.training.nets import Architecture
from distillbench.training.student import Student

if TYPE_CHECKING:
    from collections.abc import Mapping

ARCHITECTURE = "diffusers-unet2d"
"""The name of :class:`DiffusersDenoiser` in a :class:`nets.Architecture`."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class DiffusersDenoiser(nn.Module):
    """A DDPM as a denoiser at any noise level.

    ``forward``: noisy (B, C, S, S) = x_0 + sigma eps, sigma (B,), labels (B,) int64 (None for an unconditional network) -> x_0
    estimate (B, C, S, S). The timestep is found by interpolating in ln sigma between the trained ones, which the network's
    sinusoids take as it is; beyond the trained levels it is the nearest one, while sigma itself stays. Nothing is clipped.
    A network that also predicts variances has 2 C outputs, of which the first C are read.

    Attributes:
        shape: of one image, (C, S, S), where the configuration says a size.
        stage_names: the middle block.

    Args:
        config: of the ``UNet2DModel``.  schedule: of the scheduler, with ``prediction_type``; both as diffusers writes them.

    Raises:
        UserError: the prediction is not one of :data:`PREDICTIONS`, or the network embeds noise levels by Fourier features,
            or diffusers is not installed.
    """

    stage_names = ("net.mid_block",)
    levels: Tensor

    def __init__(self, config: Mapping[str, Any], schedule: Mapping[str, Any]) -> None:
        try:
            from diffusers import DDPMScheduler, UNet2DModel
        except ImportError as error:
            raise UserError("a network of diffusers needs that package: pip install 'distillbench[images]'") from error

        super().__init__()
        self.prediction = schedule.get("prediction_type", "epsilon")
        if self.prediction not in PREDICTIONS:
            raise UserError(f"the scheduler predicts {self.prediction!r}; known are {', '.join(PREDICTIONS)}")
        if config.get("time_embedding_type", "positional") != "positional":
            raise UserError("the network embeds noise levels by Fourier features; only DDPMs with positional timesteps are known")
        self.net = UNet2DModel.from_config(dict(config))
        self.channels = int(self.net.config["in_channels"])
        size = self.net.config["sample_size"]
        self.shape = (self.channels, *(size if isinstance(size, list | tuple) else (size, size)))
        self.classes = int(self.net.config["num_class_embeds"] or 0)
        alphas = DDPMScheduler.from_config(dict(schedule)).alphas_cumprod.double()
        self.register_buffer("levels", ((1 - alphas) / alphas).sqrt().log(), persistent=False)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The place of ``sigma`` (B,) among the trained levels, between 0 and their number - 1.   Returns (B,)."""
        wanted = sigma.to(self.levels.dtype).log()
        above = torch.searchsorted(self.levels, wanted).clamp(1, len(self.levels) - 1)
        low, high = self.levels[above - 1], self.levels[above]
        return (above - 1 + ((wanted - low) / (high - low)).clamp(0, 1)).to(sigma.dtype)

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """The x_0 estimate (B, C, S, S)."""
        if self.classes and labels is None:
            raise UserError("this diffusers network is conditional and has no null class: labels are needed")
        level = per_row(sigma, noisy)
        shrink = (1 + level**2).rsqrt()  # sqrt(alpha)
        out = self.net(shrink * noisy, self.timestep(sigma), labels if self.classes else None, return_dict=False)[0][:, : self.channels]
        if self.prediction == "epsilon":
            answer: Tensor = noisy - level * out
        elif self.prediction == "v_prediction":
            answer = shrink * (shrink * noisy) - level * shrink * out
        else:
            answer = out
        return answer


def from_diffusers(folder: Path) -> Student:
    """The DDPM in a local folder: a pipeline (``unet/``, ``scheduler/``) or a bare model with ``scheduler_config.json`` beside it.

    Only ``config.json``, ``scheduler_config.json`` and ``diffusion_pytorch_model.safetensors`` are read; no code and no pickle.

    Raises:
        UserError: a file is missing or not what its name says, another class than ``UNet2DModel``, or weights that do not fit.
    """
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    beside = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    config, schedule = _read(unet / "config.json"), _read(beside / "scheduler_config.json")
    if config.get("_class_name") != "UNet2DModel":
        raise UserError(f"{unet / 'config.json'}: describes a {config.get('_class_name')}; only UNet2DModel is known")
    path = unet / "diffusion_pytorch_model.safetensors"
    # private entries (class, version, path) are about the file, not the network
    arguments = {
        "config": {k: v for k, v in config.items() if not k.startswith("_")},
        "schedule": {k: v for k, v in schedule.items() if not k.startswith("_")},
    }
    try:
        net = DiffusersDenoiser(**arguments)
        net.net.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a safetensors file ({_line(error)}); save the model with save_pretrained again") from error
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: its weights do not fit its configuration ({_line(error)}); download it again") from error
    net.architecture = Architecture(ARCHITECTURE, arguments)  # type: ignore[assignment]
    return Student.of(net)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable JSON file ({_line(error)}); name a folder that diffusers' save_pretrained wrote"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; name a folder that diffusers' save_pretrained wrote")
    return content


def _line(error: object) -> str:
    return " ".join(str(error).split())[:120]
