"""Classifier guidance for replayed images (Dhariwal & Nichol, arXiv 2105.05233): images are drawn with the noise

    e - s sqrt(1 - abar_t) grad_x log p(y | x_t)

in place of the model's prediction e. s is the strength (--guidance); p comes from a small classifier of noised images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from crl_diffusion import processes
from crl_diffusion.config.curriculum import task_classes
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data.images import Images, join
from crl_diffusion.diffusion import noising
from crl_diffusion.diffusion.mlp import sinusoids
from crl_diffusion.diffusion.network import predict, seeded
from crl_diffusion.diffusion.noising import Schedule
from crl_diffusion.diffusion.precision import Precision
from crl_diffusion.methods.regression import Moment, epoch_batch, noise_up, share_of_noise
from crl_diffusion.run_folder.checkpoint import require_like

WIDTH, LR = 32, 3e-3
PREFIX = "guide/"  # of the classifier's tensors in a checkpoint


class NoisyClassifier(nn.Module):
    """log p(y | x_t) from two convolutions, the first of which sees an embedding of the timestep. Its arithmetic is
    that of its parameters, also under autocast."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, size, _ = shape
        quarter = -(-size // 4)  # of the side, rounded up
        self.register_buffer("sinusoids", sinusoids(WIDTH), persistent=False)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.first = nn.Conv2d(channels, WIDTH, 3, stride=2, padding=1)
        self.second = nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * WIDTH * quarter**2, classes)

    def forward(self, noised: Tensor, t: Tensor) -> Tensor:
        """Noised images (B, C, S, S), timesteps (B,) -> (B, classes)."""
        with torch.autocast(noised.device.type, enabled=False):
            hidden = functional.silu(self.first(noised) + self.time(self.sinusoids[t])[..., None, None])
            hidden = functional.silu(self.second(hidden))
            return functional.log_softmax(self.head(hidden.flatten(1)), 1)


class GuidedModel(nn.Module):
    """A label-conditioned model with classifier guidance, called as the model is."""

    def __init__(self, model: nn.Module, classifier: nn.Module, schedule: Schedule, strength: float) -> None:
        super().__init__()
        self.model, self.classifier, self.strength = model, classifier, strength
        self.sigma = (1 - schedule.alpha_bar).sqrt()

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Images (B, C, S, S), timesteps (B,), labels (B,) -> the guided noise, (B, C, S, S), in a tuple."""
        with torch.enable_grad():
            x = sample.detach().requires_grad_()
            chosen = self.classifier(x, timestep).gather(1, class_labels[:, None])
            (slope,) = torch.autograd.grad(chosen.sum(), x)
        sigma = self.sigma.to(slope)[timestep].view(-1, 1, 1, 1)
        return (predict(self.model, sample, timestep, class_labels) - self.strength * sigma * slope,)


class Guide:
    """The classifier of a run, which goes on from task to task: each begins with the parameters of the last."""

    def __init__(self, config: RunConfig, shape: tuple[int, int, int]) -> None:
        self.config, self.schedule = config, noising.SCHEDULES[config.schedule]
        device = torch.device(config.device)
        classes = 1 + max(c for task in task_classes(config) for c in task)
        with seeded(config.seed, "guide weights"):
            classifier = NoisyClassifier(shape, classes)
        self.classifier = Precision(config.precision, device).of(classifier).to(device)

    def learn(self, images: Images, pool: Images, stage: int) -> None:
        """Train on a task's images and on a pool of earlier classes, which is empty after the first task: as many steps
        as the model has, with its two sizes of batch, and the mean cross-entropy of both batches together."""
        config, model = self.config, self.classifier
        like, steps = next(model.parameters()), config.task_steps(len(images))
        optimizer = torch.optim.Adam(model.parameters())
        for step in range(steps):
            moment = Moment(config.seed, stage, step)
            batch = epoch_batch(images, config.batch, moment, "guide epoch")
            if len(pool):
                chosen = torch.randint(len(pool), (config.replay_batch,), generator=moment.stream("guide replay"))
                batch = join([batch, pool.take(chosen)])
            n = len(batch)
            mine = batch.take(torch.arange(n)[processes.share(n)])
            t, noise = share_of_noise(mine, n, moment.stream("guide noise"))
            noised, t, label, _ = noise_up(mine, t, noise, self.schedule, like)
            optimizer.param_groups[0]["lr"] = LR * (1 - step / steps)
            optimizer.zero_grad()
            with torch.enable_grad():
                (functional.nll_loss(model(noised, t), label, reduction="sum") / n).backward()
            processes.sum_gradients(model)
            optimizer.step()

    def of(self, model: nn.Module) -> GuidedModel:
        """A model with this guide."""
        return GuidedModel(model, self.classifier, self.schedule, self.config.guidance)

    def state(self) -> dict[str, Tensor]:
        return {f"{PREFIX}{name}": value for name, value in self.classifier.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the classifier from a state that may hold more."""
        own = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        require_like(own, self.classifier.state_dict(), "guide")
        self.classifier.load_state_dict(own)
