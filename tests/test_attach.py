"""The penalty by an optimizer's hooks: the same training as by hand, with groups, GradScaler and schedules."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import crl_kernels as ck


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


def history_of(model: nn.Module, kind: str, scale: float = 1.0) -> ck.LowRankHistory | ck.DiagonalHistory:
    """Two past tasks whose anchors lie away from where the model stands."""
    generator = torch.Generator().manual_seed(1)
    history = ck.LowRankHistory(model) if kind == "low_rank" else ck.DiagonalHistory(model)
    for _ in range(2):
        gradient, anchor = (
            {
                n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
                for n, p in model.named_parameters()
            }
            for _ in range(2)
        )
        if kind == "low_rank":
            history.append(ck.LowRankFisher.from_mean_gradient(gradient, 0.02 * scale, anchor))
        else:
            history.append(ck.DiagonalFisher({n: 0.1 * scale * g**2 for n, g in gradient.items()}, anchor))
    return history


KINDS = pytest.mark.parametrize("kind", ["low_rank", "diagonal"])


def task_loss(model: nn.Module, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
    return (model(x) - x[:, :3].sin()).square().mean()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@KINDS
def test_200_steps_by_every_entry_point_are_the_same(kind):
    penalty = ck.rank1_ewc_penalty if kind == "low_rank" else ck.diagonal_ewc_penalty
    ends = {}
    for entry in ("none", "loss", "gradient", "attached"):
        model = network()
        history = history_of(model, kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if entry == "attached":
            history.attach(optimizer, 1.5)
        for step in range(200):
            optimizer.zero_grad()
            loss = task_loss(model, step)
            if entry == "loss":
                loss = loss + penalty(history, lam=1.5)
            loss.backward()
            if entry == "gradient":
                history.add_penalty_grad_(1.5)
            optimizer.step()
        ends[entry] = flat(model)
    assert float((ends["none"] - ends["loss"]).norm()) > 0.1
    torch.testing.assert_close(ends["gradient"], ends["loss"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ends["attached"], ends["loss"], rtol=1e-6, atol=1e-9)


def groups_of(model: nn.Module) -> list[dict]:
    """Decay and no-decay groups with rates of their own, in another order than the model's."""
    params = list(model.parameters())
    return [
        {"params": [p for p in reversed(params) if p.dim() > 1], "lr": 0.05},
        {"params": [p for p in reversed(params) if p.dim() <= 1], "lr": 0.01, "weight_decay": 0.0},
    ]


@KINDS
@pytest.mark.parametrize("lam", [0.3, torch.tensor(0.3), float("inf")])
def test_decoupled_takes_the_proximal_step_at_each_groups_present_rate(kind, lam):
    ends = []
    for attached in (False, True):
        model = network()
        history = history_of(model, kind)
        optimizer = torch.optim.SGD(groups_of(model))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        if attached:
            history.attach(optimizer, lam, decoupled=True)
        for step in range(10):
            optimizer.zero_grad()
            task_loss(model, step).backward()
            optimizer.step()
            if not attached:
                history.decoupled_step_(lam, optimizer.param_groups)
            schedule.step()
        ends.append(flat(model))
    assert torch.equal(ends[0], ends[1])


@KINDS
def test_rates_by_group_that_are_equal_are_one_rate(kind):
    ends = []
    for by_group in (False, True):
        model = network()
        history = history_of(model, kind)
        groups = [group | {"lr": 0.05} for group in groups_of(model)]
        history.decoupled_step_(2.0, groups if by_group else 0.05)
        ends.append(flat(model))
    assert torch.equal(ends[0], ends[1])


@KINDS
def test_a_group_with_rate_0_does_not_move(kind):
    model = network()
    history = history_of(model, kind)
    first, second = groups_of(model)
    before = [p.detach().clone() for p in second["params"]]
    history.decoupled_step_(2.0, [first, second | {"lr": 0.0}])
    for p, was in zip(second["params"], before, strict=True):
        assert torch.equal(p, was)
    assert all(float(p.grad is None) for p in model.parameters())
    before = flat(model)
    history.decoupled_step_(2.0, [first | {"lr": 0.0}, second | {"lr": 0.0}])
    assert torch.equal(flat(model), before)


OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "SGD": lambda groups: torch.optim.SGD(groups),
}


@KINDS
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
def test_grad_scaler_changes_nothing_but_skipped_steps(kind, decoupled, optimizer_name):
    """A scaled run equals an unscaled one in which the step with infinite gradients is left out."""
    ends = {}
    for scaled in (False, True):
        model = network(torch.float32)
        history = history_of(model, kind)
        optimizer = OPTIMIZERS[optimizer_name](groups_of(model))
        history.attach(optimizer, 0.5, decoupled=decoupled)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(8):
            overflow = step == 3
            if overflow and not scaled:
                continue
            optimizer.zero_grad()
            scaler.scale(task_loss(model, step, torch.float32)).backward()
            before = flat(model)
            if overflow:
                model[0].bias.grad[2] = float("inf")
            if step == 5:
                scaler.unscale_(optimizer)  # as for clipping
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, flat(model)) == overflow
        assert not scaled or scaler.get_scale() == 2.0**9
        ends[scaled] = flat(model)
    torch.testing.assert_close(ends[True], ends[False], rtol=2e-5, atol=2e-6)


