"""Parameters that join a history later; names of parameters where a child is called as wrappers call theirs."""

import math
from collections.abc import Callable

import pytest
import torch
from helpers.past_tasks import HISTORIES, KINDS, random_fisher, trainable
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import crl_kernels as ck

LAM, LR = 1.5, 0.05


class Heads(nn.Module):
    """A trunk, and a head for each task."""

    def __init__(self, *heads: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(5, 4)
        self.heads = nn.ModuleDict({name: nn.Linear(4, 2) for name in heads})
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x).tanh()
        return torch.stack([head(h) for head in self.heads.values()]).sum(0)


def join(model: Heads, name: str) -> None:
    torch.manual_seed(len(model.heads))
    model.heads[name] = nn.Linear(4, 2).to(model.trunk.weight.dtype)


def history_with_a_task(model: nn.Module, kind: str) -> tuple:
    """(history, the Fisher in it)"""
    first = random_fisher(trainable(model), kind, 1)
    history = HISTORIES[kind](model)
    history.append(first)
    return history, first


def penalty_of(fishers: list, params: dict[str, Tensor], weights: list[float] | None = None) -> Tensor:
    """The sum of tasks' penalties, each over its own parameters, written out in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for fisher, weight in zip(fishers, weights or [1.0] * len(fishers), strict=True):
        if isinstance(fisher, ck.LowRankFisher):
            for k, u in enumerate(fisher.directions.double()):
                parts = fisher.layout.split(u)
                x = sum((part * params[name].double()).sum() for name, part in parts.items())
                drift = x - fisher.anchor_projections[k]
                total = total + weight * LAM / 2 * fisher.curvatures[k] * drift**2
        else:
            f, m = fisher.layout.split(fisher.fisher_diagonal.double()), fisher.layout.split(fisher.anchor.double())
            for name, curvature in f.items():
                total = total + weight * LAM / 2 * (curvature * (params[name].double() - m[name]) ** 2).sum()
    return total


def assert_is_the_sum(history, model: nn.Module, fishers: list, weights: list[float] | None = None, rtol=1e-10) -> None:
    """Value, gradient in both ways, and the proximal step."""
    params = {name: p for name, p in trainable(model).items() if name in history.names}
    doubles = {name: p.detach().double().requires_grad_() for name, p in params.items()}
    expected = penalty_of(fishers, doubles, weights)
    gradients = torch.autograd.grad(expected, list(doubles.values()), allow_unused=True)
    model.zero_grad()
    value = history.penalty(LAM)
    assert value.item() == pytest.approx(expected.item(), rel=max(rtol, 1e-6 if value.dtype == torch.float32 else 0))
    value.backward()
    by_autograd = [p.grad.clone() for p in params.values()]
    model.zero_grad()
    assert float(history.add_penalty_grad_(LAM)) == pytest.approx(expected.item(), rel=rtol)
    for p, from_autograd, gradient in zip(params.values(), by_autograd, gradients, strict=True):
        gradient = torch.zeros_like(p) if gradient is None else gradient
        for actual in (p.grad, from_autograd):
            assert float((actual - gradient).norm()) <= max(rtol, 2e-7) * float(gradient.norm()) + 1e-12
    model.zero_grad()


# A head joins


@KINDS
def test_old_terms_are_zero_in_a_head_that_joins(kind):
    model = Heads("a")
    history, first = history_with_a_task(model, kind)
    before = history.state_dict()
    join(model, "b")
    history.rebind(model, grown=["heads.b"])
    assert history.names == tuple(trainable(model))
    after = history.state_dict()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    assert all(not tensor.any() for key, tensor in after.items() if key not in before)
    assert_is_the_sum(history, model, [first])
    head = [p.detach().clone() for p in model.heads["b"].parameters()]
    history.decoupled_step_(math.inf, LR)
    assert all(torch.equal(p, old) for p, old in zip(model.heads["b"].parameters(), head, strict=True))

    second = random_fisher(trainable(model), kind, 2)
    history.append(second)
    assert_is_the_sum(history, model, [first, second])


@KINDS
def test_a_fisher_that_was_estimated_on_all_parameters_is_appended(kind):
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean(1)

    model, batches = Heads("a"), [torch.randn(6, 5, dtype=torch.float64) for _ in range(4)]
    history, fishers = HISTORIES[kind](model), []
    options = {"kind": "low_rank", "storage_dtype": torch.int8} if kind == "int8" else {"kind": kind}
    for name in ("b", "c"):
        fishers.append(ck.estimate_fisher(model, losses, batches, **options))
        history.append(fishers[-1])
        join(model, name)
        history.rebind(model, grown=[f"heads.{name}.weight", f"heads.{name}.bias"])
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    fishers.append(ck.estimate_fisher(model, losses, batches, **options))
    history.append(fishers[-1])
    assert_is_the_sum(history, model, fishers)


@KINDS
@pytest.mark.parametrize("storage_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_several_joins_with_decay_and_rows_that_grow_at_once(kind, storage_dtype):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(2, 3), nn.ModuleList([nn.Linear(3, 3)])

    torch.manual_seed(0)
    model = Model()
    options = {"storage_dtype": storage_dtype} if kind == "low_rank" else {}
    history, fishers = HISTORIES[kind](model, decay=0.5), []
    for step in range(4):
        fishers.append(random_fisher(trainable(model), kind, step, **options))
        history.append(fishers[-1])
        old = model.embed
        model.embed = nn.Embedding(old.num_embeddings + 1, 3)
        with torch.no_grad():
            model.embed.weight[: old.num_embeddings] = old.weight
        model.blocks.append(nn.Linear(3, 3))
        history.rebind(model, grown=["embed", f"blocks.{step + 1}"])
    if kind == "low_rank":
        assert history.state_dict()["directions.0.blocks.4.weight"].dtype == storage_dtype
    rows = {name: p.shape for name, p in trainable(model).items()}
    for fisher in fishers:  # written out over the rows that each task had
        assert fisher.layout.shapes[0] < rows["embed.weight"]

    def first_rows(fisher) -> dict[str, Tensor]:
        known = dict(zip(fisher.layout.names, fisher.layout.shapes, strict=True))
        return {n: p[: known[n][0]] for n, p in trainable(model).items() if n in known}

    weights = [0.5**age for age in (3, 2, 1, 0)]
    expected = sum(
        penalty_of([f], {n: p.detach() for n, p in first_rows(f).items()}, [w])
        for f, w in zip(fishers, weights, strict=True)
    )
    assert history.penalty(LAM).item() == pytest.approx(expected.item(), rel=2e-6)
    assert float(history.add_penalty_grad_(LAM)) == pytest.approx(expected.item(), rel=2e-6)
    assert not model.blocks[4].weight.grad.any()
    assert not model.embed.weight.grad[5:].any()


def test_terms_are_merged_after_a_join():
    model = Heads("a")
    merged, plain = ck.LowRankHistory(model, max_terms=3), ck.LowRankHistory(model)
    for history in (merged, plain):
        history.append(random_fisher(trainable(model), "low_rank", 1))
    join(model, "b")
    for history in (merged, plain):
        history.rebind(model, grown=["heads.b"])
        for seed in (2, 3):
            history.append(random_fisher(trainable(model), "low_rank", seed))
    assert merged.penalty(LAM).item() == pytest.approx(plain.penalty(LAM).item(), rel=1e-12)
    merged.append(random_fisher(trainable(model), "low_rank", 4))
    assert len(merged) == 3
    assert merged._max_terms == 3


@KINDS
@pytest.mark.parametrize("decoupled", [False, True])
def test_optimizers_notice_parameters_that_join(kind, decoupled):
    """The penalty inside AdamW carries its projections; after a join it reads them anew, and needs the new group."""

    def run(inside: bool) -> list[Tensor]:
        model = Heads("a")
        history, _ = history_with_a_task(model, kind)
        penalty = {"history": history, "lam": LAM, "decoupled": decoupled} if inside else {}
        optimizer = (ck.FusedAdamW if inside else torch.optim.AdamW)(model.parameters(), lr=LR, **penalty)

        def steps() -> None:
            for seed in range(3):
                optimizer.zero_grad()
                x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                model(x).square().mean().backward()
                if not inside and decoupled:
                    history.decoupled_step_(LAM, optimizer.param_groups)
                elif not inside:
                    history.add_penalty_grad_(LAM)
                optimizer.step()

        steps()
        join(model, "b")
        history.rebind(model, grown=["heads.b"])
        if inside:
            before = [p.detach().clone() for p in model.parameters()]
            with pytest.raises(ValueError, match=r"'heads.b.weight', 'heads.b.bias', which the history has, are in no"):
                optimizer.step()
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        optimizer.add_param_group({"params": list(model.heads["b"].parameters()), "lr": LR / 2})
        steps()
        history.append(random_fisher(trainable(model), kind, 2))
        steps()
        return [p.detach() for p in model.parameters()]

    for actual, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@KINDS
def test_a_history_is_attached_again_after_a_join(kind):
    model = Heads("a")
    history, first = history_with_a_task(model, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    history.attach(optimizer, LAM)
    join(model, "b")
    with pytest.raises(RuntimeError, match="attached to an optimizer; call detach"):
        history.rebind(model, grown=["heads.b"])
    history.detach()
    history.rebind(model, grown=["heads.b"])
    with pytest.raises(ValueError, match=r"'heads.b.weight', 'heads.b.bias', which the history has, are in no"):
        history.attach(optimizer, LAM)
    optimizer.add_param_group({"params": list(model.heads["b"].parameters())})
    history.attach(optimizer, LAM)
    before, head = trainable(model), [p.detach().clone() for p in model.heads["b"].parameters()]
    doubles = {name: p.detach().clone().requires_grad_() for name, p in before.items()}
    gradients = torch.autograd.grad(penalty_of([first], doubles), list(doubles.values()), allow_unused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old, gradient in zip(before.values(), doubles.values(), gradients, strict=True):
        expected = old if gradient is None else old - LR * gradient
        torch.testing.assert_close(p.detach(), expected.detach(), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(p, old) for p, old in zip(model.heads["b"].parameters(), head, strict=True))


# What joins: a block, an adapter, a tied weight; and what include= and exclude= say


@KINDS
def test_a_block_that_is_trained_from_now_on_joins(kind):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    model[0].requires_grad_(False)
    history, first = history_with_a_task(model, kind)
    with pytest.raises(ValueError, match=r"grown pattern '0' matches no bound parameter: '0.weight' .* not require a"):
        history.rebind(model, grown=["0"])
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"lacks '0.weight', '0.bias', .* If they have joined .*, name them in grown="):
        history.rebind(model)
    with pytest.raises(ValueError, match=r"the Fisher has '0.weight', '0.bias', .* call history.rebind\(model, grown="):
        history.append(random_fisher(trainable(model), kind, 2))
    assert history.names == ("1.weight", "1.bias")
    history.rebind(model, grown=["0"])
    second = random_fisher(trainable(model), kind, 2)
    history.append(second)
    assert_is_the_sum(history, model, [first, second])
    model[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"has '1.weight', '1.bias', which the model lacks. '1.weight' is a parameter"):
        history.rebind(model)


@KINDS
def test_the_next_adapter_joins_a_history_of_adapters(kind, tmp_path):
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 4)
            self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
            self.add("one")

        def add(self, name: str) -> None:
            self.lora_A[name], self.lora_B[name] = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
            self.double()

    torch.manual_seed(0)
    model = Adapted()
    history = HISTORIES[kind](model, include=["*.one.*"], exclude=["base"])
    chosen = {n: p for n, p in trainable(model).items() if ".one." in n}
    first = random_fisher(chosen, kind, 1)
    history.append(first)
    history.save(tmp_path / "one.safetensors")
    model.add("two")
    model.add("three")
    history.rebind(model, grown=["*.two.*"])
    names = ("lora_A.one.weight", "lora_A.two.weight", "lora_B.one.weight", "lora_B.two.weight")
    assert history.names == names
    second = random_fisher({n: p for n, p in trainable(model).items() if n in names}, kind, 2)
    history.append(second)
    assert_is_the_sum(history, model, [first, second])
    history.save(tmp_path / "two.safetensors")
    assert HISTORIES[kind].load(tmp_path / "two.safetensors", model).names == names
    loaded = HISTORIES[kind].load(tmp_path / "one.safetensors", model, grown=["*.two.*"])
    assert loaded.names == names
    with pytest.raises(ValueError, match=r"grown pattern '\*.four.\*' matches none of the model's parameters"):
        loaded.rebind(model, grown=["*.four.*"])
    loaded.append(second)
    assert torch.equal(loaded.penalty(LAM), history.penalty(LAM))
    assert HISTORIES[kind].load(tmp_path / "one.safetensors", model).names == names[::2]  # include= leaves the rest out


@KINDS
def test_exclude_holds_for_parameters_that_join(kind):
    model = Heads("a")
    history = HISTORIES[kind](model, exclude=["*.bias"])
    history.append(random_fisher({n: p for n, p in trainable(model).items() if n.endswith("weight")}, kind, 1))
    join(model, "b")
    with pytest.raises(ValueError, match=r"'heads.b.bias' matches no bound parameter: .* left out by include= or excl"):
        history.rebind(model, grown=["heads.b.bias"])
    history.rebind(model, grown=["heads.b"])
    assert history.names == ("trunk.weight", "heads.a.weight", "heads.b.weight")


@KINDS
def test_a_head_tied_to_a_bound_weight_adds_only_its_bias(kind):
    model = Heads("a")
    history, first = history_with_a_task(model, kind)
    join(model, "b")
    model.heads["b"].weight = model.heads["a"].weight
    history.rebind(model, grown=["heads.b"])
    assert history.names == ("trunk.weight", "trunk.bias", "heads.a.weight", "heads.a.bias", "heads.b.bias")
    assert_is_the_sum(history, model, [first])
    # Registered before the one that is known, a tied weight is called by its own name, and is still the known one.
    tied_first = Heads("z", "a")
    tied_first.load_state_dict(model.state_dict() | {"heads.z.weight": model.heads["a"].weight}, strict=False)
    tied_first.heads["z"].weight = tied_first.heads["a"].weight
    state = history.state_dict()
    fresh = HISTORIES[kind](tied_first)
    assert "heads.z.weight" in fresh.names
    state = {key: t for key, t in state.items() if "heads.b" not in key}
    fresh.load_state_dict(state, grown=["heads.z.bias"])
    assert fresh.penalty(LAM).item() == pytest.approx(history.penalty(LAM).item(), rel=1e-12)


@KINDS
def test_grown_may_name_parameters_that_have_not_grown(kind):
    model = Heads("a", "b")
    model.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    history, first = history_with_a_task(model, kind)
    history.rebind(model, grown=["heads.*", "scale"])
    assert_is_the_sum(history, model, [first])
    for grown, error, message in (
        (["heads.c"], ValueError, "grown pattern 'heads.c' matches none of the model's parameters"),
        ("heads.a", TypeError, "grown is the string 'heads.a'; expected a list of patterns"),
        ([3], TypeError, "grown has 3; expected a list of patterns, which are strings"),
        (3, TypeError, "grown is 3; expected a list of patterns"),
    ):
        before = history.state_dict()
        with pytest.raises(error, match=message):
            history.rebind(model, grown=grown)
        with pytest.raises(error, match=message):
            history.load_state_dict(before, grown=grown)
        assert_is_the_sum(history, model, [first])
    fewer = Heads("a")
    fewer.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"has 'heads.b.weight', 'heads.b.bias', which the model lacks"):
        history.rebind(fewer, grown=["heads.a"])
    assert_is_the_sum(history, model, [first])


# Files and states of before and after


@KINDS
def test_files_and_states_from_before_and_after_a_join(kind, tmp_path):
    before, after = Heads("a"), Heads("a", "b")
    history, first = history_with_a_task(before, kind)
    history.save(tmp_path / "before.safetensors")
    state = history.state_dict()

    load = HISTORIES[kind].load
    with pytest.raises(ValueError, match=r"before.safetensors' lacks 'heads.b.weight', .* name them in grown="):
        load(tmp_path / "before.safetensors", after)
    with pytest.raises(ValueError, match=r"before.safetensors' does not fit: grown pattern 'heads.c' matches none"):
        load(tmp_path / "before.safetensors", after, grown=["heads.c"])
    loaded = load(tmp_path / "before.safetensors", after, grown=["heads.b"])
    assert_is_the_sum(loaded, after, [first])
    fresh = HISTORIES[kind](after)
    with pytest.raises(ValueError, match=r"the state lacks 'heads.b.weight'"):
        fresh.load_state_dict(state)
    fresh.load_state_dict(state, grown=["heads.b"])
    assert_is_the_sum(fresh, after, [first])

    second = random_fisher(trainable(after), kind, 2)
    loaded.append(second)
    loaded.save(tmp_path / "after.safetensors")
    assert_is_the_sum(load(tmp_path / "after.safetensors", after), after, [first, second])
    assert_is_the_sum(load(tmp_path / "after.safetensors", after, grown=["heads.b"]), after, [first, second])
    with pytest.raises(ValueError, match=r"after.safetensors' has 'heads.b.bias', 'heads.b.weight', which the model l"):
        load(tmp_path / "after.safetensors", before)
    with pytest.raises(ValueError, match=r"the state has 'heads.b.weight', 'heads.b.bias', which the model lacks"):
        history.load_state_dict(loaded.state_dict())
    assert_is_the_sum(history, before, [first])


@KINDS
def test_parameters_join_a_sharded_model(kind, process_group, tmp_path):
    from torch.distributed.fsdp import fully_shard

    unsharded = Heads("a", "b")
    history, _ = history_with_a_task(Heads("a"), kind)
    history.save(tmp_path / "h.safetensors")
    history.rebind(unsharded, grown=["heads.b"])

    sharded = fully_shard(Heads("a"))
    rebound = HISTORIES[kind].load(tmp_path / "h.safetensors", sharded)
    rebound.rebind(fully_shard(Heads("a", "b")), grown=["heads.b"])
    loaded = HISTORIES[kind].load(tmp_path / "h.safetensors", fully_shard(Heads("a", "b")), grown=["heads.b"])
    for grown in (history, rebound, loaded):
        grown.append(random_fisher(trainable(unsharded), kind, 2))
    for grown in (rebound, loaded):
        assert grown.penalty(LAM).item() == pytest.approx(history.penalty(LAM).item(), rel=1e-12)
    bad = {**rebound.state_dict()}
    key = next(key for key, tensor in bad.items() if key.endswith("heads.b.bias") and tensor.is_floating_point())
    bad[key] = bad[key] * math.nan
    with pytest.raises(ValueError, match=r"has NaN or infinite values in 'heads.b.bias'"):
        rebound.load_state_dict(bad)
    assert rebound.penalty(LAM).item() == pytest.approx(history.penalty(LAM).item(), rel=1e-12)


# Names


def inner_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"module": nn.Linear(3, 2)}).double()


def module_beside_others() -> nn.Module:
    """Without the prefix, 'module.weight' would be called as the model's own weight is."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"module": nn.Linear(3, 2), "head": nn.Linear(3, 2)})
    model.weight = nn.Parameter(torch.randn(2, 3))
    return model.double()


