"""Which sample a row belongs to: codes and what is read from them, what is remembered from batch to batch, and what is
measured again."""

import gc

import pytest
import torch
import torch.nn.functional as F
from helpers import device
from helpers.by_loop import HiddenScale, Parts, assert_close, flat, rows_by_loop
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from crl_kernels import SampleGradients, estimate_fisher
from crl_kernels.per_sample.loss_passes import LAYOUTS, LossPasses
from crl_kernels.per_sample.rows import Codes, Rows, fingerprint

pytestmark = pytest.mark.usefixtures("float64")
N, D = 6, 5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]


# Codes


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 140), rows=st.integers(1, 40), dtype=st.sampled_from(DTYPES), data=st.data())
def test_every_assignment_of_rows_is_read_from_the_passes(count, rows, dtype, data):
    samples = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=rows, max_size=rows)))
    codes = Codes(count, device.here())
    gradient = torch.randn(3, rows, 4, dtype=dtype)
    prints = [fingerprint(gradient * weights[samples].to(dtype)[:, None], (0, 1)) for weights in codes.passes]
    rows_read = codes.rows(prints, (0, 1))
    assert rows_read is not None
    if count > 1 and len(set(samples.tolist())) > 1:
        assert rows_read.dims == (1,)
        assert torch.equal(rows_read.samples, samples)
        assert rows_read.in_order == torch.equal(samples, torch.arange(count))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 140), data=st.data())
def test_rows_that_samples_share_are_no_rows_of_one(count, data):
    codes = Codes(count, device.here())
    share = torch.rand(count) if data.draw(st.booleans()) else torch.ones(count)
    parts = torch.randn(count, 4, 3).exp() * share[:, None, None]
    prints = [fingerprint((weights[:, None, None] * parts).sum(0), (0,)) for weights in codes.passes]
    assert codes.rows(prints, (0,)) is None


def test_a_row_without_a_gradient_follows_the_pattern_or_is_not_lasting():
    codes = Codes(4, device.here())

    def rows_of(samples: list[int]) -> Rows:
        known = torch.tensor(samples)
        weights = [(code[known.clamp(min=0)] * (known >= 0))[:, None] for code in codes.passes]
        rows = codes.rows([fingerprint(weight.expand(-1, 2), (0,)) for weight in weights], (0,))
        assert rows is not None
        return rows

    assert rows_of([0, 1, 2, -1]).samples.tolist() == [0, 1, 2, 3]
    assert rows_of([0, 1, 2, -1]).in_order
    assert not rows_of([0, 1, 2, -1]).lasting  # one sample was not seen
    assert rows_of([0, -1, 1, 1, 2, 2, 3, 3]).samples.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rows_of([0, -1, 1, 1, 2, 2, 3, 3]).lasting
    assert rows_of([0, 1, 2, 3, 0, -1, 2, 3]).samples.tolist() == [0, 1, 2, 3] * 2
    assert not rows_of([0, -1, -1, -1, -1, -1, -1, -1]).lasting  # by fours or by twos
    assert not rows_of([3, 1, -1, 0]).lasting
    assert not rows_of([-1, -1, -1, -1]).lasting


def test_tokens_of_ragged_rows_are_filled_up_with_zeros():
    rows = Rows((1,), torch.tensor([2, 0, 2, 2]), 3, False)
    a = torch.randn(2, 4, 5)
    (tokens,) = rows.tokens(a)
    assert tokens.shape == (3, 6, 5)
    assert torch.equal(tokens[0, :2], a[:, 1])
    assert not bool(tokens[0, 2:].any())
    assert not bool(tokens[1].any())
    assert torch.equal(tokens[2], torch.cat([a[:, 0], a[:, 2], a[:, 3]]))


# From batch to batch


@pytest.fixture
def measured(monkeypatch):
    """The blocks in which something was measured."""
    seen: list[int] = []
    measure = LossPasses._measure

    def counted(self, losses):
        seen.append(losses.count)
        return measure(self, losses)

    monkeypatch.setattr(LossPasses, "_measure", counted)
    return seen


