"""Run folders without training: the files that `train` writes, with invented numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from crl_diffusion.config.curriculum import stages, task_classes
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.evaluation import summaries
from crl_diffusion.training.plan import resolve
from safetensors.numpy import save_file


def measured_as(folder: Path, **values: float) -> None:
    """Put other values into all rows of a fabricated run's last evaluation, and write its summary again."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = max(row["after_task"] for row in rows if row["kind"] == "evaluation")
    rows = [{**row, **values} if row.get("after_task") == last else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summaries.summarise(folder)))


def fabricate(folder: Path, method: str, seed: int, level: float = 10.0, channels: int = 1, **settings: Any) -> Path:
    """A finished run at `folder` whose FIDs are about `level` when learnt; returns the folder.

    The numbers depend only on method, seed and level. All methods of a seed share most of their noise, as in real runs.
    """
    config = resolve(RunConfig(method=method, seed=seed, **{"device": "cpu", **settings}))
    shared, own = np.random.default_rng(seed), np.random.default_rng([seed, len(method), ord(method[-1])])
    classes, side = task_classes(config), min(config.image_size, 32)
    rows: list[dict[str, Any]] = []
    timings: list[dict[str, Any]] = []
    (folder / "samples").mkdir(parents=True)
    for stage in stages(config):
        for step in (20, 40):
            losses = {"loss": float(0.1 + own.random() / 50), "replay_loss": 0.05 if stage.number else 0.0}
            rows.append({"kind": "step", "stage": stage.number + 1, "step": step, **losses})
            timing = {"stage": stage.number + 1, "step": step, "step_ms": float(40 + own.random())}
            timing["step_cpu_ms"] = 20.0 + 10.0 * len(config.recipe.replays)
            if config.recipe.penalty is not None and stage.number:
                timing["penalty_ms"] = float(1 + own.random() / 5)
            timings.append(timing)
        for j in range(stage.learnt):
            age = stage.learnt - 1 - j
            fid = level * (1 + 0.3 * shared.random()) + age * (level / 10 + 0.3 * own.random())
            rows.append({
                "kind": "evaluation", "after_task": stage.learnt, "task": j + 1, "fid": float(fid),
                "accuracy": float(0.99 - 0.02 * age), "extractor": f"cnn32-{config.data}", "samples": 40,
                "held_out": config.held_out, "held_out_images": 60, "sampler": "DDIM", "sampler_steps": 10,
            })  # fmt: skip
        labels = np.repeat([c for part in classes[: stage.learnt] for c in part], 12)
        pixels = own.integers(0, 256, (len(labels), channels, side, side), dtype=np.uint8)
        save_file({"pixels": pixels, "labels": labels}, folder / "samples" / f"after-task-{stage.learnt}.safetensors")
        if (penalty := config.recipe.penalty) is not None:
            low_rank = penalty.fisher == "low_rank"
            statistics = {
                "num_samples": 1000, "kappa": float(0.05 * own.random() - 0.01), "rho": float(0.3 * own.random()),
                "trace": 2.5, "signal_share": float(own.random()), "samples_needed": 4000.0,
                "curvatures": own.random(penalty.rank * penalty.bands).tolist(), "slopes": None,
            } if low_rank else {"num_samples": 1000, "kappa": None, "rho": None, "trace": 2.5}  # fmt: skip
            rows.append({"kind": "fisher", "task": stage.learnt, **statistics, "state_bytes": 5_737_424})
        if stage.number + 1 < len(stages(config)):
            parts = {"teacher_bytes": 800.0 * bool(config.recipe.replays), "replay_bytes": 200.0 * stage.learnt}
            rows.append({"kind": "memory", "task": stage.learnt, **parts})
            timings.append({"stage": stage.number + 1, "task_end_seconds": 3.0, "task_end_cpu_seconds": 2.0})
    environment = {"python": "3.11.7", "torch": "2.14.1", "threads": 1}
    record = {"run": config.as_json(), "extractor": f"cnn32-{config.data}", "environment": environment}
    (folder / "config.json").write_text(json.dumps(record))
    for name, lines in (("metrics", rows), ("timings", timings)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps(summaries.summarise(folder)))
    return folder
