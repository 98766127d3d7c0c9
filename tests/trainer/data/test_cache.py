"""Decoded copies of data sets: written once, mapped, and made again when the data set changes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion import files
from crl_diffusion.data import cache, folder, image_files
from crl_diffusion.diffusion.noising import SCHEDULES
from crl_diffusion.errors import OptionError
from crl_diffusion.methods import regression
from helpers.image_folders import load, write_photos, write_tree
from helpers.permissions import permissions_hold
from PIL import Image


def is_mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether a tensor's bytes are those of a file, by the system's own account."""
    if sys.platform != "linux":
        pytest.skip(f"/proc/self/maps, which tells what is mapped from where, is Linux's; this is {sys.platform}")
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        if path == str(file) and low <= tensor.data_ptr() < high:
            return True
    return False


def test_a_decoded_copy_is_written_once_and_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path, ("a", "b", "c", "d"))
    first = load("folder", tmp_path, tasks=2, image_size=16)
    assert "decoding" in capsys.readouterr().err
    again = load("folder", tmp_path, tasks=2, image_size=16, held_out="test", class_order=0)
    assert capsys.readouterr().err == ""
    (copy,) = (tmp_path / ".crl-diffusion").glob("folder-*")
    assert copy.name.startswith(f"{first.name}-16px-")
    assert (copy / "train.pixels").stat().st_size == 4 * 3 * 3 * 16 * 16
    for loaded in (first, again):
        assert is_mapped(loaded.train.storage, copy / "train.pixels")
        assert is_mapped(loaded.test.storage, copy / "test.pixels")
        for task in loaded.tasks:
            assert task.train.storage.data_ptr() == loaded.train.storage.data_ptr()
            assert task.held_out.storage.data_ptr() == loaded.test.storage.data_ptr()
            assert not is_mapped(task.train.take(torch.tensor([0])).storage, copy / "train.pixels")
    before = (copy / "train.pixels").read_bytes()
    first.train.storage.zero_()  # private: neither the file nor another view of it changes
    assert (copy / "train.pixels").read_bytes() == before
    assert again.train.pixels.any()
    assert not list(copy.parent.glob(".*unfinished"))


def test_a_step_of_a_mapped_set_reads_little_more_than_its_images(tmp_path: Path) -> None:
    """By the system's account of the pages that are in memory, of a file of 64 MiB."""
    if sys.platform != "linux":
        pytest.skip(
            f"/proc/self/smaps, which tells how much of a file is in memory, is Linux's; this is {sys.platform}"
        )
    side, count = 64, 64 * 2**20 // (3 * 64**2)
    write_tree(tmp_path, ("a", "b"))
    load("folder", tmp_path, image_size=side, tasks=1)
    (copy,) = (tmp_path / ".crl-diffusion").glob("folder-*")
    os.truncate(copy / "train.pixels", count * 3 * side**2)
    (torch.arange(count) % 2).numpy().tofile(copy / "train.labels")
    about = json.loads((copy / "about.json").read_text())
    about["images"]["train"] = count
    del about["files"]  # as in a copy of an earlier version
    (copy / "about.json").write_text(json.dumps(about))

    def resident() -> int:
        entries = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
        ours = [entry for entry in entries if entry.partition("\n")[0].endswith(f" {copy / 'train.pixels'}")]
        assert ours
        return sum(1024 * int(re.search(r"^Rss: +(\d+) kB", entry, re.MULTILINE)[1]) for entry in ours)  # type: ignore[index]

    loaded = load("folder", tmp_path, image_size=side, tasks=2, classes_per_task=1, per_class=1000)
    assert len(loaded.train) == count
    assert resident() == 0
    task = loaded.tasks[1]
    batch = regression.real_batch(task.train, 32, 1.0, SCHEDULES["linear"], regression.Moment(0, 0, 3), torch.zeros(()))
    assert batch.noised.shape == (32, 3, side, side)
    assert 0 < resident() <= loaded.train.storage.numel() // 4  # 32 of 5,461 images, in pages or runs of pages
    assert len(task.train.pixels) == 1000  # that is what it is not: reading a whole task
    assert resident() > 1000 * 3 * side**2


@pytest.mark.parametrize("change", ["content", "added", "size"])
def test_a_changed_data_set_gets_a_new_copy(change: str, tmp_path: Path) -> None:
    write_tree(tmp_path, ("a", "b"))
    file = tmp_path / "train" / "a" / "0.png"
    load("folder", tmp_path, tasks=1, image_size=8)
    if change == "content":  # of the same length, as an uncompressed format has it
        status = file.stat()
        Image.new("RGB", (32, 32), (1, 2, 3)).save(file)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "added":
        shutil.copy(file, file.with_name("9.png"))
    loaded = load("folder", tmp_path, tasks=1, image_size=16 if change == "size" else 8)
    assert len(list((tmp_path / ".crl-diffusion").glob("folder-*"))) == 2
    assert len(loaded.train) == (7 if change == "added" else 6)
    if change == "content":
        assert loaded.train.pixels[0, :, 0, 0].tolist() == [1, 2, 3]


