"""Durations as people write them."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.durations import parse_duration, show_duration
from runcomfy.domain.exceptions import ValueInvalid


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("1.5", 1.5),
        ("0", 0),
        ("90s", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        (" 2D ", 172_800),
        ("250ms", 0.25),
        ("1d2h3m4s5ms", 93_784.005),
        ("0.5h", 1800),
    ],
)
def test_what_people_write_is_understood(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    ["", " ", "soon", "-5", "1m1h", "1h1h", "5 minutes", "1e3", "nan", "inf", "٣", "1,5", "s", "9" * 5000, "99999d"],
)
def test_what_is_no_duration_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(ValueInvalid) as refused:
        parse_duration(text)
    assert "90s" in refused.value.hint
    assert len(refused.value.message) < 100


@given(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=36_500)))
def test_what_is_shown_reads_back_the_same(duration: timedelta) -> None:
    assert parse_duration(show_duration(duration)) == duration


@given(st.text())
def test_any_text_is_a_duration_or_refused(text: str) -> None:
    try:
        said = show_duration(parse_duration(text))
    except ValueInvalid as error:
        said = error.message
    assert said.isprintable()
    assert not said.startswith("-")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0s"), (5400, "1h30m"), (90, "1m30s"), (0.5, "0.5s"), (-10, "-10s"), (86_400, "1d")]
)
def test_durations_are_shown_as_people_write_them(seconds: float, shown: str) -> None:
    assert show_duration(timedelta(seconds=seconds)) == shown
