"""The penalty by an optimizer's hooks: the same training as by hand, with groups, GradScaler and schedules."""

import warnings

import pytest
import torch
from helpers import device
from helpers.past_tasks import KINDS, flat, history_of, task_loss, train
from torch import Tensor, nn

import crl_kernels as ck


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


@KINDS
def test_200_steps_by_every_entry_point_are_the_same(kind):
    penalty = ck.diagonal_ewc_penalty if kind == "diagonal" else ck.rank1_ewc_penalty
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


@KINDS
@pytest.mark.parametrize("given", ["by position", "by name"])
@pytest.mark.parametrize(
    "kind_of_optimizer", [torch.optim.AdamW, torch.optim.LBFGS], ids=lambda optimizer: optimizer.__name__
)
def test_a_closure_has_the_penalty_in_its_gradients_and_in_its_loss(kind, given, kind_of_optimizer):
    """LBFGS calls it many times in a step, and its line search compares the losses."""
    options = {"line_search_fn": "strong_wolfe", "max_iter": 5} if kind_of_optimizer is torch.optim.LBFGS else {}
    ends, losses = {}, {}
    for entry in ("none", "loss", "attached"):
        model = network()
        history = history_of(model, kind)
        optimizer = kind_of_optimizer(model.parameters(), lr=1e-2, **options)
        if entry == "attached":
            history.attach(optimizer, 1.5)
        losses[entry] = []
        for step in range(10):

            def closure(model=model, history=history, optimizer=optimizer, entry=entry, step=step) -> Tensor:
                optimizer.zero_grad()
                loss = task_loss(model, step)
                if entry == "loss":
                    loss = loss + history.penalty(1.5)
                loss.backward()
                return loss.detach()

            loss = optimizer.step(closure) if given == "by position" else optimizer.step(closure=closure)
            losses[entry].append(float(loss))
        ends[entry] = flat(model)
    torch.testing.assert_close(ends["attached"], ends["loss"], rtol=1e-6, atol=1e-9)
    assert losses["attached"] == pytest.approx(losses["loss"], rel=1e-6)
    assert float((ends["none"] - ends["loss"]).norm()) > 1e-3


def test_an_optimizer_whose_parameters_were_exchanged_after_attach_does_not_train_without_the_penalty():
    """As libraries do it that step copies of their own in float32."""
    model = network(torch.float32)
    history = history_of(model, "low_rank")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history.attach(optimizer, 1.5)
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer.param_groups[0]["params"] = copies
    for copy in copies:
        copy.grad = torch.ones_like(copy)
    before = [copy.detach().clone() for copy in copies]
    with pytest.raises(ValueError, match=r"'0.weight', .*are in no parameter group of the optimizer"):
        optimizer.step()
    assert all(map(torch.equal, copies, before))


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
        scaler = torch.amp.GradScaler(device.type_(), init_scale=2.0**10, enabled=scaled)
        for step in range(8):
            overflow = step == 3
            if overflow and not scaled:
                continue
            optimizer.zero_grad()
            scaler.scale(task_loss(model, step)).backward()
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
        train(model, optimizer, range(200))
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


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization as its users write it: two steps, and ``step`` may never be called."""

    def __init__(self, params, base_optimizer, rho: float = 0.05, **options) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()


class Lookahead(torch.optim.Optimizer):
    """As in timm: a wrapper that does not call ``Optimizer.__init__``, so that its class calls no hooks."""

    def __init__(self, base_optimizer: torch.optim.Optimizer, name: str = "_base_optimizer") -> None:
        self._name, self.defaults = name, base_optimizer.defaults
        setattr(self, name, base_optimizer)
        self.param_groups, self.state, self.count = base_optimizer.param_groups, {}, 0

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        if not self.state:
            self.state = {p: p.detach().clone() for p in params}
        loss = getattr(self, self._name).step(closure)
        self.count += 1
        if self.count % 3 == 0:
            for p in params:
                self.state[p].lerp_(p, 0.5)
                p.copy_(self.state[p])
        return loss


class Plain:
    """As Lightning's: no torch optimizer, and its attributes are those of the one inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str):
        return getattr(self._optimizer, name)

    def step(self, closure=None) -> None:
        self._optimizer.step()


