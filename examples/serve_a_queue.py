"""Serve the queue over rented machines for as long as there are jobs: at most two at once, at most five dollars."""

import asyncio

import runcomfy


async def main() -> None:
    async with runcomfy.connect(max_machines=2, budget_run=5, tell=print) as comfy, comfy.serving():
        async with comfy.presence.here("my-app", user="ann"):  # a machine gets warm meanwhile
            jobs = [
                await comfy.queue.enqueue("image_invert", image="examples/render.png", priority=10 + n, user="ann")
                for n in range(3)
            ]
        for job in jobs:
            done = await comfy.queue.wait(job)
            print(done.status, f"${done.result.get('cost_usd', '0')}")


asyncio.run(main())
