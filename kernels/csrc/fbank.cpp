// fbank: (B, S) -> (B, T, F). Kaldi's log-mel filter banks, a frame in each lane.
//
// Sixteen frames at a time are transposed, so that no step has to do with the order of the values within a vector:
// mean, pre-emphasis and window; the FFT of n real values as one of n/2 complex ones, radix 4, decimation in
// frequency, whose bins come out in another order and are found by a table; |X|^2; each filter over the bins that it
// sees; the logarithm.
//
// B clips, S samples, T frames of N samples each, n the power of two that a frame is filled up to, F mel filters.
#include "tier.h"

#include <cstdint>

#include "tile.h"

namespace audiomae {

struct Fbank {
  const char* waveform;         // (B, S) float32
  int64_t clip_step;            // bytes
  int64_t frames, size, shift;  // T, N, samples from frame to frame
  int64_t fft_size;             // n
  bool remove_dc_offset;
  float preemphasis;
  const float* window;    // (N)
  bool odd;               // n/2 is no power of four: the first stage is of radix 2
  const float* twiddles;  // of the stages, one after another, as they are read
  const float* unpack;    // (n/4 + 1, 2): cos and sin of 2 pi k / n
  const int32_t* place;   // (n/2): where the complex FFT leaves frequency k
  int64_t filters;        // F
  const int64_t* first;   // (F + 1): where a filter's weights begin, and the last one's end
  const int64_t* bins;    // (F): the first bin that it sees
  const float* weights;
  float* out;                // (B, T, F)
  int64_t pitch, values;     // N in whole tiles; rows of a group's values: n, or F or N in whole tiles
};

namespace AUDIOMAE_TIER {
namespace {

constexpr int kGroup = kTile;  // frames

// ln x to 1.2 ulp, of positive normal numbers; infinity and NaN stay what they are.
inline Floats log(Floats x) {
  const Ints bits = (Ints)x, half = (Ints)broadcast(0.70710678f);
  const Ints exponent = (bits - half) >> 23;
  const Floats r = (Floats)(bits - (exponent << 23)) - 1.0f;  // in [sqrt(1/2) - 1, sqrt(2) - 1]
  const Floats e = __builtin_convertvector(exponent, Floats);
  Floats p = broadcast(0.087348364f);
  p = fma(p, r, broadcast(-0.143075183f));
  p = fma(p, r, broadcast(0.149179742f));
  p = fma(p, r, broadcast(-0.165705085f));
  p = fma(p, r, broadcast(0.199620724f));
  p = fma(p, r, broadcast(-0.250017554f));
  p = fma(p, r, broadcast(0.333339512f));
  p = fma(p, r, broadcast(-0.499999911f));
  const Floats low = fma(r * r, p, e * -2.12194440e-4f);  // ln 2 in two parts, the first exact in e
  return select(x < broadcast(__builtin_inff()), fma(e, broadcast(0.693359375f), r + low), x);
}

// A complex value of each frame: two vectors, kTile floats apart, so that the sixteen frames of an AVX2 or SSE tier
// lie as those of AVX-512.
struct Complex {
  Floats re, im;
};

inline Complex get(const float* p) { return {load(p), load(p + kTile)}; }
inline void put(float* p, Complex x) {
  store(p, x.re);
  store(p + kTile, x.im);
}
inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex operator*(Complex a, Complex w) {
  return {fma(a.re, w.re, -(a.im * w.im)), fma(a.re, w.im, a.im * w.re)};
}

constexpr int64_t kComplex = 2 * kTile;  // floats

// Two or four transforms of length / 2 or / 4 out of one. kTurned: the results are multiplied by w = {w^j, w^2j, w^3j},
// w = exp(-2 pi i / length).
template <bool kTurned>
inline void butterfly2(float* z, int64_t step, const Complex* w) {
  const Complex a = get(z), b = get(z + step), d = a - b;
  put(z, a + b);
  put(z + step, kTurned ? d * w[0] : d);
}

template <bool kTurned>
inline void butterfly4(float* z, int64_t step, const Complex* w) {
  const Complex a = get(z), b = get(z + step), c = get(z + 2 * step), d = get(z + 3 * step);
  const Complex even = a + c, odd = b + d, s = a - c, t = b - d, turned{t.im, -t.re};  // -i t
  const Complex y1 = s + turned, y2 = even - odd, y3 = s - turned;
  put(z, even + odd);
  put(z + step, kTurned ? y1 * w[0] : y1);
  put(z + 2 * step, kTurned ? y2 * w[1] : y2);
  put(z + 3 * step, kTurned ? y3 * w[2] : y3);
}

// One stage over all parts of `length` values out of `count`; returns the twiddles of the next.
template <int kRadix>
inline const float* stage(float* z, int64_t count, int64_t length, const float* twiddles) {
  const int64_t parts = length / kRadix, step = parts * kComplex;
  for (int64_t j = 0; j < parts; ++j) {
    Complex w[kRadix - 1];
    for (int r = 0; j > 0 && r < kRadix - 1; ++r, twiddles += 2) {
      w[r] = {broadcast(twiddles[0]), broadcast(twiddles[1])};
    }
    for (int64_t at = j; at < count; at += length) {
      float* p = z + at * kComplex;
      if constexpr (kRadix == 4) {
        j > 0 ? butterfly4<true>(p, step, w) : butterfly4<false>(p, step, w);
      } else {
        j > 0 ? butterfly2<true>(p, step, w) : butterfly2<false>(p, step, w);
      }
    }
  }
  return twiddles;
}

// x: (N, kTile) samples -> (n, kTile) values that the FFT sees, in place.
inline void prepare(const Fbank& f, float* x) {
  Floats mean{};
  if (f.remove_dc_offset) {
    // Sums of sixteen, then their sum: in one piece the first samples would lose their digits.
    const auto sum_of = [&](int64_t begin, int64_t end) {
      Floats a{}, b{};
      for (; begin + 2 <= end; begin += 2) {
        a += load(x + begin * kTile);
        b += load(x + (begin + 1) * kTile);
      }
      return begin < end ? a + b + load(x + begin * kTile) : a + b;
    };
    int64_t i = 0;
    for (; i + 16 <= f.size; i += 16) mean += sum_of(i, i + 16);
    mean += sum_of(i, f.size);
    mean /= broadcast(float(f.size));
  }
  const Floats a = broadcast(f.preemphasis);
  Floats last = load(x) - mean;
  store(x, Floats{});  // every window begins with 0: no frame needs a sample before its first
  for (int64_t i = 1; i < f.size; ++i) {
    const Floats now = load(x + i * kTile) - mean;
    store(x + i * kTile, fma(-a, last, now) * f.window[i]);
    last = now;
  }
  for (int64_t i = f.size; i < f.fft_size; ++i) store(x + i * kTile, Floats{});
}

inline void transform(const Fbank& f, float* z) {
  const int64_t count = f.fft_size / 2;
  const float* twiddles = f.twiddles;
  int64_t length = count;
  if (f.odd) {
    twiddles = stage<2>(z, count, length, twiddles);
    length /= 2;
  }
  for (; length > 1; length /= 4) twiddles = stage<4>(z, count, length, twiddles);
}

// The real transform's 4 |X_k|^2 for k < n/2, out of the complex one's values at k and n/2 - k.
inline void squares(const Fbank& f, const float* z, float* power) {
  const int64_t count = f.fft_size / 2;
  const Complex constant = get(z);
  const Floats x0 = constant.re + constant.im;
  store(power, 4.0f * x0 * x0);
  for (int64_t k = 1; 2 * k <= count; ++k) {
    const Complex a = get(z + f.place[k] * kComplex), b = get(z + f.place[count - k] * kComplex);
    const Complex even{a.re + b.re, a.im - b.im}, odd{a.im + b.im, b.re - a.re};
    const Complex t = odd * Complex{broadcast(f.unpack[2 * k]), broadcast(-f.unpack[2 * k + 1])};
    const Complex low = even + t, high = even - t;
    store(power + k * kTile, fma(low.re, low.re, low.im * low.im));
    store(power + (count - k) * kTile, fma(high.re, high.re, high.im * high.im));
  }
}

// (n/2, kTile) -> (F, kTile)
inline void filter(const Fbank& f, const float* power, float* mel) {
  for (int64_t m = 0; m < f.filters; ++m) {
    const float* p = power + f.bins[m] * kTile;
    Floats sum{};
    for (int64_t i = f.first[m]; i < f.first[m + 1]; ++i, p += kTile) {
      sum = fma(broadcast(f.weights[i]), load(p), sum);
    }
    sum *= 0.25f;
    const Floats floor = broadcast(1.1920929e-7f);
    store(mel + m * kTile, log(select(sum < floor, floor, sum)));
  }
}

}  // namespace

// Groups [begin, end) of frames; each clip's last one may have fewer than kGroup.
AUDIOMAE_FLATTEN void fbank(const Fbank& f, int64_t begin, int64_t end, float* scratch) {
  const int64_t groups = (f.frames + kGroup - 1) / kGroup, whole = f.size / kTile * kTile;
  float* rows = scratch;
  float* x = rows + kGroup * f.pitch;
  float* power = x + f.values * kTile;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t clip = group / groups, frame = group % groups * kGroup;
    const int64_t valid = f.frames - frame < kGroup ? f.frames - frame : kGroup;
    const char* samples = f.waveform + clip * f.clip_step + frame * f.shift * int64_t(sizeof(float));

    // (kGroup, N) -> (N, kTile). What is missing of whole tiles is filled up in memory of our own.
    const bool in_place = valid == kGroup && (uintptr_t)samples % sizeof(float) == 0;
    const int64_t pitch = f.pitch, from = in_place ? whole : 0;
    if (from < f.size) {
      for (int64_t r = 0; r < kGroup; ++r) {
        const int64_t bytes = r < valid ? (f.size - from) * int64_t(sizeof(float)) : 0;
        float* row = rows + r * pitch;
        __builtin_memcpy(row + from, samples + (r * f.shift + from) * int64_t(sizeof(float)), bytes);
        for (int64_t i = r < valid ? f.size : from; i < pitch; ++i) row[i] = 0.0f;
      }
    }
    for (int64_t i = 0; i < f.size; i += kTile) {
      const bool direct = in_place && i < whole;
      const float* in = direct ? (const float*)samples + i : rows + i;
      transpose(in, direct ? f.shift : pitch, x + i * kTile);
    }

    for (int64_t v = 0; v < kTile; v += kLanes) {
      prepare(f, x + v);
      transform(f, x + v);
      squares(f, x + v, power + v);
      filter(f, power + v, x + v);
    }

    // (F, kTile) -> (kGroup, F)
    float* out = f.out + (clip * f.frames + frame) * f.filters;
    for (int64_t m = 0; m < f.filters; m += kTile) {
      const int64_t columns = f.filters - m < kTile ? f.filters - m : kTile;
      if (valid == kGroup && columns == kTile) {
        transpose(x + m * kTile, kTile, out + m, f.filters);
        continue;
      }
      transpose(x + m * kTile, kTile, rows);
      for (int64_t r = 0; r < valid; ++r) {
        __builtin_memcpy(out + r * f.filters + m, rows + r * kTile, columns * sizeof(float));
      }
    }
  }
}

}  // namespace AUDIOMAE_TIER
}  // namespace audiomae

