"""What the API refuses of jobs: bad input, what lies on this computer, more than a client may put in."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from runcomfy.testing.clock import LoopClock
from runcomfy.testing.samples import one_color as png
from runcomfy.testing.web import Serving, data_url, refused, serving_web, uploads
from runcomfy.testing.worker_stories import picture

# -- what is refused -----------------------------------------------------------------------------------------

BAD: list[tuple[Any, str]] = [
    ({}, "workflow"),
    ([], "body"),
    ("text", "body"),
    ({"workflow": "nothing_like_it"}, "there is no workflow"),
    ({"workflow": {}}, "workflow"),
    ({"workflow": {"1": {"class_type": "A", "inputs": {"x": ["9", 0]}}}}, "9"),
    ({"workflow": "image_invert"}, "image"),
    ({"workflow": picture(), "seed": -1}, "seed"),
    ({"workflow": picture(), "seed": 2**64}, "seed"),
    ({"workflow": picture(), "seed": "7"}, "seed"),
    ({"workflow": picture(), "seed": True}, "seed"),
    ({"workflow": picture(), "priority": 0}, "priority"),
    ({"workflow": picture(), "priority": 1000}, "priority"),
    ({"workflow": picture(), "retry_limit": -1}, "retry_limit"),
    ({"workflow": picture(), "timeout_s": 0}, "timeout_s"),
    ({"workflow": picture(), "timeout_s": 1e300}, "timeout_s"),
    ({"workflow": picture(), "convert": "exe"}, "convert"),
    ({"workflow": picture(), "server_type": "made-of-gold"}, "machine type"),
    ({"workflow": picture(), "prompt": "x" * 100_001}, "prompt"),
    ({"workflow": picture(), "prompt": "nul\x00"}, "prompt"),
    ({"workflow": picture(), "user": "two\nlines"}, "user"),
    ({"workflow": picture(), "user": "u" * 201}, "user"),
    ({"workflow": picture(), "sets": {"1.seconds": "a\x1bb"}}, "control"),
    ({"workflow": picture(), "metadata": {"x": "y" * 20_000}}, "metadata"),
    ({"workflow": picture(), "metadata": {"webhook_url": "https://example.org"}}, "webhook_url"),
    ({"workflow": picture(), "webhook_url": "http://127.0.0.1/x"}, "address"),
    ({"workflow": picture(), "webhook_url": "file:///etc/passwd"}, "address"),
    ({"workflow": picture(), "image_url": "http://localhost/x.png"}, "address"),
    ({"workflow": picture(), "unheard": 1}, "unheard"),
    ({"workflow": picture(), "image": "data:image/png;base64,%%%"}, "base64"),
    ({"workflow": "image_invert", "image": data_url(b"<html><body>hello</body></html>")}, "web page"),
    ({"workflow": "image_invert", "image": data_url(png()[:-20])}, "damaged"),
    ({"workflow": "image_invert", "image": data_url(b"")}, "empty"),
    ({"workflow": "image_invert", "image": data_url(b"\x1f\x8b\x08\x00" + bytes(60))}, "GZIP"),
    ({"workflow": "image_invert", "image": data_url(png()), "image_url": "https://example.org/a.png"}, "twice"),
]


async def test_bad_input_is_said_before_anything_is_queued(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        for body, word in BAD:
            refused(await api.post("/jobs", body), 422, word)
        assert (await api.get("/jobs")).json["jobs"] == []
        assert await uploads(api) == []


SMUGGLED: list[dict[str, Any]] = [
    {"server_url": "http://127.0.0.1:1"},
    {"out_dir": "/tmp"},  # noqa: S108
    {"out_file": "/tmp/x.png"},  # noqa: S108
    {"workflow": "SECRET"},
    {"workflow": "SECRET.json"},
    {"workflow": "../SECRET.json"},
    {"workflow": "./image_invert"},
    {"image": "SECRET"},
    {"image": "@SECRET"},
    {"image": "upload:../../SECRET"},
    {"image": "@@SECRET"},
    {"inputs": {"image": "SECRET"}},
    {"inputs": {"image": "@SECRET"}},
    {"inputs": {"image": "@upload:SECRET"}},
    {"inputs": {"image": "upload:../SECRET"}},
    {"inputs": {"image": "no-such-file-yet.png"}},
    {"sets": {"1.image": "@SECRET"}},
    {"sets": {"1.image": "@"}},
    {"inputs": {"1_image": "SECRET"}},
]


async def test_what_lies_on_this_computer_is_not_told(tmp_path: Path, clock: LoopClock) -> None:
    (tmp_path / "words.txt").write_text("no picture")
    async with serving_web(tmp_path, clock) as api:
        for name in ("image", "1_image"):
            for path in (tmp_path / "words.txt", tmp_path / "nothing", tmp_path):
                answer = await api.post("/jobs", {"workflow": "image_invert", "inputs": {name: str(path)}})
                refused(answer, 422, "is none that was sent")  # the same words, whatever is there


async def test_what_is_wrong_with_a_form_is_no_news_for_the_terminal(
    serving_api: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving_api() as api:
        answer = await api.ask(
            "POST", "/jobs", data=b"junk", headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
        refused(answer, 422, "multipart")
    assert not [record for record in caplog.records if record.name.startswith("python_multipart")]


@pytest.mark.threat("S1")
async def test_no_path_of_the_server_gets_in(tmp_path: Path, clock: LoopClock) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    (tmp_path / "secret.png.json").write_text(json.dumps(picture()))
    async with serving_web(tmp_path, clock) as api:
        for body in SMUGGLED:
            text = json.dumps({"workflow": "image_invert"} | body).replace("SECRET", str(secret))
            answer = await api.ask("POST", "/jobs", data=text, headers={"Content-Type": "application/json"})
            assert answer.status in (404, 422), (body, answer)
        assert (await api.get("/jobs")).json["jobs"] == []


UNREADABLE: list[tuple[bytes, str]] = [
    (b"workflow=image_invert", "application/x-www-form-urlencoded"),
    (b'{"workflow": "image_invert"}', "text/plain"),
    (b"{", "application/json"),
    (b'{"workflow": NaN}', "application/json"),
    (b'{"workflow": "a", "workflow": "b"}', "application/json"),
    (b'{"workflow": "\\ud800"}', "application/json"),
    (b"[" * 100_000, "application/json"),
    (b"\xff\xfe", "application/json"),
    (b"", "application/json"),
    (b"nothing", "multipart/form-data"),
    (b"--x\r\nhalf", "multipart/form-data; boundary=x"),
    (b'--x\r\nContent-Disposition: form-data; name="job"\r\n\r\n{}', "multipart/form-data; boundary=x"),
    (b"--x\r\n\r\nno name\r\n--x--\r\n", "multipart/form-data; boundary=x"),
]


async def test_a_body_that_cannot_be_read_is_said_to_be_so(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        for data, kind in UNREADABLE:
            answer = await api.ask("POST", "/jobs", data=data, headers={"Content-Type": kind})
            refused(answer, answer.status)
            assert answer.status in (400, 415, 422), (data[:40], answer)
        assert await uploads(api) == []


@pytest.mark.threat("S14")
async def test_a_dry_run_says_that_it_would_work_and_queues_nothing(serving_api: Serving) -> None:
    async with serving_api() as api:
        found = await api.post("/jobs", {"workflow": "image_invert", "image": data_url(png()), "dry_run": True})
        assert found.status == 200
        assert found.json["valid"] is True
        assert (await api.get("/jobs")).json["jobs"] == []
        assert await uploads(api) == []
        refused(await api.post("/jobs", {"workflow": "image_invert", "dry_run": True}), 422)


# -- limits --------------------------------------------------------------------------------------------------


@pytest.mark.threat("S14")
async def test_a_client_may_have_so_many_jobs_waiting_and_no_more(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock, max_waiting=3, max_per_minute=100) as api:
        for _ in range(3):
            assert (await api.post("/jobs", {"workflow": picture()})).status == 201
        full = await api.post("/jobs", {"workflow": picture()})
        refused(full, 429, "too-many-requests")
        assert int(full.headers["Retry-After"]) >= 1
        job = (await api.get("/jobs")).json["jobs"][0]
        refused(await api.post(f"/jobs/{job['id']}/again"), 429)
        assert (await api.ask("DELETE", f"/jobs/{job['id']}")).status == 200
        assert (await api.post("/jobs", {"workflow": picture()})).status == 201


async def test_many_requests_at_once_get_no_more_in(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock, max_waiting=3, max_per_minute=100) as api:
        answers = await asyncio.gather(*(api.post("/jobs", {"workflow": picture()}) for _ in range(12)))
        assert sorted(answer.status for answer in answers) == [201] * 3 + [429] * 9


@pytest.mark.threat("S14")
async def test_a_client_may_put_in_so_many_a_minute(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock, max_per_minute=2) as api:
        answers = [(await api.post("/jobs", {"workflow": picture()})).status for _ in range(3)]
        assert answers == [201, 201, 429]
        await asyncio.sleep(61)
        assert (await api.post("/jobs", {"workflow": picture()})).status == 201
