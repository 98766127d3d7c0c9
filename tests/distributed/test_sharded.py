"""Histories of sharded models, FSDP2's and HSDP's, and DDP's: the same numbers as in one process, one exchange of K
numbers a step, state in proportion to the shards; checkpoints from n processes to m. Processes talk through gloo."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import past_tasks
from helpers.processes import processes
from helpers.sharded_models import (
    Tied,
    batches_of,
    everything_of,
    losses_of,
    network,
    sharded,
    sharded_for_estimates,
    strata_of,
    unsharded,
)
from torch import Tensor, nn

import crl_kernels as ck

LAM, LR, STEPS = 1.5, 0.05, 20
KINDS = tuple(past_tasks.HISTORIES)


def history_of(model: nn.Module, kind: str, **options) -> ck.LowRankHistory | ck.DiagonalHistory:
    """Two past tasks, unsharded, in every process."""
    return past_tasks.history_of(model, kind, unsharded=network(), **options)


def loss_of(model: nn.Module, step: int, rank: int, count: int) -> Tensor:
    """This process's share of the step's samples."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)[rank::count]
    return (model(x) - x[:, :3].sin()).square().mean()


def train(model: nn.Module, kind: str, mode: str, rank: int = 0, count: int = 1) -> tuple[list[float], Tensor]:
    """(values of the penalty, parameters at the end) of 20 steps."""
    history = history_of(model, kind)
    penalty = ck.diagonal_ewc_penalty if kind == "diagonal" else ck.rank1_ewc_penalty
    if mode.startswith("inside"):
        optimizer = ck.FusedAdamW(
            model.parameters(), lr=LR, history=history, lam=LAM, decoupled=mode == "inside-decoupled"
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    if mode in ("attached", "decoupled"):
        history.attach(optimizer, LAM, decoupled=mode == "decoupled")
    values = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step, rank, count)
        if mode == "loss":
            loss = loss + penalty(history, lam=LAM)
        loss.backward()
        if mode == "gradient":
            values.append(float(history.add_penalty_grad_(LAM)))
        else:
            values.append(float(history.penalty(LAM).detach()))
        optimizer.step()
    return values, torch.cat([unsharded(p.detach()).flatten() for p in model.parameters()])


MODES = ("loss", "gradient", "attached", "decoupled", "inside", "inside-decoupled")


# Numbers


def trainings(rank: int, count: int, folder: Path) -> dict:
    kinds = ("hsdp",) if count == 4 else ("fsdp", "ddp")
    return {
        f"{wrapped} {kind} {mode}": [values, end.tolist()]
        for wrapped in kinds
        for kind in KINDS
        for mode in MODES
        for values, end in [train(sharded(count, wrapped), kind, mode, rank, count)]
    }


@pytest.mark.parametrize("count", [2, 4])
def test_training_in_several_processes_is_training_in_one(tmp_path, count):
    ranks = processes(count, trainings, tmp_path)
    for name, (values, end) in ranks[0].items():
        _, kind, mode = name.split()
        expected, single_end = train(network(), kind, mode)
        end = torch.tensor(end, dtype=torch.float64)
        assert float((end - single_end).norm() / single_end.norm()) < 1e-6, name
        assert values == pytest.approx(expected, rel=1e-6), name
        assert all(rank[name] == ranks[0][name] for rank in ranks)


def one_step(rank: int, count: int, folder: Path) -> dict:
    """Exchanges while a step of a history is taken, and its bytes of state."""
    calls: list[int] = []
    original = dist.all_reduce

    def counted(tensor, *arguments, **options):
        calls.append(tensor.numel())
        assert tensor.dtype == torch.float64
        return original(tensor, *arguments, **options)

    costs = {}
    for kind in KINDS:
        history = history_of(sharded(count), kind)
        dist.all_reduce = counted
        history.add_penalty_grad_(LAM)
        history.decoupled_step_(LAM, LR)
        dist.all_reduce = original
        costs[kind] = [list(calls), history.nbytes]
        calls.clear()

        model = sharded(count)
        optimizer = ck.FusedAdamW(model.parameters(), history=history_of(model, kind), lam=LAM)
        for step in range(2):
            loss_of(model, step, rank, count).backward()
            if step:  # the first step also reads the projections that are carried from then on
                dist.all_reduce = counted
            optimizer.step()
            dist.all_reduce = original
        moments = [
            p.to_local().nbytes for state in optimizer.state.values() for p in (state["exp_avg"], state["exp_avg_sq"])
        ]
        costs[kind] += [list(calls), sum(moments)]
        calls.clear()
    return costs


