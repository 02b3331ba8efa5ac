"""The arithmetic of a job: names, batches, shares, texts kept; and decoding within a memory bound."""

from itertools import pairwise

import pytest
import torch
from PIL import Image

from selfe.encoders.flux_vae import FluxVAE, patchify, starts
from selfe.errors import UserError
from selfe.inference import job
from selfe.inference.job import make_batches, plan, share
from selfe.inference.prompts import Request, SamplingDefaults
from selfe.io import image_encode
from selfe.samplers.euler import Euler
from selfe.samplers.heun import Heun
from selfe.samplers.renoise import Renoise
from tests.helpers import samplers


def requests(*prompts: str, **settings) -> list[Request]:
    return [Request(prompt, SamplingDefaults(**settings), f"line {i}") for i, prompt in enumerate(prompts)]


def test_names_hold_what_decides_the_pixels():
    (a,) = plan(requests("A red bird, on a branch!", num_steps=4), ["ema"], "flat", ".png")
    assert a.file.startswith("a-red-bird-on-a-branch_00_")
    assert a.file.endswith("_steps04.png")
    changes = [
        *({"seed": 1}, {"height": 128}, {"width": 128}, {"cfg_scale": 2.0}, {"s_ratio": 0.5}, {"first_sample": 1}),
        *({"negative_prompt": "blurry"}, {"sampler": Euler()}),
    ]
    others = [plan(requests(a.prompt, num_steps=4, **change), ["ema"], "flat", ".png")[0].file for change in changes]
    others += [
        plan(requests(prompt, num_steps=4), ["ema"], "flat", ".png")[0].file for prompt in ("鳥", "🐦", a.prompt + ".")
    ]
    others += [spec.file for spec in plan(requests(a.prompt, num_steps=(1, 2)), ["live"], "flat", ".png")]
    assert len({a.file, *others}) == 1 + len(others)
    (again,) = plan(requests(a.prompt, num_steps=4), ["ema"], "flat", ".png")
    assert again.file == a.file


def test_file_names_of_shipped_samplers_and_identity_of_others():
    def spec(sampler) -> job.ImageSpec:
        return plan(requests("a", num_steps=4, sampler=sampler), ["ema"], "flat", ".png")[0]

    # names as they have always been
    assert (spec(Renoise()).file, spec(Renoise()).group) == (
        "a_00_6a19039cec72_steps04.png",
        "ema_steps04_cfg5_s0_renoise_1",
    )
    assert (spec(Euler()).file, spec(Euler()).group) == ("a_00_0397035b3db3_steps04.png", "ema_steps04_cfg5_s0_euler")

    # classes of one file and parameters that are text
    others = [samplers.Forward(), samplers.Midpoint(), samplers.Named(), samplers.Named("a/b"), samplers.Named("a b")]
    assert len({spec(sampler).file for sampler in others}) == len({spec(sampler).group for sampler in others}) == 5
    assert all("/" not in spec(sampler).group for sampler in others)
    assert spec(samplers.Named("a/b")).record()["schedule"] == "a/b"
    with pytest.raises(UserError, match=r"samplers.Seeded: its parameter seed has the name of another setting"):
        spec(samplers.Seeded())

    # values that agree in six digits
    assert spec(Renoise(eta=0.5)).group != spec(Renoise(eta=0.50000001)).group


