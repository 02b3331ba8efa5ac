"""The TorchScript file of Inception: what its layers are given, and one line for another file. The layers are tiny."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfe.errors import UserError
from selfe.evaluation.inception import Inception
from tests.evaluation.test_hf_extractor import as_clean_fid, images


class Network(nn.Module):
    """A network with the interface of the file."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture
def path(tmp_path) -> Path:
    torch.jit.script(Network()).save(tmp_path / "inception.pt")
    return tmp_path / "inception.pt"


def test_the_layers_get_images_as_in_clean_fid(path):
    extractor = Inception(path)
    extractor.load(torch.device("cpu"))
    features = extractor(images(), [""] * 3)["features"]
    inputs = np.stack([(as_clean_fid(image, 299) - 128) / 128 for image in images()])
    wanted = Network()(torch.from_numpy(inputs).float().permute(0, 3, 1, 2)).flatten(1)
    torch.testing.assert_close(features, wanted, atol=1e-4, rtol=1e-4)
    assert len(extractor.record()["weights"]) == 64


def test_other_files_are_refused_in_one_line(path, tmp_path):
    with pytest.raises(UserError, match=r"none.pt: no such file; download it from https://"):
        Inception(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(UserError, match=r"text.pt: not the TorchScript file of Inception"):
        Inception(tmp_path / "text.pt").load(torch.device("cpu"))
