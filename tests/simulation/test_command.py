"""`comfyctl simulate` as it is typed: what it prints, what it refuses, and how it exits."""

from __future__ import annotations

import pytest

from runcomfy.cli.main import main


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Return the exit code, what was printed, and what was told."""
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code, *capsys.readouterr()


def test_a_day_that_is_green_is_told_in_a_line_and_its_events_are_printed_if_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, told = typed(capsys, "--seed", "3", "--hours", "6", "--trace")
    assert code == 0
    assert "service-1 is started" in out
    assert told.startswith("seed 3, 6 h: ")
    assert "0 promises not kept" in told


def test_a_promise_that_is_broken_on_purpose_is_named_with_its_story_and_the_command_that_shows_it_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = typed(capsys, "--seed", "3", "--hours", "2", "--break", "i17")
    assert code == 1
    assert out.startswith("seed 3: I17 is broken: ")
    assert "the story of job-" in out
    assert "comfyctl simulate --seed 3 --hours 2 --break I17 --trace" in out


def test_the_story_of_one_job_is_all_that_is_printed_of_the_day_beside_what_was_broken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = typed(capsys, "--seed", "3", "--hours", "2", "--break", "i17", "--story", "job-1")
    assert code == 1
    lines = out.splitlines()
    assert any("job-1: done in" in line for line in lines)
    assert [line.partition(":")[0] for line in lines[-2:]] == ["I17", "I17"]
    assert "job-2" not in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--seed", "-1"), "--seed"),
        (("--seed", "1", "--break", "I99"), "one of I1, "),
        (("--seed", "1", "--hours", "2"), "at least 6"),
        (("--seed", "1", "--hours", "nan"), "--hours"),
    ],
)
def test_what_is_no_day_is_refused_before_it_begins(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    code, out, told = typed(capsys, *words)
    assert code == 2
    assert says in told
    assert out == ""
