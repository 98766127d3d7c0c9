"""How each library computes per-sample gradients of one batch: from the losses to what a Fisher estimate needs.

    norms        |g_i|^2, (N,)              mean         mu = mean_i g_i, one tensor per parameter
    projections  mu . g_i, (N,)             matrix       all g_i, one (N, *shape) tensor per parameter
    gram         g_i . g_j, (N, N)          diagonal     mean_i g_ij^2, one tensor per parameter

A library that returns the matrix has two rows: the matrix alone, and "finished", where plain PyTorch computes norms,
mean and projections from it. ``.grad`` is the sum of the gradients, so a library that leaves it there gives the mean.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from crl_kernels import SampleGradients
from crl_kernels.per_sample import loss_passes

from ..common.problem import Unavailable
from .models import CLASSES, SIZE, TIMESTEPS

Statistics = dict[str, Any]  # by the names above
Call = Callable[[], Statistics]


class Case:
    """A model and one batch: images at random timesteps with random labels, and the noise to be predicted."""

    def __init__(self, make: Callable[[], nn.Module], samples: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = make().to(dtype)
        self.batch = (
            torch.randn(samples, 1, SIZE, SIZE, dtype=dtype),
            torch.randint(TIMESTEPS, (samples,)),
            torch.randint(CLASSES, (samples,)),
            torch.randn(samples, 1, SIZE, SIZE, dtype=dtype),
        )
        self.samples = samples
        self.names = [name for name, _ in self.model.named_parameters()]
        self._models = [self.model]

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    @property
    def numel(self) -> int:
        return sum(parameter.numel() for parameter in self.params)

    def copy(self) -> nn.Module:
        """Another copy of the model, for contenders that change it."""
        self._models.append(copy.deepcopy(self.model))
        return self._models[-1]

    def zero_grad(self) -> None:
        for model in self._models:
            model.zero_grad()

    def losses(self, model: Callable[..., Tensor], batch: tuple[Tensor, ...] | None = None) -> Tensor:
        """(N,)"""
        x, t, label, noise = batch or self.batch
        return (model(x, t, label) - noise).square().flatten(1).mean(1)

    def losses_at(self, params: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> Tensor:
        state = dict(zip(self.names, params, strict=True))
        return self.losses(lambda *inputs: torch.func.functional_call(self.model, state, inputs), batch)

    def backward(self, model: nn.Module) -> None:
        model.zero_grad()
        self.losses(model).sum().backward()

    def mean_of(self, model: nn.Module) -> list[Tensor]:
        return [parameter.grad / self.samples for parameter in model.parameters()]

    def single(self) -> Iterator[tuple[Tensor, ...]]:
        """The batch's samples, as batches of one."""
        return (tuple(part[i : i + 1] for part in self.batch) for i in range(self.samples))

    def truth(self) -> Statistics:
        """By a loop, summed in float64."""
        matrix = [torch.zeros(self.samples, p.numel(), dtype=p.dtype) for p in self.params]
        for i, sample in enumerate(self.single()):
            gradients = torch.autograd.grad(self.losses(self.model, sample).sum(), self.params)
            for rows, g in zip(matrix, gradients, strict=True):
                rows[i] = g.flatten()
        norms, projections, means = 0.0, 0.0, []
        for block in matrix:
            wide = block.double()
            means.append(wide.mean(0))
            norms, projections = norms + wide.square().sum(1), projections + wide @ means[-1]
        return {"norms": norms, "mean": means, "projections": projections}


@dataclass(frozen=True)
class Contender:
    """``make(case)`` returns the call to be timed."""

    make: Callable[[Case], Call]
    gives: tuple[str, ...]
    description: str


def finished(matrix: list[Tensor]) -> Statistics:
    """Norms, mean and projections, without temporaries of the matrix's size."""
    norms, projections, means = [], [], []
    for block in matrix:
        rows = block.flatten(1)
        mean = rows.mean(0)
        norms.append(torch.linalg.vector_norm(rows, dim=1).square())
        projections.append(rows @ mean)
        means.append(mean)
    return {"norms": torch.stack(norms).sum(0), "mean": means, "projections": torch.stack(projections).sum(0)}


def plain(case: Case) -> Call:
    def call() -> Statistics:
        case.backward(case.model)
        return {"mean": case.mean_of(case.model)}

    return call


def without_weight_gradients(case: Case) -> Call:
    model = case.copy().requires_grad_(False)
    images = case.batch[0].clone().requires_grad_(True)

    def call() -> Statistics:
        images.grad = None
        case.losses(model, (images, *case.batch[1:])).sum().backward()
        return {}

    return call


