"""The plan of a run, compared with the run itself."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from selfe import cli, config
from selfe.backbones.packing import PackedLayout
from selfe.checkpoint import flux
from selfe.device import choose_precision
from selfe.distributed import activation_checkpoint, fsdp
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.rng import SampleRNG
from selfe.tools.plan import command as plan
from selfe.tools.plan import job as plan_job
from selfe.tools.plan import page as plan_page
from selfe.tools.plan import ranks as plan_ranks
from selfe.tools.plan import step as plan_step
from selfe.tools.plan.step import META
from selfe.train import Trainer
from selfe.types import Batch
from tests.helpers.ranks import on_ranks

ROOT = Path(__file__).parents[2]
TINY, SMOKE, MINI = "tests/helpers/tiny.yaml", "configs/debug/selfe_smoke.yaml", "configs/mini/selfe.yaml"
RANDOM = [f"system.{part}.params.skip_pretrained=true" for part in ("text_encoder", "autoencoder")]
# two encoders with random weights: tokens and pooled vector, of the widths in TINY and in SMOKE
HF_TEXT = (
    "system.text_encoder={module: selfe.encoders.composed_text.ComposedText, params: {tokens: {module: HF, params: "
    "{model: a, text_dim: %d, template: 'a photo of {}', skip_pretrained: true}}, pooled: {module: HF, params: "
    "{model: b, text_dim: %d, skip_pretrained: true}}}}"
).replace("HF,", "selfe.encoders.hf_text.HFText,")
SELF_E = {"tau_steps": 4, "aux_start_step": 4}
TREAD = {"objective": {"module": "selfe.objectives.self_evaluation.SelfEvaluation", "params": SELF_E}}
TREAD = {"module": "selfe.objectives.tread.Tread", "params": TREAD | {"first": "double_blocks.0"}}
TREAD["params"]["last"] = "single_blocks.0"
SELF_FLOW = {"student_layer": "double_blocks.0", "teacher_layer": "single_blocks.0", "hidden": 8}
SELF_FLOW = {"module": "selfe.objectives.self_flow.SelfFlow", "params": SELF_FLOW}
DIFFUSERS = {"model": "none", "latent_channels": 4, "downsampling": 4, "skip_pretrained": True, "dtype": "fp32"}
DIFFUSERS = {"module": "selfe.encoders.diffusers_vae.DiffusersVAE", "params": DIFFUSERS}
DIFFUSERS = [f"system.autoencoder={json.dumps(DIFFUSERS)}", "system.backbone.params.patch_dim=16"]
DIFFUSERS += ["system.backbone.params.bottleneck=5", "system.backbone.params.prediction=x0"]
EIGHT = "trainer.total_batch_size=8", "trainer.micro_batch_size=8"
GUIDED = "system.objective.params.guidance=2"
MUON = "trainer.optimizer={module: selfe.optimizers.muon.Muon}"
# a frozen first block: gradients neither reach it nor pass through it
LATE = "trainer.adapt={rank: 4, layers: ['single_blocks.*'], trainable: ['single_blocks.*.bias']}"
LORA = "trainer.adapt={rank: 4, trainable: ['s_in.*']}"
TWO_AVERAGES = "trainer.ema=[{module: selfe.training.ema.ConstantDecay}, {module: selfe.training.ema.PowerFunction}]"
SMALL = [*RANDOM, "trainer.total_batch_size=4", "trainer.micro_batch_size=4", "data.params.pixels=1024"]


def test_a_plan_needs_no_weights_of_extractors():
    extractor = "{module: selfe.evaluation.hf_extractor.HFExtractor, params: {model: ./nowhere}}"
    evaluate = f"trainer.evaluate={{reference: nowhere.tsv, extractors: {{dino: {extractor}}}}}"
    assert plan_job.load(TINY, [*SMALL, evaluate]).trainer.evaluate is None
    with pytest.raises(UserError, match="nowhere"):
        config.build(config.load(TINY, [evaluate]), "trainer")


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)


def build(path: str, overrides: list[str]):
    settings = config.load(path, overrides)
    with META:
        system = config.build(settings, "system")
    return system, config.build(settings, "data"), config.build(settings, "trainer"), settings["seed"]


def saved_weights(folder: Path, path: str, overrides: list[str]) -> Path:
    """A file of weights from which a fine-tuning run of a config can start."""
    settings = config.load(path, [override for override in overrides if "adapt" not in override])
    with META:
        net = config.build(settings, "system").backbone
    tensors = {}
    for name, parameter in net.named_parameters():
        tensors |= flux.split("bfl", name, net.initial(name, parameter.shape, 0), net.width)
    save_file(tensors, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def measured(path: str, overrides: list[str], batch: Batch, rng: SampleRNG, step: int) -> plan_step.Step:
    """What the plan measures, of a batch that exists."""
    system, _, trainer, _ = build(path, overrides)
    if trainer.adapt is not None:
        trainer.adapt.apply(system.backbone)
    system.load_encoders(META)
    precision = choose_precision(trainer.precision, torch.device("cpu"))
    setting = {"precision": precision, "activation_checkpointing": trainer.activation_checkpointing}
    return plan_step.measure(system, batch.to(META), rng, step, **setting)


@pytest.mark.parametrize(
    ("path", "overrides", "step", "parts"),
    [
        (SMOKE, SMALL, 5, {"self-evaluation", "recomputed", "autoencoder", "text_encoder.t5", "text_encoder.clip"}),
        (SMOKE, [*SMALL, "trainer.activation_checkpointing=2"], 9, {"auxiliary", "auxiliary, backward", "recomputed"}),
        (MINI, EIGHT, 5, {"flow matching, backward"}),
        (MINI, [*EIGHT, MUON], 5, {"flow matching, backward"}),
        (SMOKE, [*SMALL, HF_TEXT % (64, 32)], 5, {"text_encoder.tokens.net", "text_encoder.pooled.net"}),
        (TINY, [*SMALL, f"system.objective={json.dumps(TREAD)}"], 5, {"auxiliary, backward", "recomputed"}),
        (TINY, [*SMALL, f"system.objective={json.dumps(SELF_FLOW)}"], 5, {"teacher", "recomputed"}),
        (TINY, [*SMALL, *DIFFUSERS], 5, {"autoencoder", "recomputed"}),
        (TINY, [*SMALL, LORA], 5, {"flow matching, backward", "auxiliary, backward", "recomputed"}),
        (TINY, [*SMALL, LATE], 5, {"flow matching, backward", "auxiliary, backward", "recomputed"}),
        ("configs/mini/mean_flow.yaml", [*EIGHT, GUIDED], 5, {"targets", "flow map, backward"}),
        ("configs/mini/alpha_flow.yaml", EIGHT, 2000, {"targets", "flow map, backward"}),
        ("configs/mini/terminal_velocity.yaml", EIGHT, 5, {"targets", "terminal velocity, backward"}),
    ],
    ids=[
        *("smoke", "auxiliary", "mini", "mini, Muon", "hf text", "tread", "self-flow", "diffusers"),
        *("LoRA", "late LoRA", "iMF", "alpha-Flow", "TVM"),
    ],
)
def test_operations_are_those_of_a_training_step(path, overrides, step, parts, tmp_path, alone):
    overrides = [*overrides, f"trainer.output_dir={tmp_path}"]
    if any("adapt" in override for override in overrides):
        overrides.append(f"trainer.init_from={saved_weights(tmp_path, path, overrides)}")
    system, data, trainer, seed = build(path, overrides)
    fit = Trainer(trainer, system, data, seed, alone)
    order = [(step, 0)] * 2
    fit.step(step, iter([fit.part("train")[at] for at in order[:1]]), lambda: 0)  # the first also counts for the clock
    with FlopCounterMode(display=False) as counter:
        fit.step(step, iter([fit.part("train")[at] for at in order[1:]]), lambda: 0)
    batch = fit.part("train")[order[0]]
    step_cost = measured(path, overrides, batch, SampleRNG.of_step(seed, step, batch.positions), step)
    net = build(path, overrides)[0].backbone
    if trainer.adapt is not None:
        trainer.adapt.apply(net)
    update = plan_ranks.optimizer_cost(net, replace(trainer, precision="fp32"))
    assert sum(step_cost.flops.values()) + update.flops == counter.get_total_flops()
    assert (update.flops > 0) == (MUON in overrides)
    assert parts <= step_cost.flops.keys()
    assert ("recomputed" in step_cost.flops) == bool(trainer.activation_checkpointing)


# ---- memory and traffic ----


class Collectives(TorchDispatchMode):
    """Bytes that collective calls hand over: all that is gathered, all that is scattered, what is reduced in place."""

    KINDS = {  # noqa: RUF012
        "_allgather_base_": "all_gather",
        "_reduce_scatter_base_": "reduce_scatter",
        "allreduce_": "all_reduce",
        "alltoall_base_": "all_to_all",
    }

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if kind := self.KINDS.get(function._schema.name.removeprefix("c10d::")):
            position = {"all_gather": 0, "reduce_scatter": 1, "all_reduce": 0, "all_to_all": 1}[kind]
            tensors = arguments[position] if isinstance(arguments[position], (list, tuple)) else [arguments[position]]
            self.bytes[kind] += sum(tensor.nbytes for tensor in tensors)
            if kind == "all_to_all":  # without what a rank sends to itself
                self.bytes[kind] -= arguments[4][0] * tensors[0].element_size()
        return function(*arguments, **(keywords or {}))


def bytes_of_a_rank(world: World, overrides: list[str], step: int) -> dict[str, int]:
    """After a step of the real trainer: what this rank holds, and what forward and backward passes sent."""
    system, data, trainer, seed = build(TINY, overrides)
    fit = Trainer(trainer, system, data, seed, world)
    fit.step(step, iter([fit.part("train")[step, 0]]), lambda: 0)
    batch = fit.part("train")[step, 0]
    with Collectives() as sent:
        loss = system.loss(fit.net, fit.ema, batch, SampleRNG.of_step(seed, step, batch.positions), step)
        loss.per_sample.mean().backward()
        fit.optimizer.step()
    states = fit.optimizer.state.values()
    shards = {fsdp.local(p.detach()).data_ptr() for p in fit.net.parameters()}
    averages = [fsdp.local(p) for ema in fit.averages.values() for p in ema.parameters()]
    held = {
        "parameters": sum(fsdp.local(p).nbytes for p in fit.net.parameters()),
        "gradients": sum(fsdp.local(p.grad).nbytes for p in fit.net.parameters() if p.grad is not None),
        "optimizer": sum(fsdp.local(value).nbytes for state in states for value in state.values()),
        "ema": sum(average.nbytes for average in averages if average.data_ptr() not in shards),
        "encoders": sum(
            fsdp.local(tensor).nbytes
            for encoder in (system.text_encoder, system.autoencoder)
            for network in plan_step.networks(encoder).values()
            for tensor in (*network.parameters(), *network.buffers())
        ),
    }
    return held | {f"sent {kind}": size for kind, size in sent.bytes.items()}


@pytest.mark.parametrize(
    ("size", "overrides", "step"),
    [
        (2, [], 5),
        (2, ["trainer.shard_text_encoder=true", "trainer.activation_checkpointing=false"], 2),
        (2, ["trainer.shard_text_encoder=true", HF_TEXT % (16, 8)], 2),
        (2, ["trainer.gathering={reshard_after_forward: false}"], 5),
        (4, ["trainer.gathering={reshard_after_forward: 2}"], 5),
        (4, ["trainer.shard_size=2"], 5),
        (4, ["trainer.shard_size=2", MUON, "trainer.ema_warmup=null", TWO_AVERAGES], 5),
        (2, [LORA], 5),
        (2, ["trainer.adapt={rank: 4}"], 5),
        (4, [LATE, "trainer.shard_size=2", "trainer.ema_warmup=null", TWO_AVERAGES], 5),
    ],
    ids=[
        "2",
        "2, T5 sharded too",
        "2, both text encoders sharded",
        "2, blocks kept unsharded",
        "4, blocks resharded to 2",
        "4 in groups of 2",
        "4 in groups of 2, Muon and two averages",
        "2, LoRA and s",
        "2, LoRA of all blocks",
        "4 in groups of 2, late LoRA and two averages",
    ],
)
def test_a_rank_holds_and_sends_what_the_plan_says(size, overrides, step, tmp_path):
    overrides = [*RANDOM, f"trainer.output_dir={tmp_path}", f"trainer.total_batch_size={2 * size}", *overrides]
    if any("adapt" in override for override in overrides):
        overrides.append(f"trainer.init_from={saved_weights(tmp_path, TINY, overrides)}")
    measured = on_ranks(size, bytes_of_a_rank, overrides, step)
    job = plan_job.load(TINY, overrides)
    share = plan_ranks.share(job.system, job.trainer, size, job.loaded, job.later)
    for name in ("parameters", "gradients", "optimizer", "ema", "encoders"):
        assert getattr(share, name) == pytest.approx(measured[name], rel=0.01), name
        assert measured[name] > 0
    calls = plan_job.run(job, [((32, 32), 1)], 2, step, False).calls
    payload = plan_ranks.payloads(share, calls)
    assert payload == {kind: measured.get(f"sent {kind}", 0) for kind in payload}
    assert payload["all_gather"] > payload["reduce_scatter"] > 0
    assert plan_ranks.traffic(share, calls).get("all_to_all", 0) == measured.get("sent all_to_all", 0)
    assert ("sent all_to_all" in measured) == (MUON in overrides)


def kept_and_peak(overrides: list[str], step: int) -> tuple[int, int]:
    """Of a real micro-batch in this process: bytes that autograd keeps, by the storages it is handed, and the most that
    the allocator has given out at once after the encoders are done, by torch's profiler."""
    system, data, trainer, seed = build(TINY, overrides)
    net = system.backbone.to_empty(device="cpu")
    for name, parameter in net.named_parameters():
        parameter.data.copy_(net.initial(name, parameter.shape, seed))
    system.load_encoders(torch.device("cpu"))
    activation_checkpoint.apply_activation_checkpointing(net, trainer.activation_checkpointing)
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(plan_step.drop_grad)
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    batch = data.batch(seed, step, range(4 * step, 4 * step + 4), range(4), "train").to(torch.device("cpu"))
    rng, kept = SampleRNG.of_step(seed, step, batch.positions), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    conds = system.encode(system.objective.captions(batch.prompts, rng, step))
    x0 = system.autoencoder.encode(batch.images, rng)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = system.objective(net, net, x0, conds, rng, step).per_sample.mean()
    loss.backward()
    PackedLayout.of.cache_clear()  # the layout of a batch is made anew, as in training
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        system.objective(net, net, x0, conds, rng, step).per_sample.mean().backward()
    now = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return sum(kept.values()), peak


