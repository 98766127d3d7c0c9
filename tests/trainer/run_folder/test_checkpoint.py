"""Checkpoints and logs on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crl_diffusion import errors, files
from crl_diffusion.errors import OptionError
from crl_diffusion.files import Log, read_json, read_rows, write_json
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.checkpoint import Checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def _make(stage: int, step: int) -> Checkpoint:
    tensors = {
        "model/w": torch.full((2, 3), 10.0 * stage + step),
        "optimizer/step/w": torch.tensor(float(step)),
        "memory/source/pool/pixels": torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
        "memory/teacher/w": torch.full((64, 64), 1.0 * stage),
    }
    return Checkpoint(stage, step, {"metrics": 7}, tensors, "this run")


def test_a_saved_checkpoint_is_loaded_unchanged(tmp_path: Path) -> None:
    saved = _make(1, 0)
    loaded = checkpoint.load(checkpoint.save(tmp_path, saved))
    assert (loaded[:3], loaded.run) == (saved[:3], saved.run)
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype
    assert list(loaded.part("model")) == ["w"]
    assert list(loaded.part("optimizer")) == ["step/w"]


def test_the_memory_of_a_stage_is_written_once_and_read_with_each_of_its_checkpoints(tmp_path: Path) -> None:
    start = checkpoint.save(tmp_path, _make(1, 0))
    later = checkpoint.save(tmp_path, _make(1, 30))
    assert start.stat().st_size > 64 * 64 * 4 > later.stat().st_size
    loaded, expected = checkpoint.load(later), _make(1, 30)
    assert loaded[:3] == expected[:3]
    assert loaded.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)

    # Without its stage's start, or with another one, it is no checkpoint.
    with safe_open(start, framework="pt") as file:
        metadata = file.metadata()
    content = start.read_bytes()
    start.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"it needs 01-00000000.safetensors, which is damaged"):
        checkpoint.load(later)
    changed = {name: tensor + 1 for name, tensor in _make(1, 0).tensors.items()}
    save_file(changed, start, {**metadata, "digest": checkpoint._digests(changed, {})[1]})
    with pytest.raises(ValueError, match=r"taken after another 01-00000000.safetensors"):
        checkpoint.load(later)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["deleted", "emptied"])
def test_the_memory_is_written_again_if_the_file_of_the_stages_start_is_lost(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    damage(checkpoint.save(tmp_path, _make(1, 0)))
    loaded, expected = checkpoint.load(checkpoint.save(tmp_path, _make(1, 30))), _make(1, 30)
    assert loaded.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(x, loaded.tensors[name]) for name, x in expected.tensors.items())


def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, _make(0, 100))
    path.rename(tmp_path / "04-00000000.safetensors")
    newest, complaints = checkpoint.latest(tmp_path)
    assert newest is None
    assert "04-00000000.safetensors is damaged (it was taken after 0 stages and 100 steps" in complaints[0]


def test_skipped_checkpoints_do_not_displace_new_ones(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        path = checkpoint.save(tmp_path, _make(0, step))
    for step in (200, 300):
        path = tmp_path / f"00-{step:08d}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    checkpoint.save(tmp_path, _make(0, 150))
    newest, complaints = checkpoint.latest(tmp_path)
    assert newest is not None
    assert (newest.step, len(complaints)) == (150, 2)


def test_ends_of_stages_are_kept_and_two_others(tmp_path: Path) -> None:
    for stage, step in [(0, 100), (0, 200), (0, 300), (1, 0), (1, 100), (1, 200), (1, 1000000), (2, 0)]:
        checkpoint.save(tmp_path, _make(stage, step))
    names = sorted(path.stem for path in tmp_path.iterdir())
    assert names == ["01-00000000", "01-00000200", "01-01000000", "02-00000000"]
    newest, complaints = checkpoint.latest(tmp_path)
    assert newest is not None
    assert (newest.stage, newest.step, complaints) == (2, 0, [])


def test_stages_and_steps_may_have_more_digits_than_the_padding(tmp_path: Path) -> None:
    foreign = tmp_path / "of another program.safetensors"
    foreign.write_bytes(b"")
    for stage, step in [(99, 0), (99, 300), (100, 0), (100, 100), (100, 99_999_900), (100, 100_000_000)]:
        checkpoint.save(tmp_path, _make(stage, step))
    newest, complaints = checkpoint.latest(tmp_path)
    assert newest is not None
    assert (newest.stage, newest.step, complaints) == (100, 100_000_000, [])
    assert not (tmp_path / "99-00000300.safetensors").exists()
    assert (tmp_path / "100-99999900.safetensors").exists()
    assert foreign.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "no header"])
def test_a_damaged_newest_checkpoint_is_skipped(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, _make(0, 100))
    path = checkpoint.save(tmp_path, _make(0, 200))
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[-1] ^= 1
    elif damage == "no header":
        content[:8] = b"\xff" * 8
    else:
        del content[0 if damage == "empty" else len(content) // 2 :]
    path.write_bytes(content)
    newest, complaints = checkpoint.latest(tmp_path)
    assert newest is not None
    assert (newest.stage, newest.step) == (0, 100)
    assert len(complaints) == 1
    assert "00-00000200.safetensors is damaged" in complaints[0]


def test_a_crash_before_the_rename_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, _make(0, 100))

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, _make(0, 200))
    newest, complaints = checkpoint.latest(tmp_path)
    assert newest is not None
    assert (newest.step, complaints) == (100, [])
    checkpoint.save(tmp_path, _make(0, 300))
    assert not list(tmp_path.glob("*.tmp"))


def test_processes_with_one_number_write_under_different_names(tmp_path: Path) -> None:
    """As in two containers that share a folder: neither touches what the other is writing."""
    path = tmp_path / "a.json"
    with files.replacing(path) as first:
        with files.replacing(path) as second:
            second.write_text("second")
            assert all(files.UNFINISHED.fullmatch(temporary.name) for temporary in (first, second))
        first.write_text("first")
        assert path.read_text() == "second"
        checkpoint.save(tmp_path, _make(0, 100))
        assert first.exists()
    assert path.read_text() == "first"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("call", ["replace", "fsync", "save_file"])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_part_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoint.save(tmp_path, _make(0, 100))

    def full(*_: object) -> None:
        if call == "save_file":  # safetensors has an exception of its own
            raise SafetensorError("I/O error: No space left on device")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files if call == "save_file" else os, call, full)
        with pytest.raises(errors.WriteError, match=r"00-00000200.*cannot be written.*No space left on device"):
            checkpoint.save(tmp_path, _make(0, 200))
    assert [path.name for path in tmp_path.iterdir()] == ["00-00000100.safetensors"]


def test_no_checkpoint_is_no_complaint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "missing") == (None, [])


def test_a_log_is_cut_to_the_rows_of_the_checkpoint_and_tolerates_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path)
    for i in range(5):
        log.append({"i": i, "name": "ü"})
    with open(path, "ab") as file:
        file.write(b'{"i": 5, "na')
    assert [row["i"] for row in read_rows(path)] == [0, 1, 2, 3, 4]
    log = Log(path)
    assert log.count == 5
    log.keep(5)
    log.append({"i": 5, "name": "ü"})
    assert [row["i"] for row in read_rows(path)] == [0, 1, 2, 3, 4, 5]
    log.keep(2)
    log.append({"i": 9})
    assert [row["i"] for row in read_rows(path)] == [0, 1, 9]
    with pytest.raises(OptionError, match=r"has 3 rows, but its checkpoint was taken after 4"):
        log.keep(4)


def test_json_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1]})
    write_json(path, {"a": [2]})
    assert read_json(path) == {"a": [2]}
    assert list(tmp_path.iterdir()) == [path]
