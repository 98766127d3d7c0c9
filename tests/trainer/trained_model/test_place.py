"""Where results go: a new or empty folder, or the one of the very same command; nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from crl_diffusion.errors import OptionError
from crl_diffusion.trained_model.place import claim

RECORD = {"seed": 0, "classes": ["日本"]}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_an_empty_and_the_same_commands_folder_are_taken(tmp_path: Path) -> None:
    claim(tmp_path / "new" / "nested", "record.json", RECORD)
    (tmp_path / "empty").mkdir()
    claim(tmp_path / "empty", "record.json", RECORD)
    before = content(tmp_path)
    assert len(before) == 2
    claim(tmp_path / "empty", "record.json", RECORD)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("notes.txt", "mine", "holds other files"),
        ("record.json", "no JSON", "holds other files"),
        ("record.json", "[1]", "holds other files"),
        ("record.json", '{"seed": 1, "classes": ["日本"]}', "holds results with another seed"),
    ],
)
def test_a_folder_with_anything_else_is_refused_and_left_as_it_was(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    before = content(tmp_path)
    with pytest.raises(OptionError, match=f"{message}; give a new or an empty folder"):
        claim(tmp_path, "record.json", RECORD)
    assert content(tmp_path) == before


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(OptionError, match="is not a folder"):
            claim(place, "record.json", RECORD)


def test_a_command_that_was_killed_while_it_wrote_its_record_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "record.json.3f2a9c0100ff00ff.tmp").write_text('{"se')
    claim(tmp_path, "record.json", RECORD)
    assert (tmp_path / "record.json").exists()
