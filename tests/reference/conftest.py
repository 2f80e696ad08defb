"""The recorded tiny models, built from nothing but the folder's files, and the comparison every test here uses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfuser_d2.core import factory
from mfuser_d2.core.backbone import DualEncoderBackbone
from mfuser_d2.core.criterion import Criterion
from mfuser_d2.core.encoders.presets import CLIP_MEAN, CLIP_STD
from mfuser_d2.core.inference import InferenceSettings
from mfuser_d2.core.official import VARIANTS, from_official, to_official
from mfuser_d2.core.segmenter import Segmenter
from mfuser_d2.core.text_query_head import TextQueryHead

VFM = "dinov2_vitl14"
VLMS = {"clip": "ViT-L-14-336-quickgelu", "eva02": "EVA02-L-14-336", "siglip": "ViT-L-16-SigLIP-384"}
CLIP_TEMPERATURE = 0.07  # fixed in the release's source, SigLIP's scale is recorded

COMMITTED = Path(__file__).with_name("data")
"""Recordings of single modules for clones that come without the folder."""

_worst: dict[tuple[str, str], float] = {}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    assert got.shape == wanted.shape, f"{tuple(got.shape)} instead of {tuple(wanted.shape)}"
    got, wanted = got.detach().double(), wanted.detach().double()
    difference, scale = (got - wanted).abs().max().item(), wanted.abs().max().item()
    assert difference == difference, "not a number"
    return difference / scale if scale else difference


@pytest.fixture(scope="session")
def check() -> Callable[..., None]:
    """`check(stage, got, wanted, tolerance)`: compare, and keep the largest relative error for the summary."""

    def compare(stage: str, got: Tensor, wanted: Tensor, tolerance: float, *, group: str = "modules") -> None:
        error = relative_error(torch.as_tensor(got), torch.as_tensor(wanted))
        _worst[stage, group] = max(error, _worst.get((stage, group), 0.0))
        assert error <= tolerance, f"{stage} ({group}): relative error {error:.2e}, allowed {tolerance:.0e}"

    return compare


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With -v, the largest relative error of every stage and variant."""
    if not _worst or terminalreporter.verbosity < 1:
        return
    groups = sorted({group for _, group in _worst}, key=lambda g: (*VARIANTS, "modules").index(g))
    stages = list(dict.fromkeys(stage for stage, _ in _worst))
    terminalreporter.section("largest relative errors against the release")
    terminalreporter.write_line(f"{'stage':44}" + "".join(f"{group:>10}" for group in groups))
    for stage in stages:
        cells = (f"{_worst[stage, g]:.1e}" if (stage, g) in _worst else "-" for g in groups)
        terminalreporter.write_line(f"{stage:44}" + "".join(f"{cell:>10}" for cell in cells))


