"""The scan's meaning, its backends against the reference, gradients and refusals."""

import pytest
import torch
from torch.nn import functional as F

from mfuser_d2.core.ops import selective_scan
from mfuser_d2.core.ops.selective_scan import available_backends, interface, scan_backend
from mfuser_d2.core.ops.selective_scan.interface import BACKENDS

FAST = [name for name in BACKENDS if name != "reference"]

MAPS = {"plain": (2, 3, 37), "grouped": (2, 2, 3, 37), "fixed": (6, 3)}
PAIRS = [("plain", "plain"), ("grouped", "grouped"), ("fixed", "plain"), ("plain", "fixed")]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def make_case(batch=2, channels=6, states=3, length=37, b=None, c=None, dtype=torch.float32, device="cpu"):
    """Random arguments with decays from almost none to almost all."""

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    case = {
        "u": randn(batch, channels, length),
        "delta": randn(batch, channels, length),
        "A": -torch.exp(randn(channels, states)),
        "B": randn(*(b or (batch, states, length))),
        "C": randn(*(c or (batch, states, length))),
        "D": randn(channels),
        "z": randn(batch, channels, length),
        "delta_bias": randn(channels),
    }
    return {name: tensor.requires_grad_() for name, tensor in case.items()}


def device_of(backend):
    return "cuda" if backend in ("triton", "mamba_ssm") and torch.cuda.is_available() else "cpu"


def run(case, backend):
    return selective_scan(**case, delta_softplus=True, return_last_state=True, backend=backend)


def wide(case):
    return {name: tensor.detach().double().requires_grad_() for name, tensor in case.items()}


def relative_error(got, wanted):
    got, wanted = got.detach(), wanted.detach()
    return float((got.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def runnable(backend, case):
    obstacle = available_backends(*(case[name] for name in "uABC"))[backend]
    if obstacle:
        pytest.skip(f"{backend}: {obstacle}")


def check_against_reference(case, backend):
    """Outputs, last state and every gradient against the float64 reference."""
    runnable(backend, case)
    tolerance = TOLERANCE[case["u"].dtype]
    exact = wide(case)
    wanted, got = run(exact, "reference"), run(case, backend)
    assert got[0].dtype == case["u"].dtype
    assert got[1].dtype == torch.promote_types(case["u"].dtype, torch.float32)
    weights = [torch.randn_like(part) for part in wanted]
    for part, target in zip(got, wanted):
        assert relative_error(part, target) <= tolerance
    if backend == "mamba_ssm":  # has no gradient for the last state
        weights = weights[:1]
    sum((part * weight).sum() for part, weight in zip(wanted, weights)).backward()
    sum((part * weight.to(part)).sum() for part, weight in zip(got, weights)).backward()
    for name, tensor in case.items():
        assert tensor.grad.dtype == tensor.dtype
        assert relative_error(tensor.grad, exact[name].grad) <= 2 * tolerance, name


def test_reference_is_the_recurrence():
    u, delta = torch.tensor([[[1.0, 2.0, -1.0]]]), torch.tensor([[[0.5, 1.0, 0.25]]])
    A, B, C = torch.tensor([[-1.0]]), torch.tensor([[[1.0, 0.5, 2.0]]]), torch.tensor([[[1.0, -1.0, 3.0]]])
    first = 0.5
    second = first * torch.e**-1.0 + 1.0
    third = second * torch.e**-0.25 - 0.5
    y, state = selective_scan(u, delta, A, B, C, D=torch.ones(1), return_last_state=True, backend="reference")
    torch.testing.assert_close(y, torch.tensor([[[first + 1, -second + 2, 3 * third - 1]]]))
    torch.testing.assert_close(state, torch.tensor([[[third]]]))


def test_gate_and_bias_are_what_mamba_means():
    case = make_case(dtype=torch.float64)
    bare = {name: case[name] for name in "uABC"}
    steps = F.softplus(case["delta"] + case["delta_bias"][:, None])
    by_hand = selective_scan(**bare, delta=steps, backend="reference") + case["D"][:, None] * case["u"]
    torch.testing.assert_close(run(case, "reference")[0], by_hand * F.silu(case["z"]))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("b", "c"), [("plain", "plain"), ("grouped", "grouped"), ("fixed", "plain"), ("fixed", "fixed")]
)
def test_gradcheck_in_float64(backend, b, c):
    sizes = {"plain": (1, 2, 5), "grouped": (1, 1, 2, 5), "fixed": (4, 2)}
    case = make_case(1, 4, 2, 5, sizes[b], sizes[c], torch.float64)
    names = list(case)

    def scan(*tensors):
        return run(dict(zip(names, tensors)), backend)

    assert torch.autograd.gradcheck(scan, tuple(case.values()))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("b", "c"), [("plain", "plain"), ("grouped", "grouped"), ("fixed", "plain"), ("plain", "fixed")]
)
def test_backend_equals_reference(backend, dtype, b, c):
    check_against_reference(make_case(b=MAPS[b], c=MAPS[c], dtype=dtype, device=device_of(backend)), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("channels", "states", "length"), [(1, 1, 1), (5, 16, 2), (33, 1, 70), (3, 16, 70)])