def squares(m: nn.Module, *batch: Tensor) -> Tensor:
    return m(*batch).flatten(1).square().sum(1)


def hold(m: nn.Module, *batch: Tensor, losses_of=squares) -> None:
    """One block, right."""
    rows = rows_by_loop(m, losses_of(m, *batch))
    with SampleGradients(m) as sg:
        losses_of(m, *batch).sum().backward()
    assert_close(sg.sq_norms, flat(rows).square().sum(1), 1e-9, "sq_norms")
    assert_close(sg.projections, flat(rows) @ flat(rows).mean(0), 1e-9, "projections")
    m.zero_grad()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 3))


def test_the_same_calls_are_measured_once(measured):
    m = mlp()
    for count in (N, N, 4, N, 4, 1, N):
        hold(m, torch.randn(count, D))
    assert measured == [N, 4, 1]
    hold(mlp(), torch.randn(N, D))
    assert measured == [N, 4, 1, N]


def test_other_losses_of_the_same_calls_are_measured(measured):
    m, x = mlp(), torch.randn(N, N, D)
    hold(m, x)
    hold(m, x, losses_of=lambda m, x: m(x).square().sum((0, 2)))
    hold(m, x, losses_of=lambda m, x: m(x).flip(0).square().sum((1, 2)))
    hold(m, x)
    assert measured == [N, N, N]


class Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, order):
        ctx.order = order
        return h[order]

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad).index_add(0, ctx.order, grad), None


def put(h: Tensor, order: Tensor | list[int]) -> Tensor:
    out = torch.zeros_like(h)
    out[order] = h
    return out


def put_one_by_one(h: Tensor, order: list[int]) -> Tensor:
    out = torch.zeros_like(h)
    for i, j in enumerate(order):
        out[j] = h[i]
    return out


@pytest.mark.parametrize(
    "move",
    [
        lambda h, o: h[o],
        lambda h, o: h.index_select(0, o),
        lambda h, o: h.gather(0, o[:, None].expand_as(h)),
        lambda h, o: torch.zeros_like(h).index_add(0, o, h),
        lambda h, o: h.clone().scatter(0, o[:, None].expand_as(h), h),
        lambda h, o: torch.stack([h[i] for i in o.tolist()]),
        lambda h, o: torch.eye(N)[o] @ h,
        lambda h, o: torch.einsum("nm,md->nd", torch.eye(N)[o], h),
        lambda h, o: torch.tensordot(torch.eye(N)[o], h, 1),
        lambda h, o: h[o.numpy()],
        lambda h, o: h.roll(o.numpy()[0], 0),
        lambda h, o: torch.stack([h[i] for i in o]),
        lambda h, o: torch.stack([h.unbind(0)[i] for i in o.tolist()]),
        lambda h, o: torch.sparse.mm(torch.eye(N)[o].to_sparse(), h),
        lambda h, o: Moved.apply(h, o),
        lambda h, o: put(h, o),
        lambda h, o: put(h, o.tolist()),
        lambda h, o: put_one_by_one(h, o.tolist()),
        lambda h, o: torch.where(o[:1] < 3, h, h.flip(0)),
        lambda h, o: torch.cat(h.split(3)[:: 1 if o[0] < 3 else -1]),
    ],
    ids=[
        *("[]", "index_select", "gather", "index_add", "scatter", "list", "permutation @", "einsum", "tensordot"),
        *("numpy", "numpy number", "tensors of no dimension", "unbind", "sparse", "autograd.Function"),
        *("set items", "set items of a list", "set one by one", "where", "parts"),
    ],
)
def test_samples_in_another_order_in_every_batch(move):
    m = mlp()

    def losses(m: nn.Module, x: Tensor, o: Tensor) -> Tensor:
        return m[2](move(m[1](m[0](x)), o)).square().sum(1)

    for _ in range(5):
        hold(m, torch.randn(N, D), torch.randperm(N), losses_of=losses)


def test_samples_that_come_from_calls_of_their_own_in_another_order():
    m = mlp()

    def losses(m: nn.Module, x: Tensor, order: list[int]) -> Tensor:
        alone = [squares(m, row[None]) for row in x]
        return torch.cat([alone[i] for i in order])

    for _ in range(3):
        hold(m, torch.randn(N, D), torch.randperm(N).tolist(), losses_of=losses)


