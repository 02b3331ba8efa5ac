"""Image files of other programs are read to the right pixels, or refused with their cause."""

from io import BytesIO

import numpy as np
import pytest

from selfe.io import image_decode
from selfe.types import BadSample
from tests.helpers import image_files

CASES = image_files.all_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_file_gives_the_pixels_that_it_stands_for_or_its_cause(case, tmp_path):
    path = tmp_path / case.name
    path.write_bytes(case.content)

    if case.error:
        with pytest.raises(BadSample) as refused:
            image_decode.read(path, case.name)
        assert case.error in str(refused.value)
        assert str(refused.value).startswith(f"{case.name}: cannot be decoded (")
        return

    pixels = np.asarray(image_decode.read(path, case.name)).astype(int)
    assert pixels.shape == case.pixels.shape
    assert np.abs(pixels - case.pixels).max() <= case.tolerance
    assert image_decode.size(path, case.name) == case.pixels.shape[:2]
    assert (np.asarray(image_decode.read(BytesIO(case.content), case.name)) == pixels).all()
