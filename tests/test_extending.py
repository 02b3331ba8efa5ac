"""The parts of examples/ do what they state; the configs of docs/extending.md and the Python of the docs run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from selfe import config, evaluate, flow, infer, train
from selfe.errors import UserError
from selfe.generator import Generator
from selfe.rng import SampleRNG
from selfe.samplers.euler import Euler
from selfe.types import TextCond, packed

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RNG = SampleRNG.of_images([(0, "a", 0), (0, "b", 0)])


@pytest.fixture(autouse=True)
def on_path(monkeypatch) -> None:
    """As with PYTHONPATH=examples."""
    monkeypatch.syspath_prepend(ROOT / "examples")


def fragments(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def latents() -> tuple:
    """Clean latents and their conditioning: two samples of 4 and 6 tokens with 3 channels."""
    x0 = packed(torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), [(2, 2), (2, 3)])
    cond = TextCond(packed(torch.zeros(2, 1), [(1, 1), (1, 1)]), torch.zeros(2, 1))
    return x0, {"cond": cond}


def test_examples_are_short_and_all_are_on_the_page():
    page = (ROOT / "docs/extending.md").read_text()
    assert len(EXAMPLES) == 7
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 50, path
        assert f"[examples/{path.name}](../examples/{path.name})" in page


def test_huber_matching_is_half_of_flow_matching_for_small_errors():
    from huber_matching import HuberMatching

    from selfe.objectives.flow_matching import FlowMatching

    def net(x_t, t, s, cond):
        return 0.1 * x_t.tokens

    x0, conds = latents()
    squared = FlowMatching()(net, net, x0, conds, RNG, 0).per_sample
    assert torch.allclose(HuberMatching(delta=1000)(net, net, x0, conds, RNG, 0).per_sample, squared / 2)
    assert (HuberMatching(delta=0.1)(net, net, x0, conds, RNG, 0).per_sample < squared / 2).all()
    assert HuberMatching(p_drop=1).captions(["a", "b"], RNG, 0) == {"cond": ["", ""]}


def test_characters_encode_a_caption_alone_as_among_others():
    from characters import Characters

    encoder = Characters(dim=8, max_bytes=4)
    encoder.load(torch.device("cpu"))
    cond = encoder(["red", "", "a long caption"])
    assert cond.text.lens == (3, 1, 4)
    assert cond.pooled.shape == (3, 8)
    assert torch.equal(encoder(["a long caption"]).text.tokens, cond.text.split()[2])


def test_haar_loses_nothing_and_keeps_norms():
    from haar import Haar

    autoencoder = Haar()
    autoencoder.load(torch.device("cpu"))
    images = [torch.randn(3, 4, 6), torch.randn(3, 2, 2)]
    tokens = autoencoder.encode(images, RNG)
    assert tokens.grids == ((2, 3), (1, 1))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(autoencoder.decode(tokens), images, strict=True))
    assert torch.allclose(tokens.tokens.norm() ** 2, sum(image.norm() ** 2 for image in images))
    assert autoencoder.noise([(4, 6), (2, 2)], RNG).grids == tokens.grids


def test_restarts_keep_the_distribution_and_forget_the_initial_noise():
    """Of data that is standard normal, with the exact velocity."""
    from restart import Restart

    noise = packed(torch.zeros(4000, 1, dtype=torch.float64), [(40, 50), (40, 50)])
    noise = noise.with_tokens(RNG.normal_like("noise", noise))

    def denoise(x, t, s):
        t = flow.per_token(t, x)
        return (2 * t - 1) * x.tokens / ((1 - t) ** 2 + t**2)

    def sampled(sampler) -> tuple[torch.Tensor, float]:
        """The samples and their correlation with the noise from which they started."""
        x0 = sampler(denoise, noise, *flow.sampling_times(64, 0, noise), RNG)
        return x0, torch.corrcoef(torch.cat([x0, noise.tokens], dim=1).T)[0, 1].item()

    assert Restart(restarts=2).calls(4) == [0, 1, 2, 2, 2, 3]
    euler, unchanged = sampled(Euler())
    assert torch.equal(sampled(Restart(restarts=0))[0], euler)
    assert unchanged == pytest.approx(1)

    restarted, correlation = sampled(Restart(restarts=40))
    assert restarted.mean().item() == pytest.approx(0, abs=0.06)
    assert restarted.std().item() == pytest.approx(1, abs=0.06)
    assert correlation < 0.5


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A run of two steps and a sampling job with all fragments of the page at once."""
    folder = tmp_path_factory.mktemp("extended")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), np.uint8)
    np.savez(folder / "arrays.npz", images=pixels, captions=[f"image {number}" for number in range(6)])

    settings = {"base": str(ROOT / "configs/mini/base.yaml")}
    for fragment in fragments("docs/extending.md", "yaml"):
        settings = config.merge(settings, yaml.safe_load(fragment))
    settings["inferencer"] |= {"ckpt_dir": f"{folder}/run/checkpoints", "output_dir": f"{folder}/images"}
    settings["inferencer"]["defaults"] |= {"num_steps": [2], "height": 8, "width": 8, "cfg_scale": 1.5}
    settings["inferencer"] |= {"prompts": ["image 1", "another"], "precision": "fp32"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))

    trainer = {"output_dir": f"{folder}/run", "max_steps": 2, "total_batch_size": 4, "micro_batch_size": 4}
    trainer |= {"warmup_steps": 1, "decay_start": 1, "precision": "fp32"}
    overrides = [f"trainer.{key}={value}" for key, value in trainer.items()]
    overrides.append(f"data.params.train_manifest={folder}/arrays.npz")

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        train.main([str(folder / "config.yaml"), *overrides])
        infer.main([str(folder / "config.yaml"), *overrides])
    return folder


