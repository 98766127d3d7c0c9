"""accelerate's mixed precision, which stays in a model after training.

``Accelerator.prepare`` with ``mixed_precision=``, and Hugging Face's trainers with ``bf16=True`` or ``fp16=True``,
replace the model's ``forward`` by one in autocast, and keep the original in ``_original_forward``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """In this block the model's ``forward`` is the one that it had before accelerate put autocast into it.

        with without_autocast(model):
            history.append(estimate_fisher(model, per_sample_loss, loader))

    In autocast, rounding to 16 bits makes ``estimate_fisher`` take one backward pass per sample, with a warning.
    ``accelerator.unwrap_model(model, keep_fp32_wrapper=False)`` would take autocast out for good, and a later
    ``prepare`` would not put it in again. A model that is in no autocast is left as it is.

    Args:
        model: prepared, or holding or wrapping a prepared one.
    """
    prepared = [module for module in model.modules() if "_original_forward" in vars(module)]
    in_autocast = [module.forward for module in prepared]
    for module in prepared:
        module.forward = module._original_forward  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, forward in zip(prepared, in_autocast, strict=True):
            module.forward = forward
