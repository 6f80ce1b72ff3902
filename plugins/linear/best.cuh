// The best of some (value, row): the larger value, of equal values the lower row; NaN counts as -infinity.
#pragma once
#include "plugins/simt/device.h"

namespace linear {

struct Best {
  float value = -INFINITY;
  uint32_t row = ~0u;

  DEVICE void take(float other, uint32_t other_row) {
    if (other != other) other = -INFINITY;
    if (other > value || (other == value && other_row < row)) value = other, row = other_row;
  }
  // Over a warp's lanes.
  DEVICE void reduce() {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(~0u, value, step);
      const uint32_t other_row = __shfl_xor_sync(~0u, row, step);
      take(other, other_row);
    }
  }
};

}  // namespace linear
