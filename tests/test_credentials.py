"""The credentials file: found where users put it, read as loosely as it was written, and never repeated."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.adapters.credentials import find_credentials, flaw, is_placeholder, parse_credentials, search_places
from runcomfy.config import Settings, load_settings
from runcomfy.domain.exceptions import (
    ConfigurationError,
    CredentialsMalformed,
    CredentialsMissing,
    InsecureUrl,
    RunComfyError,
    SettingInvalid,
)

USER, TOKEN, VERSION = "5c0f6a2e-user", "9d2b7e51-token-canary", "1f0e-version"
GOOD = f'userID:"{USER}"\nRUNCOMFY_API_TOKEN:"{TOKEN}"\nversion_id: "{VERSION}"'

posix = pytest.mark.skipif(sys.platform == "win32", reason="permission bits are POSIX's")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A working directory without anything in it."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def write(path: Path, content: str | bytes, *, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def load(home: Path, content: str | bytes | None, env: Mapping[str, str] | None = None, **options: Any) -> Settings:
    """Load settings with this credentials file and nothing else of the developer's."""
    named = write(home / "mine.txt", content) if content is not None else Path(os.devnull)
    return load_settings(env={"RUNCOMFY_CREDENTIALS_FILE": str(named), **(env or {})}, cwd=home, **options)


def held(settings: Settings) -> tuple[str, str, str]:
    cloud = settings.cloud
    return cloud.user_id, "|".join(token.reveal() for token in cloud.tokens), cloud.workflow_version_id


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        GOOD + "\n",
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\r"),
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.encode("utf-16"),
        "# f\xfcr M\xfcller: nur Test\n".encode("latin-1") + GOOD.encode(),
        GOOD.replace('"', ""),
        "\n\n  " + GOOD.replace(":", "  :  ").replace("\n", "  \n\t"),
        f"RUNCOMFY_USER_ID:{USER}\nRUNCOMFY_API_TOKEN: {TOKEN}\nRUNCOMFY_WORKFLOW_VERSION_ID:{VERSION}",
        f"userID:old\n{GOOD}",
        f"no colon here\n#userID:x\n{GOOD}\nunknown:1",
        f'"userid":"{USER}"\nruncomfy_api_token:{TOKEN}\nVersion_ID:{VERSION}',
    ],
    ids=[
        "no-newline-at-end",
        "newline-at-end",
        "crlf",
        "cr",
        "utf8-bom",
        "utf16",
        "latin1-comment",
        "no-quotes",
        "blanks",
        "variable-names",
        "last-wins",
        "noise",
        "other-case",
    ],
)
def test_every_way_such_files_are_written_is_read(home: Path, content: str | bytes) -> None:
    assert held(load(home, content, require_cloud=True)) == (USER, TOKEN, VERSION)


def test_a_value_is_split_at_the_first_colon() -> None:
    entries, _ = parse_credentials(b'RUNCOMFY_API_TOKEN:"a:b"')
    assert entries["RUNCOMFY_API_TOKEN"].value == "a:b"


def test_the_environment_wins_over_the_file_value_by_value(home: Path) -> None:
    settings = load(home, GOOD, {"RUNCOMFY_API_TOKEN": "from-env"}, require_cloud=True)
    assert held(settings) == (USER, "from-env", VERSION)
    assert settings.sources["RUNCOMFY_API_TOKEN"] == "environment"
    assert settings.sources["RUNCOMFY_USER_ID"] == str(home / "mine.txt") == settings.credentials_file


def test_the_second_token_follows_the_first(home: Path) -> None:
    settings = load(home, GOOD + "\nRUNCOMFY_API_TOKEN_2:second-token\n")
    assert [token.reveal() for token in settings.cloud.tokens] == [TOKEN, "second-token"]
    assert [token.reveal() for token in load(home, GOOD, {"RUNCOMFY_API_TOKEN_2": TOKEN}).cloud.tokens] == [TOKEN]


def test_one_token_is_enough_even_if_it_is_the_second(home: Path) -> None:
    settings = load(home, f"userID:{USER}\nRUNCOMFY_API_TOKEN_2:{TOKEN}\nversion_id:{VERSION}", require_cloud=True)
    assert held(settings) == (USER, TOKEN, VERSION)


# --- where it is looked for ---------------------------------------------------------------------------------


