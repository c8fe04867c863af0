"""Jobs over HTTP: put in, looked at, fetched, changed; a client that leaves loses nothing."""

from __future__ import annotations

import asyncio
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
from runcomfy.testing.samples import one_color as png
from runcomfy.testing.web import Serving, data_url, refused, serving_web, uploads
from runcomfy.testing.worker_stories import picture


def failing() -> dict[str, Any]:
    inputs = {"kind": "error", "message": "it burst", "steps": 2, "at_step": 1}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 5}},
        "2": {"class_type": "EmulatorFail", "inputs": {"image": ["1", 0], **inputs}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "never"}},
    }


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
