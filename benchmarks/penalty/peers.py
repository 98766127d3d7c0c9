"""The same penalties as others write them: the paper, most continual-learning libraries, Avalanche itself, and experts
in plain PyTorch, with multi-tensor operators or torch.compile. Each function of a problem returns the call to
be timed, which adds the gradient to ``.grad`` and returns the value."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from ..common.problem import LAM, Problem, Unavailable

Call = Callable[[], Tensor]

# A graph of 100 tensors takes torch.compile 45 s on one core of an AMD EPYC, and one of 700 more than 6 minutes.
MOST_TENSORS_COMPILED = 100


def rank1_paper(problem: Problem, tasks: int = 1) -> Call:
    """As in the paper's code: concatenate all parameters; subtract, multiply and sum; backward through autograd."""
    past = problem.first_tasks(tasks)

    def call() -> Tensor:
        theta = torch.cat([parameter.reshape(-1) for parameter in problem.params])
        value = torch.zeros((), device=problem.device)
        for task in past:
            value = value + 0.5 * LAM * ((theta - task.anchor) * task.direction).sum() ** 2
        value.backward()
        return value

    return call


def diagonal_python_loop(problem: Problem, tasks: int = 1) -> Call:
    """As in most continual-learning libraries: a Python loop over the parameters, through autograd."""
    past = [(problem.split(task.fisher), problem.split(task.anchor)) for task in problem.first_tasks(tasks)]

    def call() -> Tensor:
        value = torch.zeros((), device=problem.device)
        for fisher, anchor in past:
            for parameter, f, m in zip(problem.params, fisher, anchor, strict=True):
                value = value + (f * (parameter - m) ** 2).sum()
        value = 0.5 * LAM * value
        value.backward()
        return value

    return call


def diagonal_avalanche(problem: Problem, tasks: int = 1) -> Call:
    """avalanche-lib's EWCPlugin, mode "separate", given importances and parameters as its after_training_exp does."""
    try:
        from avalanche.training.plugins.ewc import EWCPlugin
        from avalanche.training.utils import ParamData
    except ModuleNotFoundError as error:
        raise Unavailable(f"not installed: {error}") from error
    plugin = EWCPlugin(ewc_lambda=LAM / 2)  # its penalty has no factor 1/2
    for number, task in enumerate(problem.first_tasks(tasks)):
        fisher, anchor = problem.named(task.fisher), problem.named(task.anchor)
        plugin.update_importances({n: ParamData(f"imp_{n}", init_tensor=f) for n, f in fisher.items()}, number)
        plugin.saved_params[number] = {n: ParamData(n, init_tensor=m) for n, m in anchor.items()}
    strategy = SimpleNamespace(
        clock=SimpleNamespace(train_exp_counter=tasks), device=problem.device, model=problem, loss=None
    )

    def call() -> Tensor:
        strategy.loss = torch.zeros((), device=problem.device)
        plugin.before_backward(strategy)
        strategy.loss.backward()
        return strategy.loss

    return call


def _dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return torch.stack([torch.dot(x.view(-1), y.view(-1)) for x, y in zip(left, right, strict=True)]).sum()


def rank1_foreach(problem: Problem) -> Call:
    """u . theta* precomputed, one dot per tensor, one multi-tensor update. On a GPU the coefficient stays there, which
    costs one more pass."""
    direction = problem.split(problem.task.direction)
    projection = (problem.task.direction.double() @ problem.task.anchor.double()).float()

    @torch.no_grad()
    def call() -> Tensor:
        drift = _dot(problem.params, direction) - projection
        if problem.device.type == "cpu":
            torch._foreach_add_(problem.grads, direction, alpha=LAM * float(drift))
        else:
            torch._foreach_add_(problem.grads, torch._foreach_mul(direction, LAM * drift))
        return 0.5 * LAM * drift**2

    return call


def diagonal_foreach(problem: Problem) -> Call:
    fisher, anchor = problem.split(problem.task.fisher), problem.split(problem.task.anchor)

    @torch.no_grad()
    def call() -> Tensor:
        distance = torch._foreach_sub(problem.params, anchor)
        weighted = torch._foreach_mul(distance, fisher)
        torch._foreach_add_(problem.grads, weighted, alpha=LAM)
        return 0.5 * LAM * _dot(distance, weighted)

    return call


def _compiled(
    problem: Problem, function: Callable[[list[Tensor], list[Tensor]], Tensor]
) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    """``function(params, grads)``, compiled and warm."""
    if len(problem.lengths) > MOST_TENSORS_COMPILED:
        raise Unavailable(f"not compiled: a graph of {len(problem.lengths)} tensors takes many minutes")
    fused = torch.compile(function, fullgraph=True, dynamic=False)
    try:
        with torch.no_grad():
            fused(problem.params, [torch.zeros_like(grad) for grad in problem.grads])
    except Exception as error:  # of Dynamo, of Inductor, or of the compiler that it calls
        raise Unavailable(f"could not compile: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    return fused


def rank1_compiled(problem: Problem) -> Call:
    direction = problem.split(problem.task.direction)
    projection = (problem.task.direction.double() @ problem.task.anchor.double()).float()

    def function(params: list[Tensor], grads: list[Tensor]) -> Tensor:
        drift = torch.stack([(x * u).sum() for x, u in zip(params, direction, strict=True)]).sum() - projection
        for grad, u in zip(grads, direction, strict=True):
            grad.add_(LAM * drift * u)
        return 0.5 * LAM * drift**2

    fused = _compiled(problem, function)
    return torch.no_grad()(lambda: fused(problem.params, problem.grads))


def diagonal_compiled(problem: Problem) -> Call:
    fisher, anchor = problem.split(problem.task.fisher), problem.split(problem.task.anchor)

    def function(params: list[Tensor], grads: list[Tensor]) -> Tensor:
        sums = []
        for grad, x, s, m in zip(grads, params, fisher, anchor, strict=True):
            weighted = s * (x - m)
            sums.append((weighted * (x - m)).sum())
            grad.add_(LAM * weighted)
        return 0.5 * LAM * torch.stack(sums).sum()

    fused = _compiled(problem, function)
    return torch.no_grad()(lambda: fused(problem.params, problem.grads))
