"""accelerate: a prepared optimizer takes the penalty as a plain one does, after accumulation and clipping, a checkpoint
of accelerate's holds the history, and an estimate can leave mixed precision out."""

import pytest
import torch
from helpers.past_tasks import flat, history_of, penalized_step
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import crl_kernels as ck
from crl_kernels.integrations.accelerate import without_autocast

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (extra trainer)")
pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")

LAM, STEPS, ACCUMULATED, CLIP = 2.0, 30, 2, 0.05


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).double()


def batches() -> DataLoader:
    x = torch.randn(STEPS * ACCUMULATED * 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return DataLoader(TensorDataset(x), batch_size=4)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :3].sin()).square().mean()


def plain_loop(decoupled: bool) -> tuple[nn.Module, list[float]]:
    model = network()
    history, losses = history_of(model, "low_rank", tasks=1), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for i, (x,) in enumerate(batches()):
        loss = loss_of(model, x)
        losses.append(loss.item())
        (loss / ACCUMULATED).backward()
        if i % ACCUMULATED:
            penalized_step(optimizer, history, LAM, CLIP, decoupled)
    return model, losses


def prepared(decoupled: bool = False):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    model = network()
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), batches())
    history = history_of(model, "low_rank", tasks=1)
    history.attach(optimizer, LAM, decoupled=decoupled)
    accelerator.register_for_checkpointing(history)
    return accelerator, model, optimizer, loader, history


def train(accelerator, model, optimizer, loader) -> list[float]:
    losses = []
    for (x,) in loader:
        with accelerator.accumulate(model):
            loss = loss_of(model, x)
            losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("decoupled", [False, True])
def test_30_steps_equal_a_plain_loop_whose_penalty_is_not_clipped(decoupled):
    accelerator, model, optimizer, loader, history = prepared(decoupled)
    losses = train(accelerator, model, optimizer, loader)
    plain, expected = plain_loop(decoupled)
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-9, atol=1e-12)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert float((flat(model) - flat(network())).norm()) > 0.1

    history.detach()
    before = flat(model)
    optimizer.optimizer.step()
    torch.testing.assert_close(flat(model), before)  # no gradient, and no hook


def test_a_checkpoint_of_accelerates_resumes_the_history_too(tmp_path):
    accelerator, model, optimizer, loader, history = prepared()
    first = accelerate.skip_first_batches(loader, len(loader) // 2)
    accelerator.save_state(str(tmp_path / "state"))
    train(accelerator, model, optimizer, first)
    end = flat(model)

    history.append(
        ck.LowRankFisher.from_mean_gradient(dict(model.named_parameters()), 1.0, dict(model.named_parameters()))
    )
    accelerator.load_state(str(tmp_path / "state"))
    assert len(history) == 1
    train(accelerator, model, optimizer, accelerate.skip_first_batches(loader, len(loader) // 2))
    assert torch.equal(flat(model), end)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_out_of_the_model_in_the_block_and_in_it_afterwards(inside):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, x = accelerator.prepare(network().float()), torch.randn(4, 6)
    whole = nn.Sequential(model) if inside else model
    types = []
    model[0].register_forward_hook(lambda module, inputs, output: types.append(output.dtype))

    def broken() -> None:
        with without_autocast(whole):
            whole(x)
            raise KeyError("broken")

    for _ in range(2):
        whole(x)
        with pytest.raises(KeyError, match="broken"):
            broken()
    whole(x)
    assert types == [torch.bfloat16, torch.float32] * 2 + [torch.bfloat16]


def test_a_model_that_accelerate_has_not_prepared_is_left_as_it_is():
    model = network()
    with without_autocast(model):
        assert "forward" not in vars(model)
    assert "forward" not in vars(model)