def test_other_parameters_in_the_same_calls():
    heads = Parts(lambda m: None, a=nn.Linear(D, D), h=nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)]))

    def losses(m: nn.Module, x: Tensor, i: int, j: int) -> Tensor:
        return m.h[i](m.h[j](m.a(x).tanh()).tanh()).square().sum(1)

    hidden = Parts(lambda m: None, a=nn.Linear(D, D), h=nn.ParameterList([torch.randn(D), torch.randn(D)]))
    for i, j in ((0, 1), (1, 1), (1, 0), (0, 0)):
        hold(heads, torch.randn(N, D), i, j, losses_of=losses)
        hold(hidden, torch.randn(N, D), i, losses_of=lambda m, x, i: HiddenScale.apply(m.a(x), m.h[i]).square().sum(1))


def test_autocast_in_some_batches():
    m = nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).float()
    x = torch.randn(N, D).float()
    for on in (False, True, False, True):
        with SampleGradients(m) as sg:
            with torch.autocast(device.type_(), torch.bfloat16, enabled=on):
                losses = squares(m, x).float()
            losses.sum().backward(retain_graph=True)
        rows = flat(rows_by_loop(m, losses)).square().sum(1)
        assert_close(sg.sq_norms, rows, 0.03 if on else 1e-5, "sq_norms")


def normed_weights() -> nn.Module:
    first = nn.utils.parametrizations.weight_norm(nn.Linear(D, 4))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(4, 3))


def test_a_batch_with_one_active_sample_fixes_no_layout():
    """A weight that is made of parameters looks as if it were that sample's."""
    m = normed_weights()
    for y in ([-100, 1, *[-100] * 4], [0, 1, 2, 0, 1, 2], [-100, -100, 0, *[-100] * 3], [2, 2, 1, 1, 0, 0]):
        labels = torch.tensor(y)
        hold(m, torch.randn(N, D), losses_of=lambda m, x, y=labels: F.cross_entropy(m(x), y, reduction="none"))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float64, 1e9), (torch.float32, 1e5), (torch.bfloat16, 30.0)])
def test_one_sample_with_gradients_far_larger_than_the_others(dtype, factor):
    m, weights = normed_weights().to(dtype), torch.ones(N, dtype=dtype)
    weights[2] = factor
    for scale in (weights, torch.ones_like(weights)):
        with SampleGradients(m) as sg:
            losses = scale * squares(m, torch.randn(N, D).to(dtype))
            losses.sum().backward(retain_graph=True)
        expected = flat(rows_by_loop(m, losses)).square().sum(1)
        assert float((sg.sq_norms / expected - 1).abs().max()) < {8: 1e-6, 4: 1e-3, 2: 0.05}[dtype.itemsize]
        m.zero_grad()


