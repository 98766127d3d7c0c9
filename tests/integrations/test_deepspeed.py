"""DeepSpeed's ZeRO: the penalty in the loss trains as in a plain loop, and what would have no effect is refused.

The first tests need no DeepSpeed: they set the attributes that ZeRO sets on parameters, and the last ones, with the
real library on a CPU, check that it sets them.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.pages import DOCS, run_python_blocks
from helpers.past_tasks import KINDS, flat, history_of, task_loss
from helpers.processes import spawn
from torch import Tensor, nn

import crl_kernels as ck

LAM, STEPS, LR = 3.0, 30, 1e-2
PAGE = DOCS / "how-to" / "other-trainers.md"
pytestmark = pytest.mark.filterwarnings("ignore:only .* of the trace|.*mostly noise:UserWarning")
BY_COPIES = r"parameter '0.weight' is trained by DeepSpeed's ZeRO, which reads no .grad .* to the loss instead"
PARTITIONED = r"parameter '0.weight' is partitioned by DeepSpeed's ZeRO-3.*Use ZeRO-1 or 2"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def per_sample_loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :3].sin()).square().mean(1)


def train_by_copies(model: nn.Module) -> None:
    for p in model.parameters():
        p._hp_mapping = None  # of a parameter that another process steps


def partition(model: nn.Module) -> None:
    for i, p in enumerate(model.parameters()):
        p.ds_id, p.ds_shape = i, p.shape
        p.data = p.data.new_empty(0)


def attach_to_an_optimizer_that_zero_then_takes(history, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()  # the history is attached to it


def attach_to_zeros_optimizer(history, optimizer: torch.optim.Optimizer) -> None:
    history.detach()
    copies = [nn.Parameter(torch.zeros(8))]
    history.attach(torch.optim.SGD(copies, lr=LR), LAM)


def step_a_fused_adamw_that_zero_has_taken(history, optimizer: torch.optim.Optimizer) -> None:
    fused = ck.FusedAdamW(optimizer.param_groups[0]["params"], lr=LR, history=history, lam=LAM)
    fused.param_groups[0]["params"] = [nn.Parameter(torch.zeros(8))]
    fused.step()


WITHOUT_EFFECT: list[Callable[[Any, torch.optim.Optimizer], object]] = [
    lambda history, _: history.add_penalty_grad_(LAM),
    lambda history, _: history.decoupled_step_(LAM, LR),
    attach_to_an_optimizer_that_zero_then_takes,
    attach_to_zeros_optimizer,
    step_a_fused_adamw_that_zero_has_taken,
]


@KINDS
@pytest.mark.parametrize("enter", WITHOUT_EFFECT, ids=["gradient", "decoupled", "attached", "attach", "FusedAdamW"])
@pytest.mark.parametrize(
    ("take", "message"), [(train_by_copies, BY_COPIES), (partition, PARTITIONED)], ids=["ZeRO-1 and 2", "ZeRO-3"]
)
def test_what_has_no_effect_under_zero_is_refused(kind, enter, take, message):
    model = network()
    history = history_of(model, kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    if enter is not step_a_fused_adamw_that_zero_has_taken:
        history.attach(optimizer, LAM)
    take(model)
    before = flat(model)
    with pytest.raises(ValueError, match=message):
        enter(history, optimizer)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(flat(model), before)


@KINDS
def test_partitioned_parameters_are_not_bound(kind):
    model = network()
    history = history_of(model, kind)
    partition(model)
    for enter in (
        lambda: type(history)(model),
        lambda: ck.estimate_fisher(model, per_sample_loss, [torch.ones(4, 6)] * 2),
        lambda: history.penalty(LAM),
        lambda: history.rebind(model),
    ):
        with pytest.raises(ValueError, match=PARTITIONED):
            enter()


def test_its_engine_is_refused_where_it_would_change_gradients():
    class DeepSpeedEngine(nn.Sequential):
        __module__, __qualname__ = "deepspeed.runtime.engine", "DeepSpeedEngine"

    engine = DeepSpeedEngine(network())
    refuse_the_engine(engine)


def refuse_the_engine(engine: nn.Module) -> None:
    for enter in (
        lambda: ck.estimate_fisher(engine, per_sample_loss, [torch.ones(4, 6)] * 2),
        lambda: ck.SampleGradients(engine),
    ):
        with pytest.raises(ValueError, match=r"model is a DeepSpeedEngine.*Use engine\.module"):
            enter()


def prepared(patch: pytest.MonkeyPatch, rank: int = 0, processes: int = 1) -> Any:
    """The library, for a process of gloo on a CPU."""
    patch.setenv("DS_ACCELERATOR", "cpu")
    patch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # which the import sets
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}.items():
        patch.setenv(name, str(value))
    library = importlib.import_module("deepspeed")
    communication = importlib.import_module("deepspeed.comm.torch")
    patch.setattr(communication, "build_shm_op", lambda: None)  # it compiles, for processes that share memory
    return library


def require_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (pip install deepspeed)")


@pytest.fixture(scope="module")
def deepspeed() -> Iterator[Any]:
    require_deepspeed()
    with pytest.MonkeyPatch.context() as patch:
        library = prepared(patch)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield library
        torch.distributed.destroy_process_group()


def engine_of(library: Any, model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, **options) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return library.initialize(model=model, optimizer=optimizer, config=config | options)[0]


@KINDS
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_30_steps_with_the_penalty_in_the_loss_equal_a_plain_loop(deepspeed, kind, stage, accumulate):
    """Which clips it with the rest."""
    ends = {}
    for trainer in ("DeepSpeed", "plain", "free"):
        model = network()
        history = history_of(model, kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        if trainer == "DeepSpeed":
            options = {"gradient_clipping": 0.5, "gradient_accumulation_steps": accumulate}
            engine = engine_of(deepspeed, model, optimizer, stage, **options)
        for step in range(STEPS):
            loss = task_loss(engine if trainer == "DeepSpeed" else model, step)
            if trainer != "free":
                loss = loss + history.penalty(LAM)
            if trainer == "DeepSpeed":
                engine.backward(loss)
                engine.step()
                continue
            (loss / accumulate).backward()
            if (step + 1) % accumulate == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        ends[trainer] = flat(model)
    assert float((ends["DeepSpeed"] - ends["plain"]).norm() / ends["plain"].norm()) < 1e-5
    assert float((ends["free"] - ends["plain"]).norm() / ends["plain"].norm()) > 0.05


def train_in_two_processes(rank: int, folder: str) -> None:
    """Each with batches of its own; the end, the Fisher of all samples, and what was refused, in a file."""
    library = prepared(pytest.MonkeyPatch(), rank, 2)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = network()
    history = history_of(model, "low_rank")
    options = {"gradient_clipping": 0.5, "gradient_accumulation_steps": 2}
    engine = engine_of(library, model, torch.optim.AdamW(model.parameters(), lr=LR), 2, **options)
    for step in range(10):
        engine.backward(task_loss(engine, 2 * step + rank) + history.penalty(LAM))
        engine.step()
    refused = []
    for enter in (lambda: history.add_penalty_grad_(LAM), lambda: history.decoupled_step_(LAM, LR)):
        with pytest.raises(ValueError, match=BY_COPIES):
            enter()
        refused.append(True)
    mine, group = samples()[rank::2], torch.distributed.group.WORLD
    fisher = ck.estimate_fisher(engine.module, per_sample_loss, mine, kind="diagonal", process_group=group)
    torch.save([flat(model), fisher.fisher_diagonal, refused], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def samples() -> list[Tensor]:
    return [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def test_two_processes_have_the_penalty_once(tmp_path):
    require_deepspeed()
    spawn(train_in_two_processes, str(tmp_path), count=2)
    model = network()
    history = history_of(model, "low_rank")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for step in range(10):
        loss = (task_loss(model, 2 * step) + task_loss(model, 2 * step + 1)) / 2 + history.penalty(LAM)
        (loss / 2).backward()
        if step % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    expected = ck.estimate_fisher(model, per_sample_loss, samples(), kind="diagonal").fisher_diagonal
    for rank in range(2):
        end, fisher, refused = torch.load(tmp_path / f"{rank}.pt")
        assert float((end - flat(model)).norm() / end.norm()) < 1e-5
        torch.testing.assert_close(fisher, expected, rtol=1e-4, atol=1e-8)
        assert refused == [True, True]


def test_the_page_equals_a_plain_loop(deepspeed):
    torch.manual_seed(0)
    page = run_python_blocks(PAGE, section="DeepSpeed")

    torch.manual_seed(0)
    setup = run_python_blocks(PAGE, section="")  # draws the same random numbers
    model = setup["model"]
    history = ck.LowRankHistory(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = list(setup["loader"])
    for _ in range(2):
        for batch in batches:
            (setup["per_sample_loss"](model, batch).mean() + history.penalty(20.0)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        history.append(ck.estimate_fisher(model, setup["per_sample_loss"], batches))
    assert page["engine"].zero_optimization_stage() == 2
    assert float((flat(page["model"]) - flat(model)).norm() / flat(model).norm()) < 1e-5
    torch.testing.assert_close(page["history"].curvatures, history.curvatures, rtol=1e-3, atol=0)


def test_a_resumed_training_is_the_uninterrupted_one(deepspeed, tmp_path):
    """By ``client_state``."""
    ends = {}
    for run in ("uninterrupted", "resumed"):
        model = network()
        history = history_of(model, "low_rank") if run == "uninterrupted" else ck.LowRankHistory(model)
        engine = engine_of(deepspeed, model, torch.optim.AdamW(model.parameters(), lr=LR), stage=2)
        if run == "resumed":
            _, client_state = engine.load_checkpoint(tmp_path)
            history.load_state_dict(client_state["history"])
        for step in range(5 if run == "resumed" else 0, 10):
            engine.backward(task_loss(engine, step) + history.penalty(LAM))
            engine.step()
            if step == 4:
                engine.save_checkpoint(tmp_path, client_state={"history": history.state_dict()})
        ends[run] = flat(model)
    assert torch.equal(ends["resumed"], ends["uninterrupted"])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_is_recognized(deepspeed, monkeypatch, stage, precision):
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)  # ZeRO-3 exchanges it for the whole process
    message = PARTITIONED if stage == 3 else BY_COPIES
    options = {} if precision == "fp32" else {"bf16": {"enabled": True}}

    def step(engine: Any) -> None:
        x = torch.ones(4, 6, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
        engine.backward(engine(x).float().square().mean())
        engine.step()

    def attached_before() -> None:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        history_of(model, "low_rank").attach(optimizer, LAM)
        step(engine_of(deepspeed, model, optimizer, stage, **options))

    def folded_before() -> None:
        model = network()
        optimizer = ck.FusedAdamW(model.parameters(), lr=LR, history=history_of(model, "low_rank"), lam=LAM)
        step(engine_of(deepspeed, model, optimizer, stage, **options))

    for enter in (attached_before, folded_before):
        with pytest.raises(ValueError, match=message):
            enter()
    model = network()
    history = history_of(model, "low_rank")
    engine = engine_of(deepspeed, model, torch.optim.AdamW(model.parameters(), lr=LR), stage, **options)
    for enter in (
        lambda: history.attach(engine.optimizer, LAM),
        lambda: history.attach(engine.optimizer.optimizer, LAM, decoupled=True),
        lambda: history.add_penalty_grad_(LAM),
        lambda: history.decoupled_step_(LAM, LR),
        lambda: ck.LowRankHistory(engine) if stage == 3 else history.add_penalty_grad_(LAM),
    ):
        with pytest.raises(ValueError, match=message):
            enter()
    if stage < 3:
        refuse_the_engine(engine)


@pytest.mark.parametrize("stage", [1, 2])
def test_an_estimate_of_the_engines_module_is_the_plain_models_and_leaves_training_as_it_was(deepspeed, stage):
    batches = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    ends = {}
    for estimated in (False, True):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        engine = engine_of(deepspeed, model, optimizer, stage, gradient_accumulation_steps=2)
        for step in range(6):
            engine.backward(task_loss(engine, step))
            engine.step()
            if estimated and step == 2:  # between two batches of one step
                fisher = ck.estimate_fisher(engine.module, per_sample_loss, batches, kind="diagonal")
                plain = network()
                plain.load_state_dict(model.state_dict())
                expected = ck.estimate_fisher(plain, per_sample_loss, batches, kind="diagonal")
                assert torch.equal(fisher.fisher_diagonal, expected.fisher_diagonal)
        ends[estimated] = flat(model)
    assert torch.equal(ends[True], ends[False])