def loop(kept: bool) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        def call() -> Statistics:
            matrix = [torch.empty(case.samples, p.numel(), dtype=p.dtype) for p in case.params] if kept else []
            norms, mean = [], [torch.zeros_like(p) for p in case.params]
            for i, sample in enumerate(case.single()):
                gradients = torch.autograd.grad(case.losses(case.model, sample).sum(), case.params)
                if kept:
                    for rows, g in zip(matrix, gradients, strict=True):
                        rows[i] = g.flatten()
                else:
                    norms.append(torch.stack(torch._foreach_norm(gradients)).square().sum())
                    torch._foreach_add_(mean, gradients, alpha=1 / case.samples)
            return finished(matrix) if kept else {"norms": torch.stack(norms), "mean": mean}

        return call

    return make


def vmapped(chunk: int | None, finish: bool) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        def loss(params: tuple[Tensor, ...], *sample: Tensor) -> Tensor:
            return case.losses_at(params, tuple(part.unsqueeze(0) for part in sample)).sum()

        in_dims = (None, *(0 for _ in case.batch))
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=in_dims, chunk_size=chunk)

        def call() -> Statistics:
            matrix = gradients(tuple(parameter.detach() for parameter in case.params), *case.batch)
            return finished(matrix) if finish else {"matrix": matrix}

        return faster_attention(call)

    return make


def faster_attention(call: Call) -> Call:
    """vmap runs the CPU's fused attention sample by sample, so this returns the call with the fused or the composed
    attention, whichever is faster."""

    def composed() -> Statistics:
        with sdpa_kernel(SDPBackend.MATH):
            return call()

    seconds = {}
    for candidate in (call, composed):
        candidate()
        start = time.process_time()
        candidate()
        seconds[candidate] = time.process_time() - start
    return min(seconds, key=lambda candidate: seconds[candidate])


def jvp(case: Case) -> Call:
    case.backward(case.model)
    mean = tuple(case.mean_of(case.model))

    def call() -> Statistics:
        primals = (tuple(parameter.detach() for parameter in case.params),)
        with sdpa_kernel(SDPBackend.MATH):  # the CPU's own attention has no forward-mode derivative
            _, tangents = torch.func.jvp(lambda params: case.losses_at(params, case.batch), primals, (mean,))
        return {"projections": tangents}

    return call


