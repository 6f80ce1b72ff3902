// CPU kernel of edge.TileLinear (meaning: plugins/tile_linear/meaning.py): float32 sums, whatever the weights' type.
// A step of few tokens is bound by reading the weights. They are read from memory once, in order, and asked for early
// enough that the products of up to eight tokens hide behind that: such a step takes hardly longer than one of one.
// A row's result does not depend on how many rows are computed with it: its products are added input by input.
#pragma once
#include <algorithm>

#include "plugins/ort/parallel.h"
#include "plugins/ort/simd.h"

namespace edge {

template <class W>
struct TileLinear {
  static constexpr int64_t kTile = 16;  // outputs whose weights are stored together

  const float* x;    // [rows, inputs]
  const W* weights;  // [tiles, inputs, kTile]
  float* y;          // [rows, outputs]
  int64_t rows, inputs, outputs;

  int64_t tiles() const { return (outputs + kTile - 1) / kTile; }
};

// Where a group of tiles meets some rows: y[r, 0 .. columns) (+)= x[r, 0 .. inputs) times the tiles' weights.
template <class T>
struct TileProduct {
  const T* weights;  // those of the next tile are `stride` further on
  int64_t stride, inputs;
  const float* x;
  float* y;
  int64_t x_stride, y_stride, columns;
  bool adds;  // to what y has already
};

// Of R rows. kAhead: inputs whose weights are fetched before they are needed, into the next tiles where these end; 0 if
// the weights were read not long ago.
template <int R, int kTiles, int kAhead, class T>
inline void multiply_tiles(const TileProduct<T>& p) {
  constexpr int64_t kTile = TileLinear<T>::kTile;
  constexpr int kParts = kTile / kWidth, V = kTiles * kParts;
  const int64_t whole = std::min<int64_t>(V, p.columns / kWidth), rest = p.columns - whole * kWidth;
  vf sums[R][V] = {};
  for (int r = 0; p.adds && r < R; ++r) {
    const float* y = p.y + r * p.y_stride;
    for (int v = 0; v < whole; ++v) sums[r][v] = load(y + v * kWidth);
    for (int64_t i = 0; whole < V && i < rest; ++i) sums[r][whole][i] = y[whole * kWidth + i];
  }
  const auto accumulate = [&](int64_t first, int64_t last, const T* ahead) {
    for (int64_t k = first; k < last; ++k) {
      vf w[V];
      for (int t = 0; t < kTiles; ++t) {
        const int64_t place = t * p.stride + k * kTile;
        if constexpr (kAhead > 0) __builtin_prefetch(ahead + place);
        for (int i = 0; i < kParts; ++i) w[t * kParts + i] = load(p.weights + place + i * kWidth);
      }
      for (int r = 0; r < R; ++r) {
        const vf value = splat(p.x[r * p.x_stride + k]);
        for (int v = 0; v < V; ++v) sums[r][v] += value * w[v];
      }
    }
  };
  const int64_t near = std::max<int64_t>(0, p.inputs - kAhead);
  accumulate(0, near, p.weights + kAhead * kTile);
  accumulate(near, p.inputs, p.weights + (kTiles - 1) * p.stride + kAhead * kTile);
  for (int r = 0; r < R; ++r) {
    float* y = p.y + r * p.y_stride;
    for (int v = 0; v < whole; ++v) store(y + v * kWidth, sums[r][v]);
    for (int64_t i = 0; whole < V && i < rest; ++i) y[whole * kWidth + i] = sums[r][whole][i];
  }
}

// Of `rows` rows, at most R.
template <int R, int kTiles, int kAhead, class T>
inline void multiply_strip(const TileProduct<T>& p, int64_t rows) {
  if (rows == R) return multiply_tiles<R, kTiles, kAhead>(p);
  if constexpr (R > 1) multiply_strip<R - 1, kTiles, kAhead>(p, rows);
}

// Of any number of rows, in strips of at most R and of like size: 5 and 4 rows are faster than 8 and 1.
template <int R, int kTiles, class T>
inline void multiply_rows(TileProduct<T> p, int64_t rows) {
  constexpr int kAhead = 32;
  const int64_t strips = (rows + R - 1) / R;
  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t count = (rows * (strip + 1)) / strips - rows * strip / strips;
    if (strip == 0)
      multiply_strip<R, kTiles, kAhead>(p, count);
    else
      multiply_strip<R, kTiles, 0>(p, count);
    p.x += count * p.x_stride, p.y += count * p.y_stride;
  }
}

// The rows from `row` to `last` of kTiles tiles from `tile` on.
template <int R, int kTiles, class W>
inline void multiply_part(const TileLinear<W>& a, int64_t tile, int64_t row, int64_t last) {
  constexpr int64_t kTile = TileLinear<W>::kTile, kInputs = 256;
  const int64_t stride = a.inputs * kTile, first = tile * kTile;
  const W* weights = a.weights + tile * stride;
  const float* x = a.x + row * a.inputs;
  float* y = a.y + row * a.outputs + first;
  if constexpr (sizeof(W) < sizeof(float)) {
    if (last - row > 3 * R) {  // widened once for all strips, some inputs at a time
      alignas(64) float wide[kTiles * kInputs * kTile];
      for (int64_t k = 0; k < a.inputs; k += kInputs) {
        const int64_t count = std::min(kInputs, a.inputs - k);
        for (int t = 0; t < kTiles; ++t)
          for (int64_t i = 0; i < count * kTile; i += kWidth)
            store(wide + t * kInputs * kTile + i, load(weights + t * stride + k * kTile + i));
        multiply_rows<R, kTiles>(TileProduct<float>{wide, kInputs * kTile, count, x + k, y, a.inputs, a.outputs,
                                                    a.outputs - first, k > 0},
                                 last - row);
      }
      return;
    }
  }
  multiply_rows<R, kTiles>(
      TileProduct<W>{weights, stride, a.inputs, x, y, a.inputs, a.outputs, a.outputs - first, false}, last - row);
}

template <class W>
inline void tile_linear(const TileLinear<W>& a, Parallel parallel) {
  constexpr bool kIsWide = kWidth == 16;
  constexpr int kStrip = kIsWide ? 8 : 6, kAtOnce = kIsWide ? 3 : 1;  // rows and tiles whose sums fit the registers
  constexpr int64_t kRows = 64, kTiles = 6;                           // of a thread's part
  const int64_t row_parts = (a.rows + kRows - 1) / kRows, tile_parts = (a.tiles() + kTiles - 1) / kTiles;
  parallel(row_parts * tile_parts, [&](size_t i) {
    const int64_t row = i % row_parts * kRows, last = std::min(a.rows, row + kRows);
    int64_t tile = i / row_parts * kTiles;
    const int64_t end = std::min(a.tiles(), tile + kTiles);
    for (; end - tile >= kAtOnce; tile += kAtOnce) multiply_part<kStrip, kAtOnce>(a, tile, row, last);
    for (; tile < end; ++tile) multiply_part<kStrip, 1>(a, tile, row, last);
  });
}

}  // namespace edge
