"""The command `selfe VERB ...`: one parser per verb. A tool is imported only when its verb runs, to keep help fast."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from selfe import errors
from selfe.errors import UserError

PROCESSES = """\
arguments
  CONFIG      a YAML file
  NGPUS       processes on this machine, by default one per GPU; without GPUs, by default one on the CPU
  key=value   overrides a key of the configuration, for instance {override}; lists are written [a,b]

environment
  SELFE_CACHE_DIR           folder with the weights of the frozen encoders
  SELFE_SKIP_PRETRAINED=1   use random weights for the frozen encoders: no downloads, images are noise
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
                            several machines: run the same command on each, with its own NODE_RANK (0 to NNODES - 1)
                            and the address and a free port of the machine with rank 0. Without NNODES, nothing
                            listens on the network.
  MAX_RESTARTS              how often failed processes are restarted before giving up (default 0)
{grace}  OMP_NUM_THREADS           CPU threads per process (default: CPU cores divided by processes)
{signals}
exit codes
  0 done; 1 internal error, with its traceback; 2 user error, reported in one line;
  128 + n terminated by signal n (Ctrl-C: 130, SIGTERM: 143, SIGUSR1: 138). All processes exit together.
"""
GRACE = """\
  GRACE_SECONDS             time a run has to finish its step and save after a stop signal (default 600)
"""
SIGNALS = """
signals
  Ctrl-C, SIGTERM and SIGUSR1 let a training run finish its step and save; run the same command again to resume.
  A second Ctrl-C terminates it immediately.
