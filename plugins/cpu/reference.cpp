// The operator token by token, as kernels.h writes it. Arithmetic is in float, or in double when the inputs or the SSM state are
// float64; either way the state stays in that type for the whole call and is rounded once, at its end.
#include "cpu/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "abi/backend.h"
#include "cpu/activations.h"
#include "cpu/number_formats.h"

namespace mmm {
namespace {

constexpr int64_t kMaxDim = 128;               // of head_dim and state_dim
constexpr int64_t kMaxTaps = 4;                // of conv_width
constexpr int64_t kMaxChannels = 3 * kMaxDim;  // of one head: v, k, q
constexpr int64_t kLanes = 16;                 // head_dim and state_dim are multiples of it

// Read `count` elements of type `dtype` that begin at element `offset` of `data`.
template <typename Real>
void load(const void* data, int32_t dtype, int64_t offset, int64_t count, Real* out) {
  switch (dtype) {
    case MMM_FLOAT32: {
      const float* from = static_cast<const float*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Real>(from[i]);
      return;
    }
    case MMM_FLOAT16: {
      const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Real>(float_from_float16(from[i]));
      return;
    }
    case MMM_BFLOAT16: {
      const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Real>(float_from_bfloat16(from[i]));
      return;
    }
    default: {
      const double* from = static_cast<const double*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Real>(from[i]);
    }
  }
}

// Round `count` elements to type `dtype`, to begin at element `offset` of `data`.
template <typename Real>
void store(const Real* from, int64_t count, void* data, int32_t dtype, int64_t offset) {
  switch (dtype) {
    case MMM_FLOAT32: {
      float* out = static_cast<float*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(from[i]);
      return;
    }
    case MMM_FLOAT16: {
      uint16_t* out = static_cast<uint16_t*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = float16_from_float(static_cast<float>(from[i]));
      return;
    }
    case MMM_BFLOAT16: {
      uint16_t* out = static_cast<uint16_t*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = bfloat16_from_float(static_cast<float>(from[i]));
      return;
    }
    default: {
      double* out = static_cast<double*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<double>(from[i]);
    }
  }
}

// The sum of kLanes numbers, by halves.
template <typename Real>
Real sum_of_lanes(const Real* lanes) {
  Real eight[8], four[4];
  for (int64_t i = 0; i < 8; ++i) eight[i] = lanes[i] + lanes[i + 8];
  for (int64_t i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Updates one row of the state, s = decay s + input k, and returns s q. Sixteen sums, so that the loop vectorises although no sum
// may be reordered.
template <typename Real>
Real advance_row(Real* __restrict row, const Real* __restrict k, const Real* __restrict q, Real decay, Real input,
                 int64_t count) {
  Real sums[kLanes] = {};
  for (int64_t n = 0; n < count; n += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const Real s = decay * row[n + i] + input * k[n + i];
      row[n + i] = s;
      sums[i] += s * q[n + i];
    }
  }
  return sum_of_lanes(sums);
}

// Updates `sums` by a b, element by element.
template <typename Real>
void add_products(const Real* __restrict a, const Real* __restrict b, int64_t count, Real* __restrict sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += a[i] * b[i];
}

// A run of neighbouring conv channels of the head, and where it lies among the channels of the head.
struct Run {
  int64_t channel;  // the first one, of C
  int64_t place;    // the first one, of the head's v, k, q
  int64_t count;
  bool owned;  // this head writes their conv state
};

// The short convolution over the channels of one head.
template <typename Real>
class Convolution {
 public:
  Convolution(const mmm_scan_args& args, int64_t batch, int64_t head)
      : args_(args), taps_(args.shape.conv_width), first_(batch * conv_channels(args.shape)) {
    const mmm_scan_shape& s = args.shape;
    const int64_t P = s.head_dim, N = s.state_dim, G = s.kv_heads, group = s.heads / s.kv_heads, g = head / group;
    const bool first_of_group = head % group == 0;
    runs_[0] = {g * P, 0, P, first_of_group};
    runs_[1] = {G * P + g * N, P, N, first_of_group};
    runs_[2] = {G * P + G * N + head * N, P + N, N, true};
    count_ = P + 2 * N;
    for (const Run& run : runs_) {
      for (int64_t i = 0; i < run.count; ++i) {
        const int64_t channel = run.channel + i, place = run.place + i;
        bias_[place] = static_cast<Real>(args.conv_bias[channel]);
        for (int64_t tap = 0; tap < taps_; ++tap) {
          weight_[tap][place] = static_cast<Real>(args.conv_weight[channel * taps_ + tap]);
        }
        for (int64_t age = 0; age < taps_ - 1; ++age) {
          load(args.conv_state, s.io_dtype, (first_ + channel) * (taps_ - 1) + age, 1, &raw_[age][place]);
        }
      }
    }
  }

  // Take in the row that begins at element `offset` of projected; out: v (P), k (N), q (N), one after the other.
  void advance(int64_t offset, Real* __restrict out) {
    Real* newest = raw_[(oldest_ + taps_ - 1) % taps_];
    for (const Run& run : runs_) {
      load(args_.projected, args_.shape.io_dtype, offset + run.channel, run.count, newest + run.place);
    }
    for (int64_t i = 0; i < count_; ++i) out[i] = bias_[i];
    for (int64_t tap = 0; tap < taps_; ++tap) add_products(weight_[tap], raw_[(oldest_ + tap) % taps_], count_, out);
    for (int64_t i = 0; i < count_; ++i) out[i] = silu(out[i]);
    oldest_ = (oldest_ + 1) % taps_;
  }

  // Write the last raw inputs to conv_state_out; channels that several heads share are written by the first of them.
  void write_state() const {
    for (const Run& run : runs_) {
      if (!run.owned) continue;
      for (int64_t i = 0; i < run.count; ++i) {
        for (int64_t age = 0; age < taps_ - 1; ++age) {
          store(&raw_[(oldest_ + age) % taps_][run.place + i], 1, args_.conv_state_out, args_.shape.io_dtype,
                (first_ + run.channel + i) * (taps_ - 1) + age);
        }
      }
    }
  }

 private:
  const mmm_scan_args& args_;
  int64_t taps_;
  int64_t first_;  // first channel of the row, of B*C
  int64_t count_;
  int64_t oldest_ = 0;  // place of the oldest raw input in raw_, a ring of K
  Run runs_[3];
  Real bias_[kMaxChannels];
  Real weight_[kMaxTaps][kMaxChannels];
  Real raw_[kMaxTaps][kMaxChannels];
};

// Updates y (P): RMS norm, weight, gate.
template <typename Real>
void normalise(Real* __restrict y, const Real* __restrict gate, const Real* __restrict weight, Real eps, int64_t count) {
  Real squares[kLanes] = {};
  for (int64_t p = 0; p < count; p += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) squares[i] += y[p + i] * y[p + i];
  }
  const Real scale = 1 / std::sqrt(sum_of_lanes(squares) / static_cast<Real>(count) + eps);
  for (int64_t p = 0; p < count; ++p) y[p] = y[p] * scale * weight[p] * silu(gate[p]);
}

template <typename Real>
void scan_head(const mmm_scan_args& args, int64_t batch, int64_t head) {
  const mmm_scan_shape& s = args.shape;
  const int64_t T = s.tokens, H = s.heads, P = s.head_dim, N = s.state_dim, C = conv_channels(s);
  const int64_t length = args.lengths == nullptr ? T : std::clamp<int64_t>(args.lengths[batch], 0, T);
  const int32_t own_dtype = sizeof(Real) == sizeof(double) ? MMM_FLOAT64 : MMM_FLOAT32;

  const int64_t state_offset = (batch * H + head) * P * N;
  Real rounded_later[kMaxDim * kMaxDim];  // used when ssm_state_out cannot hold Real
  const bool direct = s.state_dtype == own_dtype;
  Real* state = direct ? static_cast<Real*>(args.ssm_state_out) + state_offset : rounded_later;
  if (!direct || args.ssm_state != args.ssm_state_out) load(args.ssm_state, s.state_dtype, state_offset, P * N, state);

  const Real eps = static_cast<Real>(s.eps);
  const Real dt_bias = static_cast<Real>(args.dt_bias[head]);
  const Real a = -std::exp(static_cast<Real>(args.A_log[head]));
  Real norm_weight[kMaxDim], mixed[kMaxChannels], gate[kMaxDim], y[kMaxDim];
  load(args.norm_weight, MMM_FLOAT32, 0, P, norm_weight);
  const Real *v = mixed, *k = mixed + P, *q = k + N;
  Convolution<Real> convolution(args, batch, head);

  for (int64_t t = 0; t < length; ++t) {
    const int64_t row = batch * args.projected_batch_stride + t * args.projected_token_stride;
    convolution.advance(row, mixed);
    Real dt;
    load(args.projected, s.io_dtype, row + C + H * P + head, 1, &dt);
    load(args.projected, s.io_dtype, row + C + head * P, P, gate);
    const Real delta = softplus(dt + dt_bias);
    const Real decay = std::exp(a * delta);
    for (int64_t p = 0; p < P; ++p) y[p] = advance_row(state + p * N, k, q, decay, delta * v[p], N);
    normalise(y, gate, norm_weight, eps, P);
    store(y, P, args.y, s.io_dtype, ((batch * T + t) * H + head) * P);
  }

  std::fill(y, y + P, Real(0));
  for (int64_t t = length; t < T; ++t) store(y, P, args.y, s.io_dtype, ((batch * T + t) * H + head) * P);
  convolution.write_state();
  if (!direct) store(rounded_later, P * N, args.ssm_state_out, s.state_dtype, state_offset);
}

#if defined(__x86_64__) && defined(__GNUC__)
// The same code for processors with AVX2, three times as fast. Multiply-adds round once there, so the last bits differ.
[[gnu::target("avx2,fma"), gnu::flatten]] void scan_head_avx2(const mmm_scan_args& args, int64_t batch, int64_t head) {
  scan_head<float>(args, batch, head);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
void scan_head_avx2(const mmm_scan_args&, int64_t, int64_t) {}

bool has_avx2() { return false; }
#endif

}  // namespace

void scan_head_cpu(const mmm_scan_args& args, int64_t batch, int64_t head) {
  if (args.shape.io_dtype == MMM_FLOAT64 || args.shape.state_dtype == MMM_FLOAT64) {
    scan_head<double>(args, batch, head);
  } else if (has_avx2()) {
    scan_head_avx2(args, batch, head);
  } else {
    scan_head<float>(args, batch, head);
  }
}

int32_t scan_cpu(const mmm_scan_args& args, mmm_status&) {
  for (int64_t batch = 0; batch < args.shape.batch; ++batch) {
    for (int64_t head = 0; head < args.shape.heads; ++head) scan_head_cpu(args, batch, head);
  }
  return MMM_OK;
}

}  // namespace mmm
