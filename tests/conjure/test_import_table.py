"""
Which module an import finds when this product is installed beside CONJURE: its own, ours, or both in one package.

CONJURE's folders are stood in for by a skeleton. Real interpreters are started as CONJURE starts its own: a script run
from `launcher/` that appends the project's root to the path, programs and tests run from the root with the root first,
the API server as a child whose working directory is the root.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.swap import find_project, install, uninstall

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.processes

SKELETON = {
    "launcher/config.py": "GENERATION_MODE = 'local'\nOWNER = 'conjure'\n",
    "launcher/subprocess_manager.py": "class SubprocessManager:\n    owner = 'conjure'\n",
    "launcher/state_manager.py": "import json, os\nclass StateManager:\n    owner = 'conjure'\n",
    "launcher/instruction_manager.py": "class InstructionManager:\n    owner = 'conjure'\n",
    "launcher/backend_agent.py": "from launcher.config import OWNER\nclass BackendAgent:\n    owner = OWNER\n",
    "launcher/voice_processor.py": "class VoiceProcessor:\n    owner = 'conjure'\n",
    "launcher/session_cleaner.py": "OWNER = 'conjure'\ndef clean_session(): return 'cleaned'\n",
    "launcher/utils.py": "OWNER = 'conjure'\n",
    "launcher/main.py": "OWNER = 'conjure'\n",
    "launcher/generation_services.py": "OWNER = 'conjure'\ndef get_generation_service(mode='local'): return 'theirs'\n",
    "launcher/local_comfyui_service.py": "OWNER = 'conjure'\nclass LocalComfyUIService: ...\n",
    "comfyui/api_wrapper.py": "OWNER = 'conjure'\ndef load_workflow(path): return {}\n",
    "runcomfy/demo_dev_workflow.py": "OWNER = 'conjure'\n",
    "runcomfy/runcomfy_client.py": "OWNER = 'conjure'\nclass RunComfyAPIClient: ...\n",
    "runcomfy/dev_server_state.py": "OWNER = 'conjure'\nclass DevServerStateManager: ...\nclass DevServerState: ...\n",
    "runcomfy/dev_server_startup.py": "print('their own')\n",
    "runcomfy/serverless_service.py": "OWNER = 'conjure'\n",
    "runcomfy/workflows/generate_flux_mesh.json": "{}\n",
    "runcomfy/context/notes.txt": "",
    "data/input/state.json": "{}\n",
}
"""With what CONJURE's second revision has, reduced to the names that others import."""

