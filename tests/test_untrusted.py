"""What is no ordinary file is not opened, what is no bounded JSON not read."""

import json
import os
from pathlib import Path

import pytest

from src.untrusted import LARGEST_JSON, plain_file, read_json


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, Path]:
    """A link to a file, to a device and to nothing; a device; a pipe; a folder; a sparse terabyte."""
    (tmp_path / "target").write_text("theirs")
    for name, target in {"link": "target", "device link": "/dev/zero", "dangling": "nowhere"}.items():
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    return {path.name: path for path in tmp_path.iterdir()} | {"device": Path("/dev/zero")}


@pytest.mark.parametrize("mode", ["a", "w", "r+b", "ab"])
@pytest.mark.parametrize("name", ["link", "device link", "dangling", "pipe", "folder", "device"])
def test_only_an_ordinary_file_is_written_and_through_no_link(odd: dict[str, Path], name: str, mode: str) -> None:
    with pytest.raises(OSError), open(odd[name], mode, opener=plain_file):
        pass
    assert odd["target"].read_text() == "theirs" and not odd["dangling"].exists()


def test_an_ordinary_file_is_made_or_written(odd: dict[str, Path]) -> None:
    with open(odd["target"], "a", opener=plain_file) as file:
        file.write(" and ours")
    with open(odd["target"].with_name("new"), "w", opener=plain_file) as file:
        file.write("ours")
    assert odd["target"].read_text() == "theirs and ours"
    with open(odd["link"], opener=plain_file) as file:  # a cache of the Hub is made of links
        assert file.read() == "theirs and ours"


@pytest.mark.parametrize("name", ["device link", "dangling", "pipe", "folder", "device", "sparse"])
def test_what_has_no_end_is_not_read(odd: dict[str, Path], name: str) -> None:
    with pytest.raises(OSError):
        read_json(odd[name])


def test_json_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    for value in ({"a": [1, "é", None]}, [], 1.5):
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        assert read_json(path) == value
    nested = [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000]
    for content in (b"", b"{", b"\xff\xfe\xfd", b"1" * 5000, b" " * (LARGEST_JSON + 1), *nested):
        path.write_bytes(content)
        with pytest.raises((ValueError, RecursionError)):
            read_json(path)
