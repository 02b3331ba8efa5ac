"""Usual mistakes in a config or a command: one line with place and remedy, before torch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfe import cli
from selfe.errors import UserError

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/debug/selfe_smoke.yaml")
INFER = str(ROOT / "configs/infer/selfe.yaml")

OVERRIDES = [
    # names of other programs, spelling, a forgotten section
    ("trainer.learning_rate=1e-4", "command line: trainer.learning_rate: unknown key; did you mean lr?"),
    ("trainer.batch_size=4", "command line: trainer.batch_size: unknown key; did you mean total_batch_size?"),
    ("trainer.steps=4", "command line: trainer.steps: unknown key; did you mean max_steps?"),
    ("trainer.output=out", "command line: trainer.output: unknown key; did you mean output_dir?"),
    ("trainer.max_stepz=4", "command line: trainer.max_stepz: unknown key; did you mean max_steps?"),
    ("trianer.lr=1e-4", "command line: trianer: unknown section; did you mean trainer?"),
    ("learning_rate=1e-4", "command line: learning_rate: unknown section; did you mean trainer.lr?"),
    ("trainer.health.sigma=3", "command line: trainer.health.sigma: unknown key; did you mean sigmas?"),
    (
        "trainer.optimizer={module: selfe.optimizers.muon.Muon, params: {betas: [0.9, 0.95]}}",
        "command line: trainer.optimizer.params.betas: unknown key; set trainer.betas, which holds for every choice",
    ),
    (
        "trainer.schedule={module: selfe.training.schedules.WSD, params: {min_lr: 0.0}}",
        "command line: trainer.schedule.params.min_lr: unknown key; set trainer.min_lr, which holds for every choice",
    ),
    # values
    ("trainer.lr=fast", "command line: trainer.lr: expected float, got str 'fast'"),
    ("seed=abc", "command line: seed: expected int, got str 'abc'"),
    ("seed=1.5", "command line: seed: expected int, got float 1.5"),
    ("seed=null", "command line: seed: expected int, got NoneType None"),
    ("seed=-1", "command line: seed: must be between 0 and 9223372036854775807, got -1"),
    (f"seed={10**30}", f"command line: seed: must be between 0 and 9223372036854775807, got {10**30}"),
    ("trainer.max_steps=1.5", "command line: trainer.max_steps: expected int, got float 1.5"),
    (
        "trainer.precision=fp16",
        "command line: trainer.precision: expected one of 'auto', 'bf16', 'fp32', got 'fp16'",
    ),
    ("trainer.betas=[0.9]", "command line: trainer.betas: expected 2 values, got 1: [0.9]"),
    ("trainer.max_steps=010", "command line: 'trainer.max_steps=010': 010 would be read as a number in octal"),
    ("trainer.max_steps=???", "command line: trainer.max_steps: missing; this key has no default, give it a value"),
    ("trainer..lr=1", "command line: 'trainer..lr=1' is not key=value, such as trainer.lr=2e-4"),
    ("trainer.output_dir=${nowhere}", "command line: trainer.output_dir: Interpolation key 'nowhere' not found"),
    # parts
    (
        "system.backbone.module=selfe.backbones.mmdit.MMDit",
        "'selfe.backbones.mmdit.MMDit' is not the dotted path of a class: module 'selfe.backbones.mmdit' has no "
        "attribute 'MMDit'; did you mean MMDiT?",
    ),
    (
        "system.backbone.module=selfe.backbones.mmditt.MMDiT",
        "system.backbone.module: cannot import selfe.backbones.mmditt.MMDiT: No module named 'selfe.backbones.mmditt'",
    ),
    (
        "data.module=my_data.Parquet",
        "data.module: cannot import my_data.Parquet: No module named 'my_data'; is the folder of my_data in "
        "PYTHONPATH?",
    ),
    ("system.backbone.params.heads=4", "system.backbone.params.heads: unknown key; "),
    # files
    ("data.params.train_manifest=a.tsv", "data.params.train_manifest: a.tsv: no such file; relative paths start from"),
    ("data.params.train_manifest=docs", "docs: is a folder; a manifest is a file, selfe make-manifest makes one"),
    (
        "system.text_encoder.params.skip_pretrained=false",
        "system.text_encoder.params.cache_dir: SELFE_CACHE_DIR is not set; set it to the directory of the weights",
    ),
]
FILES = [
    ("trainer: {lr: 1", "line 1: not valid YAML: "),
    ("trainer:\n\tlr: 1", "line 2: not valid YAML: "),
    ("- trainer", "the file must be a mapping of sections"),
    ("base: nowhere.yaml", "nowhere.yaml: no such config file; base paths are relative to the file that names them"),
    (f"base: {SMOKE}\ntrainer: {{init_from: None}}", "got the text 'None'; the absent value is written null"),
    (f"base: {SMOKE}\ntrainer.lr: 1", "trainer.lr: unknown section; keys with dots are for the command line"),
]
COMMANDS = [
    (["train", "nowhere.yaml"], "nowhere.yaml: no such config file; the first argument is a YAML file"),
    (["train", "configs"], "configs: is a folder; the first argument is a YAML file"),
    (["train", SMOKE, "0"], "NGPUS: '0' is not a number of at least 1"),
    (["train", SMOKE, "two"], "NGPUS: 'two' is not a number of at least 1"),
    (["train", SMOKE, "2", "trainer.lr"], "'trainer.lr' is not key=value"),
    (["train", INFER], "data: this section is missing; add it, or name a base file that has it"),
    (["infer", INFER], "inferencer.ckpt_dir: runs/selfe_2b/checkpoints: no such checkpoint directory"),
    (["infer", INFER, "inferencer.ckpt_dir=docs"], "inferencer.defaults.prompt_file: prompts.txt: no such file"),
    (["plan", SMOKE, "--gpus", "1", "trainer.lrr=1"], "command line: trainer.lrr: unknown key; did you mean lr?"),
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("SELFE_CACHE_DIR", raising=False)
    monkeypatch.setenv("SELFE_SKIP_PRETRAINED", "1")


def mistake(*arguments: str) -> str:
    """The line that a command answers with before anything is started."""
    with pytest.raises(UserError) as caught:
        cli.check_config(cli.parse(arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("override", "line"), OVERRIDES)
def test_an_override(override, line):
    assert line in mistake("train", SMOKE, override)


@pytest.mark.parametrize(("content", "line"), FILES)
def test_a_file(tmp_path, content, line):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    assert line in (message := mistake("train", str(path)))
    assert str(path) in message


@pytest.mark.parametrize(("arguments", "line"), COMMANDS)
def test_a_command(arguments, line):
    assert line in mistake(*arguments)


def test_a_flag_in_place_of_a_key(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse(["train", SMOKE, "--lr", "1e-4"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "keys of the config are written key=value, such as trainer.lr=1e-4; see selfe train --help" in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["train", SMOKE, "trainer.learning_rate=1"],
            "command line: trainer.learning_rate: unknown key; did you mean lr?",
        ),
        (["infer", SMOKE, "2x"], "NGPUS: '2x' is not a number of at least 1; see --help"),
    ],
)
def test_the_program_answers_without_torch(tmp_path, arguments, line):
    """A module of the name torch that cannot be imported comes first in the path."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "selfe", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"selfe: error: {line}\n"
    assert done.stdout == ""
