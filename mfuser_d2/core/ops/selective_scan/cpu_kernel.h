// The scan's arithmetic for one instruction set. cpu.cpp includes this file once for each, with SCAN_SPACE (namespace)
// and SCAN_LANES (channels in a vector) defined and the compiler's target switched, so there is no include guard.
//
// A vector holds neighbouring channels: nothing has to be summed across lanes in time, and tokens with channels last
// are read as they lie. Tiles of kChunk steps by SCAN_LANES channels are converted to float32 in a scratch buffer, which
// is also where any other layout is transposed. Nothing of the C++ library is used here: its inline functions would be
// compiled for this instruction set and might be the copy that the linker keeps for everybody.

namespace SCAN_SPACE {

typedef float Vec __attribute__((vector_size(SCAN_LANES * 4), may_alias));
typedef int32_t Int __attribute__((vector_size(SCAN_LANES * 4)));

static inline Vec splat(float value) {
  return Vec{} + value;
}

static inline Vec abs_of(Vec x) {
  return (Vec)((Int)x & 0x7fffffff);
}

// exp to 1.5e-7 relative, exactly 1 at 0 (decays near 1 are multiplied thousands of times, a bias would grow), 0 below
// -88, infinity above 88.4; NaN stays NaN. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
static inline Vec exp_of(Vec x) {
  const float magic = 12582912.0f + 127.0f;
  x = x < splat(-88.0f) ? splat(-88.0f) : x;
  x = x > splat(89.0f) ? splat(89.0f) : x;
  Vec shifted = x * 1.44269504f + magic;
  Vec power = shifted - magic;
  Vec rest = x - power * 0.693359375f;
  rest = rest + power * 2.12194440e-4f;
  Vec poly = rest * 0.0013836835f + 0.008374824f;  // minimax over +-ln(2)/2, degree 6
  poly = poly * rest + 0.041668225f;
  poly = poly * rest + 0.1666642f;
  poly = poly * rest + 0.4999999f;
  poly = poly * rest + 1.0f;
  poly = poly * rest + 1.0f;
  return poly * (Vec)((Int)shifted << 23);
}

// log(1 + exp(x)) as max(x, 0) + 2 atanh(e / (2 + e)), e = exp(-|x|); relative error 2e-7 over the whole range.
static inline Vec softplus_of(Vec x) {
  Vec e = exp_of(-abs_of(x));
  Vec s = e / (e + 2.0f);
  Vec square = s * s;
  Vec poly = square * 0.28178334f + 0.279606f;  // minimax of 2 atanh(s) / s over s^2 in [0, 1/9]
  poly = poly * square + 0.4002491f;
  poly = poly * square + 0.66666317f;
  poly = poly * square + 2.0f;
  return (x > splat(0.0f) ? x : splat(0.0f)) + s * poly;
}

static inline Vec sigmoid_of(Vec x) {
  Vec e = exp_of(-abs_of(x));
  Vec upper = 1.0f / (e + 1.0f);
  return x < splat(0.0f) ? e * upper : upper;
}

// Tile of `steps` rows of SCAN_LANES floats from any strides; channels beyond `lanes` become 0.
template <typename T>
static inline void load_tile(const T* from, int64_t by_channel, int64_t by_step, int64_t lanes, int64_t steps, Vec* tile) {
  float* out = (float*)tile;
  if (lanes < SCAN_LANES)
    for (int64_t t = 0; t < steps; ++t) tile[t] = Vec{};
  if (by_channel == 1 && lanes == SCAN_LANES) {
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t c = 0; c < SCAN_LANES; ++c) out[t * SCAN_LANES + c] = static_cast<float>(from[t * by_step + c]);
  } else {
    for (int64_t c = 0; c < lanes; ++c)
      for (int64_t t = 0; t < steps; ++t)
        out[t * SCAN_LANES + c] = static_cast<float>(from[c * by_channel + t * by_step]);
  }
}

template <typename T>
static inline void store_tile(const Vec* tile, T* to, int64_t by_channel, int64_t by_step, int64_t lanes, int64_t steps) {
  const float* in = (const float*)tile;
  if (by_channel == 1 && lanes == SCAN_LANES) {
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t c = 0; c < SCAN_LANES; ++c) to[t * by_step + c] = static_cast<T>(in[t * SCAN_LANES + c]);
  } else {
    for (int64_t c = 0; c < lanes; ++c)
      for (int64_t t = 0; t < steps; ++t)
        to[c * by_channel + t * by_step] = static_cast<T>(in[t * SCAN_LANES + c]);
  }
}

