// The inner loop of all attention kernels: one warp, 16 query rows, one block of 64 keys at a time.
//
// The rows are mma's A operand and stay in registers; keys and values are read where they lie (fragments.cuh). Sums
// are float32. The exponent's base is 2: scores are scaled by log2(e) on the way.
#pragma once
#include "plugins/paged_attention/fragments.cuh"

namespace attention {

struct AttendArguments {
  const uint16_t* q;          // [tokens, heads, D] T, rotated
  const uint8_t* kv_pool;     // [pages, planes, KV heads, PAGE * D] KV
  const float* kv_scales;     // [pages, planes, KV heads, PAGE]; only with bytes
  const int* slots;           // [tokens] where in its pages a token is, consecutive in a sequence
  const int* positions;       // [tokens]; a window ends with that block
  const int* query_start;     // [sequences + 1], from 0
  const int* page_table;      // [sequences, table_width]
  const int* tree_start;      // [sequences]: the slot at which its tree begins; 2^31 - 1: it has none
  const uint64_t* tree_mask;  // [tokens]: which slots from tree_start on a row sees
  const int* blocks;          // [tokens, KV heads, columns] ascending; null: all rows are dense
  const int* block_counts;    // [tokens, KV heads]; 0: this row is dense
  uint16_t* output;           // [tokens, heads, D] T
  float* partial;             // [splits, tiles, KV heads, 16, D]: output before division; of attend_split
  float2* partial_softmax;    // [splits, tiles, KV heads, 16]: maximum, sum
  int tokens, sequences, table_width, heads, kv_heads, planes, columns, tile_tokens, splits, window;
  float scale_log2;  // scale * log2(e)
};

// A warp never diverges here, which ptxas must see: else the inner loop's shuffles and mma get a second, slow copy for
// lanes that went apart. It trusts numbers read from a common address, shuffles of what is common, and votes.

// One number for the whole warp, read by one lane. Not to branch on in a loop.
DEVICE int read_once(const int* p) { return __shfl_sync(~0u, threadIdx.x % 32 == 0 ? *p : 0, 0); }

DEVICE int warp_index() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0); }

// 16 rows of one KV head: row r is query head r % group of token `first` + r / group.
struct Tile {
  int sequence, first, tokens;
  int start, end;  // the sequence's tokens
};

// Tile `index`, counting sequence by sequence; `tokens` is 0 if there are fewer.
DEVICE Tile find_tile(const AttendArguments& a, int index) {
  int start = 0;
  for (int s = 0; s < a.sequences; ++s) {
    const int end = a.query_start[s + 1], tiles = (end - start + a.tile_tokens - 1) / a.tile_tokens;
    if (index < tiles) {
      const int first = start + index * a.tile_tokens;
      return {s, first, min(a.tile_tokens, end - first), start, end};
    }
    index -= tiles;
    start = end;
  }
  return {};
}

// Where windows begin, if there are any: that of the lane's token, and the first and the last of all the tile's.
struct Windows {
  int begin, first, last;
};

// WINDOW: there are; a row's window is `window` blocks, the last of which is its position's.
template <bool WINDOW>
DEVICE Windows windows_of(const AttendArguments& a, const Tile& tile) {
  Windows windows = {};
  if constexpr (WINDOW) {
    const int lane = threadIdx.x % 32, position = a.positions[tile.first + min(lane, tile.tokens - 1)];
    windows.begin = windows.first = windows.last = max(0, position / PAGE - a.window + 1) * PAGE;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      windows.first = min(windows.first, __shfl_xor_sync(~0u, windows.first, step));
      windows.last = max(windows.last, __shfl_xor_sync(~0u, windows.last, step));
    }
  }
  return windows;
}

// The blocks a tile attends to: a list, or if there is none those from `first` on.
struct Blocks {
  const int* list;
  int first, count;

  DEVICE int at(int j) const { return list ? read_once(list + j) : first + j; }
};

DEVICE Blocks blocks_of(const AttendArguments& a, const Tile& tile, const Windows& windows, int kv_head) {
  const int64_t row = static_cast<int64_t>(tile.first) * a.kv_heads + kv_head;
  const int chosen = a.blocks ? read_once(a.block_counts + row) : 0;
  if (chosen) return {a.blocks + row * a.columns, 0, chosen};
  const int first = windows.first / PAGE;
  return {nullptr, first, read_once(a.slots + tile.first + tile.tokens - 1) / PAGE + 1 - first};
}

// What rows g and g + 8 see: keys up to `limit`, of those from `tree_start` on the ones whose bit is set. WINDOW: and
// none before `begin`.
template <bool WINDOW>
struct Sight {
  int begin[2], limit[2];
  uint64_t tree[2];
  int tree_start, end;  // end: what the sequence's pages hold after this step; what follows was never written
  int open, clear;      // every row sees all keys from `open` to before `clear`