def planned_kept_and_peak(every: str, step: int) -> tuple[plan_step.Step, int, int]:
    overrides = [*SMALL, f"trainer.activation_checkpointing={every}"]
    overrides += ["system.backbone.params.num_double_blocks=2", "system.backbone.params.num_single_blocks=3"]
    _, data, _, seed = build(TINY, overrides)
    batch = data.batch(seed, step, range(4 * step, 4 * step + 4), range(4), "train")
    planned = measured(TINY, overrides, batch, SampleRNG.of_step(seed, step, batch.positions), step)
    return planned, *kept_and_peak(overrides, step)


@pytest.mark.parametrize(
    ("step", "every"), [(0, "true"), (5, "false"), (5, "2"), (5, "true")], ids=lambda value: str(value)
)
def test_activations_are_what_autograd_keeps(every, step):
    planned, kept, peak = planned_kept_and_peak(every, step)
    assert planned.saved == pytest.approx(kept, rel=0.02)
    assert planned.peak == pytest.approx(peak, rel=0.02)


def test_the_peak_of_selective_checkpointing_is_the_allocators():
    """What it keeps goes past autograd, so only the peak, which holds it, can be measured."""
    planned, _, peak = planned_kept_and_peak("selective", 5)
    assert planned.peak == pytest.approx(peak, rel=0.02)


