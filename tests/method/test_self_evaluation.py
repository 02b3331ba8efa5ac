"""Self-E against the plain NumPy reference: losses, gradients (and so stop-gradients), ends of the path, calls."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from selfe import flow
from selfe.objectives.flow_matching import FlowMatching
from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.rng import SampleRNG
from selfe.types import Loss, Packed, TextCond, packed
from tests.helpers import reference

CAPTIONS = ["", "a cat", "a dog", "fake image ", "fake image a cat", "fake image a dog"]
PROMPTS = ["a cat", "a dog", "a dog", "a cat", "a dog", "a cat", "a cat", "a dog"]
GRIDS = [(1, 1), (1, 1), (2, 2), (1, 3), (1, 1), (3, 2), (2, 1), (1, 1)]
STEPS = {"tau_steps": 10, "aux_start_step": None}  # tau = step / 10


class GaussianNet(nn.Module):
    """The exact velocity for x0 ~ N(m_c, L_c L_c^T) for each caption c, and a term that separates t from s."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in {"mean": (6, 2), "root": (6, 2, 2), "wave": (2, 2)}.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value.to(dtype)))

    def forward(self, x_t: Packed, t: Tensor, s: Tensor, cond: TextCond) -> Tensor:
        t, s = flow.per_token(t, x_t), flow.per_token(s, x_t)
        mean, root = (torch.tensordot(cond.pooled, p, 1)[x_t.owner] for p in (self.mean, self.root))
        covariance, identity = root @ root.mT, torch.eye(2).to(root)
        broadcast = (1 - t)[..., None] ** 2 * covariance + t[..., None] ** 2 * identity
        centred = torch.linalg.solve(broadcast, x_t.tokens - (1 - t) * mean)
        toward = t[..., None] * identity - (1 - t)[..., None] * covariance
        exact = (toward @ centred[..., None])[..., 0] - mean
        return exact + (t - 0.5 * s) * torch.sin(x_t.tokens @ self.wave + s)

    def plain(self, **moved: np.ndarray):
        """The same denoiser for the reference, some of its parameters replaced."""
        mean, root, wave = (moved.get(name, p.detach().numpy()) for name, p in self.named_parameters())

        def velocity(x, t, s, c):
            broadcast = np.tensordot(c, root, 1)
            exact = reference.gaussian_velocity(x, t, c @ mean, broadcast @ broadcast.T)
            return exact + (t - 0.5 * s) * np.sin(x @ wave + s)

        return velocity


NETS = GaussianNet(0), GaussianNet(1)  # live, ema


def encode(captions: list[str]) -> TextCond:
    pooled = torch.eye(6, dtype=torch.float64)[[CAPTIONS.index(caption) for caption in captions]]
    return TextCond(packed(pooled, [(1, 1)] * len(captions)), pooled)