def test_the_configs_of_the_page_train_and_sample(extended):
    recorded = config.load(extended / "run" / "config.yaml")
    modules = config.modules(recorded)
    for path in EXAMPLES:
        assert any(module.startswith(f"{path.stem}.") for module in modules), path
    assert len(list((extended / "images").glob("*.png"))) == 2


def test_the_extractor_of_the_page_evaluates_the_images(extended):
    evaluate.main([str(extended / "config.yaml"), "-", "evaluation.bootstrap=0"])
    evaluation = json.loads((extended / "images" / "evaluation.json").read_text())
    assert evaluation["extractors"] == {"colours": {"grid": 4, "tolerance": 0.4}}
    assert [(value["metric"], value["value"]) for value in evaluation["values"]] == [("colours", 1.0)]  # none named


def test_colours_are_those_that_captions_name():
    from colours import NAMES, Colours

    extractor = Colours(grid=2)
    extractor.load(torch.device("cpu"))
    red = torch.tensor(NAMES["red"])[:, None, None].expand(3, 4, 4)
    output = extractor([red, red, red], ["a red square", "red on blue", "a drawing"])
    assert output["colours"].tolist() == [1, 0, 1]
    assert torch.equal(output["features"][0].view(3, 4), red[:, :2, :2].flatten(1))


def test_the_generator_makes_the_images_of_the_sampling_job(extended):
    from restart import Restart

    checkpoints = extended / "run" / "checkpoints"
    with pytest.raises(UserError, match="is not part of selfe"):
        Generator(checkpoints)

    generator = Generator(checkpoints, precision="fp32", trust=True)
    settings = {"num_steps": 2, "height": 8, "width": 8, "cfg_scale": 1.5, "sampler": Restart()}
    images = generator.generate(["image 1", "another"], **settings)
    files = sorted((extended / "images").glob("*.png"))
    expected = sorted(np.asarray(Image.open(file)).tobytes() for file in files)
    assert sorted(np.asarray(image).tobytes() for image in images) == expected

    one_by_one = generator.generate(["image 1", "another"], **settings, batch_size=1)
    assert [image.tobytes() for image in one_by_one] == [image.tobytes() for image in images]
    for num_steps in (0, [1, 2]):
        with pytest.raises(ValueError, match="num_steps"):
            generator.generate(["x"], num_steps=num_steps)


@pytest.mark.parametrize("page", ["README.md", "docs/sampling.md"])
def test_the_python_of_the_docs_runs(extended, page, monkeypatch, tmp_path):
    (program,) = fragments(page, "python")
    assert 'Generator("runs/' in program
    monkeypatch.chdir(tmp_path)
    program = re.sub(r'Generator\("[^"]*"\)', f'Generator("{extended}/run/checkpoints", trust=True)', program)
    program = re.sub(r"(height|width)=\d+", r"\1=8", program)
    exec(compile(program, page, "exec"), {})
    assert [Image.open(path).size for path in tmp_path.glob("*.png")]
