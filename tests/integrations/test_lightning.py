"""Lightning's Trainer: the same training as a plain loop, and resumed as ever."""

import os
from pathlib import Path

import pytest
import torch
from helpers.pages import DOCS, run_python_blocks
from helpers.past_tasks import KINDS, MODES, flat, history_of, penalized_step, random_fisher, trainable
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import crl_kernels as ck
from crl_kernels.distributed.agreement import Agreement

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed (extra integrations)")

from crl_kernels.integrations import lightning as ewc_lightning  # noqa: E402 - it imports lightning
from crl_kernels.integrations.lightning import EWCCallback  # noqa: E402 - it imports lightning

LAM, BATCH, CLIP, STEPS = 3.0, 4, 0.1, 30
PAGE = DOCS / "how-to" / "other-trainers.md"
pytestmark = pytest.mark.filterwarnings("ignore:only .* of the trace|.*mostly noise:UserWarning")


class Module(lightning.LightningModule):
    """``broken`` is the batch whose loss raises, or is infinite if ``broken`` is negative."""

    def __init__(self, *, automatic: bool = True, broken: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
        self.automatic_optimization = automatic
        self.broken = broken

    def loss(self, x: Tensor, index: int) -> Tensor:
        loss = (self.net(x) - x[:, :3].sin()).square().mean()
        return loss * float("inf") if index == -(self.broken or 0) > 0 else loss

    def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
        if index == self.broken:
            raise KeyError("broken")
        loss = self.loss(batch[0], index)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, CLIP, "norm")
        optimizer.step()
        return None

    def test_step(self, batch: list[Tensor], index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class OfTwoOptimizers(Module):
    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


def batches(count: int = STEPS) -> DataLoader:
    x = torch.randn(BATCH * count, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), BATCH)


def trainer_of(folder: Path, *callbacks, library=lightning, **options) -> lightning.Trainer:
    defaults = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_checkpointing": False}
    return library.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(defaults | options),
    )


def plain_loop(
    kind: str, decoupled: bool = False, clip: float = CLIP, accumulate: int = 1, autocast: bool = False
) -> Tensor:
    """The steps without Lightning."""
    module = Module()
    history = history_of(module, kind)
    optimizer = module.configure_optimizers()
    for index, (x,) in enumerate(batches()):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module.loss(x, index)
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            penalized_step(optimizer, history, LAM, clip, decoupled)
    return flat(module)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@KINDS
@MODES
@pytest.mark.parametrize("optimization", ["automatic", "manual"])
def test_30_steps_equal_a_plain_loop_whose_penalty_is_not_clipped(tmp_path, kind, decoupled, optimization):
    automatic = optimization == "automatic"
    module = Module(automatic=automatic)
    history = history_of(module, kind)
    clipping = {"gradient_clip_val": CLIP} if automatic else {}
    trainer = trainer_of(tmp_path, EWCCallback(history, LAM, decoupled=decoupled), **clipping)
    trainer.fit(module, batches())
    assert trainer.global_step == STEPS
    plain = plain_loop(kind, decoupled)
    assert difference(flat(module), plain) < 1e-6

    free = Module()
    trainer_of(tmp_path, gradient_clip_val=CLIP).fit(free, batches())
    assert difference(flat(free), plain) > 0.01  # the penalty has done something
    history.attach(torch.optim.SGD(module.parameters(), lr=0.1), LAM)  # detached when fitting ended
    history.detach()


