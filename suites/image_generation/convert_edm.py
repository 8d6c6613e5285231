"""A teacher for the paper settings as safetensors: ``python -m distillbench.suites.image_generation.convert_edm IN OUT.safetensors``.

IN is a published EDM checkpoint (``edm-cifar10-32x32-cond-vp.pkl``, ``edm-imagenet-64x64-cond-adm.pkl``, SiD's generators) or the
folder of a diffusers ``UNet2DModel`` (see :mod:`image_generation.diffusers_nets`).

EDM's pickles carry the source code of their classes and ask ``torch_utils.persistence`` to run it. Here nothing of that runs:
the unpickler knows a fixed list of names, each mapped to a function of this file that only keeps plain state, and refuses a file
with any other name. The network is then our own, rebuilt from the recorded arguments; names and shapes must agree exactly.
"""

from __future__ import annotations

import io
import pickle
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillbench.errors import UserError
from distillbench.files import write_atomic
from distillbench.identity import sha256
from distillbench.suites.image_generation.edm_nets import ARCHITECTURE, EDMDenoiser
from distillbench.training.nets import Architecture
from distillbench.training.student import AVERAGE, ONLY, Part, Student

# --- reading without running ------------------------------------------------------------------------------------


class _Refused(Exception):
    """Why a pickle is not read further."""


class _Kept:
    """Stands for an object of any allowed class: takes its arguments and does nothing; ``state`` is what its ``__dict__`` was."""

    def __new__(cls, *_: Any, **__: Any) -> _Kept:
        made = object.__new__(cls)
        made.name, made.state = "", {}
        return made

    name: str
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dict(dict[Any, Any]):
    """Stands for ``dnnlib.util.EasyDict``."""


def _reader() -> dict[str, Callable[..., Any]]:
    """Every name a pickle may refer to. Made anew for each file, so that a pickle cannot leave attributes on anything shared."""

    class Kept(_Kept):
        pass

    class Mapping(_Dict):
        pass

    def persistent(meta: Any) -> _Kept:
        if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
            raise _Refused("an object in it has no state")
        made = Kept()
        made.name, made.state = str(meta.get("class_name")), meta["state"]
        return made

    def storage(blob: Any) -> Any:
        # torch's own function would unpickle this inner file without any restriction.
        found = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        if not isinstance(found, torch.storage.TypedStorage):
            raise _Refused("a storage in it is none")
        return found

    def tensor(data: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        # as_strided checks its bounds; set_ with a size, as torch uses, would enlarge the storage instead.
        flat = torch.empty(0, dtype=data.dtype).set_(data)
        return torch.as_strided(flat, size, stride, offset)

    def parameter(data: Any, *_: Any) -> Any:
        return data

    def encode(text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise _Refused(f"bytes in encoding {encoding!r}")
        return text.encode("latin1")

    numpy = ("multiarray.scalar", "multiarray._reconstruct")  # numbers and arrays of the training options: never looked at
    return {
        "torch_utils.persistence._reconstruct_persistent_obj": persistent,
        "torch.storage._load_from_bytes": storage,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": parameter,
        "collections.OrderedDict": OrderedDict,
        "builtins.set": set,
        "__builtin__.set": set,  # as protocol 2 calls it
        "_codecs.encode": encode,
        "dnnlib.util.EasyDict": Mapping,
        **{f"torch.nn.modules.container.{name}": Kept for name in ("ModuleDict", "ModuleList", "Sequential")},
        **{f"numpy.{core}.{name}": Kept for core in ("core", "_core") for name in numpy},
        **{f"numpy.{name}": Kept for name in ("dtype", "ndarray")},
    }


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._known = _reader()

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._known:
            raise _Refused(f"its pickle refers to {module}.{name}")
        return self._known[f"{module}.{name}"]


def _load(source: Path) -> _Kept:
    """The network in the pickle: what is under ``ema``, or the pickle itself."""
    try:
        with source.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on storages
            content: Any = _Unpickler(stream).load()
    except _Refused as error:
        raise UserError(f"{source}: refused, {error}; only checkpoints as NVlabs/edm writes them are read") from error
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error}); name an EDM .pkl file") from error
    except Exception as error:  # a damaged pickle raises about anything
        text = " ".join(str(error).split())[:80]
        raise UserError(f"{source}: refused, damaged or not a pickle of EDM ({type(error).__name__}: {text}); download it again") from error
    if isinstance(content, dict):
        content = content.get("ema")
    if not isinstance(content, _Kept) or not isinstance(content.state, dict):
        raise UserError(f"{source}: refused, no network in it (looked under 'ema' and at the top); name a network snapshot of EDM")
    return content


