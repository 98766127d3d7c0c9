"""Processes that share a model have one history: another one, another lam or a missing call is an error in all of them,
and nothing has changed. Two gloo processes; a model of each kind goes through all cases."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import past_tasks
from helpers.processes import processes
from helpers.sharded_models import network, sharded, unsharded
from torch import nn

import crl_kernels as ck
from crl_kernels.distributed import agreement
from crl_kernels.distributed.agreement import Agreement, agreement_in, digest
from crl_kernels.integrations.distributed_checkpoint import load_history

LAM, LR = 1.5, 0.05


def fisher(kind: str, seed: int) -> ck.LowRankFisher | ck.DiagonalFisher:
    return past_tasks.random_fisher(past_tasks.trainable(network()), kind, seed)


def error_of(call: Callable[[], object]) -> str | None:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def bits(history) -> dict[str, list]:
    return {name: unsharded(tensor).tolist() for name, tensor in history.state_dict().items()}


def wait_at_most(seconds: float) -> None:
    dist.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=seconds))


class Cases:
    """Errors by case, of calls that leave the history as it was."""

    def __init__(self) -> None:
        self.errors: dict[str, str | None] = {}
        self.changed: list[str] = []

    def refused(self, case: str, history, call: Callable[[], object]) -> None:
        before = bits(history)
        self.errors[case] = error_of(call)
        if bits(history) != before:
            self.changed.append(case)


def cases(rank: int, count: int, folder: Path) -> dict:
    results = {}
    for wrapped in ("fsdp", "ddp"):
        for kind in ("low_rank", "diagonal"):
            results[f"{wrapped} {kind}"] = _cases(rank, folder / f"{wrapped} {kind}", sharded(count, wrapped), kind)
    results["bare"] = bare(rank, folder)
    model = sharded(count, "ddp")
    history = ck.LowRankHistory(model)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    history.append(fisher("low_rank", rank))  # the processes that shared its model are of a world that has ended
    return results


def bare(rank: int, folder: Path) -> dict[str, str | None]:
    """Models that no wrapper says to be shared, as in a sweep: each process does what it likes, until a trainer's
    callback says that they are."""
    wait_at_most(0.1)
    model = network()
    history = ck.LowRankHistory(model)
    if rank == 0:
        history.append(fisher("low_rank", 3))
    history.append(fisher("low_rank", rank))
    history.add_penalty_grad_(LAM + rank)
    history.save(folder / f"bare {rank}.safetensors")
    loaded = ck.LowRankHistory.load(folder / f"bare {rank}.safetensors", model)
    ck.FusedAdamW(model.parameters(), history=loaded, lam=LAM * (1 + rank)).step()
    wait_at_most(60)
    world, same = agreement_in(dist.group.WORLD), ck.LowRankHistory(network())
    same.append(fisher("low_rank", 0))
    same._require_same_among(world, LAM, False)
    return {
        "history": error_of(lambda: history._require_same_among(world, LAM, False)),
        "lam": error_of(lambda: same._require_same_among(world, LAM + rank, False)),
        "mode": error_of(lambda: same._require_same_among(world, LAM, rank == 0)),
        "interrupted": interrupted(rank, world),
        "after it": error_of(lambda: same._require_same_among(world, LAM, False)),
    }


def interrupted(rank: int, world: Agreement) -> str | None:
    """A call that Ctrl-C ends in one process; the other one waits for it in vain."""
    wait_at_most(0.1)
    try:
        with world.on("a call", ""):
            if rank == 0:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        error = None
    except RuntimeError as raised:
        error = str(raised)
    dist.barrier()
    wait_at_most(60)
    return error


def _cases(rank: int, folder: Path, model: nn.Module, kind: str) -> dict:
    folder.mkdir(exist_ok=True)
    both = Cases()
    if rank == 0:  # a history that one process alone makes exchanges nothing
        past_tasks.HISTORIES[kind](model)
    history = past_tasks.HISTORIES[kind](model)
    wait_at_most(60)
    both.refused("another Fisher", history, lambda: history.append(fisher(kind, rank)))
    other_kind = "low_rank" if kind == "diagonal" else "diagonal"
    both.refused("a wrong Fisher", history, lambda: history.append(fisher(kind if rank else other_kind, 0)))
    history.append(fisher(kind, 0))

    # A call that one process alone makes.
    lone = {"fsdp low_rank": lambda: history.append(fisher(kind, 1)), "fsdp diagonal": lambda: history.save(folder)}
    lone["ddp low_rank"] = lone["fsdp low_rank"]
    if (call := lone.get(folder.name)) is not None:
        wait_at_most(0.1)
        before = bits(history)
        both.errors["a lone call"] = error_of(call) if rank == 0 else None
        wait_at_most(60)
        dist.barrier()
        if bits(history) != before:
            both.changed.append("a lone call")

    # Different calls.
    if rank == 0:
        both.refused("another call", history, lambda: history.append(fisher(kind, 1)))
    else:
        both.refused("another call", history, lambda: history.load_state_dict(history.state_dict()))
    history.append(fisher(kind, 1))

    # Files and states.
    shared, absent, own = (folder / f"{name}.safetensors" for name in ("shared", "absent", rank))
    if rank == 0 or is_sharded(model):
        history.save(shared)
    dist.barrier()
    alone = past_tasks.history_of(network(), kind)
    alone.append(fisher(kind, 7 + rank))
    alone.save(own)
    both.refused("another file", history, lambda: type(history).load(own, model))
    both.refused("no file", history, lambda: type(history).load(shared if rank else absent, model))
    both.refused("another state", history, lambda: history.load_state_dict(alone.state_dict()))
    both.refused("no parameter", history, lambda: history.rebind(model, grown=[] if rank else ["absent"]))
    if is_sharded(model):
        dcp.save({"history": history.state_dict()}, checkpoint_id=folder / "checkpoint")
        place = folder / ("checkpoint" if rank else "absent")
        both.refused("no checkpoint", history, lambda: load_history(history, place))
        load_history(history, folder / "checkpoint")
        both.refused("no folder", history, lambda: history.save(absent / "history.safetensors"))
    history.rebind(model)
    loaded = type(history).load(shared, model)
    assert bits(loaded) == bits(history)

    # lam, at the first step of each way to apply it.
    ways = {
        "gradient": lambda lam: loaded.add_penalty_grad_(lam),
        "decoupled": lambda lam: loaded.decoupled_step_(lam, LR),
        "loss": lambda lam: loaded.penalty(lam).backward(),
        "inside": lambda lam: ck.FusedAdamW(model.parameters(), lr=LR, history=loaded, lam=lam).step(),
        "attached": lambda lam: attached_step(model, loaded, lam, False),
        "attached, decoupled": lambda lam: attached_step(model, loaded, lam, True),
    }
    theta = parameters_of(model)
    for way, apply in ways.items():
        both.refused(f"lam, {way}", loaded, lambda apply=apply: apply(LAM + rank))
        if parameters_of(model) != theta:
            both.changed.append(f"lam, {way}: parameters")
    both.refused("another way", loaded, lambda: ways["decoupled" if rank else "gradient"](LAM))
    if rank == 0 and not is_sharded(model):
        loaded.penalty(LAM)  # a value that is only looked at needs no others
    model.zero_grad()
    value = loaded.penalty(LAM)
    value.backward()
    sums = [float(unsharded(p.grad).square().sum()) for p in model.parameters()]
    ways["gradient"](LAM * (1 + rank))  # agreed already: a schedule may change it, and nothing is exchanged for it
    return {"errors": both.errors, "changed": both.changed, "value": float(value.detach()), "gradient": sum(sums)}


def attached_step(model: nn.Module, history, lam: float, decoupled: bool) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    history.attach(optimizer, lam, decoupled=decoupled)
    try:
        optimizer.step()
    finally:
        history.detach()


def is_sharded(model: nn.Module) -> bool:
    return not isinstance(model, nn.parallel.DistributedDataParallel)


def parameters_of(model: nn.Module) -> list:
    return [unsharded(parameter.detach()).tolist() for parameter in model.parameters()]


FAILING = {"no file": "load", "no parameter": "rebind", "no checkpoint": "load_history", "no folder": "save"}


def test_a_digest_is_of_names_shapes_and_bits(monkeypatch):
    x = torch.randn(3, 4, 5, 5)
    swapped, nearly = x.clone(), x.clone()
    swapped.view(-1)[[0, 1]] = x.view(-1)[[1, 0]]
    nearly.view(torch.int32).view(-1)[-1] += 1
    of = {"x": x, "int8": torch.arange(7, dtype=torch.int8), "number": torch.tensor(2), "none": torch.empty(0)}
    expected = digest(of)
    for other in (swapped, nearly, x.double(), x.view(12, 25), -x):
        assert digest(of | {"x": other}) != expected
    assert digest({"y": x}) != digest({"x": x})
    for numbers in (torch.rand(64).double(), torch.rand(2048, 1024), torch.rand(2, 2).double()):
        for other in (2 * numbers, -numbers, numbers.flip(0)):
            assert digest({"x": other}) != digest({"x": numbers})
    monkeypatch.setattr(agreement, "_CHUNK", 7)
    same = of | {"x": nn.Parameter(x.to(memory_format=torch.channels_last))}
    assert digest(dict(reversed(same.items()))) == expected
    others = {"meta": x.to("meta"), "sparse": torch.eye(2).to_sparse(), "complex": torch.eye(2) * 1j, "text": "none"}
    assert digest(others | {"complex128": torch.eye(2).cdouble()})  # all are refused later


def test_a_penalty_under_vmap_is_compared_by_nobody():
    history = past_tasks.history_of(network(), "low_rank")
    history._is_new = True
    lams = torch.ones(3, dtype=torch.float64)
    slopes = torch.func.vmap(torch.func.grad(history.penalty))(lams)
    assert torch.equal(slopes, history.penalty(1.0).detach().expand(3))
    assert history._is_new
    history.penalty(1.0).backward()
    assert not history._is_new


WAYS = ("gradient", "decoupled", "loss", "inside", "attached", "attached, decoupled")


def test_processes_that_differ_are_named_in_all_of_them_and_nothing_changes(tmp_path):
    ranks = processes(2, cases, tmp_path)
    alone = [rank.pop("bare") for rank in ranks]
    assert alone[0].pop("interrupted") is None
    assert alone[1].pop("interrupted").startswith("a call: rank 1 has waited 0:00:00.100000 (the timeout")
    assert alone[0] == alone[1]
    assert alone[0]["after it"] is None
    assert "differ in the history: LowRankHistory(2 tasks, 2 terms, " in alone[0]["history"]
    assert "differ in the lam: 1.5 in rank 0, and 2.5 in rank 1" in alone[0]["lam"]
    assert "differ in the penalty: a decoupled step in rank 0, and a gradient in rank 1" in alone[0]["mode"]
    for name, mine in ranks[0].items():
        kind = name.split()[1]
        errors, others = mine["errors"], ranks[1][name]["errors"]
        assert mine["changed"] == ranks[1][name]["changed"] == [], name
        for case in ("another Fisher", "another call", "another file", "another state", "another way"):
            assert errors[case] == others[case] is not None, (name, case)
            assert errors[case].startswith("RuntimeError: the processes that share the model differ in the"), case
            assert "in rank 0, and" in errors[case]
            assert "in rank 1. Nothing has changed in any of them." in errors[case]
        assert "the call: append in rank 0, and load_state_dict in rank 1" in errors["another call"]
        assert "the Fisher: " in errors["another Fisher"]
        assert "Append one Fisher in all of them" in errors["another Fisher"]
        assert "the penalty: a gradient in rank 0, and a decoupled step in rank 1" in errors["another way"]
        for way in WAYS:
            assert errors[f"lam, {way}"] == others[f"lam, {way}"]
            assert "the lam: 1.5 in rank 0, and 2.5 in rank 1" in errors[f"lam, {way}"]
        assert errors["a wrong Fisher"].startswith("TypeError: fisher is a ")
        assert others["a wrong Fisher"].startswith("RuntimeError: append has failed in rank 0, and nothing has changed")
        for case, call in FAILING.items():
            if case in errors:
                assert errors[case].startswith("ValueError: " if case == "no parameter" else "FileNotFoundError: ")
                assert others[case].startswith(f"RuntimeError: {call} has failed in rank 0, and nothing has changed in")
        assert ("no checkpoint" in errors) == ("no folder" in errors) == name.startswith("fsdp")
        if "a lone call" in errors:
            call = "save" if name == "fsdp diagonal" else "append"
            assert errors["a lone call"].startswith(
                f"RuntimeError: {call}: rank 0 has waited 0:00:00.100000 (the timeout"
            )
            assert "for rank 1, and nothing has changed. The processes [0, 1] share" in errors["a lone call"]

        model = network()
        history = past_tasks.HISTORIES[kind](model)
        for seed in range(2):
            history.append(fisher(kind, seed))
        (value := history.penalty(LAM)).backward()
        expected = sum(float(p.grad.square().sum()) for p in model.parameters())
        for rank in ranks:
            assert rank[name]["value"] == pytest.approx(float(value.detach()), rel=1e-9)
            assert rank[name]["gradient"] == pytest.approx(expected, rel=1e-9)
