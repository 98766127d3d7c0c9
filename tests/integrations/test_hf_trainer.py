"""Hugging Face's Trainer on a small causal language model: the same training as a plain loop, and resumed as ever."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.past_tasks import flat, history_of, penalized_step
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import crl_kernels as ck
from crl_kernels.distributed.agreement import Agreement

pytestmark = pytest.mark.filterwarnings("ignore:only .* of the trace of the Fisher:UserWarning")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra integrations)")

from crl_kernels.integrations import hf_trainer  # noqa: E402 - it imports transformers
from crl_kernels.integrations.hf_trainer import HISTORY_FILE, EWCCallback  # noqa: E402 - it imports transformers

LAM, STEPS, BATCH, CLIP = 30.0, 30, 4, 0.1


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
            attention_dropout=0.0,
        )
    )


def tokens(seed: int, count: int) -> Tensor:
    return torch.randint(40, (count, 12), generator=torch.Generator().manual_seed(seed))


class Stream(IterableDataset):
    """Samples in a fixed order, so that a plain loop can see the same."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for ids in tokens(1, STEPS * BATCH):
            yield {"input_ids": ids, "labels": ids}


def per_sample_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def after_one_task(model: nn.Module, kind: str = "low_rank") -> ck.LowRankHistory | ck.DiagonalHistory:
    """A history of one task, away from whose optimum the model then moves, so that the penalty pulls from step 1 on."""
    history = ck.LowRankHistory(model) if kind == "low_rank" else ck.DiagonalHistory(model)
    loader = DataLoader([{"input_ids": ids} for ids in tokens(2, 64)], batch_size=16)
    options = {"direction": "top"} if kind == "low_rank" else {}
    history.append(ck.estimate_fisher(model, per_sample_loss, loader, kind=kind, **options))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return history


def trainer_of(
    model: nn.Module,
    folder: Path,
    *callbacks: EWCCallback,
    steps: int = STEPS,
    optim: str = "adamw_torch",
    clip: float = CLIP,
    kind: type = transformers.Trainer,
):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        max_grad_norm=clip,
        optim=optim,
        save_steps=15,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return kind(model, arguments, train_dataset=Stream(), callbacks=list(callbacks))


