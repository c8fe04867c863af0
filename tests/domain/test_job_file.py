"""Which field is to blame for what was found out later, and how many mistakes become one sentence."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.exceptions import (
    BadInput,
    InputFileMissing,
    JobFileInvalid,
    NameTaken,
    TargetUnknown,
    ValueInvalid,
    WorkflowInvalid,
)
from runcomfy.domain.job_file import blamed
from runcomfy.domain.marked import Branch, Entry, Leaf, Problem, joined, plain

INPUTS = {"seed": 1, "31_seed": 2, "image": "@/pictures/in.png", "p": "x"}
LINES = {
    "workflow_id": 2,
    "inputs": 3,
    "inputs.seed": 4,
    "inputs.31_seed": 5,
    "inputs.image": 6,
    "inputs.p": 7,
    "outputs.file_path": 9,
}


@pytest.mark.parametrize(
    ("error", "line", "field"),
    [
        (TargetUnknown("no input called it", details={"name": "seed"}), 4, "inputs.seed"),
        (ValueInvalid("31_seed = -1 is outside 0 to 9"), 5, "inputs.31_seed"),
        (ValueInvalid("'seed' is -1"), 4, "inputs.seed"),
        (InputFileMissing("the input file /pictures/in.png cannot be read"), 6, "inputs.image"),
        (ValueInvalid("required inputs are missing: steps", details={"missing": ["steps"]}), 3, "inputs"),
        (ValueInvalid("outside", details={"field": "outputs.file_path"}), 9, "outputs.file_path"),
        (NameTaken("job a already writes to /x/seed.png"), 9, "outputs.file_path"),
        (WorkflowInvalid("the graph has a cycle"), 2, "workflow_id"),
        (BadInput("something else, in steps and seeds"), 3, "inputs"),
    ],
)
def test_the_line_of_the_field_that_is_to_blame(error: BadInput, line: int, field: str) -> None:
    told = blamed(error, LINES, file_name="x.yaml", inputs=INPUTS)
    assert told.message == f"x.yaml, line {line}, {field}: {error.message}"
    assert (told.details["line"], told.details["field"], told.details["cause"]) == (line, field, error.code)


def test_what_was_told_with_a_line_is_not_told_again() -> None:
    error = JobFileInvalid("x.yaml, line 1: …")
    assert blamed(error, {}, file_name="x.yaml", inputs={}) is error


def test_of_very_many_mistakes_the_first_are_told_and_the_others_counted() -> None:
    problems = [Problem(number, "a", "wrong", "mend it") for number in range(1, 9)]
    words, hint = joined(problems)
    assert words.endswith("line 5, a: wrong; and 3 more")
    assert hint == "mend it"


@given(st.text(max_size=70) | st.floats().map(str) | st.integers().map(str))
def test_every_bare_word_is_a_value_of_json_or_a_problem(text: str) -> None:
    problems: list[Problem] = []
    value = plain(Branch(1, (Entry(1, "a", Leaf(1, text)),)), "", problems)["a"]
    assert value is None or isinstance(value, (str, int, float))
    assert not isinstance(value, float) or math.isfinite(value)
    assert [problem.field for problem in problems] in ([], ["a"])
