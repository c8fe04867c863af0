"""Threat S1: a server's names are data; every name on this disk is made here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.adapters.results import DiskResults, final_names
from runcomfy.domain.job import JobId, OutputKind
from runcomfy.domain.settings import FileSettings
from runcomfy.ports.results import JobFolder, Media, ResultFile
from runcomfy.testing import samples

PNG = samples.png()


@pytest.fixture
def results(tmp_path: Path) -> DiskResults:
    return DiskResults(FileSettings(state_dir=str(tmp_path / "state")))


def download(folder: JobFolder, content: bytes) -> str:
    """What the ComfyUI client does: a new file under the partial name."""
    partial = folder.partial()
    with Path(partial).open("xb") as file:
        file.write(content)
    return partial


def as_result(partial: str, media: Media, node: str = "9", file_name: str = "", remote_name: str = "") -> ResultFile:
    content = Path(partial).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return ResultFile(
        partial, node, media, len(content), digest, name="picture", file_name=file_name, remote_name=remote_name
    )


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def named(kind: OutputKind, extension: str, wanted: str = "", node: str = "9", remote: str = "") -> ResultFile:
    return ResultFile("p", node, Media(kind, "x/y", extension), 1, "", file_name=wanted, remote_name=remote)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (named(OutputKind.IMAGE, ".png", "flux.png"), "flux.png"),
        (named(OutputKind.IMAGE, ".webp", "flux.png"), "flux.webp"),
        (named(OutputKind.IMAGE, ".png", "flux"), "flux.png"),
        (named(OutputKind.MESH, ".glb", "partpacker_result_0.glb"), "partpacker_result_0.glb"),
        (named(OutputKind.IMAGE, ".png"), "9-1.png"),
        (named(OutputKind.IMAGE, ".png", node="57:8"), "57_8-1.png"),
        (named(OutputKind.IMAGE, ".png", node="../.."), "node-1.png"),
        (named(OutputKind.TEXT, ".txt", "table.csv"), "table.csv"),
        (named(OutputKind.TEXT, ".txt", "page.html"), "page.txt"),
        (named(OutputKind.TEXT, ".txt", "run.sh"), "run.txt"),
        (named(OutputKind.FILE, ".bin", remote="mesh/scan.ksplat"), "9-1.ksplat"),
        (named(OutputKind.FILE, ".zip", "model.usdz"), "model.usdz"),
        (named(OutputKind.FILE, ".bin", "setup.exe"), "setup.bin"),
        (named(OutputKind.FILE, ".bin", remote="x.png"), "9-1.bin"),
        (named(OutputKind.IMAGE, ".png", "manifest.json"), "manifest.png"),
        (named(OutputKind.TEXT, ".txt", "manifest.json"), "manifest-1.json"),
    ],
)
def test_the_content_decides_the_ending(file: ResultFile, name: str) -> None:
    assert final_names([file], {"manifest.json"}) == [name]


def test_names_that_would_meet_are_counted() -> None:
    files = [named(OutputKind.IMAGE, ".png", "flux.png"), named(OutputKind.IMAGE, ".png", "FLUX.PNG")]
    files += [named(OutputKind.IMAGE, ".png"), named(OutputKind.IMAGE, ".png"), named(OutputKind.MESH, ".glb")]
    assert final_names(files, set()) == ["flux.png", "FLUX-1.png", "9-1.png", "9-2.png", "9-3.glb"]


@given(
    st.lists(
        st.builds(
            named,
            st.sampled_from(OutputKind),
            st.sampled_from([".png", ".txt", ".bin"]),
            st.text(st.characters(exclude_categories=()), max_size=30),
            st.text(st.characters(exclude_categories=()), max_size=10),
        ),
        max_size=12,
    )
)
@pytest.mark.threat("S1")
def test_any_names_become_plain_ones_that_do_not_meet(files: list[ResultFile]) -> None:
    made = final_names(files, {"manifest.json"})
    assert len({name.casefold() for name in [*made, "manifest.json"]}) == len(files) + 1
    assert all(Path(name).name == name and not name.startswith(".") for name in made)


HOSTILE = [
    "../../x", "..", ".", "", "/etc/passwd", "//server/share/x", "\\\\server\\share\\x", "C:\\x", "C:x",
    "c:/windows/x", "..\\..\\x", "..%2f..%2fx", "%2e%2e/x", "x/../../y", "./x", "x/", "/", "\\", "~", "~root/x",
    "$HOME/x", "`id`", "$(id)", "x;rm -rf .", "-rf", "--help", "|id", "&id", "x\0.png", "\0", "\n", "x\r\ny",
    "\t", "\x1b[2J", "\x7f", "CON", "con.png", "PRN", "AUX.txt", "NUL", "COM1", "com1.glb", "LPT9", "CONIN$",
    "COM¹", "x.", "x ", " x", "...", "x:stream", "x::$DATA", "*", "?", '"', "<x>", "．．／x", "‥/x",
    "\u202egnp.exe", "\ufeffx", "\ud800", "a\u0301", "manifest.json", "MANIFEST.JSON", ".partial-1", ".tmp-x",
    "rejected-1.png", ".htaccess", "x" * 4096, "é" * 4096, "x.png" + "/y" * 2000, "nul.tar.gz",
]  # fmt: skip


def tree(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.threat("S1")
async def test_no_name_leads_out_of_the_folder(results: DiskResults, tmp_path: Path, name: str) -> None:
    """Threat S1: as the server's name, as the wanted name, as the node's id and as the job's."""
    under = tmp_path / "deep" / "outputs"
    (tmp_path / "x").write_text("outside")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x").write_text("outside")
    before = tree(tmp_path)
    folder = await results.open_folder(JobId(name), under=str(under))
    media = None
    files = []
    for wanted in ("", name, name):
        partial = download(folder, PNG)
        media = media or await folder.inspect(partial)
        files.append(as_result(partial, media, node=name, file_name=wanted, remote_name=name))
    outputs = await folder.commit(files, {"job": name.encode("utf-8", "replace").decode()})

    after = tree(tmp_path)
    inside = Path(folder.path).relative_to(tmp_path)
    assert inside.parent == Path("deep/outputs")
    changed = {path for path in after if after[path] != before.get(path, b"\0missing")}
    expected = {
        "deep/outputs",
        str(inside),
        *(str(inside / Path(o.path).name) for o in outputs),
        str(inside / "manifest.json"),
    }
    assert changed == expected
    assert before.keys() <= after.keys()
    assert all(
        Path(output.path).parent == Path(folder.path) and sha256(output.path) == output.sha256 for output in outputs
    )
    assert len({output.path for output in outputs}) == 3
    manifest = json.loads((Path(folder.path) / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["outputs"][0]["remote_name"] == name[:4096]
