"""A plain FSDP2 loop with rank-1 EWC: a denoiser of handwritten digits learns 0 to 4, and then 5 to 9 while it is held.

    torchrun --nproc-per-node 2 sharded_loop.py

The history is sharded as the parameters are. The Fisher of a task is estimated by all processes, each on its share of
the data; none of them ever has the whole parameters. This takes one pass for each sample of the second half, so
``max_samples=`` limits it.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard

from crl_kernels import FusedAdamW, LowRankHistory, estimate_fisher


class Denoiser(nn.Module):
    """(N, 64) noised images and (N,) times in [0, 1] -> the noise in them."""

    def __init__(self, width=128):
        super().__init__()
        self.first = nn.Linear(65, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(width, width)) for _ in range(3))
        self.last = nn.Linear(width, 64)

    def forward(self, noised, t):
        h = self.first(torch.cat([noised, t[:, None]], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return self.last(h)


def per_sample_loss(model, images):
    noise, t = torch.randn_like(images), torch.rand(len(images), device=images.device)
    noised = (1 - t[:, None]) * images + t[:, None] * noise
    return (model(noised, t) - noise).square().mean(1)


def batches_of(classes, size, device):
    """This process's share of the images, in batches."""
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    mine = pixels[torch.isin(torch.tensor(digits.target), torch.tensor(classes))][
        dist.get_rank() :: dist.get_world_size()
    ]
    return [batch for batch in mine.to(device).split(size) if len(batch) == size]


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--fisher-samples", type=int, default=200, help="of each process")
    parser.add_argument("--lam", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path("runs/sharded_loop"))
    options = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Denoiser().to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    history = LowRankHistory(model)
    torch.manual_seed(dist.get_rank())

    for task, classes in enumerate(([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])):
        batches = batches_of(classes, options.batch, device)
        optimizer = FusedAdamW(model.parameters(), lr=1e-3, history=history, lam=options.lam, decoupled=True)
        for _ in range(options.epochs):
            for batch in batches:
                loss = per_sample_loss(model, batch).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        history.append(estimate_fisher(model, per_sample_loss, batches, max_samples=options.fisher_samples))
        if dist.get_rank() == 0:
            print(f"task {task + 1}: loss {loss.item():.4f}, penalty {optimizer.last_penalty.item():.3g}, {history}")

    dcp.save({"model": get_model_state_dict(model), "history": history.state_dict()}, checkpoint_id=options.out)


if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main()
    on_gloo = dist.get_backend() == "gloo"
    dist.destroy_process_group()
    if on_gloo:
        # FSDP2 caches its mesh, and with it gloo's threads outlive the group: one that drops a last tensor while Python
        # shuts down aborts the process (seen in torch 2.14). All is written: leave without shutting down.
        sys.stdout.flush()
        os._exit(0)
