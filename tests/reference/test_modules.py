"""MVFuser, MTEnhancer and the text refiner alone: recorded values and gradients."""

import re

from torch import Tensor, nn

from mfuser_d2.core.adapters.mvfuser import MVFuserBlock
from mfuser_d2.core.key_map import apply_rules
from mfuser_d2.core.mt_enhancer import MTEnhancer, TextRefiner
from mfuser_d2.core.official import TEXT_REFINER

TOLERANCE = 1e-5


def below(recorded: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in recorded.items() if key.startswith(prefix)}


def renamed(parameters: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Official names below the refiner as ours."""
    ours, left = apply_rules({prefix + key: value for key, value in parameters.items()}, TEXT_REFINER)
    assert left == []
    return ours


def num_heads(index: dict, name: str) -> int:
    match = re.search(r"(\d+) heads|heads (\d+)", index[name]["note"])
    return int(match[1] or match[2])


def check_module(check, name: str, module: nn.Module, recorded: dict, inputs: list[str], gradients: dict) -> None:
    """Values, and gradients of inputs and of every parameter, of sum(out * weight)."""
    values = [recorded[f"in.{key}"].clone().requires_grad_() for key in inputs]
    out = module(*values)
    check(name, out, recorded["out.y"], TOLERANCE)
    (out * recorded["in.grad_weight"]).sum().backward()
    for key, value in zip(inputs, values, strict=True):
        check(f"{name}, gradients", value.grad, recorded[f"grad.in.{key}"], TOLERANCE)
    assert set(gradients) == {key for key, _ in module.named_parameters()}
    for key, parameter in module.named_parameters():
        check(f"{name}, gradients", parameter.grad, gradients[key], TOLERANCE)


def test_mvfuser(load_tensors, check):
    recorded = load_tensors("mod_mvfuser")
    parameters = below(recorded, "param.")
    module = MVFuserBlock(dim=recorded["in.x"].shape[2], state_dim=parameters["A_log"].shape[1]).eval()
    module.load_state_dict(parameters, strict=True)
    check_module(check, "MVFuser", module, recorded, ["x"], below(recorded, "grad.param."))


def test_mtenhancer(load_tensors, load_facts, check):
    recorded = load_tensors("mod_mtenhancer")
    layer = "decoder.0."
    ours = {key.removeprefix("layers.0."): v for key, v in renamed(below(recorded, "param."), layer).items()}
    gradients = {key.removeprefix("layers.0."): v for key, v in renamed(below(recorded, "grad.param."), layer).items()}
    module = MTEnhancer(
        dim=recorded["in.x"].shape[2],
        num_heads=num_heads(load_facts("mod_index"), "mtenhancer"),
        state_dim=ours["mamba.A_log"].shape[1],
    ).eval()
    module.load_state_dict(ours, strict=True)
    check_module(check, "MTEnhancer", module, recorded, ["x", "visual"], gradients)


def test_text_refiner(load_tensors, load_facts, check):
    recorded = load_tensors("mod_context_decoder")
    ours = renamed(below(recorded, "param."))
    width, text_dim = ours["visual_proj.1.weight"].shape
    module = TextRefiner(
        text_dim=text_dim,
        width=width,
        num_heads=num_heads(load_facts("mod_index"), "context_decoder"),
        num_layers=len({key.split(".")[1] for key in ours if key.startswith("layers.")}),
    ).eval()
    gamma = {"gamma": module.gamma.detach()}  # multiplied outside the release's module
    module.load_state_dict({**ours, **gamma}, strict=True)
    check(
        "text refiner, two layers",
        module.residual(recorded["in.text"], recorded["in.visual"]),
        recorded["out.y"],
        TOLERANCE,
    )
