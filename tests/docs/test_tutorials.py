"""Every tutorial runs as it stands on its page, prints what the page shows, and shows what it claims.

After a change of what a page prints: python tests/helpers/pages.py docs/tutorials/PAGE.md
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.pages import DOCS, run

TUTORIALS = DOCS / "tutorials"
NUMBER = r"-?\d+(?:[.,]\d+)*"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "true")  # the command line prints lines, and draws no bars
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed, which would print which one it found
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def outputs(name: str) -> list[str]:
    """What a page prints, block by block; it must be what the page shows, to the last digit."""
    printed = []
    for output, quoted in run(TUTORIALS / f"{name}.md"):
        assert output == quoted
        printed.append(output)
    return printed


def numbers(text: str, pattern: str) -> list[float]:
    """The numbers that a pattern has in brackets, of all its places in a text."""
    return [float(number) for number in re.findall(pattern, text)]


def test_every_tutorial_is_tested():
    assert {path.stem for path in TUTORIALS.glob("*.md")} == {
        *("own-loop", "lora-diffusers", "language-model", "lora-language-model", "image-folder")
    }


def test_own_loop():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra trainer)")
    with pytest.warns(UserWarning, match="the mean gradient is mostly noise: .* with 899 samples") as warned:
        without, with_ewc, compared = outputs("own-loop")
    quoted = re.search(r"^> (.*)$", (TUTORIALS / "own-loop.md").read_text(), re.MULTILINE)[1]
    assert any(str(warning.message).startswith(quoted) for warning in warned)

    (kept, learned), (kept_with, learned_with) = (
        (numbers(text, r"after task 2: task 1 (\S+),")[0], numbers(text, r"after task 2: .* task 2 (\S+)")[0])
        for text in (without, with_ewc)
    )
    assert kept_with > kept + 0.1
    assert learned_with > learned - 0.02

    rows = re.findall(r"^(.*?) +forgetting (\S+), task 2 (\S+)$", compared, re.MULTILINE)
    forgetting = {name: float(value) for name, value, _ in rows}
    second = {name: float(value) for name, _, value in rows}
    strengths = ["no penalty", "rank 1, lam 100", "rank 1, lam 1,000", "rank 1, lam 10,000"]
    assert sorted(strengths, key=forgetting.get, reverse=True) == strengths
    assert second["rank 1, lam 10,000"] < second["no penalty"] - 0.1
    assert forgetting["diagonal, lam 100"] < forgetting["rank 1, lam 1,000"]
    assert forgetting["100 old images"] <= forgetting["diagonal, lam 100"]
    assert second["100 old images"] >= second["no penalty"]
    both = "100 old images, rank 1, lam 1,000"
    assert forgetting[both] < forgetting["100 old images"]
    assert second[both] < second["100 old images"]


def test_language_model():
    pytest.importorskip("transformers", reason="transformers is not installed (extra integrations)")
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra integrations)")
    with pytest.warns(UserWarning, match="of the trace of the Fisher lies along the top 1 directions"):
        _, first, without, with_ewc, resumed = outputs("language-model")
    task_1, task_2 = zip(
        *(
            map(float, re.search(r": +task 1 (\S+), task 2 (\S+)", text).groups())
            for text in (first, without, with_ewc)
        ),
        strict=True,
    )
    assert task_1[0] < task_1[2] < task_1[1] - 1  # forgetting is smaller with the penalty than without
    assert task_2[1] < task_2[2] < task_2[0] - 5  # and less is learned
    assert "tasks=1" in resumed
    assert "ewc_history.safetensors" in resumed


def test_lora_language_model():
    pytest.importorskip("trl", reason="trl is not installed (extra dev)")
    pytest.importorskip("peft", reason="peft is not installed (extra integrations)")
    printed = []
    for output, quoted in run(TUTORIALS / "lora-language-model.md"):
        assert shape(output) == shape(quoted)
        # float32, over hundreds of steps: another machine rounds differently.
        assert numbers(output, r"task \d ([\d.]+)") == pytest.approx(numbers(quoted, r"task \d ([\d.]+)"), abs=0.1)
        printed.append(output)
    _, adapters, learned, ends, resumed = printed
    assert "tasks=0, parameters=8704" in adapters
    before, after = numbers(learned, r"task 1 ([\d.]+),")
    assert numbers(ends, r"has (\d+)%") == pytest.approx([12], abs=2)
    without, rank1, diagonal = zip(numbers(ends, r"task 1 ([\d.]+)"), numbers(ends, r"task 2 ([\d.]+)"), strict=True)
    assert after < before - 5
    assert after < diagonal[0] < rank1[0] - 0.3 < without[0] - 1  # forgetting
    assert without[1] < diagonal[1] < rank1[1] < without[1] + 0.5  # and learning
    assert resumed.replace("resumed: ", "diagonal:") == ends.splitlines(keepends=True)[-1]


def test_lora_diffusers():
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra integrations)")
    pytest.importorskip("peft", reason="peft is not installed (extra integrations)")
    learned, _, ends, resumed, refused = outputs("lora-diffusers")
    before, after = numbers(learned, r"first (\d\S*),")
    first, second = numbers(ends, r"first (\S+),"), numbers(ends, r", second (\S+)")
    neither, ewc, distillation, both = first
    assert after < before
    assert after < both < distillation < ewc < neither
    assert (ewc - after) < (neither - after) / 2  # more than half of the forgetting is prevented
    assert second[0] < second[2] < second[3] < second[1] < numbers(learned, r", second (\S+)")[1]
    assert resumed == "the same end: True True\n"
    assert "lora_A.second" in refused


def shape(output: str) -> str:
    """Without what depends on the machine: numbers, digests of files, times, and how tables are laid out."""
    lines = [line for line in output.splitlines() if not line.startswith(("about ", "estimated "))]
    text = re.sub(r"\b(?=[0-9a-f]*[0-9])[0-9a-f]{8}\b", "DIGEST", " ".join(lines))
    return re.sub(r"[\s─]+", " ", re.sub(NUMBER, "NUMBER", text)).strip()


def test_image_folder():
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra trainer)")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra trainer)")
    printed = []
    for output, quoted in run(TUTORIALS / "image-folder.md"):
        assert shape(output) == shape(quoted)
        printed.append(output)
    assert len(printed) == 7
    report = Path("runs/compared/report.html").read_text()
    assert "gd+rank1" in report
    assert "fine-tune" in report
    assert not re.search(r'(?:src|href)="(?!data:|#)', report)  # self-contained
    assert Path("runs/compared/gd+rank1-seed0/summary.json").exists()
    assert len(list(Path("images").glob("*-seed0-*.png"))) == 6
    assert Path("my-model/README.md").exists()