WRAPPERS = {
    "as timm's Lookahead": Lookahead,
    "by another name": lambda optimizer: Lookahead(optimizer, "optim"),
    "as Lightning's": Plain,
    "twice": lambda optimizer: Plain(Lookahead(optimizer)),
}


@KINDS
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrappers_penalty_is_that_of_the_optimizer_inside(kind, decoupled, name):
    """By hand: the optimizer inside has it, in each of its own steps."""

    def end_of(entry: str) -> Tensor:
        model = network()
        history = history_of(model, kind)
        inner = torch.optim.SGD(groups_of(model), momentum=0.5)
        optimizer = WRAPPERS[name](inner)
        if entry == "by hand":
            own = inner.step

            def step(closure=None) -> None:
                if not decoupled:
                    history.add_penalty_grad_(0.3)
                own()
                if decoupled:
                    history.decoupled_step_(0.3, inner.param_groups)

            inner.step = step
        elif entry == "attached":
            history.attach(optimizer, 0.3, decoupled=decoupled)
        return train(model, optimizer, range(10))

    attached = end_of("attached")
    assert torch.equal(attached, end_of("by hand"))
    assert float((attached - end_of("none")).norm()) > 0.01


@KINDS
@pytest.mark.parametrize("decoupled", [False, True])
def test_sam_has_the_penalty_of_the_point_that_it_steps_from(kind, decoupled):
    """Written out: the task's gradient at the perturbed point, the penalty's where the parameters are."""
    ends = {}
    for entry in ("none", "written out", "attached"):
        model = network()
        history = history_of(model, kind)
        optimizer = SAM(groups_of(model), torch.optim.SGD)
        if entry == "attached":
            history.attach(optimizer, 0.3, decoupled=decoupled)
        for step in range(10):
            model.zero_grad()
            task_loss(model, step).backward()
            if entry != "written out":
                optimizer.first_step()
                task_loss(model, step).backward()
                optimizer.second_step()
                continue
            params = list(model.parameters())
            old, gradients = [p.detach().clone() for p in params], [p.grad for p in params]
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            with torch.no_grad():
                for p, g in zip(params, gradients, strict=True):
                    p.add_(0.05 / norm * g)
            gradients = torch.autograd.grad(task_loss(model, step), params)
            with torch.no_grad():
                for p, o in zip(params, old, strict=True):
                    p.copy_(o)
            pulls = [torch.zeros_like(p) for p in params]
            if not decoupled:
                pulls = torch.autograd.grad(history.penalty(0.3), params)
            with torch.no_grad():
                rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
                for p, g, pull in zip(params, gradients, pulls, strict=True):
                    p.sub_(rates[id(p)] * (g + pull))
                if decoupled:
                    history.decoupled_step_(0.3, optimizer.param_groups)
        ends[entry] = flat(model)
    torch.testing.assert_close(ends["attached"], ends["written out"], rtol=1e-10, atol=1e-12)
    assert float((ends["attached"] - ends["none"]).norm()) > 0.01


def test_wrappers_whose_hooks_are_the_only_ones_are_attached_to_themselves():
    """A container whose optimizers have a part of the parameters each, and one that holds another model's optimizer."""

    class Container(torch.optim.Optimizer):
        def __init__(self, optimizers) -> None:
            self.optimizers = optimizers
            self.first, self.second = optimizers
            super().__init__([p for o in optimizers for group in o.param_groups for p in group["params"]], {"lr": 0.1})

        def step(self, closure=None) -> None:
            for optimizer in self.optimizers:
                optimizer.step()

    def end_of(by_hand: bool) -> Tensor:
        model, another_model = network(), network()
        history = history_of(model, "low_rank")
        parts = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
        container = Container(parts)
        container.teacher = torch.optim.SGD(another_model.parameters(), lr=0.1)
        if not by_hand:
            history.attach(container, 0.3)
        return train(model, container, range(5), (lambda step: history.add_penalty_grad_(0.3)) if by_hand else None)

    assert torch.equal(end_of(False), end_of(True))


