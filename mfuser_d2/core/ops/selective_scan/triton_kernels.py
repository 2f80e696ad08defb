"""Triton kernels of the selective scan. Import only where Triton is installed; `triton_backend.py` calls them.

A program walks along the sequence for a few channels of one batch entry, a tile of time at a time, with an associative
scan per state and tile. Pairs (decay, value) are joined by products and sums alone, so long decays go to 0 and nothing
overflows. Beyond the end of a sequence steps are 0: the decay is 1, the drive 0, and the state passes unchanged.
"""

# ruff: noqa: N803

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _join(decay_1, value_1, decay_2, value_2):
    return decay_1 * decay_2, value_1 * decay_2 + value_2


@triton.jit
def _join_with_decayed(decay_1, value_1, decayed_1, decay_2, value_2, decayed_2):
    """As `_join`, and the part of the value that came through the last decay; value - drive would cancel digits."""
    passed = value_1 * decay_2
    return decay_1 * decay_2, passed + value_2, passed + decayed_2


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to full relative precision: log(w) e / (w - 1) cancels the rounding of w = 1 + e."""
    e = tl.exp2(tl.minimum(x, 20.0) * LOG2E)
    w = 1.0 + e
    small = w == 1.0
    log1p = tl.where(small, e, tl.log(w) * (e / tl.where(small, 1.0, w - 1.0)))
    return tl.where(x > 20.0, x, tl.where(x != x, x, log1p))


@triton.jit
def _steps(delta, offsets, mask, bias, SOFTPLUS: tl.constexpr):
    """Raw and final step sizes; 0 outside the mask."""
    raw = tl.load(delta + offsets, mask=mask, other=0.0).to(tl.float32) + bias[:, None]
    steps = raw
    if SOFTPLUS:
        steps = _softplus(raw)
    return raw, tl.where(mask, steps, 0.0)


@triton.jit
def _column(matrix, pick):
    """One column of a small (channels, states) register tile."""
    return tl.sum(tl.where(pick, matrix, 0.0), axis=1)


@triton.jit
def scan_forward_kernel(
    u, delta, A, B, C, D, bias, y, state, saved,
    length, width, blocks, channels,
    u_b, u_d, u_t, delta_b, delta_d, delta_t, y_b, y_d, y_t, map_b, map_g, map_n,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Outputs, last state (batch, D, N) and, if KEEP, the state before each tile (batch, tile, D, N)."""
    batch = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) // blocks
    local = (tl.program_id(1) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = local < width
    d = (group * width + local).to(tl.int64)
    states = tl.arange(0, BLOCK_N)[None, :]
    cells = d[:, None] * N + states
    kept = inside[:, None] & (states < N)
    rates = tl.load(A + cells, mask=kept, other=0.0) * LOG2E
    skips = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_D:
        skips = tl.load(D + d, mask=inside, other=0.0)
    shift = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + d, mask=inside, other=0.0)
    carry = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    last = tl.arange(0, BLOCK_T)[None, :] == BLOCK_T - 1
    tiles = tl.cdiv(length, BLOCK_T)
    tile = 0
    while tile < tiles:  # not range(): Triton 3.6 interprets it with a conversion that NumPy 2.4 refuses
        t = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = inside[:, None] & (t < length)[None, :]
        x = tl.load(u + batch * u_b + d[:, None] * u_d + t[None, :] * u_t, mask=mask, other=0.0).to(tl.float32)
        _, steps = _steps(delta, batch * delta_b + d[:, None] * delta_d + t[None, :] * delta_t, mask, shift, SOFTPLUS)
        if KEEP:
            tl.store(saved + (batch * tiles + tile) * channels * N + cells, carry, mask=kept)
        out = x * skips[:, None]
        drive = x * steps
        for n in range(N):
            pick = states == n
            rows = batch * map_b + group * map_g + n * map_n + t
            b = tl.load(B + rows, mask=t < length, other=0.0)
            c = tl.load(C + rows, mask=t < length, other=0.0)
            decay = tl.exp2(steps * _column(rates, pick)[:, None])
            product, value = tl.associative_scan((decay, drive * b[None, :]), 1, _join)
            value += product * _column(carry, pick)[:, None]
            out += value * c[None, :]
            carry = tl.where(pick, tl.sum(tl.where(last, value, 0.0), axis=1)[:, None], carry)
        tl.store(y + batch * y_b + d[:, None] * y_d + t[None, :] * y_t, out.to(y.dtype.element_ty), mask=mask)
        tile += 1
    tl.store(state + batch * channels * N + cells, carry, mask=kept)