  DEVICE bool sees(int row, int key) const {
    if (WINDOW && key < begin[row]) return false;
    return key <= limit[row] && (key < tree_start || (tree[row] >> (key - tree_start) & 1));
  }
};

template <bool WINDOW>
DEVICE Sight<WINDOW> sight_of(const AttendArguments& a, const Tile& tile, const Windows& windows, int group) {
  const int lane = threadIdx.x % 32;
  const int slot = lane < tile.tokens ? a.slots[tile.first + lane] : -1;
  const uint64_t tree = lane < tile.tokens ? a.tree_mask[tile.first + lane] : 0;
  Sight<WINDOW> sight;
  sight.end = read_once(a.slots + tile.end - 1) + 1;
  sight.tree_start = read_once(a.tree_start + tile.sequence);
  sight.open = windows.last;
  sight.clear = min(__shfl_sync(~0u, slot, 0) + 1, sight.tree_start);
  const int limit = slot - sight.tree_start < 64 ? slot : sight.tree_start + 63;  // there are no more bits
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = (lane / 4 + 8 * i) / group;  // beyond the tile's there is nothing to see
    const uint32_t low = __shfl_sync(~0u, static_cast<uint32_t>(tree), token);
    const uint32_t high = __shfl_sync(~0u, static_cast<uint32_t>(tree >> 32), token);
    sight.begin[i] = WINDOW ? __shfl_sync(~0u, windows.begin, token) : 0;
    sight.limit[i] = __shfl_sync(~0u, limit, token);
    sight.tree[i] = low | static_cast<uint64_t>(high) << 32;
  }
  return sight;
}

// 16 rows of queries as A operands, and where their scores start.
template <int D>
struct Queries {
  uint32_t steps[D / 16][4];
  float start[4];  // bytes: takes the products with BYTE_OFFSET back
};

template <class T, class KV>
DEVICE uint32_t query_pair(uint32_t pair) {
  if constexpr (Layout<T, KV>::BYTES && sizeof(T) == 2) {
    const float2 v = unpack<T>(pair);  // a bf16 may exceed the largest half
    return pack<half>(fminf(fmaxf(v.x, -65504.0f), 65504.0f), fminf(fmaxf(v.y, -65504.0f), 65504.0f));
  }
  return pair;
}

// Rows 0 .. count - 1 from where `row_at` says; the others are zeros.
template <class T, int D, class KV, class RowAt>
DEVICE void load_queries(Queries<D>& queries, int count, RowAt row_at) {
  using L = Layout<T, KV>;
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  float sum[2] = {};
#pragma unroll
  for (int s = 0; s < D / 16; ++s)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int element = L::SPAN * (s / L::STEPS) + L::PER_LOAD * q + 4 * (s % L::STEPS);
      uint2 v = make_uint2(0, 0);
      if (g + 8 * i < count) v = *reinterpret_cast<const uint2*>(row_at(g + 8 * i) + element);
      queries.steps[s][i] = query_pair<T, KV>(v.x);
      queries.steps[s][i + 2] = query_pair<T, KV>(v.y);
      if constexpr (L::BYTES) {
        const float2 x = unpack<half>(queries.steps[s][i]), y = unpack<half>(queries.steps[s][i + 2]);
        sum[i] += (x.x + x.y) + (y.x + y.y);
      }
    }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
    sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
    queries.start[2 * i] = queries.start[2 * i + 1] = L::BYTES ? -BYTE_OFFSET * sum[i] : 0;
  }
}

// The softmax so far of rows g and g + 8, and their weighted values: output[n] has elements 8n + 2q, 8n + 2q + 1.
template <int D>
struct Attended {
  float output[D / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};  // in the output's units: bytes count VALUE_UNIT fold
};

// Scales of values times probabilities stay normal halves down to this part of one.
constexpr float VALUE_UNIT = 64;

// Scores of a span's tiles, as mma leaves them; `keys`: the lane's first 16 bytes of the span.
template <class T, int D, class KV>
using Scores = float[Layout<T, KV>::SPAN_TILES][4];

template <class T, int D, class KV>
DEVICE void multiply_keys(Scores<T, D, KV>& scores, const Queries<D>& queries, const KV* keys) {
  using L = Layout<T, KV>;
#pragma unroll
  for (int t = 0; t < L::SPAN_TILES; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[t][i] = queries.start[i];
#pragma unroll
    for (int j = 0; j < D / L::SPAN; ++j) {
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(keys + 2 * t * D + L::SPAN * j));
#pragma unroll
      for (int s = 0; s < L::STEPS; ++s) {
        uint32_t b0, b1;
        operand_pair<L::BYTES>(words, s, b0, b1);
        ptx::mma<typename L::Operand>(scores[t], queries.steps[j * L::STEPS + s], b0, b1, scores[t]);
      }
    }
  }
}

