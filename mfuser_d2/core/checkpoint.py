"""Checkpoints that hold what is trained and the identity of what is frozen; plain PyTorch.

A file is a dict. `model` holds every trained parameter and the buffers of the modules around them (batch statistics);
`encoders` holds, per frozen encoder, its name and a sample of its weights, so that the file can only be loaded onto the
encoders it was trained on. Encoders that were initialised at random exist nowhere else: those are stored in `model`
too. Everything else in the dict (optimizer, iteration, ...) belongs to whoever trains.

A module marks itself as an encoder by two attributes: `encoder_name` (str, as in the config) and `has_random_weights`
(bool). Frozen weights outside such a module are grouped by the largest frozen module around them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

FORMAT = "mfuser_d2/1"

_SAMPLES = 16  # values kept per frozen tensor: enough to tell two encoders apart, 50 kB for three of size L
# Position grids follow the image size the model is built for, so their shape is no part of an encoder's identity.
_RESIZED = ("pos_embed", "positional_embedding", "position_embedding", "position_embedding.weight")


@dataclass(frozen=True)
class FrozenPart:
    """One frozen encoder (or another frozen module) and the state-dict keys that belong to it."""

    name: str
    is_random: bool
    keys: tuple[str, ...]


def trainable_keys(model: nn.Module) -> list[str]:
    """State-dict keys of the trained parameters and of the persistent buffers next to them, in state-dict order.

    A buffer counts as trained unless the smallest module around it that has parameters has only frozen ones: batch
    statistics of a trained layer are in, rotary tables of a frozen encoder are not.
    """
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    keys = []
    for key in model.state_dict():
        if key in trained or (key not in parameters and not _is_in_frozen_module(model, key)):
            keys.append(key)
    return keys


def frozen_parts(model: nn.Module) -> dict[str, FrozenPart]:
    """The frozen encoders of a model by module path, e.g. {"backbone.vfm": FrozenPart(name="dinov2_vitl14", ...)}."""
    trained = set(trainable_keys(model))
    keys: dict[str, list[str]] = {}
    for key in model.state_dict():
        if key not in trained:
            keys.setdefault(_part_path(model, key), []).append(key)
    parts = {}
    for path, part_keys in keys.items():
        module = model.get_submodule(path)
        name = getattr(module, "encoder_name", type(module).__name__)
        parts[path] = FrozenPart(str(name), bool(getattr(module, "has_random_weights", False)), tuple(part_keys))
    return parts


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint has to hold of the model: the trained part, and frozen encoders that are random."""
    keys = trainable_keys(model)
    for part in frozen_parts(model).values():
        if part.is_random:
            keys.extend(part.keys)
    state = model.state_dict()
    return {key: state[key].detach() for key in keys}


def encoder_identity(model: nn.Module) -> dict[str, dict]:
    """Name and content of every frozen encoder, small enough for each checkpoint.

    Returns:
        Module path -> {"name": str, "random": bool, "keys": [str], "shapes": [[int]], "sample": (S,) float32}: up to 16
        values of each tensor, evenly spread. Values rather than a hash, so that an encoder kept in bfloat16, or whose
        position grid was resized on another device, is still recognised.
    """
    state = model.state_dict()
    identity = {}
    for path, part in frozen_parts(model).items():
        tensors = [state[key] for key in part.keys]
        identity[path] = {
            "name": part.name,
            "random": part.is_random,
            "keys": list(part.keys),
            "shapes": [list(tensor.shape) for tensor in tensors],
            "sample": torch.cat([_sample(tensor) for tensor in tensors]).cpu(),
        }
    return identity


@torch.no_grad()
def load_trainable(
    model: nn.Module, state_dict: Mapping[str, Tensor], identity: Mapping[str, dict] | None = None
) -> None:
    """Load what `trainable_state_dict` gave into a model, all of it or nothing.

    Args:
        model: gets the values; its frozen encoders must already hold their weights, unless the state has them.
        state_dict: the trained part; frozen weights may be in it too, each encoder as a whole.
        identity: what `encoder_identity` gave where the state was saved. None: the file does not say, which is logged.
    Raises:
        ValueError: the encoders are not those the state was trained on, or keys are missing, unknown or of another
            shape; the message names them. The model is left as it was.
    """
    state = {key.removeprefix("module."): value for key, value in state_dict.items()}
    parts = frozen_parts(model)
    carried = {path for path, part in parts.items() if all(key in state for key in part.keys)}
    if identity is None and carried != set(parts):
        logger.warning("The checkpoint does not name the frozen encoders it was trained on: they are taken on trust.")
    if identity is not None:
        _check_records(identity)
        _check_identity(model, parts, carried, identity)
    needed = set(trainable_keys(model))
    for part in parts.values():
        if any(key in state for key in part.keys):
            needed.update(part.keys)
    _check_keys(model.state_dict(), needed, state)
    model.load_state_dict(state, strict=False)


