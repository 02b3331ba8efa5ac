"""Checkpoints: complete or absent, loaded on another number of ranks, refused when they do not fit."""

import copy
import shutil
from pathlib import Path

import pytest
import torch

from selfe.checkpoint import state, verify
from selfe.checkpoint.manager import CheckpointManager, RetentionPolicy
from selfe.distributed import fsdp
from selfe.distributed.collectives import World
from selfe.errors import UserError
from tests.distributed.test_fsdp import perturb, small_net
from tests.helpers.ranks import on_ranks


def training_parts(world: World) -> tuple[torch.nn.Module, torch.nn.Module, torch.optim.Optimizer]:
    with torch.device("meta"):
        net = small_net()
    twin = copy.deepcopy(net).requires_grad_(False)
    for module in (net, twin):
        fsdp.shard(module, fsdp.make_mesh(world, None), precision="fp32", activation_checkpointing=False)
        fsdp.materialise(module, world.device, seed=0)
    return net, twin, torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)


def fill(net: torch.nn.Module, twin: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Weights and moments that are no start values."""
    perturb(net, 0), perturb(twin, 1)
    for p in net.parameters():
        p.grad = torch.ones_like(p) * p.detach()
    optimizer.step()


def save(world: World, folder: str) -> None:
    parts = training_parts(world)
    fill(*parts)
    saver = CheckpointManager(Path(folder), RetentionPolicy(), world)
    saver.begin(7, state.training_state(parts[0], {"ema": parts[1]}, parts[2]))
    perturb(parts[0], 2), perturb(parts[1], 3)  # training goes on: the file must hold the copy
    assert saver.finish() == Path(folder) / "step_00000007"


def load(world: World, folder: str) -> dict[str, torch.Tensor]:
    net, twin, optimizer = training_parts(world)
    assert state.load(Path(folder) / "step_00000007", net, {"ema": twin}, optimizer) == 7
    moments = {name: optimizer.state[p]["exp_avg"] for name, p in net.named_parameters()}
    found = {f"net.{n}": p for n, p in net.named_parameters()} | {f"ema.{n}": p for n, p in twin.named_parameters()}
    found |= {f"moment.{n}": m for n, m in moments.items()}
    return {name: tensor.full_tensor().detach().clone() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    on_ranks(2, save, str(folder))
    return folder


def test_moments_go_on_with_the_settings_of_the_config(folder, alone):
    net, twin, _ = training_parts(alone)
    asked = {"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.5}
    optimizer = torch.optim.AdamW(net.parameters(), fused=True, **asked)
    state.load(folder / "step_00000007", net, {"ema": twin}, optimizer)
    assert {name: optimizer.param_groups[0][name] for name in asked} == asked
    assert all(fsdp.local(state["exp_avg"]).any() for state in optimizer.state.values())


@pytest.mark.parametrize("size", [1, 2])
def test_resume_on_another_number_of_ranks(folder, size):
    found = on_ranks(size, load, str(folder))
    net, twin = small_net(), small_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    fill(net, twin, optimizer)
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[f"net.{name}"], p.detach(), rtol=0, atol=1e-7)
        torch.testing.assert_close(found[f"moment.{name}"], optimizer.state[p]["exp_avg"], rtol=0, atol=1e-7)
    for name, p in twin.named_parameters():
        assert torch.equal(found[f"ema.{name}"], p.detach())


def test_plain_weights_of_either_kind(folder):
    expected, net = small_net(), small_net()
    perturb(expected, 1)
    assert state.load_weights(folder / "step_00000007", net, "ema") == 7
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), expected.parameters(), strict=True))
    state.load_weights(folder / "step_00000007", net, "live")
    assert not torch.equal(net.out.weight, expected.out.weight)


def truncate(path: Path) -> None:
    data = (path / "__0_0.distcp").read_bytes()
    (path / "__0_0.distcp").write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    data = bytearray((path / "__1_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "__1_0.distcp").write_bytes(data)


def flip_marker(path: Path) -> None:
    """7 processes instead of 3, or another digit: still JSON."""
    data = (path / verify.MARKER).read_bytes()
    place = data.index(b'"processes": ') + len(b'"processes": ')
    (path / verify.MARKER).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


DAMAGES = {
    "progress.json: No such file": lambda path: (path / verify.MARKER).unlink(),
    ".metadata: No such file": lambda path: (path / ".metadata").unlink(),
    "__0_0.distcp has ": truncate,
    "the checksum of __1_0.distcp is wrong": flip,
    "progress.json cannot be read: its checksum is wrong": flip_marker,
    "progress.json cannot be read: Unterminated string": lambda path: (path / verify.MARKER).write_text(
        '{"step": 8, "fil'
    ),
    "progress.json is for step 7": lambda path: None,  # a folder under another's name
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(problem, alone, folder, tmp_path, capsys):
    good, bad = tmp_path / "step_00000007", tmp_path / "step_00000008"
    shutil.copytree(folder / "step_00000007", good)
    shutil.copytree(good, bad)
    if "is for step" not in problem:
        verify.write_marker(bad, verify.read_marker(bad) | {"step": 8})
    DAMAGES[problem](bad)
    (tmp_path / "step_00000009.partial").mkdir()
    assert verify.newest_valid(tmp_path, alone) == good
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{bad}: damaged, skipped ({problem}")
    assert bad.is_dir()
    shutil.rmtree(good)
    with pytest.raises(UserError, match="all checkpoints are damaged"):
        verify.newest_valid(tmp_path, alone)


def test_what_a_user_names_is_found(folder, tmp_path):
    broken = tmp_path / "step_00000007"
    shutil.copytree(folder / "step_00000007", broken)
    truncate(broken)
    with pytest.raises(UserError, match=r"incomplete checkpoint \(__0_0.distcp has"):
        verify.find(broken)
    assert verify.latest(tmp_path) is None
    with pytest.raises(UserError, match="contains no complete checkpoint"):
        verify.find(tmp_path)
    with pytest.raises(UserError, match="no such checkpoint directory"):
        verify.find(tmp_path / "nowhere")
    assert verify.find(folder) == verify.find(folder / "step_00000007") == folder / "step_00000007"


def test_another_architecture_is_refused_in_one_line(folder):
    net = small_net()
    net.out = torch.nn.Linear(48, 9)
    with pytest.raises(UserError, match=r"ema.out.weight is \(9, 48\), the checkpoint has \(8, 48\)"):
        state.load_weights(folder / "step_00000007", net, "ema")
    net.extra = torch.nn.Linear(1, 1)
    net.out = torch.nn.Linear(48, 8)
    with pytest.raises(UserError, match=r"ema.extra.weight is \(1, 1\), the checkpoint does not have it"):
        state.load_weights(folder / "step_00000007", net, "ema")