def test_other_settings_go_to_a_folder_of_their_own(tmp_path):
    facts = {"step": 12, "ema_fingerprint": "a1", "precision": "fp32", "format": "png", "layout": "flat"}

    def run(changed: dict | None = None, prompts=("a", "b"), layout="flat", **settings) -> tuple[str, str]:
        """The name of the folder of a job with these changes, and why; writes the job's images."""
        todo = plan(requests(*prompts, **{"num_steps": (1, 2)} | settings), ["ema"], layout, ".png")
        folder, difference = job.choose_folder(tmp_path, facts | (changed or {}), todo, layout)
        with job.opened(folder, facts | (changed or {}), todo, layout, lost=pytest.fail):
            for spec in todo:
                image_encode.save(Image.new("RGB", (8, 8)), folder / spec.file, "png", spec.record())
        return folder.relative_to(tmp_path).as_posix(), difference

    assert run() == run() == (".", "")
    assert run(prompts=("c", "a", "b"), num_steps=(4, 1, 2)) == (".", "")  # extended
    all_of_it = {"prompts": ("c", "a", "b"), "num_steps": (4, 1, 2)}
    for name, changed, settings, difference in (
        ("cfg_scale_3", {}, {"cfg_scale": 3.0}, "cfg_scale 5.0, this job has 3.0"),
        ("cfg_scale_3_2.5", {}, {"cfg_scale": (3.0, 2.5)}, "cfg_scale 5.0, this job has 3.0"),
        ("seed_1_eta_0.5", {}, {"seed": 1, "sampler": Renoise(eta=0.5)}, "seed 0, this job has 1, eta 1.0"),
        ("prompts", {}, {"prompts": ("a", "b")}, "prompt 'c', which this job lacks"),
        ("prompts_2", {}, {"prompts": ("d",)}, "which this job lacks"),
        ("num_steps_8", {}, {"num_steps": 8}, "this job has 8"),
        ("step_24", {"step": 24, "ema_fingerprint": "b2"}, {}, "step 12, this job has 24"),
        ("precision_bf16", {"precision": "bf16"}, {}, "precision 'fp32', this job has 'bf16'"),
    ):
        for _ in range(2):  # the same job again is in the same folder
            folder, text = run(changed, **all_of_it | settings)
            assert folder == name
            assert difference in text

    assert job.folder_name({"negative_prompt": ["blurry, dark"], "cfg_scale": list(range(100))}) == "settings"

    # what evaluators read is in the folder itself or not at all
    with pytest.raises(UserError, match=r"layout 'flat', this job has 'geneval'; set another inferencer.output_dir"):
        run({"layout": "geneval"}, layout="geneval")


def test_a_prompt_given_again_is_another_sample():
    found = plan(requests("a", "b", "a", num_samples=2, num_steps=4), ["ema"], "flat", ".png")
    assert [(p.prompt, p.sample) for p in found] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3)]
    (first, *_), (second, *_) = (plan(requests("a", num_steps=n), ["ema"], "flat", ".png") for n in (4, (4, 8)))
    assert first.file == second.file


def test_absurd_jobs_are_refused():
    with pytest.raises(UserError, match=r"line 1: more than 2,000,000 images"):
        plan(requests("a", "b", num_samples=100_000, num_steps=tuple(range(1, 20))), ["ema"], "flat", ".png")


def test_batches_hold_one_group_and_no_more_than_the_budget():
    sizes = [(256, 256), (512, 512), (256, 512)]
    asked = [Request(f"p{i}", SamplingDefaults(height=h, width=w), "") for i in range(40) for h, w in [sizes[i % 3]]]
    todo = plan(asked, ["ema", "live"], "flat", ".png")
    made = make_batches(todo, 8, 4 * 512 * 512, 1)
    assert sorted(p.file for batch in made for p in batch) == sorted(p.file for p in todo)
    for batch in made:
        assert len({p.group for p in batch}) == 1
        assert len(batch) <= 8
        assert sum(p.height * p.width for p in batch) <= 4 * 512 * 512
    assert len(make_batches(todo, 8, 1, 1)) == len(todo)  # an image above the budget is a batch of its own
    assert make_batches(todo, 8, 4 * 512 * 512, 4) == made  # large enough: the same for any number of processes
    assert len(make_batches(todo[:5:5], 8, 512 * 512, 4)) == 1
    few = plan(requests(*"abcdefgh", num_steps=4), ["ema"], "flat", ".png")
    assert [len(batch) for batch in make_batches(few, 16, 10**9, 4)] == [2] * 4  # else nobody waits for one


