import pytest
import torch

from mfuser_d2.core.adapters import ADAPTERS, TokenLayout, adapter_options, build_adapter

LAYOUT = TokenLayout(vfm_grid=(3, 4), vlm_grid=(2, 3), vfm_prefix=2, vlm_prefix=1)
SEPARATE = ("none", "vfm_only", "vlm_only", "conv", "cross_attention", "separate_mvfuser")


def make_tokens(vfm_dim: int = 32, vlm_dim: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 2 + 12, vfm_dim, requires_grad=True), torch.randn(2, 1 + 6, vlm_dim, requires_grad=True)


def make(name: str, vfm_dim: int = 32, vlm_dim: int = 32, **options: object):
    return build_adapter(name, vfm_dim=vfm_dim, vlm_dim=vlm_dim, **options)


def sees(name: str, output: int, source: int) -> torch.Tensor:
    """(T of the output encoder, T of the source encoder) bool: which corrections depend on which tokens."""
    adapter = make(name).eval()
    vfm, vlm = make_tokens()
    correction = adapter(vfm, vlm, LAYOUT)[output][0]
    token = (vfm, vlm)[source]
    rows = []
    for row in correction.sum(dim=1):
        gradient = None
        if row.requires_grad:
            gradient = torch.autograd.grad(row, token, retain_graph=True, allow_unused=True)[0]
        rows.append(torch.zeros(token.shape[1]) if gradient is None else gradient[0].abs().sum(dim=1))
    return torch.stack(rows) > 0


@pytest.mark.parametrize("widths", [(32, 32), (48, 32)], ids=["one_width", "two_widths"])
@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_corrections_have_the_tokens_shapes_and_reach_every_parameter(name: str, widths: tuple[int, int]) -> None:
    adapter = make(name, *widths)
    vfm, vlm = make_tokens(*widths)
    vfm_delta, vlm_delta = adapter(vfm, vlm, LAYOUT)
    assert vfm_delta.shape == vfm.shape and vlm_delta.shape == vlm.shape
    if name == "none":
        assert not list(adapter.parameters()) and not vfm_delta.any() and not vlm_delta.any()
        return
    (vfm_delta * torch.randn_like(vfm)).sum().add((vlm_delta * torch.randn_like(vlm)).sum()).backward()
    idle = [key for key, value in adapter.named_parameters() if value.grad is None or not value.grad.any()]
    # Equal attention weights of a fresh deformable attention stay a function of its query, whose own layer is zero.
    late = {"query_proj.weight", "query_proj.bias"} if name == "deformable" else set()
    assert set(idle) <= late


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - {"none"}))
def test_training_starts_close_to_no_correction(name: str) -> None:
    vfm, vlm = make_tokens()
    deltas = make(name)(vfm, vlm, LAYOUT)
    assert 0 < max(float(delta.detach().abs().max()) for delta in deltas) < 0.02


@pytest.mark.parametrize("name", sorted(ADAPTERS))
@pytest.mark.parametrize("output", [0, 1], ids=["vfm", "vlm"])
def test_only_adapters_that_join_the_encoders_let_one_see_the_other(name: str, output: int) -> None:
    has_seen = bool(sees(name, output, 1 - output).any())
    # MVFuser scans VFM tokens first, so only the last of them meet a VLM token, in the convolution.
    assert has_seen == (name not in SEPARATE)


def test_each_encoder_queries_the_other_in_separate_attention() -> None:
    assert sees("self_attention_separate", 0, 1).all()
    inside = sees("self_attention_separate", 0, 0)
    assert not (inside & ~torch.eye(len(inside), dtype=torch.bool)).any()


def test_concatenated_attention_sees_everything() -> None:
    assert sees("self_attention_concat", 1, 0).all() and sees("self_attention_concat", 1, 1).all()


def test_convolution_sees_the_eight_neighbours_and_prefix_tokens_only_themselves() -> None:
    seen = sees("conv", 0, 0)
    assert torch.equal(seen[:2], torch.eye(14, dtype=torch.bool)[:2])
    row, column = torch.arange(12) // 4, torch.arange(12) % 4
    near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
    assert torch.equal(seen[2:, 2:], near) and not seen[2:, :2].any()


