"""Jobs over HTTP: put in, looked at, fetched, changed; what is refused; a client that leaves loses nothing."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from PIL import Image

from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import NewJob, QueueStatus
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.web import Answer, Serving, Web, serving_web


def picture(seconds: float = 0.05, name: str = "out") -> dict[str, Any]:
    """A graph that takes its time and then saves a picture."""
    inputs = {"seconds": seconds, "steps": max(1, int(seconds)), "previews": False, "seed": 1}
    return {
        "1": {"class_type": "EmulatorDelay", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": name}},
    }


def failing() -> dict[str, Any]:
    inputs = {"kind": "error", "message": "it burst", "steps": 2, "at_step": 1}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 5}},
        "2": {"class_type": "EmulatorFail", "inputs": {"image": ["1", 0], **inputs}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "never"}},
    }


def png(color: str = "red", side: int = 16, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, form)
    return buffer.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def refused(answer: Answer, status: int, *words: str) -> None:
    """The answer has that status, the shape of every error, and says these words."""
    assert answer.status == status, answer
    assert set(answer.json) == {"detail", "error"}, answer
    assert set(answer.json["error"]) == {"code", "message", "hint", "details"}, answer
    assert all(word in json.dumps(answer.json) for word in words), answer


async def uploads(api: Web) -> list[Path]:
    return await asyncio.to_thread(lambda: list((api.state / "uploads").glob("*/*")))


# -- a job's way ---------------------------------------------------------------------------------------------


async def test_a_picture_becomes_a_result_that_is_fetched_whole_and_in_ranges(serving_api: Serving) -> None:
    async with serving_api() as api:
        made = await api.post("/jobs", {"workflow": "image_invert", "image": data_url(png()), "user": "ann"})
        assert made.status == 201
        assert made.headers["Location"] == f"/jobs/{made.json['id']}"
        job = await api.ended(made.json["id"])
        assert (job["status"], job["workflow"], job["user"]) == ("done", "image_invert", "ann")
        assert job["error"] is None
        assert job["inputs"][0]["kind"] == "image"
        (output,) = job["outputs"]
        assert output["media_type"] == "image/png"

        whole = await api.get(output["url"])
        assert whole.status == 200
        assert hashlib.sha256(whole.body).hexdigest() == output["sha256"]
        assert whole.headers["ETag"] == f'"{output["sha256"]}"'
        assert whole.headers["Content-Type"] == "image/png"
        assert whole.headers["X-Content-Type-Options"] == "nosniff"
        assert "sandbox" in whole.headers["Content-Security-Policy"]
        assert Image.open(io.BytesIO(whole.body)).getpixel((0, 0))[:3] == (0, 255, 255)  # type: ignore[index]

        part = await api.get(output["url"], headers={"Range": "bytes=2-5"})
        assert (part.status, part.body) == (206, whole.body[2:6])
        assert part.headers["Content-Range"] == f"bytes 2-5/{len(whole.body)}"
        again = await api.get(output["url"], headers={"If-None-Match": whole.headers["ETag"]})
        assert (again.status, again.body) == (304, b"")
        saved = await api.get(f"{output['url']}?download=1")
        assert saved.headers["Content-Disposition"].startswith("attachment;")

        small = await api.get(output["thumbnail"])
        assert (small.status, small.headers["Content-Type"]) == (200, "image/webp")
        assert Image.open(io.BytesIO(small.body)).size == (16, 16)
        for asked in ("bytes=0-3", "bytes=99999-", "bytes=what"):
            again = await api.get(output["thumbnail"], headers={"Range": asked})
            assert (again.status, again.body) == (200, small.body), "too small for ranges"
        given = await api.get(job["inputs"][0]["url"])
        assert (given.status, given.body) == (200, png())
        assert (await api.get(job["inputs"][0]["thumbnail"])).status == 200

        manifest = (await api.get(job["urls"]["manifest"])).json
        assert manifest["outputs"][0]["sha256"] == output["sha256"]
        log = (await api.get(job["urls"]["log"])).body.decode()
        assert "enqueued" in log
        assert "done" in log


RANGES: list[tuple[str, int, slice | None]] = [
    ("bytes=0-0", 206, slice(0, 1)),
    ("bytes=-3", 206, slice(-3, None)),
    ("bytes=5-", 206, slice(5, None)),
    ("bytes=0-99999999", 206, slice(None)),
    ("bytes=99999999-", 416, None),
    ("bytes=-0", 416, None),
    ("bytes=5-2", 200, slice(None)),
    ("bytes=a-b", 200, slice(None)),
    ("items=0-1", 200, slice(None)),
    ("bytes=0-1,3-4", 200, slice(None)),
    ("bytes=-", 200, slice(None)),
]


async def test_ranges_as_http_has_them(serving_api: Serving) -> None:
    async with serving_api() as api:
        job = await api.ended((await api.post("/jobs", {"workflow": picture()})).json["id"])
        url = job["outputs"][0]["url"]
        whole = (await api.get(url)).body
        for asked, status, found in RANGES:
            part = await api.get(url, headers={"Range": asked})
            assert part.status == status, asked
            if found is None:
                assert part.headers["Content-Range"] == f"bytes */{len(whole)}"
            else:
                assert part.body == whole[found], asked
            stale = await api.get(url, headers={"Range": asked, "If-Range": '"another"'})
            assert (stale.status, stale.body) == (200, whole), asked


async def test_a_result_that_was_changed_on_the_disk_is_not_sent(serving_api: Serving) -> None:
    async with serving_api() as api:
        job = await api.ended((await api.post("/jobs", {"workflow": picture()})).json["id"])
        url = job["outputs"][0]["url"]
        (path,) = await asyncio.to_thread(lambda: list(Path(api.app.queue_settings.jobs_finished).rglob("*.png")))
        data = path.read_bytes()
        assert (await api.get(url)).status == 200
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])  # as long as before
        refused(await api.get(url), 410, "not the file any more")
        path.write_bytes(data)
        before = path.stat()
        assert (await api.get(url)).status == 200
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # whoever sets the time back is found out
        if sys.platform != "win32":
            refused(await api.get(url), 410, "not the file any more")
        path.write_bytes(data + b"more")
        refused(await api.get(url), 410, "not the file any more")
        refused(await api.get(job["outputs"][0]["thumbnail"]), 410)
        path.unlink()
        refused(await api.get(url), 410, "no longer there")
        assert str(path.parent) not in json.dumps(job)


async def test_multipart_with_one_job_field_or_with_fields(serving_api: Serving) -> None:
    async with serving_api() as api:
        form = aiohttp.FormData()
        form.add_field("job", json.dumps({"workflow": "image_invert", "priority": 7}))
        form.add_field("image", png("blue"), filename="sketch.jpg", content_type="image/jpeg")
        made = await api.ask("POST", "/jobs", data=form)
        assert made.status == 201, made
        assert made.json["priority"] == 7
        assert made.json["inputs"][0]["file"] == "sketch.png"  # by its content, not by its name

        form = aiohttp.FormData()
        form.add_field("workflow", json.dumps(picture()))
        form.add_field("seed", "")
        form.add_field("priority", "9")
        made = await api.ask("POST", "/jobs", data=form)
        assert made.status == 415  # aiohttp sends this one as a form: pages of others can do that, too
        form = aiohttp.FormData(default_to_multipart=True)
        form.add_field("workflow", json.dumps(picture()))
        form.add_field("seed", "")
        form.add_field("priority", "9")
        made = await api.ask("POST", "/jobs", data=form)
        assert (made.status, made.json["priority"]) == (201, 9)


# -- the same request twice ----------------------------------------------------------------------------------


async def test_an_idempotency_key_replays_the_first_answer(serving_api: Serving) -> None:
    async with serving_api() as api:
        key = {"Idempotency-Key": "order-17"}
        body = {"workflow": "image_invert", "image": data_url(png())}
        first = await api.post("/jobs", body, headers=key)
        again = await api.post("/jobs", body, headers=key)
        assert (first.status, again.status) == (201, 200)
        assert again.headers["Idempotency-Replayed"] == "true"
        assert again.json["id"] == first.json["id"]
        await api.ended(first.json["id"])
        assert (await api.post("/jobs", body, headers=key)).json["status"] == "done"
        refused(await api.post("/jobs", body | {"seed": 3}, headers=key), 409, "idempotency-conflict")
        other = body | {"image": data_url(png("green"))}
        refused(await api.post("/jobs", other, headers=key), 409, "idempotency-conflict")
        assert (await api.post("/jobs", body)).json["id"] != first.json["id"]
        # What the conflict brought along is gone; what the job needs stays.
        assert (await api.get(f"{first.json['urls']['self']}/inputs/0")).body == png()


@pytest.mark.invariant("I16")
async def test_twenty_requests_with_one_key_at_once_make_one_job(serving_api: Serving) -> None:
    async with serving_api() as api:
        form = [aiohttp.FormData() for _ in range(20)]
        for each in form:
            each.add_field("job", json.dumps({"workflow": "image_invert"}))
            each.add_field("image", png(), filename="a.png")
        answers = await asyncio.gather(
            *(api.ask("POST", "/jobs", data=each, headers={"Idempotency-Key": "one"}) for each in form)
        )
        assert sorted(answer.status for answer in answers) == [200] * 19 + [201]
        assert len({answer.json["id"] for answer in answers}) == 1
        job = await api.ended(answers[0].json["id"])
        assert job["status"] == "done"
        assert len((await api.get("/jobs")).json["jobs"]) == 1


async def test_a_key_that_cannot_be_one_is_refused(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        for key in ("", "x" * 256, "tab\there"):
            refused(await api.post("/jobs", {"workflow": picture()}, headers={"Idempotency-Key": key}), 422)


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


# -- changing their fate -------------------------------------------------------------------------------------


async def test_cancel_priority_first_retry_and_again(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:  # nobody works: they wait
        one = (await api.post("/jobs", {"workflow": "image_invert", "image": data_url(png()), "seed": 5})).json
        moved = await api.ask("PATCH", f"/jobs/{one['id']}", json={"priority": 7})
        assert (moved.status, moved.json["priority"]) == (200, 7)
        first = await api.ask("PATCH", f"/jobs/{one['number']}", json={"first": True})
        assert first.json["priority"] == 1
        refused(await api.ask("PATCH", f"/jobs/{one['id']}", json={"priority": 0}), 422)
        refused(await api.ask("PATCH", f"/jobs/{one['id']}", json={"status": "done"}), 422)
        for _ in range(2):
            gone = await api.ask("DELETE", f"/jobs/{one['id']}")
            assert (gone.status, gone.json["status"], gone.json["reason"]) == (200, "failed", "cancelled")
        retried = await api.post(f"/jobs/{one['id']}/retry")
        assert (retried.status, retried.json["status"], retried.json["id"]) == (200, "pending", one["id"])
        again = await api.post(f"/jobs/{one['id']}/again", {"seed": 8})
        assert again.status == 201
        assert again.json["id"] != one["id"]
        shown = (await api.get(again.headers["Location"])).json
        assert shown["request"]["seed"] == 8
        assert (await api.get(shown["inputs"][0]["url"])).body == png()
        other = await api.post(f"/jobs/{one['id']}/again")
        assert (await api.get(other.headers["Location"])).json["request"]["seed"] is None
        for path in ("", "/retry", "/again", "/log", "/manifest", "/outputs/0", "/inputs/0/thumbnail", "/preview"):
            method = "POST" if path in ("/retry", "/again") else "GET"
            refused(await api.ask(method, f"/jobs/nothing{path}"), 404, "job-not-found")
        refused(await api.get(f"/jobs/{one['id']}/outputs/0"), 404)
        refused(await api.get(f"/jobs/{one['id']}/preview"), 404)


async def test_again_draws_another_seed_also_where_it_was_set_by_its_place(serving_api: Serving) -> None:
    async with serving_api() as api:
        order = {"workflow": picture(), "sets": {"1.seed": 5}, "inputs": {"1_steps": 2}}
        first = await api.ended((await api.post("/jobs", order)).json["id"])
        assert first["seeds"] == {"1.seed": 5}
        other = await api.ended((await api.post(f"/jobs/{first['id']}/again")).json["id"])
        assert other["seeds"]["1.seed"] != 5
        assert other["request"]["inputs"] == {"1_steps": 2}
        chosen = await api.ended((await api.post(f"/jobs/{first['id']}/again", {"seed": 77})).json["id"])
        assert chosen["seeds"] == {"1.seed": 77}


async def test_a_picture_is_fetched_from_an_address_once(serving_api: Serving) -> None:
    asked = []

    async def serve(request: web.BaseRequest) -> web.Response:
        asked.append(request.path)
        return web.Response(body=png() if request.path == "/a.png" else b"<html>", content_type="image/png")

    runner = web.ServerRunner(web.Server(serve))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    here = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with serving_api(allow_private=True) as api:
            order, key = {"workflow": "image_invert", "image_url": f"{here}/a.png"}, {"Idempotency-Key": "once"}
            made = await api.post("/jobs", order, headers=key)
            assert made.status == 201, made
            assert (await api.post("/jobs", order, headers=key)).json["id"] == made.json["id"]
            assert asked == ["/a.png"]
            job = await api.ended(made.json["id"])
            assert (job["status"], job["inputs"][0]["file"]) == ("done", "a.png")
            refused(await api.post("/jobs", order | {"image_url": f"{here}/page"}), 422)
        async with serving_api() as api:
            refused(await api.post("/jobs", order), 422, "address-refused")
        assert len(asked) == 2
    finally:
        await runner.cleanup()


async def test_a_running_job_shows_its_node_its_preview_and_what_it_costs(serving_api: Serving) -> None:
    async with serving_api() as api:
        graph = picture(60.0)
        graph["1"]["inputs"]["previews"] = True
        made = (await api.post("/jobs", {"workflow": graph})).json
        await asyncio.sleep(30)
        job = (await api.get(f"/jobs/{made['id']}")).json
        assert job["status"] == "processing"
        assert job["progress"]["node_id"] == "1"
        assert job["progress"]["maximum"] == 60
        assert [node["node_id"] for node in job["timeline"]] == ["1"]
        assert job["cost_usd"] is None  # a server that was given costs nothing here
        preview = await api.get(job["progress"]["preview"])
        assert preview.status == 200
        assert Image.open(io.BytesIO(preview.body)).size[0] > 0
        assert preview.headers["X-Content-Type-Options"] == "nosniff"
        await api.ask("DELETE", f"/jobs/{made['id']}")
        assert (await api.ended(made["id"]))["reason"] == "cancelled"


async def test_a_failed_job_says_why_and_runs_again(serving_api: Serving) -> None:
    async with serving_api() as api:
        made = await api.post("/jobs", {"workflow": failing(), "retry_limit": 0})
        job = await api.ended(made.json["id"])
        assert (job["status"], job["reason"]) == ("failed", "node-failed")
        assert job["error"]["code"] == "node-failed"
        assert "it burst" in json.dumps(job["error"])
        assert [run["outcome"] for run in job["runs"]] == ["failed"]
        assert (await api.post(f"/jobs/{job['id']}/retry")).json["status"] == "pending"
        refused(await api.get(f"/jobs/{job['id']}/manifest"), 404)


async def test_jobs_are_listed_newest_first_in_pages(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        numbers = []
        for n in range(5):
            user = "ann" if n % 2 else "bob"
            numbers.append((await api.post("/jobs", {"workflow": picture(), "user": user})).json["number"])
        page = (await api.get("/jobs?limit=2")).json
        assert [job["number"] for job in page["jobs"]] == [numbers[4], numbers[3]]
        assert page["counts"] == {"pending": 5, "processing": 0, "done": 0, "failed": 0}
        rest = (await api.get(f"/jobs?limit=10&before={page['next']}")).json
        assert [job["number"] for job in rest["jobs"]] == numbers[2::-1]
        assert rest["next"] is None
        assert [job["number"] for job in (await api.get("/jobs?user=ann")).json["jobs"]] == [numbers[3], numbers[1]]
        assert (await api.get("/jobs?status=done")).json["jobs"] == []
        assert len((await api.get("/jobs?workflow=inline&status=pending")).json["jobs"]) == 5
        for query in ("limit=0", "limit=501", "limit=x", "status=gone", "before=-1"):
            refused(await api.get(f"/jobs?{query}"), 422)


async def test_a_client_that_gives_up_loses_nothing(serving_api: Serving) -> None:
    """CONJURE's callers give up after 300 s; the job goes on, and its id finds it again."""
    async with serving_api() as api:
        order = {"workflow": picture(400.0), "timeout_s": 3600}
        made = await api.post("/jobs", order, headers={"Idempotency-Key": "patient"})
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(300):
                await api.ended(made.json["id"])
        await asyncio.sleep(30)
        seen = (await api.get(f"/jobs/{made.json['id']}")).json
        assert seen["status"] == "processing"
        assert seen["progress"]["percent"] >= 0
        found = await api.post("/jobs", order, headers={"Idempotency-Key": "patient"})
        assert found.json["id"] == made.json["id"]
        assert (await api.ended(made.json["id"]))["status"] == "done"
        assert len(await api.app._jobs.jobs(status=QueueStatus.DONE)) == 1  # type: ignore[union-attr]


