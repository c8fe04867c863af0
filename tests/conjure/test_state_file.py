"""The state file among writers who know nothing of each other: whole for readers, no key lost, nothing thrown away."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.conjure.errors import StateUnreadable
from launcher.conjure.state_file import MAX_KEYS, REFUSED_KEYS, StateFile
from runcomfy.domain.exceptions import ValueInvalid


@pytest.fixture
def file(tmp_path: Path) -> StateFile:
    return StateFile(tmp_path / "data" / "input" / "state.json", pause_seconds=0.001)


def write(file: StateFile, text: str) -> None:
    file.path.parent.mkdir(parents=True, exist_ok=True)
    file.path.write_text(text, encoding="utf-8")


def test_there_need_be_no_file(file: StateFile) -> None:
    assert file.read() == {}
    assert file.update({"command": "fuse_mesh"}) == {"command": "fuse_mesh"}
    assert json.loads(file.path.read_text(encoding="utf-8")) == {"command": "fuse_mesh"}


def test_keys_of_others_are_kept_and_the_file_stays_readable_for_them(file: StateFile) -> None:
    write(file, '{"app_status": "running", "flux_prompt": "ñandú"}')
    file.path.chmod(0o664)
    file.update({"command": None})
    assert file.read() == {"app_status": "running", "flux_prompt": "ñandú", "command": None}
    if os.name != "nt":
        assert file.path.stat().st_mode & 0o777 == 0o664


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "[]", "null", "\0\0\0", '{"a": NaN'])
def test_what_cannot_be_read_ends_in_words_and_is_kept_when_it_is_replaced(file: StateFile, text: str) -> None:
    write(file, text)
    with pytest.raises(StateUnreadable, match="holds no JSON object"):
        file.read()
    assert file.path.read_text(encoding="utf-8") == text
    assert file.update({"command": "x"}) == {"command": "x"}
    (kept,) = file.path.parent.glob("state.json.unreadable-*")
    assert kept.read_text(encoding="utf-8") == text


def test_a_change_to_an_unreadable_file_is_made_to_what_was_last_read(file: StateFile) -> None:
    write(file, '{"app_status": "running"}')
    file.read()
    write(file, '{"app_sta')
    assert file.update({"command": "x"}) == {"app_status": "running", "command": "x"}


def test_a_half_written_file_is_waited_for(file: StateFile) -> None:
    write(file, '{"command": "spawn_')
    patient = StateFile(file.path, tries=400, pause_seconds=0.005)
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(patient.read()))
    reader.start()
    write(file, '{"command": "spawn_primitive"}')
    reader.join(timeout=30)
    assert found == [{"command": "spawn_primitive"}]


def together(*works: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)


def test_no_change_of_ours_is_lost_among_many_at_once(file: StateFile) -> None:
    def writer(number: int) -> Callable[[], None]:
        other = StateFile(file.path, pause_seconds=0.001)  # as another process has it

        def work() -> None:
            for round_ in range(20):
                other.update({f"key_{number}_{round_}": round_})

        return work

    together(*[writer(number) for number in range(4)])
    assert len(file.read()) == 80


@pytest.mark.parametrize("key", ["", "__proto__", "constructor", "a" * 201, "a\nb"])
def test_keys_that_are_no_plain_names_are_refused(file: StateFile, key: str) -> None:
    with pytest.raises(ValueInvalid):
        file.update({key: 1})
    assert not file.path.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"deep": object()}, "x" * (5 * 1024**2)])
def test_values_that_are_no_json_or_huge_are_refused(file: StateFile, value: Any) -> None:
    with pytest.raises(ValueInvalid):
        file.update({"command": value})


def test_the_file_cannot_be_made_to_grow_without_end(file: StateFile) -> None:
    file.update({f"key{number}": 1 for number in range(MAX_KEYS)})
    with pytest.raises(ValueInvalid):
        file.update({"one_more": 1})


@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=20).filter(
            lambda key: key not in REFUSED_KEYS
        ),
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5),
    )
)
def test_whatever_is_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    file = StateFile(tmp_path_factory.mktemp("state") / "state.json")
    file.update(state)
    assert StateFile(file.path).read() == state