def test_learned_tokens_answer_both_encoders_alike() -> None:
    adapter = make("cross_attention").eval()
    _, vlm = make_tokens()
    vfm_delta, vlm_delta = adapter(torch.cat([vlm, vlm], dim=1), vlm, LAYOUT)
    torch.testing.assert_close(vfm_delta[:, :7], vlm_delta)
    assert adapter.tokens.shape == (100, 32)


def test_the_first_learned_token_takes_from_the_softmax_and_gives_nothing() -> None:
    adapter = make("cross_attention", num_tokens=3).eval()
    vfm, vlm = make_tokens()
    with torch.no_grad():
        adapter.tokens[0] = 0
        before = adapter(vfm, vlm, LAYOUT)[1]
        alone = adapter.step(adapter.out_proj(vlm))
        vlm_along = vlm * 0 + 1  # every token points along the first learned one
        adapter.tokens[0] = 1e4
        along = adapter(vfm, vlm_along, LAYOUT)[1]
    assert not torch.allclose(before, alone, atol=1e-7)
    torch.testing.assert_close(along, adapter.step(adapter.out_proj(vlm_along)))


def test_deformable_adapter_corrects_patches_only_from_places_near_them() -> None:
    adapter = make("deformable").eval()
    vfm, vlm = make_tokens()
    vfm_delta, vlm_delta = adapter(vfm, vlm, LAYOUT)
    assert not vfm_delta[:, :2].any() and not vlm_delta[:, :1].any()
    assert vfm_delta[:, 2:].any(dim=2).all() and vlm_delta[:, 1:].any(dim=2).all()
    seen = sees("deformable", 0, 1)
    assert not seen[:, 0].any() and not seen[2:].all()


@pytest.mark.parametrize("name", ["vfm_only", "vlm_only", "separate_mvfuser"])
def test_per_encoder_adapters_have_a_block_for_each_chosen_encoder(name: str) -> None:
    vfm_delta, vlm_delta = make(name)(*make_tokens(), LAYOUT)
    assert bool(vfm_delta.any()) == (name != "vlm_only")
    assert bool(vlm_delta.any()) == (name != "vfm_only")


@pytest.mark.parametrize("name", ["none", "separate_mvfuser"])
def test_adapters_that_keep_the_encoders_apart_project_nothing(name: str) -> None:
    assert not any("vfm_in" in key for key, _ in make(name, project_vfm=True).named_parameters())
    assert any("vfm_in" in key for key, _ in make("conv", project_vfm=True).named_parameters())


def test_options_reach_the_adapters_that_have_them_and_no_others() -> None:
    assert adapter_options("mvfuser") == {"state_dim", "dropout"}
    assert adapter_options("vfm_only") == {"state_dim", "dropout"}
    options = {"state_dim": 4, "num_tokens": 5, "num_heads": 2, "num_points": 3, "dropout": 0.5}
    for name in ADAPTERS:
        make(name, **options)
    assert make("mvfuser", **options).block.A_log.shape == (16, 4)
    assert make("cross_attention", **options).tokens.shape == (5, 32)
    assert make("deformable", **options).attn.num_points == 3
    assert make("self_attention_separate", **options).vlm_attn.num_heads == 2
    assert make("conv", **options).step.dropout.p == 0.5


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: make("mvfusr"), KeyError, "choose from.*mvfuser"),
        (lambda: make("mvfuser", num_state=3), KeyError, "num_state.*state_dim"),
        (lambda: make("self_attention_concat", num_heads=5), ValueError, "num_heads=5"),
        (lambda: make("deformable", num_heads=5), ValueError, "num_heads=5"),
        (lambda: make("cross_attention", num_tokens=1), ValueError, "NUM_TOKENS=1"),
        (lambda: make("mvfuser", vlm_dim=33), ValueError, "odd"),
        (lambda: make("conv", vlm_dim=33), ValueError, "odd"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