def clean(dtype: torch.dtype = torch.float64) -> Packed:
    tokens = torch.randn(sum(r * c for r, c in GRIDS), 2, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return packed(tokens, GRIDS)


def run(objective, net, ema, step: int, dtype=torch.float64, rows=range(8), seed: int = 0) -> Loss:
    """The objective on these rows of one batch, captions and all."""
    rows, rng = list(rows), SampleRNG.of_step(seed, step, list(rows))
    captions = objective.captions([PROMPTS[r] for r in rows], rng, step)
    conds = {name: encode(wanted) for name, wanted in captions.items()}
    conds = {name: TextCond(c.text, c.pooled.to(dtype)) for name, c in conds.items()}
    return objective(net, ema, clean(dtype).select(rows), conds, rng, step)


def gradients(loss: Loss, net: nn.Module) -> dict[str, np.ndarray]:
    grads = torch.autograd.grad(loss.per_sample.mean(), list(net.parameters()))
    return {name: grad.numpy() for (name, _), grad in zip(net.named_parameters(), grads, strict=True)}


# --- losses and gradients


def reference_samples(rng: SampleRNG, p_drop: float, p_equal: float, tau: float) -> list[reference.Sample]:
    x0 = clean()
    noise, renoise = (x0.with_tokens(rng.normal_like(name, x0)).split() for name in ("noise", "renoise"))
    z, u, coin = rng.normal("t", x0.tokens), rng.uniform("s", x0.tokens), rng.uniform("drop", x0.tokens)
    samples = []
    for i, x in enumerate(x0.split()):
        prompt = "" if coin[i] < p_drop else PROMPTS[i]
        equal = math.floor((i + 1) * (1 - p_equal)) == math.floor(i * (1 - p_equal))
        t, s = reference.times(float(z[i]), float(u[i]), equal or tau == 0, tau, len(x))
        codes = [np.eye(6)[CAPTIONS.index(caption)] for caption in (prompt, "", "fake image " + prompt)]
        samples.append(reference.Sample(x.numpy(), noise[i].numpy(), renoise[i].numpy(), t, s, prompt == "", *codes))
    return samples


def reference_losses(samples, net, ema, weights, config, aux_loss_weight, frozen=None) -> np.ndarray:
    """(B,), the auxiliary term being a mean over the rows that have one."""
    fixed = {"live": frozen or net, "ema": ema}
    cond_net, null_net = (fixed[which] for which in weights)
    main, aux = np.array([reference.losses(x, net, cond_net, null_net, config, frozen) for x in samples]).T
    count = max(np.isfinite(aux).sum(), 1)
    return main + aux_loss_weight * len(samples) / count * np.where(np.isfinite(aux), aux, 0)


def reference_gradients(net: GaussianNet, loss) -> dict[str, np.ndarray]:
    """By complex steps; `loss` takes a denoiser of complex parameters."""
    found = {}
    for name, parameter in net.named_parameters():
        found[name] = np.zeros(parameter.shape)
        for index in np.ndindex(*parameter.shape):
            moved = parameter.detach().numpy().astype(complex)
            moved[index] += 1e-30j
            found[name][index] = loss(net.plain(**{name: moved})).mean().imag / 1e-30
    return found


cases = st.fixed_dictionaries(
    {
        "p_drop": st.sampled_from([0, 0.5]),
        "p_equal": st.sampled_from([0, 0.25, 0.5, 1]),
        "cond_weights": st.sampled_from(["ema", "live"]),
        "null_weights": st.sampled_from(["ema", "live"]),
        "k_cls": st.sampled_from([1, 0.4]),
        "aux_start_step": st.sampled_from([None, 0]),
        "aux_k_cls": st.sampled_from([0.9, 1.5]),
        "aux_k_fake": st.sampled_from([0.1, -0.7]),
        "aux_loss_weight": st.sampled_from([1, 0.25]),
        "energy_preserving": st.booleans(),
        "lam_max": st.sampled_from([math.inf, 0.5]),
        "eval_floor": st.sampled_from([0, 0.6, 1]),
    }
)


@settings(max_examples=60, deadline=None)
@given(case=cases, step=st.sampled_from([0, 3, 10, 12]), seed=st.integers(0, 1000))
def test_losses_and_gradients_equal_the_reference(case, step, seed):
    (net, ema), auxiliary = NETS, case["aux_start_step"] is not None
    found = run(SelfEvaluation(**case, tau_steps=10), net, ema, step, seed=seed)

    samples = reference_samples(
        SampleRNG.of_step(seed, step, range(8)), case["p_drop"], case["p_equal"], min(step / 10, 1)
    )
    weights, k_cls = (case["cond_weights"], case["null_weights"]), case["aux_k_cls" if auxiliary else "k_cls"]
    shared = {name: case[name] for name in ("energy_preserving", "lam_max", "eval_floor")}
    config = reference.Settings(auxiliary=auxiliary, k_cls=k_cls, k_fake=case["aux_k_fake"], **shared)

    def expected(live, frozen=None):
        return reference_losses(samples, live, ema.plain(), weights, config, case["aux_loss_weight"], frozen)

    np.testing.assert_allclose(found.per_sample.detach(), expected(net.plain()), rtol=1e-10, atol=1e-10)
    slopes, grads = reference_gradients(net, lambda live: expected(live, frozen=net.plain())), gradients(found, net)
    for name in slopes:
        np.testing.assert_allclose(grads[name], slopes[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_the_reference_can_tell_a_missing_stop_gradient(auxiliary):
    net, ema = NETS
    samples = reference_samples(SampleRNG.of_step(0, 10, range(8)), 0, 0.5, 1)
    config = reference.Settings(auxiliary=auxiliary, k_fake=0.1)

    def slopes(frozen):
        return reference_gradients(
            net, lambda live: reference_losses(samples, live, ema.plain(), ("ema", "live"), config, 1, frozen)
        )

    stopped, through = slopes(net.plain()), slopes(None)
    assert all(np.abs(stopped[name] - through[name]).max() > 1e-3 for name in stopped)


def test_ema_gets_no_gradient():
    net, ema = GaussianNet(0), GaussianNet(1)
    loss = run(SelfEvaluation(tau_steps=10, aux_start_step=0), net, ema, 10)
    loss.per_sample.sum().backward()
    assert all(p.grad is None for p in ema.parameters())
    assert all(p.grad is not None for p in net.parameters())
    assert not any(metric.requires_grad for metric in loss.metrics.values())


# --- flow matching as a special case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("changes", "step"), [({"p_equal": 1}, 10), ({}, 0), ({"start_step": 20}, 5), ({"start_step": 20}, 20)]
)
def test_without_pairs_it_is_flow_matching_to_the_bit(changes, step, dtype):
    net, ema = GaussianNet(0, dtype), GaussianNet(1, dtype)
    changes = {"p_drop": 0.3, "tau_steps": 10, "aux_start_step": 0} | changes
    a, b = run(SelfEvaluation(**changes), net, ema, step, dtype), run(FlowMatching(0.3), net, ema, step, dtype)
    assert torch.equal(a.per_sample, b.per_sample)
    for one, other in zip(gradients(a, net).values(), gradients(b, net).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_row_without_prompt_keeps_the_data_as_target():
    x0, step = clean(), 10
    loss = run(SelfEvaluation(p_drop=1, p_equal=0, **STEPS), *NETS, step)
    rng = SampleRNG.of_step(0, step, range(8))
    noise, t = rng.normal_like("noise", x0), flow.draw_t(rng, x0)
    s = t * (1 - rng.uniform("s", like=t))
    x_t = x0.with_tokens(flow.interpolate(x0.tokens, noise, t, x0))
    error = NETS[0](x_t, t, s, encode([""] * 8)) - (noise - x0.tokens)
    assert torch.equal(loss.per_sample, flow.mean_per_sample(error.square(), x0))


@pytest.mark.parametrize("kind", ["x0", "noise"])
def test_the_loss_weight_is_that_of_the_time_of_each_term(kind):
    """Of the prediction at t, and of the auxiliary term at s."""
    plain, weighted = (
        run(SelfEvaluation(tau_steps=10, aux_start_step=0, loss_weight=weight), *NETS, 10)
        for weight in ("velocity", kind)
    )
    rows = list(plain.eval_rows)
    of_t = flow.loss_weight(kind, plain.t)
    aux = torch.zeros_like(of_t).index_copy(0, torch.tensor(rows), 2 * plain.metrics["aux_loss"])
    expected = of_t * (plain.per_sample - aux) + flow.loss_weight(kind, plain.s) * aux
    torch.testing.assert_close(weighted.per_sample, expected)
    assert torch.equal(weighted.metrics["data_loss"], plain.metrics["data_loss"])


# --- the ends of the path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eval_floor", [0, 0.6])
@pytest.mark.parametrize("energy_preserving", [True, False])
def test_finite_and_continuous_at_the_ends(energy_preserving, eval_floor, dtype, monkeypatch):
    net, ema = GaussianNet(0, dtype), GaussianNet(1, dtype)
    changes = {"energy_preserving": energy_preserving, "eval_floor": eval_floor}
    objective = SelfEvaluation(p_equal=0, tau_steps=10, aux_start_step=0, **changes)
    ratio = torch.tensor([0, 1, 0, 1, 0.5, 0, 1, 0.5], dtype=dtype)  # s / t
    monkeypatch.setattr(SampleRNG, "uniform", lambda self, name, like: (1 - ratio if name == "s" else ratio).to(like))

    def at(margin: float) -> Tensor:
        t = torch.tensor([margin, margin, 1 - margin, 1 - margin, 1 - margin, 0.5, 0.5, margin], dtype=dtype)
        monkeypatch.setattr(flow, "draw_t", lambda rng, x0, times: t)
        loss = run(objective, net, ema, 10, dtype)
        numbers = [
            loss.per_sample.detach(),
            *loss.metrics.values(),
            *map(torch.from_numpy, gradients(loss, net).values()),
        ]
        assert all(number.isfinite().all() for number in numbers)
        return loss.per_sample

    torch.testing.assert_close(at(0), at(1e-5), rtol=0.01, atol=0)


# --- network calls


@pytest.mark.parametrize(
    ("objective", "calls"),
    [
        (FlowMatching(), [("live", 8, True)]),
        (SelfEvaluation(**STEPS), [("live", 8, True), ("live", 4, False), ("ema", 4, False)]),
        (
            SelfEvaluation(tau_steps=10, aux_start_step=0),
            [("live", 8, True), ("live", 4, False), ("ema", 4, False), ("live", 4, True)],
        ),
        (
            SelfEvaluation(cond_weights="live", null_weights="ema", **STEPS),
            [("live", 8, True), ("ema", 4, False), ("live", 4, False)],
        ),
    ],
)
def test_network_calls(objective, calls):
    made = []

    def recorded(name: str, net: GaussianNet):
        def call(x_t, t, s, cond):
            v = net(x_t, t, s, cond)
            made.append((name, len(x_t), v.requires_grad))
            assert len(cond.text) == len(cond.pooled) == len(t) == len(s) == len(x_t)
            return v

        return call

    run(objective, recorded("live", GaussianNet(0)), recorded("ema", GaussianNet(1)), 10)
    assert made == calls


@pytest.mark.parametrize(("step", "names"), [(0, ["cond"]), (3, ["cond", "null"]), (7, ["cond", "null", "fake"])])
def test_exactly_the_captions_that_are_used(step, names):
    objective, rng = SelfEvaluation(p_drop=0.3, tau_steps=10, aux_start_step=5), SampleRNG.of_step(0, step, range(8))
    captions = objective.captions(PROMPTS, rng, step)
    dropped = flow.drop_prompts(PROMPTS, rng, 0.3)
    fake = ["fake image " + dropped[r] for r in objective.eval_rows(8, step)]
    assert captions == {name: {"cond": dropped, "null": [""] * 4, "fake": fake}[name] for name in names}
    conds = {name: encode(wanted) for name, wanted in captions.items()}
    for name in names:
        with pytest.raises(KeyError):
            objective(*NETS, clean(), {n: c for n, c in conds.items() if n != name}, rng, step)


@pytest.mark.parametrize(("p_equal", "multiple"), [(0, 1), (0.25, 4), (0.5, 2), (0.9, 10), (1, 1)])
def test_judged_rows_are_a_matter_of_place(p_equal, multiple):
    objective = SelfEvaluation(p_equal=p_equal, **STEPS)
    assert objective.batch_multiple == multiple
    rows = objective.eval_rows(80, 10)
    assert len(rows) == round(80 * (1 - p_equal))
    assert objective.eval_rows(80, 0) == []
    for size in (multiple, 2 * multiple):
        parts = [start + row for start in range(0, 80, size) for row in objective.eval_rows(size, 10)]
        assert parts == rows


@pytest.mark.parametrize("size", [2, 4])
def test_micro_batches_equal_one_batch(size):
    objective = SelfEvaluation(p_drop=0.3, tau_steps=10, aux_start_step=0)
    parts = [run(objective, *NETS, 10, rows=range(i, i + size)).per_sample for i in range(0, 8, size)]
    torch.testing.assert_close(torch.cat(parts), run(objective, *NETS, 10).per_sample, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [{"p_drop": 2}, {"p_equal": -1}, {"p_equal": 0.995}, {"eval_floor": 2}, {"tau_steps": 0}, {"lam_max": -1}],
)
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SelfEvaluation(**wrong)


def test_norm_ratio_is_that_of_the_target_before_it_is_rescaled():
    x0 = packed(torch.ones(3, 2), [(1, 1), (1, 2)])
    target, ratio = SelfEvaluation().target(x0, 3 * x0.tokens, torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(ratio, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(target, x0.tokens)
