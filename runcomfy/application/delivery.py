"""From what ComfyUI says it made to verified files: fetch, inspect, fetch once more if broken, commit all at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from runcomfy.domain.binding import BoundWorkflow
from runcomfy.domain.exceptions import OutputCorrupt, OutputMissing
from runcomfy.domain.job import OutputKind
from runcomfy.domain.workflow_io import FoundOutput, MatchedOutput, find_outputs, match_declared
from runcomfy.ports.comfyui import ComfyUI
from runcomfy.ports.results import JobFolder, Media, ResultFile

log = logging.getLogger("runcomfy.delivery")

FETCHES_AT_ONCE = 4
NO_SIGNATURE = (".splat", ".ksplat")
"""Meshes that no content tells apart from other files."""


def promised(outputs: Mapping[str, Any], bound: BoundWorkflow) -> list[MatchedOutput]:
    """Return every result that is to be on disk.

    Raises OutputMissing if a declared one is not there, or if there is none at all: a success without results is
    no success.
    """
    matched = match_declared(find_outputs(outputs), bound.declared)
    if not matched:
        raise OutputMissing(
            "ComfyUI reports success but names no result",
            hint="the workflow needs a node that saves something; a blocked branch or a cached run may have none",
        )
    return matched


async def deliver(
    matched: Sequence[MatchedOutput], server: ComfyUI, folder: JobFolder, *, convert: str | None
) -> list[ResultFile]:
    """Fetch and inspect every result into the folder. Nothing is a result before the folder commits it.

    Raises OutputMissing, OutputCorrupt, DownloadFailed, DiskFull.
    """
    gate = asyncio.Semaphore(FETCHES_AT_ONCE)

    async def one(item: MatchedOutput) -> ResultFile:
        async with gate:
            file = await _deliver_one(item, server, folder)
        return await folder.convert(file, convert) if convert else file

    if len(matched) == 1:
        return [await one(matched[0])]
    tasks = [asyncio.create_task(one(item)) for item in matched]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _deliver_one(item: MatchedOutput, server: ComfyUI, folder: JobFolder) -> ResultFile:
    found = item.found
    if found.text is not None:
        return await _text(item, found, folder)
    tries = 2
    for number in range(1, tries + 1):
        try:
            return await _fetch(item, found, server, folder)
        except OutputCorrupt as error:
            # Kept for diagnosis by the folder. Once more: the file may have been caught while it was written.
            log.warning("output_corrupt", extra={"fields": {"node": found.node_id, "try": number, "why": str(error)}})
            if number == tries:
                raise
    raise AssertionError


async def _fetch(item: MatchedOutput, found: FoundOutput, server: ComfyUI, folder: JobFolder) -> ResultFile:
    if found.file is None:
        raise OutputMissing(f"node {found.node_id} names a result without a file")
    partial = folder.partial()
    fetched = await server.fetch(found.file, partial)
    media = await folder.inspect(partial, expected=item.declared.kind if item.declared else _expected(found))
    return ResultFile(
        partial=partial,
        node=found.node_id,
        media=media,
        size_bytes=fetched.size_bytes,
        sha256=fetched.sha256,
        name=item.declared.name if item.declared else "",
        file_name=item.declared.file_name if item.declared else "",
        remote_name=found.file.filename,
        passing=found.file.type == "temp",
    )


def _expected(found: FoundOutput) -> OutputKind | None:
    """What a result that nobody declared must be: pictures and meshes must decode, anything else may be anything."""
    if found.file is not None and found.file.filename.lower().endswith(NO_SIGNATURE):
        return None
    return found.kind if found.kind in (OutputKind.IMAGE, OutputKind.MESH, OutputKind.VIDEO, OutputKind.AUDIO) else None


async def _text(item: MatchedOutput, found: FoundOutput, folder: JobFolder) -> ResultFile:
    partial = folder.partial()
    size, digest = await folder.write_text(partial, found.text or "")
    return ResultFile(
        partial=partial,
        node=found.node_id,
        media=Media(OutputKind.TEXT, "text/plain", ".txt"),
        size_bytes=size,
        sha256=digest,
        name=item.declared.name if item.declared else "",
        file_name=item.declared.file_name if item.declared else "",
    )
