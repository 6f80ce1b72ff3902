// Chooses the blocks that each token attends to (spec: infllmv2.md 3.4 - 3.7, 8).
//
// The coarse windows give every query head its softmax maximum and sum, the fine ones its probabilities; they are
// added up over the group, pooled to blocks, and the best blocks win. Windows are read 64 at a time and only the
// blocks' scores are kept: 4 bytes a block and token of one tile.
#pragma once
#include <algorithm>

#include "plugins/infllmv2/compress.h"

namespace edge {

constexpr float kMaxExponent = 80.0f;  // keeps the scores finite however far a fine window exceeds the coarse ones

struct SparseSettings {
  int64_t dense_len, init_blocks, local_blocks, selected_blocks;
  bool use_nope;
};

// One bit a block, a row of words for every token and KV head.
struct BlockMask {
  int64_t words, kv_heads;
  Buffer<uint64_t> bits;

  BlockMask(int64_t tokens, int64_t heads, int64_t blocks)
      : words((blocks + 63) / 64), kv_heads(heads), bits(tokens * heads * words) {}
  uint64_t* row(int64_t token, int64_t head) { return &bits[(token * kv_heads + head) * words]; }
  const uint64_t* row(int64_t token, int64_t head) const { return &bits[(token * kv_heads + head) * words]; }
};

inline void set_range(uint64_t* row, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) row[b / 64] |= uint64_t{1} << (b % 64);
}

template <class T, class E>
struct SelectionBuffers {
  Tile<E> tile;                // q, keys, scores and softmax state
  Buffer<T> no_window;         // [dim], zero
  Buffer<float> block_scores;  // [tokens, score_stride(blocks)]
  Buffer<float> before;        // [tokens]: for the block in front of the first, which is none
};

constexpr int64_t kChunkBlocks = kPage / kFineSlots;  // blocks in which 64 fine windows end

// Between the scores of two tokens: as many blocks as whole chunks of windows have.
inline int64_t score_stride(int64_t blocks) { return divide_up(blocks, kChunkBlocks) * kChunkBlocks; }

// Windows [u, u + 64) of one sequence and head, u a multiple of 64; those past the end are zero.
template <class T>
struct WindowRows {
  const T* rows[kPage];

  template <class E>
  WindowRows(const AttentionStep& s, const T* pool, int64_t slots, const TokenTile& tile, int64_t u, int64_t end,
             const SelectionBuffers<T, E>& buffer) {
    for (int64_t first = u; first < u + kPage; first += slots) {
      const T* page = first < end ? window_slot(pool, s, tile.sequence, tile.head, first, slots) : nullptr;
      for (int64_t w = first; w < first + slots; ++w)
        rows[w - u] = w < end ? page + (w - first) * s.dim : buffer.no_window.data();
    }
  }
};

// Prefetches 64 rows, one with every call.
template <class T>
struct PrefetchRows {
  const WindowRows<T>& windows;
  int64_t dim, next = 0;

  void operator()() {
    if (next == kPage) return;
    const char* row = reinterpret_cast<const char*>(windows.rows[next++]);
    for (int64_t i = 0; i < dim * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(row + i, 0, 2);
  }
};

// Scores windows [begin, end) of one sequence and head against the tile's queries, 64 at a time: calls
// use(u) when buffer.tile.scores [rows, 64] holds those of windows [u, u + 64).
template <class T, class E, class Use>
void score_windows(const AttentionStep& s, const T* pool, int64_t slots, const TokenTile& tile, int64_t begin,
                   int64_t end, SelectionBuffers<T, E>& buffer, Use use) {
  constexpr int64_t per = kPerElement<E>;
  const int64_t rows = (tile.last - tile.first) * s.group();
  fill(buffer.no_window, s.dim, T{});
  WindowRows<T> windows(s, pool, slots, tile, begin, end, buffer);
  for (int64_t u = begin; u < end; u += kPage) {
    transpose_rows([&](int64_t t) { return windows.rows[t]; }, buffer.tile.keys.data(), s.dim);
    windows = WindowRows<T>(s, pool, slots, tile, u + kPage, end, buffer);
    std::fill_n(buffer.tile.scores.begin(), rows * kPage, 0.0f);
    multiply(buffer.tile.q.data(), s.dim / per, buffer.tile.keys.data(), kPage, buffer.tile.scores.data(), kPage, rows,
             kPage, s.dim / per, PrefetchRows<T>{windows, s.dim});
    use(u);
  }
  pool_bytes_read.fetch_add((end - begin) * s.dim * sizeof(T), std::memory_order_relaxed);
}

// Windows [begin, end) of a pass; `begin` is a multiple of 64.
struct WindowRange {
  int64_t begin, end;
};

// The highest position in a tile; that of its last token, if none is in a tree.
inline int64_t highest_position(const AttentionStep& s, const TokenTile& tile) {
  return *std::max_element(s.positions + tile.first, s.positions + tile.last);
}

// The coarse windows that one of the tile's tokens has fully passed.
inline WindowRange coarse_windows(const AttentionStep& s, const TokenTile& tile) {
  return {0, std::min<int64_t>(highest_position(s, tile) + 1, s.tree_start[tile.sequence]) / kPage};
}

// Softmax maximum and sum of every row over the coarse windows of the range that its token has fully passed.
template <class T, class E>
void coarse_pass(const AttentionStep& s, const T* coarse, const TokenTile& tile, WindowRange range,
                 SelectionBuffers<T, E>& buffer) {
  const int64_t group = s.group(), rows = (tile.last - tile.first) * group;
  score_windows(s, coarse, kCoarseSlots, tile, range.begin, range.end, buffer, [&](int64_t u) {
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = &buffer.tile.scores[r * kPage];
      const int64_t visible = s.settled(tile.sequence, tile.first + r / group) / kPage - u;
      if (visible <= (u == 0)) continue;
      if (u == 0) scores[0] = -std::numeric_limits<float>::infinity();
      if (visible < kPage) std::fill(scores + visible, scores + kPage, -std::numeric_limits<float>::infinity());
      float &row_max = buffer.tile.row_max[r], &row_sum = buffer.tile.row_sum[r];
      row_sum *= raise_maximum(scores, row_max);
      vf total{};
      for (int t = 0; t < kPage; t += kWidth) total += exp(load(scores + t) - row_max);
      row_sum += sum(total);
    }
  });
}

