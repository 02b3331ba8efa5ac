"""A sampling job: the same images for any batch, order and number of processes, and after any interruption."""

import copy
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfe import config, infer, log
from selfe.checkpoint import state
from selfe.checkpoint.manager import CheckpointManager, RetentionPolicy
from selfe.distributed import collectives
from selfe.errors import UserError
from selfe.inference import job
from selfe.io import image_encode
from selfe.io.folder_lock import FolderLock
from tests.distributed.test_fsdp import perturb
from tests.helpers import infer_processes

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/debug/selfe_smoke.yaml")
STAND_INS = [f"system.{part}.params.skip_pretrained=true" for part in ("text_encoder", "autoencoder")]
PROMPTS = [f"image {i} of {'many ' * (i % 4)}things" for i in range(24)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of the smoke system away from its zeros."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    save_checkpoint(folder, seed=0)
    return folder


def save_checkpoint(folder: Path, seed: int, step: int = 12) -> None:
    system = config.build(config.load(SMOKE, STAND_INS), "system")
    net, twin = system.backbone, copy.deepcopy(system.backbone)
    perturb(net, seed), perturb(twin, seed + 1)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.step()
    with collectives.process_group() as world:
        saver = CheckpointManager(folder, RetentionPolicy(), world)
        saver.begin(step, state.training_state(net, {"ema": twin}, optimizer))
        saver.finish()


def arguments(trained: Path, output: Path, *overrides: str, texts: Sequence[str] = PROMPTS) -> list[str]:
    """Of `selfe.infer`: small images of the prompts in 1, 2 and 4 steps."""
    prompts = output.parent / f"{output.name}.txt"
    prompts.write_text("\n".join(texts))
    job = {
        "ckpt_dir": trained,
        "output_dir": output,
        "batch_size": 8,
        "gallery": False,
        "defaults.prompt_file": prompts,
    }
    job |= {"defaults.num_steps": [1, 2, 4], "defaults.height": 32, "defaults.width": 48}
    return [SMOKE, *STAND_INS, *(f"inferencer.{key}={value}" for key, value in job.items()), *overrides]


def draw(trained: Path, output: Path, *overrides: str) -> list[dict]:
    infer.main(arguments(trained, output, *overrides))
    return records(output)


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metadata.jsonl").read_text().splitlines()]


def wait(processes: list) -> None:
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.png")}


def furthest(a: Path, b: Path, names: set[str]) -> int:
    pixels = [[np.asarray(Image.open(folder / name), dtype=int) for name in sorted(names)] for folder in (a, b)]
    return max(np.abs(x - y).max() for x, y in zip(*pixels, strict=True))


@pytest.fixture(scope="module")
def reference(trained, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "images"
    torch.set_num_threads(1)
    draw(trained, output)
    return output


def test_every_image_is_there_and_says_how_it_was_drawn(reference):
    lines = records(reference)
    assert [(line["prompt"], line["num_steps"]) for line in lines] == [(p, n) for p in PROMPTS for n in (1, 2, 4)]
    found = files(reference)
    assert found.keys() == {line["file"] for line in lines}
    assert len(set(found.values())) == 72
    for line in lines:
        inside = image_encode.read_record(reference / line["file"])
        assert line == {"file": line["file"], "checkpoint": line["checkpoint"]} | inside
        assert (inside["seed"], inside["sample"], inside["sampler"], inside["eta"]) == (0, 0, "renoise", 1.0)
        assert len(inside["fingerprint"]) == 16


def test_the_same_images_on_two_processes_in_other_batches_and_orders(trained, reference, tmp_path):
    wait(infer_processes.start(2, arguments(trained, tmp_path / "two")))
    assert files(tmp_path / "two") == files(reference)  # the batches are the same: to the byte
    lines = random.Random(0).sample(PROMPTS, 8)
    infer.main(arguments(trained, tmp_path / "shuffled", "inferencer.batch_size=1", texts=lines))
    assert [line["prompt"] for line in records(tmp_path / "shuffled")][::3] == lines
    names = {line["file"] for line in records(reference) if line["prompt"] in lines}
    assert files(tmp_path / "shuffled").keys() == names
    assert furthest(tmp_path / "shuffled", reference, names) <= 1


def test_compiled_blocks_draw_the_same_images(trained, reference, tmp_path, traced):
    found = torch._dynamo.utils.counters["stats"]
    before = found["unique_graphs"]
    lines = PROMPTS[:8]  # two batches of other lengths
    infer.main(
        arguments(trained, tmp_path / "compiled", "inferencer.compile=true", "inferencer.batch_size=4", texts=lines)
    )
    assert found["unique_graphs"] > before
    names = {line["file"] for line in records(reference) if line["prompt"] in lines}
    assert files(tmp_path / "compiled").keys() == names
    assert furthest(tmp_path / "compiled", reference, names) <= 1


def test_killed_three_times_and_gone_on_with(trained, reference, tmp_path):
    output, chance = tmp_path / "images", random.Random(0)
    command = arguments(trained, output)
    seen: dict[str, tuple] = {}
    for size in (1, 2, 1):
        processes = infer_processes.start(size, command)
        goal, deadline = len(seen) + chance.randint(3, 8), time.monotonic() + 60
        while len(list(output.glob("*.png"))) < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.random() / 20)

        for process in processes:  # all at the same moment, or one could end for want of the other
            os.kill(process.pid, signal.SIGSTOP)
        for process in processes:
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL

        # what is there stays, and the killed processes have left no half images under a final name
        there = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in output.glob("*.png")}
        assert goal <= len(there) < 72
        assert there.items() >= seen.items()  # nothing is drawn twice: a file that is there stays what it is
        if not seen:
            assert_all_but_the_running_batch(command, set(there))
        seen = there

    # the same command finishes the job
    (output / "half.png.partial").write_bytes(b"half")
    wait(infer_processes.start(2, command))
    last = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in output.glob("*.png")}
    assert last.items() >= seen.items()
    assert not list(output.rglob("*.partial"))
    assert records(output) == records(reference)
    expected, found = files(reference), files(output)
    differ = {name for name in expected if expected[name] != found[name]}
    assert expected.keys() == found.keys()
    assert len(differ) <= 4 * 8  # at most the four batches that were cut by a kill, on one or two processes
    assert not differ or furthest(output, reference, differ) <= 1


