// The inner loop of every attention kernel: a tile of query rows against one block of 64 keys and values.
//
// A tile multiplies "elements" E: float, or, on processors that multiply them, Pair for a bfloat16 pool and Quad for an
// int8 one (quad_tile.h). Products of pairs run at twice the speed and add up in float32, as on a GPU's tensor cores.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "plugins/ort/multiply.h"
#include "plugins/ort/simd.h"
#include "plugins/paged_attention/buffer.h"

namespace edge {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kPage = 64;  // tokens a page, and a block
constexpr int64_t kMaxHeadDim = 1024;

template <class E>
constexpr int kPerElement = std::is_same_v<E, Pair> ? 2 : std::is_same_v<E, Quad> ? 4 : 1;

// What keys are multiplied as: with quads one side of a product is unsigned, so that keys are kept plus 128.
template <class E>
using KeyElement = std::conditional_t<std::is_same_v<E, Quad>, UnsignedQuad, E>;
template <class E>
constexpr int8_t kKeyFlip = std::is_same_v<E, Quad> ? int8_t{-128} : int8_t{0};

// One (page, plane, head) of a pool: 64 vectors of `dim` values and, of int8, their scales.
template <class T>
struct Slice {
  T* values;
  float* scales;
};

// Copies `count` values (a multiple of 16), converting between float32 and another type.
template <class To, class From>
inline void convert(To* to, const From* from, int64_t count) {
  for (int64_t c = 0; c < count; c += kWidth) store(to + c, load(from + c));
}

inline void to_elements(const float* from, float* to, int64_t count) { std::copy_n(from, count, to); }
inline void to_elements(const float* from, Pair* to, int64_t count) { convert(&to->first, from, count); }

// A vector as the pool stores it -> its scale, which only int8 codes have (meaning: `quantise` in meaning.py).
template <class T>
inline float to_stored(const float* x, T* stored, int64_t dim) {
  convert(stored, x, dim);
  return 1.0f;
}
inline float to_stored(const float* x, int8_t* stored, int64_t dim) {
  float most = 0.0f;
  for (int64_t c = 0; c < dim; ++c) most = std::max(most, std::fabs(x[c]));
  const float steps = most > 0 ? 127.0f / most : 0.0f;
  for (int64_t c = 0; c < dim; ++c) stored[c] = static_cast<int8_t>(std::rint(x[c] * steps));
  return most / 127.0f;
}

// What lies inside a page is the kernels' own business: keys [dim, 64] and values [64, dim], each already in the order
// in which a product reads them. With pairs, neighbours along the summed dimension share an element: keys
// [dim / 2, 64, 2], values [32, dim, 2]; with quads likewise four of them.
template <class E>
inline int64_t key_at(int64_t c, int64_t slot) {
  constexpr int64_t per = kPerElement<E>;
  return (c / per * kPage + slot) * per + c % per;
}

template <class E, class T>
inline void store_key(Slice<T> keys, int64_t slot, const float* key, int64_t dim) {
  T row[kMaxHeadDim];
  const float scale = to_stored(key, row, dim);
  if constexpr (std::is_same_v<T, int8_t>) {
    keys.scales[slot] = scale;
    for (int64_t c = 0; c < dim; ++c) row[c] ^= kKeyFlip<E>;
  }
  for (int64_t c = 0; c < dim; ++c) keys.values[key_at<E>(c, slot)] = row[c];
}

template <class E, class T>
inline void store_value(Slice<T> values, int64_t slot, const float* value, int64_t dim) {
  constexpr int64_t per = kPerElement<E>;
  T row[kMaxHeadDim];
  const float scale = to_stored(value, row, dim);
  if constexpr (std::is_same_v<T, int8_t>) values.scales[slot] = scale;
  T* to = values.values + slot / per * dim * per + slot % per;
  for (int64_t c = 0; c < dim; ++c) to[c * per] = row[c];
  // Slots are written in order: what shares an element with this one comes later and must not be NaN until then.
  if (per == 2 && slot % 2 == 0)
    for (int64_t c = 0; c < dim; ++c) to[c * per + 1] = T{};
}

// Keys as elements [dim, 64]: the page itself, or converted in `buffer`.
inline const float* load_keys(const float* keys, float*, int64_t) { return keys; }
inline const Pair* load_keys(const bfloat16* keys, Pair*, int64_t) { return reinterpret_cast<const Pair*>(keys); }
inline const UnsignedQuad* load_keys(const int8_t* keys, Quad*, int64_t) {
  return reinterpret_cast<const UnsignedQuad*>(keys);
}
template <class T>
inline const float* load_keys(const T* keys, float* buffer, int64_t dim) {
  convert(buffer, keys, kPage * dim);
  return buffer;
}

// Values as elements [64, dim]; those of slots not yet written may be NaN and are never read.
inline const float* load_values(const float* values, float*, int64_t, int64_t) { return values; }
inline const Pair* load_values(const bfloat16* values, Pair*, int64_t, int64_t) {
  return reinterpret_cast<const Pair*>(values);
}
inline const Quad* load_values(const int8_t* values, Quad*, int64_t, int64_t) {
  return reinterpret_cast<const Quad*>(values);
}
template <class T>
inline const float* load_values(const T* values, float* buffer, int64_t dim, int64_t written) {
  convert(buffer, values, written * dim);
  return buffer;
}

// Transposes 64 rows of `columns` 32-bit values, which read(row, column) loads -> [columns, 64].
template <class E, class Read>
inline void transpose_block(E* out, int64_t columns, Read read) {
  for (int64_t t = 0; t < kPage; t += kWidth) {
    for (int64_t c = 0; c < columns; c += kWidth) {
      vf rows[kWidth];
      for (int i = 0; i < kWidth; ++i) rows[i] = read(t + i, c);
      transpose(rows);
      for (int i = 0; i < kWidth; ++i) store(reinterpret_cast<float*>(out + (c + i) * kPage + t), rows[i]);
    }
  }
}

// 64 rows of `dim` values, row t at row(t) -> elements [dim, 64].
template <class Row>
inline void transpose_rows(Row row, float* out, int64_t dim) {
  transpose_block(out, dim, [&](int64_t t, int64_t c) { return load(row(t) + c); });
}
template <class Row>
inline void transpose_rows(Row row, Pair* out, int64_t dim) {
  const auto pairs = [&](int64_t t) { return reinterpret_cast<const Pair*>(row(t)); };
  transpose_block(out, dim / 2, [&](int64_t t, int64_t c) { return (vf)load(pairs(t) + c); });
}

// A tile's queries and what was found for them so far.
template <class E>
struct TileState {
  Buffer<E> q;
  Buffer<float> out, row_max, row_sum;
};

// Buffers of one thread; they keep their size from call to call.
template <class E>
struct Tile : TileState<E> {
  Buffer<E> keys, values, weights;
  Buffer<float> scores;
  float key_scales[kPage], value_scales[kPage];