@triton.jit
def scan_backward_kernel(
    grad_y, grad_state, u, delta, A, B, C, D, bias, saved,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias,
    length, width, blocks, channels,
    dy_b, dy_d, dy_t, u_b, u_d, u_t, delta_b, delta_d, delta_t,
    du_b, du_d, du_t, ddelta_b, ddelta_d, ddelta_t, map_b, map_g, map_n,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Gradients; those of A, D and bias per batch entry, those of B and C added up atomically over channels.

    States of a tile are computed again from the one before it. The gradient of a state is the reverse scan of
    `g[t] = C[t] dy[t] + decay[t+1] g[t+1]`, hence the second look at the steps, one later.
    """
    batch = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) // blocks
    local = (tl.program_id(1) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = local < width
    d = (group * width + local).to(tl.int64)
    states = tl.arange(0, BLOCK_N)[None, :]
    cells = d[:, None] * N + states
    kept = inside[:, None] & (states < N)
    rates = tl.load(A + cells, mask=kept, other=0.0)
    skips = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_D:
        skips = tl.load(D + d, mask=inside, other=0.0)
    shift = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + d, mask=inside, other=0.0)
    carry = tl.load(grad_state + batch * channels * N + cells, mask=kept, other=0.0)
    sum_A = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    sum_bias = tl.zeros((BLOCK_D,), tl.float32)
    first = tl.arange(0, BLOCK_T)[None, :] == 0
    tiles = tl.cdiv(length, BLOCK_T)
    tile = tiles - 1
    while tile >= 0:
        t = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = inside[:, None] & (t < length)[None, :]
        x = tl.load(u + batch * u_b + d[:, None] * u_d + t[None, :] * u_t, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(grad_y + batch * dy_b + d[:, None] * dy_d + t[None, :] * dy_t, mask=mask, other=0.0)
        dy = dy.to(tl.float32)
        places = batch * delta_b + d[:, None] * delta_d + t[None, :] * delta_t
        raw, steps = _steps(delta, places, mask, shift, SOFTPLUS)
        _, later = _steps(delta, places + delta_t, inside[:, None] & (t + 1 < length)[None, :], shift, SOFTPLUS)
        before = tl.load(saved + (batch * tiles + tile) * channels * N + cells, mask=kept, other=0.0)
        drive = x * steps
        grad_drive = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
        grad_steps = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
        for n in range(N):
            pick = states == n
            rows = batch * map_b + group * map_g + n * map_n + t
            b = tl.load(B + rows, mask=t < length, other=0.0)[None, :]
            c = tl.load(C + rows, mask=t < length, other=0.0)[None, :]
            rate = _column(rates, pick)[:, None]
            decay = tl.exp2(steps * (rate * LOG2E))
            product, value, decayed = tl.associative_scan(
                (decay, drive * b, tl.zeros_like(drive)), 1, _join_with_decayed
            )
            start = product * _column(before, pick)[:, None]
            value += start
            decayed += start
            product, grad = tl.associative_scan((tl.exp2(later * (rate * LOG2E)), dy * c), 1, _join, reverse=True)
            grad += product * _column(carry, pick)[:, None]
            carry = tl.where(pick, tl.sum(tl.where(first, grad, 0.0), axis=1)[:, None], carry)
            tl.atomic_add(grad_B + rows, tl.sum(grad * drive, axis=0), mask=t < length, sem="relaxed")
            tl.atomic_add(grad_C + rows, tl.sum(dy * value, axis=0), mask=t < length, sem="relaxed")
            exponent = grad * decayed
            grad_drive += grad * b
            grad_steps += exponent * rate
            sum_A += tl.where(pick, tl.sum(exponent * steps, axis=1)[:, None], 0.0)
        grad_steps += grad_drive * x
        if SOFTPLUS:
            grad_steps *= tl.sigmoid(raw)
        grad_steps = tl.where(mask, grad_steps, 0.0)
        sum_bias += tl.sum(grad_steps, axis=1)
        sum_D += tl.sum(dy * x, axis=1)
        places = batch * ddelta_b + d[:, None] * ddelta_d + t[None, :] * ddelta_t
        tl.store(grad_delta + places, grad_steps.to(grad_delta.dtype.element_ty), mask=mask)
        grad_x = grad_drive * steps + dy * skips[:, None]
        places = batch * du_b + d[:, None] * du_d + t[None, :] * du_t
        tl.store(grad_u + places, grad_x.to(grad_u.dtype.element_ty), mask=mask)
        tile -= 1
    tl.store(grad_A + batch * channels * N + cells, sum_A, mask=kept)
    tl.store(grad_D + batch * channels + d, sum_D, mask=inside)
    tl.store(grad_bias + batch * channels + d, sum_bias, mask=inside)