def test_the_page_equals_a_plain_loop(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = run_python_blocks(PAGE, section="Lightning")

    torch.manual_seed(0)
    setup = run_python_blocks(PAGE, section="")  # draws the same random numbers
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    history = ck.LowRankHistory(net)
    for _ in range(2):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for _ in range(2):
            for batch in setup["loader"]:
                setup["per_sample_loss"](net, batch).mean().backward()
                penalized_step(optimizer, history, 20.0, 1.0, decoupled=True)
        history.append(ck.estimate_fisher(net, setup["per_sample_loss"], setup["loader"]))
    assert difference(flat(page["module"]), flat(net)) < 1e-6
    torch.testing.assert_close(page["history"].curvatures, history.curvatures, rtol=1e-4, atol=0)


def test_a_penalty_in_the_loss_is_clipped(tmp_path):
    class Penalized(Module):
        def loss(self, x: Tensor, index: int) -> Tensor:
            return super().loss(x, index) + self.history[0].penalty(LAM)

    ends = {}
    for clip in (None, CLIP):
        module = Penalized()
        module.history = [history_of(module, "diagonal")]
        trainer_of(tmp_path, gradient_clip_val=clip).fit(module, batches())
        ends[clip] = flat(module)
    assert difference(ends[None], plain_loop("diagonal", clip=1e9)) < 1e-6
    assert difference(ends[CLIP], plain_loop("diagonal")) > 0.01


@MODES
def test_accumulated_batches_have_the_penalty_once(tmp_path, decoupled):
    module = Module()
    callback = EWCCallback(history_of(module, "low_rank"), LAM, decoupled=decoupled)
    trainer = trainer_of(tmp_path, callback, gradient_clip_val=CLIP, accumulate_grad_batches=3)
    trainer.fit(module, batches())
    assert trainer.global_step == STEPS // 3
    assert difference(flat(module), plain_loop("low_rank", decoupled, accumulate=3)) < 1e-6


@MODES
def test_bf16_mixed(tmp_path, decoupled):
    module = Module()
    callback = EWCCallback(history_of(module, "low_rank"), LAM, decoupled=decoupled)
    trainer_of(tmp_path, callback, gradient_clip_val=CLIP, precision="bf16-mixed").fit(module, batches())
    assert difference(flat(module), plain_loop("low_rank", decoupled, autocast=True)) < 1e-6
    assert difference(flat(module), plain_loop("low_rank", decoupled)) > 1e-5


@MODES
def test_16_mixed_skips_the_penalty_with_the_step(tmp_path, decoupled):
    """Lightning chooses bfloat16 on a CPU, so it is given the plugin that it uses on a GPU."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    module = Module(broken=-7)
    callback = EWCCallback(history_of(module, "low_rank"), LAM, decoupled=decoupled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    trainer_of(tmp_path, callback, gradient_clip_val=CLIP, plugins=precision).fit(module, batches())

    plain = Module(broken=-7)
    history = history_of(plain, "low_rank")
    optimizer, steps = plain.configure_optimizers(), 0
    for index, (x,) in enumerate(batches()):
        with torch.autocast("cpu", torch.float16):
            loss = plain.loss(x, index)
        loss.backward()
        if loss.isfinite():
            penalized_step(optimizer, history, LAM, CLIP, decoupled)
            steps += 1
        optimizer.zero_grad()
    assert steps == STEPS - 1
    assert scaler.get_scale() == 2.0**9
    assert difference(flat(module), flat(plain)) < 1e-4  # gradients that were scaled by 2^10 round in other places


def test_ddp(tmp_path, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # Lightning sets them, and the test's end takes them back
        monkeypatch.delenv(name)
    module, wrapped = Module(), []
    monkeypatch.setattr(ewc_lightning, "agreement_about", lambda model: wrapped.append(model) or Agreement())
    callback = EWCCallback(history_of(module, "low_rank"), LAM)
    strategy = lightning.strategies.DDPStrategy(process_group_backend="gloo")
    try:
        options = {"strategy": strategy, "use_distributed_sampler": False}  # which would shuffle
        trainer_of(tmp_path, callback, gradient_clip_val=CLIP, **options).fit(module, batches())
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
    assert difference(flat(module), plain_loop("low_rank")) < 1e-6
    # Histories are compared among the processes of this wrapper, which is there when fitting begins.
    assert [type(model) for model in wrapped] == [nn.parallel.DistributedDataParallel]


def test_the_trainer_of_pytorch_lightning_takes_it_too(tmp_path):
    library = pytest.importorskip(
        "pytorch_lightning", reason="pytorch_lightning is not installed (comes with lightning)"
    )

    class Other(library.LightningModule):
        loss, training_step = Module.loss, Module.training_step
        configure_optimizers = Module.configure_optimizers

    module = Other()
    module.net, module.broken = Module().net, None
    callback = EWCCallback(history_of(module, "low_rank"), LAM)
    trainer_of(tmp_path, callback, library=library, gradient_clip_val=CLIP).fit(module, batches())
    assert difference(flat(module), plain_loop("low_rank")) < 1e-6


@KINDS
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path, kind):
    def checkpoints() -> lightning.callbacks.ModelCheckpoint:
        return lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    two_epochs = {"max_epochs": 2, "enable_checkpointing": True, "gradient_clip_val": CLIP}
    uninterrupted = Module()
    history = history_of(uninterrupted, kind)
    trainer_of(tmp_path, EWCCallback(history, LAM), checkpoints(), **two_epochs).fit(uninterrupted, batches(10))

    resumed = Module()
    empty = type(history)(resumed)
    trainer = trainer_of(tmp_path, EWCCallback(empty, LAM), **two_epochs)
    trainer.fit(resumed, batches(10), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert trainer.global_step == 20
    assert torch.equal(flat(resumed), flat(uninterrupted))
    state, expected = empty.state_dict(), history.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_a_task_that_was_appended_after_the_checkpoint_survives_a_test_of_the_checkpoint(tmp_path):
    module = Module()
    history = history_of(module, "low_rank", tasks=1)
    trainer = trainer_of(tmp_path, EWCCallback(history, LAM))
    trainer.fit(module, batches(2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    history.append(random_fisher(trainable(module), "low_rank", 5))
    trainer.test(module, batches(2), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert len(history) == 2


def test_a_fit_ended_by_an_exception_can_be_started_again(tmp_path):
    module = Module(broken=3)
    callback = EWCCallback(history_of(module, "low_rank"), LAM)
    with pytest.raises(KeyError, match="broken"):
        trainer_of(tmp_path, callback).fit(module, batches())
    module = module.cpu()
    module.broken = None
    trainer_of(tmp_path, callback).fit(module, batches())


def test_what_it_cannot_do_is_refused_before_a_parameter_changes(tmp_path, monkeypatch):
    module, second = Module(), OfTwoOptimizers(automatic=False)
    before = flat(module)
    with pytest.raises(ValueError, match="are in no parameter group of the optimizer"):
        trainer_of(tmp_path, EWCCallback(history_of(second, "low_rank"), LAM)).fit(module, batches())
    with pytest.raises(ValueError, match=r"configures 2 optimizers; expected one.*include="):
        trainer_of(tmp_path, EWCCallback(history_of(second, "low_rank"), LAM)).fit(second, batches())
    history = history_of(module, "low_rank")
    monkeypatch.setattr(history._binding.shards, "unsharded", False)
    with pytest.raises(ValueError, match=r"sharded parameters.*history\.save or torch\.distributed\.checkpoint"):
        trainer_of(tmp_path, EWCCallback(history, LAM)).fit(module, batches())
    assert torch.equal(flat(module), before)
    assert torch.equal(flat(second), before)
