// edge.RMSNorm and edge.AddRMSNorm (plugins/rms_norm/meaning.py): one block a row.
//
// Thread t holds the row's 16-byte vectors t, t + THREADS, ... in registers from the sum of squares to the output, so
// every value is read once. Sums are float32: lanes by shuffles, then the warps' sums in order by every thread.
#include "plugins/simt/device.h"

struct NormArguments {
  const void* x;       // [rows, 8 vectors]; of AddRMSNorm the residual stream, which `total` may be
  const void* branch;  // [rows, 8 vectors], only AddRMSNorm
  const void* weight;  // [8 vectors]
  void* total;         // [rows, 8 vectors], only AddRMSNorm
  void* y;             // [rows, 8 vectors]
  int32_t vectors;
  float scale, epsilon;
};

namespace rms {

// hidden + round(scale * branch)
template <class T>
DEVICE uint32_t add_scaled(uint32_t hidden, uint32_t branch, float scale) {
  const float2 b = unpack<T>(branch);
  return add<T>(hidden, pack<T>(scale * b.x, scale * b.y));
}
template <class T>
DEVICE uint4 add_scaled(uint4 h, uint4 b, float s) {
  return make_uint4(add_scaled<T>(h.x, b.x, s), add_scaled<T>(h.y, b.y, s), add_scaled<T>(h.z, b.z, s),
                    add_scaled<T>(h.w, b.w, s));
}

template <class T>
DEVICE float squares(uint32_t pair) {
  const float2 v = unpack<T>(pair);
  return v.x * v.x + v.y * v.y;
}

// round(round(x * factor) * weight)
template <class T>
DEVICE uint32_t scaled(uint32_t x, float factor, uint32_t weight) {
  const float2 v = unpack<T>(x);
  return multiply<T>(pack<T>(v.x * factor, v.y * factor), weight);
}

// The sum of every thread's `value`, the same bits in all of them.
template <int THREADS>
DEVICE float block_sum(float value) {
  SHARED_MEMORY(memory);
  float* sums = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) total += sums[warp];
  return total;
}

}  // namespace rms

template <class T, int THREADS, int VECTORS, bool ADD>
DEVICE void rms_norm(const NormArguments& a) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * a.vectors;
  const uint4* x = static_cast<const uint4*>(a.x) + start;
  uint4 row[VECTORS];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int v = threadIdx.x + i * THREADS;
    if (v >= a.vectors) break;
    row[i] = x[v];
    if constexpr (ADD) {
      row[i] = rms::add_scaled<T>(row[i], static_cast<const uint4*>(a.branch)[start + v], a.scale);
      static_cast<uint4*>(a.total)[start + v] = row[i];
    }
    sum += rms::squares<T>(row[i].x) + rms::squares<T>(row[i].y) + rms::squares<T>(row[i].z) +
           rms::squares<T>(row[i].w);
  }
  const float mean = rms::block_sum<THREADS>(sum) / static_cast<float>(8 * a.vectors);
  const float factor = 1.0f / sqrtf(mean + a.epsilon);
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int v = threadIdx.x + i * THREADS;
    if (v >= a.vectors) break;
    const uint4 w = __ldg(static_cast<const uint4*>(a.weight) + v);
    static_cast<uint4*>(a.y)[start + v] =
        make_uint4(rms::scaled<T>(row[i].x, factor, w.x), rms::scaled<T>(row[i].y, factor, w.y),
                   rms::scaled<T>(row[i].z, factor, w.z), rms::scaled<T>(row[i].w, factor, w.w));
  }
}
