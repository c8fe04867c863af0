"""The settings of the API server and the generation services: known, shown, checked, and typos caught."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from launcher.conjure import hugging_face, modes
from launcher.conjure.services import MODES
from runcomfy.adapters.config import describe_settings, load_settings
from runcomfy.adapters.log import configure_logging, redact
from runcomfy.bootstrap import serves
from runcomfy.cli.main import comfyctl
from runcomfy.domain.exceptions import SettingInvalid
from runcomfy.domain.settings import GENERATION_MODES, LOCAL_BACKENDS

GIVEN = {
    "RUNCOMFY_SERVE": ("Queue", "queue"),
    "CONJURE_GENERATION_MODE": ("cloud_legacy", "cloud_legacy"),
    "CONJURE_LOCAL_BACKEND": ("HuggingFace", "huggingface"),
    "HUGGINGFACE_HUB_ACCESS_TOKEN": ("hf_abcdefgh12345678", "***"),
}


def test_they_are_shown_with_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (value, _) in GIVEN.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(comfyctl, ["config", "show", "--json"])
    document = json.loads(result.stdout)
    rows = {row["name"]: row for row in document["settings"] if row["name"] in GIVEN}
    assert {name: row["value"] for name, row in rows.items()} == {name: shown for name, (_, shown) in GIVEN.items()}
    assert {row["source"] for row in rows.values()} == {"environment"}
    assert document["warnings"] == []
    assert "hf_abc" not in result.output


def test_unset_they_are_what_is_said_of_them() -> None:
    rows = {row.name: row for row in describe_settings(load_settings(env={}))}
    assert {name: rows[name].value_shown for name in GIVEN} == {
        "RUNCOMFY_SERVE": "",
        "CONJURE_GENERATION_MODE": "local",
        "CONJURE_LOCAL_BACKEND": "comfyui",
        "HUGGINGFACE_HUB_ACCESS_TOKEN": "",
    }


@pytest.mark.parametrize("name", ["RUNCOMFY_SERVE", "CONJURE_GENERATION_MODE", "CONJURE_LOCAL_BACKEND"])
def test_a_value_that_is_none_of_theirs_is_refused(name: str) -> None:
    with pytest.raises(SettingInvalid, match=name) as caught:
        load_settings(env={name: "everything"})
    assert "write" in caught.value.hint


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("RUNCOMFY_SERVES", "RUNCOMFY_SERVE"),
        ("CONJURE_GENERATION_MODES", "CONJURE_GENERATION_MODE"),
        ("CONJURE_LOCAL_BACKENDS", "CONJURE_LOCAL_BACKEND"),
        ("HUGGINGFACE_HUB_ACCES_TOKEN", "HUGGINGFACE_HUB_ACCESS_TOKEN"),
    ],
)
def test_a_typo_is_told(typo: str, meant: str) -> None:
    (warning,) = load_settings(env={typo: "none"}).warnings
    assert f"did you mean {meant}?" in warning


def test_variables_of_hugging_faces_own_are_left_alone() -> None:
    env = dict.fromkeys(("HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_HUB_CACHE", "HUGGINGFACE_CO_URL_HOME"), "x")
    assert load_settings(env=env).warnings == ()


def test_who_reads_them_agrees_with_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(GENERATION_MODES) == set(MODES)
    assert set(LOCAL_BACKENDS) == {hugging_face.COMFYUI, hugging_face.HUGGING_FACE}
    for name, (value, _) in GIVEN.items():
        monkeypatch.setenv(name, value)
    app = load_settings().app
    assert serves() == {"queue"}
    assert app.serves == "queue"
    assert app.generation_mode == modes.configured() == "cloud_legacy"
    assert app.local_backend == hugging_face.chosen_backend() == "huggingface"


def test_the_token_is_cut_out_of_everything_that_is_logged() -> None:
    configure_logging(load_settings(env={"HUGGINGFACE_HUB_ACCESS_TOKEN": "hf_only-in-this-test-99"}))
    assert "hf_only" not in redact("the answer was hf_only-in-this-test-99")
