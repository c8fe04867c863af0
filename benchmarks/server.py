"""An emulated ComfyUI in a process of its own, so that its work is not counted as ours. Prints its address."""

from __future__ import annotations

import asyncio
import sys

from runcomfy.testing.emulators.comfyui import ComfyUIEmulator


async def main() -> None:
    async with ComfyUIEmulator(speed=float(sys.argv[1]) if len(sys.argv) > 1 else 1.0) as emulator:
        print(emulator.url, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