def _tensors(node: _Kept, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a kept module."""
    passing = node.state.get("_non_persistent_buffers_set") or ()
    own = {**_part(node, "_parameters"), **{k: v for k, v in _part(node, "_buffers").items() if k not in passing}}
    found = {f"{prefix}{name}": value for name, value in own.items() if isinstance(value, Tensor)}
    for name, child in _part(node, "_modules").items():
        if isinstance(child, _Kept):
            found |= _tensors(child, f"{prefix}{name}.")
    return found


def _part(node: _Kept, name: str) -> dict[str, Any]:
    part = node.state.get(name) if isinstance(node.state, dict) else None
    if not isinstance(part, dict):
        raise _Refused(f"a module in it has no {name}")
    return part


# --- from their arguments to ours -------------------------------------------------------------------------------

_POSITIONS = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data", "model_type")
_SAME = ("img_resolution", "augment_dim", "model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions")
_RENAMED = {"img_channels": "channels", "label_dim": "classes", "embedding_type": "embedding"}
_SONG = ("embedding_type", "channel_mult_noise", "resample_filter")
# Neither changes what a trained network answers: precision, bounds that its forward pass does not read, training-time dropout.
_IGNORED = ("use_fp16", "sigma_min", "sigma_max", "dropout", "label_dropout")


def _arguments(node: _Kept) -> dict[str, Any]:
    """The arguments of our :class:`EDMDenoiser`. Raises _Refused for a network it cannot be."""
    if node.name != "EDMPrecond":
        raise _Refused(f"a {node.name or 'network without a name'} where only EDMPrecond is known")
    given = dict(zip(_POSITIONS, node.state.get("_init_args") or (), strict=False)) | _part(node, "_init_kwargs")
    kind = given.pop("model_type", "DhariwalUNet")
    if kind not in ("SongUNet", "DhariwalUNet"):
        raise _Refused(f"its network is {kind!r}, neither SongUNet nor DhariwalUNet")
    arguments: dict[str, Any] = {"network": "song" if kind == "SongUNet" else "dhariwal"}
    if kind == "SongUNet":
        arguments["channel_mult"] = [1, 2, 2, 2]  # their default
        encoder, decoder = given.pop("encoder_type", "standard"), given.pop("decoder_type", "standard")
        if encoder not in ("standard", "residual") or decoder != "standard":
            raise _Refused(f"its encoder is {encoder!r} and its decoder {decoder!r}; no published checkpoint has these")
        arguments["residual"] = encoder == "residual"
    for name, value in given.items():
        if name in _IGNORED:
            continue
        plain = isinstance(value, int | float | str) or (isinstance(value, list | tuple) and all(isinstance(v, int) for v in value))
        if name not in (*_SAME, *_RENAMED, "sigma_data", *(_SONG if kind == "SongUNet" else ())) or not plain:
            raise _Refused(f"its network has an argument {name!r} that {kind} is not known to have, or of an unknown kind")
        arguments[_RENAMED.get(name, name)] = list(value) if isinstance(value, tuple) else value
    return arguments


def _fit(faults: dict[str, list[str]]) -> None:
    found = [f"{len(keys)} {what} ({keys[0]})" for what, keys in faults.items() if keys]
    if found:
        raise _Refused(f"its weights do not fit the network its arguments describe: {'; '.join(found)}")


def from_edm(source: Path) -> Student:
    """The network of an EDM checkpoint: float32 weights and the arguments of :class:`edm_nets.EDMDenoiser`.

    EDM's ``dropout`` is left out, so that a trainable copy has none: it does not act in evaluation, and DMD2 distils without it.

    Raises:
        UserError: the file is not a checkpoint of EDM, refers to anything outside the list above, or holds weights that do not
            fit the network its arguments describe, or are not finite.
    """
    node = _load(source)
    try:
        arguments = _arguments(node)
        try:
            with torch.device("meta"):
                wanted = {k: v.shape for k, v in EDMDenoiser(**arguments).state_dict().items()}
        except (TypeError, LookupError, ValueError, RuntimeError, ArithmeticError) as error:
            raise _Refused(f"its arguments make no network ({' '.join(str(error).split())[:80]})") from error
        tensors = _tensors(node)
        # Shapes first: a hostile view repeats one number without end, and only a copy would show it.
        _fit(
            {
                "missing": [k for k in wanted if k not in tensors],
                "unknown": [k for k in tensors if k not in wanted],
                "of another shape": [k for k, v in tensors.items() if k in wanted and v.shape != wanted[k]],
            }
        )
        # clone: safetensors refuses tensors that share memory
        weights = {k: v.detach().float().clone().contiguous() for k, v in tensors.items()}
        _fit({"not finite": [k for k, v in weights.items() if not bool(torch.isfinite(v).all())]})
    except _Refused as error:
        raise UserError(f"{source}: refused, {error}; name a network snapshot that NVlabs/edm wrote") from error
    except RecursionError as error:
        raise UserError(f"{source}: refused, a module in it contains itself; name a network snapshot that NVlabs/edm wrote") from error
    return Student({ONLY: Part(Architecture(ARCHITECTURE, arguments), weights, "averaged", AVERAGE)})


def convert(source: Path, target: Path) -> str:
    """Write the network in ``source`` to ``target`` and return the SHA-256 of the new file. The same weights give the same bytes.

    Args:
        source: an EDM pickle, or a folder that diffusers wrote.  target: a ``.safetensors`` file; :meth:`Student.from_bytes` reads it.

    Raises:
        UserError: as :func:`from_edm` and :func:`diffusers_nets.from_diffusers`, or another suffix.
        SaveError: ``target`` cannot be written; what was there before stays.
    """
    from distillbench.suites.image_generation.diffusers_nets import from_diffusers

    if target.suffix != ".safetensors":
        raise UserError(f"{target}: the target must end in .safetensors")
    data = (from_diffusers(source) if source.is_dir() else from_edm(source)).to_bytes()
    write_atomic(target, data)
    return sha256(data)


def main(arguments: list[str]) -> int:
    """Run the converter; prints ``<sha256>  <target>``. Returns the exit code."""
    try:
        if len(arguments) != 2:
            raise UserError("usage: python -m distillbench.suites.image_generation.convert_edm IN.pkl OUT.safetensors")
        source, target = map(Path, arguments)
        print(f"{convert(source, target)}  {target}")
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