def test_losses_multiplied_by_a_gradient_scaler():
    m = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 2)).half()

    def losses_of(x: Tensor) -> Tensor:
        tokens = m(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return (tokens.float() * 2.0**-29).flatten(1).sum(1) * torch.arange(1, N + 1)

    x = torch.randn(N, 3, D).half()
    expected = flat(rows_by_loop(m, losses_of(x) * 2.0**16)).square().sum(1)
    with SampleGradients(m) as sg:
        (losses_of(x).sum() * 2.0**16).backward()
    assert_close(sg.sq_norms, expected, 0.02, "sq_norms")


def test_a_first_batch_with_nan_fixes_no_layout():
    m = mlp()
    x = torch.randn(N, D)
    x[2] = float("nan")
    with SampleGradients(m):
        squares(m, x).sum().backward()
    m.zero_grad()
    for _ in range(2):
        hold(m, torch.randn(N, D))
        with SampleGradients(m) as sg:
            squares(m, torch.randn(N, D)).sum().backward()
        assert sg._recorder.sample_layout.by_passes == ()


def test_weighted_sums_of_other_losses_than_the_blocks():
    m = Parts(lambda m: None, a=nn.Linear(D, 4), h=nn.Linear(4, 3), g=nn.Linear(4, 3))
    with SampleGradients(m) as sg:
        h = m.a(torch.randn(N, D)).tanh()
        first, second = m.h(h).square().sum(1), m.g(h).square().sum(1)
        first.sum().backward(retain_graph=True)
    for losses in (second, first.flip(0), first + second, first):
        sums = sg.weighted_sums(losses, torch.eye(N))
        for name, rows in rows_by_loop(m, losses).items():
            assert_close(sums[name], rows, 1e-9, name, flat(rows_by_loop(m, losses)))


def test_a_product_that_moves_no_samples_is_checked_and_not_measured_again(measured, monkeypatch):
    looked: list[bool] = []
    holds = LossPasses._holds

    def counted(self, layout, losses):
        looked.append(holds(self, layout, losses))
        return looked[-1]

    monkeypatch.setattr(LossPasses, "_holds", counted)
    m = Parts(lambda m, x: (m.a(x).T @ m.b(x)).flatten(), a=nn.Linear(D, 3), b=nn.Linear(D, 2))
    losses = lambda m, x: torch.stack([m(sample).square().sum() for sample in x])  # noqa: E731
    for _ in range(4):
        hold(m, torch.randn(N, 4, D), losses_of=losses)
    assert measured == [N]
    assert looked == [True] * 3


def test_a_first_batch_of_zero_gradients_fixes_no_layout(measured):
    m = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
    with torch.no_grad():
        m[2].weight.zero_()  # as the last layers of many diffusion models
    x = torch.randn(N, N, D)
    for losses in (lambda m, x: m(x).sum((1, 2)), lambda m, x: m(x).transpose(0, 1).sum((1, 2))):
        for std in (0.0, 0.0, 1.0, 1.0):
            with torch.no_grad():
                m[2].weight.normal_(0.0, std)
            hold(m, x, losses_of=losses)
    assert measured == [N] * 6  # the first and the second of zeros and the first of others, for either loss


@pytest.mark.filterwarnings("ignore:the per-sample gradients of 'p'")
def test_zero_gradients_prove_no_layout():
    m = Parts(lambda m, x: m.out(HiddenScale.apply(x, m.p)), p=nn.Parameter(torch.randn(D)), out=nn.Linear(D, 3))
    for std in (0.0, 0.0, 1.0, 1.0):
        with torch.no_grad():
            m.out.weight.normal_(0.0, std)
            m.out.bias.normal_(0.0, 1.0)
        hold(m, torch.randn(N, D))


def test_layouts_of_a_deleted_model_are_forgotten():

    gc.collect()
    before = len(LAYOUTS)
    m = mlp()
    hold(m, torch.randn(N, D))
    assert len(LAYOUTS) == before + 1
    del m
    gc.collect()
    assert len(LAYOUTS) == before


# Numbers that are no numbers


@pytest.mark.parametrize("which", [[2], list(range(N))])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_visible(which, value):
    m, x = mlp(), torch.randn(N, D)
    x[which] = value
    with SampleGradients(m) as sg:
        squares(m, x).sum().backward()
    finite = torch.isfinite(sg.sq_norms)
    assert not bool(finite[which].any())
    rows = flat(rows_by_loop(m, squares(m, x)))
    assert_close(sg.sq_norms[finite], rows.square().sum(1)[finite], 1e-9, "sq_norms")


# Losses that cannot be seen


def test_a_pass_from_another_tensor_warns_of_its_assumption():
    m, x, y = mlp(), torch.randn(N, D), torch.randn(N, 3)
    rows = flat(rows_by_loop(m, (m(x) - y).square().mean(1)))
    with (
        pytest.warns(UserWarning, match=r"cannot be checked: the first dimension .* sg.backward\(losses\)"),
        SampleGradients(m, loss_reduction="mean") as sg,
    ):
        F.mse_loss(m(x), y).backward()
    assert_close(sg.sq_norms, rows.square().sum(1), 1e-9, "sq_norms")
    shared = Parts(lambda m, x: m.a(x) + m.p(torch.arange(3)).sum(1), a=nn.Linear(D, 3), p=nn.Embedding(3, 2))
    with (
        pytest.raises(NotImplementedError, match=r"'p.weight' cannot be read in a backward pass that does not start"),
        SampleGradients(shared, loss_reduction="mean"),
    ):
        F.mse_loss(shared(x), y).backward()


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (lambda m, x: 1.0, TypeError, "losses is a float; expected a tensor"),
        (lambda m, x: squares(m, x).mean(), ValueError, r"losses has shape \(\); expected \(N,\)"),
        (lambda m, x: squares(m, x).detach(), ValueError, "losses carry no gradient"),
    ],
)
def test_backward_checks_the_losses(losses, error, message):
    m, x = mlp(), torch.randn(N, D)
    with pytest.raises(error, match=message), SampleGradients(m) as sg:
        sg.backward(losses(m, x))
    sg = SampleGradients(m)
    with pytest.raises(RuntimeError, match="inside of the SampleGradients block"):
        sg.backward(squares(m, x))