  void start(int64_t rows, int64_t dim) {
    size_to(this->q, rows * dim / kPerElement<E>);
    fill(this->out, rows * dim, 0.0f);
    fill(this->row_max, rows, std::numeric_limits<float>::lowest());
    fill(this->row_sum, rows, 0.0f);
    make_room(rows, dim);
  }

  void make_room(int64_t rows, int64_t dim) {
    size_to(scores, rows * kPage);
    size_to(weights, rows * kPage / kPerElement<E>);
    size_to(keys, dim * kPage / kPerElement<E>);
    size_to(values, dim * kPage / kPerElement<E>);
  }
  void set_query(int64_t row, const float* query, int64_t dim) {
    to_elements(query, &this->q[row * dim / kPerElement<E>], dim);
  }
};

// Raises the maximum that a row has seen to that of 64 further scores; -> what earlier sums are to be multiplied with.
inline float raise_maximum(const float* scores, float& row_max) {
  vf top = load(scores);
  for (int t = kWidth; t < kPage; t += kWidth) top = max(top, load(scores + t));
  if (!any_above(top, row_max)) return 1.0f;  // the usual case, once a row has seen some blocks
  const float old_max = row_max;
  row_max = max(top);
  return exp(splat(old_max - row_max))[0];
}

// The first half of online softmax: `out` and `row_sum` move to the maximum that 64 further scores raise.
inline void move_to_maximum(const float* scores, float* out, int64_t dim, float& row_max, float& row_sum) {
  if (const float correction = raise_maximum(scores, row_max); correction != 1.0f) {
    row_sum *= correction;
    for (int64_t c = 0; c < dim; c += kWidth) store(out + c, load(out + c) * correction);
  }
}

// Online softmax of one row over one block: `weights` from scores, times `value_scales` if there are any.
template <class E>
inline void softmax_row(const float* scores, const float* value_scales, E* weights, float* out, int64_t dim,
                        float& row_max, float& row_sum) {
  move_to_maximum(scores, out, dim, row_max, row_sum);
  vf total{};
  for (int t = 0; t < kPage; t += kWidth) {
    vf weight = exp(load(scores + t) - row_max);
    total += weight;
    if (value_scales != nullptr) weight *= load(value_scales + t);
    if constexpr (std::is_same_v<E, Pair>)
      store(&weights->first + t, weight);
    else
      store(weights + t, weight);
  }
  row_sum += sum(total);
}

// Brings memory into the second-level cache, a little with every call: all at once would hold up the caller's own
// loads. Pages lie anywhere, so no hardware guesses the next one.
struct Prefetch {
  const char *next = nullptr, *end = nullptr;