// Multiplies the scores of bytes by their keys' scales: lane l has those of keys 2l and 2l + 1.
template <class L, int TILES>
DEVICE void scale_scores(float (&scores)[TILES][4], float2 scales) {
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    const int lane = L::PER_LOAD / 2 * (threadIdx.x % 4) + t;  // keys key_of(t, 2q), key_of(t, 2q + 1)
    const float x = __shfl_sync(~0u, scales.x, lane), y = __shfl_sync(~0u, scales.y, lane);
    scores[t][0] *= x, scores[t][1] *= y, scores[t][2] *= x, scores[t][3] *= y;
  }
}

// Hides what the rows do not see of the span whose first key is `first`.
template <class L, int TILES, bool WINDOW>
DEVICE void hide(float (&scores)[TILES][4], const Sight<WINDOW>& sight, int first) {
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!sight.sees(i / 2, first + key_of<L>(t, 2 * (threadIdx.x % 4)) + i % 2)) scores[t][i] = -INFINITY;
}

// Turns scores into exp2(scale_log2 * (score - maximum)). -> what the output so far must be multiplied by, of each row.
template <int D, int TILES>
DEVICE float2 soften(Attended<D>& so_far, float (&scores)[TILES][4], float scale_log2) {
  float fade[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float most = so_far.maximum[i];
#pragma unroll
    for (int t = 0; t < TILES; ++t) most = fmaxf(most, fmaxf(scores[t][2 * i], scores[t][2 * i + 1]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    const float base = most == -INFINITY ? 0 : most * scale_log2;  // a row may have seen nothing yet
    fade[i] = ptx::exp2(so_far.maximum[i] * scale_log2 - base);
    so_far.maximum[i] = most;
    so_far.sum[i] *= fade[i];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int j = 2 * i; j < 2 * i + 2; ++j) scores[t][j] = ptx::exp2(scores[t][j] * scale_log2 - base);
  }
  return make_float2(fade[0], fade[1]);
}

// Probabilities as A operands, and their rounded sums: what the values are divided by in the end.
template <class T, int D, class KV>
DEVICE void to_operand(uint32_t (&p)[Layout<T, KV>::STEPS][4], Attended<D>& so_far, const Scores<T, D, KV>& scores) {
  using L = Layout<T, KV>;
  using Operand = typename L::Operand;
  const uint32_t unit = twice(from_float<Operand>(L::BYTES ? VALUE_UNIT : 1.0f));
  float total[4] = {};
#pragma unroll
  for (int s = 0; s < L::STEPS; ++s) {
    const float(&x)[4] = scores[2 * s], (&y)[4] = scores[2 * s + 1];
    p[s][0] = pack<Operand>(x[0], x[1]), p[s][1] = pack<Operand>(x[2], x[3]);
    p[s][2] = pack<Operand>(y[0], y[1]), p[s][3] = pack<Operand>(y[2], y[3]);
    ptx::mma<Operand>(total, p[s], unit, unit, total);
  }
  so_far.sum[0] += total[0], so_far.sum[1] += total[2];
}

// Multiplies the probabilities by the scales of bytes, VALUE_UNIT fold: lane l has those of tokens 2l and 2l + 1 as a
// pair. -> what BYTE_OFFSET will have added to the products of each row.
template <class L>
DEVICE float2 scale_probabilities(uint32_t (&p)[L::STEPS][4], uint32_t scales) {
  const uint32_t one = twice(from_float<half>(1.0f));
  float total[4] = {};
#pragma unroll
  for (int s = 0; s < L::STEPS; ++s) {
    const int lane = L::PER_LOAD / 2 * (threadIdx.x % 4) + 2 * s;
    const uint32_t x = __shfl_sync(~0u, scales, lane), y = __shfl_sync(~0u, scales, lane + 1);
    p[s][0] = multiply<half>(p[s][0], x), p[s][1] = multiply<half>(p[s][1], x);
    p[s][2] = multiply<half>(p[s][2], y), p[s][3] = multiply<half>(p[s][3], y);
    ptx::mma<half>(total, p[s], one, one, total);
  }
  return make_float2(BYTE_OFFSET * total[0], BYTE_OFFSET * total[2]);
}

// output = output * fade + probabilities * values; `values`: the lane's first 16 bytes of the span; MASKED: tokens from
// `end` on, counted from there, are unwritten.
template <class T, int D, class KV, bool MASKED>
DEVICE void multiply_values(Attended<D>& so_far, const uint32_t (&p)[Layout<T, KV>::STEPS][4], const KV* values,
                            int end, float2 fade, float2 excess) {
  using L = Layout<T, KV>;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    uint4 words = __ldg(reinterpret_cast<const uint4*>(values + 8 * n * PAGE));
    if (MASKED && !L::BYTES) zero_after(words, end);
    float(&sum)[4] = so_far.output[n];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = sum[i] * (i < 2 ? fade.x : fade.y) - (i < 2 ? excess.x : excess.y);
#pragma unroll
    for (int s = 0; s < L::STEPS; ++s) {
      uint32_t b0, b1;
      operand_pair<L::BYTES>(words, s, b0, b1);
      ptx::mma<typename L::Operand>(sum, p[s], b0, b1, sum);
    }
  }
}

