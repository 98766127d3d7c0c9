"""A run's model as a folder that diffusers reads without this package.

DDIMScheduler with the settings below is `diffusion.sampling.ddim`: its timesteps are 0, s, 2s, ... (leading, no
offset), the predicted image is clipped to [-1, 1], abar is 1 after the last step. It has its table of abar in float32,
so images agree up to rounding. A model with adapters becomes one UNet for each task, with the adapters added to the
weights.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from crl_diffusion.config.networks import MODELS, UNetSize
from crl_diffusion.diffusion.network import build
from crl_diffusion.diffusion.noising import TIMESTEPS
from crl_diffusion.diffusion.precision import AUTOCAST
from crl_diffusion.errors import OptionError
from crl_diffusion.files import Row, write_text
from crl_diffusion.methods.adapters import AdaptedNetwork
from crl_diffusion.trained_model.drawing import PURPOSE
from crl_diffusion.trained_model.place import claim
from crl_diffusion.trained_model.weights import TrainedModel

RECORD = "model_card.json"
BETAS = {  # the noise schedules as diffusers spells them
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


def require_exportable(model: str) -> None:
    """OptionError unless the network of that name is a class of diffusers."""
    if not isinstance(MODELS[model], UNetSize):
        unets = ", ".join(name for name, size in MODELS.items() if isinstance(size, UNetSize))
        raise OptionError(
            f"the network of this run is {model!r}, which is the trainer's own and which diffusers cannot load; runs "
            f"with --model {unets} can be exported, and `crl-diffusion sample` draws images of any run"
        )


def unets(trained: TrainedModel) -> dict[str, nn.Module]:
    """The network of each folder: unet, or unet-task-1, unet-task-2, ... if each task has weights of its own."""
    model, config = trained.model, trained.config
    if not isinstance(model, AdaptedNetwork):
        return {"unet": model}
    networks = {}
    for task in range(1, len(trained.tasks) + 1):
        network = trained.precision.of(build(config.model, trained.shape, trained.classes, config.seed))
        network.load_state_dict(model.merged(task))
        networks[f"unet-task-{task}"] = network
    return networks


def write_folder(trained: TrainedModel, out: Path) -> list[Path]:
    """The folders of `unets` and scheduler/ as diffusers writes them, model_card.json with the names of the classes,
    and README.md with the code that loads them. Returns all of these."""
    require_exportable(trained.config.model)
    from diffusers import DDIMScheduler

    record: Row = {
        **trained.origin(),
        "image_shape": list(trained.shape),
        "precision": trained.config.precision,
        "steps": trained.config.eval_steps,
        "class_names": [trained.names.of(c) for c in range(trained.classes)],
        "tasks": [list(classes) for classes in trained.tasks],
    }
    claim(out, RECORD, record)
    scheduler = DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        clip_sample=True,
        clip_sample_range=1.0,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="leading",
        prediction_type="epsilon",
        **BETAS[trained.config.schedule],
    )
    parts = {**unets(trained), "scheduler": scheduler}
    for name, part in parts.items():
        try:
            part.save_pretrained(out / name)
        except SafetensorError as error:
            raise OSError(f"{str(out / name)!r} cannot be written ({error})") from error
    write_text(out / "README.md", readme(trained))
    return [out / "README.md", out / RECORD, *(out / name for name in parts)]


def readme(trained: TrainedModel) -> str:
    """The model card. Its Python blocks run one after the other, in the folder itself."""
    config, (channels, side, _) = trained.config, trained.shape
    double = ", torch_dtype=torch.float64" if config.precision == "fp64" else ""
    arithmetic = {
        "fp64": " The weights are float64.",
        **{
            name: f" It was trained and evaluated under `torch.autocast` to {dtype}."
            for name, dtype in AUTOCAST.items()
        },
    }.get(config.precision, "")
    if isinstance(trained.model, AdaptedNetwork):
        contents = "one UNet for each task, whose classes it draws, and a scheduler"
        loading = f"""\
unets = {{
    label: unet
    for task, labels in enumerate(card["tasks"], start=1)
    for unet in [UNet2DModel.from_pretrained(".", subfolder=f"unet-task-{{task}}"{double}).eval()]
    for label in labels
}}"""
        chosen = "    unet = unets[label]\n"
    else:
        contents = "a UNet and a scheduler"
        loading = f'unet = UNet2DModel.from_pretrained(".", subfolder="unet"{double}).eval()'
        chosen = ""
    classes = "\n".join(
        f"{c:>5}  task {task}  {trained.names.of(c)}"
        for task, labels in enumerate(trained.tasks, start=1)
        for c in labels
    )
    return f"""\
---
library_name: diffusers
tags: [diffusers, class-conditional, continual-learning]
---

# A class-conditional diffusion model

Trained by `crl-diffusion`: `{trained.subject}`. It draws images of {channels} x {side} x {side} pixels in [-1, 1] of
{len(trained.learnt)} classes.{arithmetic} No pipeline of diffusers hands class labels to a UNet2DModel, so the folder
has {contents}. In this folder:

```python
import json
import torch
from diffusers import DDIMScheduler, UNet2DModel
card = json.load(open("model_card.json", encoding="utf-8"))
class_names = card["class_names"]  # class_names[label]
scheduler = DDIMScheduler.from_pretrained(".", subfolder="scheduler")
{loading}
```

Eight images of one class, in the {config.eval_steps} steps that the run was evaluated with. More steps take longer and
usually draw better:

```python
def draw(noise, label):
{chosen}    scheduler.set_timesteps({config.eval_steps})
    image, label = noise.to(unet.dtype), torch.full((len(noise),), label)
    with torch.no_grad():
        for t in scheduler.timesteps:
            image = scheduler.step(unet(image, t, class_labels=label).sample, t, image).prev_sample
    return image

images = draw(torch.randn(8, {channels}, {side}, {side}), label={trained.learnt[0]})
pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
```

`crl-diffusion sample` starts image n of a class, with seed s, from this noise, and so draws the same images up to
rounding:

```python
import hashlib

def starting_noise(seed, label, n):
    name = f"{{seed}}/{PURPOSE}, class {{label}}/0/{{n}}".encode()
    number = int.from_bytes(hashlib.sha256(name).digest()[:8], "little") >> 1
    return torch.randn({channels}, {side}, {side}, generator=torch.Generator().manual_seed(number))
```

The classes by label, all of which it has learnt:

```text
{classes}
```
"""
