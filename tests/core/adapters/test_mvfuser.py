"""MVFuser: values by its equations, gradients, initial values, odd sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfuser_d2.core.adapters import TokenLayout
from mfuser_d2.core.adapters.mvfuser import STEP_FLOOR, STEP_MAX, MVFuser, MVFuserBlock

LAYOUT = TokenLayout(vfm_grid=(2, 3), vlm_grid=(2, 2), vfm_prefix=1, vlm_prefix=0)


def step_by_step(block: MVFuserBlock, tokens: Tensor) -> Tensor:
    """Eq. 4-6 and the release's oddities, one token at a time, in float64."""
    w = {key: value.double() for key, value in block.state_dict().items()}
    inner, states, rank = w["D"].shape[0], block.state_dim, block.step_rank
    joint = tokens.double() @ w["in_proj.weight"].T
    halves = []
    for half, conv in zip(joint.split(inner, dim=2), ("conv1d_x", "conv1d_z")):
        padded = F.pad(half, (0, 0, 1, 1))
        kernel = w[f"{conv}.weight"][:, 0]
        halves.append(F.silu(sum(padded[:, i : i + half.shape[1]] * kernel[:, i] for i in range(3))))
    x, z = halves
    step, b, c = (x @ w["x_proj.weight"].T).split([rank, states, states], dim=2)
    bias = w["dt_proj.bias"]
    delta = F.softplus(step @ w["dt_proj.weight"].T + bias + bias)
    state, rows = torch.zeros(len(x), inner, states, dtype=torch.float64), []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * -torch.exp(w["A_log"]))
        state = decay * state + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
        rows.append((state * c[:, t, None]).sum(-1) + w["D"] * x[:, t])
    y = torch.stack(rows, dim=1)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm.weight"] * F.silu(z)
    return y @ w["out_proj.weight"].T * w["scale"]


def block(dim: int = 24, **options) -> MVFuserBlock:
    torch.manual_seed(0)
    made = MVFuserBlock(dim=dim, **options).eval()
    with torch.no_grad():
        made.scale.fill_(0.7)
    return made


@pytest.mark.parametrize(("dim", "length", "state_dim"), [(24, 13, 16), (34, 1, 4), (16, 2, 1)])
def test_values(dim, length, state_dim):
    made = block(dim, state_dim=state_dim)
    tokens = torch.randn(2, length, dim)
    torch.testing.assert_close(made(tokens).double(), step_by_step(made, tokens), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_equations():
    made, tokens = block(16, state_dim=4), torch.randn(2, 7, 16)
    weight = torch.randn(2, 7, 16)
    given = tokens.clone().requires_grad_()
    (made(given) * weight).sum().backward()
    wanted = tokens.double().requires_grad_()
    (step_by_step(made, wanted) * weight).sum().backward()
    torch.testing.assert_close(given.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


def test_it_also_runs_in_float64():
    made, tokens = block().double(), torch.randn(1, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(made(tokens), step_by_step(made, tokens), rtol=1e-9, atol=1e-12)


def test_the_scan_looks_forward_and_the_convolutions_one_token_back_as_well():
    made = block()
    tokens = torch.randn(1, 9, 24, requires_grad=True)
    made(tokens)[0, 4].sum().backward()
    reached = tokens.grad[0].abs().sum(dim=1) > 0
    assert reached.tolist() == [True] * 6 + [False] * 3


def test_initial_values():
    """Steps between 1e-3 and 0.1, A = -1..-N, and a small scale so that training starts near the frozen encoders."""
    torch.manual_seed(0)
    made = MVFuserBlock(dim=256)
    steps = F.softplus(made.dt_proj.bias)
    assert STEP_FLOOR <= steps.min() < 2e-3 and 0.05 < steps.max() <= STEP_MAX * 1.0001
    torch.testing.assert_close(made.A_log[3].exp(), torch.arange(1.0, 17.0))
    assert made.scale.item() == pytest.approx(1e-3) and made.D.eq(1).all()
    bound = made.step_rank**-0.5
    assert made.step_rank == math.ceil(256 / 16) and made.dt_proj.weight.abs().max() <= bound


def test_dropout_works_on_the_correction_in_training_only():
    made, tokens = block(dropout=0.5), torch.randn(1, 40, 24)
    assert torch.equal(made(tokens), made(tokens))
    dropped = made.train()(tokens).eq(0).float().mean()
    assert 0.35 < dropped < 0.65


def test_odd_widths_are_refused():
    with pytest.raises(ValueError, match="25 is odd"):
        MVFuserBlock(dim=25)


@pytest.mark.parametrize(("vfm_dim", "vlm_dim", "project"), [(24, 24, False), (24, 24, True), (40, 24, False)])
def test_adapter_corrects_both_encoders_in_their_own_widths(vfm_dim, vlm_dim, project):
    torch.manual_seed(0)
    adapter = MVFuser(vfm_dim=vfm_dim, vlm_dim=vlm_dim, project_vfm=project)
    assert hasattr(adapter, "vfm_in") is (project or vfm_dim != vlm_dim)
    vfm, vlm = torch.randn(2, 7, vfm_dim), torch.randn(2, 4, vlm_dim)
    deltas = adapter(vfm, vlm, LAYOUT)
    assert [delta.shape for delta in deltas] == [vfm.shape, vlm.shape]


def test_vfm_tokens_come_first():
    """The scan runs from the VFM to the VLM: the VFM hears of the VLM only through the convolution at the seam."""
    adapter = MVFuser(vfm_dim=24, vlm_dim=24).eval()
    vlm = torch.randn(1, 4, 24, requires_grad=True)
    adapter(torch.randn(1, 7, 24), vlm, LAYOUT)[0].sum().backward()
    assert vlm.grad[0, 0].abs().sum() > 0 and vlm.grad[0, 1:].abs().sum() == 0
