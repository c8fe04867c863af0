"""Public door and script: the dev server. It lives in `runcomfy.cli.dev_server`."""

if __name__ == "__main__" and not __package__:
    # Run as `python runcomfy/dev_server_startup.py`, this folder itself is first on the path; our root belongs there.
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from runcomfy.cli.dev_server import DevServerManager, main

__all__ = ["DevServerManager", "main"]

if __name__ == "__main__":
    main()
