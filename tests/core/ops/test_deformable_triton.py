"""The kernels of deformable attention without a GPU: interpreted against the plain path, and compiled for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

FOLDER = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the same test on the compiled kernels")
def test_interpreted_kernels_equal_the_plain_path():
    # TRITON_INTERPRET is read when Triton is imported, hence another process.
    file = str(FOLDER / "test_deformable_attention.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", "triton_equals_plain"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "2 passed" in done.stdout.splitlines()[-1] and "skipped" not in done.stdout, done.stdout[-1000:]


@pytest.mark.parametrize(
    ("name", "pointers"),
    [
        ("deform_forward_kernel", "value places weights out"),
        ("deform_backward_kernel", "value places weights grad grad_value grad_places grad_weights"),
    ],
)
def test_kernels_compile_for_a_gpu_that_is_not_there(name, pointers, tmp_path, monkeypatch):
    triton = pytest.importorskip(
        "triton", minversion="3.3", reason="the compiler's interface differs before Triton 3.3"
    )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mfuser_d2.core.ops import deformable_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(deformable_triton, name)
    constants = {"LEVELS": 3, "POINTS": 4, "BLOCK_Q": deformable_triton.BLOCK_Q, "BLOCK_C": 32}
    types = {**dict.fromkeys(pointers.split(), "*fp32"), **dict.fromkeys(constants, "constexpr"), "levels": "*i32"}
    source = ASTSource(
        kernel,
        {argument: types.get(argument, "i32") for argument in kernel.arg_names},
        constexprs={(kernel.arg_names.index(argument),): value for argument, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4})
    assert len(compiled.asm["cubin"]) > 1000