def test_one_exchange_of_k_numbers_a_step_and_state_in_proportion(tmp_path):
    ranks = processes(2, one_step, tmp_path)
    for rank in ranks:
        assert rank["low_rank"][0] == [2, 2]  # once for the gradient, once for the decoupled step
        assert rank["diagonal"][0] == [1]  # for the value; the step needs nothing of others
        assert (rank["low_rank"][2], rank["diagonal"][2]) == ([2], [1])  # with the penalty inside AdamW
    for kind, vectors, scalars in (("low_rank", 2, 4 * 8), ("diagonal", 2, 8)):
        padding = 8 * (6 + 1 + 5 + 1)  # at most a row of each parameter more than its half
        assert history_of(network(), kind).nbytes == vectors * 8 * 53 + scalars
        for rank in ranks:
            assert rank[kind][1] <= vectors * (8 * 53 // 2 + padding) + scalars
            assert rank[kind][3] <= 2 * (8 * 53 // 2 + padding)


def written(rank: int, count: int, folder: Path) -> list[float]:
    """How far a step is from the values that were written to 16-bit shards before it."""
    distances = []
    for whole in (True, False):
        model = sharded(count, model=network().bfloat16())
        optimizer = ck.FusedAdamW(model.parameters(), lr=1e-3, history=history_of(model, "low_rank"), lam=LAM)
        for step in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            if step == 0:
                for parameter in model.parameters():
                    (parameter if whole else parameter.to_local()).data.add_(1.0)
                values = [parameter.to_local().clone() for parameter in model.parameters()]
                optimizer.lam = 0.0
        for parameter, value in zip(model.parameters(), values, strict=True):
            distances += (parameter.to_local() - value).abs().flatten().tolist()
    return [len(distances), max(distances, default=0.0)]


def test_a_write_through_data_to_16_bit_shards_is_where_the_next_step_begins(tmp_path):
    counts, distances = zip(*processes(2, written, tmp_path), strict=True)
    assert sum(counts) == 2 * 53
    assert max(distances) < 0.02


def offloaded(rank: int, count: int, folder: Path) -> list:
    values, end = train(sharded(count, "offload"), "low_rank", "attached", rank, count)
    return [values, end.tolist()]


def test_parameters_that_are_kept_on_the_cpu(tmp_path):
    values, end = processes(2, offloaded, tmp_path)[0]
    expected, single_end = train(network(), "low_rank", "attached")
    assert values == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(torch.tensor(end, dtype=torch.float64), single_end, rtol=1e-6, atol=1e-9)


def merged(rank: int, count: int, folder: Path) -> list:
    history = history_of(sharded(count), "low_rank", max_terms=1, decay=0.5, first_order=True)
    return [history.drift().tolist(), float(history.penalty(LAM).detach()), history.stiffness(LAM, LR)]


def test_options_of_a_history_mean_the_same(tmp_path):
    history = history_of(network(), "low_rank", max_terms=1, decay=0.5, first_order=True)
    drift, value, stiffness = processes(2, merged, tmp_path)[0]
    assert [abs(x) for x in drift] == pytest.approx([abs(x) for x in history.drift().tolist()], rel=1e-9)
    assert value == pytest.approx(float(history.penalty(LAM).detach()), rel=1e-9)
    assert stiffness == pytest.approx(history.stiffness(LAM, LR), rel=1e-9)


def by_columns(rank: int, count: int, folder: Path) -> list[int]:
    """A weight whose columns are in different processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model, mesh = nn.Linear(6, 5, bias=False), init_device_mesh("cpu", (count,))
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(1)]))
    params = {"weight": torch.ones(5, 6)}
    history = ck.LowRankHistory(model)
    history.append(past_tasks.random_fisher(params, "low_rank", 0))
    state = ck.LowRankHistory(whole := nn.Linear(6, 5, bias=False))
    state.append(past_tasks.random_fisher(dict(whole.named_parameters()), "int8", 0))
    refused = []
    for call in (
        lambda: history.append(past_tasks.random_fisher(params, "int8", 0)),
        lambda: history.load_state_dict(state.state_dict()),
    ):
        with pytest.raises(
            ValueError, match=r"'weight' is placed as .*beside int8 directions.* Use storage_dtype=torch.bfloat16"
        ):
            call()
        refused.append(len(history))
    return refused


def test_int8_directions_of_parameters_that_are_sharded_by_columns_are_refused(tmp_path):
    assert processes(2, by_columns, tmp_path) == [[1, 1]] * 2


def history_with_tail(model: nn.Module) -> ck.LowRankHistory:
    """Two directions, and the diagonal of what two more tasks leave out."""
    return history_of(model, "low_rank", tasks=4, max_terms=2, tail="diagonal", decay=0.5)


def applied(model: nn.Module, rank: int = 0, count: int = 1) -> dict:
    """What a history with a diagonal tail does, attached, in the loss and by hand, and its diagonal at the end."""
    history, results = history_with_tail(model), {}
    for decoupled in (False, True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        history.attach(optimizer, LAM, decoupled=decoupled)
        for step in range(3):
            optimizer.zero_grad()
            (loss_of(model, step, rank, count) + history.penalty(LAM)).backward()
            optimizer.step()
        history.detach()
        parameters = [unsharded(p.detach()).flatten() for p in model.parameters()]
        results[f"parameters, {decoupled}"] = torch.cat(parameters).tolist()
    history.append(past_tasks.random_fisher(past_tasks.trainable(network()), "low_rank", 9))
    results["values"] = [float(history.add_penalty_grad_(LAM)), float(history.penalty(LAM).detach())]
    results["stiffness"] = history.stiffness(LAM, LR)
    return results | {"diagonal": torch.cat([unsharded(t).flatten() for t in diagonal_state(history)]).tolist()}


def diagonal_state(history: ck.LowRankHistory) -> list[Tensor]:
    return [t for name, t in history.state_dict().items() if name.startswith(("fisher_diagonal.", "anchor.", "resid"))]


def applied_by_shards(rank: int, count: int, folder: Path) -> dict:
    results = applied(sharded(count), rank, count)
    history = history_with_tail(sharded(count))
    history.save(folder / "tail.safetensors")
    loaded = ck.LowRankHistory.load(folder / "tail.safetensors", sharded(count))
    assert bits(loaded) == bits(history)
    return results | {"suggested": history.suggest_lam(LR, 10) if rank == 0 else 0.0, "saved": bits(history)}


def test_a_diagonal_tail_means_the_same(tmp_path):
    ranks = processes(2, applied_by_shards, tmp_path)
    for name, expected in applied(network()).items():
        for rank in ranks:
            assert rank[name] == pytest.approx(expected, rel=1e-6), name
    history = history_with_tail(network())
    assert ranks[0]["suggested"] == pytest.approx(history.suggest_lam(LR, 10), rel=1e-9)
    alone = ck.LowRankHistory.load(tmp_path / "tail.safetensors", network())
    assert bits(alone) == ranks[0]["saved"]
    assert sum(float(t.sum()) for t in diagonal_state(alone)) != 0


def suggestions(rank: int, count: int, folder: Path) -> dict:
    """Asked for by the first process alone: nothing may be exchanged."""
    histories = {kind: history_of(sharded(count), kind) for kind in KINDS}
    return {kind: history.suggest_lam(LR, 100) for kind, history in histories.items()} if rank == 0 else {}


def test_one_process_alone_may_ask_for_a_lam(tmp_path):
    suggested = processes(2, suggestions, tmp_path)[0]
    for kind in KINDS:
        assert suggested[kind] == pytest.approx(history_of(network(), kind).suggest_lam(LR, 100), rel=1e-9)


def small_bias(rank: int, count: int, folder: Path) -> dict:
    """One parameter of three numbers on four processes: the last one has none of them."""
    results = {}
    for kind in KINDS:
        model = sharded(count)
        history = history_of(model, kind, include=["2.bias"])
        value = float(history.add_penalty_grad_(LAM))
        history.decoupled_step_(LAM, LR)
        optimizer = ck.FusedAdamW(model.parameters(), lr=LR, history=history, lam=LAM)
        optimizer.step()
        local = history.nbytes
        results[kind] = [value, unsharded(model[2].bias.detach()).tolist(), bits(history), local]
    return results


def test_a_process_may_have_nothing_of_what_is_bound(tmp_path):
    ranks = processes(4, small_bias, tmp_path)
    for kind in KINDS:
        model = network()
        history = history_of(model, kind, include=["2.bias"])
        value = float(history.add_penalty_grad_(LAM))
        history.decoupled_step_(LAM, LR)
        ck.FusedAdamW(model.parameters(), lr=LR, history=history, lam=LAM).step()
        vectors = 2 * 3 * (1 + 4 if kind == "int8" else 8)
        assert ranks[3][kind][3] == history.nbytes - vectors  # scalars alone
        for rank in ranks:
            assert rank[kind][0] == pytest.approx(value, rel=1e-9)
            assert rank[kind][1] == pytest.approx(model[2].bias.tolist(), rel=1e-9)
            assert rank[kind][2] == bits(history)


# Files and checkpoints


def bits(history) -> dict[str, list]:
    return {name: unsharded(tensor).double().tolist() for name, tensor in history.state_dict().items()}


def saving(rank: int, count: int, folder: Path) -> dict:
    import torch.distributed.checkpoint as dcp

    saved = {}
    for kind in KINDS:
        history = history_of(sharded(count), kind)
        history.save(folder / f"{kind}.safetensors")
        dcp.save({"history": history.state_dict()}, checkpoint_id=folder / kind)
        saved[kind] = bits(history)
    return saved


def loading(rank: int, count: int, folder: Path) -> dict:
    from crl_kernels.integrations.distributed_checkpoint import load_history

    source, loaded = folder.parent / "saved", {}
    for kind in KINDS:
        history_type = past_tasks.HISTORIES[kind]
        model = sharded(count, "hsdp" if count == 4 else "fsdp")
        history = history_type(model)
        load_history(history, source / kind)
        loaded[kind] = [bits(history), bits(history_type.load(source / f"{kind}.safetensors", model))]
        if kind == "low_rank":
            try:
                load_history(history, source / kind, key="absent")
            except ValueError as error:
                loaded["absent"] = str(error)
    return loaded


def test_saved_by_two_loaded_by_four_and_by_one_bit_for_bit(tmp_path):
    saved = processes(2, saving, tmp_path / "saved")
    loaded = processes(4, loading, tmp_path / "loaded")
    alone = processes(1, loading, tmp_path / "alone")
    for kind in KINDS:
        assert saved[0][kind] == bits(history_of(network(), kind))
        for rank in loaded + alone:
            assert rank[kind] == [saved[0][kind]] * 2
        history_type = past_tasks.HISTORIES[kind]
        assert bits(history_type.load(tmp_path / "saved" / f"{kind}.safetensors", network())) == saved[0][kind]
    assert "has nothing under key='absent'" in loaded[0]["absent"]


# Estimates


def at_timestep(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return losses_of(model, x) * (1 + t / 1000)


ESTIMATES = {
    "mean": (losses_of, {}),
    "top 2": (losses_of, {"rank": 2}),
    "strata, bfloat16": (strata_of, {"storage_dtype": torch.bfloat16}),
    "in-sample": (losses_of, {"unbiased": False}),
    "a part": (losses_of, {"include": ["*.weight"]}),
    "diagonal": (losses_of, {"kind": "diagonal"}),
}


def same_bits(actual: object, expected: object) -> bool:
    if isinstance(actual, Tensor):
        return torch.equal(actual, expected)
    if isinstance(actual, dict):
        return actual.keys() == expected.keys() and all(
            same_bits(value, expected[key]) for key, value in actual.items()
        )
    if isinstance(actual, ck.FisherStatistics):  # it may have NaN
        return repr(actual) == repr(expected)
    return actual == expected


def estimates(rank: int, count: int, folder: Path) -> list[str]:
    wrong = []
    for name in ("fsdp", "tied") if count == 2 else ("hsdp", "offload", "part"):
        model, group = sharded_for_estimates(rank, count, name)
        make = Tied if name == "tied" else network
        batches = batches_of(rank)
        losses_of(model, batches[0]).mean().backward()
        gradients = [unsharded(p.grad) for p in model.parameters() if p.grad is not None]
        before = everything_of(model)
        history = ck.LowRankHistory(model)
        with torch.no_grad():
            losses_of(model, batches[0])  # leaves the root's parameters whole

        def compare(quantity: str, actual: object, expected: object, name: str = name) -> None:
            if not same_bits(actual, expected):
                wrong.append(f"{name}: {quantity}")

        def fisher_of(loss: Callable, make: Callable = make, group: object = group, **options) -> object:
            return ck.estimate_fisher(make(), loss, batches_of(rank), process_group=group, **options)

        for estimate, (loss, options) in ESTIMATES.items():
            with ck.whole_parameters(model):
                fisher = ck.estimate_fisher(model, loss, batches, **options)
            compare(estimate, vars(fisher), vars(fisher_of(loss, **options)))
        with ck.whole_parameters(model), ck.whole_parameters(model):
            fisher = ck.estimate_fisher(model, losses_of, batches)
            with torch.no_grad():
                next(model.parameters()).add_(1)  # is lost
        compare("in a block", vars(fisher), vars(fisher_of(losses_of)))
        diagnosis = ck.diagnose(model, at_timestep, batches, samples=48, timesteps=[0, 500])
        compare("diagnosis", diagnosis, ck.diagnose(make(), at_timestep, batches, samples=48, timesteps=[0, 500]))
        with ck.whole_parameters(model), ck.SampleGradients(model) as sg:
            losses_of(model, batches[0]).sum().backward()
        with ck.SampleGradients(alone := make()) as expected:
            losses_of(alone, batches[0]).sum().backward()
        compare("mean", sg.mean, expected.mean)
        compare("norms", sg.sq_norms, expected.sq_norms)
        with pytest.raises(ZeroDivisionError):
            ck.estimate_fisher(model, lambda model, x: 1 / 0, batches)
        compare("what must be as it was", everything_of(model), before)

        # The history of it, and training.
        with ck.whole_parameters(model):
            history.append(ck.estimate_fisher(model, losses_of, batches))
        unsharded_history = ck.LowRankHistory(alone)
        unsharded_history.append(fisher_of(losses_of))
        with torch.no_grad():
            for parameter in (*model.parameters(), *alone.parameters()):
                parameter.add_(0.1)
        if abs(float(history.penalty(LAM)) / float(unsharded_history.penalty(LAM)) - 1) > 1e-12:
            wrong.append(f"{name}: history")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1)
        model.zero_grad()
        losses_of(model, batches[0]).mean().backward()
        for gradient, expected in zip((p.grad for p in model.parameters() if p.requires_grad), gradients, strict=True):
            if not torch.allclose(unsharded(gradient), expected, rtol=1e-9, atol=1e-12):
                wrong.append(f"{name}: gradients afterwards")
    return wrong


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.filterwarnings("ignore:only .* of the trace", "ignore:the mean gradient.* is mostly noise")
def test_a_sharded_models_fisher_is_that_of_the_unsharded_one(tmp_path, count):
    """Bit for bit, from loaders of unequal lengths; afterwards the model is as it was, and trains."""
    assert processes(count, estimates, tmp_path) == [[]] * count


# Wrong use


def refusals(rank: int, count: int, folder: Path) -> list[str]:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    messages = []

    def expect(call: Callable[[], object]) -> None:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        messages.append(str(error.value))

    mesh = init_device_mesh("cpu", (count,))
    partly = network()
    fully_shard(partly[0], mesh=mesh)
    expect(lambda: ck.LowRankHistory(partly))
    assert ck.LowRankHistory(partly, include=["0"]).names == ("0.weight", "0.bias")

    model = sharded(count)
    history = history_of(model, "low_rank")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight = model[0].weight
    weight.grad = weight.grad.redistribute(placements=[Replicate()])
    before = [unsharded(p.grad).clone() for p in model.parameters()]
    expect(lambda: history.add_penalty_grad_(LAM))
    assert all(torch.equal(unsharded(p.grad), g) for p, g in zip(model.parameters(), before, strict=True))

    # A state as it lies in other processes, and one process's part of it.
    state = history.state_dict()
    kept = {name: unsharded(tensor).clone() for name, tensor in state.items()}
    single = DeviceMesh("cpu", [0])
    elsewhere = {n: distribute_tensor(t, single, src_data_rank=None) if t.dim() else t for n, t in kept.items()}
    pieces = {n: t.to_local() if hasattr(t, "to_local") else t for n, t in state.items()}
    for wrong in (elsewhere, pieces):
        expect(lambda wrong=wrong: history.load_state_dict(wrong))
        assert all(torch.equal(unsharded(tensor), kept[name]) for name, tensor in history.state_dict().items())

    direction = {"0.weight": torch.ones(5, 6, dtype=torch.float64)}
    expect(lambda: ck.SampleGradients(model))
    expect(lambda: ck.jvp_projections(model, losses_of, torch.zeros(2, 6, dtype=torch.float64), direction))

    batches = [torch.zeros(4, 6, dtype=torch.float64)] * 2
    tensor_parallel = parallelize_module(network(), mesh, {"0": ColwiseParallel()})
    expect(lambda: ck.estimate_fisher(tensor_parallel, losses_of, batches))
    both = init_device_mesh("cpu", (1, count), mesh_dim_names=("data", "tensor"))
    two_ways = parallelize_module(network(), both["tensor"], {"0": ColwiseParallel()})
    fully_shard(two_ways, mesh=both["data"])
    expect(lambda: ck.estimate_fisher(two_ways, losses_of, batches))
    two_meshes = network()
    fully_shard(two_meshes[0], mesh=init_device_mesh("cpu", (1, count), mesh_dim_names=("copies", "shards")))
    fully_shard(two_meshes, mesh=mesh)
    expect(lambda: ck.estimate_fisher(two_meshes, losses_of, batches))
    expect(lambda: ck.estimate_fisher("model", losses_of, batches))

    failed = fully_shard(network(), mesh=mesh)
    failed[1].register_forward_hook(lambda module, args, output: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        losses_of(failed, batches[0])
    with pytest.raises(RuntimeError, match="a forward pass that failed has left them so"):
        ck.estimate_fisher(failed, losses_of, batches)
    return messages


def test_wrong_use_gives_one_clear_error(tmp_path):
    messages = processes(2, refusals, tmp_path)[0]
    assert messages[0].startswith("parameter '2.weight' is whole and others are sharded. Bind a history to each kind")
    assert messages[1].startswith(
        "the gradient of '0.weight' is placed as (Replicate(),) and the parameter as (Shard(dim=0),)"
    )
    assert messages[2].startswith("a tensor is sharded over DeviceMesh")
    assert "'0.weight' has shape (3, 6) in the state and (5, 6) in the model" in messages[3]
    for message in messages[4:6]:
        assert message.startswith("model has sharded parameters, such as '0.weight'")
        assert message.endswith("in a block of crl_kernels.whole_parameters(model).")
    for message in messages[6:8]:
        assert "of a Linear is placed as" in message
        assert "not by fully_shard alone" in message
    assert "of a Linear is on DeviceMesh" in messages[8]
    assert messages[9].startswith("model is a str")
