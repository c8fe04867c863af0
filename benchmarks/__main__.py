"""
`python -m benchmarks [startup|overhead|watching|queue|killing|leaks|two_deep|planning|fleet|time_left|http]…`: all of
them unless named.

`python -m benchmarks replay --trace FILE [--seed N]` needs a trace, and so stands alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

from benchmarks import (
    fleet,
    http,
    killing,
    leaks,
    overhead,
    planning,
    queue,
    replay,
    startup,
    time_left,
    two_deep,
    watching,
)

ALL: Final[dict[str, Callable[[], object]]] = {
    "startup": startup.main,
    "overhead": overhead.main,
    "watching": watching.main,
    "queue": queue.main,
    "killing": killing.main,
    "leaks": leaks.main,
    "two_deep": two_deep.main,
    "planning": planning.main,
    "fleet": fleet.main,
    "time_left": time_left.main,
    "http": http.main,
    "replay": lambda: sys.exit(replay.main(sys.argv[2:])),
}


def main() -> None:
    names = sys.argv[1:] or [name for name in ALL if name != "replay"]
    if names[0] == "replay":
        names = ["replay"]  # the rest is its own
    for name in names:
        if name not in ALL:
            sys.exit(f"no benchmark {name!r}; there are: {', '.join(ALL)}")
        ALL[name]()


if __name__ == "__main__":
    main()
