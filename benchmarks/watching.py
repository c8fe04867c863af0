"""1,000 prompts watched at once on one server in another process. Bar: under 300 MB in ours."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

import runcomfy
from benchmarks.common import Findings, graph, report, server
from benchmarks.results import Result
from runcomfy.connection import Running

PROMPTS = 1_000
BAR_MB = 300


async def run() -> Result:
    found = Findings(
        "watching", "One server in another process, one socket, every job with its task, files and result."
    )
    with TemporaryDirectory(prefix="comfyctl-bench-") as folder:
        async with server() as url, runcomfy.connect(server_url=url, RUNCOMFY_DURABLE="0") as comfy:
            out = Path(folder) / "out"
            await comfy.run(graph(1), out_dir=out)
            process = psutil.Process()
            before = process.memory_info().rss
            peak = before
            started = time.perf_counter()
            jobs = [comfy.start(graph(number + 2), out_dir=out) for number in range(PROMPTS)]
            results = asyncio.gather(*(wait(job) for job in jobs))
            while not results.done():
                peak = max(peak, process.memory_info().rss)
                await asyncio.sleep(0.05)
            done = sum(status == "done" for status in await results)
            report(
                "watching",
                prompts=PROMPTS,
                done=done,
                rss_before_mb=round(before / 1e6, 1),
                rss_peak_mb=round(peak / 1e6, 1),
                seconds=round(time.perf_counter() - started, 1),
            )
            found.at_least("jobs done", done, PROMPTS)
            found.at_most("memory with 1,000 jobs watched, peak", peak / 1e6, BAR_MB, "MB")
            found.told("memory before", before / 1e6, "MB")
            found.told("memory for each watched job", (peak - before) / 1e3 / PROMPTS, "kB")
    return found.result()


async def wait(job: Running) -> str:
    return str((await job).status)


def main() -> Result:
    return asyncio.run(run())