// A token's probabilities of the loaded fine windows, added up over its rows -> total [64]; NaN counts as 0.
template <class E>
inline void add_up_group(const Tile<E>& tile, int64_t first_row, int64_t group, float* total) {
  std::fill_n(total, kPage, 0.0f);
  for (int64_t r = first_row; r < first_row + group; ++r) {
    const float inverse = 1.0f / tile.row_sum[r];
    for (int t = 0; t < kPage; t += kWidth) {
      const vf score = load(&tile.scores[r * kPage + t]) - tile.row_max[r];
      store(total + t, load(total + t) + exp(min(score, splat(kMaxExponent))) * inverse);
    }
  }
  for (int t = 0; t < kPage; t += kWidth) store(total + t, max(load(total + t), vf{}));
}

// Pools 64 fine windows of one token to the 16 blocks in which they end: a block's score is the best of these windows
// and of the first that ends in the next block. `before` is the score of the block in front of them.
inline void pool_windows(const float* probability, float* block_scores, float& before) {
  before = std::max(before, probability[0]);
  for (int64_t block = 0; block < kChunkBlocks; ++block) {
    const float* ours = probability + block * kFineSlots;
    float best = block + 1 < kChunkBlocks ? ours[kFineSlots] : 0.0f;
    for (int64_t w = 0; w < kFineSlots; ++w) best = std::max(best, ours[w]);
    block_scores[block] = best;
  }
}

// The fine windows of the blocks that can be chosen by score.
inline WindowRange fine_windows(const AttentionStep& s, const SparseSettings& settings, const TokenTile& tile) {
  const int64_t last = highest_position(s, tile), settled = std::min<int64_t>(last + 1, s.tree_start[tile.sequence]);
  return {0, std::min(settled / kStride, (last / kPage - settings.local_blocks) * kFineSlots + 1)};
}

// Scores, for the tile's tokens, of the blocks in which the windows of the range end -> scores [tokens, stride], of
// which the first of the range is at `scores`. before [tokens]: for the block in front of them.
template <class T, class E>
void fine_pass(const AttentionStep& s, const T* fine, const TokenTile& tile, WindowRange range, int64_t stride,
               float* scores, float* before, SelectionBuffers<T, E>& buffer) {
  const int64_t group = s.group();
  score_windows(s, fine, kFineSlots, tile, range.begin, range.end, buffer, [&](int64_t u) {
    for (int64_t t = 0; t < tile.last - tile.first; ++t) {
      const int64_t settled = s.settled(tile.sequence, tile.first + t);
      if (settled / kPage < 2) continue;  // no coarse window yet: all scores are zero
      float probability[kPage];
      add_up_group(buffer.tile, t * group, group, probability);
      if (u == 0) probability[0] = 0.0f;  // no window
      const int64_t visible = std::clamp<int64_t>(std::min(range.end, settled / kStride) - u, 0, kPage);
      std::fill(probability + visible, probability + kPage, 0.0f);
      float* chunk = scores + t * stride + (u - range.begin) / kFineSlots;
      pool_windows(probability, chunk, u == range.begin ? before[t] : chunk[-1]);
    }
  });
}

