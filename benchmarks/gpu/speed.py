"""Times: rows of ``benchmarks.penalty``, layouts, an optimizer's step, a training step, and ``benchmarks.trainers``."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Times = dict[str, float]
SMALL = 20_000  # parameters of a dry run
YARDSTICK = "copy"
MANY_ELEMENTS = 3e8  # so that only rows of one task fit


@functools.cache
def _flush() -> Tensor:
    """Twice what L2 holds: writing it leaves nothing else there."""
    return torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")


@functools.cache
def _cycles_per_second() -> float:
    """Of the kernel that sleeps."""
    cycles = 10_000_000
    seconds = [_seconds(lambda: torch.cuda._sleep(cycles)) for _ in range(3)]
    return cycles / min(seconds)


def _seconds(call: Callable[[], object]) -> float:
    """Of the device, from the first kernel on, if launching takes no longer than what is queued before it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def timed(call: Callable[[], object], device: str, rounds: int) -> Times:
    """Median, 20th and 80th percentile in milliseconds; and the median of what the host takes to launch the call.

    On a GPU, L2 holds nothing of the call's tensors, and the device sleeps before the first event for longer than the
    host needs, so the time between the events is the device's alone, unless the call itself waits for the device.
    """
    from ..common.measure import percentiles

    seconds, host = [], []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        slowest = time.perf_counter() - begin  # of the last warm call
    for _ in range(rounds):
        if device == "cuda":
            torch.cuda.synchronize()
            _flush().zero_()
            torch.cuda._sleep(int((2 * slowest + 1e-4) * _cycles_per_second()))

        def launch() -> None:
            begin = time.perf_counter()
            call()
            host.append(time.perf_counter() - begin)

        if device == "cuda":
            seconds.append(_seconds(launch))
        else:
            launch()
            seconds.append(host[-1])
    return percentiles(seconds) | {"host_us": 1e3 * percentiles(host)["ms"]}


def with_traffic(rows: dict[str, Times], bytes_: dict[str, int]) -> dict[str, Times]:
    """Adds the bandwidth of each row, and its share of the copy's, which is one of them."""
    bandwidth = {name: bytes_[name] / row["ms"] / 1e6 for name, row in rows.items()}
    return {
        name: row | {"gb_per_s": bandwidth[name], "share_of_copy": bandwidth[name] / bandwidth[YARDSTICK]}
        for name, row in rows.items()
    }


def _penalty_rows(
    numel: int, tensors: int, device: str, rounds: int, wanted: Callable[[str, Any], bool]
) -> dict[str, Any]:
    from ..common.problem import Problem
    from ..penalty.contenders import CONTENDERS, YARDSTICKS
    from ..penalty.operators import OPERATORS
    from ..penalty.rows import prepare

    contenders = CONTENDERS | OPERATORS
    chosen = {name: row for name, row in contenders.items() if name in YARDSTICKS or wanted(name, row)}
    problem = Problem(numel, tensors, device)
    calls, reasons = prepare(chosen, problem)
    bytes_ = {name: chosen[name].bytes * numel for name in calls}
    for name, (call, bytes_per_element) in _int8_calls(problem, 1 if numel >= MANY_ELEMENTS else 10).items():
        calls[name], bytes_[name] = call, round(bytes_per_element * numel)
    rows = {name: timed(call, device, rounds) for name, call in calls.items()}
    return with_traffic(rows, bytes_) | {name: {"skipped": reason} for name, reason in reasons.items()}


