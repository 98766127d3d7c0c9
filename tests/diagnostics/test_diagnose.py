"""``diagnose`` on a small network: layers, cosines, files; and the model is left as it was."""

import builtins
import contextlib
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.by_loop import flat, rows_by_loop
from helpers.fisher_problems import LossError, global_state
from helpers.spectra import normal, spectrum
from torch import Tensor, nn

from crl_kernels import Diagnosis, diagnose


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x)) + 0.01 * t[:, None]))


def net_loss(model: nn.Module, batch: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
    return (model(batch[0], t) - batch[1]).square().mean(1)


def net_data(count: int = 64) -> tuple[Tensor, Tensor]:
    return normal(count, 6, seed=3).float(), normal(count, 3, seed=4).float() + 1


@pytest.fixture(scope="module")
def diagnosed() -> Diagnosis:
    x, y = net_data()
    batches = [(x[:40], y[:40]), (x[40:], y[40:])]
    return diagnose(Net(), net_loss, batches, (20, 100, 900), samples=64, snr=lambda t: 100 / (t + 1))


def test_layers_are_those_of_a_dense_computation(diagnosed):
    model = Net().eval()
    x, y = net_data()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    losses = [net_loss(model, (x[i : i + 1], y[i : i + 1]), torch.tensor([100])).sum() for i in order.tolist()]
    rows = rows_by_loop(model, losses)
    assert set(diagnosed.layers) == {"first", "norm", "last"}
    for name, layer in diagnosed.layers.items():
        expected = spectrum(flat({parameter: g for parameter, g in rows.items() if parameter.startswith(name)}))
        measured = layer["100"]
        for key in ("trace", "kappa", "lambda1_share", "held_out_mean", "error_diagonal", "mean_abs_cos"):
            assert getattr(measured, key).value == pytest.approx(getattr(expected, key).value, rel=1e-3, abs=1e-4), key
            assert getattr(measured, key).high == pytest.approx(getattr(expected, key).high, rel=1e-2, abs=1e-3), key
    assert diagnosed.at[100].held_out[4].value == pytest.approx(spectrum(flat(rows)).held_out[4].value, rel=1e-4)


def test_cosines_are_symmetric_and_near_one_for_near_timesteps():
    x, y = net_data(256)
    cosines = torch.tensor(diagnose(Net(), net_loss, [(x, y)], (20, 21, 400), samples=256).cosines)
    assert torch.equal(cosines, cosines.T)
    assert torch.equal(cosines.diagonal(), torch.ones(4))
    assert float(cosines[0, 1]) > 0.98


def test_save_and_load(diagnosed, tmp_path):
    paths = diagnosed.save(tmp_path / "a", "A title")
    assert {p.name for p in paths} >= {"report.json", "report.md", "collinearity.png", "layers.svg", "cosines.png"}
    assert len(paths) == 12
    for path in paths:
        assert path.stat().st_size > (5_000 if path.suffix in (".png", ".svg") else 500)
    raw = json.loads((tmp_path / "a" / "report.json").read_text())
    assert raw["uniform"]["trace"][0] == pytest.approx(diagnosed.uniform.trace.value, rel=1e-5)
    loaded = Diagnosis.load(tmp_path / "a")
    assert loaded.verdict == diagnosed.verdict
    assert list(loaded.at) == [20, 100, 900]
    assert loaded.snr == pytest.approx({20: 100 / 21, 100: 100 / 101, 900: 100 / 901}, rel=1e-5)
    loaded.save(tmp_path / "b", "A title")
    for name in ("report.json", "report.md"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    text = (tmp_path / "a" / "report.md").read_text()
    assert text.startswith("# A title\n")
    assert all(sentence in text for sentence in diagnosed.verdict.sentences)


def test_printed_it_is_the_verdict_and_a_small_table(diagnosed):
    lines = str(diagnosed).splitlines()
    assert tuple(lines[:3]) == diagnosed.verdict.sentences
    assert lines[4] == f"Share of the trace, held out, from {diagnosed.num_samples} samples at each t:"
    head, *rows = (line.split() for line in lines[5:])
    assert head == ["t", "20", "100", "900", "uniform"]
    assert len(rows) == 1 + len(diagnosed.uniform.held_out)
    shares = [100 * s.held_out[4].value for s in (*diagnosed.at.values(), diagnosed.uniform)]
    (row,) = (row for row in rows if row[:2] == ["rank", "4"])
    assert row[2:] == [word for share in shares for word in (f"{share:.0f}", "%")]
    assert len(repr(diagnosed)) < 200
    assert f"use={diagnosed.verdict.use!r}" in repr(diagnosed)


def test_a_report_of_an_earlier_version_loads(diagnosed, tmp_path):
    diagnosed.save(tmp_path)
    path = tmp_path / "report.json"
    saved = json.loads(path.read_text())
    del saved["verdict"]["reason"]
    path.write_text(json.dumps(saved))
    assert Diagnosis.load(tmp_path).verdict == replace(diagnosed.verdict, reason="")


def test_without_matplotlib_the_numbers_are_written_all_the_same(diagnosed, tmp_path, monkeypatch):
    real = builtins.__import__

    def import_without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_without_matplotlib)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        diagnosed.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.md"}


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails):
    model = Net()
    model.norm.eval()  # a mixed mode
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model.last.bias.grad = None
    calls = 0

    def disturbing_loss(model: nn.Module, batch: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        model.norm.running_mean.add_(1)
        random.random()
        np.random.rand()  # noqa: NPY002  (the global state is what is tested)
        assert not model.training
        losses = net_loss(model, (batch[0] + torch.randn_like(batch[0]), batch[1]), t)
        if fails and calls == 5:
            raise LossError
        return losses

    before = global_state(model)
    with pytest.raises(LossError) if fails else contextlib.nullcontext():
        diagnose(model, disturbing_loss, [net_data(48)], (3,), samples=48)
    torch.testing.assert_close(global_state(model), before, rtol=0, atol=0)


def test_noise_follows_the_generator_and_parameters_can_be_chosen():
    def noisy(model: nn.Module, batch: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        return net_loss(model, (batch[0] + torch.randn_like(batch[0]), batch[1]), t)

    def noisy_diagnosis(seed: int, **options) -> Diagnosis:
        generator = torch.Generator().manual_seed(seed)
        return diagnose(Net(), noisy, [net_data(48)], (3,), samples=48, generator=generator, **options)

    assert noisy_diagnosis(1).uniform == noisy_diagnosis(1).uniform
    assert noisy_diagnosis(1).uniform != noisy_diagnosis(2).uniform
    chosen = noisy_diagnosis(1, exclude=["norm"])
    assert set(chosen.layers) == {"first", "last"}
    assert chosen.num_parameters == 6 * 8 + 8 + 8 * 3 + 3
    assert chosen.bands is None  # one timestep is no band


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": (1000,)}, r"timesteps has 1000; expected integers from 0 to num_timesteps - 1 = 999"),
        ({"timesteps": (1.5,)}, "timesteps has 1.5"),
        ({"timesteps": (3, 3)}, "none twice"),
        ({"timesteps": ()}, "at least one"),
        ({"samples": 47}, "samples is 47; expected an integer >= 48, to be cut into 16 groups"),
        ({"loader": []}, "loader yields 0 samples; expected at least 48"),
        ({"loader": [net_data(40)]}, "loader yields 40 samples"),
        ({"snr": [1.0, 2.0]}, "snr has 2 values for 1 timesteps"),
        ({"snr": {4: 1.0}}, "snr lacks the timesteps 3"),
        ({"loss": lambda m, b, t: net_loss(m, b, t).mean()}, r"returned shape \(\) for a batch of 48"),
        ({"loss": torch.no_grad()(net_loss)}, "carries no gradient"),
        ({"loss": lambda m, b, t: 0 * net_loss(m, b, t)}, "every per-sample gradient is zero"),
        ({"loss": lambda m, b, t: net_loss(m, b, t) * math.nan}, "NaN or infinite gradients"),
    ],
)
def test_bad_input_gives_one_clear_error(change, message):
    arguments = {"timesteps": (3,), "samples": 48, "loader": [net_data(48)], "loss": net_loss} | change
    loss, loader = arguments.pop("loss"), arguments.pop("loader")
    with pytest.raises(ValueError, match=message):
        diagnose(Net(), loss, loader, arguments.pop("timesteps"), **arguments)