def test_optimizers_that_would_never_be_penalized_are_refused():
    model = network()
    history = history_of(model, "low_rank")

    class Silent(torch.optim.Optimizer):
        """No optimizer inside, and no hooks."""

        def __init__(self, params) -> None:
            self.param_groups, self.state, self.defaults = [{"params": list(params), "lr": 0.1}], {}, {}

        def step(self, closure=None) -> None: ...

    with pytest.raises(
        ValueError, match=r"optimizer is a Silent, whose step calls no hooks, .*history.add_penalty_grad_"
    ):
        history.attach(Silent(model.parameters()), 1.0)
    two = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1))
    two.fallback = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match=r"is a Lookahead that holds several .*, _base_optimizer, fallback. Attach to"):
        history.attach(two, 1.0)
    masters = Plain(torch.optim.SGD([p.detach().clone() for p in model.parameters()], lr=0.1))
    with pytest.raises(ValueError, match="are in no parameter group of the optimizer"):
        history.attach(masters, 1.0)  # as of wrappers that keep copies of the parameters
    hidden = Plain(torch.optim.SGD(model.parameters(), lr=0.1))
    hidden.__dict__["__getattr__"] = None
    hidden.__dict__["_optimizer"], hidden.__dict__["kept"] = None, [hidden._optimizer]
    hidden.__dict__["param_groups"] = hidden.kept[0].param_groups
    with pytest.raises(TypeError, match=r"is a Plain and holds no torch.optim.Optimizer of the bound parameters"):
        history.attach(hidden, 1.0)
    with pytest.raises(ValueError, match=r"optimizer maximizes its objective"):
        history.attach(Plain(torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)), 1.0)
    fused = ck.FusedAdamW(model.parameters(), history=history, lam=1.0)
    for optimizer in (fused, Plain(fused)):
        with pytest.raises(ValueError, match=r"FusedAdamW that has this history's penalty in its step, .* count twice"):
            history.attach(optimizer, 1.0)
    diagonal = history_of(model, "diagonal")
    diagonal.attach(fused, 1.0)  # another penalty
    diagonal.detach()
    history.attach(torch.optim.SGD(model.parameters(), lr=0.1), 1.0)  # nothing was attached so far
    history.detach()


@KINDS
def test_optimizers_without_a_learning_rate_take_the_gradient_and_not_the_decoupled_step(kind):
    """Adafactor's relative steps: its groups have lr=None, and it computes the rate itself."""

    class Relative(torch.optim.SGD):
        def step(self, closure=None) -> None:
            for group in self.param_groups:
                group["lr"] = 0.1
            super().step(closure)
            for group in self.param_groups:
                group["lr"] = None

    def end_of(attached: bool) -> Tensor:
        model = network()
        history = history_of(model, kind)
        optimizer = Relative(model.parameters(), lr=0.1)
        optimizer.param_groups[0]["lr"] = None
        if attached:
            with pytest.raises(TypeError, match=r"lr of a parameter group is None, .*relative_step=False"):
                history.attach(optimizer, 0.3, decoupled=True)
            history.attach(optimizer, 0.3)
        return train(model, optimizer, range(5), None if attached else lambda step: history.add_penalty_grad_(0.3))

    assert torch.equal(end_of(False), end_of(True))


class OwnStep(torch.optim.SGD):
    """A step around torch's own, which torch hooks as well."""

    def step(self, closure=None):
        if getattr(self, "broken", False):
            raise KeyError("broken")
        return super().step(closure)


@KINDS
@pytest.mark.parametrize("decoupled", [False, True])
def test_a_step_that_calls_its_superclasss_has_the_penalty_once(kind, decoupled):
    """Also after a step that failed on the way."""

    def end_of(optimizer_type: type[torch.optim.Optimizer]) -> Tensor:
        model = network()
        history = history_of(model, kind)
        optimizer = optimizer_type(groups_of(model))
        history.attach(optimizer, 0.3, decoupled=decoupled)

        def fail_once(step: int) -> None:
            if optimizer_type is OwnStep and step == 3:
                optimizer.broken = True
                with pytest.raises(KeyError, match="broken"):
                    optimizer.step()
                optimizer.broken = False
                optimizer.zero_grad()
                task_loss(model, step).backward()

        return train(model, optimizer, range(6), fail_once)

    assert torch.equal(end_of(OwnStep), end_of(torch.optim.SGD))


def test_unsuitable_optimizers_and_lam_are_refused_and_nothing_changes():
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
