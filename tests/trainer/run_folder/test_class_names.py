"""Names of classes in a run's config.json: recorded once, no part of what tells runs apart, and missing in old runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from crl_diffusion.errors import RecordError
from crl_diffusion.files import read_json
from crl_diffusion.run_folder.class_names import UNNAMED, ClassNames, classes_by_task, printable
from crl_diffusion.run_folder.layout import claim, digest_of, digest_of_saved
from crl_diffusion.run_folder.readers import read_config
from helpers.trainer_runs import Short


def test_names_are_beside_the_configuration_that_a_digest_is_of(short: Short, tmp_path: Path) -> None:
    config = short(class_order=0)
    claim(config, tmp_path, "digits", {}, {"class_names": ["é", "b", "日本"]})
    record = read_config(tmp_path)
    assert digest_of_saved(record["run"]) == digest_of(config)
    names = ClassNames.recorded(record)
    assert [names.of(c) for c in range(4)] == ["é", "b", "日本", "3"]
    assert classes_by_task(record) == [(7, 8), (1, 5)]


def test_a_run_without_names_stays_without_them(short: Short, tmp_path: Path) -> None:
    claim(short(), tmp_path, "digits", {})
    before = (tmp_path / "config.json").read_bytes()
    assert "class_names" not in read_json(tmp_path / "config.json")
    named = {"class_names": ["a", "b"]}
    claim(short(), tmp_path, "digits", {}, named)  # the run is resumed by a version that knows names
    assert (tmp_path / "config.json").read_bytes() == before
    assert ClassNames.recorded(read_config(tmp_path)) == UNNAMED
    assert UNNAMED.of(7) == "7"
    assert ClassNames(("",)).of(0) == "0"


def test_the_name_of_a_folder_becomes_a_text_of_one_line() -> None:
    assert printable("café \n\t au lait") == "café au lait"
    assert printable(os.fsdecode("日本".encode()[:-1])) == "日\N{REPLACEMENT CHARACTER}"
    printable(os.fsdecode(b"caf\xe9")).encode()


def test_a_data_set_of_another_version_has_no_known_tasks() -> None:
    assert classes_by_task({"run": {"method": "gd", "data": "video"}}) == []


def test_names_that_are_no_texts_are_damage(short: Short, tmp_path: Path) -> None:
    claim(short(), tmp_path, "digits", {}, {"class_names": ["a"]})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "class_names": [1]}))
    with pytest.raises(RecordError, match=r"class_names is .* expected a list, each a text"):
        read_config(tmp_path)
