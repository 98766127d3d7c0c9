"""A class-conditional diffusion model on diffusers and accelerate that learns handwritten digits two by two, and
replays what its old self draws of earlier ones, held by rank-1 EWC: `continual_unet.py` and five lines more.

    python continual_unet_ewc.py --steps 300        # or: accelerate launch continual_unet_ewc.py
"""

import argparse
import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from crl_kernels import LowRankHistory, estimate_fisher

SCHEDULE = DDIMScheduler(num_train_timesteps=1000)


def images_of(classes):
    """8 x 8 digits in [-1, 1] with their labels."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    label = torch.tensor(digits.target)
    chosen = torch.isin(label, torch.tensor(classes))
    return TensorDataset(pixels[chosen], label[chosen])


def new_model():
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=8,
        add_attention=False,
        num_class_embeds=10,
    )


def per_sample_loss(model, batch):
    """Squared error of the predicted noise, (N,): the mean over each image."""
    images, label = batch
    noise, t = torch.randn_like(images), torch.randint(1000, (len(images),), device=images.device)
    prediction = model(SCHEDULE.add_noise(images, noise, t), t, class_labels=label).sample
    return (prediction - noise).square().flatten(1).mean(1)


def distillation_loss(model, teacher, pool, size):
    """How far the model's prediction is from its old self's, on images that the old self has drawn."""
    images, label = (part[torch.randint(len(pool[0]), (size,), device=pool[0].device)] for part in pool)
    noise, t = torch.randn_like(images), torch.randint(1000, (size,), device=images.device)
    noised = SCHEDULE.add_noise(images, noise, t)
    with torch.no_grad():
        target = teacher(noised, t, class_labels=label).sample
    return functional.mse_loss(model(noised, t, class_labels=label).sample, target)


@torch.no_grad()
def draw(model, label, steps=10):
    """Images of the given labels, by DDIM."""
    images = torch.randn(len(label), 1, 8, 8, device=label.device)
    sampler = copy.deepcopy(SCHEDULE)
    sampler.set_timesteps(steps)
    for t in sampler.timesteps:
        prediction = model(images, t.expand(len(label)).to(label.device), class_labels=label).sample
        images = sampler.step(prediction, t, images).prev_sample
    return images.clamp(-1, 1)


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pool", type=int, default=50, help="images that are replayed of each old class")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/continual_unet"))
    options = parser.parse_args(arguments)

    accelerator = Accelerator()
    set_seed(0)
    model = accelerator.prepare(new_model())
    teacher, pool = None, None
    history = LowRankHistory(model)
    for task in range(options.tasks):
        loader = DataLoader(images_of([2 * task, 2 * task + 1]), options.batch, shuffle=True, drop_last=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
        optimizer, loader = accelerator.prepare(optimizer, loader)
        history.attach(optimizer, lam=20.0, decoupled=True)

        step = 0
        while step < options.steps:
            for batch in loader:
                loss = per_sample_loss(model, batch).mean()
                if teacher is not None:
                    loss = loss + distillation_loss(model, teacher, pool, options.batch)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if step == options.steps:
                    break
        history.detach()
        history.append(estimate_fisher(model, per_sample_loss, loader))
        accelerator.print(f"task {task + 1}: loss {loss.item():.4f}")

        teacher = copy.deepcopy(accelerator.unwrap_model(model)).eval()
        label = torch.arange(2 * task + 2, device=accelerator.device).repeat_interleave(options.pool)
        pool = draw(teacher, label), label

    accelerator.unwrap_model(model).save_pretrained(options.out, is_main_process=accelerator.is_main_process)
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