# ---- the complete plan ----


SHALLOW = "system.backbone.params.num_double_blocks=1", "system.backbone.params.num_single_blocks=1"


@pytest.fixture(scope="module")
def paper() -> dict:
    """The 2B model on 8 GPUs of 80 GB, before its later phases."""
    shorter = ["data.params.phases=[]", "trainer.phases=[]", "trainer.max_steps=300000"]
    return plan.plan("configs/train/selfe.yaml", shorter, gpus=8)


def test_the_plan_of_the_paper_names_a_micro_batch(paper):
    """No images and no weights are present."""
    assert paper["parameters"]["denoiser"] == 2_247_716_928
    assert paper["parameters"]["text_encoder.t5"] == pytest.approx(4.762e9, rel=1e-3)
    (own,) = (variant for variant in paper["memory"]["variants"] if variant["configured"])
    most, divides = own["largest_micro_batch"], own["largest_that_divides"]
    assert most >= divides >= 32
    assert 1024 % (8 * divides) == 0
    assert own["peak"] < paper["memory"]["usable"]
    assert paper["memory"]["parameters"] == pytest.approx(2_247_716_928 * 4 / 8, rel=0.01)
    assert paper["storage"]["latents_per_image"]["256x256"] == {"cached": 65536, "one_sample": 32768}
    assert paper["storage"]["text_per_token"] == 8192
    (phase,) = paper["phases"]
    assert phase["image_tokens"] == 1024 * 256
    assert phase["text_tokens"] == 1024 * 77
    assert phase["calls"] == {"flow matching": 4, "self-evaluation": 8}
    hours = phase["useful_flops"] * 300_000 / (989e12 * 0.35 * 3600)
    assert paper["gpu_hours"] == pytest.approx(hours)
    assert paper["days"] == pytest.approx(hours / 8 / 24)
    assert any("encoders take" in line for line in paper["warnings"])


