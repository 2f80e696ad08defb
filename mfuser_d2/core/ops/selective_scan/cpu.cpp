// Backend `cpu` of the selective scan: vectorised over channels, threaded over batch entries and channels.
//
// Registers mfuser_d2::scan_forward and scan_backward; cpu.py loads the library and adds autograd. No Python inside.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace {

constexpr int64_t kChunk = 64;  // steps worked on at once; the backward starts from the states saved in between

enum class ScanType { kFloat, kHalf, kBFloat16 };

// A (batch, channel, step) tensor of any strides, in elements.
struct View {
  void* data;
  int64_t batch, channel, step;
};

// What a task needs. Blocks are SCAN_LANES channels of one group; "packed" means (group * block, state, lane), float32.
struct Scan {
  int64_t batch, groups, width, blocks, length, states, chunks, parts;
  bool softplus;
  View u, delta, y;            // y is the gradient of y in the backward
  float *rates, *skip, *bias;  // packed; the latter two without states, or null
  float *in_map, *out_map;     // (batch, group, length, state)
  float* state;                // packed per batch entry: running state, or its gradient
  float* saved;                // packed per batch entry and chunk: state before each chunk, or null
  View grad_u, grad_delta;
  float *grad_rates, *grad_skip, *grad_bias;  // packed per batch entry
  float *grad_in_map, *grad_out_map;          // (task, length, state)
};

#define SCAN_SPACE baseline
#define SCAN_LANES 4
#include "cpu_kernel.h"
#undef SCAN_SPACE
#undef SCAN_LANES

// A wheel may run on another machine than it was built on, hence one copy for each instruction set instead of
// -march=native. Clang has no such pragma and gets the baseline only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SCAN_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define SCAN_SPACE avx2
#define SCAN_LANES 8
#include "cpu_kernel.h"
#undef SCAN_SPACE
#undef SCAN_LANES
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define SCAN_SPACE avx512
#define SCAN_LANES 16
#include "cpu_kernel.h"
#undef SCAN_SPACE
#undef SCAN_LANES
#pragma GCC pop_options
#endif

struct Kernel {
  void (*run)(const Scan&, ScanType, bool, int64_t, float*);
  int64_t lanes;
};