def test_any_size(backend, channels, states, length):
    check_against_reference(make_case(2, channels, states, length, device=device_of(backend)), backend)


@pytest.mark.parametrize("backend", FAST)
def test_tokens_are_read_where_they_lie(backend):
    case = make_case(channels=20, states=2, length=70, device=device_of(backend))
    runnable(backend, case)
    wanted = run(case, "reference")[0]
    case.update({name: case[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("u", "delta", "B", "C")})
    case["u"] = torch.cat([case["u"], case["u"]], dim=1)[:, :20]  # a slice with gaps
    torch.testing.assert_close(run(case, backend)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_long_decays_stay_finite_and_exact(backend):
    case = make_case(states=2, length=100, device=device_of(backend))
    case["A"] = (case["A"] * 100).detach().requires_grad_()
    case["delta"] = (case["delta"] + 10).detach().requires_grad_()
    check_against_reference(case, backend)
    assert all(tensor.grad.isfinite().all() for tensor in case.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_sequence(backend):
    case = make_case(device=device_of(backend))
    runnable(backend, case)
    clean = run(case, backend)[0].detach()
    with torch.no_grad():
        case["u"][1, 0, 3] = torch.nan
        case["delta"][1, 1, 4] = torch.nan
        case["B"][1, 0, 5] = torch.nan
    y, _ = run(case, backend)
    torch.testing.assert_close(y[0], clean[0])
    assert y[1].isnan().any()
    y.nansum().backward()
    for name in ("u", "delta", "B", "C", "z"):
        assert case[name].grad[0].isfinite().all(), name


@pytest.mark.parametrize("backend", FAST)
def test_only_asked_gradients(backend):
    case = make_case(device=device_of(backend))
    runnable(backend, case)
    for name in ("u", "B", "z", "D"):
        case[name].requires_grad_(False)
    run(case, backend)[0].sum().backward()
    assert case["u"].grad is None and case["A"].grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_bare_arguments_without_gradient(backend):
    full = make_case(device=device_of(backend))
    case = {name: full[name].detach() for name in ("u", "delta", "A", "B", "C")}
    runnable(backend, case)
    case["delta"] = case["delta"].abs()
    wanted = selective_scan(**case, backend="reference")
    torch.testing.assert_close(selective_scan(**case, backend=backend), wanted, rtol=1e-5, atol=1e-5)


def test_torch_backend_never_holds_all_states():
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                part.numel() for part in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(part)
            )
            return out

    case = make_case(2, 256, 16, 400)
    with Watch():
        run(case, "torch")[0].sum().backward()
    assert max(sizes) < case["u"].numel() * 16 / 4


BAD_INPUTS = {
    "u": [lambda x: x.int(), lambda x: x[0], lambda x: x[..., :0]],
    "delta": [lambda x: x[..., :-1], lambda x: x.to("meta")],
    "A": [lambda x: x.to(torch.complex64), lambda x: x[:-1], lambda x: x[:, :0]],
    "B": [lambda x: x[:1], lambda x: x[:, :-1], lambda x: x[:, None].expand(2, 4, 3, 37)],
    "C": [lambda x: x[..., :-1], lambda x: x.long()],
    "D": [lambda x: x[:-1], lambda x: x[None]],
    "z": [lambda x: x[:1]],
    "delta_bias": [lambda x: x[:-1], lambda x: x.double()],
}


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, spoilers in BAD_INPUTS.items() for i in range(len(spoilers))]
)
def test_bad_input_is_named(name, index):
    case = make_case()
    spoiled = BAD_INPUTS[name][index](case[name].detach())
    case[name] = spoiled
    with pytest.raises(ValueError, match="wanted") as raised:
        selective_scan(**case)
    assert str(raised.value).startswith(f"{name} ")
    assert str(tuple(spoiled.shape)) in str(raised.value)