// One block of channels over one chunk of time.
struct Tile {
  int64_t batch, block, channel, lanes, start, steps;
  template <typename T>
  void load(const View& view, Vec* tile) const {
    const T* from = (const T*)view.data + batch * view.batch + channel * view.channel + start * view.step;
    load_tile(from, view.channel, view.step, lanes, steps, tile);
  }
  template <typename T>
  void store(const Vec* tile, const View& view) const {
    T* to = (T*)view.data + batch * view.batch + channel * view.channel + start * view.step;
    store_tile(tile, to, view.channel, view.step, lanes, steps);
  }
};

// Which part of the work a task does: `part` of the blocks of one group of one batch entry.
struct Range {
  int64_t batch, group, first, last;
  Range(const Scan& s, int64_t task) {
    int64_t part = task % s.parts;
    group = task / s.parts % s.groups;
    batch = task / s.parts / s.groups;
    first = s.blocks * part / s.parts;
    last = s.blocks * (part + 1) / s.parts;
  }
  Tile tile(const Scan& s, int64_t block, int64_t start) const {
    int64_t lanes = s.width - block * SCAN_LANES;
    int64_t steps = s.length - start;
    return Tile{batch, group * s.blocks + block, group * s.width + block * SCAN_LANES,
                lanes < SCAN_LANES ? lanes : SCAN_LANES, start, steps < kChunk ? steps : kChunk};
  }
};

// Row of a packed (batch, chunk, group * block, state, lane) or (group * block, state, lane) buffer.
static inline Vec* row(float* data, int64_t index, int64_t width) {
  return (Vec*)data + index * width;
}

static inline int64_t saved_index(const Scan& s, const Tile& tile) {
  return (tile.batch * s.chunks + tile.start / kChunk) * s.groups * s.blocks + tile.block;
}

static inline const float* map_rows(const float* map, const Scan& s, const Range& range, int64_t start) {
  return map + ((range.batch * s.groups + range.group) * s.length + start) * s.states;
}

static inline void step_sizes(const Scan& s, const Tile& tile, Vec* raw, Vec* steps) {
  Vec bias = s.bias ? *row(s.bias, tile.block, 1) : Vec{};
  for (int64_t t = 0; t < tile.steps; ++t) {
    raw[t] += bias;
    steps[t] = s.softplus ? softplus_of(raw[t]) : raw[t];
  }
}

template <typename T>
static void forward_task(const Scan& s, int64_t task) {
  Range range(s, task);
  alignas(64) Vec u[kChunk], delta[kChunk], y[kChunk];
  for (int64_t start = 0; start < s.length; start += kChunk) {
    const float* in_rows = map_rows(s.in_map, s, range, start);
    const float* out_rows = map_rows(s.out_map, s, range, start);
    for (int64_t block = range.first; block < range.last; ++block) {
      Tile tile = range.tile(s, block, start);
      tile.load<T>(s.u, u);
      tile.load<T>(s.delta, delta);
      step_sizes(s, tile, delta, delta);
      Vec skip = s.skip ? *row(s.skip, tile.block, 1) : Vec{};
      for (int64_t t = 0; t < tile.steps; ++t) {
        y[t] = skip * u[t];
        u[t] *= delta[t];
      }
      const Vec* rates = row(s.rates, tile.block, s.states);
      Vec* state = row(s.state, tile.batch * s.groups * s.blocks + tile.block, s.states);
      Vec* saved = s.saved ? row(s.saved, saved_index(s, tile), s.states) : nullptr;
      for (int64_t n = 0; n < s.states; ++n) {
        Vec h = state[n], rate = rates[n];
        if (saved) saved[n] = h;
        for (int64_t t = 0; t < tile.steps; ++t) {
          h = exp_of(delta[t] * rate) * h + u[t] * in_rows[t * s.states + n];
          y[t] += h * out_rows[t * s.states + n];
        }
        state[n] = h;
      }
      tile.store<T>(y, s.y);
    }
  }
}

// Buffers of a backward task: tiles of a block, and sums over a task's blocks for every step and state of a chunk.
struct Scratch {
  alignas(64) Vec u[kChunk], raw[kChunk], delta[kChunk], drive[kChunk], grad_y[kChunk];
  alignas(64) Vec grad_drive[kChunk], grad_delta[kChunk], decay[kChunk], decayed[kChunk];
};

// One state of a block: forward through the chunk for its states, then back. Returns the gradient of its rate.
static inline Vec backward_state(
    Scratch& w, int64_t steps, int64_t stride, Vec rate, Vec h, const float* in_row, const float* out_row, Vec* carry,
    Vec* grad_in, Vec* grad_out) {
  for (int64_t t = 0; t < steps; ++t) {
    w.decay[t] = exp_of(w.delta[t] * rate);
    w.decayed[t] = w.decay[t] * h;
    h = w.decayed[t] + w.drive[t] * in_row[t * stride];
  }
  Vec grad = *carry, grad_rate = Vec{};
  for (int64_t t = steps - 1; t >= 0; --t) {
    float in = in_row[t * stride];
    grad += w.grad_y[t] * out_row[t * stride];
    grad_out[t] += w.grad_y[t] * (w.decayed[t] + w.drive[t] * in);
    grad_in[t] += w.drive[t] * grad;
    w.grad_drive[t] += grad * in;
    Vec exponent = grad * w.decayed[t];
    w.grad_delta[t] += exponent * rate;
    grad_rate += exponent * w.delta[t];
    grad *= w.decay[t];
  }
  *carry = grad;
  return grad_rate;
}