def test_text_says_what_the_numbers_say(paper):
    text = plan_page.text(paper)
    for piece in (
        "2,247.717 M",
        "64 KiB",
        "8 KiB",
        "selective *",
        f"{paper['gpu_hours']:,.0f} GPU-hours",
        "Warnings\n- ",
    ):
        assert piece in text, piece
    assert max(map(len, text.splitlines())) <= 80


def test_a_summary_of_four_lines_comes_first(paper):
    run, start, time, memory = plan_page.summary(paper)
    assert plan_page.text(paper).splitlines()[:5] == [run, start, time, memory, ""]
    assert run == "configs/train/selfe.yaml on 8 x H100 of 80 GiB"
    assert start == "starts: yes; micro-batches of 32"
    assert time.startswith(f"time: {paper['days']:.3g} days, ")
    assert ", fits; " in memory
    assert [plan_page.time(days) for days in (12.345, 0.5, 1 / 180)] == ["12.3 days", "12 h 0 min", "8 min 0 s"]


def test_checkpointing_trades_operations_for_memory(paper):
    off, second, selective, every = paper["memory"]["variants"]
    assert off["activations"] > second["activations"] > 2 * every["activations"]
    assert off["activations"] > selective["activations"] > 2 * every["activations"]
    assert off["largest_micro_batch"] < selective["largest_micro_batch"] < every["largest_micro_batch"]
    assert off["largest_micro_batch"] < second["largest_micro_batch"] < every["largest_micro_batch"]


