"""Models of other libraries, from tiny configurations: their Fisher is that of a loop of single samples.

Batches hold as many samples as tokens, heads or classes, so that nothing but the sample is the sample. The loop runs in
float64 on a copy of the model; ours in float32, as users run it.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers.by_loop import flat, rows_by_loop
from torch import Tensor, nn

from crl_kernels import SampleGradients, estimate_fisher

pytestmark = pytest.mark.filterwarnings("ignore")  # of estimates from so few samples, and the libraries' own
N = 6
TOLERANCE = 1e-5
VOCABULARY = 13
Batch = dict[str, Tensor]


class Family(NamedTuple):
    model: nn.Module
    batch: Callable[[], Batch]
    losses: Callable[[nn.Module, Batch], Tensor]
    loop_dtype: torch.dtype = torch.float64


def library(name: str) -> Any:
    extra = {"transformers": "integrations", "diffusers": "integrations", "peft": "integrations", "timm": "peers"}[name]
    return pytest.importorskip(name, reason=f"{name} is not installed (extra {extra})")


def randomized(model: nn.Module) -> nn.Module:
    """Away from zeros and ones: gates, adapters and scales begin with them, and hide what is behind."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


# Language


def ids(length: int = N) -> Tensor:
    return torch.randint(1, VOCABULARY, (N, length))


def padded_ids(left: bool = False) -> Batch:
    """Sequences of 6, 5, 3, 2, 6 and 4 tokens."""
    mask = (torch.arange(N) < torch.tensor([6, 5, 3, 2, 6, 4])[:, None]).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids() * mask, "attention_mask": mask}


def token_mean(errors: Tensor, mask: Tensor) -> Tensor:
    """(N,): the mean over each sample's own tokens."""
    return (errors * mask).sum(1) / mask.sum(1)


def next_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(**batch).logits[:, :-1]
    errors = F.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none")
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
    return token_mean(errors, mask[:, 1:] * mask[:, :-1])


