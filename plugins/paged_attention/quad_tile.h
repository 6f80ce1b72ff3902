// Tiles on an int8 cache, for processors that multiply bytes four at a time and add up in int32.
//
// Queries and weights become 16-bit integers of two bytes each, which is finer than bfloat16, and each byte is a row of a
// product with the codes, of which none is converted. A vector's scale multiplies its score, or its weight.
#pragma once
#include "plugins/paged_attention/tile.h"

namespace edge {

constexpr int64_t kMaxQuadDim = 256;  // sums of this many products of 16 and 8 bits fit in 32
constexpr int64_t kQuadRows = 16;     // query rows whose sums stay in the first-level cache

template <>
struct TileState<Quad> {
  Buffer<Quad> q;            // [rows, 2, dim]: multiples of 128, and the rest
  Buffer<int32_t> q_offset;  // [rows, 2]: what 128 in every key adds to a sum, negative
  Buffer<float> out, row_max, row_sum, q_scale;
};

template <>
struct Tile<Quad> : TileState<Quad> {
  Buffer<Quad> keys, values;     // stay empty
  Buffer<UnsignedQuad> weights;  // [kQuadRows, 2, 64]: multiples of 256, and the rest
  Buffer<int32_t> sums;
  float key_scales[kPage], value_scales[kPage];

  void start(int64_t rows, int64_t dim) {
    size_to(q, rows * 2 * dim / 4);
    size_to(q_offset, rows * 2);
    size_to(q_scale, rows);
    fill(out, rows * dim, 0.0f);
    fill(row_max, rows, std::numeric_limits<float>::lowest());
    fill(row_sum, rows, 0.0f);
    make_room(rows, dim);
  }
  void make_room(int64_t, int64_t dim) {
    size_to(sums, kQuadRows * 2 * std::max<int64_t>(dim, kPage));
    size_to(weights, kQuadRows * 2 * kPage / 4);
  }
  void set_query(int64_t row, const float* query, int64_t dim) {
    constexpr float kMost = 127 * 128;
    float most = 0.0f;
    for (int64_t c = 0; c < dim; ++c) most = std::max(most, std::fabs(query[c]));
    const float steps = most > 0 ? kMost / most : 0.0f;
    int8_t *high = q[row * 2 * dim / 4].bytes, *low = high + dim;
    int32_t high_sum = 0, low_sum = 0;
    for (int64_t c = 0; c < dim; ++c) {
      const int32_t whole = static_cast<int32_t>(std::rint(query[c] * steps)), upper = (whole + 64) >> 7;
      high[c] = upper, high_sum += upper;
      low[c] = whole - upper * 128, low_sum += whole - upper * 128;
    }
    q_offset[2 * row] = -128 * high_sum, q_offset[2 * row + 1] = -128 * low_sum;
    q_scale[row] = most / kMost;
  }
};

#if defined(__AVX512VNNI__)

inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

inline void store_bytes(void* p, vi x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
}

// Weights of one row [64] from its scores, which stay within the row's maximum; -> what one step of them is worth.
inline float quantise_weights(const float* scores, const float* value_scales, float row_max, UnsignedQuad* high,
                              UnsignedQuad* low, float& row_sum) {
  constexpr float kMost = 65535;
  vf weights[kPage / kWidth], total{}, most{};
  for (int i = 0; i < kPage / kWidth; ++i) {
    weights[i] = exp(load(scores + i * kWidth) - row_max);
    total += weights[i];
    weights[i] *= load(value_scales + i * kWidth);
    most = max(most, weights[i]);
  }
  row_sum += sum(total);
  const float largest = max(most), steps = largest > 0 ? kMost / largest : 0.0f;
  for (int i = 0; i < kPage / kWidth; ++i) {
    const vi whole = __builtin_convertvector(weights[i] * steps + 0.5f, vi);
    store_bytes(high + i * kWidth / 4, whole >> 8);
    store_bytes(low + i * kWidth / 4, whole);  // the low byte of each
  }
  return largest / kMost;
}

// At most kQuadRows rows of the tile; as attend_rows.
template <class Visible>
inline void attend_few_rows(Tile<Quad>& tile, int64_t first, int64_t rows, int64_t dim, LoadedBlock<Quad>& block,
                            Visible visible) {
  int32_t* sums = tile.sums.data();
  float worth[kQuadRows];
  for (int64_t i = 0; i < 2 * rows; ++i) std::fill_n(sums + i * kPage, kPage, tile.q_offset[2 * first + i]);
  multiply(&tile.q[first * 2 * dim / 4], dim / 4, block.keys, kPage, sums, kPage, 2 * rows, kPage, dim / 4,
           block.next_keys);
  for (int64_t r = 0; r < rows; ++r) {
    float scores[kPage];
    const int32_t *high = sums + r * 2 * kPage, *low = high + kPage;
    for (int t = 0; t < kPage; t += kWidth)
      store(scores + t, to_float((load(high + t) << 7) + load(low + t)) * tile.q_scale[first + r] *
                            load(block.key_scales + t));
    float closed_up[kPage];
    const float* value_scales = hide_or_close_up(scores, block.value_scales, visible(first + r), closed_up);
    float &row_max = tile.row_max[first + r], &row_sum = tile.row_sum[first + r];
    move_to_maximum(scores, &tile.out[(first + r) * dim], dim, row_max, row_sum);
    UnsignedQuad* weights = &tile.weights[r * 2 * kPage / 4];
    worth[r] = quantise_weights(scores, value_scales, row_max, weights, weights + kPage / 4, row_sum);
  }
  std::fill_n(sums, 2 * rows * dim, 0);
  multiply_values<2>(tile.weights.data(), block, sums, rows, dim, [&](int64_t r) { return visible(first + r); });
  for (int64_t r = 0; r < rows; ++r) {
    float* out = &tile.out[(first + r) * dim];
    const int32_t *high = sums + r * 2 * dim, *low = high + dim;
    for (int64_t c = 0; c < dim; c += kWidth)
      store(out + c, load(out + c) + to_float((load(high + c) << 8) + load(low + c)) * worth[r]);
  }
}

template <class Visible>
inline void attend_rows(Tile<Quad>& tile, int64_t first, int64_t last, int64_t dim, LoadedBlock<Quad>& block,
                        Visible visible) {
  for (int64_t row = first; row < last; row += kQuadRows)
    attend_few_rows(tile, row, std::min(kQuadRows, last - row), dim, block, visible);
}

#endif

}  // namespace edge