  template <class T>
  static Prefetch of(const T* values, int64_t count) {
    return {reinterpret_cast<const char*>(values), reinterpret_cast<const char*>(values + count)};
  }
  void operator()() {
    if (next >= end) return;
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + 64, 0, 2);
    next += 128;
  }
};

// A block as elements, how many of its slots hold tokens, and the memory of the block that comes after it. Scales are
// null, or zero where no token is.
template <class E>
struct LoadedBlock {
  const KeyElement<E>* keys;
  const E* values;
  const float *key_scales, *value_scales;
  int64_t written;
  Prefetch next_keys, next_values;
};

// The scales of a block's vectors, or null if its type has none.
template <class T>
inline const float* load_scales(Slice<T> from, Slice<T> next, float* buffer, int64_t written) {
  if constexpr (!std::is_same_v<T, int8_t>) {
    return nullptr;
  } else {
    for (int64_t t = 0; t < kPage; t += 16) __builtin_prefetch(next.scales + t, 0, 2);
    for (int64_t t = 0; t < kPage; ++t) buffer[t] = t < written ? from.scales[t] : 0.0f;
    return buffer;
  }
}

// Takes the scores of tokens away that a row does not see, which come after all that it does.
inline void hide(float* scores, uint64_t visible) {
  std::fill(scores + __builtin_popcountll(visible), scores + kPage, -std::numeric_limits<float>::infinity());
}

// Of a node of a tree the predecessors are not neighbours: other nodes lie between them. Its products are added up as
// though they were, in the elements that its path will have once it is accepted, so that its numbers are those that the
// token would have had without the tree.
inline bool is_scattered(uint64_t visible) { return (visible & (visible + 1)) != 0; }

// Those of the visible tokens side by side, and `rest` behind them.
inline void close_up(float* of_tokens, uint64_t visible, float rest) {
  int64_t count = 0;
  for (; visible != 0; visible &= visible - 1) of_tokens[count++] = of_tokens[__builtin_ctzll(visible)];
  std::fill(of_tokens + count, of_tokens + kPage, rest);
}

// One value of an element.
template <class E>
using ValueOf = std::conditional_t<std::is_same_v<E, Pair>, bfloat16,
                                   std::conditional_t<std::is_same_v<E, Quad>, int8_t, float>>;