ENCODER = {"hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 2, "num_attention_heads": 2}


def configured(model: str, config: str, **options: Any) -> nn.Module:
    transformers = library("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def gpt2_model(**options: Any) -> nn.Module:
    return configured(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=VOCABULARY,
        n_positions=N,
        n_embd=12,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )


def decoder(kind: str, **options: Any) -> nn.Module:
    return configured(
        f"{kind}ForCausalLM",
        f"{kind}Config",
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=N,
        num_key_value_heads=3,
        max_position_embeddings=N,
        **options,
    )


def on_padded_ids(model: nn.Module) -> Family:
    return Family(model, padded_ids, next_token_losses)


def on_full_ids(model: nn.Module) -> Family:
    return Family(model, lambda: {"input_ids": ids()}, next_token_losses)


def mixtral(implementation: str) -> Family:
    """A mixture of experts: each expert has other rows. One product of all of them, or a loop over them."""
    model = decoder("Mixtral", num_local_experts=3, num_experts_per_tok=2, experts_implementation=implementation)
    loop_dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # it has no float64
    return on_full_ids(model)._replace(loop_dtype=loop_dtype)


def bert() -> Family:
    model = configured(
        "BertForMaskedLM",
        "BertConfig",
        vocab_size=VOCABULARY,
        max_position_embeddings=N,
        **ENCODER,
    )

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        errors = F.cross_entropy(model(**batch).logits.mT, batch["input_ids"], reduction="none")
        return token_mean(errors, batch["attention_mask"])

    return Family(model, lambda: padded_ids() | {"token_type_ids": torch.randint(0, 2, (N, N))}, losses)


def t5() -> Family:
    model = configured(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=VOCABULARY,
        d_model=12,
        d_kv=4,
        d_ff=14,
        num_layers=2,
        num_heads=N,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
    )

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**batch).logits
        return F.cross_entropy(logits.mT, batch["labels"], reduction="none").mean(1)

    return Family(model, lambda: padded_ids() | {"labels": ids()}, losses)


def clip_model() -> nn.Module:
    return configured(
        "CLIPModel",
        "CLIPConfig",
        text_config={**ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": N, "eos_token_id": 2},
        vision_config={**ENCODER, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )


def clip_pairs() -> Family:
    """Each image against its own text."""

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        return -model(**batch).logits_per_image.diagonal()

    return Family(clip_model(), lambda: padded_ids() | {"pixel_values": torch.randn(N, 3, 8, 8)}, losses)


def clip_classes() -> Family:
    """Each image against the texts of all classes, which are as many as images."""
    texts = torch.randint(1, VOCABULARY, (N, N), generator=torch.Generator().manual_seed(3))

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(input_ids=texts, pixel_values=batch["x"]).logits_per_image
        return F.cross_entropy(logits, batch["label"], reduction="none")

    return Family(clip_model(), labelled_images(8, 8), losses)


# Diffusion


def noised(**condition: Callable[[], Tensor]) -> Callable[[], Batch]:
    def batch() -> Batch:
        images = {"x": torch.randn(N, 4, 8, 8), "t": torch.randint(0, 1000, (N,)), "noise": torch.randn(N, 4, 8, 8)}
        return images | {name: make() for name, make in condition.items()}

    return batch


def denoising_losses(*inputs: str | int) -> Callable[[nn.Module, Batch], Tensor]:
    """Of a model that is called with these tensors of the batch, or numbers."""

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        output = model(*(batch[name] if isinstance(name, str) else name for name in inputs)).sample
        return (output[:, :4] - batch["noise"]).square().mean((1, 2, 3))

    return losses


def unet_text(timestep: str | int) -> Family:
    """With a timestep for each sample, or a number for the batch."""
    model = library("diffusers").UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=N,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return Family(model, noised(text=lambda: torch.randn(N, N, N)), denoising_losses("x", timestep, "text"))


PATCHES = {
    **{"sample_size": 8, "patch_size": 4, "in_channels": 4},
    **{"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4},
}


def dit() -> Family:
    model = library("diffusers").DiTTransformer2DModel(
        **PATCHES,
        num_embeds_ada_norm=5,
        norm_num_groups=4,
    )
    return Family(model, noised(label=lambda: torch.randint(0, 5, (N,))), denoising_losses("x", "t", "label"))


def sd3() -> Family:
    model = library("diffusers").SD3Transformer2DModel(
        **PATCHES,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        out_channels=4,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    conditions = noised(text=lambda: torch.randn(N, N, 6), pooled=lambda: torch.randn(N, 5))
    return Family(model, conditions, denoising_losses("x", "text", "pooled", "t"))


def autoencoder() -> Family:
    model = library("diffusers").AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
    )

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        posterior = model.encode(batch["x"]).latent_dist
        image = model.decode(posterior.mean + posterior.std * batch["noise"]).sample
        return (image - batch["x"]).square().mean((1, 2, 3)) + 1e-2 * posterior.kl()

    return Family(model, lambda: {"x": torch.randn(N, 3, 8, 8), "noise": torch.randn(N, 2, 4, 4)}, losses)


# Adapters: what moves, and what a Fisher is of, is the adapter


def adapted(base: nn.Module, config: str, **options: Any) -> nn.Module:
    peft = library("peft")
    return peft.get_peft_model(base, getattr(peft, config)(**options))


def lora(base: nn.Module, *layers: str, **options: Any) -> nn.Module:
    return adapted(base, "LoraConfig", r=2, target_modules=list(layers), init_lora_weights=False, **options)


def ia3() -> Family:
    layers = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return on_padded_ids(adapted(decoder("Llama"), "IA3Config", **layers))


# Vision


def class_losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["label"], reduction="none")


def labelled_images(height: int, width: int) -> Callable[[], Batch]:
    return lambda: {"x": torch.randn(N, 3, height, width), "label": torch.randint(0, N, (N,))}


def vit() -> Family:
    """Five patches and the class token."""
    library("timm")
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=(4, 10),
        patch_size=(4, 2),
        embed_dim=12,
        depth=2,
        num_heads=2,
        mlp_ratio=1,
        num_classes=N,
        init_values=0.5,
    )
    return Family(model, labelled_images(4, 10), class_losses)


def swin() -> Family:
    library("timm")
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=16,
        patch_size=2,
        embed_dim=8,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=2,
        mlp_ratio=1,
        num_classes=N,
    )
    return Family(model, labelled_images(16, 16), class_losses)


FAMILIES: dict[str, Callable[[], Family]] = {
    "GPT-2, padded": lambda: on_padded_ids(gpt2_model()),
    "GPT-2, padded on the left": lambda: Family(
        gpt2_model(n_inner=10), lambda: padded_ids(left=True), next_token_losses
    ),
    "GPT-2, eager attention": lambda: on_full_ids(gpt2_model(attn_implementation="eager")),
    "Llama": lambda: on_padded_ids(decoder("Llama")),
    "Llama, tied embeddings": lambda: on_full_ids(decoder("Llama", tie_word_embeddings=True)),
    "Mixtral, grouped_mm": lambda: mixtral("grouped_mm"),
    "Mixtral, eager": lambda: mixtral("eager"),
    "BERT": bert,
    "T5": t5,
    "CLIP, pairs": clip_pairs,
    "CLIP, classes": clip_classes,
    "UNet2DConditionModel": lambda: unet_text("t"),
    "UNet2DConditionModel, one timestep": lambda: unet_text(17),
    "DiT": dit,
    "SD3": sd3,
    "AutoencoderKL": autoencoder,
    "LoRA": lambda: on_padded_ids(lora(gpt2_model(), "c_attn", "c_fc", fan_in_fan_out=True)),
    "LoRA on embeddings": lambda: on_full_ids(lora(decoder("Llama"), "embed_tokens", "q_proj")),
    "DoRA": lambda: on_padded_ids(lora(decoder("Llama"), "q_proj", "down_proj", use_dora=True)),
    "IA3": ia3,
    "ViT": vit,
    "Swin": swin,
}


def relative(got: Tensor | float, want: Tensor | float) -> float:
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want)
    return float((got - want).norm() / want.norm())


