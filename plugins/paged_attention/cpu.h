// CPU kernel of edge.PagedAttention (meaning: plugins/paged_attention/meaning.py).
//
// One task is one sequence, one KV head and a tile of its query tokens: the G query heads of up to
// kTileRows / G tokens are rows of one matrix, so each page of keys and values is converted once and used by
// all of them. Softmax runs online over pages; nothing grows with the context.
#pragma once
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "plugins/ort/multiply.h"
#include "plugins/ort/parallel.h"
#include "plugins/ort/simd.h"

namespace edge {

constexpr int kPage = 64;      // tokens a page
constexpr int kTileRows = 96;  // query rows (tokens x heads of one group) that share a page's conversion

struct AttentionStep {
  const float* qkv;  // [tokens, (heads + 2 kv_heads) * dim]
  const float* cos;  // [tokens, dim / 2]
  const float* sin;
  const int32_t* positions;    // [tokens]
  const int32_t* query_start;  // [sequences + 1]
  const int32_t* page_table;   // [sequences, table_width]
  int64_t sequences, table_width;
  int64_t heads, kv_heads, dim;
  float scale;
  float* out;  // [tokens, heads * dim]

  int64_t group() const { return heads / kv_heads; }
  int64_t row_stride() const { return (heads + 2 * kv_heads) * dim; }
  int64_t tile_tokens() const { return std::max<int64_t>(1, kTileRows / group()); }
};

// One (page, K or V, head) slice of the pool [pages, 2, kv_heads, 64, dim].
template <class T>
inline T* page_slice(T* pool, const AttentionStep& s, int64_t page, int64_t kv, int64_t head) {
  return pool + ((page * 2 + kv) * s.kv_heads + head) * kPage * s.dim;
}

// Half-rotation RoPE of one head (spec: infllmv2.md 2), times `scale`.
inline void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t dim, float scale) {
  const int64_t half_dim = dim / 2;
  for (int64_t c = 0; c < half_dim; ++c) {
    const float a = x[c], b = x[c + half_dim];
    y[c] = (a * cos[c] - b * sin[c]) * scale;
    y[c + half_dim] = (b * cos[c] + a * sin[c]) * scale;
  }
}

// Copies `count` values (a multiple of 16), converting between float32 and the pool's type.
template <class To, class From>
inline void convert(To* to, const From* from, int64_t count) {
  for (int64_t c = 0; c < count; c += kWidth) store(to + c, load(from + c));
}

// Rotates the step's keys and writes keys and values to their pages.
template <class T>
void append(const AttentionStep& s, T* pool, Parallel parallel) {
  parallel(s.sequences, [&](size_t b) {
    float rotated[1024];
    for (int64_t t = s.query_start[b]; t < s.query_start[b + 1]; ++t) {
      const int64_t position = s.positions[t];
      const int64_t page = s.page_table[b * s.table_width + position / kPage], slot = position % kPage;
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        const float* key = s.qkv + t * s.row_stride() + (s.heads + h) * s.dim;
        rotate(key, s.cos + t * s.dim / 2, s.sin + t * s.dim / 2, rotated, s.dim, 1.0f);
        convert(page_slice(pool, s, page, 0, h) + slot * s.dim, rotated, s.dim);
        convert(page_slice(pool, s, page, 1, h) + slot * s.dim, key + s.kv_heads * s.dim, s.dim);
      }
    }
  });
}

// keys [64, dim] in the pool's type -> float32 [dim, 64].
template <class T>
inline void transpose_keys(const T* keys, float* out, int64_t dim) {
  for (int64_t t = 0; t < kPage; t += kWidth) {
    for (int64_t c = 0; c < dim; c += kWidth) {
      vf rows[kWidth];
      for (int i = 0; i < kWidth; ++i) rows[i] = load(keys + (t + i) * dim + c);
      transpose(rows);
      for (int i = 0; i < kWidth; ++i) store(out + (c + i) * kPage + t, rows[i]);
    }
  }
}

// Buffers of one thread; they keep their size from call to call.
struct TileBuffers {
  std::vector<float> q, scores, out, keys, values, row_max, row_sum;

  void fit(int64_t rows, int64_t dim) {
    q.resize(rows * dim);
    out.resize(rows * dim);
    scores.resize(rows * kPage);
    keys.resize(dim * kPage);
    values.resize(dim * kPage);
    row_max.resize(rows);
    row_sum.resize(rows);
  }
};