PROBE = """
import importlib, json, os, sys
from pathlib import Path
HERE = Path(__file__).resolve().parent
ROOT = str(HERE.parent if HERE.name in ("launcher", "runcomfy") else HERE)
{path}
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path({ours!r})] + [{ours!r}] * {installed}
{order}
def where(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return "fails: " + str(error)
    file = str(Path(module.__file__).resolve())
    if file.startswith(ROOT + os.sep):
        return "conjure"
    return "ours" if file.startswith({ours!r} + os.sep) else file
answers = {{name: where(name) for name in {names!r}}}
{more}
print(json.dumps(answers))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "CONJURE"
    for name, text in SKELETON.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


THEIRS = (
    "launcher.config",
    "launcher.subprocess_manager",
    "launcher.state_manager",
    "launcher.instruction_manager",
    "launcher.backend_agent",
    "launcher.voice_processor",
    "launcher.session_cleaner",
    "launcher.utils",
    "runcomfy.demo_dev_workflow",
    "comfyui.api_wrapper",
)
"""What this product does not have; an installed copy must not hide it."""

OURS = (
    "launcher.generation_services",
    "launcher.local_comfyui_service",
    "runcomfy.runcomfy_client",
    "runcomfy.runcomfy_orchestrator",
    "runcomfy.comfyui_workflow_client",
    "runcomfy.dev_server_state",
    "runcomfy.dev_server_startup",
    "runcomfy.workflow_progress_tracker",
)

BARE = ("config", "subprocess_manager", "state_manager", "instruction_manager", "backend_agent", "session_cleaner")


def run(script: Path, *, cwd: Path, arguments: tuple[str, ...] = ()) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def probe(*names: str, root_first: bool, installed: bool = True, more: str = "") -> str:
    """Return a script that says which file each import finds. This product is installed behind the standard library."""
    return PROBE.format(
        path="sys.path.append(ROOT)" if not root_first else "sys.path.insert(0, ROOT)",
        order="sys.path.append(sys.path.pop(sys.path.index(ROOT)))" if not root_first else "",
        ours=str(ROOT),
        installed=int(installed),
        names=names,
        more=more,
    )


@pytest.mark.parametrize("cwd", ["launcher", "."])
def test_a_script_in_launcher_finds_ours_where_it_is_ours_and_conjures_everywhere_else(project: Path, cwd: str) -> None:
    script = project / "launcher" / "a_script.py"
    script.write_text(probe(*THEIRS, *OURS, *BARE, root_first=False), encoding="utf-8")
    found = run(script, cwd=project / cwd)
    assert {name: found[name] for name in (*THEIRS, *BARE)} == dict.fromkeys((*THEIRS, *BARE), "conjure")
    assert {name: found[name] for name in OURS} == dict.fromkeys(OURS, "ours")


def test_with_the_root_first_on_the_path_it_is_the_same(project: Path) -> None:
    """CONJURE's tests run from the root: its folders come first, and are no packages; ours is, and wins."""
    script = project / "test_like.py"
    script.write_text(probe(*THEIRS, *OURS, root_first=True), encoding="utf-8")
    found = run(script, cwd=project)
    assert {name: found[name] for name in THEIRS} == dict.fromkeys(THEIRS, "conjure")
    assert {name: found[name] for name in OURS} == dict.fromkeys(OURS, "ours")


def test_a_script_in_runcomfy_finds_ours(project: Path) -> None:
    script = project / "runcomfy" / "a_script.py"
    script.write_text(probe(*OURS, "launcher.config", "runcomfy.demo_dev_workflow", root_first=False), encoding="utf-8")
    found = run(script, cwd=project)
    assert {name: found[name] for name in OURS} == dict.fromkeys(OURS, "ours")
    assert found["launcher.config"] == found["runcomfy.demo_dev_workflow"] == "conjure"


def test_without_this_product_conjure_is_as_it_was(project: Path) -> None:
    script = project / "launcher" / "a_script.py"
    names = ("launcher.config", "launcher.generation_services", "runcomfy.runcomfy_client")
    script.write_text(probe(*names, root_first=False, installed=False), encoding="utf-8")
    found = run(script, cwd=project)
    assert found == dict.fromkeys(names, "conjure")


API_SERVER = """
import json, os, sys
sys.path.append(os.path.abspath(os.path.join(os.path.dirname(__file__), "..")))
from state_manager import StateManager
from instruction_manager import InstructionManager
from backend_agent import BackendAgent
from generation_services import get_generation_service
import generation_services
import launcher.config as config
try:
    from runcomfy.workflow_progress_tracker import progress_tracker
except ImportError:
    progress_tracker = None
import launcher.generation_services as packaged
from launcher.local_comfyui_service import LocalComfyUIService
print(json.dumps({
    "owners": [StateManager.owner, InstructionManager.owner, BackendAgent.owner, config.OWNER],
    "ours": get_generation_service.__module__.startswith("launcher.conjure"),
    "one": get_generation_service is packaged.get_generation_service
        and getattr(generation_services, "GenerationService", 0) is getattr(packaged, "GenerationService", 1),
    "local": LocalComfyUIService.__module__.startswith("launcher.conjure"),
    "subclass": issubclass(LocalComfyUIService, getattr(generation_services, "GenerationService", int)),
    "tracker": type(progress_tracker).__name__,
}))
"""


