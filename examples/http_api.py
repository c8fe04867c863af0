"""Send a job to a running `comfyctl serve` over HTTP, follow it, and fetch what came of it. No library is needed."""

import base64
import json
import os
import urllib.request
from pathlib import Path
from typing import Any

API = os.environ.get("COMFYCTL_SERVE", "http://127.0.0.1:8000")
TOKEN = (Path(os.environ.get("RUNCOMFY_STATE_DIR", "state")) / "http_token").read_text().strip()
PICTURE = Path("examples/render.png").read_bytes()


def ask(method: str, path: str, body: object = None, **headers: str) -> Any:
    """Send a request; return the open answer."""
    headers |= {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    data = json.dumps(body).encode() if body is not None else None
    return urllib.request.urlopen(urllib.request.Request(API + path, data, headers, method=method))  # noqa: S310


order = {"workflow": "image_invert", "image": "data:image/png;base64," + base64.b64encode(PICTURE).decode()}
# The same key with the same order is the same job: what was not answered may be sent again.
job = json.load(ask("POST", "/jobs", order, **{"Idempotency-Key": "render-0001"}))
print("job", job["number"], job["status"])

for line in ask("GET", job["urls"]["events"]):
    if line.startswith(b"data: ") and (told := json.loads(line[6:])):
        print(told["kind"] if "kind" in told else f"{told['progress']['percent']:.0f}%")

job = json.load(ask("GET", job["urls"]["self"]))
for output in job["outputs"]:
    content = ask("GET", output["url"]).read()
    print(job["status"], output["file"], len(content) == output["size_bytes"], output["sha256"])
