"""Adapters between the two encoders: one class and one row each (paper, Tables 3 and 4)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from mfuser_d2.core.adapters.attention import ConcatSelfAttention, SeparateSelfAttention, TokenCrossAttention
from mfuser_d2.core.adapters.co_adapter import CoAdapter, JointAdapter, TokenLayout
from mfuser_d2.core.adapters.conv import ConvAdapter
from mfuser_d2.core.adapters.deformable import DeformableAdapter
from mfuser_d2.core.adapters.mvfuser import MVFuser, MVFuserBlock
from mfuser_d2.core.adapters.per_encoder import NoAdapter, PerEncoderMVFuser

ADAPTERS: dict[str, Callable[..., CoAdapter]] = {
    "none": NoAdapter,
    "vfm_only": partial(PerEncoderMVFuser, encoders=("vfm",)),
    "vlm_only": partial(PerEncoderMVFuser, encoders=("vlm",)),
    "conv": ConvAdapter,
    "cross_attention": TokenCrossAttention,
    "self_attention_concat": ConcatSelfAttention,
    "self_attention_separate": SeparateSelfAttention,
    "deformable": DeformableAdapter,
    "separate_mvfuser": partial(PerEncoderMVFuser, encoders=("vfm", "vlm")),
    "mvfuser": MVFuser,
}

SHARED_ARGUMENTS = ("vfm_dim", "vlm_dim", "project_vfm")
"""What every adapter takes; anything else is an option of some of them."""

__all__ = ["ADAPTERS", "CoAdapter", "JointAdapter", "MVFuser", "MVFuserBlock", "TokenLayout", "build_adapter"]


def adapter_options(name: str) -> set[str]:
    """Names of the options that an adapter takes, e.g. {"state_dim", "dropout"}.

    Raises:
        KeyError: the adapter is unknown.
    """
    if name not in ADAPTERS:
        raise KeyError(f"MODEL.MFUSER.ADAPTER.NAME={name!r} is unknown; choose from {sorted(ADAPTERS)}")
    return set(inspect.signature(ADAPTERS[name]).parameters) - {*SHARED_ARGUMENTS, "encoders"}


def build_adapter(name: str, *, vfm_dim: int, vlm_dim: int, project_vfm: bool = False, **options: object) -> CoAdapter:
    """One adapter by its name in `ADAPTERS`.

    Args:
        name: of the adapter.
        vfm_dim, vlm_dim, project_vfm: see `CoAdapter`.
        options: of this adapter, or of another one, which are not looked at: a config declares those of all.
    Raises:
        KeyError: the name is unknown, or an option that no adapter has.
    """
    taken = adapter_options(name)
    known = set().union(*(adapter_options(other) for other in ADAPTERS))
    if set(options) - known:
        raise KeyError(f"no adapter has the options {sorted(set(options) - known)}; choose from {sorted(known)}")
    widths = {"vfm_dim": vfm_dim, "vlm_dim": vlm_dim, "project_vfm": project_vfm}
    return ADAPTERS[name](**widths, **{key: value for key, value in options.items() if key in taken})
