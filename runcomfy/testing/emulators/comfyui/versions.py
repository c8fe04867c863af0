"""What the emulated server can do at each version; the rest of the emulator asks here and never compares numbers.

The table follows the release notes of ComfyUI and recordings of 0.3.64, 0.10.0 and 0.33.0. A version between two
of them behaves as the table says, which is as far as anybody outside can know.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Version = tuple[int, int, int]


def parse_version(text: str) -> Version:
    """`"0.3.64"` -> (0, 3, 64); missing parts are 0. Raises ValueError for what is no version."""
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text.strip())
    if found is None:
        raise ValueError(f"not a ComfyUI version: {text!r}")
    return int(found[1]), int(found[2]), int(found[3] or 0)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """One version of the server."""

    text: str
    version: Version

    @classmethod
    def of(cls, text: str) -> Capabilities:
        """The capabilities of a version given as text."""
        return cls(text, parse_version(text))

    def _since(self, *version: int) -> bool:
        return self.version >= version

    @property
    def output_3d(self) -> bool:
        """SaveGLB and kin report under `3d`."""
        return self._since(0, 3, 27)

    @property
    def text_frames(self) -> bool:
        """Binary event 3."""
        return self._since(0, 3, 34)

    @property
    def modern_progress(self) -> bool:
        """`progress_state`, feature flags, previews with metadata, client-chosen prompt ids, hidden secrets."""
        return self._since(0, 3, 45)

    @property
    def partial_targets(self) -> bool:
        """`partial_execution_targets` is read."""
        return self._since(0, 3, 48)

    @property
    def targeted_interrupt(self) -> bool:
        """`/interrupt` reads `prompt_id`; before, every interrupt is global."""
        return self._since(0, 3, 57)

    @property
    def history_offset(self) -> bool:
        """`/history?offset=` is read."""
        return self._since(0, 3, 60)

    @property
    def create_time(self) -> bool:
        """The server adds `extra_data.create_time`."""
        return self._since(0, 3, 69)

    @property
    def jobs(self) -> bool:
        """`/api/jobs` and `/api/jobs/{id}`."""
        return self._since(0, 6, 0)

    @property
    def jobs_know_cancelled(self) -> bool:
        """Interrupted jobs are `cancelled`; before, `failed`."""
        return self._since(0, 9, 0)

    @property
    def throttled_progress(self) -> bool:
        """The progress helper leaves out steps that come too quickly."""
        return self._since(0, 9, 2)

    @property
    def search_aliases(self) -> bool:
        """`/object_info` entries carry `search_aliases`."""
        return self._since(0, 10, 0)

    @property
    def names_missing_node(self) -> bool:
        """Unknown classes are `missing_node_type`; before, `invalid_prompt` without detail."""
        return self._since(0, 12, 0)

    @property
    def jobs_count_3d(self) -> bool:
        """The jobs API takes `3d` for media; node replacements exist."""
        return self._since(0, 14, 0)

    @property
    def assets(self) -> bool:
        """Asset routes exist, if only to say that they are switched off."""
        return self._since(0, 17, 0)

    @property
    def fetch_site_check(self) -> bool:
        """`Sec-Fetch-Site: cross-site` is refused."""
        return self._since(0, 19, 0)

    @property
    def finds_cycles(self) -> bool:
        """Validation reports `dependency_cycle`."""
        return self._since(0, 20, 0)

    @property
    def strict_prompt_id(self) -> bool:
        """`prompt_id` must be a canonical UUID; the `Comfy-Usage-Source` header is read."""
        return self._since(0, 25, 0)

    @property
    def jobs_cancel(self) -> bool:
        """`POST /api/jobs/{id}/cancel` and `/api/jobs/cancel`."""
        return self._since(0, 26, 0)

    @property
    def guarded_downloads(self) -> bool:
        """`/view` sends `nosniff` and forces active content to be downloaded."""
        return self._since(0, 28, 0)

    @property
    def previewable_count(self) -> bool:
        """Jobs carry `previewable_outputs_count`."""
        return self._since(0, 32, 0)