def test_files_are_searched_in_the_documented_order(home: Path, tmp_path: Path) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    places = search_places(env, home)
    assert places[:2] == (home / "credentials.txt", home / "runcomfy" / "credentials.txt")
    assert places[-1].name == "credentials.txt"
    assert places[-1].parent.name == "runcomfy-orchestrator"
    for place in (home / "runcomfy" / "credentials.txt", home / "credentials.txt"):
        write(place, GOOD)
        assert find_credentials(env, home).path == place
    named = write(tmp_path / "named.txt", GOOD)
    assert find_credentials({**env, "RUNCOMFY_CREDENTIALS_FILE": str(named)}, home).path == named


@posix
def test_the_users_configuration_folder_is_the_last_place(home: Path, tmp_path: Path) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    if any(place.exists() for place in search_places(env, home)):
        pytest.skip("this checkout has credentials of its own beside the package")
    last = write(tmp_path / "config" / "runcomfy-orchestrator" / "credentials.txt", GOOD)
    assert find_credentials(env, home).path == last


def test_files_are_never_mixed(home: Path) -> None:
    write(home / "credentials.txt", f"userID:{USER}")
    write(home / "runcomfy" / "credentials.txt", GOOD)
    with pytest.raises(CredentialsMissing) as missing:
        load_settings(env={}, cwd=home, require_cloud=True)
    assert missing.value.details["missing"] == ["RUNCOMFY_API_TOKEN", "RUNCOMFY_WORKFLOW_VERSION_ID"]
    assert str(home / "credentials.txt") in missing.value.hint


@pytest.mark.parametrize("name", ["nowhere.txt", "work/nowhere/at/all.txt", "~nobody-of-that-name/x", "nul\0character"])
def test_a_named_file_that_is_not_there_is_an_error(home: Path, name: str) -> None:
    with pytest.raises(CredentialsMissing, match="RUNCOMFY_CREDENTIALS_FILE"):
        load_settings(env={"RUNCOMFY_CREDENTIALS_FILE": name}, cwd=home)


def test_a_folder_in_place_of_the_file_is_an_error(home: Path) -> None:
    with pytest.raises((CredentialsMalformed, CredentialsMissing), match=r"credentials file|RUNCOMFY_CREDENTIALS_FILE"):
        load_settings(env={"RUNCOMFY_CREDENTIALS_FILE": str(home)}, cwd=home)


def test_something_far_too_large_is_not_a_credentials_file(home: Path) -> None:
    with pytest.raises(CredentialsMalformed, match="larger than"):
        load(home, GOOD + "\n" + "x" * 70_000)


# --- what is missing or wrong -------------------------------------------------------------------------------


def test_everything_missing_is_named_at_once_with_the_places_to_set_it(home: Path) -> None:
    with pytest.raises(CredentialsMissing) as missing:
        load(home, None, require_cloud=True)
    for name in ("RUNCOMFY_USER_ID", "RUNCOMFY_API_TOKEN", "RUNCOMFY_WORKFLOW_VERSION_ID"):
        assert name in missing.value.message
    assert os.devnull in missing.value.hint
    assert missing.value.exit_code == 3


def test_without_any_file_the_places_that_were_searched_are_told(home: Path) -> None:
    env = {"XDG_CONFIG_HOME": str(home)}
    if find_credentials(env, home).path is not None:
        pytest.skip("this checkout has credentials of its own beside the package")
    with pytest.raises(CredentialsMissing) as missing:
        load_settings(env=env, cwd=home, require_cloud=True)
    assert str(home / "credentials.txt") in missing.value.hint
    assert str(home / "runcomfy" / "credentials.txt") in missing.value.hint
    assert "userID" in missing.value.hint


def test_nothing_is_missing_for_who_needs_no_cloud(home: Path) -> None:
    assert held(load(home, None)) == ("", "", "")


def test_all_but_launching_works_without_a_workflow_version(home: Path) -> None:
    content = f"userID:{USER}\nRUNCOMFY_API_TOKEN:{TOKEN}"
    assert held(load(home, content, require_cloud=True, require_version=False)) == (USER, TOKEN, "")
    with pytest.raises(CredentialsMissing) as missing:
        load(home, content, require_cloud=True)
    assert missing.value.details["missing"] == ["RUNCOMFY_WORKFLOW_VERSION_ID"]


def test_the_example_file_counts_as_not_filled_in(home: Path) -> None:
    example = (Path(__file__).parents[1] / "credentials.example.txt").read_bytes()
    with pytest.raises(CredentialsMissing) as missing:
        load(home, example, require_cloud=True)
    assert len(missing.value.details["missing"]) == 3
    assert "line" in missing.value.message
    filled = example.replace(b"your-user-id", USER.encode()).replace(b"your-api-token", TOKEN.encode())
    settings = load(home, filled.replace(b"your-workflow-version-id", VERSION.encode()), require_cloud=True)
    assert held(settings) == (USER, TOKEN, VERSION)