// out [rows, dim] += weights, closed up, times the values of the visible tokens.
template <class A, class E, class C>
__attribute__((noinline)) void multiply_scattered(const A* weights, int64_t stride, const E* values,
                                                  uint64_t visible, C* out, int64_t rows, int64_t dim) {
  constexpr int64_t per = kPerElement<E>;
  const int64_t in_place = __builtin_ctzll(~visible) / per;  // elements before the first gap
  E tail[kPage / per * kMaxHeadDim];
  const auto* from = reinterpret_cast<const ValueOf<E>*>(values);
  auto* to = reinterpret_cast<ValueOf<E>*>(tail);
  int64_t count = 0;
  const auto next = [&] { return to + count / per * dim * per + count % per; };
  for (uint64_t left = visible >> in_place * per; left != 0; left &= left - 1, ++count) {
    const int64_t slot = in_place * per + __builtin_ctzll(left);
    const ValueOf<E>* value = from + slot / per * dim * per + slot % per;
    ValueOf<E>* place = next();
    for (int64_t c = 0; c < dim; ++c) place[c * per] = value[c * per];
  }
  for (; count % per != 0; ++count) {
    ValueOf<E>* place = next();
    for (int64_t c = 0; c < dim; ++c) place[c * per] = {};
  }
  multiply(weights, stride, values, dim, out, dim, rows, dim, in_place);
  multiply(weights + in_place, stride, tail, dim, out, dim, rows, dim, count / per);
}

// out [rows * kRowsEach, dim] += the rows' weights times a block's values.
template <int kRowsEach, class A, class E, class C, class Visible>
inline void multiply_values(const A* weights, LoadedBlock<E>& block, C* out, int64_t rows, int64_t dim,
                            Visible visible) {
  constexpr int64_t per = kPerElement<E>, stride = kPage / per;
  for (int64_t row = 0, end; row < rows; row = end) {
    const uint64_t sees = visible(row);
    const bool scattered = is_scattered(sees);
    for (end = row + 1; end < rows; ++end)
      if (scattered ? visible(end) != sees : is_scattered(visible(end))) break;
    const A* of_rows = weights + row * kRowsEach * stride;
    C* to = out + row * kRowsEach * dim;
    if (scattered)
      multiply_scattered(of_rows, stride, block.values, sees, to, (end - row) * kRowsEach, dim);
    else
      multiply(of_rows, stride, block.values, dim, to, dim, (end - row) * kRowsEach, dim,
               divide_up(block.written, per), block.next_values);
  }
}

// A row's scores, and the scales of its values, of the visible tokens alone -> the scales, perhaps in `buffer`.
inline const float* hide_or_close_up(float* scores, const float* value_scales, uint64_t visible, float* buffer) {
  if (!is_scattered(visible)) {
    hide(scores, visible);
    return value_scales;
  }
  close_up(scores, visible, -std::numeric_limits<float>::infinity());
  if (value_scales == nullptr) return nullptr;
  std::copy_n(value_scales, kPage, buffer);
  close_up(buffer, visible, 0.0f);
  return buffer;
}

// Rows [first, last) of the tile against a block, of which row r sees the tokens whose bits `visible(r)` has.
template <class E, class Visible>
inline void attend_rows(Tile<E>& tile, int64_t first, int64_t last, int64_t dim, LoadedBlock<E>& block,
                        Visible visible) {
  constexpr int64_t per = kPerElement<E>;
  const int64_t rows = last - first;
  float* scores = &tile.scores[first * kPage];
  E* weights = &tile.weights[first * kPage / per];
  std::fill_n(scores, rows * kPage, 0.0f);
  multiply(&tile.q[first * dim / per], dim / per, block.keys, kPage, scores, kPage, rows, kPage, dim / per,
           block.next_keys);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * kPage;
    if (block.key_scales != nullptr)
      for (int t = 0; t < kPage; t += kWidth) store(row + t, load(row + t) * load(block.key_scales + t));
    float closed_up[kPage];
    const float* value_scales = hide_or_close_up(row, block.value_scales, visible(first + r), closed_up);
    softmax_row(row, value_scales, weights + r * kPage / per, &tile.out[(first + r) * dim], dim,
                tile.row_max[first + r], tile.row_sum[first + r]);
  }
  multiply_values<1>(weights, block, &tile.out[first * dim], rows, dim, [&](int64_t r) { return visible(first + r); });
}

}  // namespace edge
