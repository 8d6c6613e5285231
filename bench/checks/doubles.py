"""A world in float64: what is written for float32 computes in float64 while it lasts, methods and suites unchanged."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Doubles(TorchFunctionMode):
    """Whoever asks torch for float32 by name gets float64: ``.float()``, ``dtype=torch.float32``, ``.to(torch.float32)``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        elif func is Tensor.view or func is torch.frombuffer:  # they read bytes as what they are: the numbers are widened after
            return self._widened(func(*args, **(kwargs or {})), (*args[1:], *(kwargs or {}).values()))
        for a in args:  # a loop, because this is called for everything that torch does, and seldom finds anything
            if a is torch.float32:
                args = tuple(torch.float64 if x is torch.float32 else x for x in args)
                break
        if not kwargs:
            return func(*args)
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)

    @staticmethod
    def _widened(found: Tensor, asked: tuple[Any, ...]) -> Tensor:
        return found.double() if any(a is torch.float32 for a in asked) else found


@contextlib.contextmanager
def doubles(package: str) -> Iterator[None]:
    """float64 throughout, one thread, torch's global random numbers from seed 0; everything is as it was afterwards.

    Random numbers that are drawn without a type are drawn in float64 too, so the streams are other ones than a run's: what is
    computed here is compared with what was computed here, never with a record.

    Args:
        package: of the suites that are used inside: what their functions remember (``functools.cache``) has a type, and is forgotten
            before and after.
    """
    kind, threads = torch.get_default_dtype(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        _forget(package)
        try:
            with _Doubles():
                yield
        finally:
            _forget(package)
            torch.set_default_dtype(kind)
            torch.set_num_threads(threads)


def _forget(package: str) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package}."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear") and getattr(value, "__module__", None) == name:
                    value.cache_clear()
