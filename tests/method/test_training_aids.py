"""Training aids around an objective: TREAD, REPA, Self-Flow."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from selfe.errors import UserError
from selfe.objectives.flow_matching import FlowMatching
from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.objectives.tread import Tread, choose_tokens
from selfe.rng import SampleRNG
from selfe.types import Route, TextCond
from tests.method.test_mmdit import inputs, small

RNG = SampleRNG.of_step(0, 5, range(3))


def objective_inputs(dtype: torch.dtype = torch.float64) -> tuple:
    """x0 and conditioning of three samples, for an objective that asks for `cond` alone."""
    x, _, _, cond = inputs(dtype)
    return x, {"cond": cond}


# ---- TREAD ----


@pytest.mark.parametrize("per_token", [False, True], ids=["times per sample", "times per token"])
@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("double_blocks.0", "double_blocks.1"),
        ("double_blocks.1", "single_blocks.0"),
        ("single_blocks.0", "single_blocks.1"),
    ],
)
def test_a_route_without_skipped_tokens_changes_nothing(first, last, per_token):
    net, (x, t, s, cond) = small(), inputs()
    if per_token:
        t, s = t[x.owner], s[x.owner]
    route = Route(first, last, tuple(torch.arange(n) for n in x.lens))
    torch.testing.assert_close(net(x, t, s, cond, (), route), net(x, t, s, cond), rtol=0, atol=1e-12)


def test_skipped_tokens_pass_the_other_blocks_only():
    """With all blocks in the route, a skipped token is what enters the first block."""
    net, (x, t, s, cond) = small(), inputs()
    kept = (torch.tensor([0, 3]), torch.arange(16), torch.tensor([0]))
    v = net(x, t, s, cond, (), Route("double_blocks.0", "single_blocks.1", kept))

    empty = small(num_double_blocks=0, num_single_blocks=0)
    empty.load_state_dict({k: v for k, v in net.state_dict().items() if k in empty.state_dict()})
    skipped = [1, 2, 4, 5]
    torch.testing.assert_close(v[skipped], empty(x, t, s, cond)[skipped], rtol=0, atol=1e-12)

    # samples without skipped tokens are unchanged, and kept tokens do not see skipped ones
    torch.testing.assert_close(v[6:], net(x, t, s, cond)[6:], rtol=0, atol=1e-12)
    changed = x.tokens.clone()
    changed[1] += 1
    other = net(x.with_tokens(changed), t, s, cond, (), Route("double_blocks.0", "single_blocks.1", kept))
    torch.testing.assert_close(other[[0, 3]], v[[0, 3]], rtol=0, atol=1e-12)
    assert not torch.allclose(other[1], v[1])


def test_flops_of_a_route_fall_and_are_those_that_run():
    net, (x, t, s, cond) = small(dtype=torch.float32), inputs(torch.float32)
    route = Route("double_blocks.1", "single_blocks.0", choose_tokens(x, RNG, 0.5))
    for times in ((t, s), (t[x.owner], s[x.owner])):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, *times, cond, (), route)
        options = {"token_times": len(times[0]) != 3}
        assert net.flops(x.lens, cond.text.lens, **options, route=route) == counter.get_total_flops()
        assert counter.get_total_flops() < 0.9 * net.flops(x.lens, cond.text.lens, **options)


def test_the_choice_of_tokens_is_a_function_of_step_and_sample():
    x, _, _, _ = inputs()
    kept = choose_tokens(x, RNG, 0.5)
    assert [len(indices) for indices in kept] == [3, 8, 1]
    assert all((np.diff(indices) > 0).all() for indices in kept)
    alone = choose_tokens(x.select([1]), RNG.select([1]), 0.5)
    assert torch.equal(alone[0], kept[1])
    assert not torch.equal(choose_tokens(x, SampleRNG.of_step(0, 6, range(3)), 0.5)[1], kept[1])


def test_tread_routes_training_and_not_validation():
    net, (x0, conds) = small(), objective_inputs()
    routes = []

    def recorded(x_t, t, s, cond, features=(), route=None):
        routes.append(route)
        return net(x_t, t, s, cond, features, route)

    plain, routed = FlowMatching(), Tread(FlowMatching(), "double_blocks.1", "single_blocks.0", skip=0.5)
    routed.prepare(net)
    with torch.no_grad():
        validated = routed(recorded, net, x0, conds, RNG, 5).per_sample
        torch.testing.assert_close(validated, plain(net, net, x0, conds, RNG, 5).per_sample, rtol=0, atol=0)
    loss = routed(recorded, net, x0, conds, RNG, 5)
    assert [route is None for route in routes] == [True, False]
    assert not torch.allclose(loss.per_sample, validated)
    loss.per_sample.mean().backward()
    assert net.single_blocks[0].modulation.weight.grad.abs().sum() > 0


def test_tread_leaves_the_passes_of_self_evaluation_complete():
    """Those without gradient, and the auxiliary one of the evaluated samples."""
    net, (x, _, _, cond) = small(), inputs()
    x0, cond = x.select([0, 1]), cond.select([0, 1])
    objective = Tread(SelfEvaluation(tau_steps=1, aux_start_step=1), "double_blocks.0", "double_blocks.1")
    routes = []

    def recorded(x_t, t, s, cond, features=(), route=None):
        routes.append(None if route is None else route.lens)
        return net(x_t, t, s, cond, features, route)

    one = cond.select([1])
    conds = {"cond": cond, "null": TextCond(one.text, one.pooled), "fake": one}
    objective(recorded, recorded, x0, conds, SampleRNG.of_step(0, 9, range(2)), 9)
    assert routes == [(3, 8), None, None, None]


def test_blocks_of_a_route_are_checked():
    for first, last, words in (
        ("double_blocks.7", "single_blocks.0", "the backbone has no block double_blocks.7; its blocks are double_bl"),
        ("single_blocks.0", "double_blocks.1", "first block single_blocks.0 comes after last block double_blocks.1"),
    ):
        with pytest.raises(ValueError, match=words):
            Tread(FlowMatching(), first, last).prepare(small())
    net, (x, t, s, cond) = small(), inputs()
    route = Route("double_blocks.0", "double_blocks.1", choose_tokens(x, RNG, 0.5))
    with pytest.raises(UserError, match=r"feature double_blocks.1 is inside of the blocks double_blocks.0 to double_b"):
        net(x, t, s, cond, ["double_blocks.1"], route)
