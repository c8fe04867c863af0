"""Jobs over HTTP: put in, looked at, fetched, changed; what is refused, and what a client that leaves loses: nothing."""

from __future__ import annotations

from typing import Any

from runcomfy.testing.web import Web


def picture(seconds: float = 0.05) -> dict[str, Any]:
    """A graph that takes its time and then saves a picture."""
    inputs = {"seconds": seconds, "steps": max(1, int(seconds)), "previews": False, "seed": 1}
    return {
        "1": {"class_type": "EmulatorDelay", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "out"}},
    }


async def test_a_job_is_put_in_runs_and_is_fetched(api: Web) -> None:
    made = await api.post("/jobs", {"workflow": picture()})
    assert made.status == 201, made
    job = await api.ended(made.json["id"])
    assert job["status"] == "done", job
    got = await api.get(job["outputs"][0]["url"])
    assert got.status == 200