def test_an_interrupted_copy_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path, ("a", "b"))
    write = cache._write

    def interrupted(part: Path, chunks: cache.Chunks) -> Any:
        if part.name == "test":
            raise KeyboardInterrupt
        return write(part, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load("folder", tmp_path, tasks=1)
    (left,) = (path for path in (tmp_path / ".crl-diffusion").iterdir() if path.is_dir())
    assert left.name.endswith(".unfinished")
    (left / "stray").write_text("of the interrupted process")
    assert len(load("folder", tmp_path, tasks=1).train) == 6
    (copy,) = (path for path in (tmp_path / ".crl-diffusion").iterdir() if path.is_dir())
    assert sorted(path.name for path in copy.iterdir()) == [
        "about.json",
        "test.labels",
        "test.pixels",
        "train.labels",
        "train.pixels",
    ]


def test_two_readers_that_need_a_copy_at_once_write_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fcntl", reason="fcntl is missing: file locks need POSIX")
    write_tree(tmp_path, ("a", "b"))
    both_found_none, locked = threading.Barrier(2, timeout=60), files.locked

    def late(path: Path) -> Any:
        both_found_none.wait()
        return locked(path)

    monkeypatch.setattr(cache, "locked", late)
    with ThreadPoolExecutor(2) as threads:  # flock is between openings of a file: threads stand for processes
        first, second = threads.map(lambda _: load("folder", tmp_path, tasks=1), range(2))
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert capsys.readouterr().err.count("decoding") == 1


def test_copies_of_a_read_only_root_go_to_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    write_tree(root, ("a", "b"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root.chmod(0o555)
    with permissions_hold():
        load("folder", root, tasks=1)
    assert not (root / ".crl-diffusion").exists()
    assert len(list((tmp_path / "cache" / "crl-diffusion").glob("folder-*"))) == 1
    (tmp_path / "full").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    refused = pytest.raises(OptionError, match=r"cannot be written to .*full.* environment variable XDG_CACHE_HOME")
    with permissions_hold(), refused:
        load("folder", root, tasks=1)


def test_a_copy_in_a_read_only_root_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    write_tree(root, ("a", "b"))
    first = load("folder", root, tasks=1)
    assert "decoding" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (root / ".crl-diffusion").chmod(0o555)
    with permissions_hold():
        assert torch.equal(load("folder", root, tasks=1).train.pixels, first.train.pixels)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "cache").exists()


def test_a_copy_that_is_there_needs_no_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    write_tree(root, ("a", "b"))
    first = load("folder", root, tasks=1)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    (root / ".crl-diffusion").chmod(0o555)
    with permissions_hold():
        assert torch.equal(load("folder", root, tasks=1).train.pixels, first.train.pixels)


def test_other_rules_for_pixels_make_a_new_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path, ("a", "b"))
    copies = tmp_path / ".crl-diffusion"
    load("folder", tmp_path, tasks=1)
    monkeypatch.setattr(folder, "RULES", folder.RULES + 1)
    load("folder", tmp_path, tasks=1)
    assert len(list(copies.glob("folder-*"))) == 2


def test_files_that_were_left_out_are_tried_again_when_their_format_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path, ("a", "b"))
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "b" / "late.webp")
    everything = image_files.formats()
    for module in (folder, image_files):
        monkeypatch.setattr(module, "formats", lambda: tuple(name for name in everything if name != "WEBP"))
    without = load("folder", tmp_path, tasks=1, skip_unreadable=True)
    for module in (folder, image_files):
        monkeypatch.setattr(module, "formats", lambda: everything)
    complete = load("folder", tmp_path, tasks=1, skip_unreadable=True)
    assert (len(without.train), len(complete.train)) == (6, 7)
    assert without.name != complete.name == load("folder", tmp_path, tasks=1).name
    assert "1 of 13 images cannot be read and are left out" in " ".join(without.notes)
    assert not complete.notes


@pytest.mark.parametrize("damage", ["short", "no json", "missing"])
def test_a_damaged_copy_is_an_error_that_names_it(damage: str, tmp_path: Path) -> None:
    write_tree(tmp_path, ("a", "b"))
    load("folder", tmp_path, tasks=1)
    (copy,) = (tmp_path / ".crl-diffusion").glob("folder-*")
    if damage == "short":
        os.truncate(copy / "train.pixels", 5)
    elif damage == "missing":
        (copy / "test.labels").unlink()
    else:
        (copy / "about.json").write_text("{")
    with pytest.raises(OptionError, match=r"is damaged .*delete it, and it is made anew") as caught:
        load("folder", tmp_path, tasks=1)
    assert str(copy) in str(caught.value)
    shutil.rmtree(copy)
    assert len(load("folder", tmp_path, tasks=1).train) == 6


