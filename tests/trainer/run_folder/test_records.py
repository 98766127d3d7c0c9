"""Records of a run folder, as the readers give them back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from crl_diffusion.errors import RecordError
from crl_diffusion.evaluation import summaries
from crl_diffusion.run_folder.readers import read_metrics, read_timings


def test_readers_accept_records_of_this_and_of_earlier_versions(finished: Path, tmp_path: Path) -> None:
    assert [row["kind"] for row in read_metrics(finished)].count("evaluation") == 3
    assert len(read_metrics(finished, 4)) == 4
    assert read_timings(tmp_path) == read_metrics(tmp_path) == []
    without_adam = {
        "kind": "movement",
        "task": 2,
        "displacement": 1.5,
        "random_drift": 0.1,
        "drift": [],
        "precision": None,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(without_adam) + "\n")
    assert read_metrics(tmp_path) == [without_adam]
    few = {"kind": "evaluation", "after_task": 2, "task": 1, "fid": 1, "extractor": "e", "sampler": "s"}
    few |= {"samples": 4, "sampler_steps": 2}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(few) + "\n" + json.dumps({**few, "task": 2}) + "\n")
    assert summaries.fid_matrix(read_metrics(tmp_path)) == [[], [1, 1]]  # joint training: evaluated at the end
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**few, "task": 2}) + "\n")
    with pytest.raises(RecordError, match=r"metrics.jsonl' lacks rows before row 1 \(the evaluation of task 2 after"):
        read_metrics(tmp_path)