def test_a_placeholder_in_the_environment_does_not_hide_the_file(home: Path) -> None:
    settings = load(home, GOOD, {"RUNCOMFY_API_TOKEN": "your-api-token", "RUNCOMFY_USER_ID": ""}, require_cloud=True)
    assert held(settings) == (USER, TOKEN, VERSION)


@pytest.mark.parametrize("value", ["", "  ", "your-token", "<token>", "xxxx-xxxx", "XXXX", "...", "changeme", "TODO"])
def test_placeholders_are_recognised(value: str) -> None:
    assert is_placeholder(value)


@pytest.mark.parametrize("value", [USER, TOKEN, VERSION, "0f6b1c1e-7a53-4c0e-9d51-2f0c3f2b9a10", "u-demo", "xray"])
def test_real_values_are_not_placeholders(value: str) -> None:
    assert not is_placeholder(value)
    assert flaw(value, in_path=True) is None


def test_a_line_that_lacks_its_colon_is_pointed_out(home: Path) -> None:
    with pytest.raises(CredentialsMissing, match=r"line 2 of .* has no colon"):
        load(home, f"userID:{USER}\nRUNCOMFY_API_TOKEN={TOKEN}\nversion_id:{VERSION}", require_cloud=True)


@pytest.mark.parametrize(
    "token",
    ["canary part", "canary\tpart", 'canary"part', "canary'part", "canary\x00part", "canary\x1bpart", "canary\xa0part",
     "canaryü", "Bearer canary", "canary" * 1000],
)  # fmt: skip
@pytest.mark.parametrize("name", ["userID", "RUNCOMFY_API_TOKEN", "version_id"])
def test_a_malformed_credential_is_named_by_file_and_line_and_never_repeated(home: Path, name: str, token: str) -> None:
    with pytest.raises(CredentialsMalformed) as malformed:
        load(home, f"# one\n\n{name}:{token}", {"RUNCOMFY_MAX_RETRIES": "3"})
    told = f"{malformed.value} {malformed.value.hint} {malformed.value.details} {malformed.value!r}"
    assert f"{home / 'mine.txt'}, line 3" in told
    assert "canary" not in told


def test_a_malformed_credential_in_the_environment_names_the_variable(home: Path) -> None:
    with pytest.raises(CredentialsMalformed, match=r"RUNCOMFY_API_TOKEN \(environment\)"):
        load(home, GOOD, {"RUNCOMFY_API_TOKEN": "canary\nX-Evil: 1"})


def test_a_malformed_value_that_is_not_used_does_no_harm(home: Path) -> None:
    settings = load(home, "RUNCOMFY_API_TOKEN:a b", {"RUNCOMFY_API_TOKEN": TOKEN})
    assert held(settings)[1] == TOKEN


@pytest.mark.parametrize("user", ["../admin", "a/b", "a?b", "a#b", "a%2fb", "a\\b", "a@b"])
def test_a_user_id_cannot_change_the_path_it_becomes_a_part_of(home: Path, user: str) -> None:
    with pytest.raises(CredentialsMalformed, match="RUNCOMFY_USER_ID"):
        load(home, None, {"RUNCOMFY_USER_ID": user})


def test_all_problems_come_in_one_error(home: Path) -> None:
    env = {"RUNCOMFY_API_TOKEN": "a b", "RUNCOMFY_POLL_INTERVAL": "soon", "RUNCOMFY_API_BASE_URL": "http://far.example"}
    with pytest.raises(CredentialsMalformed) as wrong:
        load(home, None, env, require_cloud=True)
    codes = [problem["code"] for problem in wrong.value.details["problems"]]
    assert sorted(codes) == ["credentials-malformed", "credentials-missing", "insecure-url", "setting-invalid"]
    assert "RUNCOMFY_API_TOKEN" not in wrong.value.details["problems"][codes.index("credentials-missing")]["message"]
    for name in ("RUNCOMFY_API_TOKEN", "RUNCOMFY_POLL_INTERVAL", "RUNCOMFY_API_BASE_URL", "RUNCOMFY_USER_ID"):
        assert name in wrong.value.message


# --- what a file may not do ---------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
@pytest.mark.threat("S4")
def test_a_file_that_others_can_read_is_warned_about(home: Path, mode: int, *, warned: bool) -> None:
    path = write(home / "credentials.txt", GOOD, mode=mode)
    settings = load_settings(env={}, cwd=home, require_cloud=True)
    assert any("others can read" in warning and str(path) in warning for warning in settings.warnings) is warned