def _owners(model: nn.Module, key: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module around a state-dict entry, from the innermost to the model itself."""
    names = key.split(".")[:-1]
    for length in range(len(names), -1, -1):
        path = ".".join(names[:length])
        yield path, model.get_submodule(path)


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def _is_in_frozen_module(model: nn.Module, key: str) -> bool:
    for _, module in _owners(model, key):
        if next(module.parameters(), None) is not None:
            return _is_frozen(module)
    return False


def _part_path(model: nn.Module, key: str) -> str:
    """Path of the encoder around a frozen entry: a module marked as one, else the largest frozen module."""
    owners = list(_owners(model, key))
    for path, module in owners:
        if hasattr(module, "encoder_name"):
            return path
    frozen = [path for path, module in owners if _is_frozen(module) and next(module.parameters(), None) is not None]
    return frozen[-1] if frozen else owners[0][0]


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.numel() > _SAMPLES:
        flat = flat[torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long().to(flat.device)]
    return flat.float()


def _check_records(identity: object) -> None:
    """Refuse what `encoder_identity` cannot have given, so that nothing below stumbles over a stranger's file."""
    if not isinstance(identity, Mapping):
        raise ValueError(f"The checkpoint's 'encoders' are a {type(identity).__name__}, not a dict of their records.")
    for path, record in identity.items():
        if not isinstance(path, str) or not _is_record(record):
            raise ValueError(f"The checkpoint's record of the frozen encoder {path!r} is no such record: altered?")


def _is_record(record: object) -> bool:
    if not isinstance(record, Mapping) or set(record) != {"name", "random", "keys", "shapes", "sample"}:
        return False
    keys, shapes, sample = record["keys"], record["shapes"], record["sample"]
    if not isinstance(record["name"], str) or not isinstance(record["random"], bool):
        return False
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        return False
    if not isinstance(shapes, list) or len(shapes) != len(keys) or not all(isinstance(shape, list) for shape in shapes):
        return False
    if not all(isinstance(edge, int) and edge >= 0 for shape in shapes for edge in shape):
        return False
    count = sum(min(math.prod(shape), _SAMPLES) for shape in shapes)
    return isinstance(sample, Tensor) and _is_plain(sample) and sample.is_floating_point() and sample.shape == (count,)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values can be copied into a parameter: not sparse, quantised or without any."""
    return tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type != "meta"


def _check_identity(
    model: nn.Module, parts: Mapping[str, FrozenPart], carried: set[str], identity: Mapping[str, dict]
) -> None:
    state = model.state_dict()
    for path, part in parts.items():
        if path in carried and part.is_random:
            continue  # the file brings these weights along and they replace the random ones
        if path not in identity:
            raise ValueError(
                f"The checkpoint knows no frozen encoder at {path} (this model has {part.name!r} there); it has "
                f"{sorted(identity) or 'none'}. Build the model from the config.yaml that lies beside the checkpoint."
            )
        difference = _difference(state, part, identity[path])
        if difference:
            raise ValueError(
                f"The checkpoint was trained on another encoder at {path}: {identity[path]['name']!r} with "
                f"{_origin(identity[path]['random'])}, but this model has {part.name!r} with {_origin(part.is_random)} "
                f"({difference}). Set MODEL.MFUSER.{{VFM,VLM}}.NAME and .WEIGHTS to what it was trained with"
                + (' (WEIGHTS "": the checkpoint brings its random encoders).' if identity[path]["random"] else ".")
            )


def _origin(is_random: bool) -> str:
    return "random weights" if is_random else "weights from a file"


def _difference(state: Mapping[str, Tensor], part: FrozenPart, record: Mapping) -> str:
    """What tells an encoder from its record, "" where nothing does."""
    if set(record["keys"]) != set(part.keys):
        odd = sorted(set(record["keys"]) ^ set(part.keys))
        return f"{len(odd)} tensors are only in one of them, e.g. {odd[0]}"
    offset = 0
    for key, shape in zip(record["keys"], record["shapes"]):
        values = _sample(state[key]).cpu()
        count = min(math.prod(shape), _SAMPLES)
        expected = record["sample"][offset : offset + count]
        offset += count
        if list(state[key].shape) != list(shape):
            if key.endswith(_RESIZED):
                continue
            return f"{key} is {tuple(state[key].shape)} instead of {tuple(shape)}"
        # 1 % lets float16 and bfloat16 copies pass; another training differs by far more in nearly every value.
        allowed = 0.01 * expected.abs() + 1e-3 * expected.abs().max() if count else expected
        if not bool(((values - expected).abs() <= allowed).all()):
            return f"{key} holds other values"
    return ""


def _check_keys(expected: Mapping[str, Tensor], needed: set[str], state: Mapping[str, Tensor]) -> None:
    problems = []
    missing = [key for key in expected if key in needed and key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} ({tuple(value.shape)} in the file, {tuple(expected[key].shape)} in the model)"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]
    kinds = [
        f"{key} ({value.dtype}, {value.layout}, {value.device.type} in the file, {expected[key].dtype} in the model)"
        for key, value in state.items()
        if key in expected and not (_is_plain(value) and value.is_floating_point() == expected[key].is_floating_point())
    ]
    for what, keys in (
        ("missing", missing),
        ("unknown", unexpected),
        ("of another shape", shapes),
        ("of another kind", kinds),
    ):
        if keys:
            more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
            problems.append(f"{len(keys)} {what}: {', '.join(keys[:8])}{more}")
    if problems:
        raise ValueError(
            "The checkpoint does not fit this model. " + "; ".join(problems) + ". Build the model from the config.yaml "
            "beside the checkpoint, or convert a checkpoint of the authors with tools/convert_checkpoint.py."
        )