@contextmanager
def imported(package: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise Unavailable(f"not installed: {package} ({error})") from error


def opacus_hooks(finish: bool) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        with imported("opacus"):
            from opacus import GradSampleModule
        model = GradSampleModule(case.copy(), loss_reduction="sum")

        def call() -> Statistics:
            case.backward(model)
            matrix = [parameter.grad_sample for parameter in model.parameters()]
            statistics = finished(matrix) if finish else {"matrix": matrix}
            model.zero_grad()  # which frees the matrix; grad_sample is refused a second time otherwise
            for parameter in model.parameters():
                parameter.grad_sample = None
            return statistics

        return call

    return make


def opacus_ghost(case: Case) -> Call:
    with imported("opacus"):
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
    model = GradSampleModuleFastGradientClipping(case.copy(), loss_reduction="sum")

    def call() -> Statistics:
        case.backward(model)
        return {"norms": model.get_norm_sample().square(), "mean": case.mean_of(model)}

    return call


def backpack(quantity: str, finish: bool = False) -> Callable[[Case], Call]:
    """BackPACK warns about layers that it does not know, and leaves their parameters out of the norms."""

    def make(case: Case) -> Call:
        with imported("backpack-for-pytorch"):
            from backpack import backpack, extend
            from backpack.extensions import BatchGrad, BatchL2Grad
        model = extend(case.copy())
        extension, field = {"norms": (BatchL2Grad, "batch_l2"), "matrix": (BatchGrad, "grad_batch")}[quantity]

        def call() -> Statistics:
            with backpack(extension()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case.backward(model)
            parts = [getattr(p, field) for p in model.parameters() if hasattr(p, field)]
            for parameter in model.parameters():
                if hasattr(parameter, field):
                    delattr(parameter, field)
            if quantity == "norms":
                return {"norms": torch.stack(parts).sum(0), "mean": case.mean_of(model)}
            return finished(parts) | {"mean": case.mean_of(model)} if finish else {"matrix": parts}

        return call

    return make


def torchjd(mean: bool) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        with imported("torchjd"):
            from torchjd.autogram import Engine
        model = case.copy()
        engine = Engine(model, batch_dim=0)

        def call() -> Statistics:
            model.zero_grad()
            losses = case.losses(model)
            gram = engine.compute_gramian(losses)
            statistics = {"gram": gram, "norms": gram.diagonal(), "projections": gram.mean(1)}
            if mean:
                losses.sum().backward()
                statistics["mean"] = case.mean_of(model)
            return statistics

        return call

    return make


def ours(gram: bool = False, diagonal: bool = False, first: bool = False) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        def call() -> Statistics:
            if first:  # nothing is known of where the samples are
                loss_passes.LAYOUTS.clear()
            with SampleGradients(case.model, gram=gram, diagonal=diagonal) as sg:
                case.backward(case.model)
            statistics = {"norms": sg.sq_norms, "projections": sg.projections}
            statistics["mean"] = [sg.mean[name] for name in case.names]
            return statistics | ({"gram": sg.gram} if gram else {}) | ({"diagonal": sg.diagonal} if diagonal else {})

        return call

    return make


PLAIN = "plain forward + backward"
MAIN = ("norms", "mean", "projections")
CONTENDERS = {
    PLAIN: Contender(plain, ("mean",), "losses.sum().backward(): the yardstick"),
    "without weight gradients": Contender(
        without_weight_gradients, (), "the floor: parameters frozen, the gradient of the images taken instead"
    ),
    "SampleGradients": Contender(ours(), MAIN, "this library"),
    "SampleGradients, first batch": Contender(
        ours(first=True),
        MAIN,
        "this library, on a batch with new shapes: with the passes that measure and prove",
    ),
    "SampleGradients, gram": Contender(ours(gram=True), (*MAIN, "gram"), "this library, gram=True"),
    "SampleGradients, diagonal": Contender(ours(diagonal=True), (*MAIN, "diagonal"), "this library, diagonal=True"),
    "loop, batches of 1": Contender(
        loop(kept=False), ("norms", "mean"), "one torch.autograd.grad per sample; projections would need a second loop"
    ),
    "loop, batches of 1, finished": Contender(loop(kept=True), MAIN, "the same, gradients kept, then plain PyTorch"),
    "vmap(grad)": Contender(
        vmapped(None, False), ("matrix",), "torch.func over the whole batch, with the faster of two attention kernels"
    ),
    "vmap(grad), finished": Contender(vmapped(None, True), MAIN, "the same, then plain PyTorch"),
    "vmap(grad), chunks of 8": Contender(vmapped(8, False), ("matrix",), "the same, chunk_size=8"),
    "vmap(grad), chunks of 8, finished": Contender(vmapped(8, True), MAIN, "the same, then plain PyTorch"),
    "Opacus hooks": Contender(opacus_hooks(False), ("matrix",), "GradSampleModule, mode hooks"),
    "Opacus hooks, finished": Contender(opacus_hooks(True), MAIN, "the same, then plain PyTorch"),
    "Opacus ghost norms": Contender(
        opacus_ghost, ("norms", "mean"), "GradSampleModuleFastGradientClipping, one backward pass"
    ),
    "BackPACK BatchL2Grad": Contender(backpack("norms"), ("norms", "mean"), "one backward pass"),
    "BackPACK BatchGrad": Contender(backpack("matrix"), ("matrix",), "one backward pass"),
    "BackPACK BatchGrad, finished": Contender(backpack("matrix", True), MAIN, "the same, then plain PyTorch"),
    "TorchJD Gramian": Contender(
        torchjd(False), ("norms", "projections", "gram"), "autogram.Engine; norms and projections are read off it"
    ),
    "TorchJD Gramian and backward": Contender(torchjd(True), (*MAIN, "gram"), "the same, then losses.sum().backward()"),
    "forward-mode jvp": Contender(jvp, ("projections",), "torch.func.jvp of the losses on a mean that is given"),
}


def errors(statistics: Statistics, truth: Statistics) -> dict[str, float]:
    """Largest |x - truth| / |truth| of norms and projections, and the mean's as one vector."""
    if "matrix" in statistics:
        statistics = finished(statistics["matrix"])
    relative = {}
    for name in ("norms", "projections"):
        if name in statistics:
            relative[name] = ((statistics[name].double() - truth[name]).abs().max() / truth[name].abs().max()).item()
    if "mean" in statistics and len(statistics["mean"]) == len(truth["mean"]):
        mean, exact = (torch.cat([part.double().flatten() for part in parts["mean"]]) for parts in (statistics, truth))
        relative["mean"] = ((mean - exact).norm() / exact.norm()).item()
    return relative
