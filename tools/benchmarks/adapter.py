"""`adapter`: MVFuser against the attention adapters it replaces, over token counts."""

from __future__ import annotations

import argparse

import torch

from benchmarks.measure import (
    add_common_arguments,
    cost_exponents,
    describe_machine,
    draw,
    emit,
    peak_extra_bytes,
    prepare_memory_measurement,
    time_calls,
)
from mfuser_d2.core.adapters import ADAPTERS, TokenLayout, build_adapter

COMPARED = ("mvfuser", "self_attention_concat", "self_attention_separate", "cross_attention")
SIDES = (16, 24, 32, 48, 64, 90)
"""Patches along a side; 32 is 512 pixels at patch 16, 64 is 1,024."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `adapter`."""
    parser.add_argument("--adapters", nargs="+", choices=sorted(ADAPTERS), default=list(COMPARED), metavar="NAME")
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), help="patches along a side of the image")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=int, default=1024, help="token width of both encoders")
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print a line a case; returns the exit status."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    emit(describe_machine(arguments.device))
    cases = [
        (side, name, direction)
        for side in arguments.sides
        for name in arguments.adapters
        for direction in ("forward", "forward_backward")
    ]
    rows = [emit(measure(arguments, *case)) for case in cases]
    for name, direction in dict.fromkeys((row["adapter"], row["direction"]) for row in rows):
        own = [row for row in rows if (row["adapter"], row["direction"]) == (name, direction)]
        exponents = cost_exponents(own, "tokens", 1024, 1 << 20)
        if exponents:
            emit({"benchmark": "adapter_exponent", "adapter": name, "direction": direction, **exponents})
    prepare_memory_measurement()
    for side, name, direction in cases:
        peak = peak_extra_bytes(make_call(arguments, side, name, direction), arguments.device)
        if peak is not None:
            case = {"adapter": name, "direction": direction, "tokens": 2 * side * side}
            emit({"benchmark": "adapter_memory", **case, "extra_memory_bytes": peak})
    if arguments.plot:
        draw(rows, "tokens", "adapter", arguments.plot)
    return 0


def make_call(arguments: argparse.Namespace, side: int, name: str, direction: str):
    """A function without arguments that runs the adapter once over `2 * side * side` tokens, in eval mode."""
    adapter = build_adapter(name, vfm_dim=arguments.width, vlm_dim=arguments.width).to(arguments.device).eval()
    layout = TokenLayout(vfm_grid=(side, side), vlm_grid=(side, side), vfm_prefix=0, vlm_prefix=0)
    shape = (arguments.batch, side * side, arguments.width)
    vfm, vlm = (torch.randn(shape, device=arguments.device, requires_grad=True) for _ in range(2))

    def call() -> None:
        with torch.set_grad_enabled(direction != "forward"):
            corrections = adapter(vfm, vlm, layout)
            if direction != "forward":
                total = sum(part.sum() for part in corrections)
                torch.autograd.grad(total, [vfm, vlm, *adapter.parameters()], allow_unused=True)

    return call


def measure(arguments: argparse.Namespace, side: int, name: str, direction: str) -> dict:
    """One row without memory, which is measured after all timing."""
    row = {"benchmark": "adapter", "adapter": name, "direction": direction, "tokens": 2 * side * side}
    row |= {key: getattr(arguments, key) for key in ("batch", "width", "device")}
    return row | time_calls(make_call(arguments, side, name, direction), arguments.repeats, arguments.device)
