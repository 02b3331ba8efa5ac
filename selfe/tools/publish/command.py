"""The verb `selfe publish`: a run as a folder for the Hugging Face Hub, and its upload.

    card.py      the model card, from the records of the run
    curves.py    the loss over the steps as an image
    upload.py    the upload, whose errors are one line

Without --push nothing leaves this machine: the folder is written and its files are listed.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from selfe import compare, config, recorded_run
from selfe.checkpoint import verify
from selfe.errors import UserError
from selfe.evaluation import results
from selfe.io import image_encode
from selfe.tools.export import command as export
from selfe.tools.publish import card, upload
from selfe.tools.publish.curves import draw_curves
from selfe.tools.report.lines import JsonLines

RECORD = ".publish.json"  # what the folder was made from; not uploaded


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe publish`."""
    upload.check_name(options.to)
    if options.push and options.license is None:
        raise UserError("--license: choose the licence of the model before it is uploaded, such as apache-2.0 or other")
    run = options.run
    if not (run / "config.yaml").is_file() or not (run / "checkpoints").is_dir():
        raise UserError(f"{run}: no run; give the output folder of a training, with config.yaml and checkpoints/")

    # a folder that is complete is uploaded as it is, so that an interrupted upload continues
    checkpoint = verify.find(options.checkpoint or run / "checkpoints")
    names = ("to", "weights", "dtype", "format", "license")
    made_from = {name: getattr(options, name) for name in names} | {"checkpoint": str(checkpoint.absolute())}
    made_from["data_statement"] = read_statement(options.data_statement)
    out = options.out or run / "publish"
    if not is_made_from(out, made_from):
        write_folder(out, run, checkpoint, made_from, options.trust)

    files = {path.relative_to(out): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    files.pop(Path(RECORD))
    for name, size in files.items():
        print(f"{size / 1e6:12,.3f} MB  {name}")
    print(f"{sum(files.values()) / 1e6:12,.3f} MB  in {len(files)} files for {options.to}, in {out}")
    for warning in card.open_questions(made_from):
        print(f"warning: {warning}")

    if options.push:
        print(f"uploaded: {upload.push(out, options.to, options.private, ignore=[RECORD])}")
    else:
        print("nothing was uploaded; read README.md, and run the same command with --push")


def read_statement(path: Path | None) -> str | None:
    """The Markdown of a data statement."""
    if path is not None and not path.is_file():
        raise UserError(f"--data-statement: {path}: no such file; give a Markdown file that describes the data")
    return path and path.read_text(encoding="utf-8").strip()


def is_made_from(out: Path, facts: dict[str, Any]) -> bool:
    """Whether a folder is what a publication with these facts writes. Raises UserError if it is something else."""
    if not out.exists():
        return False
    if not (out / RECORD).is_file():
        raise UserError(f"{out}: exists and was not written by selfe publish; choose another --out")
    before = json.loads((out / RECORD).read_text(encoding="utf-8"))
    if changed := sorted(key for key in facts if before.get(key) != facts[key]):
        raise UserError(
            f"{out}: was written with another {', '.join(changed)}; remove the folder, which may hold your changes, or "
            "choose another --out"
        )
    return True


def write_folder(out: Path, run: Path, checkpoint: Path, facts: dict[str, Any], trust: bool) -> None:
    """Write the folder: exported weights, configs, model card, samples, curves and records of evaluations."""
    name = facts["to"].partition("/")[2]
    with export.complete_folder(out.absolute()) as folder:
        folder.rmdir()  # made anew by the export
        exported = argparse.Namespace(
            ckpt=checkpoint, out=folder, ema_std=None, adapter_only=False, preset=None, trust=trust
        )
        for option in ("weights", "dtype", "format"):
            setattr(exported, option, facts[option])
        export.run(exported)

        # configs without the folders of this machine
        settings = recorded_run.load_settings(run / "config.yaml", trust)
        write_config(settings, folder / "training.yaml", name)
        if (folder / "config.yaml").is_file():
            write_config(config.resolve(folder / "config.yaml"), folder / "config.yaml", name)

        # images and records
        step = verify.read_step(checkpoint)
        _, lines = JsonLines(run / "metrics.jsonl").read_new()
        lines = [line for line in lines if line["step"] <= step]
        if curves := draw_curves(lines):
            curves.save(folder / "curves.png")
        sheets = [path for path in sorted(run.glob("samples/step_*.png")) if step_of(path) <= step]
        if sheets:
            shutil.copy(sheets[-1], folder / "samples.png")
        evaluations = copy_evaluations(run, step, folder / "evaluations")

        text = card.write(run, checkpoint, settings, facts, lines, evaluations, folder)
        (folder / "README.md").write_text(text, encoding="utf-8")
        image_encode.write(folder / RECORD, json.dumps(facts).encode())


def copy_evaluations(run: Path, step: int, folder: Path) -> list[results.Evaluation]:
    """Copy the records of evaluations: of sampling jobs inside of the run, and the last one during training."""
    during = sorted(run.glob(f"{results.DURING_TRAINING}/step_*.json"))
    during = [path for path in during if step_of(path) <= step][-1:]
    evaluations = []
    for path in [*sorted(run.glob(f"*/{results.FILE}")), *during]:
        results.Evaluation.read(path)  # refuses what is no record
        folder.mkdir(exist_ok=True)
        record = without_folders(json.loads(path.read_text(encoding="utf-8")))
        name = f"{path.parent.name}.json" if path.name == results.FILE else path.name
        (folder / name).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        evaluations.append(results.Evaluation.read(folder / name))
    return evaluations


def step_of(path: Path) -> int:
    """The number of steps in a file name such as step_00001000.png."""
    return int(path.stem.removeprefix("step_"))


def write_config(settings: dict, path: Path, name: str) -> None:
    """Write a config without the folders of this machine; pretrained encoders are looked for in SELFE_CACHE_DIR."""
    tree = without_folders(config.escape(config.plain(settings)))
    tree["system"] = compare.uncached(tree["system"])
    for part_name, part in tree["system"].items():
        for _, pretrained in config.pretrained_parts(part, part_name):
            pretrained["params"]["cache_dir"] = "${oc.env:SELFE_CACHE_DIR,null}"
    if "inferencer" in tree:
        tree["inferencer"] |= {"ckpt_dir": name, "output_dir": f"outputs/{name}"}
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100), encoding="utf-8")


def without_folders(value: Any) -> Any:
    """Settings or records in which absolute paths are reduced to their last part."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(item) for item in value]
    is_path = isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value
    return Path(value).name if is_path else value