def assert_all_but_the_running_batch(words: list[str], there: set[str]) -> None:
    """One process draws batch after batch; what is there is all of the finished ones, and no more than the next."""
    inferencer = config.build(config.load(words[0], words[1:]), "inferencer")
    todo = job.plan(inferencer.requests(16), inferencer.kinds, "flat", ".png")
    (mine,) = job.share(job.make_batches(todo, 8, inferencer.batch_pixels, 1), 1)
    counts = [len({spec.file for spec in batch} & there) for batch in mine]
    whole = next(i for i, count in enumerate(counts) if count < 8)
    assert not any(counts[whole + 1 :])


def test_calls_are_counted(trained, tmp_path):
    """N calls for N steps, both halves of guidance in one; each text once; one decode for a batch."""
    words = arguments(trained, tmp_path / "images", "inferencer.defaults.num_samples=2", texts=PROMPTS[:8])
    words += ["inferencer.defaults.num_steps=[1,4]", "inferencer.defaults.cfg_scale=[1,5]"]
    settings = config.load(words[0], words[1:])
    with torch.device("meta"):
        system = config.build(settings, "system")
    rows, decoded, captions = [], [], Counter()
    system.backbone.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    system.autoencoder.net["decoder"].register_forward_pre_hook(lambda _, inputs: decoded.append(len(inputs[0])))
    encode_each = system.text_encoder.encode_each
    system.text_encoder.encode_each = lambda texts: captions.update(texts) or encode_each(texts)
    with collectives.process_group() as world:
        config.build(settings, "inferencer").run(system, world, settings)
    batches = 8 * 2 // 8
    assert Counter(rows) == {8: batches * (1 + 4), 16: batches * (1 + 4)}
    assert captions == Counter([*PROMPTS[:8], ""])
    assert decoded == [8] * (4 * batches)
    assert len(records(tmp_path / "images")) == 8 * 2 * 2 * 2
    noise_alike = {(line["sample"], line["num_steps"]): line["file"] for line in records(tmp_path / "images")[:8]}
    assert len(noise_alike) == 4

    rows.clear()
    with collectives.process_group() as world:
        config.build(settings, "inferencer").run(system, world, settings)
    assert rows == []
    assert captions == Counter([*PROMPTS[:8], ""])