def module_in_module() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.ModuleDict({"module": nn.Linear(3, 2), "_orig_mod": nn.Linear(3, 2)})
    return nn.ModuleDict({"module": inner, "_fsdp_wrapped_module": nn.Linear(3, 2)}).double()


class Forwarding(nn.Module):
    """A wrapper that nobody knows, such as other libraries have."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "compile": torch.compile,
    "compile of DDP": lambda model: torch.compile(DistributedDataParallel(model)),
    "DDP of compile": lambda model: DistributedDataParallel(torch.compile(model)),
    "average": AveragedModel,
    "unknown": Forwarding,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("make", [inner_module, module_beside_others, module_in_module])
@KINDS
def test_a_child_called_module_works_everywhere(kind, make, wrapper, process_group, tmp_path):
    model, copy = make(), make()
    names = tuple(trainable(model))
    wrapped = WRAPPERS[wrapper](copy)
    history, first = history_with_a_task(model, kind)
    assert history.names == names
    assert_is_the_sum(history, model, [first])
    history.save(tmp_path / "plain.safetensors")
    expected = history.penalty(LAM)

    loaded = HISTORIES[kind].load(tmp_path / "plain.safetensors", wrapped)
    torch.testing.assert_close(loaded.penalty(LAM), expected, rtol=1e-12, atol=0)
    if wrapper != "unknown":
        assert loaded.names == names
    loaded.save(tmp_path / "wrapped.safetensors")
    back = HISTORIES[kind].load(tmp_path / "wrapped.safetensors", model)
    torch.testing.assert_close(back.penalty(LAM), expected, rtol=1e-12, atol=0)
    back.load_state_dict(loaded.state_dict())
    loaded.load_state_dict(history.state_dict())
    torch.testing.assert_close(loaded.penalty(LAM), expected, rtol=1e-12, atol=0)

    # Fishers by the names that named_parameters() of either has, appended to a history of either.
    raw = dict(zip(names, trainable(wrapped), strict=True))
    second = random_fisher({raw[name]: p for name, p in trainable(model).items()}, kind, 2)
    straight = random_fisher(trainable(model), kind, 2)
    history.append(straight)
    for appended in (loaded, back):
        appended.append(second)
        torch.testing.assert_close(appended.penalty(LAM), history.penalty(LAM), rtol=1e-12, atol=0)


def test_patterns_name_a_child_called_module(process_group):
    for model in (module_beside_others(), DistributedDataParallel(module_beside_others())):
        assert ck.LowRankHistory(model, include=["module"]).names == ("module.weight", "module.bias")
        assert ck.LowRankHistory(model, exclude=["module", "head"]).names == ("weight",)
    history = ck.LowRankHistory(module_beside_others(), include=["module.weight"])
    with pytest.raises(ValueError, match=r"lacks 'module.weight', which the history's model has"):
        history.append(random_fisher({"weight": torch.ones(2, 3)}, "low_rank", 1))


@KINDS
def test_names_of_earlier_versions_load(kind):
    """They had stripped 'module.' from the front of each name, a wrapper's or not."""
    model = nn.ModuleDict({"module": nn.Sequential(nn.Linear(3, 2)), "head": nn.Linear(3, 2)}).double()
    history, _ = history_with_a_task(model, kind)
    earlier = {key.replace(".module.", "."): tensor for key, tensor in history.state_dict().items()}
    assert earlier.keys() != history.state_dict().keys()
    loaded = HISTORIES[kind](model)
    loaded.load_state_dict(earlier)
    assert torch.equal(loaded.penalty(LAM), history.penalty(LAM))


def test_both_names_of_a_shared_parameter_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    both = {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"has 'b.weight', which the history's model lacks"):
        ck.LowRankHistory(model).append(random_fisher(both, "low_rank", 1))


def test_names_of_a_scripted_model():
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 2)))
    history = ck.LowRankHistory(model)
    assert history.names == ("0.weight", "0.bias")
    history.append(random_fisher(trainable(model), "low_rank", 1))


def test_a_distributed_checkpoint_of_before_a_join(tmp_path):
    import torch.distributed.checkpoint as dcp

    from crl_kernels.integrations.distributed_checkpoint import load_history

    before, after = Heads("a"), Heads("a", "b")
    history, first = history_with_a_task(before, "low_rank")
    second = random_fisher(trainable(after), "low_rank", 2)
    dcp.save({"history": history.state_dict()}, checkpoint_id=tmp_path / "c", no_dist=True)
    loaded = ck.LowRankHistory(after, include=["trunk", "heads.a"])
    load_history(loaded, tmp_path / "c")
    loaded.rebind(after, grown=["heads.b"])
    loaded.append(second)
    assert_is_the_sum(loaded, after, [first, second])
