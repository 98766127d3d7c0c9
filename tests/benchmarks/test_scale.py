"""The costs in a large model: what the ledger counts, that real processes do what is predicted for them, and what a
step must not do on any number of ranks."""

from dataclasses import replace

import pytest
import torch

from benchmarks.scale import measure, processes, report
from benchmarks.scale.decoder import SMALL
from benchmarks.scale.ledger import Ledger, fake_tensors
from benchmarks.scale.measure import Kind
from crl_kernels import estimate_fisher

pytestmark = pytest.mark.cpu("fake tensors and gloo's processes are on the CPU")

TINY = replace(SMALL, layers=1)
KINDS = [Kind(1, "fp32"), Kind(3, "bf16"), Kind(1, "fp32", diagonal=True)]


def work() -> tuple[int, list[float]]:
    a, b = torch.ones(100), torch.ones(100)
    a.add_(b)  # reads two vectors, writes one
    c = a.view(10, 10) * 2  # reads one, writes one
    kept = torch.zeros_like(c)  # writes one
    del c
    return kept, a.sum().tolist()  # reads one, writes a number


@pytest.mark.parametrize("fake", [False, True])
def test_a_ledger_counts_bytes_memory_and_host_reads(fake):
    def counted() -> Ledger:
        with Ledger() as ledger:
            kept = work()
        record = ledger.record()
        assert kept[0].shape == (10, 10)
        return record

    if fake:
        with fake_tensors():
            record = counted()
    else:
        record = counted()
    vector = 400
    fills = 2 * vector  # torch.ones twice
    assert record["moved"] == fills + 3 * vector + 2 * vector + vector + vector + 4
    assert record["peak"] == 4 * vector
    assert record["left"] == vector
    assert record["host_reads"] == 1
    assert record["collectives"] == []


def test_two_processes_do_what_was_predicted_for_each():
    run = processes.compare(TINY, 1, 2, KINDS)
    assert [rank["differences"] for rank in run["compared"]] == [[], []]
    assert all(rank["entries"] > 90 for rank in run["compared"])


@pytest.fixture(scope="module")
def predicted() -> dict[tuple[int, int], dict]:
    return {mesh: processes.predicted(TINY, *mesh, kinds=KINDS) for mesh in ((1, 64), (8, 8))}


def test_a_step_exchanges_k_numbers_among_the_shards_and_gathers_nothing(predicted):
    for (_, shards), costs in predicted.items():
        assert len(costs["histories"]) == len(KINDS)
        for kind in KINDS:
            for placement, (_, update) in measure.PLACEMENTS.items():
                record = costs["histories"][kind.name][placement]
                nothing = kind.diagonal and placement in ("decoupled_step_", "attach, decoupled")
                expected = [] if nothing else [["all_reduce", shards, 8 * kind.terms, 1]]
                assert record["collectives"] == expected, (kind, placement)
                assert record["host_reads"] == 0, (kind, placement)
                assert costs["updates"][update]["collectives"] == []


def test_state_is_in_proportion_to_the_shards(predicted):
    for costs in predicted.values():
        state = costs["state"]
        assert state["gradients"] == state["parameters"]
        assert state["AdamW"] == 2 * state["parameters"]
        assert costs["histories"]["diagonal"]["state"] == 2 * state["parameters"] + 8
        assert costs["histories"]["K = 1, fp32"]["state"] == state["parameters"] + 16
        assert costs["histories"]["K = 3, bf16"]["state"] == 3 * state["parameters"] // 2 + 48


def test_an_estimate_keeps_what_its_formula_says():
    model = torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(20)))
    params = sum(parameter.numel() for parameter in model.parameters())
    with Ledger() as ledger:
        fisher = estimate_fisher(model, lambda model, x: model(x).square().mean(1), torch.randn(4, 2, 100).unbind())
    assert 0 <= ledger.peak - report.ESTIMATE * params < 5000
    del fisher


def test_traffic_is_that_of_the_formulas(predicted):
    """Bytes per parameter, but for vectors of one number per tensor or process."""
    for costs in predicted.values():
        params = costs["state"]["parameters"] // 4
        for kind, placement, expected in (
            ("K = 1, fp32", "FusedAdamW", 4),
            ("K = 3, bf16", "FusedAdamW", 6),
            ("diagonal", "FusedAdamW", 8),
            ("K = 1, fp32", "add_penalty_grad_", 20),
            ("K = 3, bf16", "decoupled_step_", (4 + 6) + (8 + 6)),
        ):
            moved, _ = report.added(costs, kind, placement)
            assert 0 <= moved - expected * params < 5000, (kind, placement)


def test_the_predicted_time_is_bytes_over_bandwidth_and_latencies(predicted):
    costs = predicted[8, 8]
    moved, _ = report.added(costs, "K = 1, fp32", "FusedAdamW")
    assert report.seconds(costs, "K = 1, fp32", "FusedAdamW", 1e9, 0.5) == pytest.approx(moved / 1e9 + 0.5)


def test_a_gather_in_a_step_would_be_seen():
    """A mutant of the history's step."""

    original = measure.in_the_gradient

    def gathering(model, history):
        update = original(model, history)

        def step() -> None:
            next(model.parameters()).full_tensor()
            update()

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measure.PLACEMENTS, "add_penalty_grad_", (gathering, "AdamW"))
        costs = processes.predicted(TINY, 1, 64, kinds=KINDS[-1:])
    names = [name for name, *_ in costs["histories"]["diagonal"]["add_penalty_grad_"]["collectives"]]
    assert sorted(names) == ["all_gather", "all_reduce"]
