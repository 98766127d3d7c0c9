"""Parameters that DeepSpeed's ZeRO trains, recognized by attributes that it sets on them. Nothing imports deepspeed.

ZeRO-1 and 2, and DeepSpeed's bf16 optimizer, take gradients from autograd's hooks into buffers of their own, step
copies of the parameters and overwrite the parameters with them: nothing reads ``.grad``, and what others write to a
parameter is lost. With ZeRO-3 a parameter moreover has no elements outside of its module's forward and backward pass.
"""

from torch import Tensor, nn

from .names import is_instance_of

_PARTITIONED = "ds_id"  # ZeRO-3
_COPIED = "_hp_mapping"  # the others; the mapping itself is None in processes that do not step this parameter


def require_elements(name: str, parameter: Tensor) -> None:
    """Raises ValueError for a parameter of ZeRO-3."""
    if hasattr(parameter, _PARTITIONED):
        raise ValueError(
            f"parameter {name!r} is partitioned by DeepSpeed's ZeRO-3, so its elements are not here. Use ZeRO-1 or 2, "
            "with rank1_ewc_penalty or diagonal_ewc_penalty in the loss; or FSDP2."
        )


def require_own_gradient(name: str, parameter: Tensor) -> None:
    """Raises ValueError for a parameter of ZeRO, whose ``.grad`` has no effect, nor has a write to it."""
    require_elements(name, parameter)
    if hasattr(parameter, _COPIED):
        raise ValueError(
            f"parameter {name!r} is trained by DeepSpeed's ZeRO, which reads no .grad and overwrites the parameter "
            "with its own copy. Add rank1_ewc_penalty or diagonal_ewc_penalty to the loss instead."
        )


def require_no_engine(model: nn.Module) -> None:
    """Raises ValueError for DeepSpeed's wrapper of a model, which divides gradients by the number of accumulated
    batches and collects them for its next step."""
    if is_instance_of(model, "deepspeed.runtime.engine.DeepSpeedEngine"):
        raise ValueError(
            "model is a DeepSpeedEngine, which changes gradients and collects them for its next step. Use "
            "engine.module, in the loss too, and process_group= to share the work of estimate_fisher between processes."
        )
