"""Fisher estimation by several processes."""

import warnings
from dataclasses import asdict

import pytest
import torch
from helpers.fisher_problems import IGNORE_ESTIMATE_WARNINGS, Network, loss, loss_and_class, stratified
from helpers.processes import spawn
from torch import nn

import crl_kernels as ck

pytestmark = [*IGNORE_ESTIMATE_WARNINGS, pytest.mark.cpu("processes of a gloo group")]


PARALLEL = [
    {},
    {"kind": "diagonal"},
    {"unbiased": False},
    {"strata": True},
    # So few samples that merging sketches loses nothing: ten in the first half, and k + 8 rows.
    {"count": 20, "rank": 2},
    {"count": 20, "strata": True, "direction": "top"},
]


def share_of(rank: int, count: int = 60) -> list:
    """Of two processes, one has more data than the other, and other strata first."""
    batches = stratified(count, count // 10)[1]
    return batches[:4] if rank == 0 else batches[4:]


def estimate_in_parallel(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    try:
        model = Network().double()
        for i, options in enumerate(PARALLEL):
            wrapped = nn.parallel.DistributedDataParallel(model) if i % 2 else model
            group = {} if i % 2 else {"process_group": torch.distributed.group.WORLD}
            fisher = estimate_shared(wrapped, share_of(rank, options.get("count", 60)), **options, **group)
            fisher.save(f"{folder}/{i}-{rank}.safetensors")
    finally:
        torch.distributed.destroy_process_group()


def estimate_shared(model: nn.Module, batches: list, strata: bool = False, count: int = 60, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = loss_and_class if strata else lambda model, batch: loss(model, batch[:2])
        return ck.estimate_fisher(model, chosen, batches, **options)


def test_two_processes_estimate_what_one_does_from_all_their_samples(tmp_path):
    spawn(estimate_in_parallel, str(tmp_path), count=2)
    model = Network().double()
    for i, options in enumerate(PARALLEL):
        count = options.get("count", 60)
        first, second = (share_of(rank, count) for rank in (0, 1))
        union = [*first[:2], *second[:3], *first[2:], *second[3:]]  # first halves, then second halves
        expected = estimate_shared(model, union, **options)
        fisher, repeated = [ck.load_fisher(tmp_path / f"{i}-{rank}.safetensors") for rank in (0, 1)]
        assert str(fisher.statistics) == str(repeated.statistics)
        assert fisher.statistics.num_samples == count
        if "kind" in options:
            assert torch.equal(fisher.fisher_diagonal, repeated.fisher_diagonal)
            torch.testing.assert_close(fisher.fisher_diagonal, expected.fisher_diagonal, rtol=1e-6, atol=0)
            continue
        assert torch.equal(fisher.directions, repeated.directions)
        assert torch.equal(fisher.curvatures, repeated.curvatures)
        torch.testing.assert_close(fisher.curvatures, expected.curvatures, rtol=1e-6, atol=0)
        overlap = (fisher.directions.double() * expected.directions.double()).sum(1).abs()
        torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=1e-6, atol=0)
        ours, theirs = asdict(fisher.statistics), asdict(expected.statistics)
        for name in ("trace", "rho", "rho_se", "kappa", "curvature_se", "signal_share", "samples_needed"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6, nan_ok=True), name
        assert fisher.statistics.term_strata == expected.statistics.term_strata
