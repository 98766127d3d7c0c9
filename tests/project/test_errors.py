"""Bad input to every public entry: one clear error that names the argument, and nothing written."""

import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import crl_kernels as ck


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def ones(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(p) for name, p in named(model).items()}


def low_rank_fisher(model: nn.Module) -> ck.LowRankFisher:
    return ck.LowRankFisher.from_mean_gradient(ones(model), 1.0, named(model))


def histories(model: nn.Module) -> tuple[ck.LowRankHistory, ck.DiagonalHistory]:
    low_rank, diagonal = ck.LowRankHistory(model), ck.DiagonalHistory(model)
    low_rank.append(low_rank_fisher(model))
    diagonal.append(ck.DiagonalFisher(ones(model), named(model)))
    return low_rank, diagonal


def snapshot(model: nn.Module, *histories: ck.LowRankHistory | ck.DiagonalHistory) -> list:
    state = [p.detach().clone() for p in model.parameters()] + [p.grad.clone() for p in model.parameters()]
    return state + [{k: v.clone() for k, v in history.state_dict().items()} for history in histories]


@pytest.mark.parametrize("lam", [math.nan, -1.0, math.inf, torch.tensor(math.nan), torch.tensor(-2.0)])
def test_lam_must_be_a_finite_number_at_least_0(model, lam):
    both = histories(model)
    before = snapshot(model, *both)
    for history, penalty in zip(both, (ck.rank1_ewc_penalty, ck.diagonal_ewc_penalty), strict=True):
        for call in (penalty, lambda history, lam: history.add_penalty_grad_(lam)):
            with pytest.raises(ValueError, match=r"lam is .*; expected a finite value >= 0"):
                call(history, lam=lam)
        with pytest.raises(ValueError, match=r"lr is .*; expected a finite value >= 0"):
            history.decoupled_step_(1.0, lam)
    with pytest.raises(ValueError, match="lam is"):
        ck.rank1_ewc_penalty(torch.ones(3), direction=torch.ones(3), curvature=1.0, anchor_projection=0.0, lam=lam)
    with pytest.raises(ValueError, match="lam is"):
        ck.diagonal_ewc_penalty(torch.ones(3), fisher_diagonal=torch.ones(3), anchor=torch.ones(3), lam=lam)
    torch.testing.assert_close(snapshot(model, *both), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("lam", "message"),
    [
        ("3", "lam is a str; expected a float or a 0-dim tensor"),
        (None, "lam is a NoneType"),
        (torch.ones(2), r"lam is a torch.float32 tensor of shape \(2,\)"),
        (torch.tensor(3), r"lam is a torch.int64 tensor"),
    ],
)
def test_lam_must_be_a_number(model, lam, message):
    low_rank, diagonal = histories(model)
    with pytest.raises(TypeError, match=message):
        ck.rank1_ewc_penalty(low_rank, lam=lam)
    with pytest.raises(TypeError, match=message):
        diagonal.add_penalty_grad_(lam)


