"""`scan`: time, memory and error of every backend of the selective scan over sequence lengths."""

from __future__ import annotations

import argparse
import functools
import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import (
    add_common_arguments,
    cost_exponents,
    describe_machine,
    draw,
    emit,
    keep_freed_blocks,
    peak_extra_bytes,
    prepare_memory_measurement,
    time_calls,
)
from mfuser_d2.core.ops.selective_scan import available_backends, selective_scan

PAPER_LENGTH = 2594
"""Tokens of both encoders at 512 pixels and patch 14, class tokens included; with batch 2, 512 channels, 16 states."""
ERROR_LIMIT = 16384
"""Longest sequence whose error is measured: the float64 result takes its time."""
DIRECTIONS = ("forward", "forward_backward")
EINSUM_LOOP = "einsum_loop"
"""The operations of mamba_ssm's selective_scan_ref, the loop that users without its kernel get; slower than ours."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `scan`."""
    lengths = [256, 512, 1024, 2048, PAPER_LENGTH, 4096, 8192, 16384, 32768, 65536]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--paper", action="store_true", help="the paper's size only, reference backward included")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all that can run, reference included")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument(
        "--layout",
        choices=("tokens", "channels"),
        default="tokens",
        help="what lies together in memory; MVFuser: tokens",
    )
    parser.add_argument("--reference-limit", type=int, default=PAPER_LENGTH, help="longest reference forward")
    parser.add_argument(
        "--reference-backward-limit", type=int, default=512, help="longest reference backward; its cost is quadratic"
    )
    parser.add_argument(
        "--keep-freed", action="store_true", help="reuse freed memory, so that large results do not pay for fresh pages"
    )
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print a line a case; returns the exit status."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.paper:
        arguments.lengths = [PAPER_LENGTH]
        arguments.reference_backward_limit = max(arguments.reference_backward_limit, PAPER_LENGTH)
    torch.manual_seed(0)
    if arguments.keep_freed:
        keep_freed_blocks()
    emit(describe_machine(arguments.device))
    probe = make_case(arguments, 1)
    obstacles = available_backends(*(probe[name] for name in "uABC"))
    obstacles[EINSUM_LOOP] = None
    wanted = arguments.backends or list(obstacles)
    for name in wanted:
        if obstacles[name]:
            emit({"benchmark": "scan", "backend": name, "skipped": obstacles[name]})
    backends = [name for name in wanted if not obstacles[name]]
    rows = []
    for length, direction in itertools.product(arguments.lengths, DIRECTIONS):
        rows += measure_length(arguments, backends, length, direction)
    summarise(rows)
    measure_memory(arguments, rows)
    if arguments.plot:
        draw(rows, "length", "backend", arguments.plot)
    return 0


def make_case(arguments: argparse.Namespace, length: int) -> dict[str, Tensor]:
    """Leaf tensors of one call, with the step sizes and rates of an MVFuser at initialisation."""
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    batch, channels, states = arguments.batch, arguments.channels, arguments.states

    def sequence(width: int) -> Tensor:
        if arguments.layout == "tokens":
            return torch.randn(batch, length, width, device=device, dtype=dtype).transpose(1, 2)
        return torch.randn(batch, width, length, device=device, dtype=dtype)

    case = {
        "u": sequence(channels),
        "delta": sequence(channels) * 0.5,
        "A": -torch.arange(1, states + 1, device=device, dtype=torch.float32).repeat(channels, 1),
        "B": sequence(states),
        "C": sequence(states),
        "D": torch.ones(channels, device=device),
        "delta_bias": torch.empty(channels, device=device).uniform_(-6.9, -2.3),  # steps of 0.001 to 0.1
    }
    return {name: tensor.requires_grad_() for name, tensor in case.items()}


def call_scan(case: dict[str, Tensor], direction: str, backend: str, weights: Tensor) -> list[Tensor]:
    """One call: the outputs, and with the backward the gradients of all inputs."""
    with torch.set_grad_enabled(direction != "forward"):
        if backend == EINSUM_LOOP:
            y = einsum_loop(**case)
        else:
            y = selective_scan(**case, delta_softplus=True, backend=backend)
    if direction == "forward":
        return [y]
    return [y.detach(), *torch.autograd.grad(y, list(case.values()), weights)]