@pytest.mark.parametrize("file", ["train.pixels", "test.pixels", "train.labels", "test.labels"])
def test_a_changed_byte_of_a_copy_is_noticed(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path, ("a", "b"))
    load("folder", tmp_path, tasks=1, image_size=8)
    (copy,) = (tmp_path / ".crl-diffusion").glob("folder-*")
    written = (copy / file).stat()

    def flip(byte: int) -> None:
        content = bytearray((copy / file).read_bytes())
        content[byte] ^= 1
        (copy / file).write_bytes(content)

    flip(-1)
    with pytest.raises(OptionError, match=rf"is damaged \({file} has other content than was written\); delete it"):
        load("folder", tmp_path, tasks=1, image_size=8)
    # A file that is too large to be read at each start is known by its time of modification.
    monkeypatch.setattr(cache, "CHECKED", 0)
    with pytest.raises(OptionError, match="other content"):
        load("folder", tmp_path, tasks=1, image_size=8)
    flip(-1)
    os.utime(copy / file, ns=(written.st_atime_ns, written.st_mtime_ns))
    read: list[Path] = []
    monkeypatch.setattr(cache, "file_digest", read.append)
    load("folder", tmp_path, tasks=1, image_size=8)
    assert read == []


def test_a_copy_of_an_earlier_version_has_no_digests(tmp_path: Path) -> None:
    write_tree(tmp_path, ("a", "b"))
    first = load("folder", tmp_path, tasks=1, image_size=8)
    (about,) = (tmp_path / ".crl-diffusion").glob("folder-*/about.json")
    value = json.loads(about.read_text())
    assert sorted(value.pop("files")) == ["test.labels", "test.pixels", "train.labels", "train.pixels"]
    about.write_text(json.dumps(value))
    assert torch.equal(load("folder", tmp_path, tasks=1, image_size=8).train.pixels, first.train.pixels)


@pytest.mark.parametrize(
    "value",
    [
        *("[]", "5", "null", '"text"', "[" * 100_000, "{}"),
        *(f'{{"images": {images}}}' for images in ("null", "[6, 6]", '{"train": 6}', '{"train": "6", "test": 0}')),
        *(f'{{"images": {{"train": {count}, "test": 0}}}}' for count in ("-6", "6.0", "true", "1e999", "9" * 30)),
        *(f'{{"images": {{"train": 6, "test": 0}}, "files": {files}}}' for files in ("[]", "5", '{"train.pixels": 1}')),
        '{"images": {"train": 6, "test": 0}}',
        *(
            f'{{"images": {{"train": 6, "test": 0}}, "findings": {findings}}}'
            for findings in ("[]", '{"unreadable": 5, "animated": 0}', '{"unreadable": [["x", "y"]], "animated": 0}',
                             '{"unreadable": [["a/0.png", "y"]], "animated": 0}',
                             '{"unreadable": [], "animated": 1e999}', '{"unreadable": [[[], {}]], "animated": 0}')
        ),
    ],
)  # fmt: skip
def test_an_about_of_another_shape_is_a_damaged_copy(value: str, tmp_path: Path) -> None:
    write_photos(tmp_path, {"a": 3, "b": 3})
    load("folder", tmp_path, tasks=1, image_size=8)
    (about,) = (tmp_path / ".crl-diffusion").glob("folder-*/about.json")
    about.write_text(value)
    with pytest.raises(OptionError, match=r"is damaged \(.*\); delete it, and it is made anew") as caught:
        load("folder", tmp_path, tasks=1, image_size=8)
    assert str(about.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["copy", "file", "all copies"])
def test_a_copy_that_another_user_may_not_read(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names the copy; if no copy can be looked at, the user makes one of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "root"
    write_tree(root, ("a", "b"))
    load("folder", root, tasks=1, image_size=8)
    (copy,) = (root / ".crl-diffusion").glob("folder-*")
    {"copy": copy, "file": copy / "train.labels", "all copies": copy.parent}[where].chmod(0)

    def read() -> str:
        try:
            return str(len(load("folder", root, tasks=1, image_size=8).train))
        except OptionError as error:
            return str(error)

    with permissions_hold():
        said = read()
    if where == "all copies":
        assert said == "6"
    else:
        assert said.startswith(f"the decoded copy {str(copy)!r} cannot be read (Permission denied); make its files")


def test_any_bytes_may_be_in_the_name_of_the_folder(tmp_path: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xff"))
    try:
        root.mkdir()
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    write_tree(root / "photos", ("a", "b"))
    assert len(load("folder", root / "photos", tasks=1, image_size=8).train) == 6


def test_what_cannot_be_written_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of a copy would take the room that the next try needs; a stderr that is full is no failure of the copy."""
    write_tree(tmp_path, ("a", "b"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", full)
        with pytest.raises(OptionError, match="No space left"):
            load("folder", tmp_path, tasks=1, image_size=8)
    assert not [path for path in (tmp_path / ".crl-diffusion").iterdir() if path.is_dir()]

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    assert len(load("folder", tmp_path, tasks=1, image_size=8).train) == 6


def test_no_room_for_a_copy_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path, ("a", "b"))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    with pytest.raises(OptionError, match=r"cannot be written .*No space left.* 3,072 bytes an image: make room"):
        load("folder", tmp_path, tasks=1)
