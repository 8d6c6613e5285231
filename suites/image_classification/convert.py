"""Published ``.pth`` checkpoint -> safetensors: ``python -m distillbench.suites.image_classification.convert IN.pth OUT.safetensors``.

The pickle is read by torch's restricted unpickler (``weights_only=True``), which runs none of its code; whatever that refuses is refused.
"""

from __future__ import annotations

import pickle
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from distillbench.errors import UserError
from distillbench.files import write_atomic
from distillbench.identity import sha256


def convert(source: Path, target: Path) -> str:
    """Write the state dict in ``source`` to ``target`` and return the SHA-256 of the new file.

    Takes the dict under ``model`` or ``state_dict``, or the file's own dict, and strips the ``module.`` of DataParallel. The same
    tensors give the same bytes.

    Raises:
        UserError: ``source`` cannot be read as plain tensors, or ``target`` has another suffix than ``.safetensors``.
        SaveError: ``target`` cannot be written; what was there before stays.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: the target must end in .safetensors")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on foreign pickles before it refuses them; one line is enough
            content: Any = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error}); name a .pth file") from error
    except Exception as error:  # a damaged archive raises about anything
        raise UserError(f"{source}: refused, {_why(error)}; if you trust it, save its tensors alone and convert those") from error
    if isinstance(content, dict):
        content = next((content[k] for k in ("model", "state_dict") if isinstance(content.get(k), dict)), content)
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UserError(f"{source}: refused, no dict of tensors in it (looked under 'model', 'state_dict' and at the top)")
    tensors: dict[str, torch.Tensor] = {}
    for key, value in content.items():
        name = str(key).removeprefix("module.")
        if name in tensors:
            raise UserError(f"{source}: refused, two entries are called {name!r} without 'module.'")
        tensors[name] = value.detach().clone().contiguous()  # safetensors refuses tensors that share memory
    data = save(tensors)
    write_atomic(target, data)
    return sha256(data)


def _why(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        name = re.search(r"GLOBAL (\S+)", str(error))
        return f"its pickle refers to {name[1]}" if name else "not a pickle of plain tensors"
    return f"damaged or not a torch file ({type(error).__name__}: {' '.join(str(error).split())[:80]})"


def main(arguments: list[str]) -> int:
    """Run the converter; prints ``<sha256>  <target>``. Returns the exit code."""
    try:
        if len(arguments) != 2:
            raise UserError("usage: python -m distillbench.suites.image_classification.convert IN.pth OUT.safetensors")
        source, target = map(Path, arguments)
        print(f"{convert(source, target)}  {target}")
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
