"""AdamW with the penalty inside: its error, its waits for the device, and its time."""

from typing import Any

import torch
from torch import Tensor, nn

from .checks import flat64, poison
from .speed import timed


class Parameters(nn.Module):
    """Parameters of given sizes; equal seeds give equal values on every device."""

    def __init__(self, lengths: list[int], device: str, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.randn(n, generator=generator) for n in lengths]
        self.held = nn.ParameterList(nn.Parameter(x.to(device, dtype)) for x in drawn)

    def history(self, kind: str) -> Any:
        """``kind`` is diagonal, or a number of terms and their dtype, such as "3 bfloat16"."""
        import crl_kernels as ck

        generator = torch.Generator().manual_seed(2)
        named = {name: p.detach() for name, p in self.named_parameters()}

        def drawn(*leading: int) -> dict[str, Tensor]:
            return {n: torch.randn(*leading, *p.shape, generator=generator).to(p) for n, p in named.items()}

        anchor = {name: p + 0.01 * d for (name, p), d in zip(named.items(), drawn().values(), strict=True)}
        if kind == "diagonal":
            history: Any = ck.DiagonalHistory(self)
            history.append(ck.DiagonalFisher({name: d.square() for name, d in drawn().items()}, anchor))
            return history
        terms, dtype = kind.split()
        scale = sum(p.numel() for p in named.values()) ** -0.5
        u = {name: (scale * d).bfloat16().to(d) for name, d in drawn(int(terms)).items()}  # exact in all dtypes
        history = ck.LowRankHistory(self)
        ones = torch.ones(int(terms), dtype=torch.float64)
        stored = torch.bfloat16 if dtype == "bfloat16" else None
        history.append(ck.LowRankFisher(u, ones, anchor, storage_dtype=stored))
        return history


def optimizer(device: str, small: bool) -> dict[str, Any]:
    """FusedAdamW: after 20 steps at most twice as far from float64 as torch's AdamW with add_penalty_grad_ or
    decoupled_step_; a step without waiting for the device, and its time beside AdamW(fused=True)'s."""
    import crl_kernels as ck

    lengths, lam, lr = [1, 15, 16, 17, 4095, 4097, 100_003], 0.5, 1e-3
    kinds = ("1 float32", "3 bfloat16", "10 float32", "diagonal")

    def train(kind: str, decoupled: bool, inside: bool, exact: bool = False) -> Tensor:
        model = Parameters(lengths, "cpu", torch.float64) if exact else Parameters(lengths, device, torch.float32)
        history = model.history(kind)
        steps = (
            ck.FusedAdamW(model.parameters(), lr=lr, history=history, lam=lam, decoupled=decoupled)
            if inside
            else torch.optim.AdamW(model.parameters(), lr=lr)
        )
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            value = float(history.penalty(lam).detach())
            if decoupled and not inside:
                history.decoupled_step_(lam, lr)
            elif not inside:
                history.add_penalty_grad_(lam)
            steps.step()
            if inside and not abs(float(steps.last_penalty) - value) <= 1e-5 * abs(value):
                raise AssertionError(f"FusedAdamW, {kind}: last_penalty is {float(steps.last_penalty)}, not {value}")
        return flat64([p.detach() for p in model.parameters()])

    errors = {}
    for kind in kinds:
        for decoupled in (False, True):
            poison(device)
            expected = train(kind, decoupled, inside=False, exact=True)
            ours, plain = (train(kind, decoupled, inside) - expected for inside in (True, False))
            name = f"{kind}{', decoupled' if decoupled else ''}"
            errors[name] = float(ours.norm() / plain.norm())
            if not errors[name] <= 2:
                raise AssertionError(f"FusedAdamW, {name}: {errors[name]:.2g} times as far from float64 as torch's")

    numel, tensors = (10_000, 10) if small else (25_000_000, 100)
    model = Parameters([numel // tensors] * tensors, device, torch.float32)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    rounds = 3 if small else 50
    adamw = timed(torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True).step, device, rounds)
    times = {"AdamW(fused=True)": {"ms": adamw, "times_adamw": 1.0}}
    for kind in ("none", "1 bfloat16", *kinds):
        history = None if kind == "none" else model.history(kind)
        step = ck.FusedAdamW(model.parameters(), lr=1e-6, history=history, lam=1e-6).step
        step()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            step()
            torch.cuda.set_sync_debug_mode("default")
        ms = timed(step, device, rounds)
        times[f"FusedAdamW, {kind}"] = {"ms": ms, "times_adamw": ms / adamw}
    return {"errors_over_torch": errors, "parameters": numel, "times": times}
