import asyncio

import runcomfy


async def main() -> None:
    async with runcomfy.connect() as comfy:
        result = await comfy.run("generate_flux_mesh", image="examples/render.png", prompt="a helmet of polished steel")
        for output in result.outputs:
            print(output.kind, output.path, output.sha256)
        print(f"cost ${result.cost_usd}")


asyncio.run(main())
