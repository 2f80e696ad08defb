import pytest
import torch
from torch import nn

from mfuser_d2.core.adapters import TokenLayout, build_adapter
from mfuser_d2.core.analysis import REST, count_parameters, measure, part_of
from mfuser_d2.core.attention import MultiHeadAttention
from mfuser_d2.core.ops.selective_scan.interface import BACKENDS

LAYOUT = TokenLayout(vfm_grid=(2, 3), vlm_grid=(2, 3), vfm_prefix=1, vlm_prefix=1)


def flops_of(model: nn.Module, *inputs: torch.Tensor) -> int:
    return sum(measure(model, lambda: model(*inputs), parts={}).flops.values())


def test_matrix_products_and_convolutions_are_two_per_multiply_add() -> None:
    with torch.device("meta"):
        assert flops_of(nn.Linear(5, 7), torch.empty(2, 3, 5)) == 2 * 2 * 3 * 5 * 7
        assert flops_of(nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.empty(2, 4, 5, 7)) == 2 * 2 * 6 * 5 * 7 * 2 * 9


def test_attention_counts_both_products_and_keeps_no_scores() -> None:
    with torch.device("meta"):
        attention = MultiHeadAttention(dim=8, num_heads=2)
        queries, keys = torch.empty(2, 300, 8, requires_grad=True), torch.empty(2, 500, 8)
        cost = measure(attention, lambda: attention(queries, keys, keys), parts={})
    projections = 2 * 2 * 8 * 8 * (300 + 500 + 500 + 300)
    assert cost.flops[REST] == projections + 2 * 2 * 2 * 300 * 500 * 8
    scores = 4 * 2 * 2 * 300 * 500
    assert cost.saved[REST] < scores


def test_mvfuser_follows_the_stated_formula() -> None:
    with torch.device("meta"):
        adapter = build_adapter("mvfuser", vfm_dim=32, vlm_dim=32, state_dim=4)
        tokens = torch.empty(3, 7, 32)
        total = flops_of(adapter, tokens, tokens, LAYOUT)
    steps, inner, states, rank = 3 * 14, 16, 4, 2
    products = 32 * 32 + inner * (rank + 2 * states) + rank * inner + inner * 32
    convolutions = 2 * 2 * inner  # two halves, two multiply-adds per value
    assert total == steps * (2 * products + 2 * convolutions + inner * (4 * states + 2))
    assert "formula" not in BACKENDS


def test_shared_tensors_are_kept_once_and_weights_not_at_all() -> None:
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
        images = torch.empty(10, 4)
        cost = measure(layer, lambda: layer(images), parts={})
        assert cost.saved[REST] == 2 * 10 * 4 * 4  # the input, and the ReLU's output, which the second layer keeps too
        with torch.no_grad():
            assert not measure(layer, lambda: layer(images), parts={}).saved


def test_saved_bytes_agree_with_what_autograd_really_keeps() -> None:
    """The same pass with values on the CPU, through hooks of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    kept: dict[int, torch.Tensor] = {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(5, 6))
    real = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)
    model.to("meta")
    assert measure(model, lambda: model(torch.empty(5, 6, device="meta")), parts={}).saved[REST] == real


def test_costs_go_to_the_part_that_runs() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 3)), "b": nn.Linear(3, 5), "c": nn.Linear(3, 1)}).to("meta")
    x = torch.empty(1, 2, device="meta")
    cost = measure(
        model, lambda: (model["b"](model["a"](x)), model["c"](model["a"](x))), {"first": ("a",), "B": ("b",)}
    )
    assert cost.flops == {"first": 2 * 12, "B": 30, REST: 6}


def test_parameters_are_counted_by_part_and_by_whether_they_train() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "ab": nn.Linear(3, 5).requires_grad_(False)})
    assert count_parameters(model, {"first": ("a",), "none": ("x",)}) == {"first": (9, 0), REST: (0, 20)}
    assert part_of("backbone.encoder.vfm_to_joint.weight") == "map to joint space"
    assert part_of("sem_seg_head.text_encoder.tower.model.x") == "VLM, text"
    assert part_of("sem_seg_head.text_encoder.prompt") == "prompts or queries"


def test_matrix_products_agree_with_fvcore() -> None:
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(36, 10), nn.Linear(10, 4)).eval()
    counted = fvcore.FlopCountAnalysis(model, torch.randn(2, 3, 8, 8)).total()  # in multiply-adds
    assert flops_of(model.to("meta"), torch.empty(2, 3, 8, 8, device="meta")) == 2 * counted
