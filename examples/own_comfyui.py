"""Drive a ComfyUI that already runs: nothing is launched, nothing is billed, no account is needed."""

import asyncio
import os

import runcomfy

URL = os.environ.get("COMFYUI_URL", "http://127.0.0.1:8188")


def show(progress: runcomfy.Progress) -> None:
    print(f"{progress.percent:5.1f} %  {progress.node_title or progress.step}")


async def main() -> None:
    async with runcomfy.connect(server_url=URL) as comfy:
        try:
            result = await comfy.run("image_invert", image="examples/render.png", timeout="2m", on_progress=show)
        except runcomfy.RunComfyError as error:
            print(f"{error.code}: {error.message}\n  -> {error.hint}")
            return
        print(result.outputs[0].path, result.seeds, result.timings["total"])


asyncio.run(main())
