"""Where a job file's result may go, and what several results are called there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.exceptions import ValueInvalid
from runcomfy.domain.job import OutputKind
from runcomfy.domain.out_file import Delivered, checked_out_file, names_beside, split_name

ROOT, FINISHED = "/home/u/E3", "/home/u/E3/jobs/finished"
WINDOWS = "C:\\E3", "C:\\E3\\jobs\\finished"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("jobs/finished/image/T2I_20250809123001_1_knight.png", "/image/T2I_20250809123001_1_knight.png"),
        ("./jobs//finished/a.png", "/a.png"),
        ("jobs\\finished\\image\\a.png", "/image/a.png"),
        ("/home/u/E3/jobs/finished/a.png", "/a.png"),
        ("jobs/finished/größe – ü.png", "/größe – ü.png"),
        ("jobs/finished/портрет", "/портрет"),
        ("jobs/finished/a b.v1.5.png", "/a b.v1.5.png"),
        ("jobs/finished/constant.png", "/constant.png"),
        ("jobs/finished/~x.png", "/~x.png"),
    ],
)
def test_a_path_below_the_finished_folder_is_made_absolute(text: str, found: str) -> None:
    assert checked_out_file(text, ROOT, FINISHED) == FINISHED + found
    assert checked_out_file(FINISHED + found, ROOT, FINISHED) == FINISHED + found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("jobs/finished/image/a.png", "\\image\\a.png"),
        ("Jobs\\Finished\\a.png", "\\a.png"),
        ("c:/e3/jobs/finished/a.png", "\\a.png"),
    ],
)
def test_windows_paths_are_windows_paths(text: str, found: str) -> None:
    assert checked_out_file(text, *WINDOWS) == WINDOWS[1] + found


REFUSED = [
    "", "  ", "/etc/passwd", "../x.png", "jobs/finished/../../x.png", "jobs/finished/a/../b.png", "jobs/finished",
    "jobs/finished/", "jobs/finished/image/", "jobs/finishedx/a.png", "x.png", "~/x.png", "~root/jobs/finished/x",
    "C:\\x.png", "C:x.png", "\\\\server\\share\\x.png", "//server/share/x.png", "jobs/finished/a\0.png",
    "jobs/finished/a\n.png", "jobs/finished/\x1b[2J.png", "jobs/finished/gnp\u202egnp.exe", "jobs/finished/\ud800.png",
    "jobs/finished/CON", "jobs/finished/con.png", "jobs/finished/nul.tar.gz", "jobs/finished/COM1.png",
    "jobs/finished/LPT¹.txt", "jobs/finished/aux/a.png", "jobs/finished/a:stream.png", "jobs/finished/a?.png",
    "jobs/finished/a*.png", 'jobs/finished/a".png', "jobs/finished/<a>.png", "jobs/finished/a|b.png",
    "jobs/finished/a.png.", "jobs/finished/a.png /b.png", "jobs/finished/ a.png", "jobs/finished/.work-1/a.png",
    "jobs/finished/.hidden.png", "jobs/finished/" + "a" * 201, "jobs/finished/" + "a/" * 600 + "b.png",
    "jobs/finished/" + "ü" * 101, "JOBS/finished/a.png",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
@pytest.mark.threat("S1")
def test_anything_else_is_refused_before_anything_runs(text: str) -> None:
    """Threat S1."""
    with pytest.raises(ValueInvalid) as caught:
        checked_out_file(text, ROOT, FINISHED)
    assert caught.value.hint
    assert caught.value.message.isprintable()


@given(st.text(st.characters(exclude_categories=()), max_size=60))
@pytest.mark.threat("S1")
def test_whatever_is_written_stays_below_or_is_refused(text: str) -> None:
    for start in ("", "jobs/finished/", FINISHED + "/"):
        try:
            found = checked_out_file(start + text, ROOT, FINISHED)
        except ValueInvalid:
            continue
        below = found.removeprefix(FINISHED + "/")
        assert below != found
        assert not {"", ".", ".."} & set(below.split("/"))


# --- names ------------------------------------------------------------------------------------------------

IMAGE, MESH, VIDEO, AUDIO, TEXT, FILE = (
    OutputKind.IMAGE, OutputKind.MESH, OutputKind.VIDEO, OutputKind.AUDIO, OutputKind.TEXT, OutputKind.FILE
)  # fmt: skip
PNG, WEBP, GLB = Delivered(IMAGE, ".png"), Delivered(IMAGE, ".webp"), Delivered(MESH, ".glb")
MP4, WEBM, MP3 = Delivered(VIDEO, ".mp4"), Delivered(VIDEO, ".webm"), Delivered(AUDIO, ".mp3")
TXT = Delivered(TEXT, ".txt", frozenset({".csv", ".json"}))
PREVIEW = Delivered(IMAGE, ".png", passing=True)
PROMISED = Delivered(IMAGE, ".png", declared=True)


@pytest.mark.parametrize(
    ("wanted", "results", "names"),
    [
        # one result
        ("knight.png", [PNG], ["knight.png"]),
        ("knight.PNG", [PNG], ["knight.PNG"]),
        ("knight.jpeg", [Delivered(IMAGE, ".jpg")], ["knight.jpeg"]),
        ("knight.png", [WEBP], ["knight.webp"]),
        ("knight.png", [GLB], ["knight.glb"]),
        ("knight", [PNG], ["knight.png"]),
        ("knight_v1.5", [PNG], ["knight_v1.5.png"]),
        ("table.csv", [TXT], ["table.csv"]),
        ("page.html", [TXT], ["page.html.txt"]),
        ("setup.exe", [Delivered(FILE, ".bin", frozenset({".ply"}))], ["setup.exe.bin"]),
        ("voice.ogg", [Delivered(AUDIO, ".opus")], ["voice.ogg"]),
        ("clip.mp4", [WEBM], ["clip.webm"]),
        # several, and the ending tells which one was meant
        ("k.png", [PNG, GLB], ["k.png", "k_2.glb"]),
        ("k.glb", [PNG, GLB, PNG], ["k_2.png", "k.glb", "k_3.png"]),
        ("k.glb", [PNG, PNG, GLB], ["k_2.png", "k_3.png", "k.glb"]),
        ("k.mp4", [PNG, WEBM, MP3], ["k_2.png", "k.webm", "k_3.mp3"]),
        ("k.wav", [MP4, MP3], ["k_2.mp4", "k.mp3"]),
        ("k.png", [PNG, PREVIEW, PREVIEW], ["k.png", "k_2.png", "k_3.png"]),
        ("k.png", [PREVIEW, PREVIEW, PNG], ["k_2.png", "k_3.png", "k.png"]),
        ("k.png", [PNG, PROMISED], ["k_2.png", "k.png"]),
        # several, and nothing tells
        ("k.png", [PNG, PNG], ["k_1.png", "k_2.png"]),
        ("k.png", [PNG, PNG, GLB], ["k_1.png", "k_2.png", "k_3.glb"]),
        ("k.mp3", [PNG, GLB], ["k_1.png", "k_2.glb"]),
        ("k", [PNG, GLB], ["k_1.png", "k_2.glb"]),
    ],
)
def test_names_beside_the_wanted_one(wanted: str, results: list[Delivered], names: list[str]) -> None:
    assert names_beside(wanted, results) == names


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.png", ("a", ".png")),
        ("a.tar.gz", ("a.tar", ".gz")),
        ("a.b", ("a.b", "")),
        (".png", (".png", "")),
        ("a.", ("a.", "")),
        ("a", ("a", "")),
    ],
)
def test_only_what_is_known_is_an_ending(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


@given(
    st.sampled_from(["k.png", "k.glb", "k", "k.mp4", "k.txt"]),
    st.lists(st.sampled_from([PNG, WEBP, GLB, MP4, WEBM, MP3, TXT, PREVIEW, PROMISED]), min_size=1, max_size=9),
)
def test_no_two_results_share_a_name_and_every_ending_is_true(wanted: str, results: list[Delivered]) -> None:
    names = names_beside(wanted, results)
    assert len({name.casefold() for name in names}) == len(results)
    for name, result in zip(names, results, strict=True):
        assert split_name(name)[1] in {result.extension, *result.accepts}