@pytest.mark.parametrize("processes", [1, 3, 8])
def test_no_process_waits_long(processes):
    asked = [
        Request(f"p{i}", SamplingDefaults(height=256 * (1 + i % 2), num_steps=(1, 2, 4, 8, 50)), "") for i in range(300)
    ]
    made = make_batches(plan(asked, ["ema"], "flat", ".png"), 8, 10**9, processes)
    shares = share(made, processes)
    assert sorted(id(batch) for part in shares for batch in part) == sorted(map(id, made))
    loads = [sum(p.cost() for batch in part for p in batch) for part in shares]
    assert max(loads) < 1.05 * sum(loads) / processes
    for part in shares:  # the steps of the same prompts follow each other on the same process
        prompts = [tuple(p.prompt for p in batch) for batch in part]
        assert sum(a != b for a, b in pairwise(prompts)) == len(set(prompts)) - 1


def test_an_interval_of_guidance_and_its_cost_are_recorded_only_if_they_are_set():
    settings = {"num_steps": (4,), "cfg_scale": 5.0, "s_ratio": 1.0}
    (plain,) = job.plan(requests("a", **settings), ("ema",), "flat", ".png")
    (inside,) = job.plan(requests("a", **settings, guidance_interval=(0.5, 1.0)), ("ema",), "flat", ".png")
    (heun,) = job.plan(requests("a", **settings, sampler=Heun()), ("ema",), "flat", ".png")
    assert [spec.nfe for spec in (plain, inside, heun)] == [8, 7, 14]
    assert [spec.record().get("nfe") for spec in (plain, inside, heun)] == [None, 7, 14]
    assert inside.record() == plain.record() | {"guidance_interval": [0.5, 1.0], "nfe": 7}
    assert (plain.group, inside.group) == ("ema_steps04_cfg5_s1_renoise_1", "ema_steps04_cfg5_from_0.5_1_s1_renoise_1")
    assert len({spec.file for spec in (plain, inside, heun)}) == 3


def test_guidance_one_costs_half():
    (one, five) = plan(requests("a", num_steps=50, cfg_scale=(1, 5)), ["ema"], "flat", ".png")
    assert one.cost() - job.DECODE * 256**2 == (five.cost() - job.DECODE * 256**2) / 2


@pytest.fixture(scope="module")
def vae():
    vae = FluxVAE(skip_pretrained=True, width=32, dtype="fp32", decode_pixels=256 * 256)
    vae.load(torch.device("cpu"))
    return vae


def test_no_decode_is_larger_than_its_bound(vae):
    seen = []
    hook = vae.net["decoder"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    rng = torch.Generator().manual_seed(0)
    latents = [torch.randn(16, h, w, generator=rng) for h, w in [(16, 16)] * 5 + [(40, 36)]]
    images = vae.decode(patchify(latents))
    hook.remove()
    assert [tuple(p.shape) for p in images] == [(3, 128, 128)] * 5 + [(3, 320, 288)]
    assert [shape[0] for shape in seen[:2]] == [4, 1]
    assert all(b * h * w * 64 <= 256 * 256 for b, _, h, w in seen)
    assert len(seen) == 2 + 4


def test_tiles_join_without_a_seam(vae):
    """The normalisations see a tile, not the whole: close, not equal. A seam would be a jump where tiles meet."""
    z = torch.randn(16, 32, 44, generator=torch.Generator().manual_seed(0))
    whole, tiled = vae.net["decoder"](z[None])[0], vae.decode_tiled(z)
    assert (whole - tiled).abs().mean() < 0.2 * whole.std()
    jumps = [(p[:, :, 1:] - p[:, :, :-1]).abs().mean(dim=(0, 1)) for p in (whole, tiled)]
    edges = [8 * start for start in starts(44, 32)[1:]] + [8 * (start + 32) for start in starts(44, 32)[:-1]]
    for edge in edges:
        assert jumps[1][edge - 1] < 1.25 * jumps[0][edge - 1]


def test_tiles_cover_a_line():
    for length in range(1, 200):
        found = starts(length, 32)
        assert (found[0], found[-1]) == (0, max(length - 32, 0))
        assert all(0 < b - a <= 32 - 8 for a, b in pairwise(found))