def test_lam_may_be_a_tensor(model):
    low_rank, _ = histories(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    expected = ck.rank1_ewc_penalty(low_rank, lam=3.0)
    torch.testing.assert_close(ck.rank1_ewc_penalty(low_rank, lam=torch.tensor(3.0)), expected)
    torch.testing.assert_close(low_rank.add_penalty_grad_(torch.tensor(3.0)).float(), expected.detach())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": []}, ValueError, "params is empty"),
        ({"params": {}}, TypeError, "params is a dict; expected a tensor or a sequence"),
        ({"params": [torch.ones(3), 1.0]}, TypeError, r"params\[1\] is a float"),
        ({"params": [torch.ones(3), torch.ones(2).int()]}, TypeError, r"params\[1\] is torch.int32"),
        ({"params": [torch.ones(3), torch.ones(2) * 1j]}, TypeError, r"params\[1\] is torch.complex64"),
        ({"params": [torch.ones(3), torch.ones(2, device="meta")]}, ValueError, r"params\[1\] is on meta"),
        ({"direction": None}, TypeError, "raw tensors need direction= and curvature="),
        ({"curvature": None}, TypeError, "raw tensors need direction= and curvature="),
        ({"curvature": -1.0}, ValueError, "curvature is -1.0; expected a finite value >= 0"),
        ({"curvature": math.nan}, ValueError, "curvature is nan"),
        ({"anchor_projection": None}, TypeError, "exactly one of anchor= and anchor_projection="),
        ({"anchor": [torch.ones(3), torch.ones(2)]}, TypeError, "exactly one of anchor= and anchor_projection="),
        ({"anchor_projection": math.nan}, ValueError, "anchor_projection is nan"),
        ({"anchor_projection": "0"}, TypeError, "anchor_projection is a str"),
        ({"anchor_projection": torch.ones(2)}, ValueError, r"anchor_projection has shape \(2,\)"),
        ({"direction": [torch.ones(3)]}, ValueError, "direction has 1 tensors; expected 2, or one flat"),
        (
            {"direction": [torch.ones(3), torch.ones(3)]},
            ValueError,
            r"direction\[1\] has shape \(3,\); expected \(2,\)",
        ),
        ({"direction": torch.ones(6)}, ValueError, "direction has 1 tensors"),
        ({"direction": torch.ones(5, device="meta")}, ValueError, "direction is on meta; expected cpu"),
        ({"direction": torch.ones(5, requires_grad=True)}, ValueError, "direction requires a gradient"),
    ],
)
def test_raw_rank_1_arguments(change, error, message):
    arguments = {
        "params": [torch.ones(3), torch.ones(2)],
        "direction": [torch.ones(3), torch.ones(2)],
        "curvature": 1.0,
        "anchor_projection": 0.5,
    }
    arguments |= change
    with pytest.raises(error, match=message):
        ck.rank1_ewc_penalty(arguments.pop("params"), lam=1.0, **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fisher_diagonal": None}, TypeError, "raw tensors need fisher_diagonal= and anchor="),
        ({"anchor": None}, TypeError, "raw tensors need fisher_diagonal= and anchor="),
        ({"anchor": [torch.ones(3), torch.ones(3)]}, ValueError, r"anchor\[1\] has shape \(3,\)"),
        ({"fisher_diagonal": [torch.ones(3)]}, ValueError, "fisher_diagonal has 1 tensors"),
    ],
)
def test_raw_diagonal_arguments(change, error, message):
    arguments = {"fisher_diagonal": [torch.ones(3), torch.ones(2)], "anchor": [torch.ones(3), torch.ones(2)]} | change
    with pytest.raises(error, match=message):
        ck.diagonal_ewc_penalty([torch.ones(3), torch.ones(2)], lam=1.0, **arguments)


def test_histories_and_raw_arguments_do_not_mix(model):
    low_rank, diagonal = histories(model)
    with pytest.raises(TypeError, match="params is a DiagonalHistory; call diagonal_ewc_penalty"):
        ck.rank1_ewc_penalty(diagonal, lam=1.0)
    with pytest.raises(TypeError, match="params is a LowRankHistory; call rank1_ewc_penalty"):
        ck.diagonal_ewc_penalty(low_rank, lam=1.0)
    with pytest.raises(TypeError, match="curvature cannot be given together with a history"):
        ck.rank1_ewc_penalty(low_rank, lam=1.0, curvature=1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: f.pop("1.bias"), ValueError, "lacks '1.bias'"),
        (lambda f: f.update(extra=torch.ones(2)), ValueError, "has 'extra', which"),
        (lambda f: f.update({"0.bias": torch.ones(4)}), ValueError, r"'0.bias' has shape \(4,\)"),
        (lambda f: f.update({"0.bias": torch.ones(3).int()}), TypeError, r"\['0.bias'\] is torch.int32"),
        (lambda f: f.clear(), ValueError, "is empty"),
    ],
)
def test_another_model_is_refused_by_name_and_nothing_changes(model, change, error, message):
    both = histories(model)
    before = snapshot(model, *both)

    def changed() -> dict[str, Tensor]:
        tensors = ones(model)
        change(tensors)
        return tensors

    with pytest.raises(error, match=message):
        both[0].append(ck.LowRankFisher.from_mean_gradient(changed(), 1.0, changed()))
    with pytest.raises(error, match=message):
        both[1].append(ck.DiagonalFisher(changed(), changed()))
    with pytest.raises((error, ValueError)):
        ck.LowRankFisher.from_mean_gradient(ones(model), 1.0, changed())
    with pytest.raises((error, ValueError)):
        ck.DiagonalFisher(ones(model), changed())
    assert [len(history) for history in both] == [1, 1]
    torch.testing.assert_close(snapshot(model, *both), before, rtol=0, atol=0)


