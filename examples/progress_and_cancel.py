"""Watch a job, and take it back halfway: the prompt is interrupted, and what was rented is ended."""

import asyncio

import runcomfy


async def main() -> None:
    async with runcomfy.connect(tell=print) as comfy:
        job = comfy.start("generate_flux_mesh", image="examples/render.png", prompt="a brass bell", check=False)
        async for progress in job:
            print(f"{progress.percent:5.1f} %  {progress.step}  {progress.node_title or progress.message}")
            if progress.percent > 50:
                job.cancel()
        result = await job
        print(result.status, result.error["code"] if result.error else "", f"${result.cost_usd}")


asyncio.run(main())