// Online softmax of one row over one page: scores become weights, `out` and `row_sum` move to the new maximum.
inline void softmax_row(float* scores, float* out, int64_t dim, float& row_max, float& row_sum) {
  vf top = load(scores);
  for (int t = kWidth; t < kPage; t += kWidth) top = max(top, load(scores + t));
  const float new_max = std::max(row_max, max(top));
  if (new_max > row_max) {
    const float correction = exp(splat(row_max - new_max))[0];
    row_sum *= correction;
    for (int64_t c = 0; c < dim; c += kWidth) store(out + c, load(out + c) * correction);
    row_max = new_max;
  }
  vf total{};
  for (int t = 0; t < kPage; t += kWidth) {
    const vf weight = exp(load(scores + t) - row_max);
    store(scores + t, weight);
    total += weight;
  }
  row_sum += sum(total);
}

// One tile: tokens [first, last) of sequence b, KV head h.
template <class T>
void attend_tile(const AttentionStep& s, const T* pool, int64_t b, int64_t h, int64_t first, int64_t last,
                 TileBuffers& buffer) {
  const int64_t group = s.group(), dim = s.dim, rows = (last - first) * group;
  buffer.fit(rows, dim);
  int32_t highest = 0;
  for (int64_t t = first; t < last; ++t) {
    highest = std::max(highest, s.positions[t]);
    for (int64_t g = 0; g < group; ++g)
      rotate(s.qkv + t * s.row_stride() + (h * group + g) * dim, s.cos + t * dim / 2, s.sin + t * dim / 2,
             &buffer.q[((t - first) * group + g) * dim], dim, s.scale);
  }
  std::fill_n(buffer.out.begin(), rows * dim, 0.0f);
  std::fill_n(buffer.row_max.begin(), rows, std::numeric_limits<float>::lowest());
  std::fill_n(buffer.row_sum.begin(), rows, 0.0f);

  for (int64_t block = 0; block <= highest / kPage; ++block) {
    const int64_t page = s.page_table[b * s.table_width + block];
    transpose_keys(page_slice(pool, s, page, 0, h), buffer.keys.data(), dim);
    // Slots past the tile's last token may never have been written: 0 * NaN would spoil the sum.
    const int64_t written = std::min<int64_t>(kPage, highest + 1 - block * kPage);
    convert(buffer.values.data(), page_slice(pool, s, page, 1, h), written * dim);
    std::fill_n(buffer.scores.begin(), rows * kPage, 0.0f);
    multiply(buffer.q.data(), dim, buffer.keys.data(), kPage, buffer.scores.data(), kPage, rows, kPage, dim);
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = &buffer.scores[r * kPage];
      const int64_t visible = s.positions[first + r / group] - block * kPage + 1;
      if (visible < kPage)
        std::fill(scores + std::max<int64_t>(visible, 0), scores + kPage, -std::numeric_limits<float>::infinity());
      softmax_row(scores, &buffer.out[r * dim], dim, buffer.row_max[r], buffer.row_sum[r]);
    }
    multiply(buffer.scores.data(), kPage, buffer.values.data(), dim, buffer.out.data(), dim, rows, dim, written);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* out = s.out + (first + r / group) * s.heads * dim + (h * group + r % group) * dim;
    const float inverse = 1.0f / buffer.row_sum[r];
    for (int64_t c = 0; c < dim; c += kWidth) store(out + c, load(&buffer.out[r * dim + c]) * inverse);
  }
}

template <class T>
void paged_attention(const AttentionStep& s, T* pool, Parallel parallel) {
  append(s, pool, parallel);
  struct Tile {
    int64_t sequence, head, first, last;
  };
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < s.sequences; ++b)
    for (int64_t last = s.query_start[b + 1]; last > s.query_start[b]; last -= s.tile_tokens())
      for (int64_t h = 0; h < s.kv_heads; ++h)
        tiles.push_back({b, h, std::max<int64_t>(s.query_start[b], last - s.tile_tokens()), last});
  // Late tiles see the longest context: started first, they leave the short ones to even out the threads.
  parallel(tiles.size(), [&](size_t i) {
    static thread_local TileBuffers buffer;
    attend_tile(s, pool, tiles[i].sequence, tiles[i].head, tiles[i].first, tiles[i].last, buffer);
  });
}

}  // namespace edge