#ifdef AUDIOMAE_ENTRY

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "scratch.h"

namespace audiomae {

AUDIOMAE_DECLARE(void fbank(const Fbank& f, int64_t begin, int64_t end, float* scratch))

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLargestFft = 8192;

struct Plan {
  bool odd = false;
  std::vector<float> twiddles, unpack;
  std::vector<int32_t> place;
};

// What a transform of n real values needs, in float64 and then rounded.
Plan make_plan(int64_t n) {
  const int64_t count = n / 2;
  Plan plan;
  for (int64_t length = count; length > 1; length /= 2) plan.odd = !plan.odd;
  const auto add = [](std::vector<float>& table, int64_t numerator, int64_t denominator, double sign) {
    const double angle = 2 * 3.14159265358979323846 * double(numerator) / double(denominator);
    table.push_back(float(std::cos(angle)));
    table.push_back(float(sign * std::sin(angle)));
  };
  std::vector<int64_t> radices;
  for (int64_t length = count; length > 1; length /= radices.back()) {
    radices.push_back(radices.empty() && plan.odd ? 2 : 4);
    for (int64_t j = 1; j < length / radices.back(); ++j) {
      for (int64_t r = 1; r < radices.back(); ++r) add(plan.twiddles, r * j, length, -1);
    }
  }
  for (int64_t k = 0; 2 * k <= count; ++k) add(plan.unpack, k, n, 1);
  plan.place.resize(count);
  for (int64_t at = 0; at < count; ++at) {
    int64_t frequency = 0, weight = 1, length = count, rest = at;
    for (const int64_t radix : radices) {
      length /= radix;
      frequency += rest / length * weight;
      rest %= length;
      weight *= radix;
    }
    plan.place[frequency] = int32_t(at);
  }
  return plan;
}

const Plan& plan_for(int64_t n) {
  static std::mutex mutex;
  static std::map<int64_t, Plan> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(n);
  return found != plans.end() ? found->second : plans.emplace(n, make_plan(n)).first->second;
}

Tensor fbank(const Tensor& waveform, const Tensor& window, const Tensor& first, const Tensor& bins,
             const Tensor& weights, int64_t fft_size, int64_t shift, double preemphasis, bool remove_dc_offset) {
  check(waveform.dim() == 2, "fbank expects a waveform of shape (batch, samples), got ", shape(waveform), ".");
  for (const Tensor* tensor : {&waveform, &window, &weights}) {
    check(tensor->is_cpu() && tensor->scalar_type() == ScalarType::Float,
          "fbank of the native library expects float32 CPU tensors, got ", dtype_name(*tensor), ".");
  }
  check(first.is_cpu() && bins.is_cpu() && first.scalar_type() == ScalarType::Long &&
            bins.scalar_type() == ScalarType::Long,
        "fbank expects int64 places of the filters' weights and bins.");
  check(window.dim() == 1 && weights.dim() == 1 && bins.dim() == 1 && first.dim() == 1 &&
            first.size(0) == bins.size(0) + 1,
        "fbank expects a window (samples,), weights (total,), bins (filters,) and first (filters + 1,), got ",
        shape(window), ", ", shape(weights), ", ", shape(bins), " and ", shape(first), ".");
  const int64_t size = window.size(0), samples = waveform.size(1), filters = bins.size(0);
  check(fft_size >= 2 && fft_size <= kLargestFft && (fft_size & (fft_size - 1)) == 0 && fft_size >= size,
        "fbank expects an FFT of a power of two, from the frame's ", size, " to ", kLargestFft, ", got ", fft_size,
        ".");
  check(size >= 1 && shift >= 1 && size <= samples, "fbank expects frames of 1 to ", samples,
        " samples, the waveform's, every 1 or more, got ", size, " every ", shift, ".");

  const Tensor rows = rows_in_one_piece(waveform), taper = torch::stable::contiguous(window);
  const Tensor starts = torch::stable::contiguous(first), seen = torch::stable::contiguous(bins);
  const Tensor values = torch::stable::contiguous(weights);
  const Plan& plan = plan_for(fft_size);
  const auto in_tiles = [](int64_t count) { return (count + 15) / 16 * 16; };
  Fbank f{};
  f.waveform = static_cast<const char*>(rows.const_data_ptr());
  f.clip_step = byte_step(rows, 0);
  f.frames = (samples - size) / shift + 1;
  f.size = size;
  f.shift = shift;
  f.fft_size = fft_size;
  f.remove_dc_offset = remove_dc_offset;
  f.preemphasis = float(preemphasis);
  f.window = static_cast<const float*>(taper.const_data_ptr());
  f.odd = plan.odd;
  f.twiddles = plan.twiddles.data();
  f.unpack = plan.unpack.data();
  f.place = plan.place.data();
  f.filters = filters;
  f.first = static_cast<const int64_t*>(starts.const_data_ptr());
  f.bins = static_cast<const int64_t*>(seen.const_data_ptr());
  f.weights = static_cast<const float*>(values.const_data_ptr());
  f.pitch = in_tiles(size);
  f.values = std::max({fft_size, in_tiles(size), in_tiles(filters)});
  for (int64_t m = 0; m < filters; ++m) {
    const int64_t count = f.first[m + 1] - f.first[m];
    check(f.first[m] >= 0 && count >= 0 && f.first[m + 1] <= values.size(0) && f.bins[m] >= 0 &&
              f.bins[m] <= fft_size / 2 - count,
          "fbank expects filters within the ", fft_size / 2, " bins and the ", values.size(0),
          " weights, but filter ", m, " is not.");
  }

  Tensor out = torch::stable::new_empty(waveform, {waveform.size(0), f.frames, filters});
  const int64_t groups = waveform.size(0) * ((f.frames + 15) / 16);
  if (groups == 0 || filters == 0) return out;
  f.out = static_cast<float*>(out.mutable_data_ptr());
  static const auto forward = AUDIOMAE_SELECT(fbank);
  constexpr int64_t kValuesPerTask = 65536;
  const int64_t grain = std::max<int64_t>(1, kValuesPerTask / (16 * fft_size));
  torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    Scratch<float> scratch(16 * (f.pitch + f.values + fft_size / 2));
    forward(f, begin, end, scratch.data());
  });
  return out;
}

}  // namespace
}  // namespace audiomae

STABLE_TORCH_LIBRARY_IMPL(audiomae_native, CPU, m) {
  m.impl("fbank", TORCH_BOX(&audiomae::fbank));
}

#endif  // AUDIOMAE_ENTRY
