"""Fine-tuning as diffusers' DreamBooth scripts do it, with prior preservation, on a small text-conditioned UNet: the
whole network, and LoRA adapters through peft, where the penalty is on the adapters, which is all that moves; and LoRA
as in its tutorial, with distillation from the old adapter."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pages import DOCS, run_python_blocks
from helpers.past_tasks import flat
from torch import Tensor, nn
from torch.nn import functional

import crl_kernels as ck

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra trainer)")
peft = pytest.importorskip("peft", reason="peft is not installed (extra integrations)")

pytestmark = pytest.mark.filterwarnings(
    "ignore:only .* of the trace of the Fisher:UserWarning", "ignore:the mean gradient is mostly noise:UserWarning"
)
LAM, STEPS, LR = 50.0, 30, 1e-3


def unet(lora: bool) -> nn.Module:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    if lora:
        model.requires_grad_(False)
        model.add_adapter(
            peft.LoraConfig(
                r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
            )
        )
    return model


class Concept:
    """Latents and text embeddings that look like one subject's."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.latent, self.text = self._normal(1, 4, 8, 8), self._normal(1, 3, 8)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(noised latents, timesteps, text embeddings, noise)."""
        noise, t = self._normal(size, 4, 8, 8), torch.randint(1000, (size,), generator=self.generator)
        signal = (1 - t / 1000).view(-1, 1, 1, 1)
        return signal * self.latent + (1 - signal) * noise, t, self.text.expand(size, -1, -1), noise


def per_sample_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    noised, t, text, noise = batch
    return (model(noised, t, encoder_hidden_states=text).sample - noise).square().flatten(1).mean(1)


def prior_preserving_loss(model: nn.Module, concept: Concept, prior: Concept) -> Tensor:
    """The subject's images and the class's in one batch, as DreamBooth stacks them."""
    both = [torch.cat(parts) for parts in zip(concept.batch(2), prior.batch(2), strict=True)]
    losses = per_sample_loss(model, tuple(both))
    return losses[:2].mean() + 1.0 * losses[2:].mean()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def add_penalty_grad_by_autograd(model: nn.Module, history: ck.LowRankHistory, lam: float) -> None:
    """The penalty written out: u and b from the history, its gradient by autograd."""
    (u,) = history.directions()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dot = sum((u[name].double() * p.double()).sum() for name, p in named.items())
    value = 0.5 * lam * history.curvatures[0] * (dot - history.anchor_projections[0]) ** 2
    for p, g in zip(named.values(), torch.autograd.grad(value, list(named.values())), strict=True):
        p.grad += g


def fine_tune(model: nn.Module, lam: float, by_hand: bool) -> tuple[list[float], ck.LowRankHistory]:
    history = ck.LowRankHistory(model)
    seen = Concept(1)
    history.append(ck.estimate_fisher(model, per_sample_loss, [seen.batch(4) for _ in range(8)], direction="top"))
    with torch.no_grad():
        for i, p in enumerate(trained(model)):
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    optimizer = torch.optim.AdamW(trained(model), lr=LR)
    if not by_hand:
        history.attach(optimizer, lam)
    subject, prior, losses = Concept(2), Concept(1), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = prior_preserving_loss(model, subject, prior)
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(trained(model), 1.0)
        if by_hand:
            add_penalty_grad_by_autograd(model, history, lam)
        optimizer.step()
    return losses, history


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_30_steps_equal_the_penalty_written_out(lora):
    model, plain, free = unet(lora), unet(lora), unet(lora)
    losses, history = fine_tune(model, LAM, by_hand=False)
    expected, beside = fine_tune(plain, LAM, by_hand=True)
    assert losses == pytest.approx(expected, rel=1e-4)
    end = flat(model)
    torch.testing.assert_close(end, flat(plain), rtol=1e-4, atol=1e-5)
    assert history.penalty(LAM).item() == pytest.approx(beside.penalty(LAM).item(), rel=1e-2)
    assert all(("lora" in name) == lora for name in history.names)
    fine_tune(free, 0.0, by_hand=False)
    assert float((flat(free) - end).norm()) > 10 * float((flat(plain) - end).norm())