// At least `count` of scores [n] are no less than the result, and few are: the count-th best of the maxima of groups.
inline float lower_bound_of_best(const float* scores, int64_t n, int64_t count) {
  constexpr int64_t per_group = 8;
  static thread_local Buffer<float> maxima;
  const int64_t groups = n / (per_group * kWidth) * kWidth;
  if (groups < count) return 0.0f;
  size_to(maxima, groups);
  for (int64_t g = 0; g < groups; g += kWidth) {
    vf best = load(scores + g * per_group);
    for (int64_t i = 1; i < per_group; ++i) best = max(best, load(scores + g * per_group + i * kWidth));
    store(&maxima[g], best);
  }
  std::nth_element(maxima.begin(), maxima.begin() + count - 1, maxima.end(), std::greater<>());
  return maxima[count - 1];
}

// The best `count` of blocks [first, last) by (score descending, block ascending). No score is negative.
inline void set_best(const float* scores, int64_t first, int64_t last, int64_t count, uint64_t* row) {
  static thread_local Buffer<uint64_t> keys;
  size_to(keys, std::max<int64_t>(0, last - first));
  const float least = lower_bound_of_best(scores + first, keys.size(), count);
  int64_t found = 0;
  for (int64_t b = first; b < last; ++b) {
    if (scores[b] < least) continue;
    uint32_t bits;  // of a float that is not negative: ordered as the float is
    memcpy(&bits, scores + b, sizeof bits);
    keys[found++] = uint64_t{bits} << 32 | (UINT32_MAX - static_cast<uint32_t>(b));
  }
  if (count < found) std::nth_element(keys.begin(), keys.begin() + count, keys.begin() + found, std::greater<>());
  for (int64_t i = 0; i < std::min(count, found); ++i) {
    const int64_t block = UINT32_MAX - static_cast<uint32_t>(keys[i]);
    set_range(row, block, block + 1);
  }
}

// The blocks of one token: the first ones, the local ones and then the best.
inline void choose_blocks(const SparseSettings& settings, int64_t own_block, const float* scores, uint64_t* row) {
  const int64_t init = std::min(settings.init_blocks, own_block + 1);
  const int64_t local = std::max(init, own_block - settings.local_blocks);
  const int64_t forced = init + (own_block + 1 - local), wanted = settings.selected_blocks;
  set_range(row, 0, std::min(init, wanted));
  set_range(row, local, local + std::min(own_block + 1 - local, std::max<int64_t>(0, wanted - init)));
  if (wanted > forced) set_best(scores, init, local, wanted - forced, row);
}

template <class T, class E>
void load_selecting_queries(const AttentionStep& s, const SparseSettings& settings, const TokenTile& tile,
                            SelectionBuffers<T, E>& buffer) {
  buffer.tile.start((tile.last - tile.first) * s.group(), s.dim);
  load_queries(s, tile.head, tile.first, tile.last, buffer.tile, !settings.use_nope);
}

// The blocks of the tree, of which a token attends to what its bits say.
inline void set_tree_blocks(const AttentionStep& s, const TokenTile& tile, BlockMask& mask) {
  const int64_t start = s.tree_start[tile.sequence];
  for (int64_t t = tile.first; t < tile.last; ++t)
    if (s.is_in_tree(tile.sequence, t)) set_range(mask.row(t, tile.head), start / kPage, s.slots[t] / kPage + 1);
}

// The blocks of a tile's tokens -> their rows of the mask.
template <class T, class E>
void select_tile(const AttentionStep& s, const T* fine, const T* coarse, const SparseSettings& settings,
                 const TokenTile& tile, BlockMask& mask, SelectionBuffers<T, E>& buffer) {
  const int64_t blocks = highest_position(s, tile) / kPage + 1, stride = score_stride(blocks);
  if (blocks > settings.selected_blocks) {
    load_selecting_queries(s, settings, tile, buffer);
    coarse_pass(s, coarse, tile, coarse_windows(s, tile), buffer);
    const int64_t tokens = tile.last - tile.first;
    fill(buffer.block_scores, tokens * stride, 0.0f);
    fill(buffer.before, tokens, 0.0f);
    fine_pass(s, fine, tile, fine_windows(s, settings, tile), stride, buffer.block_scores.data(),
              buffer.before.data(), buffer);
  }
  for (int64_t t = tile.first; t < tile.last; ++t) {
    const int64_t own_block = s.positions[t] / kPage;
    uint64_t* row = mask.row(t, tile.head);
    if (own_block < settings.selected_blocks)
      set_range(row, 0, own_block + 1);
    else
      choose_blocks(settings, own_block, &buffer.block_scores[(t - tile.first) * stride], row);
  }
  set_tree_blocks(s, tile, mask);
}

}  // namespace edge
