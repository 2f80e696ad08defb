"""Reading the publishers' own encoder files and giving their tensors the names used here."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

from timm.models import eva, load_state_dict_from_hf, vision_transformer
from torch import Tensor, nn

from mfuser_d2.core.checkpoint_file import DamagedFileError, check_archive, read_checkpoint
from mfuser_d2.core.encoders.key_rules import EVA02_VISION, SIGLIP_TEXT, SIGLIP_VISION
from mfuser_d2.core.encoders.text import TextTower
from mfuser_d2.core.encoders.torchscript_file import is_torchscript, read_torchscript
from mfuser_d2.core.key_map import apply_rules

State = Mapping[str, Tensor]
HUB = "hf-hub:"


def read_encoder_file(path: str, *, source: str) -> dict[str, Tensor]:
    """Tensors of a published encoder file: .pth/.pt, OpenAI's TorchScript archives, or .safetensors, as float32.

    Args:
        path: a local file, or "hf-hub:<owner>/<name>" (downloads on first use).
        source: where the file can be had, for the message when it is missing.
    Raises:
        FileNotFoundError: no such file; says where to get it.
        ValueError: the file is damaged, or no weights (see `read_checkpoint`).
    """
    if path.startswith(HUB):
        state = load_state_dict_from_hf(path.removeprefix(HUB), weights_only=True)
    elif not Path(path).is_file():
        raise FileNotFoundError(f"encoder weights {path} do not exist; get {source}")
    elif is_torchscript(path):
        state = _read_archive(Path(path))
    else:
        state = read_checkpoint(path)["model"]
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _read_archive(path: Path) -> dict[str, Tensor]:
    check_archive(path, may_be_compressed=True)
    try:
        return read_torchscript(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: this TorchScript archive holds more than modules and tensors (it asks for {error}); "
            "reading that could run code. Save its state dict instead."
        ) from error
    except Exception as error:  # a damaged archive makes many types
        raise DamagedFileError(
            f"{path} is damaged or no TorchScript archive: {(str(error).splitlines() or ['?'])[0][:200]}. Get it again."
        ) from error


def load_timm(model: nn.Module, weights: str, *, source: str) -> None:
    """Load a vision foundation model's own file into a timm ViT of its native geometry, strictly.

    timm's filters know the publishers' names (DINOv2 with and without registers, DINOv3, PE).
    """
    state = read_encoder_file(weights, source=source)
    filter_fn = eva.checkpoint_filter_fn if isinstance(model, eva.Eva) else vision_transformer.checkpoint_filter_fn
    filtered = filter_fn(dict(state), model)
    # The classifier of a hub model is not used here.
    _load(model, {key: value for key, value in filtered.items() if not key.startswith("head.")}, weights)


def vlm_state(weights: str, *, source: str) -> dict[str, Tensor]:
    """The whole file of a vision-language model under one naming.

    Returns:
        "visual.<timm or open_clip name>", "text.<open_clip name>", and "logit_scale" / "logit_bias" where present.
    Raises:
        ValueError: none of the known formats: OpenAI CLIP, open_clip, EVA-CLIP, Hugging Face SigLIP.
    """
    state = read_encoder_file(weights, source=source)
    scalars = {key: state[key] for key in ("logit_scale", "logit_bias") if key in state}
    if "vision_model.post_layernorm.weight" in state:
        visual = _ruled(_below(state, "vision_model."), SIGLIP_VISION, weights)
        text = _ruled(_without_ids(_below(state, "text_model.")), SIGLIP_TEXT, weights)
    elif "visual.conv1.weight" in state:
        visual = _below(state, "visual.")
        text = _below(state, "text.") or _bare_text(state)
    elif "visual.blocks.0.attn.inner_attn_ln.weight" in state:
        plain = {k: v for k, v in _below(state, "visual.").items() if "rope." not in k}
        visual, text = _ruled(plain, EVA02_VISION, weights), _below(state, "text.")
    elif any(key.startswith("visual.trunk.") for key in state):
        visual, text = _below(state, "visual.trunk."), _below(state, "text.")
    else:
        raise ValueError(
            f"{weights} is no vision-language model this package reads (first key {next(iter(state))!r}); give OpenAI "
            f"CLIP, open_clip, EVA-CLIP or Hugging Face SigLIP weights: {source}"
        )
    return {
        **{f"visual.{key}": value for key, value in visual.items()},
        **{f"text.{key}": value for key, value in text.items()},
        **scalars,
    }


def load_vision(model: nn.Module, state: State, *, double_class_token: bool) -> None:
    """Load the vision half of `vlm_state` into a model of its native geometry, strictly."""
    visual = _below(state, "visual.")
    if double_class_token and "class_embedding" in visual:
        visual["class_embedding"] = 2 * visual["class_embedding"]
    _load(model, visual, "the vision-language model's file")


def load_text(tower: TextTower, state: State) -> None:
    """Load the text half of `vlm_state` into a text tower, strictly, and the logit scale and bias where it has them."""
    text = {key: value for key, value in _below(state, "text.").items() if key != "attn_mask"}
    _load(tower.model, text, "the vision-language model's file")
    if "logit_scale" in state:
        tower.logit_scale = float(state["logit_scale"])
    if "logit_bias" in state:
        tower.logit_bias = float(state["logit_bias"])


def _load(model: nn.Module, state: State, origin: str) -> None:
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing = sorted(set(wanted) - set(state))
    unknown = sorted(set(state) - set(wanted))
    misshapen = [
        f"{key} is {tuple(state[key].shape)}, wanted {shape}"
        for key, shape in wanted.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if missing or unknown or misshapen:
        raise ValueError(
            f"{origin} does not fit {type(model).__name__}: missing {missing[:4]}, unknown {unknown[:4]}, "
            f"{misshapen[:3]}; is it the file of another model or size?"
        )
    model.load_state_dict(state, strict=True)


def _below(state: State, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _without_ids(state: State) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith("position_ids")}


def _bare_text(state: State) -> dict[str, Tensor]:
    """OpenAI's text keys have no prefix; its archive holds three sizes besides."""
    other = ("visual.", "logit_", "input_resolution", "context_length", "vocab_size")
    return {key: value for key, value in state.items() if not key.startswith(other)}


def _ruled(state: State, rules: list, origin: str) -> dict[str, Tensor]:
    renamed, left = apply_rules(_without_ids(state), rules)
    if left:
        raise ValueError(
            f"{origin} holds keys this package does not know: {left[:8]}; is it the file of another model?"
        )
    return renamed
