"""
The variables of RunComfy's serverless API, under the names CONJURE gave them where it has one.

The account, its token and the API's address are those of the Server API. `RUNCOMFY_POLL_INTERVAL` counts for both APIs
when it is set, unless `RUNCOMFY_SERVERLESS_POLL_INTERVAL` is, too; with neither, a request is looked at more often
than a machine, since it may be over within seconds.
"""

from __future__ import annotations

import re
from typing import Final

from runcomfy.adapters.setting_kinds import DURATION, ID, SWITCH, USD_PER_HOUR, Variable, number, refuse, shown, text_of

_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")


def _version(value: object) -> str:
    word = str(value).strip().lower()
    if word not in ("v1", "v2"):
        raise refuse(f"{shown(value)} is not a version of the serverless API")
    return word


def _hosts(value: object) -> str:
    names = [name.strip() for name in str(value).split(",") if name.strip()]
    for name in names:
        if not _HOST.fullmatch(name):
            raise refuse(f"{shown(name)} is not the name of a host")
    return ",".join(names).lower()


SERVERLESS_VARIABLES: Final = (
    Variable("RUNCOMFY_DEPLOYMENT_ID", ID, "serverless.deployment_id", "The serverless deployment that runs requests."),
    Variable(
        "RUNCOMFY_REQUEST_TIMEOUT",
        DURATION,
        "serverless.request_timeout",
        "How long a serverless request may take, cold start and queue included; then it is cancelled.",
    ),
    Variable(
        "RUNCOMFY_SERVERLESS_POLL_INTERVAL",
        DURATION,
        "serverless.poll_interval",
        "Time between two looks at a request, if it is not to be that of RUNCOMFY_POLL_INTERVAL.",
    ),
    Variable(
        "RUNCOMFY_DEFAULT_STEPS_FLUX",
        number(1, 100, "steps"),
        "serverless.steps_flux",
        "Sampling steps of the picture in a serverless run that asks for none.",
    ),
    Variable(
        "RUNCOMFY_DEFAULT_STEPS_PARTPACKER",
        number(3, 1024, "steps"),
        "serverless.steps_partpacker",
        "Sampling steps of the mesh in a serverless run that asks for none.",
    ),
    Variable(
        "RUNCOMFY_COST_TRACKING",
        SWITCH,
        "serverless.cost_tracking",
        "Whether the cost of serverless requests is estimated.",
    ),
    Variable(
        "RUNCOMFY_SERVERLESS_USD_PER_HOUR",
        USD_PER_HOUR,
        "serverless.usd_per_hour",
        "What the deployment's hardware costs, for estimates; unset, the price of the hardware RunComfy names.",
    ),
    Variable(
        "RUNCOMFY_SERVERLESS_API",
        text_of("version", "write v1 or v2", _version),
        "serverless.api_version",
        "Which version of the serverless API requests are sent to: v1 or v2.",
    ),
    Variable(
        "RUNCOMFY_SERVERLESS_FILE_HOSTS",
        text_of("hosts", "write names of hosts with commas between them", _hosts),
        "serverless.file_hosts",
        "Hosts, beside RunComfy's own, that results may be fetched from.",
    ),
)