def one_by_one(family: Family, batch: Batch) -> Tensor:
    """(N, P) float64, each row from a batch of one."""
    model = copy.deepcopy(family.model).to(family.loop_dtype)
    batch = {name: x.to(family.loop_dtype) if x.is_floating_point() else x for name, x in batch.items()}
    samples = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(N)]
    return torch.cat([flat(rows_by_loop(model, family.losses(model, sample))) for sample in samples])


@pytest.fixture(params=FAMILIES)
def problem(request) -> tuple[Family, list[Batch], Tensor]:
    """A family, two batches of it, and the gradients of their samples, (2N, P)."""
    torch.manual_seed(0)
    family = FAMILIES[request.param]()
    randomized(family.model)
    batches = [family.batch(), family.batch()]
    return family, batches, torch.cat([one_by_one(family, batch) for batch in batches])


def test_norms(problem):
    family, batches, rows = problem
    with SampleGradients(family.model) as sg:
        family.losses(family.model, batches[0]).sum().backward()
    assert relative(sg.sq_norms, rows[:N].square().sum(1)) < TOLERANCE
    assert relative(sg.projections, rows[:N] @ rows[:N].mean(0)) < TOLERANCE
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in family.model.parameters() if p.requires_grad]
    assert relative(torch.cat([grad.flatten() for grad in grads]), rows[:N].sum(0)) < TOLERANCE


def test_fisher(problem):
    """The direction from the first half, curvature and rho along it from the second; and the diagonal of all."""
    family, batches, rows = problem
    fisher = estimate_fisher(family.model, family.losses, batches)
    direction = rows[:N].mean(0) / rows[:N].mean(0).norm()
    projections, sq_norms = rows[N:] @ direction, rows[N:].square().sum(1)
    assert relative(fisher.directions[0], direction) < TOLERANCE
    assert relative(fisher.curvatures, projections.square().mean()[None]) < TOLERANCE
    assert relative(fisher.slopes, projections.mean()[None]) < TOLERANCE
    assert relative(fisher.statistics.trace, sq_norms.mean()) < TOLERANCE
    assert relative(fisher.statistics.rho, projections.square().sum() / sq_norms.sum()) < TOLERANCE
    diagonal = estimate_fisher(family.model, family.losses, batches, kind="diagonal")
    assert relative(diagonal.fisher_diagonal, rows.square().mean(0)) < TOLERANCE
    assert relative(diagonal.statistics.trace, rows.square().sum(1).mean()) < TOLERANCE
