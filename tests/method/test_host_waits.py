"""The host never waits for an accelerator in a micro-batch. On fake CUDA tensors, which need no GPU.

Only the loss and the metrics: autograd's engine runs no backward pass of fake CUDA tensors without a GPU.
"""

from collections.abc import Sequence

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from selfe.backbones.mmdit import MMDiT
from selfe.backbones.packing import PackedLayout, grid_rotation
from selfe.device import to_device
from selfe.objectives.alpha_flow import AlphaFlow
from selfe.objectives.any_flow import AnyFlow
from selfe.objectives.flow_matching import FlowMatching
from selfe.objectives.mean_flow import MeanFlow
from selfe.objectives.self_evaluation import SelfEvaluation
from selfe.objectives.terminal_velocity import TerminalVelocity
from selfe.rng import SampleRNG
from selfe.system import System
from selfe.training.metrics import MetricAccumulator
from selfe.types import Batch, Packed, TextCond, packed
from tests.method.test_mmdit import SMALL

GPU = torch.device("cuda")
GRIDS = [(2, 3), (4, 4), (1, 2), (2, 3)]
STEP = 10  # of the objective: Self-E is on


class Transfers(TorchDispatchMode):
    """Counts copies to the device, and operations for which the host waits."""

    def __init__(self):
        super().__init__()
        self.copies, self.waits = 0, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = function._schema.name.removeprefix("aten::")
        result = function(*arguments, **keywords)

        if name in ("_local_scalar_dense", "nonzero", "equal") and arguments[0].device.type == "cuda":
            self.waits.append(name)
        if name in ("_to_copy", "copy_"):
            source = arguments[1] if name == "copy_" else arguments[0]
            where = (source.device.type, result.device.type)
            self.copies += where == ("cpu", "cuda")
            # only a copy from pinned memory that asks for it returns at once
            at_once = keywords.get("non_blocking", False) or (name == "copy_" and True in arguments[2:])
            if "cuda" in where and where[0] != where[1] and not (at_once and where[0] == "cpu"):
                self.waits.append(f"{name} {where}")
        return result


class OnDevice:
    """Encoders whose outputs are on the device already."""

    text_dim, pooled_dim, token_dim, multiple = SMALL["text_dim"], SMALL["pooled_dim"], SMALL["patch_dim"], 1

    def __call__(self, captions: Sequence[str]) -> TextCond:
        lens = [1 + len(caption.split()) for caption in captions]
        text = packed(torch.empty(sum(lens), self.text_dim, device=GPU), [(1, n) for n in lens])
        return TextCond(text, torch.empty(len(lens), self.pooled_dim, device=GPU))

    def encode(self, images: Sequence[torch.Tensor], rng: SampleRNG) -> Packed:
        return packed(torch.empty(sum(h * w for h, w in GRIDS), self.token_dim, device=GPU), GRIDS)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Fake CUDA tensors; pinned memory and NumPy's random numbers are not available for them."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(
        SampleRNG, "normal_like", lambda self, name, x: to_device(torch.empty(x.tokens.shape), x.tokens.device)
    )
    forget_layouts()
    with FakeTensorMode():
        yield
    forget_layouts()


def forget_layouts() -> None:
    """Fake tensors must not stay in caches."""
    PackedLayout.of.cache_clear()
    grid_rotation.cache_clear()


@pytest.mark.parametrize(
    ("objective", "copies"),
    [
        (FlowMatching(), 15),
        (SelfEvaluation(aux_start_step=None), 40),
        (SelfEvaluation(aux_start_step=0), 50),
        (MeanFlow(guidance=2.0, p_zero=0.2), 50),
        (AlphaFlow(alpha_end_step=STEP), 50),
        (AnyFlow(guidance=2.0), 50),
        (TerminalVelocity(guidance=2.0), 50),
    ],
    ids=["flow matching", "Self-E", "Self-E with auxiliary term", "iMF", "alpha-Flow", "AnyFlow", "TVM"],
)
def test_a_micro_batch_makes_no_host_wait_and_a_bounded_number_of_copies(objective, copies, fake_gpu):
    with GPU:
        net, ema = (MMDiT(**SMALL, num_double_blocks=1, num_single_blocks=1) for _ in range(2))
    for parameter in [*net.parameters(), *ema.parameters()]:
        parameter.data = torch.empty(parameter.shape, dtype=torch.bfloat16, device=GPU)
    ema.requires_grad_(False)
    system = System(net, OnDevice(), OnDevice(), objective)
    images = tuple(torch.empty(0, device=GPU) for _ in GRIDS)
    batch = Batch(images, ("a cat", "two dogs", "", "a bird"), tuple(range(4)), ("name",) * 4)

    measured = MetricAccumulator()
    with Transfers() as transfers:
        loss = system.loss(net, ema, batch, SampleRNG.of_step(0, STEP, batch.positions), STEP)
        mean_loss = loss.per_sample.mean()
        measured.add(loss, batch)
    assert transfers.waits == []
    assert 0 < transfers.copies <= copies

    # what is read at the end of the step is still on the device
    assert mean_loss.device.type == "cuda"
    assert [check.sums.device.type for check in loss.checks] == ["cuda", "cuda"]
    assert measured.samples[0][0].images == ()
