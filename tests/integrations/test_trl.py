"""TRL's SFTTrainer with LoRA, by the code of its tutorial: the same training as a plain loop, resumed as ever, and a
Fisher from the trainer's own batches that is the one of single sequences."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.by_loop import flat as flat_rows
from helpers.by_loop import rows_by_loop
from helpers.pages import DOCS, run_python_blocks
from helpers.past_tasks import penalized_step, trainable
from torch import Tensor, nn
from torch.nn import functional

import crl_kernels as ck

for library in ("trl", "peft"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from crl_kernels.integrations.accelerate import without_autocast  # noqa: E402
from crl_kernels.integrations.causal_lm import causal_lm_loss  # noqa: E402 - it serves transformers
from crl_kernels.integrations.hf_trainer import HISTORY_FILE, EWCCallback  # noqa: E402 - it imports transformers
from crl_kernels.per_sample import recorder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:only .* of the trace of the Fisher:UserWarning")
LAM, STEPS, BATCH, LR, CLIP = 300.0, 30, 8, 2e-3, 0.3
HISTORIES = {"low_rank": ck.LowRankHistory, "diagonal": ck.DiagonalHistory}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[dict[str, Any]]:
    """The names of the tutorial, and "folder", which has its base model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("page"))
        yield run_python_blocks(DOCS / "tutorials" / "lora-language-model.md", until="with_adapters") | {
            "folder": folder
        }


def new_model(page: dict[str, Any], **options) -> nn.Module:
    torch.manual_seed(0)
    return page["with_adapters"](page["LlamaForCausalLM"].from_pretrained(page["folder"] / "base", **options))


@pytest.fixture(scope="module")
def first(page) -> dict[str, Any]:
    """After the first task: the model's state, the trainer, and the state of a history of each kind."""
    model = new_model(page)
    data, folder = page["counting"]([1], 128, seed=1), page["folder"] / "first"
    trainer = page["trainer_of"](folder, model, data, max_steps=10, learning_rate=5e-3)
    trainer.train()
    states = {"model": {name: x.clone() for name, x in model.state_dict().items()}, "trainer": trainer}
    for kind, options in {"low_rank": {"direction": "top"}, "diagonal": {"kind": "diagonal"}}.items():
        history = HISTORIES[kind](model)
        history.append(ck.estimate_fisher(model, causal_lm_loss, trainer.get_train_dataloader(), **options))
        states[kind] = history.state_dict()
    return states


def after_first(page: dict[str, Any], first: dict[str, Any], kind: str):
    model = new_model(page)
    model.load_state_dict(first["model"])
    history = HISTORIES[kind](model)
    history.load_state_dict(first[kind])
    return model, history


def adapters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in trainable(model).values()])


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def padded(rows: list[dict[str, list[int]]], key: str, filling: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row[key]) for row in rows], True, float(filling)).long()


