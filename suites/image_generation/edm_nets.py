"""EDM's two U-Nets with its preconditioning, written anew: DDPM++ / NCSN++ (CIFAR-10) and ADM (ImageNet 64x64).

Structure, initial distributions, parameter names and shapes are those of ``training/networks.py`` in NVlabs/edm@008a4e5
(Karras et al. 2022, arXiv 2206.00364), so that the weights of a published checkpoint load after
:mod:`image_generation.convert_edm`. ``tests/goldens/edm_nets.json`` holds numbers that the authors' code gave.

Nothing works in place and attention is a plain softmax, so forward hooks keep what a module returned and ``torch.func.jvp``
(forward-mode differentiation) passes through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, dropout, one_hot, silu

from distillbench.problems.image_generation.edm import consistency_scalings, edm_scalings, per_row

Resample = Literal["up", "down"]
Rule = Literal["xavier", "kaiming"]


# --- parts ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _initialise(weight: Tensor, bias: Tensor | None, rule: Rule, gain: float = 1.0) -> None:
    """``xavier``: U(-b, b), b = sqrt(6 / (fan_in + fan_out)), bias 0.   ``kaiming``: weight and bias U(-b, b), b = 1 / sqrt(fan_in)."""
    area = math.prod(weight.shape[2:])
    fan_in, fan_out = weight.shape[1] * area, weight.shape[0] * area
    bound = gain * (math.sqrt(6 / (fan_in + fan_out)) if rule == "xavier" else 1 / math.sqrt(fan_in))
    weight.uniform_(-bound, bound)
    if bias is not None:
        bias.uniform_(-bound, bound) if rule == "kaiming" else bias.zero_()


class _Conv(nn.Module):
    """A convolution of odd ``kernel`` that keeps the side, behind a resampling by 2 with a separable filter; kernel 0 only resamples.

    ``late`` is NCSN++'s order in its residual path: the convolution first, on a border as wide as both need, then the filter.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        rule: Rule,
        *,
        gain: float = 1.0,
        resample: Resample | None = None,
        taps: Sequence[int] = (1, 1),
        late: bool = False,
    ) -> None:
        super().__init__()
        self.kernel, self.resample, self.late = kernel, resample, late
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.empty(outputs)) if kernel else None
        if self.weight is not None:
            _initialise(self.weight, self.bias, rule, gain)
        row = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("resample_filter", (torch.outer(row, row) / row.sum() ** 2)[None, None] if resample else None)

    def _filtered(self, x: Tensor, border: int) -> Tensor:
        assert self.resample_filter is not None
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        if self.resample == "up":
            return conv_transpose2d(x, 4 * taps, stride=2, padding=border, groups=channels)
        return conv2d(x, taps, stride=2, padding=border, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        border = 0 if self.resample_filter is None else (self.resample_filter.shape[-1] - 1) // 2
        if self.late:
            return self._filtered(conv2d(x, self._weight, self.bias, padding=self.kernel // 2 + border), 0)
        if self.resample is not None:
            x = self._filtered(x, border)
        return x if self.weight is None else conv2d(x, self.weight, self.bias, padding=self.kernel // 2)

    @property
    def _weight(self) -> Tensor:
        assert self.weight is not None
        return self.weight


def _linear(inputs: int, outputs: int, rule: Rule, *, gain: float = 1.0, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    _initialise(layer.weight, layer.bias if bias else None, rule, gain)
    return layer


def _norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


@dataclass(frozen=True)
class _Style:
    """In what the blocks of the two families differ.

    Attributes:
        embedding: width of the condition.  head_width: channels a head, None for one head.
        eps: of the norms.  scale: of every residual sum.  zero, attention: gains of the last and of the query-key-value layers.
        adaptive: the condition scales and shifts the second norm's output; otherwise it is added to its input.
        project: a resampled shortcut passes a 1x1 convolution even where the number of channels stays.
    """

    embedding: int
    rule: Rule
    head_width: int | None
    eps: float
    scale: float
    zero: float
    attention: float
    adaptive: bool
    project: bool
    taps: tuple[int, ...]
    dropout: float


class _Block(nn.Module):
    """Residual block with a condition, optional resampling by 2 and optional self-attention."""

    def __init__(self, inputs: int, outputs: int, style: _Style, resample: Resample | None = None, attention: bool = False) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.style = inputs, outputs, style
        # ADM has as many heads as fit, which is none at all below head_width channels, and then no attention.
        self.heads = 0 if not attention else 1 if style.head_width is None else outputs // style.head_width
        resampling: dict[str, Any] = {"resample": resample, "taps": style.taps}
        self.norm0 = _norm(inputs, style.eps)
        self.conv0 = _Conv(inputs, outputs, 3, style.rule, **resampling)
        self.affine = _linear(style.embedding, outputs * (2 if style.adaptive else 1), style.rule)
        self.norm1 = _norm(outputs, style.eps)
        self.conv1 = _Conv(outputs, outputs, 3, style.rule, gain=style.zero)
        self.skip: _Conv | None = None
        if inputs != outputs or resample:
            kernel = 1 if style.project or inputs != outputs else 0
            self.skip = _Conv(inputs, outputs, kernel, style.rule, **resampling)
        if self.heads:
            self.norm2 = _norm(outputs, style.eps)
            self.qkv = _Conv(outputs, 3 * outputs, 1, style.rule, gain=style.attention)
            self.proj = _Conv(outputs, outputs, 1, style.rule, gain=style.zero)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        style = self.style
        shortcut = x if self.skip is None else self.skip(x)
        hidden: Tensor = self.conv0(silu(self.norm0(x)))
        change = self.affine(condition)[:, :, None, None].to(hidden.dtype)
        if style.adaptive:
            scale, shift = change.chunk(2, dim=1)
            hidden = silu(self.norm1(hidden) * (scale + 1) + shift)
        else:
            hidden = silu(self.norm1(hidden + change))
        hidden = self.conv1(dropout(hidden, style.dropout, self.training))
        hidden = (hidden + shortcut) * style.scale
        if self.heads:
            hidden = (hidden + self.proj(self._attend(self.qkv(self.norm2(hidden))).view_as(hidden))) * style.scale
        return hidden

    def _attend(self, packed: Tensor) -> Tensor:
        """Softmax attention over positions.   (B, 3C, H, W), per head and channel query, key, value in turn -> (B heads, C / heads, HW)."""
        width = self.out_channels // self.heads
        query, key, value = packed.reshape(len(packed) * self.heads, width, 3, -1).unbind(2)
        weight = torch.softmax(query.transpose(1, 2) @ (key / math.sqrt(width)), dim=2)
        return value @ weight.transpose(1, 2)


class _Positions(nn.Module):
    """cos and sin of c f_i with f_i = 10000^(-i / n), i < channels / 2; ``endpoint`` makes the last exponent 1.   (B,) -> (B, channels)."""

    def __init__(self, channels: int, endpoint: bool) -> None:
        super().__init__()
        self.count = channels // 2
        self.last = self.count - endpoint

    def forward(self, noise: Tensor) -> Tensor:
        place = torch.arange(self.count, dtype=noise.dtype, device=noise.device) / self.last
        angle = torch.outer(noise, 1e-4**place)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class _Fourier(nn.Module):
    """cos and sin of 2 pi c f_i with fixed f_i drawn from N(0, 16^2).   (B,) -> (B, channels)."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, noise: Tensor) -> Tensor:
        angle = torch.outer(noise, (2 * math.pi * self.freqs).to(noise.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


# --- networks ---------------------------------------------------------------------------------------------------


class _UNet(nn.Module):
    """What both families share: blocks by resolution, and every encoder output joined to a decoder block."""

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    bottlenecks: tuple[str, ...]

    def _build(
        self,
        resolution: int,
        inputs: int,
        outer: _Conv,
        widths: list[int],
        blocks: int,
        attention: set[int],
        last_only: bool,
        style: _Style,
    ) -> None:
        """Fill ``enc`` and ``dec``; ``last_only``: the decoder attends in the last block of a resolution only."""
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        channels, kept = inputs, [inputs]
        sides = [resolution >> level for level in range(len(widths))]
        for side, width in zip(sides, widths, strict=True):
            if side == resolution:
                self.enc[f"{side}x{side}_conv"] = outer
            else:
                self.enc[f"{side}x{side}_down"] = _Block(channels, channels, style, resample="down")
                self._beside_down(side, channels)
                kept.append(channels)
            for i in range(blocks):
                self.enc[f"{side}x{side}_block{i}"] = _Block(channels, width, style, attention=side in attention)
                channels = width
                kept.append(channels)
        for side, width in zip(reversed(sides), reversed(widths), strict=True):
            if side == sides[-1]:
                self.dec[f"{side}x{side}_in0"] = _Block(channels, channels, style, attention=True)
                self.dec[f"{side}x{side}_in1"] = _Block(channels, channels, style)
            else:
                self.dec[f"{side}x{side}_up"] = _Block(channels, channels, style, resample="up")
            for i in range(blocks + 1):
                attend = side in attention and (i == blocks or not last_only)
                self.dec[f"{side}x{side}_block{i}"] = _Block(channels + kept.pop(), width, style, attention=attend)
                channels = width
        self.bottlenecks = tuple(f"enc.{side}x{side}_block{blocks - 1}" for side in sides)

    def _beside_down(self, side: int, channels: int) -> None:
        """A path of its own beside the encoder, where a family has one."""

    def _decode(self, x: Tensor, kept: list[Tensor], condition: Tensor) -> Tensor:
        for block in self.dec.values():
            if isinstance(block, _Block):
                x = block(torch.cat([x, kept.pop()], dim=1) if x.shape[1] != block.in_channels else x, condition)
        return x


class SongUNet(_UNet):
    """DDPM++ (``embedding="positional"``, ``residual=False``) and NCSN++ (``"fourier"``, True) of Song et al. 2021 as EDM uses them.

    ``forward``: x (B, C, S, S), noise (B,), onehot (B, classes) or None -> (B, C, S, S). Augmentation labels are always zero,
    so their layer, present for a checkpoint's sake, adds nothing.
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        channels: int,
        classes: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.0,
        embedding: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        residual: bool = False,
        resample_filter: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        width, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        taps = tuple(resample_filter)
        self._taps, self._residual, self._aux = taps, residual, channels
        self.map_noise = _Positions(noise, endpoint=True) if embedding == "positional" else _Fourier(noise)
        self.map_label = _linear(classes, noise, "xavier") if classes else None
        self.map_augment = _linear(augment_dim, noise, "xavier", bias=False) if augment_dim else None
        self.map_layer0 = _linear(noise, width, "xavier")
        self.map_layer1 = _linear(width, width, "xavier")
        half, last = math.sqrt(0.5), model_channels * channel_mult[0]
        style = _Style(width, "xavier", None, 1e-6, half, 1e-5, math.sqrt(0.2), False, True, taps, dropout)
        outer = _Conv(channels, model_channels, 3, "xavier")
        widths = [model_channels * m for m in channel_mult]
        self._build(img_resolution, model_channels, outer, widths, num_blocks, set(attn_resolutions), True, style)
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = _norm(last, 1e-6)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = _Conv(last, channels, 3, "xavier", gain=1e-5)

    def _beside_down(self, side: int, channels: int) -> None:
        if self._residual:
            path = _Conv(self._aux, channels, 3, "xavier", resample="down", taps=self._taps, late=True)
            self.enc[f"{side}x{side}_aux_residual"] = path
            self._aux = channels

    def forward(self, x: Tensor, noise: Tensor, onehot: Tensor | None) -> Tensor:
        """The raw output F (B, C, S, S)."""
        cosine, sine = self.map_noise(noise).chunk(2, dim=1)
        condition = torch.cat([sine, cosine], dim=1)  # this family embeds sines first
        if self.map_label is not None and onehot is not None:
            condition = condition + self.map_label(onehot * math.sqrt(self.map_label.in_features))
        condition = silu(self.map_layer1(silu(self.map_layer0(condition))))
        kept: list[Tensor] = []
        beside = x
        for name, block in self.enc.items():
            if name.endswith("aux_residual"):
                x = beside = kept[-1] = (x + block(beside)) * math.sqrt(0.5)
            else:
                x = block(x, condition) if isinstance(block, _Block) else block(x)
                kept.append(x)
        x = self._decode(x, kept, condition)
        norm, conv = list(self.dec.values())[-2:]
        answer: Tensor = conv(silu(norm(x)))
        return answer


class DhariwalUNet(_UNet):
    """ADM of Dhariwal and Nichol 2021 as EDM uses it. ``forward`` as :class:`SongUNet`'s; heads of 64 channels."""

    def __init__(
        self,
        *,
        img_resolution: int,
        channels: int,
        classes: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = model_channels * channel_mult_emb
        self.map_noise = _Positions(model_channels, endpoint=False)
        self.map_augment = _linear(augment_dim, model_channels, "kaiming", gain=0.0, bias=False) if augment_dim else None
        self.map_layer0 = _linear(model_channels, width, "kaiming")
        self.map_layer1 = _linear(width, width, "kaiming")
        self.map_label = nn.Linear(classes, width, bias=False) if classes else None
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)
        widths = [model_channels * m for m in channel_mult]
        style = _Style(width, "kaiming", 64, 1e-5, 1.0, 0.0, 1.0, True, False, (1, 1), dropout)
        outer = _Conv(channels, widths[0], 3, "kaiming")
        self._build(img_resolution, widths[0], outer, widths, num_blocks, set(attn_resolutions), False, style)
        self.out_norm = _norm(widths[0], 1e-5)
        self.out_conv = _Conv(widths[0], channels, 3, "kaiming", gain=0.0)

    def forward(self, x: Tensor, noise: Tensor, onehot: Tensor | None) -> Tensor:
        """The raw output F (B, C, S, S)."""
        condition = self.map_layer1(silu(self.map_layer0(self.map_noise(noise))))
        if self.map_label is not None and onehot is not None:
            condition = condition + self.map_label(onehot)
        condition = silu(condition)
        kept: list[Tensor] = []
        for block in self.enc.values():
            x = block(x, condition) if isinstance(block, _Block) else block(x)
            kept.append(x)
        answer: Tensor = self.out_conv(silu(self.out_norm(self._decode(x, kept, condition))))
        return answer


ARCHITECTURE = "edm-unet"
"""The name of :class:`EDMDenoiser` in a :class:`nets.Architecture`."""

NETWORKS: dict[str, type[SongUNet] | type[DhariwalUNet]] = {"song": SongUNet, "dhariwal": DhariwalUNet}
"""What :class:`EDMDenoiser` can wrap."""


class EDMDenoiser(nn.Module):
    """A U-Net under EDM's preconditioning, or under the consistency boundary f(x, sigma_min) = x.

    ``forward``: noisy (B, C, S, S), sigma (B,), labels (B,) int64 or None -> x_0 estimate (B, C, S, S). Without labels the class
    is EDM's null condition, a zero instead of a one-hot vector. Images are in [-1, 1].

    Attributes:
        shape: of one image, (C, S, S).
        stage_names: the last encoder block of each resolution; the last of them is the bottleneck that DMD2's discriminator reads.

    Args:
        network: ``song`` or ``dhariwal``.  img_resolution: S.  channels: C.  classes: 0 for an unconditional network.
        boundary, sigma_min: :func:`edm.consistency_scalings` replace EDM's. The weights are the same either way.
        arguments: the network's own: ``model_channels``, ``channel_mult``, ``augment_dim``, ``dropout``, ...

    Raises:
        KeyError: an unknown network.  TypeError: an argument that it does not have.
    """

    stage_names: tuple[str, ...]

    def __init__(
        self,
        network: str,
        img_resolution: int,
        channels: int,
        classes: int = 0,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        boundary: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.shape = (channels, img_resolution, img_resolution)
        self.classes, self.sigma_data, self.sigma_min, self.boundary = classes, sigma_data, sigma_min, boundary
        self.model = NETWORKS[network](img_resolution=img_resolution, channels=channels, classes=classes, **arguments)
        self.stage_names = tuple(f"model.{name}" for name in self.model.bottlenecks)

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """The x_0 estimate (B, C, S, S)."""
        if self.boundary:
            c_skip, c_out, c_in, c_noise = consistency_scalings(sigma, sigma_data=self.sigma_data, sigma_min=self.sigma_min)
        else:
            c_skip, c_out, c_in, c_noise = edm_scalings(sigma, sigma_data=self.sigma_data)
        onehot = None
        if self.classes:
            onehot = noisy.new_zeros(len(noisy), self.classes) if labels is None else one_hot(labels, self.classes).to(noisy.dtype)
        raw = self.model(per_row(c_in, noisy) * noisy, c_noise, onehot)
        answer: Tensor = per_row(c_skip, noisy) * noisy + per_row(c_out, noisy) * raw
        return answer
