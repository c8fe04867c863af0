"""What the last seven days cost, by workflow, what the day is heading for, and what would save money."""

import asyncio
from datetime import UTC, datetime, timedelta

import runcomfy


async def main() -> None:
    async with runcomfy.connect() as comfy:
        money = await comfy.costs()
        report = await money.report(datetime.now(UTC) - timedelta(days=7), by="workflow")
        for row in report.rows:
            print(f"{row.key or '(nobody)'}: ${row.usd:.4f}, ${row.busy_usd:.4f} of it computing; {row.jobs} jobs")
        day, _ = report.forecasts
        print(f"today: ${day.spent:.4f} so far, ${day.expected:.4f} expected")
        for advice in await money.advice():
            print(f"{advice.what}: {advice.why}")


asyncio.run(main())