def mini(*overrides: str, **options) -> dict:
    return plan.plan("configs/mini/selfe.yaml", (*SHALLOW, *overrides), **{"gpus": 1} | options)


def test_warnings_appear_where_they_should(monkeypatch):
    assert mini()["warnings"] == []
    many = mini(gpus=1024)["warnings"]
    for words in ("96 is not a multiple of the 1024 processes", "can start is 48", "ranks hold no parameter"):
        assert any(words in line for line in many), (words, many)
    monkeypatch.setitem(plan.GPUS, "a100", ("A100", 1e-6))
    small = mini("trainer.micro_batch_size=1", gpu="a100")["warnings"]
    for words in ("the run cannot start: from step 0: trainer.micro_batch_size", "does not fit"):
        assert any(words in line for line in small), (words, small)


def test_the_number_of_gpus_on_which_a_run_can_start():
    plan_on_48 = mini(gpus=48)
    assert plan_on_48["can_start"] == {"on": 48, "micro": [2], "change": ""}
    plan_on_64 = mini(gpus=64)
    assert plan_on_64["can_start"] == {"on": 48, "micro": [2], "change": "48 GPUs"}
    assert plan_page.summary(plan_on_64)[1] == "starts: NO, but with 48 GPUs; micro-batches of 2"
    assert mini("trainer.micro_batch_size=1", gpus=2)["can_start"]["on"] == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs/train").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_training_config_starts_on_up_to_128_gpus(path):
    """All batches of its schedule can be divided; with two blocks, which do not change that."""
    job = plan_job.load(str(path), SHALLOW)
    costs = plan_job.phases(job, 1, 76)
    for gpus in (1, 2, 4, 8, 16, 32, 64, 128):
        start = plan.can_start(job, gpus, costs)
        assert (start["on"], start["change"]) == (gpus, "")
        assert all(0 < micro <= job.trainer.micro_batch_size for micro in start["micro"])


