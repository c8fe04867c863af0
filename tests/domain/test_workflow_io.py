"""Results in a server's history, held against what 27 kinds of real output nodes reported (recording 13)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.exceptions import OutputMissing
from runcomfy.domain.job import FileRef, OutputKind
from runcomfy.domain.workflow_io import DeclaredOutput, FoundOutput, find_outputs, guess_kind, match_declared

RECORDING = Path(__file__).parents[1] / "recordings" / "13-output-kinds.jsonl"
IMAGE, MESH, VIDEO = OutputKind.IMAGE, OutputKind.MESH, OutputKind.VIDEO
AUDIO, TEXT, FILE = OutputKind.AUDIO, OutputKind.TEXT, OutputKind.FILE


def recorded() -> dict[str, dict[str, Any]]:
    """What is being shown -> the `outputs` of the history entry that followed."""
    found: dict[str, dict[str, Any]] = {}
    note = ""
    for line in RECORDING.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["dir"] == "note":
            note = entry["text"]
        elif entry["dir"] == "http-res" and isinstance(entry.get("json"), dict):
            for value in entry["json"].values():
                if isinstance(value, dict) and "outputs" in value and "prompt" in value:
                    found[note] = value["outputs"]
    return found


OUTPUTS = recorded()


def brief(outputs: Any) -> list[tuple[str, str, OutputKind, str]]:
    return [
        (
            item.node_id,
            item.key,
            item.kind,
            f"{item.file.type}:{item.file.subfolder}/{item.file.filename}" if item.file else f"text:{item.text}",
        )
        for item in find_outputs(outputs)
    ]


@pytest.mark.parametrize(
    ("note", "found"),
    [
        ("SaveAnimatedWEBP", [("9", "images", IMAGE, "output:probe/k_webp_00002_.webp")]),
        ("SaveAnimatedPNG", [("9", "images", IMAGE, "output:probe/k_apng_00002_.png")]),
        ("SaveWEBM", [("9", "images", VIDEO, "output:probe/k_webm_00002_.webm")]),
        ("SaveVideo", [("9", "images", VIDEO, "output:probe/k_video_00003_.mp4")]),
        ("SaveAudio (flac)", [("9", "audio", AUDIO, "output:probe/k_flac_00002.flac")]),
        ("SaveAudioMP3", [("9", "audio", AUDIO, "output:probe/k_mp3_00002.mp3")]),
        ("SaveAudioOpus", [("9", "audio", AUDIO, "output:probe/k_opus_00001.opus")]),
        ("PreviewAudio (temp)", [("9", "audio", AUDIO, "temp:/ComfyUI_temp_oulpu_00001.flac")]),
        ("SaveGLB from a MESH", [("9", "3d", MESH, "output:mesh/k_glb_00002_.glb")]),
        ("MeshToFile3D + SaveGLB", [("9", "3d", MESH, "output:mesh/k_file3d_00002_.glb")]),
        ("Preview3D", [("9", "result", MESH, "output:/preview3d_9ba7093419fb4581905c8a734df66608.glb")]),
        ("Save3DAdvanced", [("9", "result", MESH, "output:mesh/k_adv_00002.glb")]),
        (
            "SaveText",
            [
                ("9", "text", TEXT, "text:hello 6df528f5-60a2-4578-aa99-90a39b868300"),
                ("9", "files", TEXT, "output:probe/k_text_00002.txt"),
            ],
        ),
        ("SaveLatent", [("9", "latents", FILE, "output:probe/k_latent_00002_.latent")]),
        ("PreviewAny of a string", [("9", "text", TEXT, "text:hello c41ae555-83dd-4252-b572-2f47145c6641")]),
        ("ProbeNoUi: an output node without ui", []),
        ("filename_prefix that leaves the output folder: an execution error", []),
    ],
)
def test_every_kind_of_output_node_is_understood(note: str, found: list[tuple[str, str, OutputKind, str]]) -> None:
    assert brief(OUTPUTS[note]) == found


def test_batches_are_counted_through_and_both_sides_of_a_comparison_taken() -> None:
    batch = find_outputs(OUTPUTS["SaveImage, batch of 6"])
    assert [item.index for item in batch] == list(range(6))
    compared = find_outputs(OUTPUTS["ImageCompare"])
    assert [item.key for item in compared] == ["a_images"] * 6 + ["b_images"] * 6
    assert {item.file.type for item in compared if item.file} == {"temp"}
    texts = find_outputs(OUTPUTS["GetMeshInfo + PreviewAny"])
    assert [item.node_id for item in texts] == ["3", "9"]
    [odd, *_] = find_outputs(OUTPUTS["date and node placeholders in filename_prefix"])
    assert odd.file == FileRef("2026-64x64_00007_.png", "probe/%date:yyyy-MM-dd%", "output")


def test_no_recorded_file_is_overlooked() -> None:
    for note, outputs in OUTPUTS.items():
        names = {item.file.filename for item in find_outputs(outputs) if item.file}
        told = json.dumps(outputs)
        assert told.count('"filename"') <= len([item for item in find_outputs(outputs) if item.file]), note
        assert all(name in told for name in names), note
    assert len(OUTPUTS) >= 25


@pytest.mark.parametrize(
    ("ui", "found"),
    [
        ({"gifs": [{"filename": "a.mp4", "subfolder": "", "type": "output", "format": "video/h264-mp4"}]}, [VIDEO]),
        ({"gifs": [{"filename": "a", "type": "temp"}]}, [VIDEO]),
        ({"video": {"filename": "a.webm", "subfolder": "v", "type": "output"}}, [VIDEO]),
        ({"model_file": ["sub\\mesh.OBJ"]}, [MESH]),
        ({"deep": {"er": [[{"filename": "x.png", "subfolder": None, "type": "output"}]]}}, [IMAGE]),
        ({"images": [{"filename": "in.png", "subfolder": "", "type": "input"}]}, []),
        ({"images": [{"filename": "x.png"}, {"type": "output"}, {"filename": 3, "type": "output"}, None, 7]}, []),
        ({"images": [{"filename": "x.png", "type": "output"}] * 3}, [IMAGE]),
        ({"text": ["a", "a", "mesh/x.glb", 3]}, [TEXT, TEXT]),
        ({"text": "bare"}, [TEXT]),
        ({"message": ["just words.", "https://host/x.glb", "no.png", "line\nx.glb", ".glb"]}, []),
        ({"any": [{"filename": "x.unknown", "type": "output"}]}, [FILE]),
        (None, []),
        ([], []),
        ("x.glb", []),
    ],
)
def test_custom_nodes_are_understood_as_far_as_they_make_sense(ui: Any, found: list[OutputKind]) -> None:
    assert [item.kind for item in find_outputs({"5": ui})] == found


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("x.glb", FileRef("x.glb", "")),
        ("mesh/sub/x.glb", FileRef("x.glb", "mesh/sub")),
        ("mesh\\x.glb", FileRef("x.glb", "mesh")),
        ("/srv/comfyui/output/mesh/x.glb", FileRef("x.glb", "mesh")),
        ("C:\\ComfyUI\\output\\x.glb", FileRef("x.glb", "")),
        ("../../x.glb", FileRef("../../x.glb", "")),
        ("mesh//x.glb", FileRef("mesh//x.glb", "")),
        ("/etc/x.glb", None),
        ("C:/x.glb", None),
    ],
)
def test_bare_paths_are_split_for_the_server_and_never_mended(path: str, file: FileRef | None) -> None:
    assert [item.file for item in find_outputs({"1": {"result": [path]}})] == ([file] if file else [])


@pytest.mark.parametrize("name", ["../../x.png", "/etc/passwd", "C:\\x.png", "a\0b.png", "CON", "x" * 4096])
@pytest.mark.threat("S1")
def test_hostile_names_are_kept_as_data(name: str) -> None:
    [found] = find_outputs({"1": {"images": [{"filename": name, "subfolder": "", "type": "output"}]}})
    assert found.file == FileRef(name, "", "output")


def test_the_jobs_apis_names_with_folders_are_split() -> None:
    entry = {"filename": "mesh/x.glb", "type": "output", "subfolder": "", "mediaType": "3d"}
    [found] = find_outputs({"9": {"result": [entry]}})
    assert found.file == FileRef("x.glb", "mesh", "output")


def test_kinds_are_guessed_by_extension_first() -> None:
    assert guess_kind("a.MP4", "images") is VIDEO
    assert guess_kind("a", "images") is IMAGE
    assert guess_kind("folder.v2/a", "3d") is MESH
    assert guess_kind("a.b", "odd") is FILE


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.just("a/b.glb"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["filename", "type", "subfolder", "text", "images", "x"]), inner, max_size=4)
    ),
    max_leaves=15,
)


@pytest.mark.fault(48)
@given(junk | st.dictionaries(st.text(max_size=3), junk, max_size=3))
@pytest.mark.threat("S10")
def test_no_history_whatsoever_makes_it_raise(outputs: Any) -> None:
    for item in find_outputs(outputs):
        assert (item.file is None) is (item.text is not None)


@pytest.mark.fault(48)
def test_hostile_depth_and_size_are_bounded() -> None:
    deep: Any = [{"filename": "x.png", "type": "output"}]
    for _ in range(900):
        deep = [deep]
    assert find_outputs({"1": {"images": deep}}) == []
    many = [{"filename": f"{n}.png", "type": "output"} for n in range(20_000)]
    assert len(find_outputs({"1": {"images": many}})) == 10_000


# --- what was promised ----------------------------------------------------------------------------------------


def file(node_id: str, name: str, key: str = "images", kind: str = "output") -> FoundOutput:
    return FoundOutput(node_id, key, 0, guess_kind(name, key), file=FileRef(name, "", kind))


FLUX = DeclaredOutput("flux", "24", IMAGE, "flux.png", title="EXPORT IMAGE")
MODEL = DeclaredOutput("mesh", "33", MESH, "mesh.glb", title="EXPORTGLB")


def test_promised_results_are_joined_and_the_others_follow() -> None:
    found = [file("33", "m.glb", "3d"), file("7", "p.png", kind="temp"), file("24", "a.png"), file("24", "b.png")]
    matched = match_declared(found, [FLUX, MODEL])
    assert [(m.declared.name if m.declared else "", m.found.file and m.found.file.filename) for m in matched] == [
        ("flux", "a.png"),
        ("mesh", "m.glb"),
        ("", "p.png"),
        ("", "b.png"),
    ]


@pytest.mark.fault(42)
def test_a_missing_promise_names_output_node_and_title() -> None:
    with pytest.raises(OutputMissing, match=r"mesh \(mesh\) from node 33 \(EXPORTGLB\)") as caught:
        match_declared([file("24", "a.png")], [FLUX, MODEL])
    assert caught.value.details["missing"] == [{"name": "mesh", "node": "33", "kind": "mesh"}]
    with pytest.raises(OutputMissing, match="it delivered: image"):
        match_declared([file("24", "a.png"), file("33", "a.png")], [FLUX, MODEL])


@pytest.mark.fault(42)
def test_success_without_any_result_is_no_success() -> None:
    with pytest.raises(OutputMissing, match="without any result"):
        match_declared([], [])
    with pytest.raises(OutputMissing):
        match_declared([], [FLUX])


def test_what_is_not_required_may_be_absent() -> None:
    spare = DeclaredOutput("extra", "50", IMAGE, required=False)
    assert [m.declared for m in match_declared([file("24", "a.png")], [spare, FLUX])] == [FLUX]


def test_a_saved_file_is_preferred_to_a_preview_and_to_shown_text() -> None:
    found = [file("24", "t.png", kind="temp"), file("24", "o.png")]
    assert match_declared(found, [FLUX])[0].found.file == FileRef("o.png")
    wanted = DeclaredOutput("story", "9", TEXT)
    both = [FoundOutput("9", "text", 0, TEXT, text="hello"), file("9", "s.txt", "files")]
    assert match_declared(both, [wanted])[0].found.file == FileRef("s.txt")
    assert match_declared(both[:1], [wanted])[0].found.text == "hello"


def test_a_file_of_unknown_kind_will_do_since_its_content_decides() -> None:
    assert match_declared([file("33", "mesh.bin", "odd")], [MODEL])[0].declared is MODEL
    anything = DeclaredOutput("any", "33", FILE)
    assert match_declared([file("33", "mesh.glb", "3d")], [anything])[0].declared is anything
    shown = FoundOutput("33", "text", 0, TEXT, text="3 vertices")
    with pytest.raises(OutputMissing):
        match_declared([shown], [MODEL])
