"""What people and other programs write: workflows, sidecars, job files, state, credentials, settings, tables, words."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Final

import workflows
from benchmarks.fuzzing.scratch import scratch, written
from benchmarks.fuzzing.target import TOKEN, Seeds, Target, demand, only_ours, plain, without_secrets
from runcomfy.adapters.config import load_settings
from runcomfy.adapters.credentials import parse_credentials
from runcomfy.adapters.files import safe_name
from runcomfy.adapters.job_files import YamlJobFiles
from runcomfy.adapters.variables import VARIABLES
from runcomfy.adapters.workflow_files import WorkflowFiles
from runcomfy.adapters.workflow_registry import WorkflowRegistry
from runcomfy.application.replay_streams import STREAMS, draw, read_trace
from runcomfy.cli.presence import parse_when
from runcomfy.domain.binding import bind, parse_value
from runcomfy.domain.durations import parse_duration, show_duration, show_span
from runcomfy.domain.exceptions import RunComfyError, foreign_text
from runcomfy.domain.job import JobRequest
from runcomfy.domain.moment import moment
from runcomfy.domain.out_file import checked_out_file
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import QueueSettings, Settings
from runcomfy.domain.sidecar import Sidecar
from runcomfy.domain.workflow import Workflow
from runcomfy.ports.job_files import FoundFile
from runcomfy.testing.clock import START

FAR: Final = timedelta(days=400 * 365)


def _first(low: int, high: int) -> int:
    return low


def _shipped(name: str) -> tuple[str, str]:
    text, toml = workflows.load(name)
    return text, toml or ""


# --- workflows ----------------------------------------------------------------------------------------------


def workflow(data: bytes) -> None:
    """A graph, and what a user may ask of it."""
    with only_ours():
        found = Workflow.parse(data, name="a file")
        demand(len(found.sha256) == 64 and Workflow.parse(json.dumps(found.graph)).sha256 == found.sha256, "two hashes")
        for node in found.nodes.values():
            demand(isinstance(node.inputs, dict), "a node that is none")
        for wanted in (
            JobRequest("w", image="a.png", prompt="words", seed=2**63, inputs={"steps": 3}),
            JobRequest("w", sets={"3.seed": "7", "LoadImage.image": "@a.png", "+1.new": "[1, 2]"}),
        ):
            with only_ours():
                bound = bind(found, None, wanted, random_int=_first)
                json.dumps(bound.graph, allow_nan=False)
                with only_ours():
                    bound.with_uploads(dict.fromkeys(bound.uploads, "name"))


def _workflow_seeds() -> Seeds:
    for name in workflows.names():
        yield name, json.dumps(json.loads(_shipped(name)[0]), separators=(",", ":")).encode()
    small = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "in.png"}, "_meta": {"title": "input"}},
        "2": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 20, "image": ["1", 0], "positive": ["4", 0]}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "a prompt"}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}},
    }
    yield "small", json.dumps(small).encode()
    yield "body", json.dumps({"prompt": small}).encode()
    yield "page", json.dumps({"nodes": [], "links": []}).encode()
    yield "utf-16", json.dumps(small).encode("utf-16")


def sidecar(data: bytes) -> None:
    """A TOML file beside a workflow."""
    with only_ours():
        read = Sidecar.parse(data, name="a file")
        for name in ("generate_flux_mesh", "image_invert"):
            with only_ours():
                graph = Workflow.parse(_shipped(name)[0])
                read.check(graph)
                bind(graph, read, JobRequest(name, image="a.png", prompt="p", inputs={"steps": 3}), random_int=_first)


def _sidecar_seeds() -> Seeds:
    for name in workflows.names():
        yield name, _shipped(name)[1].encode()
    yield "nested", b"a." * 900 + b"a = 1"
    yield "lists", b"a = " + b"[" * 900 + b"]" * 900


# --- job files ----------------------------------------------------------------------------------------------


def _job_files() -> YamlJobFiles:
    root = scratch()
    registry = WorkflowRegistry(root=str(root), workflows_file=None, shipped=workflows.names)
    settings = QueueSettings(
        root=str(root),
        jobs_processing=str(root / "processing"),
        jobs_finished=str(root / "finished"),
        database=Secret(str(root / "jobs.db")),
    )
    return YamlJobFiles(settings, registry=registry)


def job_file(data: bytes) -> None:
    """A job in YAML or JSON, up to the job that would be queued."""
    found = FoundFile(str(scratch() / "processing" / "T2I_a.yaml"), "T2I_a.yaml", (1, 2, 3), 0.0)
    with only_ours():
        job = _job_files().job(found, data).job
        demand(
            Path(job.request.out_file or "").is_relative_to(scratch() / "finished"), f"leads to {job.request.out_file}"
        )
        demand(job.priority is None or 1 <= job.priority <= 999, f"priority {job.priority}")
        json.dumps([dict(job.request.inputs), dict(job.metadata)], allow_nan=False)
        graph = Workflow.parse(_shipped(job.workflow_id)[0]) if job.workflow_id in workflows.names() else None
        if graph is not None:
            with only_ours():
                bind(graph, Sidecar.parse(_shipped(job.workflow_id)[1]), job.request, random_int=_first)


def _job_seeds() -> Seeds:
    yield (
        "yaml",
        b"""\
