"""Packaging of mfuser_d2.

The ranges below were tested; tools/tested_versions.txt holds the exact versions that were tested together. torch has
to be installed before `pip install --no-build-isolation -e .`; `bash tools/setup_env.sh` does all of it in order.
"""

import importlib.util
import logging
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
KERNEL_BUILD = ROOT / "mfuser_d2" / "core" / "ops" / "selective_scan" / "build.py"
DETECTRON2 = (
    "detectron2 @ git+https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833"
)

INSTALL_REQUIRES = [
    "torch>=2.6,<2.14",
    "torchvision>=0.21,<0.29",
    "numpy>=1.26,<3",
    "timm>=1.0.21,<1.1",
    "open_clip_torch>=3.0,<4",
    "safetensors>=0.4.5",
    "opencv-python>=4.5,<5",
    "pillow>=10.1",
    "matplotlib>=3.7",
    "tqdm>=4.60",
]
DATA_REQUIRES = ["scipy>=1.10", "cityscapesScripts>=2.2"]  # GTAV's split.mat, Cityscapes' polygons
SIGLIP_REQUIRES = ["tokenizers>=0.20", "sentencepiece>=0.2"]  # class names outside the committed table
EXPORT_REQUIRES = ["onnx>=1.16", "onnxruntime>=1.18"]  # writing and checking ONNX files
EXTRAS_REQUIRE = {
    "detectron2": [DETECTRON2, "setuptools<81"],
    "cuda": ["mamba_ssm>=2.2", "causal_conv1d>=1.4"],
    "data": DATA_REQUIRES,
    "siglip": SIGLIP_REQUIRES,
    "export": EXPORT_REQUIRES,
    "dev": [
        "pytest>=8.4",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "ruff>=0.6",
        "scikit-learn>=1.3",
        *DATA_REQUIRES,
        *SIGLIP_REQUIRES,
        *EXPORT_REQUIRES,
    ],
}


def read_version() -> str:
    """The package's version, read from its text because importing it here would import torch."""
    text = (ROOT / "mfuser_d2" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


def optional_kernel() -> dict:
    """`ext_modules` and `cmdclass` of the C++ CPU scan, or nothing where torch or a compiler is missing.

    The kernel only makes the scan faster, so no failure here may stop the installation.
    """
    try:
        spec = importlib.util.spec_from_file_location("mfuser_d2_kernel_build", KERNEL_BUILD)
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        extensions = build.extensions()
        return {"ext_modules": extensions, "cmdclass": build.cmdclass()} if extensions else {}
    except Exception as error:
        logging.warning("the C++ scan kernel is not built (%s); the PyTorch scan is used instead", error)
        return {}


setup(
    name="mfuser_d2",
    version=read_version(),
    description="MFuser (CVPR 2025) for domain-generalised semantic segmentation, as a Detectron2 project",
    python_requires=">=3.10",
    packages=find_packages(include=["mfuser_d2", "mfuser_d2.*"]),
    include_package_data=True,
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    **optional_kernel(),
)
