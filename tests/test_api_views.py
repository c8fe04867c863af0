"""What clients are shown: nothing that is this computer's business, and of errors everything that helps."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from weakref import ref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import error_body, status_of
from launcher.files import NOTHING, disposition, range_of
from launcher.glances import Kept
from launcher.intake import uploads_of
from launcher.teller import teller_of
from launcher.views import job_view, without_paths
from runcomfy.bootstrap import App
from runcomfy.domain import exceptions as known
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.queued import QueueStatus, WorkerId
from runcomfy.domain.time_left import TimeLeft
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.web import serving_web


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("/home/ann/pics/cat.png is damaged", "…/cat.png is damaged"),
        ("could not read '/srv/a b/x.png'", None),
        ("there is no file C:\\Users\\ann\\cat.png", "there is no file …/cat.png"),
        ("use image/png or 2/3 and/or n/a", "use image/png or 2/3 and/or n/a"),
        ("see https://example.org/a/b and /jobs/1/retry", "see https://example.org/a/b and /jobs/1/retry"),
    ],
)
def test_paths_are_cut_to_names_and_nothing_else_is(said: str, shown: str | None) -> None:
    found = without_paths(said)
    assert shown is None or found == shown
    assert "ann" not in found
    assert "/srv" not in found


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (known.BadInput, 422),
        (known.JobNotFound, 404),
        (known.MachineNotFound, 404),
        (known.IdempotencyConflict, 409),
        (known.JobBusy, 409),
        (known.NameTaken, 409),
        (known.TooManyRequests, 429),
        (known.CredentialsMissing, 503),
        (known.ProviderBusy, 502),
        (known.StopUnconfirmed, 502),
        (known.NodeFailed, 500),
        (known.JobTimeout, 504),
        (known.OutputCorrupt, 502),
        (known.BudgetExceeded, 409),
        (known.DiskFull, 507),
        (known.StoreUnavailable, 503),
        (known.Interrupted, 503),
        (RunComfyError, 500),
    ],
)
def test_each_kind_of_error_has_its_status(kind: type[RunComfyError], status: int) -> None:
    error = kind(
        "what", hint="how", details={"path": "/etc/x", "numbers": [1, Decimal(2)], "deep": {"url": "http://h"}}
    )
    assert status_of(error) == status
    body = error_body(error)
    assert body["detail"] == "what"
    assert body["error"] == {
        "code": kind.code,
        "message": "what",
        "hint": "how",
        "details": {"numbers": [1, "2"], "deep": {}},
    }


@given(st.text(max_size=300))
@pytest.mark.threat("S1")
def test_no_name_breaks_out_of_its_header(name: str) -> None:
    for download in (True, False):
        header = disposition(name, download=download)
        assert header.isascii()
        assert header.isprintable()
        assert header.count('"') == 2
        assert "/" not in header
        assert "\\" not in header


@given(st.text(alphabet="bytes=-,0123456789 ", max_size=30), st.integers(0, 200))
def test_a_range_is_never_outside_the_file(text: str, size: int) -> None:
    found = range_of(text, size)
    if found is not None and found != NOTHING:
        assert 0 <= found[0] < found[1] <= size


async def test_a_running_job_costs_its_machines_price_for_its_time_there(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        graph = {
            "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 5}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "out"}},
        }
        made = (await api.post("/jobs", {"workflow": graph})).json
        store = await api.app.job_store()
        [job] = await store.claim(WorkerId("somebody"), count=1, lease=timedelta(hours=2))
        watching = api.app.live.begin(job.uid, job.workflow_id)
        watching.progress(Progress(Step.BOOTING, server_type="medium"))
        teller = teller_of(api.app)
        live = api.app.live.job(job.uid)
        assert teller.cost_so_far(job, live) == 0
        left = TimeLeft(low_s=1, expected_s=2, high_s=3, sure=False, runs=1)
        waits = replace(job, status=QueueStatus.PENDING)
        assert [job_view(one, None, left)["time_left"]["counts_from"] for one in (waits, job)] == ["start", "now"]
        earlier = Decimal("0.25")  # by attempts whose process is gone
        watching.progress(Progress(Step.UPLOADING, server_type="medium", earlier_usd=earlier))
        assert teller.cost_so_far(job, api.app.live.job(job.uid)) == earlier
        watching.progress(Progress(Step.RUNNING, server_type="medium"))
        await asyncio.sleep(1800)
        rate = api.app.settings.rates.find("medium")
        assert rate is not None
        shown = (await api.get(f"/jobs/{made['id']}")).json
        assert Decimal(shown["cost_usd"]) == pytest.approx(rate.usd_per_hour / 2, rel=Decimal("0.01"))
        assert shown["machine"] == {"server_type": "medium", "id": None}
        watching.over()


@pytest.mark.parametrize(("takes", "good_for"), [(0.1, 5), (0.5, 10), (3.0, 60)])
async def test_what_takes_long_to_add_up_is_added_up_more_seldom_and_once_for_all(takes: float, good_for: int) -> None:
    loop, asked = asyncio.get_running_loop(), []

    async def add_up() -> int:
        await asyncio.sleep(takes)
        asked.append(loop.time())
        return len(asked)

    kept = Kept(add_up, fresh_s=5, share=0.05)
    assert await asyncio.gather(*(kept.get() for _ in range(100))) == [1] * 100
    await asyncio.sleep(good_for - 0.5)
    assert await kept.get() == 1
    await asyncio.sleep(1)
    assert await kept.get() == 2
    kept.forget()
    assert await kept.get() == 3


async def test_what_tells_of_an_app_goes_with_it(tmp_path: Path, clock: LoopClock) -> None:
    app = App(clock=clock, queue={"root": str(tmp_path)})
    teller = teller_of(app)
    assert teller_of(app) is teller
    assert teller.glances is teller_of(app).glances
    assert uploads_of(app) is uploads_of(app)
    of_app, of_teller = ref(app), ref(teller)
    del app, teller
    gc.collect()
    assert of_app() is None
    assert of_teller() is None