template <typename T>
static void backward_tile(const Scan& s, const Tile& tile, const float* in_rows, const float* out_rows, Scratch& w,
                          Vec* grad_in, Vec* grad_out) {
  tile.load<T>(s.u, w.u);
  tile.load<T>(s.delta, w.raw);
  tile.load<T>(s.y, w.grad_y);
  step_sizes(s, tile, w.raw, w.delta);
  for (int64_t t = 0; t < tile.steps; ++t) {
    w.drive[t] = w.u[t] * w.delta[t];
    w.grad_drive[t] = w.grad_delta[t] = Vec{};
  }
  int64_t own = tile.batch * s.groups * s.blocks + tile.block;
  const Vec* rates = row(s.rates, tile.block, s.states);
  const Vec* saved = row(s.saved, saved_index(s, tile), s.states);
  Vec* carry = row(s.state, own, s.states);
  Vec* grad_rates = row(s.grad_rates, own, s.states);
  for (int64_t n = 0; n < s.states; ++n)
    grad_rates[n] += backward_state(w, tile.steps, s.states, rates[n], saved[n], in_rows + n, out_rows + n, carry + n,
                                    grad_in + n * kChunk, grad_out + n * kChunk);
  Vec skip = s.skip ? *row(s.skip, tile.block, 1) : Vec{};
  Vec grad_skip = Vec{}, grad_bias = Vec{};
  for (int64_t t = 0; t < tile.steps; ++t) {
    Vec grad_delta = w.grad_delta[t] + w.grad_drive[t] * w.u[t];
    if (s.softplus) grad_delta *= sigmoid_of(w.raw[t]);
    grad_skip += w.grad_y[t] * w.u[t];
    grad_bias += grad_delta;
    w.grad_drive[t] = w.grad_drive[t] * w.delta[t] + skip * w.grad_y[t];
    w.grad_delta[t] = grad_delta;
  }
  *row(s.grad_skip, own, 1) += grad_skip;
  *row(s.grad_bias, own, 1) += grad_bias;
  tile.store<T>(w.grad_drive, s.grad_u);
  tile.store<T>(w.grad_delta, s.grad_delta);
}

// Sums lanes of (state, step) into rows (step, state) and clears them for the next chunk.
static void flush_map(const Scan& s, Vec* sums, int64_t steps, float* rows) {
  for (int64_t n = 0; n < s.states; ++n)
    for (int64_t t = 0; t < steps; ++t) {
      Vec lanes = sums[n * kChunk + t];
      float total = 0.0f;
      for (int64_t c = 0; c < SCAN_LANES; ++c) total += lanes[c];
      rows[t * s.states + n] = total;
      sums[n * kChunk + t] = Vec{};
    }
}

// `scratch` is 64-byte aligned room for 2 * states * kChunk vectors, all 0.
template <typename T>
static void backward_task(const Scan& s, int64_t task, float* scratch) {
  Range range(s, task);
  Scratch w;
  Vec* grad_in = (Vec*)scratch;
  Vec* grad_out = grad_in + s.states * kChunk;
  for (int64_t start = (s.chunks - 1) * kChunk; start >= 0; start -= kChunk) {
    const float* in_rows = map_rows(s.in_map, s, range, start);
    const float* out_rows = map_rows(s.out_map, s, range, start);
    int64_t steps = 0;
    for (int64_t block = range.first; block < range.last; ++block) {
      Tile tile = range.tile(s, block, start);
      steps = tile.steps;
      backward_tile<T>(s, tile, in_rows, out_rows, w, grad_in, grad_out);
    }
    flush_map(s, grad_in, steps, s.grad_in_map + (task * s.length + start) * s.states);
    flush_map(s, grad_out, steps, s.grad_out_map + (task * s.length + start) * s.states);
  }
}

static void run(const Scan& s, ScanType type, bool is_backward, int64_t task, float* scratch) {
  switch (type) {
    case ScanType::kFloat:
      return is_backward ? backward_task<float>(s, task, scratch) : forward_task<float>(s, task);
    case ScanType::kHalf:
      return is_backward ? backward_task<c10::Half>(s, task, scratch) : forward_task<c10::Half>(s, task);
    case ScanType::kBFloat16:
      return is_backward ? backward_task<c10::BFloat16>(s, task, scratch) : forward_task<c10::BFloat16>(s, task);
  }
}

}  // namespace SCAN_SPACE
