"""Fishers of sharded models that are never gathered: the numbers of the whole model's, memory, and what is refused."""

import math
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.fisher_problems import IGNORE_ESTIMATE_WARNINGS
from helpers.processes import processes
from helpers.sharded_models import (
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import crl_kernels as ck

pytestmark = [*IGNORE_ESTIMATE_WARNINGS, pytest.mark.cpu("processes of a gloo group")]

LAM = 1.5
ESTIMATES = {
    "mean": (losses_of, {}),
    "float32 directions": (losses_of, {"storage_dtype": torch.float32}),
    "int8 directions": (losses_of, {"storage_dtype": torch.int8}),
    "strata": (strata_of, {}),
    "a part": (losses_of, {"include": ["*.weight"]}),
    "some samples": (losses_of, {"max_samples": 21}),
    "diagonal": (losses_of, {"kind": "diagonal"}),
}
# How a stratum's samples are divided for the variance of its mean is not the same: see _plan_shared_sums.
PARTED = {"kappa_se"}


def far_apart(actual: object, expected: object, skipped: set[str]) -> bool:
    """Whether numbers of two Fishers, or of their statistics, differ by more than 1e-6."""
    if isinstance(expected, dict):
        return any(far_apart(actual[key], value, skipped) for key, value in expected.items() if key not in skipped)
    if isinstance(expected, (list, tuple)):
        return len(actual) != len(expected) or any(
            far_apart(*pair, skipped) for pair in zip(actual, expected, strict=True)
        )
    if isinstance(expected, Tensor):
        return float((actual.double() - expected.double()).norm()) > 1e-6 * float(expected.double().norm())
    if isinstance(expected, float):
        return actual != pytest.approx(expected, rel=1e-6, nan_ok=True)
    return actual != expected


def numbers_of(fisher: ck.LowRankFisher | ck.DiagonalFisher) -> dict:
    facts = {name: value for name, value in vars(fisher).items() if isinstance(value, Tensor)}
    if isinstance(fisher, ck.LowRankFisher):
        facts["directions"] = fisher.directions
    return facts | {"names": fisher.layout.names, "statistics": asdict(fisher.statistics)}


def estimates(rank: int, count: int, folder: Path) -> list[str]:
    wrong = []
    for name in ("fsdp", "tied") if count == 2 else ("hsdp", "offload"):
        model, _ = sharded_for_estimates(rank, count, name)
        batches = batches_of(rank)
        losses_of(model, batches[0]).mean().backward()
        with torch.no_grad():
            losses_of(model, batches[0])  # leaves the root's parameters whole
        model.reshard()
        before = everything_of(model), torch.get_rng_state().tolist(), random.getstate()
        for estimate, (loss, options) in ESTIMATES.items():
            include = options.get("include")
            fisher = ck.estimate_fisher(model, loss, batches, **options)
            with ck.whole_parameters(model):
                expected = ck.estimate_fisher(model, loss, batches, **options)
            fisher.save(file := folder / f"{name} {estimate}.safetensors")
            skipped = PARTED if estimate == "strata" else set()
            if far_apart(numbers_of(ck.load_fisher(file)), numbers_of(expected), skipped):
                wrong.append(f"{name}, {estimate}: numbers")

            make = ck.DiagonalHistory if estimate == "diagonal" else ck.LowRankHistory
            histories = [make(model, include=include) for _ in range(2)]
            for history, appended in zip(histories, (fisher, expected), strict=True):
                history.append(appended)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1)
            value, expected_value = (float(history.penalty(LAM).detach()) for history in histories)
            if not math.isclose(value, expected_value, rel_tol=1e-6) or not value > 0:
                wrong.append(f"{name}, {estimate}: penalty {value}, {expected_value}")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1)
            if estimate != "diagonal" and any(
                u.placements != p.placements
                for term in fisher.named_directions()
                for u, p in zip(term.values(), (dict(model.named_parameters())[n] for n in term), strict=True)
            ):
                wrong.append(f"{name}, {estimate}: placements")
        after = everything_of(model), torch.get_rng_state().tolist(), random.getstate()
        if after[0][0] != before[0][0] or after[1:] != before[1:]:
            wrong.append(f"{name}: what must be as it was")
    return wrong


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_it_is_the_whole_models_fisher(tmp_path, count):
    """From loaders of unequal lengths, with FSDP, HSDP, tied parameters and CPU offload."""
    assert processes(count, estimates, tmp_path) == [[]] * count


# Memory


