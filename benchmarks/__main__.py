"""`python -m benchmarks [startup|overhead|watching|queue|killing|leaks|two_deep]…`: all of them unless named."""

from __future__ import annotations

import sys

from benchmarks import killing, leaks, overhead, queue, startup, two_deep, watching

ALL = {
    "startup": startup.main,
    "overhead": overhead.main,
    "watching": watching.main,
    "queue": queue.main,
    "killing": killing.main,
    "leaks": leaks.main,
    "two_deep": two_deep.main,
}


def main() -> None:
    for name in sys.argv[1:] or ALL:
        if name not in ALL:
            sys.exit(f"no benchmark {name!r}; there are: {', '.join(ALL)}")
        ALL[name]()


if __name__ == "__main__":
    main()