@pytest.mark.parametrize("cwd", [".", "launcher"])
def test_the_api_server_gets_our_services_by_their_bare_name_once_installed(project: Path, cwd: str) -> None:
    """Bare imports find files in CONJURE's folder only; there is one class of each name, however it was imported."""
    script = project / "launcher" / "api_server.py"
    script.write_text(API_SERVER, encoding="utf-8")
    before = run(script, cwd=project / cwd)
    assert before["owners"] == ["conjure"] * 4
    assert not before["ours"]
    install(find_project(project))
    assert run(script, cwd=project / cwd) == {
        "owners": ["conjure"] * 4,
        "ours": True,
        "one": True,
        "local": True,
        "subclass": True,
        "tracker": "FluxMeshProgressTracker",
    }
    uninstall(find_project(project))
    assert run(script, cwd=project / cwd) == before


def test_conjures_way_to_launch_the_child_finds_them_too(project: Path) -> None:
    (project / "launcher" / "api_server.py").write_text(API_SERVER, encoding="utf-8")
    install(find_project(project))
    parent = project / "launcher" / "main.py"
    parent.write_text(
        "import os, subprocess, sys\n"
        "root = os.path.abspath(os.path.join(os.path.dirname(__file__), '..'))\n"
        "sys.path.append(root)\n"
        "from launcher.subprocess_manager import SubprocessManager\n"
        "from launcher.state_manager import StateManager\n"
        "from session_cleaner import clean_session\n"
        "assert SubprocessManager.owner == StateManager.owner == 'conjure' and clean_session() == 'cleaned'\n"
        "child = subprocess.run([sys.executable, os.path.join('launcher', 'api_server.py')], cwd=root, check=True,\n"
        "                       capture_output=True, text=True)\n"
        "print(child.stdout)\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(parent)], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ours"] is True


def test_the_dev_servers_script_is_ours_once_installed(project: Path) -> None:
    command = [sys.executable, str(project / "runcomfy" / "dev_server_startup.py"), "--help"]
    theirs = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout
    assert theirs == "their own\n"
    install(find_project(project))
    ours = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout
    for flag in ("--server-type", "--duration", "--no-interactive", "--status", "--shutdown", "--restart"):
        assert flag in ours


@pytest.mark.parametrize(
    ("shim", "names"),
    [
        ("launcher/generation_services.py", ("get_generation_service", "CloudGenerationService")),
        ("launcher/local_comfyui_service.py", ("LocalComfyUIService",)),
        ("runcomfy/dev_server_startup.py", ("DevServerManager", "main")),
    ],
)
def test_our_files_say_what_is_missing_where_this_product_is_not_installed(
    project: Path, shim: str, names: tuple[str, ...]
) -> None:
    install(find_project(project))
    folder, _, file = shim.partition("/")
    script = project / folder / "a_script.py"
    module = file.removesuffix(".py")
    script.write_text(probe(module, root_first=False, installed=False), encoding="utf-8")
    assert "runcomfy-orchestrator is not installed" in run(script, cwd=project)[module]
    script.write_text(
        probe(
            module,
            root_first=False,
            more=f"import {module}; answers['has'] = [hasattr({module}, n) for n in {names!r}]",
        ),
        encoding="utf-8",
    )
    assert all(run(script, cwd=project)["has"])


@pytest.mark.parametrize("folder", ["launcher", "runcomfy"])
def test_none_of_our_modules_takes_a_name_of_conjures_or_of_the_standard_library(folder: str) -> None:
    kept = {
        "config", "state_manager", "subprocess_manager", "instruction_manager", "backend_agent", "voice_processor",
        "session_cleaner", "conversational_agent", "utils", "gui", "hand_tracker",
    }  # fmt: skip
    ours = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    if folder == "launcher":
        assert not ours & kept
    assert not ours & set(sys.stdlib_module_names)