def test_200_steps_of_adam_learn_where_the_gradient_mode_does_not():
    """At lr lam a = 2,000 the penalty's gradient drowns the task's, and Adam turns it into noise along every
    coordinate; the proximal step holds two directions and leaves the others to the task."""
    losses = {}
    for mode in ("free", "gradient", "decoupled"):
        model = network()
        history = history_of(model, "low_rank")
        lam = 2000 / history.stiffness(1.0, 1e-2)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        if mode != "free":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                history.attach(optimizer, lam, decoupled=mode == "decoupled")
        for step in range(200):
            optimizer.zero_grad()
            task_loss(model, step).backward()
            optimizer.step()
        losses[mode] = sum(float(task_loss(model, 1000 + i).detach()) for i in range(20)) / 20
    assert losses["decoupled"] < 2 * losses["free"]
    assert losses["gradient"] > 4 * losses["decoupled"]


@KINDS
def test_detach_takes_the_penalty_out(kind):
    model = network()
    history = history_of(model, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for decoupled in (False, True):
        history.attach(optimizer, 1.0, decoupled=decoupled)
        with pytest.raises(RuntimeError, match=r"attached to an optimizer already; call detach\(\) first"):
            history.attach(optimizer, 1.0)
        history.detach()
        optimizer.zero_grad()
        before = flat(model)
        optimizer.step()
        assert torch.equal(flat(model), before)
    with pytest.raises(RuntimeError, match="not attached to an optimizer"):
        history.detach()


def test_a_history_that_grows_while_attached_is_used_as_it_is():
    model = network()
    history = ck.LowRankHistory(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history.attach(optimizer, 1.0)
    before = flat(model)
    optimizer.step()
    assert torch.equal(flat(model), before)
    mu = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    history.append(
        ck.LowRankFisher.from_mean_gradient(mu, 0.01, {n: p.detach() - 1 for n, p in model.named_parameters()})
    )
    optimizer.step()
    assert not torch.equal(flat(model), before)


def test_lam_may_change_between_steps():
    model = network()
    history = history_of(model, "low_rank")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lam = torch.zeros(())
    history.attach(optimizer, lam)
    before = flat(model)
    optimizer.step()
    assert torch.equal(flat(model), before)
    lam.fill_(0.1)
    optimizer.step()
    assert not torch.equal(flat(model), before)


@KINDS
def test_a_stiff_penalty_is_warned_of_once(kind):
    model = network()
    history = history_of(model, kind)
    lam = 2.5 / history.stiffness(1.0, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history.attach(optimizer, lam)
    with pytest.warns(UserWarning, match=r"lr \* lam \* curvature = 2.5\. .* decoupled=True"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        history.detach()
        history.attach(optimizer, lam, decoupled=True)
        optimizer.step()
        history.detach()
        history.attach(optimizer, 0.5 * lam)
        optimizer.step()


def test_stiffness_predicts_divergence_of_gradient_descent():
    """One orthonormal direction per task: gradient descent on the penalty diverges just above 2 and not just below."""
    for factor, diverges in ((1.9, False), (2.1, True)):
        model = nn.Linear(4, 1, bias=False).double()
        history = ck.LowRankHistory(model)
        u = torch.zeros(1, 1, 4, dtype=torch.float64)
        u[0, 0, 2] = 1
        history.append(ck.LowRankFisher({"weight": u}, torch.tensor([3.0]), {"weight": model.weight.detach() + 1}))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lam = factor / history.stiffness(1.0, 0.1)
        for _ in range(200):
            optimizer.zero_grad()
            history.add_penalty_grad_(lam)
            optimizer.step()
        assert (float(history.drift().abs()) > 1) == diverges


def test_what_cannot_be_attached_is_refused_and_changes_nothing():
    model = network()
    history = history_of(model, "low_rank")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer is a Sequential; expected a torch.optim.Optimizer"):
        history.attach(model, 1.0)
    with pytest.raises(ValueError, match=r"'2.weight', '2.bias', which the history has, are in no parameter group"):
        history.attach(torch.optim.SGD(model[0].parameters(), lr=0.1), 1.0)
    with pytest.raises(ValueError, match="maximize=True"):
        history.attach(torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), 1.0)
    with pytest.raises(ValueError, match="lam is inf; expected a finite value"):
        history.attach(sgd, float("inf"))
    with pytest.raises(ValueError, match="lam is -1"):
        history.attach(sgd, -1.0, decoupled=True)
    before = flat(model)
    sgd.step()
    assert torch.equal(flat(model), before)

    history.attach(sgd, 1.0)
    for step in (lambda closure: sgd.step(closure), lambda closure: sgd.step(closure=closure)):
        with pytest.raises(RuntimeError, match=r"optimizer.step was given a closure"):
            step(lambda: torch.zeros(()))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        ("fast", TypeError, r"lr is a str; expected a float, a 0-dim tensor or optimizer.param_groups"),
        ([0.1, 0.2], TypeError, "lr is a list; expected a float, a 0-dim tensor or optimizer.param_groups"),
        ([{"params": [], "lr": 0.1}], ValueError, "'0.weight', .* are in no parameter group"),
        (None, TypeError, "lr is a NoneType"),
    ],
)
@KINDS
def test_rates_that_do_not_fit_are_refused(kind, lr, error, message):
    model = network()
    history = history_of(model, kind)
    before = flat(model)
    with pytest.raises(error, match=message):
        history.decoupled_step_(1.0, lr)
    bad = groups_of(model)
    bad[1]["lr"] = -0.1
    with pytest.raises(ValueError, match=r"lr is -0.1; expected a finite value >= 0"):
        history.decoupled_step_(1.0, bad)
    assert torch.equal(flat(model), before)