def test_phases_follow_objective_batch_and_data(tmp_path):
    path = tmp_path / "later.yaml"
    path.write_text(
        f"base: {ROOT / TINY}\n"
        "data: {params: {train_manifest: nowhere.tsv, val_manifest: null, "
        "phases: [{step: 6, pixels: [1024, 4096], shares: [3, 1]}]}}\n"
        "trainer: {phases: [{step: 8, total_batch_size: 16}]}\n"
    )
    phases = plan.plan(str(path), RANDOM, gpus=2, caption_tokens=5)["phases"]
    assert [(phase["start"], phase["end"], phase["batch"]) for phase in phases] == [
        (0, 4, 8),
        (4, 6, 8),
        (6, 8, 8),
        (8, 12, 16),
    ]
    assert phases[2]["shapes"] == {"32x32": 3, "64x64": 1}
    assert phases[2]["image_tokens"] == 6 * 4 + 2 * 16
    assert "auxiliary" not in phases[0]["calls"]
    assert phases[3]["calls"]["auxiliary"] == 4
    assert phases[3]["flops"]["flow matching"] == 2 * phases[2]["flops"]["flow matching"]


def test_a_cached_run_loads_no_encoder(tmp_path):
    system = config.load(TINY, RANDOM)["system"]
    wrapped = {
        "text_encoder": ("selfe.encoders.cached_text.CachedText", "encoder"),
        "autoencoder": ("selfe.encoders.cached_latents.CachedLatents", "autoencoder"),
    }
    parts = {
        name: {"module": module, "params": {"cache_dir": "nowhere", inner: config.plain(system[name])}}
        for name, (module, inner) in wrapped.items()
    }
    path = tmp_path / "cached.yaml"
    path.write_text(json.dumps({"base": str(ROOT / TINY), "system": parts}))
    live, cached = plan.plan(TINY, RANDOM, gpus=2), plan.plan(str(path), gpus=2)
    assert cached["memory"]["encoders"] == 0 < live["memory"]["encoders"]
    assert cached["gpu_hours"] == pytest.approx(sum(phase["gpu_hours_cached"] for phase in live["phases"]))
    assert cached["gpu_hours"] < live["gpu_hours"]
    assert not any("encoders take" in line for line in cached["warnings"])