def test_a_fisher_of_the_other_kind_is_refused(model):
    low_rank, diagonal = histories(model)
    with pytest.raises(TypeError, match="fisher is a DiagonalFisher; LowRankHistory takes a LowRankFisher"):
        low_rank.append(ck.DiagonalFisher(ones(model), named(model)))
    with pytest.raises(TypeError, match="fisher is a LowRankFisher; DiagonalHistory takes a DiagonalFisher"):
        diagonal.append(low_rank_fisher(model))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_fishers_of_bad_numbers_are_refused(model, bad):
    broken = ones(model) | {"1.bias": torch.tensor([1.0, bad])}
    with pytest.raises(ValueError, match=r"fisher_diagonal .*'1.bias'"):
        ck.DiagonalFisher(broken, named(model))
    with pytest.raises(ValueError, match="c is"):
        ck.LowRankFisher.from_mean_gradient(ones(model), bad, named(model))
    rows = {name: tensor[None] for name, tensor in ones(model).items()}
    with pytest.raises(ValueError, match=r"curvatures is \[.*\]; expected finite values >= 0"):
        ck.LowRankFisher(rows, torch.tensor([bad]), named(model))
    if bad != -1.0:
        with pytest.raises(ValueError, match=r"mean_gradient has NaN or infinite values in '1.bias'"):
            ck.LowRankFisher.from_mean_gradient(broken, 1.0, named(model))
        with pytest.raises(ValueError, match=r"anchor has NaN or infinite values in '1.bias'"):
            ck.LowRankFisher.from_mean_gradient(ones(model), 1.0, broken)
        with pytest.raises(ValueError, match="directions has NaN or infinite values"):
            ck.LowRankFisher({n: t[None] for n, t in broken.items()}, torch.ones(1), named(model))


def test_low_rank_fisher_arguments(model):
    rows = {name: tensor[None] for name, tensor in ones(model).items()}
    with pytest.raises(ValueError, match=r"curvatures has shape \(2,\); expected \(1,\)"):
        ck.LowRankFisher(rows, torch.ones(2), named(model))
    with pytest.raises(ValueError, match="their leading dimensions differ"):
        ck.LowRankFisher(rows | {"1.bias": torch.ones(2, 2)}, torch.ones(1), named(model))
    with pytest.raises(TypeError, match=r"storage_dtype is torch.float16; expected one of"):
        ck.LowRankFisher(rows, torch.ones(1), named(model), storage_dtype=torch.float16)
    with pytest.raises(ValueError, match="mean_gradient is zero everywhere"):
        ck.LowRankFisher.from_mean_gradient({n: 0 * t for n, t in ones(model).items()}, 1.0, named(model))
    with pytest.raises(TypeError, match=r"mean_gradient\['0.bias'\] is NoneType; expected a tensor"):
        ck.LowRankFisher.from_mean_gradient(ones(model) | {"0.bias": None}, 1.0, named(model))
    with pytest.raises(TypeError, match="mean_gradient is list; expected a mapping"):
        ck.LowRankFisher.from_mean_gradient(list(model.parameters()), 1.0, named(model))


def test_models_that_cannot_be_bound(model):
    with pytest.raises(TypeError, match=r"model is a list; expected a torch.nn.Module"):
        ck.LowRankHistory(list(model.parameters()))
    with pytest.raises(TypeError, match="exclude is the string 'bias'; expected a list"):
        ck.LowRankHistory(model, exclude="bias")
    with pytest.raises(ValueError, match=r"include pattern 'head' matches none of the model's parameters: '0.weight'"):
        ck.DiagonalHistory(model, include=["head"])
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        ck.LowRankHistory(model)
    mixed = nn.Linear(2, 2)
    mixed.bias = nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="model has parameters on cpu, meta; expected one device"):
        ck.LowRankHistory(mixed)
    with pytest.raises(TypeError, match=r"parameter 'weight' is torch.complex64"):
        ck.LowRankHistory(nn.Linear(2, 2, dtype=torch.complex64))
    outer = nn.DataParallel(nn.Linear(1, 1))  # a wrapper that was given a parameter of its own
    outer.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"'weight' and 'module.weight' are both called 'weight'"):
        ck.LowRankHistory(outer)