class LargestTensors(TorchDispatchMode):
    """The elements of the largest tensor that an operator returns, and of the largest one that processes exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.returned = self.exchanged = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.returned = max([self.returned, *map(Tensor.numel, real_tensors(result))])
        if func.namespace == "c10d":
            self.exchanged = max([self.exchanged, *map(Tensor.numel, real_tensors(args))])
        return result


def real_tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


LAYER = 32 * 32 + 32


def memory(rank: int, count: int, folder: Path) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(8)))
    mesh = init_device_mesh("cpu", (count,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batches = [torch.randn(2, 32, generator=torch.Generator().manual_seed(rank)) for _ in range(4)]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x.cos()).square().mean(1)

    def measured(**options) -> list[int]:
        with LargestTensors() as largest:
            history = (ck.DiagonalHistory if options else ck.LowRankHistory)(model)
            history.append(ck.estimate_fisher(model, loss, batches, **options))
        return [largest.returned, largest.exchanged]

    results = {"low rank": measured(), "diagonal": measured(kind="diagonal")}
    with ck.whole_parameters(model):
        with LargestTensors() as largest:
            ck.estimate_fisher(model, loss, batches)
        results["whole"] = [largest.returned, largest.exchanged]
    return results


def test_no_process_makes_or_sends_more_than_a_layer_and_its_own_shards(tmp_path):
    """Of a model of eight equal layers on four processes, to the history's new term."""
    for results in processes(4, memory, tmp_path):
        assert results["whole"] == [2 * 8 * LAYER] * 2  # both parts of the sum of gradients
        assert results["low rank"] == [2 * 8 * LAYER // 4, LAYER]  # the same, of a shard
        assert results["diagonal"] == [8 * LAYER // 4, LAYER]


# Random numbers, settings of training, precision


def noisy_losses(model: nn.Module, x: Tensor) -> Tensor:
    return losses_of(model, x + torch.randn_like(x) * random.random())


def circumstances(rank: int, count: int, folder: Path) -> dict:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(rank)
    random.seed(rank)
    model, batches, results = sharded(count), batches_of(rank), {}

    def curvature(model: nn.Module, loss: Callable = losses_of, data: list = batches, **options) -> list[float]:
        fisher = ck.estimate_fisher(model, loss, data, **options)
        return [*fisher.curvatures.tolist(), fisher.statistics.trace]

    results["plain"] = curvature(model)
    results["noise"] = curvature(model, noisy_losses)
    results["seeded"] = [curvature(model, noisy_losses, generator=torch.Generator().manual_seed(3)) for _ in range(2)]

    # Seen from outside, a sample of the second half is run by all processes, on one device with one noise.
    seen: list[list[float]] = []

    def recording(model: nn.Module, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        seen.append([*x.flatten().tolist(), *noise.flatten().tolist()])
        return losses_of(model, x + noise)

    curvature(model, recording, max_samples=6)
    results["samples"] = [values for values in seen if len(values) == 12]
    assert results["samples"]

    model.set_requires_gradient_sync(False)
    model[0].set_gradient_divide_factor(5.0)
    settings = [group.gradient_divide_factor for group in (model[0]._get_fsdp_state()._fsdp_param_groups)]
    results["settings"] = curvature(model)
    results["kept settings"] = settings == [5.0] and not model._get_fsdp_state()._fsdp_param_groups[0].reduce_grads

    mesh = init_device_mesh("cpu", (count,))
    results["checkpointed"] = curvature(fully_shard(checkpoint_wrapper(network()), mesh=mesh))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    half = network().float()
    fully_shard(half[0], mesh=mesh, mp_policy=policy)
    fully_shard(half, mesh=mesh, mp_policy=policy)
    results["bfloat16"] = curvature(half, data=[batch.float() for batch in batches])
    return results


def test_random_numbers_settings_and_precision(tmp_path):
    ranks = processes(2, circumstances, tmp_path)
    first = ranks[0]
    for results in ranks:
        for name in ("noise", "seeded", "samples"):
            assert results[name] == first[name], name
        assert results["seeded"][0] == results["seeded"][1] != results["noise"]
        for name in ("settings", "checkpointed"):
            assert results[name] == pytest.approx(first["plain"], rel=1e-9), name
        assert results["kept settings"]
        assert results["bfloat16"] == pytest.approx(first["plain"], rel=0.05)
        assert results["bfloat16"] != pytest.approx(first["plain"], rel=1e-5)


def runs_of_copies(rank: int, count: int, folder: Path) -> list[int]:
    """How many samples each process runs alone."""
    model, alone = sharded(count, "hsdp"), [0]

    def counting(model: nn.Module, x: Tensor) -> Tensor:
        alone[0] += len(x) == 1
        return losses_of(model, x)

    ck.estimate_fisher(model, counting, batches_of(rank), max_samples=8 + 8 * (rank // 2))
    return alone


def test_copies_run_samples_of_their_own(tmp_path):
    """Of HSDP's two copies, the first has two processes with four samples each, the second two with eight."""
    runs = [alone for (alone,) in processes(4, runs_of_copies, tmp_path)]
    stand_ins = [run - samples for run, samples in zip(runs, (8, 8, 16, 16), strict=True)]
    assert all(0 <= stand_in <= 1 for stand_in in stand_ins)


# Wrong use


def refusals(rank: int, count: int, folder: Path) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    messages = []

    def expect(call: Callable[[], object], error: type[Exception] = ValueError) -> None:
        with pytest.raises(error) as raised:
            call()
        messages.append(str(raised.value))

    model, batches = sharded(count), batches_of(rank)
    generator = torch.Generator().manual_seed(rank)
    alone = [dist.new_group([i]) for i in range(count)][rank]

    def estimate(loss: Callable = losses_of, model: nn.Module = model, data: list = batches, **options) -> object:
        return ck.estimate_fisher(model, loss, data, **options)

    expect(lambda: estimate(direction="top"))
    expect(lambda: estimate(rank=2))
    expect(lambda: estimate(unbiased=False))
    expect(lambda: estimate(mixed_losses=True))
    expect(lambda: estimate(process_group=alone))
    expect(lambda: estimate(lambda model, x: losses_of(model, x + torch.randn(x.shape, generator=generator).double())))
    expect(lambda: estimate(lambda model, x: losses_of(model, x) + losses_of(model, x).mean()))
    expect(lambda: estimate(lambda model, x: losses_of(model, x) * float("nan")))
    expect(lambda: estimate(lambda model, x: losses_of(model, x) * float("nan"), kind="diagonal"))
    expect(lambda: estimate(lambda model, x: losses_of(model, x) * 0))
    expect(lambda: estimate(lambda model, x: losses_of(model, x) * 0, kind="diagonal"))
    unsendable = [{"x": batch, "weight": lambda: 1} for batch in batches]
    expect(lambda: estimate(lambda model, batch: losses_of(model, batch["x"]), data=unsendable), TypeError)

    mesh = init_device_mesh("cpu", (count,))
    columns = fully_shard(nn.Linear(6, 4), mesh=mesh, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    expect(lambda: estimate(model=columns, storage_dtype=torch.int8))

    fisher = estimate(process_group=dist.group.WORLD)
    expect(lambda: ck.LowRankHistory(network()).append(fisher))

    # A loss that fails in the middle of either pass leaves the model as it was, ready for a step.
    failing = [0]

    def fails(model: nn.Module, x: Tensor) -> Tensor:
        y = losses_of(model, x)
        failing[0] -= 1
        return y if failing[0] else y + [][0]

    before = everything_of(model), torch.get_rng_state().tolist()
    for calls in (10, 40):
        failing[0] = calls
        with pytest.raises(IndexError):
            estimate(fails)
        assert (everything_of(model), torch.get_rng_state().tolist()) == before
    losses_of(model, batches[0]).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    messages.append(str(unsharded(next(model.parameters()).grad).shape))
    return messages


def test_wrong_use_gives_one_clear_error(tmp_path):
    ranks = processes(2, refusals, tmp_path)
    of_groups = [messages.pop(4) for messages in ranks]
    for rank, message in enumerate(of_groups):
        assert message.startswith(f"process_group has the processes [{rank}], and model is sharded over [0, 1]")
    assert ranks[0] == ranks[1]
    messages = iter(ranks[0])
    for _ in range(2):
        assert next(messages).startswith("direction is 'top', whose directions need whole per-sample gradients")
    for option in ("unbiased=False", "mixed_losses=True"):
        assert next(messages).startswith(f"{option} needs batches as they are")
    assert next(messages).startswith("per_sample_loss differs between processes for the same sample")
    assert next(messages).startswith("per_sample_loss mixes samples")
    for _ in range(2):
        assert next(messages).startswith("per_sample_loss has NaN or infinite gradients")
    assert next(messages).startswith("the mean gradient over the first half of the data is zero")
    assert next(messages).startswith("every per-sample gradient is zero")
    assert "cannot be sent to the other processes of a sharded model" in next(messages)
    assert next(messages).startswith("parameter 'weight' is placed as (Shard(dim=1),); expected shards of dimension 0")
    assert next(messages).startswith("fisher is sharded and the history's parameters are whole")
    assert not any("\n" in message for message in ranks[0])