// Attends to one block, in page `page`, a span at a time.
template <class T, int D, class KV, bool MASKED, bool WINDOW>
DEVICE void attend_block(Attended<D>& so_far, const Queries<D>& queries, const AttendArguments& a,
                         const Sight<WINDOW>& sight, int kv_head, int block, int page) {
  using L = Layout<T, KV>;
  // Counted in planes, a pool that any device holds fits in 31 bits.
  const int key_plane = page * a.planes * a.kv_heads + kv_head, value_plane = key_plane + a.kv_heads;
  const KV* keys = reinterpret_cast<const KV*>(a.kv_pool) + static_cast<int64_t>(key_plane) * (PAGE * D);
  const KV* values = reinterpret_cast<const KV*>(a.kv_pool) + static_cast<int64_t>(value_plane) * (PAGE * D);
  float2 key_scales, value_scales;
  if constexpr (L::BYTES) {
    const float2* scales = reinterpret_cast<const float2*>(a.kv_scales) + threadIdx.x % 32;
    key_scales = __ldg(scales + static_cast<int64_t>(key_plane) * (PAGE / 2));
    value_scales = __ldg(scales + static_cast<int64_t>(value_plane) * (PAGE / 2));
    const int left = sight.end - block * PAGE - 2 * static_cast<int>(threadIdx.x % 32);
    if (MASKED && left < 2) value_scales = make_float2(left == 1 ? value_scales.x : 0, 0);
  }
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  keys += key_of<L>(0, g) * D + L::PER_LOAD * q;
  values += g * PAGE + L::PER_LOAD * q;
#pragma unroll 1
  for (int first = 0; first < PAGE; first += L::SPAN, keys += L::SPAN * D, values += L::SPAN) {
    Scores<T, D, KV> scores;
    multiply_keys<T, D, KV>(scores, queries, keys);
    if constexpr (L::BYTES) scale_scores<L>(scores, key_scales);
    if (MASKED) hide<L>(scores, sight, block * PAGE + first);
    const float2 fade = soften<D>(so_far, scores, a.scale_log2);
    uint32_t p[L::STEPS][4];
    to_operand<T, D, KV>(p, so_far, scores);
    float2 excess = make_float2(0, 0);
    if constexpr (L::BYTES)
      excess = scale_probabilities<L>(p, pack<half>(value_scales.x * VALUE_UNIT, value_scales.y * VALUE_UNIT));
    const int end = sight.end - block * PAGE - first - L::PER_LOAD * q;
    multiply_values<T, D, KV, MASKED>(so_far, p, values, end, fade, excess);
  }
}

// Attends to blocks first, first + step, ...; only the last ones, which hold keys that some row must not see, pay for
// the mask, and of a window the first one.
template <class T, int D, class KV, bool WINDOW>
DEVICE void attend_blocks(Attended<D>& so_far, const Queries<D>& queries, const AttendArguments& a, const Tile& tile,
                          const Blocks& blocks, const Sight<WINDOW>& sight, int kv_head, int first, int step) {
  const int* pages = a.page_table + static_cast<int64_t>(tile.sequence) * a.table_width;
  int j = first;
  if constexpr (WINDOW)
#pragma unroll 1
    for (; __any_sync(~0u, j < blocks.count && blocks.at(j) * PAGE < sight.open); j += step)
      attend_block<T, D, KV, true>(so_far, queries, a, sight, kv_head, blocks.at(j), read_once(pages + blocks.at(j)));
  for (; __any_sync(~0u, j < blocks.count); j += step) {
    const int block = blocks.at(j);
    if (__any_sync(~0u, (block + 1) * PAGE > sight.clear)) break;
    attend_block<T, D, KV, false>(so_far, queries, a, sight, kv_head, block, read_once(pages + block));
  }
#pragma unroll 1
  for (; __any_sync(~0u, j < blocks.count); j += step) {
    const int block = blocks.at(j);
    attend_block<T, D, KV, true>(so_far, queries, a, sight, kv_head, block, read_once(pages + block));
  }
}

}  // namespace attention