def test_unequal_groups_are_refused():
    case = make_case(b=(2, 2, 3, 37), c=(2, 3, 3, 37))
    with pytest.raises(ValueError, match="^C is .*groups"):
        selective_scan(**case)


def test_unknown_backend_lists_the_known():
    with pytest.raises(KeyError, match="reference"):
        selective_scan(**make_case(), backend="cuda")


def test_a_backend_says_why_it_cannot_run():
    case = make_case()
    obstacles = available_backends(*(case[name] for name in "uABC"))
    for name, obstacle in obstacles.items():
        if obstacle:
            with pytest.raises(RuntimeError, match=name):
                run(case, name)
    assert obstacles["torch"] is None and obstacles["reference"] is None


def test_auto_can_be_redirected():
    case = make_case()
    with scan_backend("reference"):
        inside = run(case, "auto")[0]
    assert torch.equal(inside, run(case, "reference")[0])
    with pytest.raises(KeyError), scan_backend("nothing"):
        pass


def test_auto_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(interface, "_announced", set())
    with caplog.at_level("INFO"):
        for _ in range(2):
            selective_scan(**make_case())
    assert sum("uses backend" in record.message for record in caplog.records) == 1


def test_autocast_leaves_the_state_alone():
    case = make_case(length=100)
    plain = run(case, "torch")[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(case, "torch")[0]
    assert torch.equal(plain, mixed)


class Scan(torch.nn.Module):
    """A scan of (N, T, C) tokens whose step sizes are learned, to be compiled and exported."""

    def __init__(self):
        super().__init__()
        self.A = torch.nn.Parameter(-torch.rand(6, 3))
        self.bias = torch.nn.Parameter(torch.randn(6))

    def forward(self, tokens, maps):
        x = tokens.transpose(1, 2)
        return selective_scan(x, x, self.A, maps, maps, delta_bias=self.bias, delta_softplus=True)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_export_keeps_the_numbers(backend):
    module, inputs = Scan(), (torch.randn(2, 37, 6), torch.randn(2, 3, 37))
    runnable(backend, make_case())
    with scan_backend(backend):
        program = torch.export.export(module, inputs)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("mfuser_d2" in name for name in names) == (backend == "cpu")
    torch.testing.assert_close(program.module()(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)


def test_compiled_kernel_is_a_whole_graph():
    module, inputs = Scan(), (torch.randn(2, 37, 6), torch.randn(2, 3, 37))
    runnable("cpu", make_case())
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    wanted = torch.autograd.grad(module(*inputs).sum(), list(module.parameters()))
    for got, target in zip(torch.autograd.grad(compiled(*inputs).sum(), list(module.parameters())), wanted):
        torch.testing.assert_close(got, target)


def test_compiled_kernel_is_a_proper_operator():
    case = make_case()
    runnable("cpu", case)
    maps = [case[name].detach().unsqueeze(1).requires_grad_() for name in "BC"]
    arguments = (case["u"], case["delta"], case["A"], *maps, case["D"], case["delta_bias"], True, True)
    torch.library.opcheck(torch.ops.mfuser_d2.scan_forward, arguments)