job_type: T2I
workflow_id: wf_realistic_portrait
priority: 20
inputs:
  prompt: "a knight in rain"
  seed: 123456
  tags: [a, b, {c: 1.5e3}]
outputs: {file_path: "jobs/finished/image/knight.png"}
metadata: {creator: cli, on: yes, when: 2026-11-20}
retry_limit: 2
timeout: 1h30m
user: ada
project: knights
""",
    )
    said = {
        "job_type": "T2I",
        "workflow_id": "image_invert",
        "inputs": {"image": "@a.png"},
        "outputs": {"file_path": "finished/image/x.png"},
    }
    yield "json", json.dumps(said, indent=1).encode()
    yield (
        "json-in-the-folder",
        json.dumps({**said, "outputs": {"file_path": str(scratch() / "finished/x.png")}}).encode(),
    )
    yield "anchors", b"a: &a [1]\nb: *a\n<<: *a\n"
    yield "tags", b"a: !!python/object/apply:os.system ['x']\n"
    yield "two", b"--- 1\n--- 2\n"
    yield "quotes", b"a: \"x\n  y\nb: 'c\n"
    yield "block", b"inputs:\n  prompt: |+\n    a\n    b\n\n  text: >-\n    c\n"
    yield "flow", b"{" * 40 + b"}" * 40
    yield "bom", b"\xef\xbb\xbfjob_type: T2I\r\nworkflow_id: x\r\n"


def registry(data: bytes) -> None:
    """`workflows.yaml`."""
    path = written("workflows.yaml", data)
    read = WorkflowRegistry(root=str(scratch()), workflows_file=str(path), shipped=workflows.names)
    with only_ours():
        for name in [*read.entries()][:5]:
            with only_ours():
                read.resolve(name)
        read.names()
    read.marks()


def _registry_seeds() -> Seeds:
    yield (
        "one",
        b"""\
wf_realistic_portrait:
  template_path: "workflows/wf_realistic_portrait.json"
  required_inputs: ["prompt", "seed", "steps"]
  inputs: {prompt: 6.text, seed: 3.seed}
  description: "Portraits that look like photographs"
