// Keeps the compressed keys of edge.InfLLMv2Attention: averages of key windows (spec: infllmv2.md 3.2, 3.3).
#pragma once
#include "plugins/paged_attention/cpu.h"

namespace edge {

constexpr int64_t kStride = 16;       // tokens between fine windows; a window spans two strides
constexpr int64_t kFineSlots = 4;     // fine windows that end in a page
constexpr int64_t kCoarseSlots = 1;   // coarse windows (128 tokens, every 64) that end in a page

// Window u of a sequence is the one that ends with token (u + 1) * stride - 1; u = 0 does not exist. It is kept on
// the page of that token, so windows u = 0 .. n / stride - 1 lie in the order of the pages.
template <class T>
inline T* window_slot(T* pool, const AttentionStep& s, int64_t sequence, int64_t head, int64_t u, int64_t slots) {
  return pool + ((s.page(sequence, u / slots) * s.kv_heads + head) * slots + u % slots) * s.dim;
}

// Adds up the keys of kStride tokens, from slot `first` of a page on.
template <class E, class T>
inline void add_keys(Slice<T> keys, int64_t first, float* total, int64_t dim) {
  constexpr int64_t per = kPerElement<E>;
  for (int64_t c = 0; c < dim; c += per) {
    float row[kStride * per];
    const T* stored = keys.values + key_at<E>(c, first);
    if constexpr (std::is_same_v<T, int8_t>)
      for (int64_t i = 0; i < kStride * per; ++i)
        row[i] = static_cast<int8_t>(stored[i] ^ kKeyFlip<E>) * keys.scales[first + i / per];
    else
      convert(row, stored, kStride * per);
    for (int64_t i = 0; i < kStride * per; ++i) total[c + i % per] += row[i];
  }
}

// Rewrites the windows that end with one of the step's tokens; none with those of a tree, which may yet be forgotten.
template <class E, class T, class W>
void update_windows(const AttentionStep& s, const Cache<T>& cache, W* windows, int64_t slots, int64_t plane,
                    int64_t sequence, int64_t head) {
  const int64_t begin = s.query_start[sequence], end = s.query_start[sequence + 1];
  if (begin == end) return;
  const int64_t stride = kPage / slots, from = s.slots[begin];
  const int64_t to = std::min<int64_t>(s.slots[end - 1] + 1, s.tree_start[sequence]);
  for (int64_t u = std::max<int64_t>(1, from / stride); u < to / stride; ++u) {
    float total[kMaxHeadDim] = {};
    for (int64_t token = (u - 1) * stride; token < (u + 1) * stride; token += kStride)
      add_keys<E>(cache.slice(s, s.page(sequence, token / kPage), plane, head), token % kPage, total, s.dim);
    W* slot = window_slot(windows, s, sequence, head, u, slots);
    for (int64_t c = 0; c < s.dim; c += kWidth) store(slot + c, load(total + c) * (0.5f / stride));
  }
}

template <class E, class T, class W>
void compress(const AttentionStep& s, const Cache<T>& cache, W* fine, W* coarse, int64_t plane, Parallel parallel) {
  const Parallel spread = s.tokens() < kPage ? Parallel::serial() : parallel;
  spread(s.sequences * s.kv_heads, [&](size_t i) {
    update_windows<E>(s, cache, fine, kFineSlots, plane, i / s.kv_heads, i % s.kv_heads);
    update_windows<E>(s, cache, coarse, kCoarseSlots, plane, i / s.kv_heads, i % s.kv_heads);
  });
}

}  // namespace edge
