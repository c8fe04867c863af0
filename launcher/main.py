"""Public door and script: `python launcher/main.py` is `comfyctl serve`. It lives in `runcomfy.cli.serve`."""

if __name__ == "__main__" and not __package__:
    # Run as a script, this folder itself is first on the path; our root belongs there.
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from runcomfy.cli.serve import main, serve

__all__ = ["main", "serve"]

if __name__ == "__main__":
    main()