@pytest.mark.parametrize("address", ["https://evil.example", "https://api.runcomfy.net.evil.example"])
def test_a_file_found_by_chance_cannot_send_the_users_token_elsewhere(home: Path, address: str) -> None:
    write(home / "credentials.txt", f"userID:{USER}\nRUNCOMFY_API_BASE_URL:{address}")
    with pytest.raises(SettingInvalid, match="it would be sent where that file says"):
        load_settings(env={"RUNCOMFY_API_TOKEN": TOKEN}, cwd=home)


def test_a_file_found_by_chance_may_send_the_users_token_to_this_computer(home: Path) -> None:
    write(home / "credentials.txt", f"userID:{USER}\nRUNCOMFY_API_BASE_URL:http://127.0.0.1:8080")
    settings = load_settings(env={"RUNCOMFY_API_TOKEN": TOKEN}, cwd=home)
    assert settings.cloud.base_url == "http://127.0.0.1:8080"


def test_a_misspelt_key_of_the_file_is_named_with_what_was_meant(home: Path) -> None:
    warnings = load(home, f"{GOOD}\nRUNCOMFY_API_TOKN:x\nmy_own_note:x").warnings
    [told] = [warning for warning in warnings if "is not a key" in warning]
    assert told.startswith("RUNCOMFY_API_TOKN in ")
    assert told.endswith("did you mean RUNCOMFY_API_TOKEN?")


def test_a_file_may_name_the_address_for_its_own_tokens(home: Path) -> None:
    write(home / "credentials.txt", f"{GOOD}\nRUNCOMFY_API_BASE_URL:https://beta-api.runcomfy.net")
    assert load_settings(env={}, cwd=home).cloud.base_url == "https://beta-api.runcomfy.net"
    named = {"RUNCOMFY_CREDENTIALS_FILE": "credentials.txt", "RUNCOMFY_API_TOKEN": "other-token"}
    assert load_settings(env=named, cwd=home).cloud.base_url == "https://beta-api.runcomfy.net"


def test_a_file_cannot_say_where_we_write(home: Path) -> None:
    victim = home / "victim"
    settings = load(home, f"{GOOD}\nRUNCOMFY_STATE_COPIES:{victim}\nRUNCOMFY_STATE_DIR:{victim}")
    assert settings.files.state_copies == ()
    assert settings.files.state_dir != str(victim)
    assert sum("does not count" in warning for warning in settings.warnings) == 2


def test_other_settings_may_stand_in_the_file(home: Path) -> None:
    settings = load(home, f"{GOOD}\nRUNCOMFY_PLAN:pro\nCOMFYUI_MAX_RETRIES:7", {"COMFYUI_MAX_RETRIES": "8"})
    assert (settings.cloud.plan, settings.comfy.max_retries) == ("pro", 8)


@pytest.mark.threat("S18")
def test_an_address_that_would_send_the_token_unencrypted_is_refused(home: Path) -> None:
    with pytest.raises(InsecureUrl):
        load(home, GOOD, {"RUNCOMFY_API_BASE_URL": "http://api.runcomfy.net"})


# --- whatever is in it --------------------------------------------------------------------------------------

_LINES = st.lists(
    st.tuples(
        st.sampled_from(
            [b"userID", b"RUNCOMFY_API_TOKEN", b"version_id", b"RUNCOMFY_API_BASE_URL", b"COMFYUI_BURST", b""]
        ),
        st.sampled_from([b":", b": ", b"=", b"", b':"']),
        st.binary(max_size=40),
    ),
    max_size=6,
).map(lambda parts: b"\n".join(b"".join(part) for part in parts))


@given(data=st.one_of(st.binary(max_size=400), _LINES))
def test_any_bytes_give_settings_or_one_of_our_errors(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("any")
    try:
        values = held(load(home, data, require_cloud=True))
    except ConfigurationError:
        return
    assert all(values)
    assert [flaw(value) for value in values] == [None] * 3


@given(
    name=st.sampled_from(["RUNCOMFY_API_TOKEN", "RUNCOMFY_USER_ID", "RUNCOMFY_API_TOKEN_2"]), noise=st.text(max_size=20)
)
@pytest.mark.threat("S3")
def test_a_secret_is_in_no_error_and_no_repr(name: str, noise: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = f"canary{noise}canary"
    try:
        tokens = load(tmp_path_factory.mktemp("canary"), None, {name: secret}).cloud.tokens
        told = f"{tokens!r} {tokens}"
    except RunComfyError as error:
        told = f"{error!r} {error} {error.hint} {error.details}"
    assert "canary" not in told