@pytest.fixture(scope="session")
def find_file(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """A recorded file by its name: in the folder of --reference-dir, else among the few that every clone has."""
    folder = request.config.getoption("--reference-dir")

    def find(name: str) -> Path:
        for path in (folder / name, COMMITTED / name):
            if path.is_file():
                return path
        pytest.skip(f"no {name} in {folder}; pass --reference-dir")

    return find


@pytest.fixture(scope="session")
def load_tensors(find_file) -> Callable[[str], dict[str, Tensor]]:
    """Recorded tensors by their file's name without ending; files are read once."""
    from safetensors.torch import load_file

    read: dict[str, dict[str, Tensor]] = {}

    def load(name: str) -> dict[str, Tensor]:
        if name not in read:
            read[name] = load_file(find_file(f"{name}.safetensors"))
        return read[name]

    return load


@pytest.fixture(scope="session")
def load_facts(find_file) -> Callable[[str], dict[str, Any]]:
    """A recorded JSON file by its name without ending."""
    return lambda name: json.loads(find_file(f"{name}.json").read_text())


class Tiny:
    """One recorded tiny model: what is written about it, its tensors, and ours built to its measure."""

    def __init__(self, variant: str, facts: dict, load: Callable[[str], dict[str, Tensor]]) -> None:
        self.variant, self.facts = variant, facts
        self.sizes, self.cfg = facts["sizes"], facts["cfg"]
        self.shared, self.io, self.weights = (
            load(name) for name in ("tiny_shared", f"tiny_{variant}_io", f"tiny_{variant}_weights")
        )

    def recorded(self, name: str) -> tuple[Tensor, int]:
        """A recorded output and the spatial stride it was thinned with."""
        for key, value in self.io.items():
            match = re.fullmatch(re.escape(name) + r"(?:\.strided(\d+))?", key)
            if match:
                return value, int(match[1] or 1)
        raise KeyError(f"{name} is not recorded for {self.variant}")

    def noise(self, name: str) -> float:
        """Recorded float32-to-float64 difference of an output, relative to its largest value; 0 where unknown."""
        for key, value in self.facts["float32_vs_float64"].items():
            if key == name or key.startswith(name + ".strided"):
                return value["max_abs_diff"] / value["absmax"]
        return 0.0

    @cached_property
    def class_names(self) -> list[str]:
        return self.cfg["class_names"]

    @cached_property
    def vlm(self) -> dict[str, Any]:
        s, weights = self.sizes, self.weights
        kwargs: dict[str, Any] = {"embed_dim": s["joint_dim"]}
        text = {"vocab_size": s["vocab"], "width": s["text_width"], "heads": s["text_heads"]}
        text |= {"layers": s["text_layers"], "context_length": len(_text_positions(weights))}
        if self.variant == "clip":
            kwargs["vision_cfg"] = {
                "image_size": s["image"],
                "layers": s["depth"],
                "width": s["vlm_width"],
                "patch_size": s["patch"],
                "head_width": s["vlm_width"] // s["vlm_heads"],
                "mlp_ratio": _ratio(weights["backbone.transformer.resblocks.0.mlp.c_fc.weight"]),
            }
            text["mlp_ratio"] = _ratio(weights["text_encoder.transformer.resblocks.0.mlp.c_fc.weight"])
        else:
            hidden, text_hidden = {
                "eva02": ("blocks.0.mlp.w1.weight", "transformer.resblocks.0.mlp.c_fc.weight"),
                "siglip": ("encoder.layers.0.mlp.fc1.weight", "encoder.layers.0.mlp.fc1.weight"),
            }[self.variant]
            tower = {"img_size": s["image"] // s["patch"] * s["patch"], "patch_size": s["patch"]}
            tower |= {"embed_dim": s["vlm_width"], "depth": s["depth"], "num_heads": s["vlm_heads"]}
            tower["mlp_ratio"] = _ratio(weights[f"backbone.{hidden}"])
            kwargs["vision_cfg"] = {"timm_kwargs": tower}
            text["mlp_ratio"] = _ratio(weights[f"text_encoder.{text_hidden}"])
        return {"name": VLMS[self.variant], "kwargs": {**kwargs, "text_cfg": text}}

    @cached_property
    def vfm(self) -> dict[str, Any]:
        s = self.sizes
        kwargs = {"img_size": s["image"] // s["patch"] * s["patch"], "patch_size": s["patch"]}
        kwargs |= {"embed_dim": s["dino_width"], "num_heads": s["dino_heads"]}
        kwargs["depth"] = count_blocks(self.weights, "backbone.dinov2.blocks.")
        kwargs["mlp_ratio"] = _ratio(self.weights["backbone.dinov2.blocks.0.mlp.fc1.weight"])
        return {"name": VFM, "kwargs": kwargs}

    def build_backbone(self) -> DualEncoderBackbone:
        config = self.cfg.get("backbone") or self.cfg["eva_clip"]
        parts = factory.build_backbone_parts(
            vfm=self.vfm,
            vlm=self.vlm,
            image_size=(self.sizes["image"], self.sizes["image"]),
            tap_layers=config["out_indices"],
            project_vfm=self.variant == "clip",
        )
        return DualEncoderBackbone(**parts)

    def build_head(self, in_dim: int) -> TextQueryHead:
        s, refiner = self.sizes, self.cfg["context_decoder"]
        parts = factory.build_head_parts(
            vlm=self.vlm,
            class_names=self.class_names,
            class_tokens=torch.tensor(self.facts["token_ids"]),
            in_dims=[in_dim] * 4,
            prompt_length=self.weights["contexts"].shape[1],
            refiner_kwargs={
                "width": s["context_decoder_width"],
                "num_heads": s["context_decoder_heads"],
                "num_layers": refiner["transformer_layers"],
                "dropout": refiner["dropout"],
            },
            hidden_dim=s["feat"],
            mask_dim=self.cfg["decode_head"]["out_channels"],
            num_heads=s["num_heads"],
            encoder_layers=s["n_enc"],
            decoder_layers=s["n_dec"],
            encoder_ffn_dim=s["ffn_encoder"],
            decoder_ffn_dim=s["ffn_decoder"],
        )
        logit = self.facts["siglip_logit"]
        scale = torch.tensor(logit["logit_scale"]).exp().item() if logit else 1 / CLIP_TEMPERATURE
        parts |= {"alignment_scale": scale, "alignment_bias": logit["logit_bias"] if logit else 0.0}
        return TextQueryHead(**parts)

    def build(self) -> Segmenter:
        """A fresh model with the recorded weights, in eval mode, nothing dropped in training."""
        backbone, test = self.build_backbone(), self.cfg["test_cfg"]
        head, loss = self.cfg["decode_head"], self.cfg["decode_head"]["train_cfg"]
        model = Segmenter(
            backbone=backbone,
            sem_seg_head=self.build_head(backbone.encoder.tap_dim),
            criterion=Criterion(
                num_classes=len(self.class_names),
                class_weight=head["loss_cls"]["loss_weight"],
                mask_weight=head["loss_mask"]["loss_weight"],
                dice_weight=head["loss_dice"]["loss_weight"],
                alignment_weight=self.cfg["identity_head"]["loss_decode"]["loss_weight"],
                no_object_weight=head["loss_cls"]["class_weight"][-1],
                num_points=loss["num_points"],
                oversample_ratio=loss["oversample_ratio"],
                importance_ratio=loss["importance_sample_ratio"],
            ),
            pixel_mean=CLIP_MEAN,
            pixel_std=CLIP_STD,
            crop_size=tuple(test["crop_size"]),
            inference=InferenceSettings(
                mode=test["mode"], crop_size=tuple(test["crop_size"]), stride=tuple(test["stride"])
            ),
        )
        ours = from_official(self.weights)
        model.load_state_dict(ours, strict=True)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.eval()

    def official_names(self, model: nn.Module) -> dict[str, str]:
        """Our trained parameters' names by the release's."""
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        names = {id(value): name for name, value in trained.items()}
        return {key: names[id(value)] for key, value in to_official(trained, self.variant).items()}


def count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered children there are below a prefix."""
    return len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)})


def _text_positions(weights: Mapping[str, Tensor]) -> Tensor:
    names = ("positional_embedding", "embeddings.position_embedding.weight")
    return next(weights[f"text_encoder.{name}"] for name in names if f"text_encoder.{name}" in weights)


def _ratio(weight: Tensor) -> float:
    """An MLP's hidden width over its width; the half keeps `int(width * ratio)` from rounding down to one less."""
    return (weight.shape[0] + 0.5) / weight.shape[1]


class Replay:
    """`torch.rand` of the release, for a criterion that draws only the sampled points.

    The release also draws (1, P, 2) for each image before every prediction's loss, which matter to nothing.

    Args:
        draws: the release's draws, in their order.
        batch_size: useless draws per prediction.
    """

    def __init__(self, draws: Iterable[Tensor], batch_size: int) -> None:
        self._draws = iter(draws)
        self._batch_size = batch_size
        self._calls = 0

    @classmethod
    def of_stream(cls, numbers: Tensor, shapes: Sequence[Sequence[int]], batch_size: int) -> Replay:
        """Cut one recorded stream of uniform numbers into draws of these shapes."""
        counts = [math.prod(shape) for shape in shapes]
        pieces = numbers[: sum(counts)].split(counts)
        return cls([piece.view(*shape) for piece, shape in zip(pieces, shapes, strict=True)], batch_size)

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        if self._calls % 2 == 0:
            for _ in range(self._batch_size):
                next(self._draws)
        self._calls += 1
        draw = next(self._draws)
        assert tuple(shape) == tuple(draw.shape), f"asked for {tuple(shape)} where the release draws {draw.shape}"
        return draw

    def is_used_up(self) -> bool:
        return next(self._draws, None) is None


class FreshDraws(Replay):
    """The same from a generator, as the release seeds it for each step."""

    def __init__(self, generator: torch.Generator, num_points: int, batch_size: int) -> None:
        self._generator, self._useless = generator, (1, num_points, 2)
        self._batch_size = batch_size
        self._calls = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        if self._calls % 2 == 0:
            for _ in range(self._batch_size):
                torch.rand(self._useless, generator=self._generator)
        self._calls += 1
        return torch.rand(shape, generator=self._generator)


def _official_losses(losses: Mapping[str, float]) -> dict[str, float]:
    """Our losses by the names of the release's log."""
    named = {"scr_map.loss_seg": losses["loss_align"]}
    for kind in ("cls", "mask", "dice"):
        named[f"decode.loss_{kind}"] = losses[f"loss_{kind}"]
        for key, value in losses.items():
            if key.startswith(f"loss_{kind}_"):
                named[f"decode.d{key.rsplit('_', 1)[1]}.loss_{kind}"] = value
    assert len(named) == len(losses)
    return {key: torch.as_tensor(value).item() for key, value in named.items()}


@pytest.fixture(scope="session")
def official_losses() -> Callable[[Mapping[str, float]], dict[str, float]]:
    return _official_losses


@pytest.fixture(scope="session")
def fresh_draws() -> type[FreshDraws]:
    return FreshDraws


@pytest.fixture(scope="session")
def replay() -> type[Replay]:
    return Replay


@pytest.fixture(scope="session")
def load_tiny(load_facts, load_tensors) -> Callable[[str], Tiny]:
    """The recorded tiny model of a variant."""
    known: dict[str, Tiny] = {}

    def load(variant: str) -> Tiny:
        if variant not in known:
            known[variant] = Tiny(variant, load_facts(f"tiny_{variant}"), load_tensors)
        return known[variant]

    return load


@pytest.fixture(params=VARIANTS, scope="module")
def tiny(request: pytest.FixtureRequest, load_tiny) -> Tiny:
    """Each variant in turn."""
    return load_tiny(request.param)
