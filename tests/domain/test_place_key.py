"""The names of servers: one name for one server, two for two, and no way in."""

from __future__ import annotations

import pytest

from runcomfy.domain.machine import MachineId
from runcomfy.domain.place_key import machine_key, server_key

SECRET = "https://0f6b1c1e-0c3b-4c5e-8f43-comfyui.runcomfy.com"


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("http://127.0.0.1:8188", "server:localhost:8188@desk"),
        ("http://localhost:8188/", "server:localhost:8188@desk"),
        ("http://LOCALHOST.:8188", "server:localhost:8188@desk"),
        ("http://[::1]:8188", "server:localhost:8188@desk"),
        ("http://0.0.0.0:8188", "server:localhost:8188@desk"),
        ("http://comfy.localhost:8188", "server:localhost:8188@desk"),
        ("http://127.0.0.2:8188", "server:127.0.0.2:8188@desk"),
        ("http://localhost", "server:localhost:80@desk"),
        ("http://192.168.1.5:8188", "server:192.168.1.5:8188"),
        ("http://gpu-box:8188", "server:gpu-box:8188"),
        ("http://GPU.lan:8188", "server:gpu.lan:8188"),
        ("http://[fd00::5]:8188", "server:[fd00::5]:8188"),
        ("https://gpu-box", "server:gpu-box:443"),
        ("http://me:secret@gpu-box:8188/comfy/", "server:gpu-box:8188/comfy"),
    ],
)
def test_a_server_has_one_name_however_it_is_written(url: str, key: str) -> None:
    assert server_key(url, "desk") == key


def test_loopback_is_another_server_on_every_computer_and_the_rest_is_not() -> None:
    assert server_key("http://127.0.0.1:8188", "desk") != server_key("http://127.0.0.1:8188", "lap")
    assert server_key("http://gpu-box:8188", "desk") == server_key("http://gpu-box:8188", "lap")


def test_the_name_of_a_rented_machine_is_no_way_in() -> None:
    key = server_key(SECRET, "desk")
    assert "0f6b1c1e" not in key
    assert key.startswith("server:***")
    assert key == server_key(SECRET + "/", "lap")
    assert key != server_key(SECRET.replace("0f6b", "1f6b"), "desk")
    assert key != server_key(f"{SECRET}/other", "desk")


def test_a_machine_of_the_books_goes_by_our_id() -> None:
    assert machine_key(MachineId("abc")) == "machine:abc"
