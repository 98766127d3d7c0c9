"""The per-sample loss of causal language models: that of each sequence alone; and a Fisher from it without a backward
pass for each sequence."""

import copy
import warnings

import pytest
import torch
from helpers.by_loop import flat, rows_by_loop
from torch import Tensor, nn
from torch.nn import functional

import crl_kernels as ck
from crl_kernels.integrations.causal_lm import causal_lm_loss
from crl_kernels.per_sample import recorder

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra integrations)")

VOCABULARY, LENGTH = 17, 7
LENGTHS = torch.tensor([7, 4, 2, 6, 3])
SIZES = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def gpt2() -> nn.Module:
    config = {"n_positions": LENGTH, "n_embd": 12, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **config))


def llama(**options) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=LENGTH, **SIZES, **options
    )
    return transformers.LlamaForCausalLM(config)


def llama_with_lora() -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed (extra integrations)")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(), config)


MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "llama, tied embeddings": lambda: llama(tie_word_embeddings=True),
    "llama, LoRA": llama_with_lora,
}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def padded(seed: int = 0, left: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (len(LENGTHS), LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < LENGTHS[:, None]).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids * mask, "attention_mask": mask}


def prompted(seed: int = 0) -> dict[str, Tensor]:
    """Padded, and with prompts of 0 to 2 tokens that are not trained."""
    batch = padded(seed)
    prompt = torch.arange(LENGTH) < torch.tensor([2, 1, 0, 2, 1])[:, None]
    return batch | {"labels": batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | prompt, -100)}


def own_losses(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Of one sequence at a time, without its padding."""
    losses = []
    for i in range(len(LENGTHS)):
        real = batch["attention_mask"][i] == 1
        ids, labels = (batch[key][i : i + 1, real] for key in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[0]
        losses.append(functional.cross_entropy(logits[-len(labels[0]) : -1], labels[0, 1:]))
    return losses


def test_losses_are_those_of_each_sequence_alone(model):
    model, batch = model.double(), prompted()
    losses = causal_lm_loss(model, batch)
    torch.testing.assert_close(losses, torch.stack(own_losses(model, batch)))
    tokens = (batch["labels"][:, 1:] != -100).sum(1)
    assert model(**batch).loss.item() == pytest.approx(((losses * tokens).sum() / tokens.sum()).item(), rel=1e-6)


@pytest.mark.parametrize("left", [False, True])
def test_without_labels_every_token_is_predicted_that_follows_a_token(left):
    """Padding on the left would otherwise predict the first token from nothing."""
    model, batch = llama().double(), padded(left=left)
    expected = torch.stack(own_losses(model, batch | {"labels": batch["input_ids"]}))
    torch.testing.assert_close(causal_lm_loss(model, batch), expected)
    full = {"input_ids": batch["input_ids"]}
    everything = full | {"labels": full["input_ids"], "attention_mask": torch.ones_like(full["input_ids"])}
    torch.testing.assert_close(causal_lm_loss(model, full), torch.stack(own_losses(model, everything)))


def test_a_fisher_is_that_of_one_backward_pass_per_sequence_and_takes_fewer(model, monkeypatch):
    monkeypatch.setattr(recorder, "_warned", set())
    batches = [prompted(seed) for seed in (1, 2)]
    reference = copy.deepcopy(model).double()
    rows = torch.cat([flat(rows_by_loop(reference, own_losses(reference, batch))) for batch in batches])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # where a layer has no rule, a warning says so
        diagonal = ck.estimate_fisher(model, causal_lm_loss, batches, kind="diagonal")
        warnings.filterwarnings("ignore", message="only .* of the trace|the mean gradient is mostly noise")
        rank1 = ck.estimate_fisher(model, causal_lm_loss, batches)
    squares = rows.square().mean(0)
    assert float((diagonal.fisher_diagonal.double() - squares).norm() / squares.norm()) < 1e-5
    first, second = rows.chunk(2)
    along = second @ (first.mean(0) / first.mean(0).norm())
    assert float(rank1.curvatures[0]) == pytest.approx(float(along.square().mean()), rel=1e-5)


def test_logits_of_16_bits_are_read_in_float32():
    model, batch = llama().bfloat16(), prompted()
    losses = causal_lm_loss(model, batch)
    assert losses.dtype == torch.float32
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits.dtype == torch.bfloat16
    errors = functional.cross_entropy(logits[:, :-1].float().mT, batch["labels"][:, 1:], reduction="none")
    expected = errors.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)
    torch.testing.assert_close(losses, expected)


def test_only_predicted_tokens_are_kept_in_float32():
    model, batch, kept = llama().bfloat16(), prompted(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        causal_lm_loss(model, batch)
    wide = {x.data_ptr(): x.numel() for x in kept if x.dtype == torch.float32 and x.shape[-1:] == (VOCABULARY,)}
    assert 0 < sum(wide.values()) <= VOCABULARY * int((batch["labels"][:, 1:] != -100).sum())


def test_a_sequence_without_a_token_to_predict_has_the_loss_0_and_counts():
    torch.manual_seed(0)
    model, batch = llama().double(), prompted()
    others = causal_lm_loss(model, batch)
    batch["labels"][1] = -100
    batch["labels"][3, 1:] = -100  # the first token is predicted from nothing
    losses = causal_lm_loss(model, batch)
    assert losses.tolist() == [others[0], 0, others[2], 0, others[4]]
    squares = flat(rows_by_loop(model, losses)).square()
    assert squares.sum(1).ne(0).tolist() == [True, False, True, False, True]
    diagonal = ck.estimate_fisher(model, causal_lm_loss, [batch], kind="diagonal").fisher_diagonal
    torch.testing.assert_close(diagonal, squares.sum(0) / len(LENGTHS))


def test_soft_prompts_before_the_tokens_are_not_predicted():
    peft = pytest.importorskip("peft", reason="peft is not installed (extra integrations)")
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, batch = peft.get_peft_model(llama(), config).double(), prompted()
    torch.testing.assert_close(causal_lm_loss(model, batch), torch.stack(own_losses(model, batch)))


@pytest.mark.parametrize("key", ["position_ids", "cu_seq_lens_q", "seq_idx"])
def test_batches_whose_rows_hold_several_samples_are_refused(key):
    batch = padded() | {key: torch.arange(LENGTH)[None]}
    with pytest.raises(ValueError, match=f"batch has '{key}'.*several samples share a row.*packing=False"):
        causal_lm_loss(llama(), batch)


def test_a_batch_without_tokens_is_refused():
    with pytest.raises(ValueError, match="batch has 'inputs_embeds', 'labels' and no 'input_ids'"):
        causal_lm_loss(llama(), {"inputs_embeds": torch.zeros(1, 2, 12), "labels": torch.zeros(1, 2)})
