"""`selfe doctor`: its results on machines that lack something."""

import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import save_file

from selfe import cli
from selfe.errors import UserError
from selfe.tools import doctor

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