def test_adapters_go_to_a_file_and_back(tmp_path):
    """The base network is not in the history: it may be anyone's copy of the same checkpoint."""
    model = unet(lora=True)
    _, history = fine_tune(model, LAM, by_hand=False)
    history.detach()
    history.save(tmp_path / "history.safetensors")
    model.save_lora_adapter(tmp_path / "adapter")
    assert history.nbytes < 5 * sum(p.numel() for p in trained(model))

    again = unet(lora=False)
    again.requires_grad_(False)
    again.load_lora_adapter(
        tmp_path / "adapter", adapter_name="default", prefix=None, weight_name="pytorch_lora_weights.safetensors"
    )
    for name, p in again.named_parameters():
        p.requires_grad_("lora" in name)
    loaded = ck.LowRankHistory.load(tmp_path / "history.safetensors", again)
    torch.testing.assert_close(loaded.drift(), history.drift(), rtol=1e-9, atol=1e-12)


def test_prior_preservation_draws_the_same_batches_for_all():
    first, second = (prior_preserving_loss(unet(False), Concept(2), Concept(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(
        functional.mse_loss(*Concept(1).batch(2)[::3]), functional.mse_loss(*Concept(2).batch(2)[::3])
    )


# The tutorial's way: distillation whose teacher is the old adapter of the same network


@pytest.fixture
def tutorial(tmp_path, monkeypatch) -> Iterator[dict[str, Any]]:
    """The names of the page, of which the first subject has been learned. It sets torch's default dtype."""
    monkeypatch.chdir(tmp_path)
    dtype = torch.get_default_dtype()
    yield run_python_blocks(DOCS / "tutorials" / "lora-diffusers.md", until="train_second")
    torch.set_default_dtype(dtype)


def test_30_steps_of_the_tutorial_equal_a_plain_loop_with_a_teacher_of_its_own(tutorial):
    model, history, lam = tutorial["model"], tutorial["history"], 300.0
    teacher, (plain, plain_history) = copy.deepcopy(model).requires_grad_(False), copy.deepcopy((model, history))
    start = ends(model)
    torch.manual_seed(1)
    plain_loop(tutorial, plain, teacher, plain_history, lam)

    def trained_by_the_page(lam: float) -> Tensor:
        student, kept = copy.deepcopy((model, history))
        tutorial["load_adapter"](student, "first", "old")
        student.set_adapter("default")
        optimizer = tutorial["new_optimizer"](student)
        kept.attach(optimizer, lam)
        torch.manual_seed(1)
        tutorial["train_second"](student, optimizer, STEPS, distilled=True)
        return ends(student)

    moved = (ends(plain) - start).norm()
    assert float((trained_by_the_page(lam) - ends(plain)).norm() / moved) < 1e-9
    assert float((trained_by_the_page(0.0) - ends(plain)).norm() / moved) > 0.01  # the penalty has done something


def ends(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trained(model)])


def plain_loop(page, student: nn.Module, teacher: nn.Module, history: ck.LowRankHistory, lam: float) -> None:
    """The tutorial's second subject; random numbers are drawn in its order."""
    scheduler, text = page["scheduler"], page["first"][1].expand(8, -1, -1)
    optimizer = torch.optim.AdamW(trained(student), lr=5e-3)

    def noised() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        latents, own_text = page["batch_of"](page["second"])
        noise, t = torch.randn_like(latents), torch.randint(1000, (8,))
        return scheduler.add_noise(latents, noise, t), t, noise, own_text

    for _ in range(STEPS):
        optimizer.zero_grad()
        x, t, noise, own_text = noised()
        loss = functional.mse_loss(student(x, t, encoder_hidden_states=own_text).sample, noise)
        latents, _ = page["batch_of"](page["second"])
        page["batch_of"](page["first"])  # of which the page takes the text
        noise, t = torch.randn_like(latents), torch.randint(1000, (8,))
        x = scheduler.add_noise(latents, noise, t)
        target = teacher(x, t, encoder_hidden_states=text).sample
        loss = loss + functional.mse_loss(student(x, t, encoder_hidden_states=text).sample, target)
        loss.backward()
        add_penalty_grad_by_autograd(student, history, lam)
        optimizer.step()


# Files, and a new process that goes on


def save_lora_weights(folder: Path, model: nn.Module) -> None:
    """As diffusers' training scripts do."""
    layers = peft.get_peft_model_state_dict(model, adapter_name="default")
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=diffusers.utils.convert_state_dict_to_diffusers(layers)
    )


def load_lora_weights(folder: Path, model: nn.Module, name: str) -> None:
    """``StableDiffusionPipeline.load_lora_weights`` without the other parts of a pipeline."""
    pipeline = diffusers.StableDiffusionPipeline
    layers, alphas = pipeline.lora_state_dict(folder)
    pipeline.load_lora_into_unet(layers, network_alphas=alphas, unet=model, adapter_name=name)


def distilled_steps(model: nn.Module, optimizer: torch.optim.Optimizer, concept: Concept) -> None:
    text = Concept(1).text.expand(2, -1, -1)
    for _ in range(STEPS // 2):
        optimizer.zero_grad()
        noised, t, _, _ = concept.batch(2)
        with torch.no_grad():
            model.set_adapter("old")
            target = model(noised, t, encoder_hidden_states=text).sample
        model.set_adapter("default")
        prediction = model(noised, t, encoder_hidden_states=text).sample
        loss = per_sample_loss(model, concept.batch(2)).mean() + functional.mse_loss(prediction, target)
        loss.backward()
        optimizer.step()


def go_on(folder: Path) -> None:
    """In a new process: the second half of the steps, from files."""
    torch.set_num_threads(1)
    model = unet(lora=False)
    load_lora_weights(folder / "half", model, "default")
    load_lora_weights(folder / "first", model, "old")
    model.requires_grad_(False)
    model.set_adapter("default")
    rest = torch.load(folder / "rest.pt", weights_only=True)
    optimizer = torch.optim.AdamW(trained(model), lr=LR)
    optimizer.load_state_dict(rest["optimizer"])
    history = ck.LowRankHistory.load(folder / "history.safetensors", model)
    history.attach(optimizer, LAM)
    concept = Concept(2)
    concept.generator.set_state(rest["generator"])
    distilled_steps(model, optimizer, concept)
    torch.save(ends(model), folder / "end.pt")


def test_a_new_process_goes_on_as_the_uninterrupted_training(tmp_path):
    model = unet(lora=True)
    save_lora_weights(tmp_path / "first", model)
    history = ck.LowRankHistory(model)
    seen, concept = Concept(1), Concept(2)
    history.append(ck.estimate_fisher(model, per_sample_loss, [seen.batch(4) for _ in range(4)], direction="top"))
    load_lora_weights(tmp_path / "first", model, "old")
    model.set_adapter("default")
    optimizer = torch.optim.AdamW(trained(model), lr=LR)
    history.attach(optimizer, LAM)
    distilled_steps(model, optimizer, concept)
    save_lora_weights(tmp_path / "half", model)
    history.save(tmp_path / "history.safetensors")
    rest = {"optimizer": optimizer.state_dict(), "generator": concept.generator.get_state()}
    torch.save(rest, tmp_path / "rest.pt")
    half = ends(model)
    distilled_steps(model, optimizer, concept)

    program = (
        "import sys; from pathlib import Path; from integrations.test_diffusers import go_on; go_on(Path(sys.argv[1]))"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert torch.equal(torch.load(tmp_path / "end.pt"), ends(model))
    assert float((ends(model) - half).norm()) > 1e-3
    assert history.penalty(LAM) > 0
