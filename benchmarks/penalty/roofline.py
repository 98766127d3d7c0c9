"""A picture of GB/s against the bandwidth of a copy, one panel per size. Only this needs matplotlib."""

import textwrap
from pathlib import Path
from typing import Any


def _speed(row: dict[str, Any]) -> float:
    speed: float = row.get("gb_per_s_kept", row["gb_per_s"])
    return speed


def draw(title: str, sizes: list[dict[str, Any]], path: Path) -> None:
    """``sizes``: as in the record of ``benchmarks.penalty``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [row["name"] for row in sizes[0]["rows"]]
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(3.4 + 3.1 * len(sizes), 1.2 + 0.24 * len(names)), sharey=True, squeeze=False
    )
    for panel, size in zip(panels[0], sizes, strict=True):
        copy = next(_speed(row) for row in size["rows"] if row["name"] == "copy")
        top = 1.3 * max([_speed(row) for row in size["rows"] if "gb_per_s" in row])
        for height, row in enumerate(size["rows"]):
            if "skipped" in row:
                panel.text(0.01 * top, height, "not measured", va="center", fontsize=7, color="0.5")
                continue
            ours = row["what"].startswith("this library") and "plain PyTorch" not in row["what"]
            panel.barh(height, _speed(row), color="C0" if ours else "0.7")
            panel.text(_speed(row) + 0.01 * top, height, f"{_speed(row):.1f}", va="center", fontsize=7)
        panel.axvline(copy, color="C3", linewidth=1)
        panel.set_xlim(0, top)
        panel.set_title(f"{size['label']}\ncopy: {copy:.1f} GB/s", fontsize=9)
        panel.set_xlabel("GB/s", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", color="0.92")
        panel.set_axisbelow(True)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].set_ylim(len(names) - 0.4, -0.6)
    figure.suptitle(textwrap.fill(title, 30 + 28 * len(sizes)), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