const Kernel& kernel() {
  static const Kernel chosen = [] {
#ifdef SCAN_X86
    // torch's own choice, so that its ATEN_CPU_CAPABILITY variable (default, avx2, avx512) holds here too.
    const std::string capability = at::get_cpu_capability();
    const bool wide = capability.rfind("AVX512", 0) == 0;
    if (wide && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return Kernel{avx512::run, 16};
    if ((wide || capability == "AVX2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      return Kernel{avx2::run, 8};
#endif
    return Kernel{baseline::run, 4};
  }();
  return chosen;
}

using OptionalTensor = std::optional<at::Tensor>;

ScanType type_of(const at::Tensor& u) {
  switch (u.scalar_type()) {
    case at::kFloat:
      return ScanType::kFloat;
    case at::kHalf:
      return ScanType::kHalf;
    case at::kBFloat16:
      return ScanType::kBFloat16;
    default:
      TORCH_CHECK_VALUE(false, "the cpu scan takes float32, float16 or bfloat16; u is ", u.scalar_type());
  }
}

View view(const at::Tensor& x) {
  return View{x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

float* floats(const at::Tensor& x) {
  return x.defined() ? x.data_ptr<float>() : nullptr;
}

// Packs and unpacks the per-channel tensors, and keeps the packed ones alive.
struct Packing {
  int64_t groups, width, blocks, lanes, states;

  // (..., D, N) -> (..., group * block, state, lane), zero where a block has fewer channels than lanes.
  at::Tensor pack(const at::Tensor& x) const {
    auto wide = x.to(at::kFloat).reshape({-1, groups, width, x.size(-1)});
    wide = at::constant_pad_nd(wide, {0, 0, 0, blocks * lanes - width});
    return wide.view({-1, groups * blocks, lanes, x.size(-1)}).transpose(2, 3).contiguous();
  }

  at::Tensor pack_vector(const OptionalTensor& x) const {
    return x ? pack(x->unsqueeze(1)) : at::Tensor();
  }

  // (M, group * block, state, lane) -> (M, D, N)
  at::Tensor unpack(const at::Tensor& x) const {
    auto wide = x.transpose(2, 3).reshape({x.size(0), groups, blocks * lanes, x.size(2)});
    return wide.narrow(2, 0, width).reshape({x.size(0), groups * width, x.size(2)});
  }
};

at::Tensor pack_map(const at::Tensor& map) {
  return map.to(at::kFloat).transpose(2, 3).contiguous();  // (B, G, L, N)
}

// Everything both directions share.
struct Call {
  Packing packing;
  at::Tensor rates, skip, bias, in_map, out_map;
  Scan scan;

  Call(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B, const at::Tensor& C,
       const OptionalTensor& D, const OptionalTensor& delta_bias, bool softplus) {
    int64_t lanes = kernel().lanes, groups = B.size(1), width = u.size(1) / groups;
    packing = Packing{groups, width, (width + lanes - 1) / lanes, lanes, A.size(1)};
    rates = packing.pack(A);
    skip = packing.pack_vector(D);
    bias = packing.pack_vector(delta_bias);
    in_map = pack_map(B);
    out_map = pack_map(C);
    scan = Scan{};
    scan.batch = u.size(0);
    scan.groups = groups;
    scan.width = width;
    scan.blocks = packing.blocks;
    scan.length = u.size(2);
    scan.states = A.size(1);
    scan.chunks = (scan.length + kChunk - 1) / kChunk;
    int64_t wanted = (at::get_num_threads() + scan.batch * groups - 1) / (scan.batch * groups);
    scan.parts = wanted < scan.blocks ? wanted : scan.blocks;
    scan.softplus = softplus;
    scan.u = view(u);
    scan.delta = view(delta);
    scan.rates = floats(rates);
    scan.skip = floats(skip);
    scan.bias = floats(bias);
    scan.in_map = floats(in_map);
    scan.out_map = floats(out_map);
  }

  int64_t tasks() const {
    return scan.batch * scan.groups * scan.parts;
  }

  at::Tensor zeros(int64_t copies, int64_t states) const {
    return at::zeros({copies, scan.groups * scan.blocks, states, packing.lanes}, at::kFloat);
  }

  void run(ScanType type, bool is_backward) const {
    at::parallel_for(0, tasks(), 1, [&](int64_t first, int64_t last) {
      at::Tensor scratch;
      if (is_backward) scratch = at::zeros({2 * scan.states * kChunk * packing.lanes}, at::kFloat);
      for (int64_t task = first; task < last; ++task) kernel().run(scan, type, is_backward, task, floats(scratch));
    });
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> scan_forward(
    const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B, const at::Tensor& C,
    const OptionalTensor& D, const OptionalTensor& delta_bias, bool softplus, bool keep) {
  Call call(u, delta, A, B, C, D, delta_bias, softplus);
  Scan& scan = call.scan;
  auto y = at::empty_like(u);
  auto state = call.zeros(scan.batch, scan.states);
  auto saved = at::empty({keep ? scan.batch * scan.chunks : 0, scan.groups * scan.blocks, scan.states,
                          call.packing.lanes}, at::kFloat);
  scan.y = view(y);
  scan.state = floats(state);
  scan.saved = keep ? floats(saved) : nullptr;
  call.run(type_of(u), false);
  return {y, call.packing.unpack(state), saved};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> scan_backward(
    const at::Tensor& grad_y, const at::Tensor& grad_state, const at::Tensor& u, const at::Tensor& delta,
    const at::Tensor& A, const at::Tensor& B, const at::Tensor& C, const OptionalTensor& D,
    const OptionalTensor& delta_bias, bool softplus, const at::Tensor& saved) {
  Call call(u, delta, A, B, C, D, delta_bias, softplus);
  Scan& scan = call.scan;
  auto grad_u = at::empty_like(u), grad_delta = at::empty_like(delta);
  auto carry = call.packing.pack(grad_state);
  auto grad_rates = call.zeros(scan.batch, scan.states);
  auto grad_skip = call.zeros(scan.batch, 1), grad_bias = call.zeros(scan.batch, 1);
  auto grad_in = at::empty({scan.batch, scan.groups, scan.parts, scan.length, scan.states}, at::kFloat);
  auto grad_out = at::empty_like(grad_in);
  scan.y = view(grad_y);
  scan.state = floats(carry);
  scan.saved = floats(saved);
  scan.grad_u = view(grad_u);
  scan.grad_delta = view(grad_delta);
  scan.grad_rates = floats(grad_rates);
  scan.grad_skip = floats(grad_skip);
  scan.grad_bias = floats(grad_bias);
  scan.grad_in_map = floats(grad_in);
  scan.grad_out_map = floats(grad_out);
  call.run(type_of(u), true);
  auto total = [&](const at::Tensor& x) { return call.packing.unpack(x.sum(0, true)).squeeze(0); };
  auto map = [](const at::Tensor& parts, const at::Tensor& like) {
    return parts.sum(2).transpose(2, 3).contiguous().to(like.scalar_type());
  };
  return {grad_u, grad_delta, total(grad_rates).to(A.scalar_type()), map(grad_in, B), map(grad_out, C),
          total(grad_skip).squeeze(1), total(grad_bias).squeeze(1)};
}

std::tuple<int64_t, int64_t> scan_layout() {
  return {kernel().lanes, kChunk};
}

}  // namespace

TORCH_LIBRARY(mfuser_d2, m) {
  m.def("scan_layout() -> (int, int)", scan_layout);
  m.def(
      "scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, bool softplus, "
      "bool keep) -> (Tensor, Tensor, Tensor)");
  m.def(
      "scan_backward(Tensor grad_y, Tensor grad_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? delta_bias, bool softplus, Tensor saved) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mfuser_d2, CPU, m) {
  m.impl("scan_forward", scan_forward);
  m.impl("scan_backward", scan_backward);
}
