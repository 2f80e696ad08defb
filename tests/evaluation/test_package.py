"""The package without Detectron2."""

import subprocess
import sys

import pytest

from mfuser_d2 import evaluation

BLOCK = "import sys; sys.modules['detectron2'] = None\n"


def test_evaluation_and_visualization_need_no_detectron2() -> None:
    program = BLOCK + (
        "import numpy as np, mfuser_d2.visualization\n"
        "from mfuser_d2.evaluation import ConfusionMatrix, summarize, target_mean\n"
        "assert 'mfuser_d2.core' not in sys.modules, 'evaluation imports core'\n"
        "try:\n    from mfuser_d2.evaluation import build_evaluator\n"
        "except ImportError:\n    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "refused"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        evaluation.nothing  # noqa: B018
