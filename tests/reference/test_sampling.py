"""Rare-class probabilities recorded from the authors' release."""

import json
from pathlib import Path

import numpy as np
import pytest

from mfuser_d2.data.sampler import rare_class_probabilities


@pytest.mark.parametrize(("key", "temperature"), [("rcs_T100", 100.0), ("rcs_T0.01", 0.01)])
def test_probabilities(reference_dir: Path, key: str, temperature: float) -> None:
    recorded = json.loads((reference_dir / "training_reference.json").read_text())[key]
    counts = np.zeros(19, np.int64)
    for image in recorded["stats"]:
        for name, pixels in image.items():
            if name != "file":
                counts[int(name)] += pixels
    classes, probabilities = rare_class_probabilities(counts, temperature)
    assert classes.tolist() == recorded["classes"]
    np.testing.assert_allclose(probabilities, recorded["probs"], rtol=1e-4, atol=1e-30)