def test_foreign_files_are_refused(model, tmp_path):
    low_rank, diagonal = histories(model)
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match=r"its folder .*nowhere' does not exist"):
        low_rank.save(tmp_path / "nowhere" / "file")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        ck.load_fisher(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="is not a safetensors file, or is damaged"):
        ck.load_fisher(path)
    low_rank.save(path)
    saved = path.read_bytes()
    with pytest.raises(ValueError, match="holds a LowRankHistory; expected a DiagonalHistory"):
        ck.DiagonalHistory.load(path, model)
    with pytest.raises(ValueError, match="holds a LowRankHistory; expected a LowRankFisher or a DiagonalFisher"):
        ck.load_fisher(path)
    path.write_bytes(saved[: len(saved) // 2])
    with pytest.raises(ValueError, match="damaged"):
        ck.LowRankHistory.load(path, model)
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="was not saved by this library"):
        ck.LowRankHistory.load(path, model)

    diagonal.save(path)
    wider = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(3, 4\) in the file .* and \(5, 4\) in the model"):
        ck.DiagonalHistory.load(path, wider)
    deeper = nn.Sequential(*model, nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"lacks '2.weight', '2.bias', which the model has"):
        ck.DiagonalHistory.load(path, deeper)
    with pytest.raises(ValueError, match=r"has '1.bias', '1.weight', which the model lacks"):
        ck.DiagonalHistory.load(path, nn.Sequential(model[0]))


def test_a_failed_write_leaves_the_old_file(model, tmp_path, monkeypatch):
    low_rank, _ = histories(model)
    path = tmp_path / "history.safetensors"
    low_rank.save(path)
    saved = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        low_rank.save(path)
    assert path.read_bytes() == saved
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [0, 1])
def test_gradients_that_the_penalty_cannot_be_added_to(kind):
    """A sparse gradient, or one of another dtype: nothing is written, also not to the gradients before it."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Embedding(5, 3, sparse=True))
    history = histories(model)[kind]
    model[0](torch.ones(2, 4)).sum().backward()
    model[1](torch.tensor([1, 3])).sum().backward()
    before = model[0].weight.grad.clone()
    model[0].bias.grad = None
    with pytest.raises(ValueError, match=r"gradient of '1.weight' is torch.sparse_coo.*sparse=False.*exclude="):
        history.add_penalty_grad_(1.0)
    assert torch.equal(model[0].weight.grad, before)
    assert model[0].bias.grad is None

    model[1].weight.grad = None
    model[1].weight.grad_dtype = None
    model[1].weight.grad = torch.ones_like(model[1].weight, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"gradient of '1.weight' is torch.float64 and the parameter torch.float32"):
        history.add_penalty_grad_(1.0)
    assert torch.equal(model[0].weight.grad, before)
    assert model[0].bias.grad is None


@pytest.mark.parametrize("kind", [0, 1])
def test_an_expanded_gradient_is_refused_by_name(kind, model):
    history = histories(model)[kind]
    before = model[0].weight.grad.clone()
    model[0].bias.grad = torch.zeros(()).expand(3)
    with pytest.raises(ValueError, match=r"gradient of '0.bias' was expanded.*clone\(\)"):
        history.add_penalty_grad_(1.0)
    assert torch.equal(model[0].weight.grad, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda p, h: h[0].decoupled_step_(1.0, 0.1),
        lambda p, h: h[1].decoupled_step_(1.0, 0.1),
        lambda p, h: ck.FusedAdamW([p]).step(),
    ],
    ids=["low rank", "diagonal", "AdamW"],
)
def test_an_expanded_parameter_is_refused_before_anything_runs(write, capfd):
    """And without a trace of C++ on stderr."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1).expand(5))])
    history = histories(model)
    model[0].grad = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"clone\(\)"):
        write(model[0], history)
    assert "frame #" not in capfd.readouterr().err
    assert not bool(model[0].any())


def test_lists_of_the_models_parameters_in_place_of_a_model():
    for call in (ck.LowRankHistory, ck.DiagonalHistory, ck.flatten_parameters):
        with pytest.raises(TypeError, match=r"model is a list; expected a torch.nn.Module"):
            call([torch.ones(3)])
