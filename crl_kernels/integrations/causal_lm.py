"""The loss of each sample of a causal language model of transformers, for ``estimate_fisher`` and ``diagnose``.

    loader = trainer.get_train_dataloader()   # the Trainer's own batches, from its own data collator
    history.append(estimate_fisher(model, causal_lm_loss, loader))

Trainer and TRL's SFTTrainer train on another mean: the sum over all tokens of a step's batches, on all devices and over
accumulated gradients, divided by their number. Sample i, with T_i predicted tokens, thus has the weight T_i / mean(T)
there, and the weight 1 here. Where all samples have as many tokens the two Fishers are equal; otherwise long samples
count (T_i / mean(T))^2 times as much in a Fisher of the Trainer's mean. Both losses are means over tokens, so ``lam``
has the same scale for either, whatever the batch, the number of devices and the accumulation.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

_IGNORED = -100  # the label that transformers and torch leave out of a loss
_PACKED = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean cross-entropy of each sample over its own predicted tokens, (N,).

        loss_i = 1/T_i sum_t -log p(label_it | tokens of sample i before t)

    over the T_i tokens t >= 1 whose label is not -100: padding, and prompts where only completions are trained. A
    sample without such a token has the loss 0 and no gradient, and still counts as one of the N samples, so it makes
    a Fisher smaller.

    Logits of 16 bits are converted to float32 for the tokens that are predicted, and for no others. Memory in addition
    to the model's own, for each of those tokens: 8 bytes per entry of the vocabulary. If a batch of training does not
    fit, estimate from smaller batches; a Fisher does not depend on their size.

    Args:
        model: a causal language model of transformers, also in a PeftModel: ``model(**inputs).logits``, (N, T, V).
        batch: "input_ids" (N, T), "labels" (N, T) with -100 where nothing is predicted, "attention_mask" (N, T), and
            what else the model takes. Without "labels", every token is predicted that "attention_mask" has, and the
            token before it. Tensors are moved to the device of the model's first parameter.

    Raises:
        ValueError: a packed or padding-free batch, whose rows hold several samples; no "input_ids".
    """
    if "input_ids" not in batch:
        raise ValueError(f"batch has {', '.join(map(repr, batch))} and no 'input_ids'; expected tokens, (N, T).")
    if packed := [key for key in _PACKED if key in batch]:
        raise ValueError(
            f"batch has {', '.join(map(repr, packed))}: in packed and padding-free batches several samples share a "
            "row, so no row is a sample. Estimate from padded batches, with packing=False and padding_free=False."
        )
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    labels, ids, mask = inputs.pop("labels", None), inputs["input_ids"], inputs.get("attention_mask")
    targets = (ids if labels is None else labels)[:, 1:]
    predicted = targets != _IGNORED
    if labels is None and mask is not None:
        predicted &= (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    # The last T: soft prompts of peft come before the tokens.
    logits = model(**inputs, use_cache=False).logits[:, -ids.shape[1] : -1][predicted]
    errors = functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[predicted], reduction="none"
    )
    errors = errors.new_zeros(targets.shape).masked_scatter(predicted, errors)
    return errors.sum(dim=1) / predicted.sum(dim=1).clamp(min=1)
