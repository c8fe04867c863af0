"""The built page is what its sources say, small, and needs nothing from elsewhere. No Node is needed to tell."""

import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WEB = ROOT / "web"
BUILT = ROOT / "launcher" / "dashboard"
MOST_BYTES = 300_000
"""Of everything but the 3D viewer, which only who looks at a mesh fetches."""


def sources() -> list[str]:
    paths = [path.relative_to(WEB) for path in WEB.rglob("*") if path.is_file()]
    kept = [path for path in paths if not any(part == "node_modules" or part.startswith(".") for part in path.parts)]
    return sorted((path.as_posix() for path in kept), key=str.encode)


def fingerprint() -> str:
    whole = hashlib.sha256()
    for path in sources():
        content = (WEB / path).read_bytes().replace(b"\r\n", b"\n")
        whole.update(f"{path}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return whole.hexdigest()


def test_the_built_page_is_of_these_sources() -> None:
    built_of = (BUILT / "sources.sha256").read_text().strip()
    assert built_of == fingerprint(), (
        "launcher/dashboard/ was built of other sources than web/ holds now: run `make web` (it needs Node) and commit "
        "what it writes"
    )


def test_the_page_without_the_3d_viewer_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in BUILT.rglob("*") if path.is_file()}
    viewer = [name for name in sizes if re.fullmatch(r"mesh-[\w-]+\.js", name)]
    assert len(viewer) == 1, f"the 3D viewer is one chunk of its own: {viewer}"
    rest = sum(size for name, size in sizes.items() if name not in viewer)
    assert rest < MOST_BYTES, f"the page has {rest:,} bytes without the 3D viewer, {MOST_BYTES:,} are allowed: {sizes}"


def test_the_page_names_only_its_own_files() -> None:
    html = (BUILT / "index.html").read_text(encoding="utf-8")
    named = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert named
    for path in named:
        assert path.startswith("/assets/"), f"{path} is not the page's own"
        assert (BUILT / path.removeprefix("/")).is_file(), f"{path} was not built"
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", html), (
        "the page's policy allows nothing inline"
    )
    for sheet in BUILT.glob("assets/*.css"):
        assert not re.search(r"@import|url\((?!['\"]?data:)", sheet.read_text(encoding="utf-8")), sheet.name


def test_the_lock_file_names_every_package_by_its_digest_and_no_place_to_get_it() -> None:
    lock = json.loads((WEB / "package-lock.json").read_text(encoding="utf-8"))
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert packages
    assert [name for name, entry in packages.items() if "integrity" not in entry] == []
    assert [name for name, entry in packages.items() if "resolved" in entry] == []
    wanted = json.loads((WEB / "package.json").read_text(encoding="utf-8"))
    exact = {**wanted["dependencies"], **wanted["devDependencies"]}
    assert [f"{name} {version}" for name, version in exact.items() if not re.fullmatch(r"\d+\.\d+\.\d+", version)] == []