@pytest.mark.filterwarnings("ignore:the backward pass inside")
def test_terms_added_to_unseen_losses_are_refused():
    m, x, y = mlp(), torch.randn(N, D), torch.randn(N, 3)
    with (
        pytest.raises(NotImplementedError, match=r"'0.weight' cannot be read in a backward pass that does not start"),
        SampleGradients(m, loss_reduction="mean"),
    ):
        (F.mse_loss(m(x), y) + m[0].weight.square().sum()).backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"create_graph": True}, "per-sample gradients have no graph"), ({"inputs": []}, "with include= or exclude=")],
)
def test_passes_that_a_block_does_not_serve(options, message):
    m, x = mlp(), torch.randn(N, D)
    with pytest.raises(NotImplementedError, match=message), SampleGradients(m):
        squares(m, x).sum().backward(**{name: value or [m[0].weight] for name, value in options.items()})
    assert all(p.grad is None for p in m.parameters())
    hold(m, x)


def test_blocks_without_samples_and_in_one_another():
    m = mlp()
    with pytest.raises(ValueError, match="losses is empty"), SampleGradients(m):
        squares(m, torch.randn(0, D)).sum().backward()
    with pytest.raises(RuntimeError, match="lies in another one"), SampleGradients(m), SampleGradients(mlp()):
        pass
    hold(m, torch.randn(N, D))


@pytest.mark.parametrize(
    "start",
    [
        lambda losses: losses.sum().backward(),
        lambda losses: (losses.sum() / 1).backward(),
        lambda losses: (losses.sum() + 0.0).view(()).backward(),
        lambda losses: losses.sum(0, keepdim=True).squeeze().backward(),
        lambda losses: losses.backward(torch.ones(len(losses))),
        lambda losses: torch.autograd.backward(losses.sum()),
        lambda losses: torch.autograd.backward([losses.sum()]),
        lambda losses: torch.autograd.backward(tensors=losses, grad_tensors=[torch.ones(len(losses))]),
        lambda losses: torch.sum(losses).backward(retain_graph=True),
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_start_from_the_sum_is_seen(start):
    m, x = mlp(), torch.randn(N, N, D)
    rows = flat(rows_by_loop(m, m(x).square().sum((0, 2))))
    with SampleGradients(m) as sg:
        start(m(x).square().sum((0, 2)))  # the sample is dimension 1
    assert_close(sg.sq_norms, rows.square().sum(1), 1e-9, "sq_norms")


# Losses that mix samples


def normed(m: nn.Module, x: Tensor) -> Tensor:
    h = m(x)
    return ((h - h.mean(0)) / h.std(0)).square().sum(1)


def contrastive(m: nn.Module, x: Tensor) -> Tensor:
    z = F.normalize(m(x))
    return F.cross_entropy(z @ z.T, torch.arange(len(x)), reduction="none")


MIXED = {
    "batch statistics": normed,
    "contrastive": contrastive,
    "centred": lambda m, x: (m(x) - m(x).mean(0)).square().sum(1),
    "normalised by the batch's length": lambda m, x: squares(m, x) / x.abs().sum(),
    "the sample before": lambda m, x: (m(x) - m(x).roll(1, 0)).square().sum(1),
    "all that came before": lambda m, x: m(x).cumsum(0).square().sum(1),
    "all that come after": lambda m, x: m(x).flip(0).cumsum(0).flip(0).square().sum(1),
    "sorted": lambda m, x: m(x).sort(0).values.square().sum(1),
    "pairs": lambda m, x: (m(x) - m(x).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)).square().sum(1),
    "groups": lambda m, x: (lambda y: (y - y.mean(1, keepdim=True)).flatten())(squares(m, x).view(-1, 3)),
    "triplets": lambda m, x: F.relu((m(x) - m(x).flip(0)).square().sum(1) + 1),
}


@pytest.mark.parametrize("kind", ["diagonal", "low_rank"])
@pytest.mark.parametrize("name", MIXED)
def test_losses_that_mix_samples_are_refused(name, kind):
    m, loader = mlp(), [torch.randn(N, D) for _ in range(2)]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"per_sample_loss mixes samples: the loss of sample .* other samples"):
        estimate_fisher(m, MIXED[name], loader, kind=kind)
    assert m.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in m.parameters())


