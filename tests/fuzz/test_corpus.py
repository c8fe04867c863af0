"""Every input that ever showed something is run again: it must do no harm any more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.fuzzing import running
from benchmarks.fuzzing.all_targets import CORPUS, TARGETS, kept
from benchmarks.fuzzing.target import limited


@pytest.fixture(autouse=True, scope="module")
def _loop_closed() -> Iterator[None]:
    yield
    running.close()


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_once_does_no_harm(name: str) -> None:
    for title, data in kept(TARGETS[name]):
        try:
            with limited():
                TARGETS[name].run(data)
        except BaseException as error:
            error.add_note(f"tests/fuzz/corpus/{name}/{title}")
            raise


def test_every_folder_of_the_corpus_has_its_target() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} <= TARGETS.keys()


def test_the_corpus_stays_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 1_000_000
