"""README is short, runs as it stands there, links to files that exist, and quotes numbers as they were measured."""

import re
import warnings

import pytest
import torch
from helpers.page_text import cells, page, prose, result, table_after, tables
from helpers.pages import ROOT, run_python_blocks

from crl_kernels import FusedAdamW, LowRankFisher, LowRankHistory, rank1_ewc_penalty

README = page("README.md")
REPOSITORY = "https://github.com/crl-kernels/crl-kernels/"
RAW = "https://raw.githubusercontent.com/crl-kernels/crl-kernels/main/"
LINKS = re.findall(r"\]\(([^)]+)\)", README)


def test_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1800


def test_python_blocks_run_one_after_the_other():
    assert README.count("```python\n") == 2
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="only .* of the trace")
        namespace = run_python_blocks(ROOT / "README.md")
    assert len(namespace["history"]) == 2
    assert bool(torch.isfinite(namespace["loss"]))
    assert namespace["diagnosis"].verdict.sentences


def test_each_way_to_apply_the_penalty_runs():
    """The calls of the table: the first two give one value, and each of the others moves the model to its anchor."""
    calls = [re.match("`(.*?)`", row[1])[1] for row in table_after(README, "## Which way to apply the penalty")[2:]]
    assert len(calls) == 5
    model = torch.nn.Linear(4, 1)
    history = LowRankHistory(model)
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    history.append(LowRankFisher.from_mean_gradient(ones, 1.0, ones))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = 0 * model.weight.sum()  # no pull of its own
    names = {"FusedAdamW": FusedAdamW, "rank1_ewc_penalty": rank1_ewc_penalty}
    names |= {"model": model, "history": history, "optimizer": optimizer, "loss": loss}
    loss.backward(retain_graph=True)
    assert eval(calls[0], names).item() == pytest.approx(eval(calls[1], names).item())
    optimizer.zero_grad()
    drifts = [float(history.drift().abs())]
    for call in calls[2:]:
        returned = eval(call, names)
        if call.startswith("FusedAdamW"):
            loss.backward()
            returned.step()
        elif "attach" in call:
            loss.backward(retain_graph=True)
            optimizer.step()
            history.detach()
        drifts.append(float(history.drift().abs()))
    assert drifts == sorted(drifts, reverse=True)
    assert len(set(drifts)) == 4


@pytest.mark.parametrize("link", LINKS)
def test_links_are_absolute_and_point_to_files_of_the_repository(link):
    """A package index renders README away from the repository, so a relative link would lead nowhere there."""
    assert link.startswith("https://")
    if link.startswith("https://github.com/") or link.startswith("https://raw."):
        path = re.fullmatch(f"(?:{re.escape(REPOSITORY)}blob/main/|{re.escape(RAW)})([^#]+)", link)
        assert path, link
        assert (ROOT / path[1]).is_file(), link


def test_pictures_come_from_where_an_index_can_load_them():
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README) == [RAW + "benchmarks/results/demo/samples.png"]


def test_make_targets_exist():
    makefile = page("Makefile")
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert {"test", "demo"} <= targets
    for target in targets:
        assert f"\n{target}:" in makefile


def test_table_of_the_demo_is_what_the_demo_wrote():
    written = tables(result("demo/comparison.md"))[0]
    quoted = table_after(README, "`make demo` wrote this table")
    columns = [written[0].index(name) for name in quoted[0]]
    assert len(columns) == 5
    assert quoted[2:] == [[re.sub(r" \[.*", "", row[column]) for column in columns] for row in written[2:]]


def test_table_of_speed_is_what_benchmarks_on_the_page_say():
    """docs/benchmarks.md holds all rows, and its test compares them with the measurement."""
    every_row = cells(page("docs/benchmarks.md"))
    quoted = table_after(README, "`python -m benchmarks.trainers`")
    assert len(quoted) == 6
    for row in quoted[2:]:
        assert row in every_row


def test_shares_of_the_trace_are_those_of_the_diagnoses():
    quoted = re.search(r"holds (\d+) % \(digits\) and (\d+) % \(MNIST\)", prose(README)).groups()
    written = re.search(r"holds (\d+) % .*?\(digits\) and (\d+) % .*?\(MNIST\)", prose(result("diagnose.md"))).groups()
    assert quoted == written


def test_price_of_more_replay_is_that_of_the_page_of_evidence():
    """docs/evidence.md says what it is compared with."""
    assert re.search(r"\d+ KB more of replay images", prose(README))[0] in prose(page("docs/evidence.md"))
