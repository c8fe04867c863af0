"""Public door and script: the API server, also as `uvicorn launcher.api_server:app`. It lives in `launcher.asgi`."""

if __name__ == "__main__" and not __package__:
    # Run as a script, this folder itself is first on the path; our root belongs there.
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launcher.asgi import app
from runcomfy.cli.serve import main_as_server as main

__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
