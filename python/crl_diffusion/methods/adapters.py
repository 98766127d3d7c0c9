"""Low-rank adapters (LoRA): the first task trains the whole network, each later task weights of its own beside it.

Every linear and convolutional layer with weight W computes, for a class of task k > 1,
    W x + SCALE B_k A_k x,   A_k: its inputs -> `rank`,   B_k: `rank` -> its outputs,   B_k = 0 when task k begins
Task k trains A_k and B_k of all layers, and the rows of its own classes in the table of class embeddings. Nothing else
changes after the first task, so a class is always drawn with exactly the weights that it was learnt with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from crl_diffusion.config.curriculum import task_classes
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.diffusion.network import build, predict, seeded

SCALE = 2  # LoRA's alpha / rank: alpha is twice the rank, as is usual


class AdaptedNetwork(nn.Module):
    """A network with adapters, called as the network is. The label of an image chooses its adapters."""

    def __init__(self, network: nn.Module, rank: int, tasks: Sequence[Sequence[int]], classes: int, seed: int) -> None:
        """`tasks`: the labels of each task; the network has labels for `classes` classes. ModuleNotFoundError, now and
        not after the first task, if peft is missing."""
        import peft  # noqa: F401 - takes seconds

        super().__init__()
        self.network, self.rank, self.seed = network, rank, seed
        self.tasks = self.active = 1  # tasks that the network has weights for, and the one that it computes with
        self.layers = [name for name, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        task_of = torch.zeros(classes, dtype=torch.int64, device="cpu")
        for number, labels in enumerate(tasks, start=1):
            task_of[list(labels)] = number
        self.register_buffer("task_of", task_of, persistent=False)

    def expand(self, tasks: int) -> None:
        """Have the weights of the first `tasks` tasks, at least as many as now. Those of the last one are trained."""
        from peft import LoraConfig, inject_adapter_in_model

        for task in range(self.tasks + 1, tasks + 1):
            config = LoraConfig(r=self.rank, lora_alpha=SCALE * self.rank, target_modules=self.layers)
            with seeded(self.seed, "adapters", task):
                inject_adapter_in_model(config, self.network, _name(task))
            del self.network.peft_config  # peft warns of a second one
        self.tasks, self.active = tasks, 0
        self.activate(tasks)
        for module in self.network.modules():
            if isinstance(module, nn.Embedding):  # only the rows of a batch's classes have a gradient
                module.requires_grad_(True)

    def activate(self, task: int) -> None:
        """Compute, and train, with the adapters of this task; with none for the first task."""
        from peft.tuners.lora import LoraLayer

        if task == self.active:
            return
        self.active = task
        for module in self.network.modules():
            if isinstance(module, LoraLayer):
                module.set_adapter([_name(task)] if task > 1 else [])

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """A pass of the whole batch for each task in it, so an image does not depend on the tasks of the others."""
        task_of = self.task_of[class_labels]
        result = torch.zeros_like(sample)
        for task in task_of.unique().tolist():
            self.activate(task)
            prediction = predict(self.network, sample, timestep, class_labels)
            result = torch.where((task_of == task).view(-1, 1, 1, 1), prediction, result)
        return (result,)

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters of all tasks."""
        return sum(p.nbytes for name, p in self.named_parameters() if _is_adapter(name))

    @torch.no_grad()
    def merged(self, task: int) -> dict[str, Tensor]:
        """The weights of a network without adapters that computes the same for a task: W + SCALE B_k A_k."""
        weights = base_weights(self.state_dict())
        if task > 1:
            for name in self.layers:
                layer = self.network.get_submodule(name)
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight(_name(task))
        return weights


def new_network(config: RunConfig, shape: tuple[int, int, int], classes: int, tasks: int = 1) -> nn.Module:
    """The network of a run that has learnt so many tasks, the last perhaps not to its end, with new weights."""
    network = build(config.model, shape, classes, config.seed)
    if not config.recipe.adapter_rank:
        return network
    adapted = AdaptedNetwork(network, config.recipe.adapter_rank, task_classes(config), classes, config.seed)
    adapted.expand(tasks)
    return adapted


def base_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the network without its adapters, by the names of a network that has none."""
    return {
        name.removeprefix("network.").replace(".base_layer.", "."): value
        for name, value in weights.items()
        if not _is_adapter(name)
    }


def _name(task: int) -> str:
    return f"task{task}"


def _is_adapter(name: str) -> bool:
    return ".lora_" in name