async def test_a_client_that_breaks_off_its_upload_leaves_nothing(serving_api: Serving) -> None:
    async with serving_api() as api:
        _, writer = await asyncio.open_connection("127.0.0.1", int(api.address.rpartition(":")[2]))
        head = (
            f"POST /jobs HTTP/1.1\r\nHost: {api.address.removeprefix('http://')}\r\n"
            f"Authorization: Bearer {api.token}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 100000\r\n\r\n"
            '--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        )
        writer.write(head.encode() + png())
        await writer.drain()
        await asyncio.sleep(1)
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(5)
        assert await uploads(api) == []
        assert (await api.get("/jobs")).json["jobs"] == []


async def test_without_the_token_nothing_is_told(serving_api: Serving) -> None:
    async with serving_api() as api:
        for method, path in (("GET", "/jobs"), ("POST", "/jobs"), ("GET", "/machines"), ("GET", "/costs/now")):
            assert (await api.ask(method, path, token=False)).status == 401


async def test_a_job_with_text_that_is_no_unicode_hides_no_other(tmp_path: Path, clock: LoopClock) -> None:
    """A command line may hold any bytes, and a job file any escape; UTF-8 has a form for neither."""
    async with serving_web(tmp_path, clock) as web:
        odd = JobRequest("image_invert", inputs={"prompt": "half \ud83d of a face"})
        [job] = await (await web.app.job_store()).add([NewJob(odd, "image_invert", user="\udcff")])
        listed, shown = await web.get("/jobs"), await web.get(f"/jobs/{job.id}")
        assert (listed.status, shown.status) == (200, 200), (listed, shown)
        assert listed.json["jobs"][0]["prompt"] == "half ? of a face"
        assert shown.json["request"]["inputs"] == {"prompt": "half ? of a face"}


async def test_a_strangers_manifest_beside_a_result_is_not_the_jobs(serving_api: Serving, tmp_path: Path) -> None:
    """Results may go to a path of the user's own, for example into the folder of a web site."""
    site = tmp_path / "site"
    async with serving_api() as api:
        await asyncio.to_thread(site.mkdir)
        await asyncio.to_thread((site / "manifest.json").write_text, '{"short_name": "my site"}')
        order = JobRequest(picture(), out_file=str(site / "cat.png"))
        [job] = await (await api.app.job_store()).add([NewJob(order, "drawn")])
        assert (await api.ended(job.uid))["status"] == "done"
        assert await asyncio.to_thread((site / "cat.png").is_file)
        said = (await api.get(f"/jobs/{job.uid}/manifest")).json
        assert "short_name" not in said
        assert said["job_id"] == job.uid
        assert [output["file"] for output in said["outputs"]] == ["cat.png"]
