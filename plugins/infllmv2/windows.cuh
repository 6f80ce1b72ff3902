// Products of a group's queries with compressed keys, a warp at a time: what both passes of score.cu do.
//
// Windows count by their end: window u is the one that ends with token (u + 1) * stride - 1, u = 0 does not exist. It
// lies on the page of that token: page u / SLOTS of the sequence, slot u % SLOTS. A token at position p sees the
// windows u < (p + 1) / stride, and those of a tree only what lies before it.
//
// A warp takes units of 32 windows. The query heads are the A operand of the products, 16 rows of which one token has
// GROUP_ROWS, the windows are the B operand, four tiles of 8 columns. The order of k is free where both operands agree
// and so is that of the windows: lane 4g + q loads elements 32j + 8q .. + 7 of query rows g and g + 8, and of column g
// of tile t, which is window 8 (g / 2) + 2t + g % 2 of the unit, 16 bytes straight from global memory. Of the products
// it then has windows 8q .. 8q + 7, two of each tile, by query rows g and g + 8.
#pragma once
#include "plugins/infllmv2/step.cuh"

namespace infllmv2 {

constexpr int UNIT = 32;  // windows that a warp scores at once

struct ScoreArguments {
  const uint16_t* q;         // element type T; head h of token t is at t * q_stride + h * D
  const uint16_t* c1_pool;   // [pages, Hkv, 4, D] of T
  const uint16_t* c2_pool;   // [pages, Hkv, 1, D] of T
  const int* positions;      // [tokens]
  const int* query_start;    // [sequences + 1]
  const int* page_table;     // [sequences, table_width]
  const int* tree_start;     // [sequences]: the slot at which its tree begins; 2^31 - 1: it has none
  const int* switch_length;  // [sequences]
  const int* settings;       // [4], see Setting
  float2* softmax;           // [tokens, Hkv, 16], see to_limits
  float2* scores;            // [tokens, Hkv, score_width]: own, first
  int tokens, sequences, table_width, kv_heads, group, q_stride, score_width;
  float scale_log2;  // scale * log2(e)
};

// A new token; `last`: its windows end here or before; `scored`: it has more blocks than it may attend to.
struct Row {
  int token, last;
  bool scored;

  DEVICE int blocks() const { return scored ? last / PAGE + 1 : 0; }
  DEVICE int windows(int stride) const { return scored && last >= FIRST_SCORED ? (last + 1) / stride : 0; }
};

// `token`, if it is one of `sequence`'s; else a row that nothing is done for.
DEVICE Row load_row(const ScoreArguments& a, int sequence, int token) {
  if (sequence >= a.sequences || token >= a.query_start[sequence + 1]) return {0, 0, false};
  const int position = a.positions[token];
  const bool sparse = is_sparse(a.settings, a.switch_length, sequence);
  const int last = last_scored(position, a.tree_start[sequence]);
  return {token, last, sparse && position / PAGE >= a.settings[SELECTED]};
}

// The rows of one warp: ROWS tokens of one sequence, the last of which may be missing.
template <int ROWS>
struct Rows {
  int sequence;
  Row row[ROWS];
};

DEVICE Rows<1> load_token(const ScoreArguments& a, int token) {
  const int sequence = sequence_of(a.query_start, a.sequences, token);
  return {sequence, {load_row(a, sequence, token)}};
}

// Every sequence's tokens are paired from its first one on; there are at most (tokens + sequences) / 2 pairs.
DEVICE Rows<2> load_pair(const ScoreArguments& a, int pair) {
  int sequence = 0, token = 0;
  for (; sequence < a.sequences; ++sequence) {
    const int pairs = (a.query_start[sequence + 1] - a.query_start[sequence] + 1) / 2;
    token = a.query_start[sequence] + 2 * pair;
    if (pair < pairs) break;
    pair -= pairs;
  }
  return {sequence, {load_row(a, sequence, token), load_row(a, sequence, token + 1)}};
}

// Which units a warp scores, and where a lane finds its columns: in unit 0, if every page were page 0. Of units before
// `whole_end` every row sees all windows.
struct Walk {
  const uint16_t* pool;
  const int* pages;
  int page_rows, windows, unit, step, whole_end, end;
};

// As far as the rows have windows.
template <int D, int SLOTS, int ROWS>
DEVICE Walk plan_walk(const ScoreArguments& a, const Rows<ROWS>& rows, int unit, int step) {
  int most = 0, least = 0x7fffffff;
#pragma unroll
  for (int w = 0; w < ROWS; ++w) {
    const int windows = rows.row[w].windows(PAGE / SLOTS);
    most = max(most, windows);
    if (rows.row[w].scored) least = min(least, windows);
  }
  const int lane = threadIdx.x % 32, column = lane / 8 * 8 + lane / 4 % 2;
  const uint16_t* pool = SLOTS == FINE_SLOTS ? a.c1_pool : a.c2_pool;
  pool += (static_cast<int>(blockIdx.y) * SLOTS + column % SLOTS) * D + lane % 4 * 8;
  const int* pages = a.page_table + static_cast<int64_t>(rows.sequence) * a.table_width + column / SLOTS;
  return {pool, pages, a.kv_heads * SLOTS, most, unit, step, min(least, most) / UNIT, (most + UNIT - 1) / UNIT};
}

// The lane's pieces of its columns of the unit's four tiles; ONCE: nobody else will read them.
template <int D, int SLOTS, bool WHOLE, bool ONCE>
DEVICE void load_unit(uint4 (&windows)[4][D / 32], const Walk& walk, int unit) {
  const int lane = threadIdx.x % 32, column = UNIT * unit + lane / 8 * 8 + lane / 4 % 2;
  const int* pages = walk.pages + unit * (UNIT / SLOTS);
#pragma unroll
  for (int t = 0; t < 4; ++t) {  // the compiler sees that two fine tiles share their pages
    const bool visible = WHOLE || column + 2 * t < walk.windows;
    const int row = visible ? pages[2 * t / SLOTS] * walk.page_rows + 2 * t % SLOTS : 0;
    const uint16_t* window = walk.pool + static_cast<int64_t>(row) * D;
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      const uint4* piece = reinterpret_cast<const uint4*>(window + 32 * j);
      windows[t][j] = !visible ? make_uint4(0, 0, 0, 0) : ONCE ? ptx::load_once(piece) : __ldg(piece);
    }
  }
}

