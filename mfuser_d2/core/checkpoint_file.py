"""Reading and writing checkpoint files: nothing half-written is left behind, nothing that runs code is read."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


def write_checkpoint(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write a dict of tensors and plain values so that `path` holds either the old or the whole new file.

    The file is written beside its place, synced to the disk and then renamed.

    Raises:
        OSError: it could not be written (disk full, folder removed); what was at `path` is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(data), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}. Free space or change OUTPUT_DIR, then resume.") from error
    sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Replace a small text file as a whole, synced to the disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder last through a power cut, where the system can (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a .pth/.pt file of tensors and plain values, or a .safetensors file, onto the CPU.

    Returns:
        The dict in the file; a bare state dict comes as {"model": it}.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, a web page, a Git LFS pointer, something else than a checkpoint, or
            holds objects that would run code when read (those are refused, never executed).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Checkpoint {path} does not exist; check MODEL.WEIGHTS, or OUTPUT_DIR with --resume.")
    _refuse_other_files(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            data = load_file(path)
        else:
            with torch.serialization.safe_globals(_numpy_scalars()):
                data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain values ({_what_it_asks_for(path, error)}), and "
            "reading it could run code. Save it again as a plain state dict."
        ) from error
    except Exception as error:  # torch and safetensors report damage with many types
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or no checkpoint: {_first_line(error)}. "
            "Copy or download it again, or use the checkpoint before it."
        ) from error
    if not isinstance(data, Mapping) or not data:
        raise ValueError(f"{path} holds a {type(data).__name__}, not a dict of weights.")
    if "model" not in data and "state_dict" in data:
        data = {**{key: value for key, value in data.items() if key != "state_dict"}, "model": data["state_dict"]}
    data = dict(data) if "model" in data else {"model": dict(data)}
    _check_tensors(path, data["model"])
    return data


def _numpy_scalars() -> list[Any]:
    """Types by which other trainers keep a best score beside the weights; reading them runs no code."""
    make = np.float64(0).__reduce__()[0]
    makers = [(make, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")]
    return [*makers, np.dtype, *{type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")}]


def _what_it_asks_for(path: Path, error: Exception) -> str:
    """Names of the functions and classes a refused pickle wants, as far as they can be read without running it."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return f"it asks for {named[1]}"
    try:
        names = _globals_of(path)
    except Exception:  # whatever a broken stream makes the disassembler say, the file stays refused
        names = []
    strange = sorted({name for name in names if not name.startswith(("torch.", "collections."))})
    return f"it asks for {', '.join(strange[:4])}" if strange else _first_line(error)


def _globals_of(path: Path) -> list[str]:
    """`module.name` of everything that a pickle imports; it is disassembled, not executed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            stream = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    else:
        stream = path.read_bytes()
    names, strings = [], []
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name in ("GLOBAL", "INST"):
            names.append(str(argument).replace(" ", "."))
        elif operation.name == "STACK_GLOBAL":
            names.append(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    return names


def _check_tensors(path: Path, state: Any) -> None:
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds no weights: its 'model' is {type(state).__name__} of length 0 or no dict.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} is no state dict: entry {key!r} is a {type(value).__name__}, not a tensor.")


def _refuse_other_files(path: Path) -> None:
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path} is empty: the download or the run that wrote it was cut off.")
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not a checkpoint: the link led to a page; download the file itself.")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file: fetch it with `git lfs pull`.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
