"""How setup.py builds the `cpu` backend; the installation goes on without it where it cannot be built.

    build = <this file, loaded by its path>
    setup(..., ext_modules=build.extensions(), cmdclass=build.cmdclass())

Imports nothing of the package, and torch only inside the functions; without torch there are no extensions. Sources are
relative to the folder of setup.py, as setuptools wants them. With `pip install --no-build-isolation -e .`, or
`python setup.py build_ext --inplace`, the library lands beside this file, where cpu.py looks for it.
"""

from __future__ import annotations

import logging
import sys

FOLDER = "mfuser_d2/core/ops/selective_scan"
MODULE = "mfuser_d2.core.ops.selective_scan._cpu"

logger = logging.getLogger(__name__)


def extensions() -> list:
    """The C++ extension for setuptools, or none where torch is missing or the platform has no GCC-like compiler."""
    if sys.platform == "win32":
        logger.warning("%s is not built: it needs GCC's or Clang's vector types", MODULE)
        return []
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError:
        logger.warning("%s is not built: torch is missing; install with --no-build-isolation", MODULE)
        return []
    flags = ["-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    if sys.platform == "linux":
        flags.append("-fopenmp")  # at::parallel_for is a template; without this it runs on one thread
    extension = CppExtension(
        MODULE,
        [f"{FOLDER}/cpu.cpp"],
        depends=[f"{FOLDER}/cpu_kernel.h"],
        extra_compile_args=flags,
        extra_link_args=[flag for flag in flags if flag == "-fopenmp"],
    )
    extension.optional = True
    return [extension]


def cmdclass() -> dict[str, type]:
    """`build_ext` that turns any failure of the compiler into one log line."""
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **{**kwargs, "use_ninja": False})  # one source: ninja would gain nothing

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                reason = str(error).strip().splitlines()
                logger.warning(
                    "%s is not built, the slower torch scan is used: %s", MODULE, reason[-1] if reason else error
                )

    return {"build_ext": OptionalBuild}
