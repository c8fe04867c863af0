"""Put a job into the queue and follow it. `comfyctl agent execute --server URL` in another terminal runs it."""

import asyncio

import runcomfy


async def main() -> None:
    async with runcomfy.connect() as comfy:
        job = await comfy.queue.enqueue(
            "image_invert", image="examples/render.png", priority=20, idempotency_key="render-0001"
        )
        async for event in comfy.queue.events(job):
            print(event.number, event.kind)
        done = await comfy.queue.wait(job)
        print(done.status, done.run_count, *(output["path"] for output in done.result["outputs"]))


asyncio.run(main())
