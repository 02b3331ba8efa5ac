"""A FLUX file fills sharded denoisers. Apart from test_flux.py because its processes need no diffusers."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from selfe.backbones.mmdit import MMDiT
from selfe.checkpoint import flux
from selfe.checkpoint.flux import FluxStateDict
from selfe.distributed import fsdp
from selfe.distributed.collectives import World
from tests.helpers.ranks import on_ranks
from tests.method.test_mmdit import inputs, small


def written(net: MMDiT, style: str) -> dict[str, torch.Tensor]:
    """Every parameter as the other format has it."""
    width = net.image_in.out_features
    parts = [flux.split(style, name, p.detach(), width) for name, p in net.named_parameters()]
    return {name: tensor.clone() for part in parts for name, tensor in part.items()}


def warm_started(world: World, path: str) -> dict[str, torch.Tensor]:
    """The second clock starts at random, then the file takes over."""
    with torch.device("meta"):
        net, twin = small(dtype=torch.float32), small(dtype=torch.float32)
    for module in (net, twin):
        fsdp.shard(module, fsdp.make_mesh(world, None), precision="fp32", activation_checkpointing=False)
        fsdp.materialise(module, world.device, seed=0)
    flux.warm_start(Path(path), net, twin)
    same = [
        torch.equal(a.full_tensor(), b.full_tensor()) for a, b in zip(net.parameters(), twin.parameters(), strict=True)
    ]
    return {name: p.full_tensor().detach() for name, p in net.named_parameters()} | {"twins": torch.tensor(same)}


def test_warm_start_on_two_ranks(tmp_path):
    """FLUX.1-dev's file knows guidance and no second clock: the one is reported, the other has no effect at first."""
    from_file = small(seed=5, dtype=torch.float32, s_branch=False)
    path = tmp_path / "flux1-dev.safetensors"
    save_file(written(from_file, "bfl") | {"guidance_in.in_layer.weight": torch.zeros(48, 256)}, path)
    found = on_ranks(2, warm_started, path)
    assert found.pop("twins").all()
    net = small(dtype=torch.float32)
    net.load_state_dict(found)
    x, t, s, cond = inputs(torch.float32)
    torch.testing.assert_close(net(x, t, s, cond), from_file(x, t, s, cond), rtol=0, atol=1e-5)
    assert net.s_in[0].weight.abs().max() > 0  # the first layer is alive, so the second can learn

    matched = FluxStateDict.of(path, {n: p.shape for n, p in net.named_parameters()})
    assert matched.left_over == ("guidance_in.in_layer.weight",)
    assert set(matched.missing) == {f"s_in.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    names = set(matched.report().splitlines())
    assert names >= {*matched.used, *matched.missing, *matched.left_over}
