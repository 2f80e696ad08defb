"""Adapters between the two encoders: one class and one row each."""

from __future__ import annotations

from collections.abc import Callable

from mfuser_d2.core.adapters.co_adapter import CoAdapter, JointAdapter, TokenLayout
from mfuser_d2.core.adapters.mvfuser import MVFuser, MVFuserBlock

ADAPTERS: dict[str, Callable[..., CoAdapter]] = {
    "mvfuser": MVFuser,
}

__all__ = ["ADAPTERS", "CoAdapter", "JointAdapter", "MVFuser", "MVFuserBlock", "TokenLayout", "build_adapter"]


def build_adapter(name: str, **kwargs: object) -> CoAdapter:
    """One adapter by its name in `ADAPTERS`.

    Raises:
        KeyError: the name is unknown.
    """
    if name not in ADAPTERS:
        raise KeyError(f"MODEL.MFUSER.ADAPTER.NAME={name!r} is unknown; choose from {sorted(ADAPTERS)}")
    return ADAPTERS[name](**kwargs)
