// CPU kernel of edge.SwiGLU (meaning: plugins/swiglu/meaning.py), float32.
#pragma once
#include <cmath>

#include "plugins/ort/parallel.h"
#include "plugins/ort/simd.h"

namespace edge {

inline void swiglu(const float* gate_up, float* y, int64_t rows, int64_t width, Parallel parallel) {
  parallel(rows, [=](size_t r) {
    const float* gate = gate_up + r * 2 * width;
    const float* up = gate + width;
    float* out = y + r * width;
    const int64_t wide = width - width % kWidth;
    for (int64_t i = 0; i < wide; i += kWidth) {
      const vf g = load(gate + i);
      store(out + i, g / (1.0f + exp(min(-g, splat(88.0f)))) * load(up + i));
    }
    for (int64_t i = wide; i < width; ++i) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
  });
}

}  // namespace edge
