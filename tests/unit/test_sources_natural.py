from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from embstore.sources import natural_key

names = st.text(st.sampled_from("aAbB01239 ._-ßé٣"), max_size=8) | st.text(max_size=12)


def natural(*given: str) -> list[str]:
    shuffled = list(given)
    random.Random(3).shuffle(shuffled)
    return sorted(shuffled, key=natural_key)


def test_numbers_compare_as_numbers() -> None:
    assert natural("file10", "file2", "file1") == ["file1", "file2", "file10"]
    assert natural("s2e10", "s10e1", "s2e9") == ["s2e9", "s2e10", "s10e1"]
    assert natural("a.wav", "a2.wav", "a10.wav") == ["a.wav", "a2.wav", "a10.wav"]


def test_case_does_not_matter_until_nothing_else_differs() -> None:
    assert natural("b", "A", "a", "C") == ["A", "a", "b", "C"]


def test_leading_zeros_are_a_tie_that_the_text_decides() -> None:
    assert natural("a1", "a01", "a001", "a2") == ["a001", "a01", "a1", "a2"]
    assert natural("x0", "x00", "x1") == ["x0", "x00", "x1"]


@given(st.integers(0, 10**30), st.integers(0, 10**30), names)
def test_any_two_numbers_compare_by_value(one: int, other: int, rest: str) -> None:
    assert (natural_key(f"x{one}-{rest}") < natural_key(f"x{other}-{rest}")) == (one < other)


@given(st.lists(names, unique=True, max_size=20), st.randoms(use_true_random=False))
def test_the_order_is_total_and_does_not_depend_on_how_the_names_come(given: list[str], chance: random.Random) -> None:
    first = sorted(given, key=natural_key)
    chance.shuffle(given)
    assert sorted(given, key=natural_key) == first
    keys = [natural_key(name) for name in first]
    assert all(before < after for before, after in pairwise(keys))


def test_a_number_of_any_length_is_no_error() -> None:
    assert natural_key("1" * 5000) > natural_key("9" * 4999)
