// CPU kernels of edge.RMSNorm and edge.AddRMSNorm (meaning: plugins/rms_norm/meaning.py), float32.
#pragma once
#include <cmath>

#include "plugins/ort/parallel.h"
#include "plugins/ort/simd.h"

namespace edge {

// One row: y = x / sqrt(mean(x^2) + epsilon) * weight. hidden is any positive length.
inline void rms_norm_row(const float* x, const float* weight, float* y, int64_t hidden, float epsilon) {
  const int64_t wide = hidden - hidden % kWidth;
  vf squares{};
  for (int64_t i = 0; i < wide; i += kWidth) {
    const vf v = load(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (int64_t i = wide; i < hidden; ++i) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(hidden) + epsilon);
  for (int64_t i = 0; i < wide; i += kWidth) store(y + i, load(x + i) * scale * load(weight + i));
  for (int64_t i = wide; i < hidden; ++i) y[i] = x[i] * scale * weight[i];
}

inline void rms_norm(const float* x, const float* weight, float* y, int64_t rows, int64_t hidden, float epsilon,
                     Parallel parallel) {
  parallel(rows, [=](size_t r) { rms_norm_row(x + r * hidden, weight, y + r * hidden, hidden, epsilon); });
}

inline void add_rms_norm(const float* x, const float* branch, const float* weight, float* total, float* y,
                         int64_t rows, int64_t hidden, float scale, float epsilon, Parallel parallel) {
  parallel(rows, [=](size_t r) {
    const float* xr = x + r * hidden;
    const float* br = branch + r * hidden;
    float* tr = total + r * hidden;
    for (int64_t i = 0; i < hidden; ++i) tr[i] = xr[i] + scale * br[i];
    rms_norm_row(tr, weight, y + r * hidden, hidden, epsilon);
  });
}

}  // namespace edge
