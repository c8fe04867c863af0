"""CONJURE's generation services, served by runcomfy-orchestrator.

Put here by `comfyctl conjure install`; `comfyctl conjure uninstall` puts back the file that was here.
"""

try:
    import launcher.conjure  # noqa: F401 - whether it is there
except ModuleNotFoundError as error:
    if error.name in ("launcher", "launcher.conjure"):
        raise ImportError(
            "runcomfy-orchestrator is not installed in the Python that runs CONJURE: install it there, "
            "or run `comfyctl conjure uninstall`"
        ) from error
    raise

from launcher.generation_services import *  # noqa: F403
