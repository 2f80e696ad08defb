"""Reading and writing checkpoint files: nothing half-written is left behind, nothing that runs code is read."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch


class DamagedFileError(ValueError):
    """A file is cut off, altered or no checkpoint at all: another copy of it, or an older one, may be whole."""


def write_checkpoint(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write a dict of tensors and plain values so that `path` holds either the old or the whole new file.

    The file is written beside its place, synced to the disk and then renamed. A folder that is not there is made.

    Raises:
        OSError: it could not be written (disk full, folder removed); what was at `path` is still there.
    """
    with _replacing(Path(path)) as file:
        torch.save(dict(data), file)


def write_text(path: str | Path, text: str) -> None:
    """Replace a small text file in the same way."""
    with _replacing(Path(path)) as file:
        file.write(text.encode())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` to write to, which takes its place where the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        _remove(temporary)
        raise OSError(f"{path} could not be written: {error}. Free space or change OUTPUT_DIR, then resume.") from error
    except BaseException:  # a signal in the middle of it
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def remove_unfinished(folder: str | Path) -> list[str]:
    """Delete what writers that were killed left beside the files of a folder; gives the names."""
    left = sorted(Path(folder).glob(".*.tmp"))
    for path in left:
        path.unlink(missing_ok=True)
    return [path.name for path in left]


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
        DamagedFileError: the file is empty, truncated, altered (its checksums do not fit), a web page, a Git LFS
            pointer, or something else than a checkpoint.
        ValueError: it holds objects that would run code when read (those are refused, never executed), or no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Checkpoint {path} does not exist; check MODEL.WEIGHTS, or OUTPUT_DIR with --resume.")
    _refuse_other_files(path)
    check_archive(path)
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
        raise DamagedFileError(
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


def check_kinds(own: Any, given: Any, place: str = "it") -> None:
    """Compare training state from a file with the state of whom it is for, before that takes it and stumbles later.

    Args:
        own: nested dicts, sequences, numbers and tensors; what is not in it stands for anything.
        given: may lack keys (an older file), but no fractional numbers such as a learning rate.
    Raises:
        ValueError: something is of another kind, or a number is not finite; names the place.
    """
    if isinstance(own, Mapping) and isinstance(given, Mapping):
        for key, value in own.items():
            if key in given or (given and isinstance(value, float)):
                check_kinds(value, given.get(key), f"{place}.{key}")
    elif isinstance(own, (list, tuple)) and isinstance(given, (list, tuple)) and len(own) == len(given):
        for index, (value, other) in enumerate(zip(own, given)):
            check_kinds(value, other, f"{place}.{index}")
    elif not _is_of_kind(own, given):
        raise ValueError(f"{place} is {_brief(given)}, wanted something like {_brief(own)}")


def _brief(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]


def _is_of_kind(own: Any, given: Any) -> bool:
    if isinstance(own, torch.Tensor):
        return isinstance(given, torch.Tensor) and own.shape == given.shape and given.layout == own.layout
    if isinstance(own, float):
        return type(given) in (int, float) and math.isfinite(given)
    if isinstance(own, bool):  # a switch, which the config sets and no file
        return own is given
    return isinstance(own, (int, str, type(None))) and type(own) is type(given)


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
        raise DamagedFileError(f"{path} is empty: the download or the run that wrote it was cut off.")
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DamagedFileError(
            f"{path} is a web page, not a checkpoint: the link led to a page; download the file itself."
        )
    if start.startswith(b"version https://git-lfs"):
        raise DamagedFileError(f"{path} is a Git LFS pointer, not the file: fetch it with `git lfs pull`.")


def check_archive(path: Path, *, may_be_compressed: bool = False) -> None:
    """Compare the checksums of an archive's parts: torch does not look at them and would load altered weights.

    Raises:
        DamagedFileError: one does not fit, or the archive cannot be read.
        ValueError: parts are compressed.
    """
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return
    is_compressed = False
    try:
        with zipfile.ZipFile(path) as archive:
            is_compressed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
            altered = archive.testzip() if may_be_compressed or not is_compressed else None
    except Exception as error:  # zipfile reports damage with many types
        altered = _first_line(error)
    if is_compressed and not may_be_compressed:  # a small file could unpack to more than the disk holds
        raise ValueError(f"{path} is refused: torch never compresses checkpoints, but parts of this file are.")
    if altered is not None:
        raise DamagedFileError(
            f"{path} ({path.stat().st_size:,} bytes) is damaged: a checksum in it does not fit ({altered}). Copy or "
            "download it again, or use the checkpoint before it."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
