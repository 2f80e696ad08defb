"""Reading the tensors of TorchScript archives, such as OpenAI's CLIP files, without running what they hold.

`torch.jit.load` runs the methods that an archive brings along, and those may write any file; here the classes of the
archive stand for dicts of attributes only.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is an archive of torch.jit.save; False for one that cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def read_torchscript(path: str | Path) -> dict[str, Tensor]:
    """The parameters and buffers of the module in an archive, by their dotted names, on the CPU.

    Raises:
        pickle.UnpicklingError: it asks for something else than modules of attributes and tensors.
        Exception: of many types, where it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
        module = _Unpickler(archive, root).load()
        if not isinstance(module, _Module):
            raise pickle.UnpicklingError(f"it holds a {type(module).__name__}, not a module")
        return dict(_tensors(module))


class _Module:
    """Stands for an object of any class of the archive: its attributes, and none of its methods."""

    attributes: dict[str, Any]
    parameters_and_buffers: frozenset[str] | None = None  # attributes that a state dict has; None: all tensors

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a __setstate__ method of its own, which is not run")
        self.attributes = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type("_Module", (_Module,), {"parameters_and_buffers": self._state_names(module, name)})
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return _build_list
        known = _KNOWN.get((module, name))
        if known is None:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known

    def _state_names(self, module: str, name: str) -> frozenset[str] | None:
        """What the source of a class, which is only read, calls parameters and buffers; None where it does not say."""
        source = f"{self.root}/code/{module.replace('.', '/')}.py"
        if source not in self.archive.namelist():
            return None
        text = self.archive.read(source).decode(errors="replace")
        lists = re.search(
            rf"class {re.escape(name)}\(Module\):\s+__parameters__ = \[(.*?)\]\s+__buffers__ = \[(.*?)\]", text
        )
        return frozenset(re.findall(r'"([^"]+)"', lists[1] + lists[2])) if lists else None

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(count, int):
            raise pickle.UnpicklingError(f"a {kind!r} in place of a storage")
        part = self.archive.getinfo(f"{self.root}/data/{key}")
        if part.file_size != count * dtype.itemsize or part.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"tensor {key} is not stored as it says")
        return (
            torch.frombuffer(bytearray(self.archive.read(part)), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        )


def _build_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _build_list(values: Any) -> list[Any]:
    return list(values)


def _build_value(value: Any, tag: str) -> Any:
    return value


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _build_tensor,
    ("torch.jit._pickle", "restore_type_tag"): _build_value,
    ("collections", "OrderedDict"): OrderedDict,
}


def _tensors(module: _Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in module.attributes.items():
        if isinstance(value, Tensor) and (
            module.parameters_and_buffers is None or name in module.parameters_and_buffers
        ):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
