// CPU kernel of edge.AddGroupOffsets (meaning: plugins/group_offsets/meaning.py), float32 with float16 offsets.
#pragma once
#include <algorithm>
#include <vector>

#include "plugins/ort/multiply.h"
#include "plugins/ort/parallel.h"
#include "plugins/ort/simd.h"

namespace edge {

struct GroupOffsets {
  const float* x;        // [rows, groups * group_size]
  const float* product;  // [rows, columns]
  const half* offsets;   // [groups, columns]
  float* y;              // [rows, columns]
  int64_t rows, columns, groups, group_size;
};

// sums[g] of one row of x. The group size is a multiple of 16.
inline void group_sums(const float* x, float* sums, int64_t groups, int64_t group_size) {
  for (int64_t g = 0; g < groups; ++g) {
    vf total{};
    for (int64_t i = 0; i < group_size; i += kWidth) total += load(x + g * group_size + i);
    sums[g] = sum(total);
  }
}

// One row: memory-bound, so the offsets stream through once, row by row.
inline void add_to_row(const GroupOffsets& a, Parallel parallel) {
  constexpr int64_t kColumns = 1024;
  parallel((a.columns + kColumns - 1) / kColumns, [&](size_t chunk) {
    static thread_local std::vector<float> sums;
    sums.resize(a.groups);
    group_sums(a.x, sums.data(), a.groups, a.group_size);
    const int64_t first = chunk * kColumns, last = std::min(a.columns, first + kColumns);
    std::copy(a.product + first, a.product + last, a.y + first);
    for (int64_t g = 0; g < a.groups; ++g) {
      const half* offsets = a.offsets + g * a.columns;
      int64_t n = first;
      for (; n + kWidth <= last; n += kWidth) store(a.y + n, load(a.y + n) + sums[g] * load(offsets + n));
      if (n < last) {
        const vf tail = sums[g] * load_first(offsets + n, last - n);
        for (int64_t i = 0; n + i < last; ++i) a.y[n + i] += tail[i];
      }
    }
  });
}

// Many rows: tiles of rows, each against 64 columns of offsets at a time.
inline void add_to_rows(const GroupOffsets& a, Parallel parallel) {
  constexpr int64_t kRows = 48, kColumns = 64;
  parallel((a.rows + kRows - 1) / kRows, [&](size_t tile) {
    static thread_local std::vector<float> sums, wide, result(kRows * kColumns);
    sums.resize(kRows * a.groups);
    wide.assign(a.groups * kColumns, 0.0f);
    const int64_t first = tile * kRows, rows = std::min(kRows, a.rows - first);
    for (int64_t r = 0; r < rows; ++r)
      group_sums(a.x + (first + r) * a.groups * a.group_size, &sums[r * a.groups], a.groups, a.group_size);
    for (int64_t n = 0; n < a.columns; n += kColumns) {
      const int64_t columns = std::min(kColumns, a.columns - n);
      for (int64_t g = 0; g < a.groups; ++g) {
        const half* offsets = a.offsets + g * a.columns + n;
        for (int64_t i = 0; i < columns; i += kWidth)
          store(&wide[g * kColumns + i],
                i + kWidth <= columns ? load(offsets + i) : load_first(offsets + i, columns - i));
      }
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(a.product + (first + r) * a.columns + n, columns, &result[r * kColumns]);
      multiply(sums.data(), a.groups, wide.data(), kColumns, result.data(), kColumns, rows, kColumns, a.groups);
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(&result[r * kColumns], columns, a.y + (first + r) * a.columns + n);
    }
  });
}

inline void add_group_offsets(const GroupOffsets& a, Parallel parallel) {
  a.rows == 1 ? add_to_row(a, parallel) : add_to_rows(a, parallel);
}

}  // namespace edge