def plain_loop(model: nn.Module, rows: list[dict], history, lam: float, accumulated: int, decoupled: bool) -> None:
    """Each step's loss is the mean over the trained tokens of all its batches."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR, weight_decay=0.0)
    size = BATCH * accumulated
    for begin in range(0, STEPS * size, size):
        step = rows[begin : begin + size]
        tokens = sum(label != -100 for row in step for label in row["labels"][1:])
        for batch in (step[i : i + BATCH] for i in range(0, size, BATCH)):
            ids, labels = padded(batch, "input_ids", 0), padded(batch, "labels", -100)
            mask = torch.arange(ids.shape[1]) < torch.tensor([len(row["input_ids"]) for row in batch])[:, None]
            logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
            loss = functional.cross_entropy(logits.mT, labels[:, 1:], reduction="sum") / tokens
            loss.backward()
        penalized_step(optimizer, history, lam, CLIP, decoupled)


def second_trainer(page, folder: Path, model: nn.Module, history, decoupled: bool = False, accumulated: int = 1):
    return page["trainer_of"](
        folder,
        model,
        page["counting"]([3], STEPS * BATCH * accumulated, seed=3),
        EWCCallback(history, LAM, decoupled=decoupled),
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulated,
        train_sampling_strategy="sequential",
        save_steps=15,
        logging_steps=1,
    )


@pytest.mark.parametrize(
    ("kind", "decoupled", "accumulated"),
    [("low_rank", False, 1), ("diagonal", False, 2), ("low_rank", True, 2), ("diagonal", True, 1)],
)
def test_30_steps_equal_a_plain_loop_whose_penalty_is_not_clipped(page, first, tmp_path, kind, decoupled, accumulated):
    model, history = after_first(page, first, kind)
    start = adapters(model)
    trainer = second_trainer(page, tmp_path, model, history, decoupled, accumulated)
    trainer.train()
    assert min(row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row) > CLIP
    rows, step = list(trainer.train_dataset), adapters(model) - start

    plain, plain_history = after_first(page, first, kind)
    plain_loop(plain, rows, plain_history, LAM, accumulated, decoupled)
    error = difference(adapters(plain) - start, step)
    assert error < 5e-6
    assert history.penalty(LAM).item() == pytest.approx(plain_history.penalty(LAM).item(), rel=1e-4)

    free, free_history = after_first(page, first, kind)
    plain_loop(free, rows, free_history, 0.0, accumulated, decoupled)
    assert difference(adapters(free) - start, step) > 1e4 * error  # the penalty has done something


@pytest.mark.parametrize("kind", HISTORIES)
def test_a_resumed_training_is_the_uninterrupted_one(page, first, tmp_path, kind):
    uninterrupted, history = after_first(page, first, kind)
    second_trainer(page, tmp_path / "uninterrupted", uninterrupted, history).train()

    checkpoint = tmp_path / "uninterrupted" / "checkpoint-15"
    resumed = new_model(page)
    loaded = HISTORIES[kind].load(checkpoint / HISTORY_FILE, resumed)
    trainer = second_trainer(page, tmp_path / "resumed", resumed, loaded)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == STEPS
    assert torch.equal(adapters(resumed), adapters(uninterrupted))


def test_the_fisher_of_the_trainers_batches_is_that_of_single_sequences(page, first):
    model, _ = after_first(page, first, "diagonal")
    trainer = first["trainer"]
    rows = list(trainer.train_dataset)[:16]
    batches = [trainer.data_collator(rows[:8]), trainer.data_collator(rows[8:])]
    assert {int(batch["attention_mask"].sum(1).min()) for batch in batches} != {batches[0]["input_ids"].shape[1]}
    fisher = ck.estimate_fisher(model, causal_lm_loss, batches, kind="diagonal").fisher_diagonal

    reference, losses = new_model(page), []
    reference.load_state_dict(first["model"])
    reference.double().eval()
    for row in rows:
        logits = reference(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses.append(functional.cross_entropy(logits, torch.tensor(row["labels"][1:])))
    squares = flat_rows(rows_by_loop(reference, losses)).square().mean(0)
    assert difference(fisher.double(), squares) < 1e-5


def test_the_trainers_loss_weights_a_sample_by_its_trained_tokens(first):
    """T_i / mean(T), as the page says."""
    trainer = first["trainer"]
    batch = trainer.data_collator(list(trainer.train_dataset)[:8])
    tokens = (batch["labels"][:, 1:] != -100).sum(1)
    assert len(set(tokens.tolist())) > 1
    weighted = causal_lm_loss(trainer.model, batch) * tokens / tokens.double().mean()
    expected = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(weighted.mean(), expected, check_dtype=False)


def test_a_copy_after_the_trainer_computes_with_the_originals_weights(page, first):
    """Why the page saves and loads adapters; a TRL without this needs no such words."""
    model, _ = after_first(page, first, "diagonal")
    trainer = page["trainer_of"](page["folder"] / "copied", model, page["counting"]([1], 4, seed=1))
    batch = trainer.data_collator(list(trainer.train_dataset))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = causal_lm_loss(copied, batch)
        for p in trainable(copied).values():
            p.add_(1.0)
        torch.testing.assert_close(causal_lm_loss(copied, batch), before)


def test_after_training_in_autocast_the_fisher_takes_no_backward_pass_for_each_sample(
    page, first, tmp_path, monkeypatch
):
    """With TRL's defaults, bfloat16 and gradient checkpointing. Autocast is in the model but for the page's block."""
    drifts = {}
    for lam in (0.0, LAM):
        model, history = after_first(page, first, "diagonal")
        data = page["counting"]([3], 64, seed=3)
        trainer = page["trainer_of"](
            tmp_path / str(lam), model, data, EWCCallback(history, lam), max_steps=8, bf16=True, learning_rate=LR
        )
        assert trainer.args.gradient_checkpointing
        trainer.train()
        drifts[lam] = history.penalty(LAM).item()
    assert drifts[LAM] < 0.9 * drifts[0.0]

    def estimate() -> Tensor:
        monkeypatch.setattr(recorder, "_warned", set())
        return ck.estimate_fisher(
            model, causal_lm_loss, trainer.get_train_dataloader(), kind="diagonal"
        ).fisher_diagonal

    with pytest.warns(UserWarning, match="take a backward pass from the losses for each sample"):
        in_autocast = estimate()
    with warnings.catch_warnings(), without_autocast(model):
        warnings.filterwarnings("error", message="the per-sample gradients of")
        fisher = estimate()
    assert 0 < difference(in_autocast, fisher) < 0.1
