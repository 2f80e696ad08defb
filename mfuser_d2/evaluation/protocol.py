"""What an evaluation result depends on besides the network: the protocol that stands beside every table."""

import hashlib
import importlib.metadata
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .confusion import ABSENT_CLASS_MODES

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "torchvision", "timm", "open_clip_torch", "detectron2", "mfuser_d2", "numpy")


def file_sha256(path: str | Path) -> str | None:
    """Give the SHA-256 of a file as 64 hex digits, or None where there is no such file."""
    path = Path(path)
    if not str(path) or not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Give the versions of Python and of the libraries that move results; "absent" for one that is not installed."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        versions[name] = _version(name)
    return versions


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pass
    if distribution == "mfuser_d2":  # a checkout on PYTHONPATH has no installed metadata
        import mfuser_d2

        return getattr(mfuser_d2, "__version__", "unknown")
    return "absent"


def describe_protocol(
    *,
    weights: str | Path | None = None,
    absent_class: str = "skip",
    num_classes: int = 19,
    inference_mode: str = "slide",
    crop_size: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    test_sizes: Mapping[str, Any] | None = None,
    mappings: Mapping[str, str] | None = None,
    splits: Mapping[str, str] | None = None,
    train_datasets: Sequence[str] = (),
    **extra: Any,
) -> dict[str, Any]:
    """Gather the protocol of an evaluation: everything that moves results and is often left unstated.

    Args:
        weights: the checkpoint that was evaluated; its SHA-256 is taken.
        absent_class: "skip" or "zero".
        num_classes: K.
        inference_mode: "slide" or "whole".
        crop_size: (height, width) of the sliding window in pixels.
        stride: (vertical, horizontal) step of the window in pixels.
        test_sizes: data set -> size its images are resized to before inference; pixels, in the order the
            config uses. None or zeros mean the image's own size, and are written so.
        mappings: data set -> name of the label mapping where several circulate (Mapillary).
        splits: data set -> its split, where the end of its name (`..._sem_seg_val`) does not say it.
        train_datasets: what the network was trained on.
        extra: more facts, stored as they are.
    Returns:
        A dict that JSON can hold.
    """
    if absent_class not in ABSENT_CLASS_MODES:
        raise ValueError(f"absent_class={absent_class!r} is unknown; choose from {sorted(ABSENT_CLASS_MODES)}")
    protocol: dict[str, Any] = {
        "train_datasets": list(train_datasets),
        "num_classes": num_classes,
        "absent_class": absent_class,
        "absent_class_meaning": ABSENT_CLASS_MODES[absent_class],
        "inference": {"mode": inference_mode},
        "test_size": {name: _size_or_own(size) for name, size in (test_sizes or {}).items()},
        "mapping": dict(mappings or {}),
        "split": {**_named_splits([*train_datasets, *(test_sizes or {})]), **(splits or {})},
        "weights": {"path": str(weights or ""), "sha256": file_sha256(weights) if weights else None},
    }
    if inference_mode == "slide":
        protocol["inference"].update(crop_size=list(crop_size or ()), stride=list(stride or ()))
    protocol.update(extra)
    protocol["versions"] = library_versions()
    return protocol


def _named_splits(names: Sequence[str]) -> dict[str, str]:
    return {name: name.rpartition("_")[2] for name in names if "_sem_seg_" in name}


def _size_or_own(size: Any) -> Any:
    if isinstance(size, Sequence) and not isinstance(size, str):
        return list(size) if any(size) else "own size"
    return size or "own size"
