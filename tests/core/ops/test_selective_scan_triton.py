"""The Triton kernels' arithmetic without a GPU: the backend tests again, with Triton's interpreter on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

FOLDER = Path(__file__).parent
SELECTED = {
    "test_selective_scan.py": "triton and ((any_size and not 33) or nan_stays or (grouped and bfloat16))",
    "test_fused.py": "triton",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the same tests on the compiled kernels")
@pytest.mark.parametrize("name", SELECTED)
def test_interpreted_kernels_equal_their_reference(name):
    # TRITON_INTERPRET is read when Triton is imported, hence another process.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / name), "-k", SELECTED[name]]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 4, done.stdout[-1000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-1000:]
