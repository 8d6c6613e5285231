"""Per-example values in few characters, without loss, and a record's text in few bytes.

Values become planes of characters, six bits each: like stands beside like, which is what a compressor wants, and the same values give
the same text on every machine. A letter first says how.

- ``b``: zeros and ones, six to a character.
- ``d``: decimals of at most seven digits, as :meth:`Measurement.mean` leaves them: a plane of the powers of ten, four of the digits as
  an integer, and one of the signs where there are any.
- ``f``: anything else, as float64.
"""

from __future__ import annotations

import base64
import functools
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", dtype=np.uint8)
NUMBERS = np.full(256, -1, dtype=np.int64)
NUMBERS[LETTERS] = np.arange(64)
WEIGHTS = np.array([32, 16, 8, 4, 2, 1])
LOWEST = -46  # power of ten of the last of seven digits
MAGIC = b"distillbench-record-2\n"
LIMIT = 1 << 28  # bytes that a record's text may have: none is larger, and a bomb is not unpacked


def pack(values: Sequence[float]) -> str:
    """``values`` as a text for :func:`unpack`, equal to the last bit."""
    array = np.asarray(values, dtype=np.float64)
    negative = np.signbit(array)
    if np.isin(array, (0.0, 1.0)).all() and not negative.any():
        bits = np.pad(array.astype(np.uint8), (0, -len(array) % 6)).reshape(-1, 6)
        return f"b{len(array)}:{_written(bits @ WEIGHTS)}"
    if np.isfinite(array).all():
        size = np.abs(array)
        power = np.floor(np.log10(np.where(size == 0, 1e6, size))).astype(np.int64) - 6
        if ((power >= LOWEST) & (power < LOWEST + 64)).all():
            digits = np.rint(size * 10.0 ** -power.astype(np.float64)).astype(np.int64)
            planes = [power - LOWEST, *(digits >> shift & 63 for shift in (18, 12, 6, 0)), *([negative] if negative.any() else [])]
            packed = f"d{len(array)}:{''.join(map(_written, planes))}"
            again = np.asarray(unpack(packed))
            if np.array_equal(again, array) and np.array_equal(np.signbit(again), negative):
                return packed
    return f"f{len(array)}:{base64.b64encode(array.astype('>f8').tobytes()).decode()}"


def average(text: str) -> tuple[float, float]:
    """The mean of packed values and that of their sizes, to 14 digits or so: much faster than unpacking them. Both are NaN of no values.

    Raises ValueError where ``text`` is no packed values.
    """
    count, body = int(text.partition(":")[0][1:]), text.partition(":")[2]
    if text[:1] == "d" and count > 0 and len(body) in (5 * count, 6 * count):
        power, *planes = _letters(body).reshape(-1, count)
        size = sum(plane << shift for plane, shift in zip(planes, (18, 12, 6, 0), strict=False)) * 10.0 ** (power + LOWEST)
        return float((size * (1 - 2 * planes[4])).mean() if len(planes) == 5 else size.mean()), float(size.mean())
    values = _bits(body, count) if text[:1] == "b" and count > 0 and len(body) == -(-count // 6) else np.asarray(unpack(text))
    with np.errstate(all="ignore"):  # what is not finite shows in the mean
        return (float(values.mean()), float(np.abs(values).mean())) if len(values) else (math.nan, math.nan)


@functools.lru_cache(maxsize=256)
def unpack(text: str) -> tuple[float, ...]:
    """The values that :func:`pack` was given. Raises ValueError where ``text`` is no packed values."""
    head, _, body = text.partition(":")
    kind, count = head[:1], int(head[1:])
    if count < 0:
        raise ValueError("packed values that are fewer than none")
    if kind == "f":
        data = np.frombuffer(base64.b64decode(body, validate=True), dtype=">f8")
        if len(data) == count:
            return tuple(data.astype(float).tolist())
    elif kind == "b" and len(body) == -(-count // 6):
        return tuple(_bits(body, count).astype(float).tolist())
    elif kind == "d" and len(body) in (5 * count, 6 * count):
        power, *planes = _letters(body).reshape(-1, count)
        digits = sum(plane << shift for plane, shift in zip(planes, (18, 12, 6, 0), strict=False))
        signs = planes[4] if len(planes) == 5 else np.zeros(count, dtype=np.int64)
        # read as a decimal: a product with a power of ten is off in the last bit
        parts = zip(signs.tolist(), np.asarray(digits).tolist(), (power + LOWEST).tolist(), strict=True)
        return tuple(float(f"{'-' * s}{d}e{e}") for s, d, e in parts)
    raise ValueError("packed values of another length than they say")


def _written(plane: np.ndarray) -> str:
    return LETTERS[plane.astype(np.int64)].tobytes().decode("ascii")


def _bits(body: str, count: int) -> np.ndarray:
    planes: np.ndarray = _letters(body)[:, None] & WEIGHTS > 0
    return planes.ravel()[:count]


def _letters(text: str) -> np.ndarray:
    numbers = NUMBERS[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]
    if (numbers < 0).any():
        raise ValueError("a character that packed values do not have")
    return numbers


def sound(text: str) -> bool:
    """Whether ``text`` is packed values, as far as its form says: cheaper than unpacking it."""
    head, colon, body = text.partition(":")
    if not colon or not re.fullmatch("[bdf][0-9]{1,9}", head):
        return False
    count = int(head[1:])
    lengths = {"b": (-(-count // 6),), "d": (5 * count, 6 * count), "f": (4 * -(-8 * count // 3),)}[head[0]]
    return len(body) in lengths and re.fullmatch("[A-Za-z0-9+/]*={0,2}", body) is not None


def is_binary(text: str) -> bool:
    """Whether packed values are zeros and ones, without unpacking them."""
    return text.startswith("b")


@functools.cache
def _words() -> bytes:
    """What most records share, from the cards of the first suites: zlib's preset dictionary, which lies there before the text begins.

    Frozen with the schema: what was packed with it cannot be read with another one.
    """
    return (Path(__file__).parent / "words.txt").read_bytes()


def squeeze(text: bytes) -> bytes:
    """A record's JSON as the bytes of its file."""
    # small blocks: each has a code of its own, and planes of characters are unlike each other and unlike JSON
    packer = zlib.compressobj(9, memLevel=5, zdict=_words())
    return MAGIC + packer.compress(text) + packer.flush()


def open_up(data: bytes) -> bytes:
    """The JSON in the bytes of a record's file. Raises ValueError where they are cut off, damaged, or larger than any record."""
    unpacker = zlib.decompressobj(zdict=_words())
    try:
        text = unpacker.decompress(data.removeprefix(MAGIC), LIMIT)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("cut off, or longer than it says")
    return text
