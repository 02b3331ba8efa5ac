"""`selfe doctor`: its results on machines that lack something."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from selfe import cli
from selfe.errors import UserError
from selfe.tools import doctor
from tests.helpers.encoder_files import ROOT, write_text_model

Usage = namedtuple("Usage", "total used free")


def test_every_check_of_this_machine_prints_a_line(tmp_path, capsys):
    cli.run(["doctor", "--output-dir", str(tmp_path / "runs")])
    subjects = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert subjects[:3] == ["python", "torch", "devices"]
    assert subjects[-2:] == ["disk", "encoders"]


def test_small_shared_memory_is_a_warning_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 * 2**20, 0, 64 * 2**20))
    finding = doctor.shared_memory(tmp_path)
    assert finding.status == "warning"
    assert "holds only 64 MiB; start the container with --shm-size=8g or --ipc=host" in str(finding)


def test_a_driver_that_torch_cannot_use_is_an_error(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 525.60.13\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.torch_build().status == "error"
    with pytest.raises(UserError, match=r"^1 of \d+ checks failed"):
        cli.run(["doctor", "--output-dir", str(tmp_path)])


def test_weights_of_the_encoders_are_opened(tmp_path):
    (tmp_path / doctor.WEIGHTS["clip"]).mkdir()
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / doctor.WEIGHTS["clip"] / "model.safetensors")
    (tmp_path / doctor.WEIGHTS["autoencoder"]).write_bytes(b"cut")

    findings = {finding.subject: finding for finding in doctor.encoder_weights(str(tmp_path))}
    assert findings["clip"].text.startswith("2 tensors in")
    assert "not found; set SELFE_CACHE_DIR" in findings["t5"].text
    assert "cannot be read" in findings["autoencoder"].text


def test_models_that_were_downloaded_by_name_are_opened(tmp_path):
    """With or without those of the paper."""
    write_text_model(tmp_path / "lab/bert", "bert")
    entry = {"repo": "lab", "commit": "0", "files": {}}
    (tmp_path / "fetched.json").write_text(json.dumps({"lab/bert/model": entry, "lab/gone/model": entry}))
    bert, gone = [result for result in doctor.encoder_weights(str(tmp_path)) if result.subject == "model"]
    assert bert.status == "ok"
    assert bert.text.endswith(f"tensors in {tmp_path}/lab/bert")
    assert gone.status == "error"
    assert "lab/gone" in str(gone)
    assert "run selfe cache-pretrained for it again" in str(gone)


def config_of(tmp_path, text_encoder: dict) -> Path:
    """The emoji config with another text encoder, in a file."""
    path = tmp_path / "config.yaml"
    text_encoder = {"module": "selfe.encoders.hf_text.HFText", "params": text_encoder}
    path.write_text(
        json.dumps({"base": str(ROOT / "configs/emoji/base.yaml"), "system": {"text_encoder": text_encoder}})
    )
    return path


def test_the_encoders_of_a_config_are_built_from_their_files(tmp_path, capsys):
    write_text_model(tmp_path / "lab/bert", "bert")
    path = config_of(tmp_path, {"model": "lab/bert", "text_dim": 32, "max_tokens": 64})
    options = [str(path), "--cache-dir", str(tmp_path), "--output-dir", str(tmp_path)]
    cli.run(["doctor", *options])
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["text_encoder"].startswith("ok ")
    assert f"tensors in {tmp_path}/lab/bert" in lines["text_encoder"]
    assert lines["autoencoder"].endswith("selfe.encoders.identity.Identity needs no files")
    assert "t5" not in lines

    (tmp_path / "lab/bert/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"^1 of \d+ checks failed"):
        cli.run(["doctor", *options])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[1] == "text_encoder"]
    assert line.startswith("error ")
    assert "selfe cache-pretrained --text-encoder lab/bert" in line


def test_the_encoders_of_the_paper_are_found_by_a_config(tmp_path):
    settings = {
        "system": {
            "text_encoder": {"module": "selfe.encoders.t5_clip.T5Clip", "params": {}},
            "autoencoder": {"module": "selfe.encoders.flux_vae.FluxVAE", "params": {"skip_pretrained": True}},
        }
    }
    for name in (doctor.T5_FOLDER, doctor.CLIP_FOLDER):
        (tmp_path / name).mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / name / "model.safetensors")
    text, autoencoder = doctor.encoders_of(settings, str(tmp_path))
    assert text.status == "ok"
    assert text.text.count("1 tensors in") == 2
    assert autoencoder.text == "selfe.encoders.flux_vae.FluxVAE has random weights (skip_pretrained)"

    # a training aid around another one
    vision = {"module": doctor.HF_VISION, "params": {"model": "lab/dino"}}
    repa = {"module": "selfe.objectives.repa.Repa", "params": {"encoder": vision, "layer": "double_blocks.0"}}
    settings["system"]["objective"] = {"module": "selfe.objectives.tread.Tread", "params": {"objective": repa}}
    *_, features = doctor.encoders_of(settings, str(tmp_path))
    assert (features.subject, features.status) == ("features", "error")
    (tmp_path / "lab/dino").mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, tmp_path / "lab/dino/model.safetensors")
    *_, features = doctor.encoders_of(settings, str(tmp_path))
    assert str(features) == f"ok       features       1 tensors in {tmp_path}/lab/dino"
    del settings["system"]["objective"]

    (text, _) = doctor.encoders_of(settings, None)
    assert text.status == "error"
    assert "SELFE_CACHE_DIR" in text.text
