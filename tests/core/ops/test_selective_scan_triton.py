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
SELECTED = "triton_equals_plain or (triton and (nan_stays or 1-1-1 or (grouped and (float32 or bfloat16))))"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the same tests on the compiled kernels")
def test_interpreted_kernels_equal_their_reference():
    # TRITON_INTERPRET is read when Triton is imported, hence another process.
    files = [str(FOLDER / name) for name in ("test_selective_scan.py", "test_fused.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", SELECTED]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    summary = done.stdout.splitlines()[-1]
    assert int(re.search(r"(\d+) passed", summary).group(1)) >= 12 and "skipped" not in summary, done.stdout[-1000:]


SCAN = {"N": 16, "BLOCK_N": 16, "BLOCK_D": 2, "BLOCK_T": 512, "HAS_D": True, "HAS_BIAS": True, "SOFTPLUS": True}
KERNELS = {
    "scan_forward_kernel": ("u delta A B C D bias y state saved", {**SCAN, "KEEP": True}),
    "scan_backward_kernel": (
        "grad_y grad_state u delta A B C D bias saved grad_u grad_delta grad_A grad_B grad_C grad_D grad_bias",
        SCAN,
    ),
    "conv_forward_kernel": ("x weight out", {"BLOCK_T": 32, "BLOCK_C": 64}),
    "conv_backward_kernel": ("x weight grad grad_x grad_weight", {"BLOCK_T": 32, "BLOCK_C": 64}),
    "norm_forward_kernel": ("y gate weight out", {"BLOCK": 512}),
    "norm_backward_kernel": ("y gate weight grad grad_y grad_gate grad_weight", {"BLOCK": 512}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu_that_is_not_there(name, tmp_path, monkeypatch):
    triton = pytest.importorskip(
        "triton", minversion="3.3", reason="the compiler's interface differs before Triton 3.3"
    )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mfuser_d2.core.ops import fused_triton
    from mfuser_d2.core.ops.selective_scan import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_kernels, name, None) or getattr(fused_triton, name)
    pointers, constants = KERNELS[name]
    types = {**dict.fromkeys(pointers.split(), "*fp32"), **dict.fromkeys(constants, "constexpr"), "eps": "fp32"}
    source = ASTSource(
        kernel,
        {argument: types.get(argument, "i32") for argument in kernel.arg_names},
        constexprs={(kernel.arg_names.index(argument),): value for argument, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4})
    assert len(compiled.asm["cubin"]) > 1000
