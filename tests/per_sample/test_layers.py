"""Per-sample gradients against one backward pass per sample: every layer, with a rule or without."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.block_checks import check
from helpers.by_loop import HiddenScale, Parts, assert_close, rows_of_single_samples, squared
from helpers.layer_cases import CASES, N, prepared, tokens, without_rules
from torch import nn
from torch.utils.checkpoint import checkpoint

from crl_kernels import SampleGradients
from crl_kernels.per_sample import recorder


@pytest.mark.parametrize("case", CASES)
def test_equals_one_backward_pass_per_sample(case):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "there is no rule")
        check(*prepared(case, torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_float32(case):
    model, batch = prepared(case, torch.float64)
    expected = rows_of_single_samples(model, squared, batch)
    as_float32 = tuple(x.float() if x.is_floating_point() else x for x in batch)
    check(model.float(), as_float32, tolerance=1e-5, expected=expected)


# Functions without a rule, and uses that no rule sees


def test_a_use_without_a_rule_warns_once():
    model, batch = without_rules()
    recorder._warned.clear()
    with pytest.warns(UserWarning, match=r"no rule for the per-sample gradients of '1.slope' in prelu: .* each sample"):
        check(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, batch)
        check(model, (batch[0][:1],))


@pytest.mark.filterwarnings("ignore:there is no rule")
def test_weighted_sums_of_other_losses_than_those_of_the_statistics():
    model, (x,) = without_rules()
    expected = rows_of_single_samples(model, lambda m, x: squared(m[1], x), (x,))
    with SampleGradients(model) as sg:
        first, second = squared(model[1], x), squared(model[0], x)
        (first + second).sum().backward(retain_graph=True)
    ones = torch.ones(1, N)
    assert not bool(sg.weighted_sums(second, ones)["1.gate"].any())
    with torch.no_grad():  # the pass needs no graph of its own
        assert_close(sg.weighted_sums(first, ones)["1.gate"][0], expected["1.gate"].sum(0), 1e-10)


def test_a_module_that_is_given_its_parameter():
    inner = Parts(lambda m, x, p: x * torch.sigmoid(p) + torch.sin(m.p), p=nn.Parameter(torch.randn(6)))
    model = nn.Sequential(nn.Linear(6, 6), Parts(lambda m, x: m.inner(x, m.inner.p), inner=inner)).double()
    check(model, (tokens()[0].double(),))


def test_a_module_that_changes_its_input():
    model = nn.Sequential(
        nn.Linear(6, 6), Parts(lambda m, x: x.add_(1) * torch.sigmoid(m.p), p=nn.Parameter(torch.randn(6)))
    ).double()
    check(model, (tokens()[0].double(),))


def test_uses_without_a_rule_in_nested_modules_are_counted_once():
    inner = Parts(
        lambda m, x: x * m.p.exp() + m.q.exp() * x, p=nn.Parameter(torch.randn(6)), q=nn.Parameter(torch.rand(6))
    )
    model = Parts(lambda m, x: m.inner(m.inner(x)) * m.inner.p.exp(), inner=inner).double()
    check(model, (tokens()[0].double(),))


def test_one_use_by_a_rule_and_one_elsewhere_without():
    lin = nn.Linear(6, 6)
    model = nn.Sequential(lin, Parts(lambda m, x: x * m.lin.weight.mean(0).exp() + m.lin.bias.exp(), lin=lin)).double()
    check(model, (tokens()[0].double(),))


def hidden_use() -> nn.Module:
    return Parts(
        lambda m, x: HiddenScale.apply(m.lin(x), m.scale), lin=nn.Linear(6, 6), scale=nn.Parameter(torch.ones(6))
    )


@pytest.mark.parametrize("trained", [True, False])  # whether anything else is seen
def test_a_hidden_use_takes_one_pass_for_each_sample(trained):
    model = hidden_use().double()
    model.lin.requires_grad_(trained)
    recorder._warned.clear()
    with pytest.warns(UserWarning, match="per-sample gradients of 'scale' cannot be read.*each sample"):
        check(model, (tokens()[0].double(),))


def test_functions_without_a_rule_in_a_reentrant_checkpoint():
    model = Parts(lambda m, x: F.prelu(x * m.p.exp(), m.p[:1]), p=nn.Parameter(torch.randn(6)))
    again = Parts(lambda m, x: checkpoint(m.inner, m.lin(x), use_reentrant=True), lin=nn.Linear(6, 6), inner=model)
    again, x = again.double(), tokens()[0].double()
    plain = Parts(lambda m, x: m.inner(m.lin(x)), lin=again.lin, inner=model)
    check(again, (x,), expected=rows_of_single_samples(plain, squared, (x,)))


@pytest.mark.filterwarnings("ignore:there is no rule")
def test_layers_of_other_kinds():
    model = nn.Sequential(nn.Conv3d(2, 3, 2), nn.PReLU(3), nn.Flatten(), nn.Bilinear(24, 24, 2)).double()
    model[3] = Parts(lambda m, x: m.b(x, x), b=model[3])
    check(model, (torch.randn(N, 2, 3, 3, 3).double(),))


def test_parametrised_weights():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 2)).double()
    check(model, (tokens()[0].double(),))