"""


class Parser(argparse.ArgumentParser):
    """Reports wrong usage in one line, as any other mistake."""

    def error(self, message: str) -> NoReturn:
        is_flag = message.startswith("unrecognized arguments: -") and "key=value" in self.format_usage()
        remedy = "keys of the config are written key=value, such as trainer.lr=1e-4; " if is_flag else ""
        print(f"selfe: error: {message}; {remedy}see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Verb:
    """A subcommand: the module that implements it, its help text and its arguments."""

    module: str  # defines main(options)
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    epilog: str = ""
    sections: tuple[str, ...] = ()  # of its CONFIG, which it needs


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb and exit: a user error is one line and exit code 2."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        check_config(options)
    except UserError as error:
        print(f"selfe: error: {error}", file=sys.stderr)
        sys.exit(2)
    import_module("selfe.launch").worker(lambda: call(options))


def check_config(options: argparse.Namespace) -> None:
    """Check the config of a verb that has one, before torch is imported, which takes seconds. Raises UserError."""
    sections = VERBS[options.verb].sections
    if not sections:
        return
    config = import_module("selfe.config")  # slower to import than help should be
    has_processes = hasattr(options, "rest")
    _, overrides = config.parse_command(options.config, options.rest if has_processes else ())
    config.check(options.config, overrides if has_processes else options.overrides, sections, options.verb != "plan")


def run(arguments: Sequence[str]) -> None:
    """Run a verb in this process; errors are raised."""
    call(parse(arguments))


def call(options: argparse.Namespace) -> None:
    """Import the module of a verb and run it."""
    outputs = (getattr(options, name, None) for name in ("out", "shards", "output", "write_clean", "cache_dir"))
    with errors.writing_to(next(filter(None, outputs), None)):
        import_module(VERBS[options.verb].module).main(options)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a verb; its name is in `verb`.

    Exits after help (exit code 0) and after wrong usage (exit code 2).
    """
    name = arguments[0] if arguments else ""
    if name in ("", "-h", "--help"):
        with suppress(BrokenPipeError):  # of a pager or `head` that has ended
            print(overview(), flush=True)
        sys.exit(0 if name else 2)
    if name not in VERBS:
        print(f"selfe: error: unknown verb {name!r}; choose one of {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)

    verb = VERBS[name]
    parser = Parser(
        prog=f"selfe {name}",
        description=verb.summary,
        epilog=verb.epilog or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_arguments(parser)
    parser.set_defaults(verb=name)
    return parser.parse_intermixed_args(arguments[1:])


def overview() -> str:
    """The text of `selfe --help`."""
    rows = (f"  {name:18} {verb.summary.splitlines()[0]}" for name, verb in VERBS.items())
    head = "usage: selfe VERB ...\n\nTrain any-step text-to-image models from scratch (Self-E).\n"
    return "\n".join([head, *rows, "\n`selfe VERB --help` explains a verb."])


# ---- arguments of each verb ----


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: integers of at least `least`."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return integer


def path(text: str) -> Path:
    """A path argument, with `~` replaced by the home directory also where the shell does not do it."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def path_or_url(text: str) -> str | Path:
    """As `path`; URLs of files in stores stay as they are."""
    return text if "://" in text else path(text)


def processes(parser: argparse.ArgumentParser) -> None:
    """CONFIG [NGPUS] [key=value ...]; `launch.parse` separates the last two."""
    parser.usage = "%(prog)s CONFIG [NGPUS] [key=value ...]"
    parser.add_argument("config", metavar="CONFIG", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)


def evaluate(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s CONFIG_OR_JOB [NGPUS] [key=value ...] [options]"
    parser.add_argument(
        "job", type=path, metavar="CONFIG_OR_JOB", help="a sampling config, or the folder of its images"
    )
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument(
        "--reference", type=path, metavar="IMAGES", help="a folder, a manifest, or a pattern of tar files"
    )
    parser.add_argument("--metrics", metavar="NAMES", help="such as fd,clip_score (default: all that are possible)")
    extractor_help = "a Hugging Face vision model: a folder, or a name below SELFE_CACHE_DIR; may be repeated"
    parser.add_argument("--extractor", action="append", metavar="MODEL", help=extractor_help)
    parser.add_argument(
        "--settings", type=path, metavar="FILE", help="for a job: a YAML file with a section evaluation"
    )
    table_help = "write the table with its intervals, as Markdown (.md) or LaTeX (.tex); may be repeated"
    parser.add_argument("--table", type=path, action="append", metavar="FILE", help=table_help)


def benchmark(parser: argparse.ArgumentParser) -> None:
    actions = {"prompts": "write the prompt file", "layout": "write what the scorer reads", "read": "read its results"}
    action_help = "; ".join(f"{name}: {meaning}" for name, meaning in actions.items())
    parser.add_argument("action", choices=tuple(actions), metavar="ACTION", help=action_help)
    parser.add_argument("name", metavar="NAME", help="geneval, geneval2, dpg, parti (prompts only), adm (no prompts)")
    parser.add_argument("job", type=path, nargs="?", metavar="JOB", help="the folder of a sampling job")
    parser.add_argument("--out", type=path, metavar="FILE", help="of prompts: the prompt file, .jsonl")
    source_help = "the authors' file of the prompts, if it is on this machine"
    parser.add_argument("--source", type=path, metavar="FILE", help=source_help)
    parser.add_argument(
        "--bootstrap", type=at_least(0), default=100, metavar="N", help="replicates of intervals (default %(default)s)"
    )
    table_help = "of read: write the table as Markdown (.md) or LaTeX (.tex); may be repeated"
    parser.add_argument("--table", type=path, action="append", default=[], metavar="FILE", help=table_help)


def tune_sampler(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s CONFIG_OR_RUN [NGPUS] [key=value ...] --metric EXTRACTOR/METRIC --budget IMAGES [options]"
    parser.add_argument(
        "config",
        type=path,
        metavar="CONFIG_OR_RUN",
        help="a sampling config with a section evaluation, or the output folder of a training run",
    )
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--metric", required=True, metavar="EXTRACTOR/METRIC", help="such as dino/fd")
    parser.add_argument("--budget", type=int, required=True, metavar="IMAGES", help="images to generate at most")
    parser.add_argument(
        "--images", type=int, default=500, metavar="N", help="images of a candidate (default %(default)s)"
    )
    parser.add_argument("--steps", default="1,2,4,8,32", metavar="N,...", help="numbers of steps (default %(default)s)")
    parser.add_argument("--out", type=path, default=Path("preset.yaml"), metavar="FILE", help="default %(default)s")
    parser.add_argument("--settings", type=path, metavar="FILE", help="a YAML file with a section evaluation")
    for flag, name in (("--guidance", "cfg_scale"), ("--s-ratio", "s_ratio"), ("--eta", "eta")):
        parser.add_argument(flag, dest=name, metavar="X,...", help="values to try")
    interval_help = "intervals of guidance to try, such as none,0:0.8,0.2:1"
    parser.add_argument("--interval", dest="guidance_interval", metavar="LOW:HIGH,...", help=interval_help)
    parser.add_argument("--sampler", metavar="NAME,...", help="samplers to try: renoise, heun, adams_bashforth")
    trust(parser)


def trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust", action="store_true", help="allow the run's config.yaml to run code that is not part of selfe"
    )


def plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", type=at_least(1), required=True, metavar="N")
    parser.add_argument("--gpu", default="h100", help="a100, h100, b200, l40s, rtx4090, ... (default %(default)s)")
    parser.add_argument("--mfu", type=float, default=0.35, help="fraction of peak FLOPs reached (default %(default)s)")
    parser.add_argument(
        "--caption-tokens", type=at_least(1), default=77, metavar="N", help="T5 tokens (default %(default)s)"
    )
    parser.add_argument("--cached", action="store_true", help="train from the cache that selfe precompute makes")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def check_data(parser: argparse.ArgumentParser) -> None:
    manifest_help = "a .tsv, .csv or .jsonl file, or a pattern of .tar, .parquet or .arrow files in quotes; also a URL"
    parser.add_argument("manifest", type=path_or_url, help=manifest_help)
    base_help = "folder or URL that relative image paths start from"
    parser.add_argument("--base-dir", type=path_or_url, default=Path(), help=base_help)
    parser.add_argument("--image-column", metavar="NAME", help="column or key of the images, if it has another name")
    parser.add_argument("--caption-column", metavar="NAME", help="the same for the captions")
    parser.add_argument("--cache-dir", type=path, help="folder for copies of remote data")

    parser.add_argument("--workers", type=at_least(0), default=4, help="reader processes; 0: read in this process")
    parser.add_argument("--write-clean", type=path, metavar="OUT", help="write the valid lines, with image sizes")
    parser.add_argument(
        "--caption-weights",
        type=float,
        nargs="+",
        default=[],
        metavar="W",
        help="data.params.caption_weights, to count how often each caption is used",
    )

    # limits and buckets, as in a config
    parser.add_argument("--min-side", type=at_least(1), default=64, help="smallest allowed side in pixels")
    parser.add_argument("--max-pixels", type=at_least(1), default=178_956_970, help="larger images are rejected")
    parser.add_argument(
        "--pixels", type=at_least(1), nargs="+", default=[65536], help="pixel budgets whose buckets are shown"
    )
    parser.add_argument("--multiple", type=at_least(1), default=16, help="bucket sides are multiples of this")
    parser.add_argument("--max-aspect", type=float, default=2.0, help="aspect ratio of the longest bucket")
    parser.add_argument("--tokenizer", help="a folder such as SELFE_CACHE_DIR/t5-v1_1-xxl, to count tokens exactly")


def probe_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG")
    prompts_help = "a file like examples/probe_prompts.tsv"
    parser.add_argument("prompts", type=path, metavar="PROMPTS", help=prompts_help)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def check_latents(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--images", type=at_least(1), default=200, help="number of images to encode")
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="images encoded at once")


def precompute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=path, required=True, help="cache folder")
    workers_help = "reader processes per encoder (default: one per core, up to 4)"
    parser.add_argument("--workers", type=at_least(0), help=workers_help)
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="images or captions encoded together")
    parser.add_argument(
        "--one-sample", action="store_true", help="store one fixed latent sample instead of mean and std: half the size"
    )


def make_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=path, help="a .tsv, .csv or .jsonl file")
    parser.add_argument("--base-dir", type=path, default=Path(), help="folder that relative image paths start from")
    parser.add_argument("--out", type=path, required=True, help="folder for the tar files")
    parser.add_argument("--prefix", default="train", help="tar files are named PREFIX-000000.tar and so on")
    parser.add_argument("--samples", type=at_least(1), default=10_000, help="samples per tar file")


def make_manifest(parser: argparse.ArgumentParser) -> None:
    source_help = "a folder, .csv, .tsv, .jsonl or .parquet files, or a data set saved by datasets.save_to_disk"
    parser.add_argument("sources", type=path, nargs="+", metavar="SOURCE", help=source_help)
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--out", type=path, metavar="OUT", help="the TSV manifest to write")
    output.add_argument("--shards", type=path, metavar="DIR", help="a new folder of tar shards to write instead")
    parser.add_argument("--image", metavar="COLUMN", help="column of images (default: path, file_name, image ...)")
    parser.add_argument("--caption", metavar="COLUMN", help="column of captions (default: caption, text, prompt ...)")
    parser.add_argument("--no-header", action="store_true", help="the first two columns are image and caption")
    parser.add_argument("--delimiter", help="between columns (default: by file name)")
    parser.add_argument("--encoding", help="for instance latin-1 (default: UTF-8, or UTF-16 with byte order mark)")
    parser.add_argument("--split", help="split of a saved data set that has several")
    base_help = "with --shards: folder that relative image paths start from (default: the folder, or the current one)"
    parser.add_argument("--base-dir", type=path, help=base_help)
    parser.add_argument("--samples", type=at_least(1), default=10_000, help="with --shards: samples per tar file")


WEIGHTS = "ema (default), live, or the name of another average of the run"


def export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ckpt", type=path, metavar="CKPT", help="for instance runs/selfe_2b/checkpoints")
    parser.add_argument("out", type=path, metavar="OUT", help="folder to create")
    parser.add_argument("--weights", default="ema", help=WEIGHTS)
    std_help = "compute the average of this width from the PowerFunction tracks of the run (docs/training.md)"
    parser.add_argument("--ema-std", type=float, metavar="STD", help=std_help)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the denoiser")
    parser.add_argument("--format", choices=("safetensors", "diffusers"), default="safetensors")
    adapter_help = "write only the low-rank matrices of a fine-tuning run, for PEFT or diffusers (docs/fine_tuning.md)"
    parser.add_argument("--adapter-only", action="store_true", help=adapter_help)
    preset_help = "settings for each number of steps, of selfe tune-sampler, which become part of the exported folder"
    parser.add_argument("--preset", type=path, metavar="FILE", help=preset_help)
    trust(parser)


def publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, metavar="RUN", help="output folder of a training run")
    parser.add_argument("--to", required=True, metavar="USER/NAME", help="repository of the Hugging Face Hub")
    parser.add_argument("--checkpoint", type=path, help="checkpoint directory (default: the newest of the run)")
    parser.add_argument("--out", type=path, help="folder to write (default: RUN/publish)")
    parser.add_argument("--weights", default="ema", help=WEIGHTS)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the denoiser")
    parser.add_argument("--format", choices=("safetensors", "diffusers"), default="safetensors")
    parser.add_argument("--license", metavar="ID", help="licence of the model, such as apache-2.0 or other")
    statement_help = "Markdown file that describes the data, for the model card"
    parser.add_argument("--data-statement", type=path, metavar="FILE", help=statement_help)
    parser.add_argument("--push", action="store_true", help="upload the folder")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    trust(parser)


def report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN")
    parser.add_argument("--out", type=path, default=Path("report.html"), help="HTML file (default: %(default)s)")
    sheets_help = "steps of each run whose sample sheets are embedded, evenly spaced (default: %(default)s)"
    parser.add_argument("--sheets", type=at_least(1), default=40, help=sheets_help)
    table_help = "also write a table of all evaluations, Markdown (.md) or LaTeX (.tex); may be repeated"
    parser.add_argument("--table", type=path, action="append", default=[], metavar="FILE", help=table_help)
    parser.add_argument("--serve", action="store_true", help="serve the page on this machine and update it")
    parser.add_argument("--port", type=int, help="of --serve (default: the first free one from 7870)")


def replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, metavar="RUN", help="a run's output folder")
    parser.add_argument("step", type=int, metavar="STEP", help="a step recorded in RUN/skipped")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def demo(parser: argparse.ArgumentParser) -> None:
    checkpoint = "checkpoint directory, a parent directory (newest is used), or an exported folder"
    parser.add_argument("ckpt", type=path, help=checkpoint)
    parser.add_argument("--config", type=path, help="the run's config.yaml (default: next to the checkpoints)")
    parser.add_argument("--weights", default="ema", help=WEIGHTS)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    trust(parser)
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--preset", type=path, metavar="FILE", help="of selfe tune-sampler (default: the run's)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--listen-on-all-interfaces", action="store_true", help="accept other machines; there is no password"
    )


def gallery(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=path, help="output folders of infer.sh; several are compared")
    parser.add_argument("--output", type=path, help="HTML file (default: gallery.html; compare.html for several)")
    parser.add_argument("--embed-mb", type=float, default=24, help="image data embedded in the page, at most")


def cache_pretrained(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache-dir", type=path, required=True, metavar="DIR", help="destination; created if missing")
    parser.add_argument("--hf-token", metavar="TOKEN", help="a Hugging Face token (default: HF_TOKEN); not stored")
    parser.add_argument("--flux-vae-only", action="store_true", help="skip FLUX's transformer (24 GB)")
    text_help = "only this text encoder, a name on the Hub such as Qwen/Qwen3-0.6B; may be repeated"
    parser.add_argument("--text-encoder", action="append", default=[], metavar="ID", help=text_help)
    vae_help = "only this autoencoder of diffusers, such as stabilityai/sdxl-vae or OWNER/PIPELINE/vae; may be repeated"
    parser.add_argument("--autoencoder", action="append", default=[], metavar="ID", help=vae_help)
    vision_help = "only this vision model, such as facebook/dinov2-base; may be repeated"
    parser.add_argument("--vision-model", action="append", default=[], metavar="ID", help=vision_help)


def doctor(parser: argparse.ArgumentParser) -> None:
    config_help = "YAML file whose encoders are checked (default: what the cache folder holds)"
    parser.add_argument("config", nargs="?", type=path, metavar="CONFIG", help=config_help)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    cache_dir = os.environ.get("SELFE_CACHE_DIR")
    parser.add_argument("--cache-dir", default=cache_dir, metavar="DIR", help="default: SELFE_CACHE_DIR")
    parser.add_argument("--output-dir", type=path, default=Path("runs"), help="where runs are written (default: runs)")


TRAINING = ("system", "data", "trainer")
VERBS = {
    "train": Verb(
        "selfe.launch",
        "Train. Run the same command again to resume an interrupted run from its newest checkpoint.",
        processes,
        PROCESSES.format(override="trainer.lr=2e-4", grace=GRACE, signals=SIGNALS),
        TRAINING,
    ),
    "infer": Verb(
        "selfe.launch",
        "Generate images from a checkpoint. Run the same command again to finish an interrupted job.",
        processes,
        PROCESSES.format(override="""'inferencer.prompts=["a red bird on a branch"]'""", grace="", signals=""),
        ("system", "inferencer"),
    ),
    "evaluate": Verb(
        "selfe.tools.evaluate",
        "Measure the images of a sampling job against real images and captions, by number of sampling steps.",
        evaluate,
        "A config is sampled first, as far as images are missing. Run the same command again to resume.\n"
        "Keys of the section evaluation, also of extractors of your own: docs/evaluation.md",
    ),
    "benchmark": Verb(
        "selfe.tools.benchmark",
        "Prompts of benchmarks, files for their official scorers, and the results of these as an evaluation.",
        benchmark,
        "  selfe benchmark prompts geneval --out geneval.jsonl\n"
        "  selfe benchmark layout geneval JOB      then JOB/geneval/run.sh, in the environment of the scorer\n"
        "  selfe benchmark read geneval JOB\n"
        "How to install the scorers, and a scorer without mmdet: docs/benchmarks.md",
    ),
    "tune-sampler": Verb(
        "selfe.tools.tune_sampler",
        "Search the best guidance, s ratio, eta, guidance interval and sampler for each number of sampling steps.",
        tune_sampler,
        "The result is a preset file (inferencer.defaults.preset). Run the same command again to resume.\n"
        "What is varied, and how: docs/sampling.md",
    ),
    "plan": Verb(
        "selfe.tools.plan.command",
        "Estimate time, memory, communication and disk before a run (no weights needed).",
        plan,
        "FLOPs and memory are those of the real training step, run on torch's meta device; per-rank shares are those\n"
        "of real FSDP2 under torch's fake process group.",
        TRAINING,
    ),
    "check-data": Verb(
        "selfe.tools.check_data",
        "Validate a manifest, tar shards or tables: every caption and image; all problems are reported in one pass.",
        check_data,
        "exit codes: 0 no problems; 1 problems found; 2 user error",
    ),
    "check-latents": Verb(
        "selfe.tools.check_latents",
        "Encode and decode some images: mean and deviation of the latents, and the likely wrong constant.",
        check_latents,
        "exit codes: 0 the latents can be trained on; 2 they cannot, or user error",
    ),
    "precompute": Verb(
        "selfe.tools.precompute",
        "Encode all images and captions of a training config once, so that training loads no encoder.",
        precompute,
        "Run the same command again to resume, on any number of processes:\n"
        "  torchrun --nproc-per-node 8 -m selfe precompute CONFIG --out DIR\n"
        "OUT/config.yaml trains from the cache.",
        TRAINING,
    ),
    "probe-text": Verb(
        "selfe.tools.probe_text",
        "Measure how well a config's text encoder distinguishes captions: swapped attributes, counts, negations.",
        probe_text,
        "Each line of PROMPTS has a kind, a caption, the same in other words, and other meanings, separated by tabs.",
        ("system",),
    ),
    "make-manifest": Verb(
        "selfe.tools.make_manifest.command",
        "Convert a folder, table, parquet or Hugging Face data set of captioned images to a manifest or tar shards.",
        make_manifest,
        "A folder has images with a .txt or .caption beside each, or a metadata.jsonl, .csv or .parquet.\n"
        "What cannot be used is left out, counted and named; the rest is written.\n\n"
        "exit codes: 0 everything converted; 1 something left out; 2 user error, nothing is written",
    ),
    "make-shards": Verb(
        "selfe.tools.make_shards",
        "Pack the images of a manifest into tar shards (WebDataset layout).",
        make_shards,
        "Image files are copied unchanged. Run the same command again to resume. To train from the shards:\n"
        "  data.module=selfe.data.shards.ShardData data.params.train_manifest='OUT/*.tar'",
    ),
    "export": Verb(
        "selfe.tools.export.command",
        "Export a checkpoint's denoiser to safetensors (FLUX names) or to a diffusers pipeline.",
        export,
    ),
    "publish": Verb(
        "selfe.tools.publish.command",
        "Write a run with its model card as a folder for the Hugging Face Hub, and upload it with --push.",
        publish,
        "Without --push, nothing is uploaded. To continue an interrupted upload, run the same command again.\n"
        "The token is that of `hf auth login`, or HF_TOKEN.",
    ),
    "doctor": Verb(
        "selfe.tools.doctor",
        "Check this machine: GPU driver, torch, NCCL, shared memory, disk, weights of the encoders of a config.",
        doctor,
        "exit codes: 0 no errors (warnings are allowed); 2 errors",
    ),
    "report": Verb(
        "selfe.tools.report.command",
        "Show one run or many on one page, also while they train: metrics, samples, maps over (t, s), configs.",
        report,
        "Without --serve, the page is one HTML file that needs no network. With --serve, it listens on 127.0.0.1 and\n"
        "reads the run folders again every few seconds. From another machine: ssh -L 7870:127.0.0.1:7870 HOST",
    ),
    "replay": Verb("selfe.tools.replay", "Run a batch that was skipped during training again.", replay),
    "verify-resume": Verb(
        "selfe.tools.verify_resume",
        "Train a few steps twice, once killed and resumed, and compare the results bitwise.",
        processes,
        "environment\n  VERIFY_STEPS   number of steps (default 8)\n"
        "  VERIFY_SEED    seed for the time of the kill (random by default, and printed)\n\n"
        "Needs disk space for four checkpoints next to the config's output_dir.",
        TRAINING,
    ),
    "demo": Verb("selfe.tools.demo", "Serve a page on this machine to try a checkpoint in a browser.", demo),
    "gallery": Verb("selfe.gallery.build", "Build the offline HTML gallery of one or several sampling jobs.", gallery),
    "cache-pretrained": Verb(
        "selfe.tools.cache_pretrained",
        "Download the frozen encoders (T5-XXL, CLIP-L, FLUX VAE) to SELFE_CACHE_DIR. Resumes when run again.",
        cache_pretrained,
        "FLUX.1-dev is gated: accept its licence on Hugging Face first. Every file is checked against the Hub's hash.",
    ),
}

if __name__ == "__main__":
    main()