@pytest.mark.filterwarnings("ignore:the per-sample gradients of", "ignore:there is no rule")
@pytest.mark.parametrize("name", MIXED)
def test_mixed_losses_give_the_gradient_of_each_loss(name):
    m, x = mlp(), torch.randn(N, D)
    rows = rows_by_loop(m, MIXED[name](m, x))
    fisher = estimate_fisher(m, MIXED[name], [x], kind="diagonal", mixed_losses=True)
    assert_close(fisher.fisher_diagonal, flat(rows).square().mean(0), 1e-9, "diagonal")


noise = torch.Generator()
NOT_MIXED = {
    "noise of the global generator": lambda m, x: squares(m, x + torch.randn_like(x)),
    "noise of a generator of its own": lambda m, x: squares(m, x + torch.randn(x.shape, generator=noise)),
    "dropout": lambda m, x: squares(m, F.dropout(x, 0.5)),
    "the number of samples": lambda m, x: squares(m, x) / len(x),
    "noise for some": lambda m, x: (
        squares(m, x) * torch.ones(len(x)).masked_scatter(x[:, 0] > 0, torch.rand(int((x[:, 0] > 0).sum())))
    ),
    "sorted and back": lambda m, x: m(x[x[:, 0].argsort()]).square().sum(1)[x[:, 0].argsort().argsort()],
}


@pytest.mark.parametrize("name", NOT_MIXED)
def test_losses_that_do_not_mix_samples_are_taken(name):
    estimate_fisher(mlp(), NOT_MIXED[name], [torch.randn(N, D), torch.randn(3, D)], kind="diagonal")
    estimate_fisher(mlp(), NOT_MIXED[name], [torch.ones(N, D)], kind="diagonal")


@pytest.mark.parametrize("count", [2, 3, 8, 9, 33])
def test_pairs_in_batches_of_any_size(count):
    for shift in {1, count // 2, count - 1}:
        with pytest.raises(ValueError, match="mixes samples"):
            estimate_fisher(
                mlp(), lambda m, x, s=shift: squares(m, x) + squares(m, x).roll(s).detach(), [torch.randn(count, D)] * 2
            )


def test_a_loss_with_a_fixed_batch_size():
    fixed = torch.randn(16, D)
    loader = [torch.randn(16, D) for _ in range(4)]
    for loss in (lambda m, x: squares(m, x + fixed), lambda m, x: squares(m, x).view(-1, 16).flatten()):
        estimate_fisher(mlp(), loss, loader, kind="diagonal")


def test_inference_mode_is_the_reason_that_is_given():
    m, x = mlp(), torch.randn(N, D)
    with torch.inference_mode():
        for call in (
            lambda: estimate_fisher(m, squares, [x, x]),
            lambda: SampleGradients(m).__enter__(),
        ):
            with pytest.raises(RuntimeError, match=r"torch.inference_mode\(\) is on"):
                call()
    hold(m, x)