def test_features_of_images_are_planned_as_they_are_stored():
    encoder = {"model": "none", "skip_pretrained": True, "feature_dim": 6}
    inner = {"module": "selfe.objectives.self_evaluation.SelfEvaluation", "params": SELF_E}
    repa = {"objective": inner, "layer": "double_blocks.0", "hidden": 8, "stop_step": 6}
    repa["encoder"] = {"module": "selfe.encoders.hf_vision.HFVision", "params": encoder}
    objective = f"system.objective={json.dumps({'module': 'selfe.objectives.repa.Repa', 'params': repa})}"
    job = plan_job.load(TINY, [*RANDOM, objective])
    costs = plan_job.phases(job, 2, 2)
    storage = plan.storage(job, costs, optimizer=0)
    assert storage["features_per_image"] == {"32x32": 2 * 4 * 6}
    assert any("features of an image, 32x32" in line for line in plan_page.storage(storage))

    # the head: forward, and backward for its weights and its input
    assert [phase.start for phase in costs] == [0, 4, 6]
    head = 2 * 4 * (48 * 8 + 8 * 8 + 8 * 6) * costs[0].step.num_images
    for name, times in (("flow matching", 1), ("flow matching, backward", 2)):
        with_head, without = (phase.step.flops[name] for phase in costs[1:])
        assert with_head - without == times * head
    plain = plan.parameters(plan_job.load(TINY, RANDOM).system)
    assert plan.parameters(job.system)["denoiser"] == plain["denoiser"] + 518


def test_a_thousand_ranks_take_no_longer():
    job = plan_job.load(TINY, [*RANDOM, "trainer.shard_size=8"])
    calls = plan_job.run(job, [((32, 32), 1)], 2, 5, False).calls
    shares = {size: plan_ranks.share(job.system, job.trainer, size, job.loaded) for size in (8, 64, 1024)}
    assert shares[8].parameters == shares[64].parameters == shares[1024].parameters
    sent = {size: plan_ranks.traffic(share, calls) for size, share in shares.items()}
    assert sent[8]["all_reduce"] == 0 < sent[64]["all_reduce"] < sent[1024]["all_reduce"]
    assert sent[8]["all_gather"] == sent[1024]["all_gather"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": 0}, "--gpus: 0 is too small; must be at least 1"),
        ({"gpu": "h1000"}, "--gpu: 'h1000' is unknown; choose one of b200"),
        ({"mfu": 35.0}, "--mfu: 35.0 is not between 0 and 1"),
        ({"caption_tokens": 0}, "--caption-tokens: 0 is too small"),
    ],
)
def test_mistakes_are_told_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as error:
        mini(**options)
    assert "\n" not in str(error.value)


def test_groups_that_cannot_be_formed_are_told():
    with pytest.raises(UserError, match="8 processes cannot form groups of 3"):
        mini("trainer.shard_size=3", gpus=8)


def test_the_command(capsys):
    cli.run(["plan", "configs/mini/selfe.yaml", "--gpus", "4", "trainer.micro_batch_size=24", *SHALLOW, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["phases"][0]["micro_batches"] == 1
    assert plan_page.text(printed).startswith("configs/mini/selfe.yaml on 4 x H100 of 80 GiB\nstarts: yes")


def test_phases_begin_where_the_network_calls_of_an_objective_change():
    """alpha-Flow: from the step at which its targets are more than the velocity of the data."""
    job = plan_job.load("configs/mini/alpha_flow.yaml", EIGHT)
    first, second = plan_job.phases(job, 1, 4)
    assert (first.end, second.start) == (job.system.objective.starts[0],) * 2
    assert [Counter(call.part for call in phase.step.calls) for phase in (first, second)] == [
        {"flow map": 1},
        {"flow map": 1, "targets": 1},
    ]