// The queries of a warp's ROWS tokens: they fill HALVES halves (8 rows) of the TILES tiles of 16.
template <int GROUP_ROWS, int ROWS>
struct QueryTiles {
  static constexpr int HALVES = ROWS * GROUP_ROWS / 8, TILES = (HALVES + 1) / 2;
  // Of query row g of half `half`: which token of the warp, which head of the group.
  static DEVICE int token(int half) { return 8 * half / GROUP_ROWS; }
  static DEVICE int head(int half) { return 8 * half % GROUP_ROWS + threadIdx.x % 32 / 4; }
};
template <int D, int TILES>
using Queries = uint32_t[TILES][D / 16][4];  // A fragments

// One half's; heads are `stride` elements apart, rows beyond the group repeat its last head.
template <int D, int TILES>
DEVICE void load_half(Queries<D, TILES>& queries, int half, const uint16_t* q, int head, int group, int stride) {
  const uint16_t* row = q + min(head, group - 1) * stride + threadIdx.x % 4 * 8;
#pragma unroll
  for (int j = 0; j < D / 32; ++j) {
    const uint4 piece = *reinterpret_cast<const uint4*>(row + 32 * j);
    uint32_t(&even)[4] = queries[half / 2][2 * j], (&odd)[4] = queries[half / 2][2 * j + 1];
    even[half % 2] = piece.x;
    even[half % 2 + 2] = piece.y;
    odd[half % 2] = piece.z;
    odd[half % 2 + 2] = piece.w;
  }
}

template <int D>
DEVICE const uint16_t* queries_of(const ScoreArguments& a, int token) {
  return a.q + static_cast<int64_t>(token) * a.q_stride + blockIdx.y * a.group * D;
}

// products[i][t]: of query tile i with window tile t, as mma leaves them.
template <int TILES>
using Products = float[TILES][4][4];

// The lane's product of query row g of `half` with window 8q + i.
template <int TILES>
DEVICE float product(const Products<TILES>& products, int half, int i) {
  return products[half / 2][i / 2][half % 2 * 2 + i % 2];
}

template <class T, int D, int TILES>
DEVICE void multiply_unit(Products<TILES>& products, const Queries<D, TILES>& queries,
                          const uint4 (&windows)[4][D / 32]) {
#pragma unroll
  for (int j = 0; j < D / 32; ++j)
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        const uint4 b = windows[t][j];
        ptx::mma<T>(products[i][t], queries[i][2 * j], b.x, b.y, products[i][t]);
        ptx::mma<T>(products[i][t], queries[i][2 * j + 1], b.z, b.w, products[i][t]);
      }
}

// One unit: calls use(unit, products).
template <class T, int D, int SLOTS, bool WHOLE, bool ONCE, int TILES, class Use>
DEVICE void score_unit(const Walk& walk, const uint32_t (&queries)[TILES][D / 16][4], int unit, Use& use) {
  uint4 windows[4][D / 32];
  load_unit<D, SLOTS, WHOLE, ONCE>(windows, walk, unit);
  Products<TILES> products = {};
  multiply_unit<T, D, TILES>(products, queries, windows);
  use(unit, products);
}

// All units of the walk. The rows' last positions are at most one apart, so that at most one unit is not whole.
template <class T, int D, int SLOTS, bool ONCE, int TILES, class Use>
DEVICE void score_units(const Walk& walk, const uint32_t (&queries)[TILES][D / 16][4], Use use) {
  int unit = walk.unit;
#pragma unroll 1
  for (; unit < walk.whole_end; unit += walk.step) score_unit<T, D, SLOTS, true, ONCE>(walk, queries, unit, use);
  if (unit < walk.end) score_unit<T, D, SLOTS, false, ONCE>(walk, queries, unit, use);
}

}  // namespace infllmv2