def _int8_calls(problem: Any, most_terms: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Operators with directions in int8, each parameter one row, and the bytes that they move for each element."""
    from crl_kernels.backends.int8 import quantised

    ops, params, grads = torch.ops.crl_kernels, [p.detach() for p in problem.params], problem.grads
    lengths = [p.numel() for p in params]
    calls: dict[str, tuple[Callable[[], object], float]] = {}
    for terms in (1, 10):
        if terms > most_terms:
            break
        u: list[Tensor] = []
        for task in problem.first_tasks(terms):
            pieces = [quantised(piece[None]) for piece in task.direction.split(lengths)]
            u += [q.view_as(p) for (q, _), p in zip(pieces, params, strict=True)] + [scales for _, scales in pieces]
        c = torch.full((terms,), 1e-6, dtype=torch.float64, device=params[0].device)
        label = ", int8" if terms == 1 else f", int8, {terms} terms"
        of_terms = sum(tensor.numel() * tensor.itemsize for tensor in u) / sum(lengths)
        partial = functools.partial
        calls |= {
            f"low_rank_projections{label}": (partial(ops.low_rank_projections, params, u, terms), 4 + of_terms),
            f"low_rank_accumulate_{label}": (partial(ops.low_rank_accumulate_, grads, u, c), 8 + of_terms),
            f"low_rank_combine{label}": (partial(ops.low_rank_combine, u, c, params), 4 + of_terms),
            f"low_rank_penalty_accumulate_{label}": (
                partial(ops.low_rank_penalty_accumulate_, grads, params, u, c, c, c[0]),
                12 + 2 * of_terms,
            ),
        }
    return calls


def roofline(device: str, small: bool) -> dict[str, Any]:
    """Rows of benchmarks.penalty on this device; 99 tensors have lengths that are no multiple of anything."""
    sizes = [(600_000, 100), (25_000_000, 100), (25_000_037, 99), (25_000_000, 1), (350_000_000, 700)]
    left_out = ("torch.compile", "reference", "flattened")
    return {
        f"{numel}/{tensors}": _penalty_rows(
            numel, tensors, device, 3 if small else 15,
            lambda name, row, numel=numel: not any(word in name for word in left_out)
            and (numel < MANY_ELEMENTS or row.tasks == 1) and not (small and "Avalanche" in name),
        )
        for numel, tensors in ([(SMALL, 10)] if small else sizes)
    }  # fmt: skip


def compiled_peers(device: str, small: bool) -> dict[str, Any]:
    """What torch.compile makes of both penalties, which takes a minute to compile."""
    return {
        "25000000/100": _penalty_rows(
            25_000_000, 100, device, 15, lambda name, row: name.endswith(("add_penalty_grad_", "torch.compile"))
        )
    }


def _list(layout: str, dtype: torch.dtype, numel: int, device: str) -> list[Tensor]:
    """About ``numel`` elements in 100 weights of 3 x 3 convolutions."""
    channels = max(1, numel // 100 // (64 * 9))
    weights = [torch.randn(channels, 64, 3, 3, device=device).to(dtype) for _ in range(100)]
    if layout == "channels last":
        return [w.to(memory_format=torch.channels_last) for w in weights]
    if layout == "odd addresses":
        return [torch.cat([w.flatten()[:1], w.flatten()])[1:].view(w.shape) for w in weights]
    return weights


def layouts(device: str, small: bool) -> dict[str, Any]:
    """Value and gradient of the low-rank penalty, and AdamW with it inside, for other layouts and dtypes."""
    ops, results = torch.ops.crl_kernels, {}
    for dtype in (torch.float32, torch.bfloat16):
        for terms in (1, 10):
            rows: dict[str, Times] = {}
            bytes_: dict[str, int] = {}
            for layout in ("contiguous", "odd addresses", "channels last"):
                params, grads = (_list(layout, dtype, SMALL if small else 25_000_000, device) for _ in range(2))
                numel = sum(p.numel() for p in params)
                u = [torch.randn(numel, device=device).to(dtype) for _ in range(terms)]
                c = torch.full((terms,), 1e-9, dtype=torch.float64, device=device)
                calls = {
                    f"penalty, {layout}": (
                        functools.partial(ops.low_rank_penalty_accumulate_, grads, params, u, c, c, c[0]),
                        dtype.itemsize * (3 + 2 * terms),
                    )
                }
                if dtype == torch.float32:  # whose moments are of its dtype
                    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
                    settings = torch.tensor([1, 0.9, 0.999, 1, 1e-9, 1, 1e-8, 1], dtype=torch.float64, device=device)
                    calls[f"AdamW, {layout}"] = (
                        functools.partial(
                            ops.low_rank_adamw_, params, grads, *moments, settings.expand(100, 8), None, u, c, False
                        ),
                        28 + 4 * terms,
                    )
                if not rows:
                    source, target = torch.randn(2, numel, device=device).to(dtype)
                    calls[YARDSTICK] = (functools.partial(target.copy_, source), 2 * dtype.itemsize)
                for name, (call, bytes_per_element) in calls.items():
                    rows[name] = timed(call, device, 3 if small else 15)
                    bytes_[name] = bytes_per_element * numel
            results[f"{dtype}, {terms} directions"] = with_traffic(rows, bytes_)
    return results


def launches(device: str, small: bool) -> dict[str, Any]:
    """Value and gradient in one cooperative launch and in three, side by side: the CUDA kernels take one where the
    directions fit in L2, so the same work with a few elements less and a few more is timed."""
    ops, l2 = torch.ops.crl_kernels, torch.cuda.get_device_properties(0).L2_cache_size
    results = {}
    for terms in (1, 10, 100):
        rows, bytes_ = {}, {}
        for name, numel in (("one launch", l2 // (4 * terms)), ("three launches", l2 // (4 * terms) + 4096)):
            theta, gradient, *u = torch.randn(terms + 2, numel, device=device)
            c = torch.full((terms,), 1e-9, dtype=torch.float64, device=device)
            call = functools.partial(ops.low_rank_penalty_accumulate_, [gradient], [theta], u, c, c, c[0])
            rows[name], bytes_[name] = timed(call, device, 30), 4 * numel * (3 + 2 * terms)
        source, target = torch.randn(2, max(numel, 25_000_000), device=device)
        rows[YARDSTICK], bytes_[YARDSTICK] = timed(lambda s=source, t=target: t.copy_(s), device, 30), 8 * len(source)
        results[f"{terms} directions of {l2 // (4 * terms)}"] = with_traffic(rows, bytes_)
    return results


def adamw(device: str, small: bool) -> dict[str, Any]:
    """A step of FusedAdamW, which does not wait for the device, beside AdamW(fused=True)."""
    import crl_kernels as ck

    from ..common.problem import Problem
    from ..optimizer import HISTORIES, Model

    problem = Problem(*((SMALL, 10) if small else (25_000_000, 100)), device)
    rounds = 3 if small else 30
    plain = timed(torch.optim.AdamW(Model(problem).parameters(), lr=1e-6, fused=True).step, device, rounds)
    rows = {"AdamW(fused=True)": plain | {"times_adamw": 1.0}}
    for name, _, _, history_of in (("no history", 0, 0, None), *HISTORIES):
        model = Model(problem)
        penalty = {} if history_of is None else {"history": history_of(model), "lam": 1e-6}
        step = ck.FusedAdamW(model.parameters(), lr=1e-6, **penalty).step
        step()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            step()
            torch.cuda.set_sync_debug_mode("default")
        row = timed(step, device, rounds)
        rows[f"FusedAdamW, {name}"] = row | {"times_adamw": row["ms"] / plain["ms"]}
    return {f"{problem.numel}/{len(problem.params)}": rows}


def training_step(device: str, small: bool) -> dict[str, Any]:
    """An AdamW step of a convolutional stack, without and with each penalty."""
    import crl_kernels as ck

    width, blocks, batch = (8, 2, 2) if small else (512, 10, 32)
    layers = [
        nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()) for _ in range(blocks)
    ]
    model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *layers, nn.Conv2d(width, 3, 3, padding=1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(batch, 3, 16, 16, device=device)
    named = {name: p.detach() for name, p in model.named_parameters()}
    histories: dict[str, Any] = {"none": None}
    for name, dtype in (("rank-1", torch.float32), ("rank-1, bf16", torch.bfloat16)):
        histories[name] = ck.LowRankHistory(model)
        mu = {key: torch.randn_like(p) for key, p in named.items()}
        histories[name].append(ck.LowRankFisher.from_mean_gradient(mu, 1e-6, named, storage_dtype=dtype))
    histories["diagonal"] = ck.DiagonalHistory(model)
    histories["diagonal"].append(ck.DiagonalFisher({key: torch.rand_like(p) for key, p in named.items()}, named))

    rows: dict[str, Times] = {}
    for decoupled in (False, True):
        for name, history in histories.items():

            def step() -> None:
                optimizer.zero_grad()
                (model(x) - x).square().mean().backward()
                optimizer.step()

            if history is not None:
                history.attach(optimizer, 1e-3, decoupled=decoupled)
            rows[f"{name}{', decoupled' if decoupled else ''}"] = timed(step, device, 3 if small else 30)
            if history is not None:
                history.detach()
    return {f"{sum(p.numel() for p in model.parameters())} parameters": rows}


def sample_gradients(device: str, small: bool) -> dict[str, Any]:
    """Time and peak memory of SampleGradients beside plain forward + backward, on a UNet."""
    from crl_kernels import SampleGradients

    from ..sample_gradients.models import CLASSES, SIZE, TIMESTEPS, UNet

    results: dict[str, Any] = {}
    widths, samples, rounds = ((8, 8, 16), 2, 1) if small else ((128, 256, 512), 64, 10)
    for dtype in (torch.float32, torch.bfloat16):
        model = UNet(widths).to(dtype).to(device)
        x = torch.randn(samples, 1, SIZE, SIZE, dtype=dtype, device=device)
        t, label = (torch.randint(n, (samples,), device=device) for n in (TIMESTEPS, CLASSES))
        u = {name: torch.randn_like(p, dtype=torch.float32) for name, p in model.named_parameters()}

        def step(model: nn.Module = model, x: Tensor = x, t: Tensor = t, label: Tensor = label) -> None:
            model.zero_grad()
            (model(x, t, label) - x.flip(0)).float().square().flatten(1).mean(1).sum().backward()

        def statistics(model: nn.Module = model, step: Callable[[], None] = step, **options: Any) -> None:
            with SampleGradients(model, **options):
                step()

        calls = {
            "forward + backward": step,
            "SampleGradients": statistics,
            "SampleGradients, a direction": functools.partial(statistics, direction=u),
        }
        rows: dict[str, Times] = {}
        for name, call in calls.items():
            rows[name] = timed(call, device, rounds)
            rows[name]["times_plain"] = rows[name]["ms"] / rows["forward + backward"]["ms"]
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                call()
                rows[name]["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        parameters = sum(p.numel() for p in model.parameters())
        results[f"{parameters:,} parameters, {samples} samples, {dtype}"] = rows
    return results


def trainers(device: str, small: bool) -> dict[str, Any]:
    """What the penalty adds to a training step, for each API that adds it."""
    from ..common.problem import Unavailable
    from ..trainers import DEFAULT, measure

    rounds, passes = (2, 1) if small else (30, 10)
    results: dict[str, Any] = {}
    for name in ["transformer-tiny"] if small else DEFAULT:
        try:
            results[name] = measure(name, rounds, passes, device)
        except Unavailable as reason:
            results[name] = {"skipped": str(reason)}
    return results
