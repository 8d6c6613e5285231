"""Packed values are the values, to the last bit, in few characters."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distillbench.runs.packing import average, is_binary, open_up, pack, sound, squeeze, unpack


def bits(values):
    return [struct.pack(">d", v) for v in values]


seven = st.floats(allow_nan=False, allow_infinity=False).map(lambda v: float(f"{v:.7g}"))


@given(st.lists(st.one_of(seven, st.floats(), st.sampled_from([0.0, -0.0, 1.0, 5e-324, 1.7976931348623157e308])), max_size=40))
def test_any_values_come_back_to_the_last_bit(values):
    again = unpack(pack(values))
    assert sound(pack(values))
    assert all(math.isnan(a) == math.isnan(b) for a, b in zip(again, values, strict=True))
    assert bits(v for v in again if not math.isnan(v)) == bits(v for v in values if not math.isnan(v))


@given(st.lists(st.floats(min_value=1e-30, max_value=1e10).map(lambda v: float(f"{v:.7g}")), min_size=1, max_size=40))
def test_seven_digits_take_five_characters_each(values):
    if set(values) != {1.0}:
        assert pack(values)[0] == "d" and len(pack(values)) <= 5 * len(values) + 6


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 400])
def test_zeros_and_ones_take_a_sixth_of_a_character(count):
    values = [float(i % 3 == 0) for i in range(count)]
    packed = pack(values)
    assert is_binary(packed) and list(unpack(packed)) == values
    assert len(packed) == len(f"b{count}:") + -(-count // 6)
    assert not is_binary(pack([0.5, 1.0]))


@pytest.mark.parametrize("bad", ["", "b", "b6:", "b6:AA", "d2:AAAA", "f1:AAAA", "x1:A", "d1:A*AAA", "b-1:", "d1:ÄAAAA"])
def test_what_is_not_packed_is_an_error(bad):
    with pytest.raises(ValueError):
        unpack(bad)
    assert not sound(bad)


@pytest.mark.parametrize(
    "values", [[1.0, 0.0, 0.0], [0.25, -3.5e-7, 12345.67], [1.5, 2.5], [math.pi, -1e-300], [-0.0, 0.0], [1e9], [0.1] * 1000]
)
def test_an_average_is_that_of_the_values(values):
    mean, size = average(pack(values))
    assert mean == pytest.approx(math.fsum(values) / len(values), rel=1e-13, abs=1e-300)
    assert size == pytest.approx(math.fsum(map(abs, values)) / len(values), rel=1e-13)


def test_what_has_no_average_has_none():
    assert all(map(math.isnan, average(pack([])))) and math.isnan(average(pack([math.inf, -math.inf]))[0])
    with pytest.raises(ValueError):
        average("d2:AAAA")


def test_a_records_text_survives_and_is_not_followed_by_anything():
    text = '{"a": "ä", "b": 1}'.encode()
    assert open_up(squeeze(text)) == text
    for bad in (squeeze(text) + b"x", squeeze(text)[:-1], b"", squeeze(text)[:30]):
        with pytest.raises(ValueError):
            open_up(bad)


def test_the_dictionary_is_frozen():
    """Every record of schema 2 is unreadable with another one."""
    import hashlib
    from pathlib import Path

    import distillbench.runs.packing as packing

    words = (Path(packing.__file__).parent / "words.txt").read_bytes()
    assert hashlib.sha256(words).hexdigest() == "b0320dfc1ea5ddbed9b63fdb72ab65b0a661c5e66e0009edce5fea65608deb63"