def einsum_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """A scan by two einsums over all steps and one a step, in float32."""
    steps = F.softplus(delta.float() + delta_bias[:, None])
    decay = torch.einsum("bdl,dn->bdln", steps, A).exp()
    drive = torch.einsum("bdl,bnl,bdl->bdln", steps, B.float(), u.float())
    out_map = C.float()
    state, outputs = torch.zeros_like(decay[:, :, 0]), []
    for t in range(u.shape[-1]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, out_map[:, :, t]))
    return (torch.stack(outputs, dim=-1) + D[:, None] * u).to(u.dtype)


def measure_length(arguments: argparse.Namespace, backends: list[str], length: int, direction: str) -> list[dict]:
    """Time and error of all backends for one length and direction, on the same inputs."""
    case = make_case(arguments, length)
    weights = torch.randn_like(case["u"])
    limit = arguments.reference_limit if direction == "forward" else arguments.reference_backward_limit
    exact, oracle = exact_results(case, direction, weights, length)
    rows = []
    for backend in backends:
        is_loop = backend in ("reference", EINSUM_LOOP)
        if length > limit and is_loop or backend == EINSUM_LOOP and direction != "forward" and length > 512:
            continue
        if length > arguments.reference_limit and backend == "parallel":  # holds all states at once, several times
            continue
        is_slow = is_loop and direction != "forward" and length > 512
        call = functools.partial(call_scan, case, direction, backend, weights)
        row = {"benchmark": "scan", "backend": backend, "direction": direction, "length": length}
        row |= {name: getattr(arguments, name) for name in ("batch", "channels", "states", "dtype", "layout", "device")}
        row |= time_calls(call, 1 if is_slow else arguments.repeats, arguments.device, warm_up=not is_slow)
        if exact and not is_slow:
            row["error"] = max(relative_error(got, wanted) for got, wanted in zip(call(), exact))
            row["error_against"] = oracle
        rows.append(row)
    for base in [row for row in rows if row["backend"] in ("reference", EINSUM_LOOP)]:
        for row, key in itertools.product(rows, ("seconds", "cpu_seconds")):
            row[f"{key}_against_{base['backend']}"] = round(base[key] / row[key], 2)
    for row in rows:
        emit(row)
    return rows


def exact_results(case: dict[str, Tensor], direction: str, weights: Tensor, length: int) -> tuple[list[Tensor], str]:
    """Results in float64: the reference's, or where that takes too long the torch backend's; none beyond the limit."""
    if length > ERROR_LIMIT:
        return [], ""
    is_short = length <= (PAPER_LENGTH if direction == "forward" else 512)
    oracle = "reference" if is_short else "torch"
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in case.items()}
    return call_scan(wide, direction, oracle, weights.double()), f"{oracle} in float64"


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


def measure_memory(arguments: argparse.Namespace, rows: list[dict]) -> None:
    """Prints the peak memory of each case; after all timing, which the allocator's setting would disturb."""
    prepare_memory_measurement()
    for row in rows:
        backend, direction, length = row["backend"], row["direction"], row["length"]
        if backend in ("reference", EINSUM_LOOP) and length > 512 and direction != "forward":
            continue  # minutes for a number that the shorter cases already show
        case = make_case(arguments, length)
        weights = torch.randn_like(case["u"])
        call = functools.partial(call_scan, case, direction, backend, weights)
        peak = peak_extra_bytes(call, arguments.device)
        if peak is not None:
            inputs = sum(tensor.numel() * tensor.element_size() for tensor in case.values())
            memory = {"extra_memory_bytes": peak, "extra_memory_over_inputs": round(peak / inputs, 2)}
            emit({"benchmark": "scan_memory", "backend": backend, "direction": direction, "length": length, **memory})


def summarise(rows: list[dict]) -> None:
    """Prints the fitted cost exponents."""
    for backend, direction in dict.fromkeys((row["backend"], row["direction"]) for row in rows):
        own = [row for row in rows if (row["backend"], row["direction"]) == (backend, direction)]
        exponents = cost_exponents(own, "length", 1024, 65536)
        if exponents:
            emit({"benchmark": "scan_exponent", "backend": backend, "direction": direction, **exponents})