def plain_loop(model: nn.Module, history, optimizer: torch.optim.Optimizer, decoupled: bool = False) -> list[float]:
    """The steps without Trainer."""
    losses = []
    for ids in tokens(1, STEPS * BATCH).split(BATCH):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        penalized_step(optimizer, history, LAM, CLIP, decoupled)
        losses.append(loss.item())
    return losses


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_30_steps_equal_a_plain_loop_whose_penalty_is_not_clipped(tmp_path, kind, decoupled):
    model = language_model()
    history = after_one_task(model, kind)
    trainer = trainer_of(model, tmp_path, EWCCallback(history, LAM, decoupled=decoupled))
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]

    plain = language_model()
    plain_history = after_one_task(plain, kind)
    start = flat(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0.0)
    losses = plain_loop(plain, plain_history, optimizer, decoupled)
    assert logged == pytest.approx(losses, rel=1e-4)  # as far as Trainer rounds them
    assert difference(flat(model), flat(plain)) < 1e-6
    assert difference(flat(model), start) > 1e-2
    assert history.penalty(LAM).item() == pytest.approx(plain_history.penalty(LAM).item(), rel=1e-4)

    free = language_model()
    after_one_task(free, kind)
    trainer_of(free, tmp_path / "free").train()
    moved = difference(flat(free), flat(model))
    assert moved > 30 * difference(flat(plain), flat(model))  # the penalty has done something
    history.attach(torch.optim.SGD(model.parameters(), lr=0.1), LAM)  # detached when training ended
    history.detach()


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch", "sgd"])
def test_only_clipping_tells_the_callback_from_a_penalty_in_the_loss(tmp_path, kind, optim):
    """Where Trainer clips nothing, they are one training. Where it clips, the penalty in the loss is clipped too, and
    the callback's is not: that is the plain loop whose gradients are clipped before the penalty's are added."""
    ends = {}
    for clip in (0.0, CLIP):
        for penalty_in in ("callback", "loss"):
            model = language_model()
            history = after_one_task(model, kind)

            class Penalized(transformers.Trainer):
                def compute_loss(self, *arguments, history=history, **options):
                    return super().compute_loss(*arguments, **options) + history.penalty(LAM)

            callbacks = [EWCCallback(history, LAM)] if penalty_in == "callback" else []
            trainer = trainer_of(
                model,
                tmp_path / f"{clip} {penalty_in}",
                *callbacks,
                optim=optim,
                clip=clip,
                kind=Penalized if penalty_in == "loss" else transformers.Trainer,
            )
            trainer.train()
            ends[clip, penalty_in] = flat(model)
    assert difference(ends[0.0, "callback"], ends[0.0, "loss"]) < 1e-6
    assert difference(ends[CLIP, "callback"], ends[CLIP, "loss"]) > 2e-5

    plain = language_model()
    plain_history = after_one_task(plain, kind)
    optimizer = type(trainer.optimizer.optimizer)(
        [{**{k: v for k, v in group.items() if k != "params"}, "params": list(plain.parameters())}
         for group in trainer.optimizer.param_groups[:1]]
    )  # fmt: skip
    optimizer.param_groups[0]["weight_decay"] = 0.0
    plain_loop(plain, plain_history, optimizer)
    assert difference(ends[CLIP, "callback"], flat(plain)) < 1e-6


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    uninterrupted = language_model()
    trainer_of(uninterrupted, tmp_path / "uninterrupted", EWCCallback(after_one_task(uninterrupted), LAM)).train()

    checkpoint = tmp_path / "uninterrupted" / "checkpoint-15"
    resumed = language_model()
    history = ck.LowRankHistory.load(checkpoint / HISTORY_FILE, resumed)
    trainer = trainer_of(resumed, tmp_path / "resumed", EWCCallback(history, LAM))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == STEPS
    assert torch.equal(flat(resumed), flat(uninterrupted))


def test_a_training_ended_by_an_exception_can_be_started_again(tmp_path):
    model = language_model()
    callback = EWCCallback(after_one_task(model), LAM)
    trainer = trainer_of(model, tmp_path, callback, steps=2)

    def broken(*arguments, **options):
        raise KeyError("broken")

    step, trainer.training_step = trainer.training_step, broken
    with pytest.raises(KeyError, match="broken"):
        trainer.train()
    trainer.training_step = step
    trainer.train()


def test_a_history_of_another_model_is_refused_before_a_parameter_changes(tmp_path):
    model, second = language_model(), language_model()
    before = flat(model)
    trainer = trainer_of(model, tmp_path, EWCCallback(after_one_task(second), LAM), steps=2)
    with pytest.raises(ValueError, match="are in no parameter group of the optimizer"):
        trainer.train()
    assert torch.equal(flat(model), before)


def test_sharded_histories_are_refused(tmp_path, monkeypatch):
    model = language_model()
    history = after_one_task(model)
    monkeypatch.setattr(history._binding.shards, "unsharded", False)
    with pytest.raises(ValueError, match=r"sharded parameters.*history\.save or torch\.distributed\.checkpoint"):
        trainer_of(model, tmp_path, EWCCallback(history, LAM)).train()


def test_several_processes_compare_their_histories_when_training_begins(monkeypatch):
    class Others(Agreement):
        several, facts = True, {}

        @contextmanager
        def on(self, call: str, advice: str) -> Iterator[dict[str, str]]:
            yield self.facts
            raise RuntimeError(call)

    model = nn.Linear(2, 1)
    history = history_of(model, "low_rank", tasks=1)
    callback = EWCCallback(history, LAM)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr(hf_trainer, "agreement_in", lambda group: Others())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="the beginning of training"):
        callback.on_train_begin(SimpleNamespace(world_size=2), None, None, optimizer=optimizer)
    assert Others.facts.keys() == {"history", "state", "penalty", "lam"}
    assert Others.facts["lam"] == str(int(LAM))
    callback.on_train_begin(SimpleNamespace(world_size=1), None, None, optimizer=optimizer)