def test_a_job_may_grow_and_other_settings_go_to_a_folder_of_their_own(trained, tmp_path, monkeypatch):
    output = tmp_path / "images"
    one = ["inferencer.prompts=[a b]", "inferencer.defaults.num_steps=[1]"]
    draw(trained, output, *one)
    first = files(output)
    more = ["inferencer.prompts=[c, a b]", "inferencer.defaults.num_steps=[1,2]", "inferencer.weights=both"]
    assert len(draw(trained, output, *more)) == 8
    grown = files(output)
    printed: list[str] = []
    monkeypatch.setattr(log, "print_line", printed.append)
    assert grown.items() > first.items()

    def sub_folder(*overrides: str) -> tuple[str, str]:
        """The difference that is reported, and the name of the folder with the images of the job."""
        printed.clear()
        infer.main(arguments(trained, output, *more, *overrides))
        difference, _, path = "\n".join(printed[:-1]).partition("; the images of this job are in ")
        folder = Path(path)
        assert folder.parent == output
        assert files(output) == grown
        assert set(job.existing_images(folder)) == {line["file"] for line in records(folder)}
        assert config.load(folder / "config.yaml")["inferencer"]["output_dir"] == folder
        return difference, folder.name

    # other settings, and the same job again, which has nothing left to generate
    difference, name = sub_folder("inferencer.defaults.cfg_scale=3")
    assert "cfg_scale 5.0, this job has 3.0" in difference
    assert name == "cfg_scale_3"
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/*.png")}
    assert sub_folder("inferencer.defaults.cfg_scale=3") == (difference, "cfg_scale_3")
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/*.png")} == before

    # other weights
    other = tmp_path / "other"
    save_checkpoint(other, seed=5)
    assert "ema_fingerprint" in sub_folder(f"inferencer.ckpt_dir={other}")[0]

    with (
        FolderLock(output, "inferencer.output_dir", lost=pytest.fail),
        pytest.raises(UserError, match=f"another process is writing to it: process {os.getpid()} on "),
    ):
        draw(trained, output, *more)


def test_two_sampler_classes_of_one_file_make_images_of_their_own(trained, tmp_path):
    output = tmp_path / "images"
    output.mkdir()
    lines: dict[str, list[dict]] = {}
    for name in ("Forward", "Midpoint"):
        sampler = f"inferencer.defaults.sampler={{module: tests.helpers.samplers.{name}}}"
        draw(trained, output / name, "inferencer.prompts=[a]", sampler)
        table = f"inferencer.defaults.samplers={{one: {{module: tests.helpers.samplers.{name}}}}}"
        file = tmp_path / f"{name}.jsonl"
        file.write_text('{"prompt": "a", "sampler": "one"}\n{"prompt": "a", "sampler": "euler"}')
        prompts = ["inferencer.prompts=[]", f"inferencer.defaults.prompt_file={file}"]
        lines[name] = draw(trained, output / f"{name} by line", *prompts, table)

    for name in lines:
        direct = records(output / name)
        assert [line["sampler"] for line in direct] == [f"tests.helpers.samplers.{name}"] * 3
        assert [line["sampler"] for line in lines[name]] == [f"tests.helpers.samplers.{name}"] * 3 + ["euler"] * 3
        assert [line["file"] for line in lines[name][:3]] == [line["file"] for line in direct]

    # Forward is Euler's method under another name; Midpoint is not
    forward, midpoint = files(output / "Forward by line"), files(output / "Midpoint by line")
    pixels = [
        [np.asarray(Image.open(folder / line["file"])) for line in lines[name]]
        for name, folder in (("Forward", output / "Forward by line"), ("Midpoint", output / "Midpoint by line"))
    ]
    assert (len(forward), len(midpoint), len(forward.keys() & midpoint.keys())) == (6, 6, 3)
    assert all((a == b).all() for a, b in zip(pixels[0][:3], pixels[0][3:], strict=True))
    assert not any((a == b).all() for a, b in zip(pixels[1][:3], pixels[1][3:], strict=True))

    # the second class into the folder of the first is a job of its own
    both = output / "Forward"
    draw(
        trained, both, "inferencer.prompts=[a]", "inferencer.defaults.sampler={module: tests.helpers.samplers.Midpoint}"
    )
    assert files(both / "sampler_tests.helpers.samplers.Midpoint") == files(output / "Midpoint")


def test_negative_prompts_settings_of_a_line_and_sizes(trained, tmp_path):
    lines = [
        {"prompt": "a cat"},
        {"prompt": "a cat", "negative_prompt": "a dog"},
        {"prompt": "a cat", "num_steps": [1, 3], "cfg_scale": 1, "sampler": "euler", "height": 48, "width": 32},
        {"prompt": "a cat", "seed": 3, "eta": 0, "s_ratio": [0, 0.5], "num_samples": 2, "aspect": "2:1"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = draw(trained, tmp_path / "a", f"inferencer.defaults.prompt_file={file}", "inferencer.defaults.num_steps=2")
    assert [line["num_steps"] for line in found] == [2, 2, 1, 3, 2, 2, 2, 2]
    assert [line["sampler"] for line in found] == ["renoise"] * 2 + ["euler"] * 2 + ["renoise"] * 4
    assert [line.get("eta") for line in found] == [1.0, 1.0, None, None, 0.0, 0.0, 0.0, 0.0]
    sizes = [Image.open(tmp_path / "a" / line["file"]).size for line in found]
    assert sizes == [(48, 32)] * 2 + [(32, 48)] * 2 + [(48, 32)] * 4
    assert len({(tmp_path / "a" / line["file"]).read_bytes() for line in found}) == 8
    # the null prompt is the negative prompt's default
    again = draw(trained, tmp_path / "b", "inferencer.prompts=[a cat]", "inferencer.defaults.num_steps=2")
    assert furthest(tmp_path / "a", tmp_path / "b", {again[0]["file"]}) <= 1


def test_layouts_that_evaluators_read(trained, tmp_path):
    said = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text(json.dumps(said) + "\n" + json.dumps(said | {"prompt": "a photo of a cow"}) + "\n")
    job = [f"inferencer.defaults.prompt_file={file}", "inferencer.defaults.num_samples=2"]
    draw(trained, tmp_path / "geneval", *job, "inferencer.layout=geneval", "inferencer.defaults.num_steps=[1,2]")
    home = tmp_path / "geneval" / "ema_steps02_cfg5_s0_renoise_1"
    assert sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()) == [
        f"{i:05d}/{name}" for i in range(2) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    assert json.loads((home / "00000/metadata.jsonl").read_text()) == said
    assert image_encode.read_record(home / "00001/samples/0001.png")["prompt"] == "a photo of a cow"
    with pytest.raises(UserError, match=r"cfg_scale 5.0, this job has 1.0"):
        draw(trained, tmp_path / "geneval", *job, "inferencer.layout=geneval", "inferencer.defaults.cfg_scale=1")

    found = draw(trained, tmp_path / "npz", *job, "inferencer.layout=npz", "inferencer.defaults.num_steps=[2]")
    arrays = np.load(tmp_path / "npz" / "ema_steps02_cfg5_s0_renoise_1.npz")
    assert arrays.files == ["arr_0"]
    expected = [np.asarray(Image.open(tmp_path / "npz" / line["file"])) for line in found]
    assert arrays["arr_0"].dtype == np.uint8
    assert (arrays["arr_0"] == np.stack(expected)).all()
    for kind, suffix in (("jpeg", "jpg"), ("webp", "webp")):
        lines = draw(trained, tmp_path / kind, *job, f"inferencer.format={kind}", "inferencer.defaults.num_steps=[2]")
        for i, line in enumerate(lines):
            path = tmp_path / kind / line["file"]
            assert path.suffix == f".{suffix}"
            assert image_encode.read_record(path)["prompt"] == line["prompt"]
            errors = [np.abs(np.asarray(Image.open(path), dtype=int) - pixels).mean() for pixels in expected]
            assert min(errors) == errors[i] < 20 < sorted(errors)[1]


def test_mistakes_stop_before_any_weight_is_loaded(tmp_path):
    nowhere = tmp_path / "no checkpoint"
    for overrides, words in (
        (["inferencer.prompts=['']"], r"inferencer.prompts\[0\]: prompt: must not be empty"),
        (["inferencer.prompts=[a]", "inferencer.defaults.height=33"], "33 is not a multiple of 16"),
        (["inferencer.defaults.prompt_file=null"], "no prompts; give a list"),
        (["inferencer.layout=geneval", "inferencer.format=webp"], "geneval needs png"),
        (["inferencer.defaults.num_steps=0"], "num_steps: 0 is not between"),
        (["inferencer.defaults.cfg_scale=[]"], "cfg_scale: the list is empty"),
        (["inferencer.prompts=[a]"], "no such checkpoint directory"),
    ):
        with pytest.raises(UserError, match=words):
            infer.main(arguments(nowhere, tmp_path / "images", *overrides))
    assert not (tmp_path / "images").exists()