""",
    )
    yield "home", b'a: {template_path: ~nobody-of-that-name/x.json}\nb: {template_path: "x\\0y"}\n'


# --- settings and credentials -------------------------------------------------------------------------------

_NAMES: Final = frozenset(variable.name for variable in VARIABLES)


def credentials(data: bytes) -> None:
    """`credentials.txt`, and the settings that come of it."""
    entries, without_colon = parse_credentials(data)
    for entry in entries.values():
        demand(len(entry.value) < 12 or entry.value not in repr(entry), "a value is shown")
    demand(all(line > 0 for line in without_colon.values()), "line 0")
    path = written("credentials.txt", data)
    _settings({"RUNCOMFY_CREDENTIALS_FILE": str(path)})


def variables(data: bytes) -> None:
    """The environment."""
    env: dict[str, str] = {"RUNCOMFY_CREDENTIALS_FILE": os.devnull}
    for line in data.decode("utf-8", "surrogateescape").split("\n")[:60]:
        name, equals, value = line.partition("=")
        if equals and name in _NAMES and "\0" not in value:
            env[name] = value
    _settings(env)


def _settings(env: Mapping[str, str]) -> None:
    whole = {"HOME": str(scratch()), "XDG_CONFIG_HOME": str(scratch() / "config"), **env}
    try:
        found: Settings = load_settings(env=whole, cwd=scratch(), require_cloud=True)
    except RunComfyError as error:
        plain(foreign_text(error.message, 3_900), "a problem with settings")
        without_secrets(f"{error.message} {error.hint} {error.details}", "a problem with settings")
        return
    without_secrets(repr(found.cloud.tokens), "the settings")
    demand(math.isfinite(found.cloud.requests_per_second) and found.cloud.requests_per_second > 0, "a rate of nothing")
    for span in (found.cloud.duration, found.cloud.run_lease, found.comfy.stall_timeout, found.comfy.poll_interval):
        demand(timedelta(0) <= span < FAR, f"a duration of {span}")


def _credentials_seeds() -> Seeds:
    yield "whole", f'userID: u-1\nRUNCOMFY_API_TOKEN: "{TOKEN}"\nversion_id: v-1\n'.encode()
    yield "second", f"# mine\r\nuserid:u\r\nRUNCOMFY_API_TOKEN:{TOKEN}\r\nRUNCOMFY_API_TOKEN_2:{TOKEN}2\r\n".encode()
    yield "utf-16", f"userID: u-1\nRUNCOMFY_API_TOKEN: {TOKEN}\n".encode("utf-16")
    yield "bearer", f"RUNCOMFY_API_TOKEN: Bearer {TOKEN}\nuserID your-user-id".encode()
    yield "address", b"RUNCOMFY_API_BASE_URL: http://[::1\nuserID: a/b"


def _variable_seeds() -> Seeds:
    base = f"RUNCOMFY_USER_ID=u\nRUNCOMFY_API_TOKEN={TOKEN}\nRUNCOMFY_WORKFLOW_VERSION_ID=v\n"
    yield "base", base.encode()
    for value in (
        "1",
        "-1",
        "1e999",
        "nan",
        "10m",
        "99999999d",
        "true",
        "a,b",
        "http://[",
        "https://a:99999/",
        "\u0661",
    ):
        lines = "".join(f"{name}={value}\n" for name in sorted(_NAMES) if "TOKEN" not in name)
        yield f"all-{foreign_text(value, 6).replace('/', '_')}", f"{base}{lines}".encode()[:8_000]


# --- tables and words ---------------------------------------------------------------------------------------


def trace(data: bytes) -> None:
    """A recorded trace for the replay."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return
    import csv

    for seconds in (None, 5.0):
        with only_ours(csv.Error):
            read = read_trace(text.split("\n"), service_s=seconds)
            demand(all(0 <= job.at < 1e9 and 0 < job.service_s <= 86_400 for job in read.jobs), "an absurd job")
            for stream in STREAMS:
                draw(read, stream, seed=1)


def _trace_seeds() -> Seeds:
    yield "whole", b"arrival_s,service_s,user,workflow\n0,10,a,w\n5.5,20,b,w\n1e3,0,a,\n"
    yield "no-times", b"user,arrival_s\na,1\n,2\n"
    yield "quotes", b'arrival_s,service_s,user\n1,2,"a\nb"\n"3,4\n'
    yield "spaces", b" arrival_s , service_s \n1,2\n"


_GRAPH: Final = Workflow.parse(
    {
        "3": {"class_type": "KSampler", "inputs": {"seed": 1, "cfg": 7.5, "name": "text", "image": ["4", 0]}},
        "4": {"class_type": "LoadImage", "inputs": {"image": "a.png"}, "_meta": {"title": "a.b"}},
    }
)


