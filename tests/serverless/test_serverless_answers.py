"""What RunComfy's serverless API may say, where its results may lie, and how it is set up."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.adapters.config import load_settings
from runcomfy.adapters.providers import runcomfy_serverless_wire as wire
from runcomfy.adapters.providers.runcomfy_serverless import RunComfyServerless
from runcomfy.domain import exceptions as errors
from runcomfy.domain.job import OutputKind
from runcomfy.domain.secret import SecretUrl
from runcomfy.domain.serverless import (
    NO_NEW_FILE,
    Fault,
    RemoteFile,
    RequestId,
    RequestResult,
    RequestState,
    Wanted,
    error_of,
    find_file,
    outcome,
    price_of,
)
from runcomfy.domain.settings import Settings
from runcomfy.testing.clock import LoopClock

WANTED = (
    Wanted("flux", "24", OutputKind.IMAGE, ("images",), "flux.png"),
    Wanted("mesh", "33", OutputKind.MESH, ("3d", "files"), "mesh.glb"),
)


def left(folder: Path) -> list[Path]:
    return list(folder.iterdir())


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(env={"RUNCOMFY_DEPLOYMENT_ID": "d-1", "RUNCOMFY_API_TOKEN": "t-1"}, cwd=tmp_path)


# --- settings --------------------------------------------------------------------------------------------------


def test_the_variables_have_conjures_names_and_defaults(tmp_path: Path) -> None:
    plain = load_settings(env={}, cwd=tmp_path).serverless
    assert (plain.steps_flux, plain.steps_partpacker, plain.cost_tracking) == (20, 50, True)
    assert (plain.request_timeout, plain.poll_interval) == (timedelta(seconds=1800), timedelta(seconds=2))
    given = load_settings(
        env={
            "RUNCOMFY_DEPLOYMENT_ID": "d-1",
            "RUNCOMFY_DEFAULT_STEPS_FLUX": "8",
            "RUNCOMFY_DEFAULT_STEPS_PARTPACKER": "9",
            "RUNCOMFY_COST_TRACKING": "false",
            "RUNCOMFY_REQUEST_TIMEOUT": "60",
            "RUNCOMFY_POLL_INTERVAL": "7",
            "RUNCOMFY_SERVERLESS_USD_PER_HOUR": "2.99",
            "RUNCOMFY_SERVERLESS_API": "V1",
            "RUNCOMFY_SERVERLESS_FILE_HOSTS": "files.example.com, other.example.com",
        },
        cwd=tmp_path,
    ).serverless
    assert (given.deployment_id, given.steps_flux, given.steps_partpacker, given.cost_tracking) == ("d-1", 8, 9, False)
    assert (given.request_timeout, given.poll_interval) == (timedelta(minutes=1), timedelta(seconds=7))
    assert (given.usd_per_hour, given.api_version) == (Decimal("2.99"), "v1")
    both = {"RUNCOMFY_POLL_INTERVAL": "7", "RUNCOMFY_SERVERLESS_POLL_INTERVAL": "3"}
    assert load_settings(env=both, cwd=tmp_path).serverless.poll_interval == timedelta(seconds=3)
    assert given.file_hosts == ("files.example.com", "other.example.com")


@pytest.mark.threat("S18")
def test_without_a_deployment_or_a_token_nothing_is_opened(settings: Settings, clock: LoopClock) -> None:
    with pytest.raises(errors.SettingInvalid, match="deployment"):
        RunComfyServerless(replace(settings.serverless, deployment_id=""), settings.cloud, clock=clock)
    with pytest.raises(errors.CredentialsMissing, match="token"):
        RunComfyServerless(settings.serverless, replace(settings.cloud, tokens=()), clock=clock)
    plain = replace(settings.cloud, base_url="http://api.example.com")
    with pytest.raises(errors.InsecureUrl):
        RunComfyServerless(settings.serverless, plain, clock=clock)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://169.254.169.254/latest",
        "https://[::1]/x",
        "http://serverless-api-storage.runcomfy.net/x",
        "https://runcomfy.net.example.com/x",
        "https://evilruncomfy.net/x",
        "https://user@serverless-api-storage.runcomfy.net/x",
        "https://10.0.0.1:8188/view",
    ],
)
@pytest.mark.threat("S2")
async def test_results_are_fetched_from_runcomfys_hosts_only(
    settings: Settings, clock: LoopClock, tmp_path: Path, url: str
) -> None:
    async with RunComfyServerless(settings.serverless, settings.cloud, clock=clock) as api:
        with pytest.raises(errors.DownloadFailed, match="was not fetched"):
            await api.fetch(RemoteFile("24", "images", "x.png", url=SecretUrl(url)), str(tmp_path / "x"))
    assert not left(tmp_path)


# --- answers that nobody expects -------------------------------------------------------------------------------

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
_words = st.sampled_from(
    [
        "request_id",
        "status",
        "outputs",
        "error",
        "errorCode",
        "error_code",
        "queue_position",
        "created_at",
        "finished_at",
        "url",
        "filename",
        "type",
        "24",
        "33",
        "images",
        "3d",
        "files",
        "outcome",
        "message",
        "details",
        "debugInfo",
        "data",
    ]
)
_known = st.sampled_from(
    ["r-1", "completed", "succeeded", "failed", "in_queue", "canceled", "not_cancellable", "cancelled"]
)
_json = st.recursive(
    _scalars | _known,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_words | st.text(max_size=6), inner, max_size=6),
    max_leaves=20,
)


@given(_json)
def test_no_answer_is_read_as_anything_but_a_value_or_a_refusal(payload: Any) -> None:
    expected = RequestId("r-1")
    for read in (
        wire.read_submitted,
        lambda body: wire.read_status(body, expected=expected),
        lambda body: wire.read_result(body, expected=expected),
        wire.read_cancelled,
        wire.read_deployment,
    ):
        with suppress(wire.Unreadable):
            read(payload)
    wire.read_refusal(payload)
    assert len(list(wire.read_files(payload))) <= wire.MAX_FILES


@given(_json)
def test_a_result_is_whole_or_an_error_and_never_a_success_by_chance(payload: Any) -> None:
    try:
        result = wire.read_result(payload, expected=RequestId("r-1"))
    except wire.Unreadable:
        return
    error = outcome(result) if result.state.over else None
    if error is not None:
        assert error.message.isprintable()
        assert len(error.message) < 1_000
    for wanted in WANTED:
        with suppress(errors.OutputMissing):
            found = find_file(result, wanted)
            assert found.node == wanted.node
            assert found.url is not None


@given(st.binary(max_size=200))
def test_a_body_of_any_bytes_is_json_or_unreadable(body: bytes) -> None:
    with suppress(wire.Unreadable):
        wire.read_json(body)


@given(
    st.text(alphabet="abcdefghij-_.:/?#%\\ \n\0é", min_size=1, max_size=30).filter(
        lambda text: not re.fullmatch(r"[a-z_][a-z_.:-]*", text)
    )
)
def test_an_id_that_could_lead_elsewhere_is_none(request_id: str) -> None:
    with pytest.raises(wire.Unreadable):
        wire.read_submitted({"request_id": request_id})


# --- what answers mean -----------------------------------------------------------------------------------------


def a_file(
    name: str, channel: str = "files", *, new: bool = True, node: str = "33", kind: str = "output"
) -> RemoteFile:
    return RemoteFile(node, channel, name, type=kind, url=SecretUrl("https://x.runcomfy.net/f") if new else None)


def brought(*files: RemoteFile, faults: tuple[Fault, ...] = (), state: RequestState = RequestState.SUCCEEDED) -> Any:
    return RequestResult(RequestId("r-1"), state, files=files, faults=faults)


@pytest.mark.parametrize(
    ("files", "best"),
    [
        ([a_file("mesh.glb", "other"), a_file("mesh.glb", "files"), a_file("mesh.glb", "3d")], 2),
        ([a_file("log.txt", "3d"), a_file("MESH.GLB", "other")], 1),
        ([a_file("mesh.glb", "3d", new=False), a_file("log.txt", "other")], 1),
        ([a_file("mesh.glb", "3d", node="24"), a_file("mesh.glb", "3d", kind="temp"), a_file("a.obj", "other")], 2),
    ],
)
def test_a_new_file_comes_first_then_one_of_its_kind_then_the_likeliest_list(
    files: list[RemoteFile], best: int
) -> None:
    assert find_file(brought(*files), WANTED[1]) is files[best]


def test_any_ending_will_do_for_a_result_of_no_certain_kind() -> None:
    wanted = Wanted("words", "33", OutputKind.FILE, ("files",))
    files = [a_file("a.glb", "3d"), a_file("b.txt", "files")]
    assert find_file(brought(*files), wanted) is files[1]


@pytest.mark.parametrize(
    "result",
    [brought(a_file("mesh.glb", new=False)), brought(faults=(Fault(), Fault(code=NO_NEW_FILE)))],
)
def test_a_result_out_of_the_cache_is_told_as_that(result: RequestResult) -> None:
    with pytest.raises(errors.OutputMissing, match="from its cache") as caught:
        find_file(result, WANTED[1])
    assert caught.value.details == {"request_id": "r-1", "node": "33"}


def test_a_result_that_is_not_there_is_told_with_the_nodes_that_brought_some() -> None:
    others = [a_file(f"{number}.png", node=str(number)) for number in (*range(40, 70), 40)]
    temporary = a_file("mesh.glb", kind="temp")
    with pytest.raises(errors.OutputMissing, match=r"brought no mesh \(node 33\)") as caught:
        find_file(brought(temporary, *others, faults=(Fault(code=10011),)), WANTED[1])
    assert caught.value.details == {
        "request_id": "r-1",
        "node": "33",
        "nodes": ["33", *(str(number) for number in range(40, 59))],
    }


def test_of_several_errors_that_with_a_code_says_why() -> None:
    faults = (Fault(words="it broke"), Fault(10008, "Refused", "node 7"), Fault(500001))
    error = outcome(brought(a_file("a.glb"), faults=faults, state=RequestState.COMPLETED))
    assert isinstance(error, errors.PromptRejected)
    assert error.message.endswith("(code 10008): node 7")
    assert error.details == {
        "request_id": "r-1",
        "status": "completed",
        "runcomfy_code": 10008,
        "runcomfy_error": "Refused",
        "runcomfy_words": "node 7",
    }
    silent = outcome(brought(state=RequestState.FAILED))
    assert isinstance(silent, errors.RequestFailed)
    assert silent.message.endswith("without saying why")
    cancelled = outcome(brought(state=RequestState.CANCELED))
    assert isinstance(cancelled, errors.PromptInterrupted)
    assert cancelled.details == {"request_id": "r-1", "status": "canceled"}


def test_completed_is_a_success_where_there_are_files_and_no_errors() -> None:
    completed = RequestState.COMPLETED
    assert outcome(brought(state=completed, faults=())) is not None
    assert outcome(brought(a_file("a.glb"), state=completed)) is None
    assert outcome(brought(a_file("a.glb"), state=completed, faults=(Fault(),))) is not None
    assert outcome(brought(a_file("a.glb"), state=RequestState.FAILED)) is not None
    assert outcome(brought(faults=(Fault(10011),))) is None  # RunComfy says that it succeeded


@pytest.mark.parametrize("words", ["CUDA out of memory", "torch.OutOfMemoryError", "Allocation on device 0"])
def test_a_workflow_that_fails_for_memory_is_told_as_that(words: str) -> None:
    error = error_of(Fault(10011, "Failed", words), details={})
    assert isinstance(error, errors.GpuOutOfMemory)
    assert "more memory" in error.hint
    assert isinstance(error_of(Fault(10011, words), details={}), errors.GpuOutOfMemory)
    assert not isinstance(error_of(Fault(10008, "Failed", words), details={}), errors.GpuOutOfMemory)
    assert error_of(Fault(10004), details={}).message == "RunComfy's queue failed (code 10004)"


def test_hardware_has_the_price_of_its_tier_and_of_the_account(settings: Settings) -> None:
    rates = settings.rates
    medium = rates.find("medium")
    assert medium is not None
    assert price_of(["NEW_1", "TURING_16", "HOPPER_141"], rates) == medium.usd_per_hour
    assert price_of(["HOPPER_141"], replace(rates, plan="payg")) == Decimal("8.75")
    assert price_of(["HOPPER_141", "TURING_16"], replace(rates, plan="pro")) == Decimal("6.99")
    assert price_of(["NEW_1"], rates) is price_of([], rates) is None
