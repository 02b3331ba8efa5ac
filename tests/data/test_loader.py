"""The loader: batches from worker processes, and one line for each kind of failure."""

import os
import pickle
import signal
from types import SimpleNamespace

import pytest
import torch

from selfe.data import loader
from selfe.data.loader import MicroBatches, make_loader, raise_if_error
from selfe.data.shapes import ShapesData
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.types import Batch, StoredCaptions

ALONE = World(0, 1, torch.device("cpu"))


def batches(num_workers: int, data: ShapesData | None = None, **options):
    part = MicroBatches(
        data or ShapesData(), 0, lambda step: range(8 * step, 8 * step + 8), 8, 2, ALONE, "train", **options
    )
    return make_loader(part, [(step, 0) for step in range(50)], num_workers)


class Killed(ShapesData):
    """Its worker process is killed in step 3."""

    def batch(self, seed, step, *rest) -> Batch:
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(seed, step, *rest)


def test_a_killed_worker_is_one_line():
    before = signal.getsignal(signal.SIGCHLD)
    items = batches(1, Killed())
    assert signal.getsignal(signal.SIGCHLD) == before  # nothing is raised but by the loader
    with pytest.raises(UserError) as raised:
        list(map(raise_if_error, items))
    assert str(raised.value) == (
        "data worker of rank 0 was ended by SIGKILL (often: out of memory); lower trainer.num_workers"
    )


def test_too_little_shared_memory_is_one_line_at_the_first_batch(monkeypatch):
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    needed = 2 * (2 * 2 + 1) * 8 * 3 * 8 * 8 * 4  # processes x (ahead x workers + 1) x bytes of a batch
    assert needed > 10_000
    message = rf"workers need {needed / 1e6:.1f} MB of /dev/shm, which has 0.0; .*--ipc=host"
    with pytest.raises(UserError, match=message):
        raise_if_error(next(batches(2)))
    raise_if_error(next(batches(0)))  # needs none


def test_a_failure_to_share_memory_is_returned(monkeypatch):
    def full(self) -> None:
        raise RuntimeError("No space left on device (28)")

    monkeypatch.setattr(Batch, "share_memory_", full)
    with pytest.raises(UserError, match=r"/dev/shm is full \(No space left .*--ipc=host .* lower trainer.num_workers"):
        raise_if_error(next(batches(1)))


def test_batches_are_one_tensor_in_workers_and_the_same_as_without(monkeypatch):
    def read(prompts, positions, step) -> StoredCaptions:
        lens = tuple(range(1, len(prompts) + 1))
        return StoredCaptions(tuple(prompts), torch.arange(float(sum(lens)))[:, None], lens, torch.eye(len(prompts)))

    for here, there in zip(batches(0, read_captions=read), batches(2, read_captions=read), strict=True):
        assert there.flat.is_shared()
        assert all(image.untyped_storage().data_ptr() == there.flat.data_ptr() for image in there.images)
        assert all(torch.equal(a, b) for a, b in zip(here.images, there.images, strict=True))
        assert (here.prompts, here.positions, here.names) == (there.prompts, there.positions, there.names)
        assert here.text.captions == there.text.captions == here.prompts
        assert torch.equal(here.text.tokens, there.text.tokens)
        cond = there.text.to(torch.device("cpu"))
        assert cond.text.lens == here.text.lens
        assert torch.equal(cond.pooled, torch.eye(8))


def test_a_batch_is_pinned_and_copied_as_one_tensor(monkeypatch):
    images = (torch.arange(12, dtype=torch.uint8).view(3, 2, 2), torch.full((3, 4, 2), 255, dtype=torch.uint8))
    text = StoredCaptions(("a",), torch.ones(2, 3), (2,), torch.ones(1, 3))
    batch = Batch(images, ("a", "b"), (0, 1), ("x", "y"), text=text)
    pinned, copied = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(tuple(self.shape)) or self.clone())
    result = batch.pin_memory()
    assert pinned == [(36,), (2, 3), (1, 3)]
    monkeypatch.setattr("selfe.types.to_device", lambda host, device: copied.append(tuple(host.shape)) or host)
    on_device = result.to(torch.device("cpu"))
    assert copied == [(36,)]
    for image, expected in zip(on_device.images, images, strict=True):
        assert torch.equal(image, expected.float() / 127.5 - 1)
    again = pickle.loads(pickle.dumps(batch))
    assert all(torch.equal(a, b) for a, b in zip(again.images, images, strict=True))
    assert torch.equal(again.text.tokens, text.tokens)


def test_stored_features_travel_with_the_images():
    latents = tuple(torch.randn(rows, 3, 4).bfloat16() for rows in (1, 2))
    features = tuple(torch.randn(rows, 3, 6).bfloat16() for rows in (1, 2))
    batch = Batch(latents, ("a", "b"), (0, 1), ("x", "y"), features=features)
    assert batch.num_bytes == 2 * 9 * (4 + 6)
    for copy in (pickle.loads(pickle.dumps(batch)), batch.to(torch.device("cpu"))):
        assert all(torch.equal(a, b) for a, b in zip(copy.images, latents, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(copy.features, features, strict=True))
        assert copy.features[1].untyped_storage().data_ptr() == copy.flat.untyped_storage().data_ptr()


def test_batches_are_pinned_for_accelerators_only(monkeypatch):
    asked = []
    monkeypatch.setattr(loader, "DataLoader", lambda part, pin_memory, **rest: asked.append(pin_memory) or iter(()))
    for device in ("cpu", "cuda"):
        make_loader(MicroBatches(ShapesData(), 0, range, 8, 2, World(0, 1, torch.device(device)), "train"), [], 0)
    assert asked == [False, True]