def words(data: bytes) -> None:
    """The command line: `--set TARGET=VALUE`, durations, moments, names of files."""
    text = data.decode("utf-8", "surrogateescape")
    key, _, value = text.partition("=")
    for current in (None, "text", 3):
        with only_ours():
            json.dumps(parse_value(value, current, _GRAPH.graph), allow_nan=False)
    for target in (key, "3.cfg", "a.b.image"):
        with only_ours():
            bound = bind(_GRAPH, None, JobRequest("w", sets={target: value}), random_int=_first)
            json.dumps(bound.graph, allow_nan=False)
    with only_ours():
        span = parse_duration(text)
        demand(timedelta(0) <= span < FAR and parse_duration(show_duration(span)) == span, f"a duration of {span}")
        show_span(span)
    with only_ours():
        parse_when(text, now=START)
    with only_ours():
        demand(abs(moment(text, now=START) - START) < FAR, "a moment far away")
    name = safe_name(text)
    demand(name and name not in (".", "..") and not set(name) & set("/\\\0:") and len(name.encode()) <= 255, repr(name))
    with only_ours():
        path = checked_out_file(text, str(scratch()), str(scratch() / "finished"))
        demand(Path(path).is_relative_to(scratch() / "finished"), f"leads to {path}")
    plain(foreign_text(text), "foreign text", limit=256)


def _words_seeds() -> Seeds:
    for number, text in enumerate(
        (
            "3.cfg=7",
            "3.cfg=1e999",
            '3.image=["4",0]',
            "3.name=@@a",
            '+3.new={"a":[1]}',
            "a.b.image=@x.png",
            "1h30m",
            "90",
            "0.5s",
            "7d",
            "2026-05-01",
            "2026-05-01T12:00+14:00",
            "0001-01-01",
            "99999999999999999999d",
            "NaN",
            "finished/../../x",
            "finished/a/b.png",
            "con.png",
            "a" * 300,
            "\u202ea\x1b[31m",
            "\uff0f\uff0e\uff0e",
            "[" * 995,
        )
    ):
        yield f"{number:02}", text.encode()


def paths(data: bytes) -> None:
    """A workflow's name or path on the command line."""
    text = data.decode("utf-8", "surrogateescape")
    loads: Callable[[str], tuple[str | bytes, str | None, str]] = WorkflowFiles(workflows.names, workflows.load)
    before = Path.cwd()
    os.chdir(scratch())
    try:
        with only_ours():
            found = loads(text)
            demand(len(found) == 3, "no workflow")
    finally:
        os.chdir(before)


def _path_seeds() -> Seeds:
    for number, text in enumerate(
        (
            "flux_image",
            "./a.json",
            "~nobody-of-that-name/a.json",
            "a\0b.json",
            "x" * 5_000 + ".json",
            "/dev/zero",
            "/dev/shm",  # noqa: S108
            "//",
            "~",
        )
    ):
        yield f"{number}", text.encode()


TARGETS: Final = (
    Target(
        "workflow",
        workflow,
        _workflow_seeds,
        share=15,
        max_bytes=6_000,
        words=("class_type", "inputs", "_meta", "title", "__value__", "prompt", "seed", "noise_seed"),
    ),
    Target(
        "sidecar",
        sidecar,
        _sidecar_seeds,
        share=6,
        max_bytes=6_000,
        is_json=False,
        words=("[inputs.", "[seeds.", "[outputs.", "[[models]]", "[[packs]]", "targets = [", "minimum = ", "kind = "),
    ),
    Target(
        "job_file",
        job_file,
        _job_seeds,
        share=20,
        words=(
            "job_type: ",
            "workflow_id: ",
            "inputs:",
            "outputs:",
            "file_path: ",
            "retry_limit: ",
            "timeout: ",
            "metadata: ",
            "*a",
            "&a",
            "!!",
            "<<: ",
            "|+",
            "---",
        ),
    ),
    Target("registry", registry, _registry_seeds, share=8, is_json=False, words=("template_path", "required_inputs")),
    Target(
        "credentials",
        credentials,
        _credentials_seeds,
        share=4,
        is_json=False,
        words=("RUNCOMFY_API_TOKEN:", "userID:", "version_id:", "RUNCOMFY_API_BASE_URL:", "\xef\xbb\xbf"),
    ),
    Target(
        "variables",
        variables,
        _variable_seeds,
        share=2,
        is_json=False,
        max_bytes=8_000,
        words=tuple(f"{name}=" for name in sorted(_NAMES)),
    ),
    Target("trace", trace, _trace_seeds, share=10, is_json=False, words=("arrival_s", "service_s", "user", "workflow")),
    Target("words", words, _words_seeds, share=15, max_bytes=1_024, is_json=False),
    Target("paths", paths, _path_seeds, share=4, max_bytes=512, is_json=False),
)
