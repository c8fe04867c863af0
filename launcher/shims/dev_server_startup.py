"""The dev server's script, served by runcomfy-orchestrator.

Put here by `comfyctl conjure install`; `comfyctl conjure uninstall` puts back the file that was here.
"""

try:
    import runcomfy.conjure  # noqa: F401 - whether it is there
except ModuleNotFoundError as error:
    if error.name in ("runcomfy", "runcomfy.conjure"):
        raise ImportError(
            "runcomfy-orchestrator is not installed in the Python that runs CONJURE: install it there, "
            "or run `comfyctl conjure uninstall`"
        ) from error
    raise

from runcomfy.dev_server_startup import DevServerManager, main

__all__ = ["DevServerManager", "main"]

if __name__ == "__main__":
    main()
