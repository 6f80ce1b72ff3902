// Scores blocks of 64 tokens for every new token and KV head (spec: infllmv2.md 3.4 - 3.6). Pass 1: the coarse windows
// give each query head its softmax maximum and sum. Pass 2: the fine ones give its probabilities, which are added up
// over the group's heads in registers and pooled to blocks; nothing per head and window is ever stored.
//
// Block b's score is the best of fine windows 4b .. 4b + 4 (windows.cuh says how they count). Two values a block are
// written, `own`: the best of 4b .. 4b + 3, and `first`: window 4b's, so that it is max(own[b], first[b + 1]).
//
// score_*_of_token: one token in a thread block; its warps divide the windows and share the queries, read once; pass 1
// takes all windows in one block, pass 2 has a block for every CHUNK of them. score_*: a warp has two tokens of one
// sequence, and the warps of a block walk the same windows, which stay in L1. Grids depend on the shapes only; rows
// that keep all of their blocks, because their sequence is dense or short, return at once.
#pragma once
#include "plugins/infllmv2/windows.cuh"

namespace infllmv2 {

constexpr int CHUNK = 512;  // fine windows of a thread block
constexpr int CHUNK_UNITS = CHUNK / UNIT, UNIT_BLOCKS = UNIT / FINE_SLOTS;
constexpr int MAX_GROUP = 16;
constexpr int COARSE_WARPS = 12, FINE_WARPS = 4;  // of a thread block with one token
constexpr float LARGEST_EXPONENT = 80;            // exp(80) times any number of heads is finite
constexpr float LOG2_E = 1.44269504f;

// A softmax over some of the coarse windows: the largest product, and the sum of exponentials relative to it.
struct Softmax {
  float largest = -3.40282347e38f, sum = 0;
};

// A sum that is not a number stays so: it spoils the whole row.
template <int N>
DEVICE void add_products(Softmax& softmax, const float (&products)[N], float scale_log2) {
  float largest = softmax.largest;
#pragma unroll
  for (int i = 0; i < N; ++i) largest = fmaxf(largest, products[i]);
  softmax.sum *= ptx::exp2((softmax.largest - largest) * scale_log2);
#pragma unroll
  for (int i = 0; i < N; ++i) softmax.sum += ptx::exp2((products[i] - largest) * scale_log2);
  softmax.largest = largest;
}

DEVICE Softmax merge(Softmax a, Softmax b, float scale_log2) {
  const float largest = fmaxf(a.largest, b.largest);
  const float sum_a = a.sum * ptx::exp2((a.largest - largest) * scale_log2);
  return {largest, sum_a + b.sum * ptx::exp2((b.largest - largest) * scale_log2)};
}

// The lanes 4g .. 4g + 3 have one query row's windows.
DEVICE Softmax merge_lanes(Softmax softmax, float scale_log2) {
#pragma unroll
  for (int other = 1; other < 4; other *= 2) {
    const Softmax theirs = {__shfl_xor_sync(~0u, softmax.largest, other), __shfl_xor_sync(~0u, softmax.sum, other)};
    softmax = merge(softmax, theirs, scale_log2);
  }
  return softmax;
}

// What pass 2 needs of a head: a probability is exp2(min(product * scale_log2 - x, y)).
DEVICE void write_limits(const ScoreArguments& a, int token, int head, Softmax softmax) {
  const float log2_sum = ptx::log2(softmax.sum < 1 ? 1 : softmax.sum);  // a no-op unless all products were -infinity
  float2 limits = make_float2(softmax.largest * a.scale_log2 + log2_sum, LARGEST_EXPONENT * LOG2_E - log2_sum);
  if (head >= a.group) limits = make_float2(0, -INFINITY);  // rows beyond the group add nothing
  a.softmax[(static_cast<int64_t>(token) * a.kv_heads + blockIdx.y) * MAX_GROUP + head] = limits;
}

// Adds one half's products with the windows 8q .. 8q + 7 of a unit, of which `windows` are visible.
template <int TILES>
DEVICE void add_unit(Softmax& softmax, const Products<TILES>& products, int half, int unit, int windows,
                     float scale_log2) {
  const int first = UNIT * unit + threadIdx.x % 4 * 8;
  float visible[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    visible[i] = first + i > 0 && first + i < windows ? product(products, half, i) : -INFINITY;
  add_products(softmax, visible, scale_log2);
}

// One token's queries, by way of shared memory. Rows there are 64 bytes longer, so that the pieces that eight lanes
// read at once lie in different banks.
template <int D, int GROUP_ROWS, int WARPS, int TILES>
DEVICE void share_queries(Queries<D, TILES>& queries, const ScoreArguments& a, int token, uint16_t* shared) {
  constexpr int PIECES = D / 8, STRIDE = D + 32;
  const uint4* q = reinterpret_cast<const uint4*>(queries_of<D>(a, token));
  for (int i = threadIdx.x; i < a.group * PIECES; i += 32 * WARPS)
    *reinterpret_cast<uint4*>(shared + i / PIECES * STRIDE + i % PIECES * 8) = q[i];
  __syncthreads();
  using Layout = QueryTiles<GROUP_ROWS, 1>;
#pragma unroll
  for (int half = 0; half < Layout::HALVES; ++half)
    load_half<D, TILES>(queries, half, shared, Layout::head(half), a.group, STRIDE);
}

// The warp's number, as a value that the compiler knows to be the warp's.
DEVICE int warp_index() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0); }

// Pass 1 for one token. Grid: (1, KV heads, tokens).
template <class T, int D, int GROUP_ROWS>
DEVICE void score_coarse_of_token(const ScoreArguments& a) {
  using Layout = QueryTiles<GROUP_ROWS, 1>;
  SHARED_MEMORY(shared);  // Softmax [COARSE_WARPS][16], queries
  Softmax* partial = reinterpret_cast<Softmax*>(shared);
  const int warp = warp_index();
  const Rows<1> rows = load_token(a, blockIdx.z);
  const int windows = rows.row[0].windows(PAGE / COARSE_SLOTS);
  if (windows == 0) return;

  Queries<D, 1> queries = {};
  uint16_t* staging = reinterpret_cast<uint16_t*>(partial + COARSE_WARPS * MAX_GROUP);
  share_queries<D, GROUP_ROWS, COARSE_WARPS, 1>(queries, a, rows.row[0].token, staging);
  Softmax softmax[Layout::HALVES];
  const Walk walk = plan_walk<D, COARSE_SLOTS>(a, rows, warp, COARSE_WARPS);
  score_units<T, D, COARSE_SLOTS, true>(walk, queries, [&](int unit, const Products<1>& products) {
#pragma unroll
    for (int half = 0; half < Layout::HALVES; ++half)
      add_unit(softmax[half], products, half, unit, windows, a.scale_log2);
  });
#pragma unroll
  for (int half = 0; half < Layout::HALVES; ++half) {
    const Softmax merged = merge_lanes(softmax[half], a.scale_log2);
    if (threadIdx.x % 4 == 0) partial[warp * MAX_GROUP + Layout::head(half)] = merged;
  }
  __syncthreads();
  if (threadIdx.x >= GROUP_ROWS) return;
  Softmax all = partial[threadIdx.x];
  for (int w = 1; w < COARSE_WARPS; ++w) all = merge(all, partial[w * MAX_GROUP + threadIdx.x], a.scale_log2);
  write_limits(a, rows.row[0].token, threadIdx.x, all);
}

// Pass 1 for pairs of tokens. Grid: (1, KV heads, pairs / WARPS).
template <class T, int D, int GROUP_ROWS, int WARPS>
DEVICE void score_coarse(const ScoreArguments& a) {
  using Layout = QueryTiles<GROUP_ROWS, 2>;
  const Rows<2> rows = load_pair(a, blockIdx.z * WARPS + warp_index());
  const Walk walk = plan_walk<D, COARSE_SLOTS>(a, rows, 0, 1);
  if (walk.end == 0) return;

  Queries<D, Layout::TILES> queries;
#pragma unroll
  for (int half = 0; half < Layout::HALVES; ++half) {
    const uint16_t* q = queries_of<D>(a, rows.row[Layout::token(half)].token);
    load_half<D, Layout::TILES>(queries, half, q, Layout::head(half), a.group, D);
  }
  Softmax softmax[Layout::HALVES];
  score_units<T, D, COARSE_SLOTS, false>(walk, queries, [&](int unit, const Products<Layout::TILES>& products) {
#pragma unroll
    for (int half = 0; half < Layout::HALVES; ++half) {
      const int windows = rows.row[Layout::token(half)].windows(PAGE / COARSE_SLOTS);
      add_unit(softmax[half], products, half, unit, windows, a.scale_log2);
    }
  });
#pragma unroll
  for (int half = 0; half < Layout::HALVES; ++half) {
    const Softmax merged = merge_lanes(softmax[half], a.scale_log2);
    const Row& row = rows.row[Layout::token(half)];
    if (row.scored && threadIdx.x % 4 == 0) write_limits(a, row.token, Layout::head(half), merged);
  }
}

DEVICE float2 load_limits(const ScoreArguments& a, int token, int head) {
  return a.softmax[(static_cast<int64_t>(token) * a.kv_heads + blockIdx.y) * MAX_GROUP + head];
}

// Adds up x[i] of the lanes 4g + q of all g: lane 4g + q returns the sum of x[g].
DEVICE float sum_over_rows(const float (&x)[8]) {
  const int lane = threadIdx.x % 32;
  float four[4], two[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool high = lane & 16;
    four[i] = (high ? x[i + 4] : x[i]) + __shfl_xor_sync(~0u, high ? x[i] : x[i + 4], 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool high = lane & 8;
    two[i] = (high ? four[i + 2] : four[i]) + __shfl_xor_sync(~0u, high ? four[i] : four[i + 2], 8);
  }
  const bool high = lane & 4;
  return (high ? two[1] : two[0]) + __shfl_xor_sync(~0u, high ? two[0] : two[1], 4);
}

// The probabilities of a token's heads added up: lane 4g + q returns that of window 8q + g.
template <int GROUP_ROWS, int TILES, int HALVES>
DEVICE float group_score(const Products<TILES>& products, const float2 (&limits)[HALVES], int token,
                         float scale_log2) {
  constexpr int PER_TOKEN = GROUP_ROWS / 8;
  float sum[8] = {};
#pragma unroll
  for (int half = token * PER_TOKEN; half < (token + 1) * PER_TOKEN; ++half)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float exponent = product(products, half, i) * scale_log2 - limits[half].x;
      sum[i] += ptx::exp2(ptx::minimum(exponent, limits[half].y));
    }
  return sum_over_rows(sum);
}

// Pools the unit's windows to its eight blocks and writes them, if the row is scored; lane 4g + q has window 8q + g's
// score.
DEVICE void write_blocks(const ScoreArguments& a, const Row& row, int unit, float score) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, u = UNIT * unit + 8 * q + g;
  const float first = u > 0 && u < row.windows(FINE_STRIDE) ? fmaxf(score, 0) : 0;  // not-a-number counts as 0
  float own = fmaxf(first, __shfl_xor_sync(~0u, first, 4));
  own = fmaxf(own, __shfl_xor_sync(~0u, own, 8));
  float2* scores = a.scores + (static_cast<int64_t>(row.token) * a.kv_heads + blockIdx.y) * a.score_width;
  if (row.scored && g % FINE_SLOTS == 0)
    scores[UNIT_BLOCKS * unit + 2 * q + g / FINE_SLOTS] = make_float2(own, first);
}

// The chunk's part of a walk over the fine windows, as far as the rows have blocks.
template <int D, int ROWS>
DEVICE Walk plan_chunk(const ScoreArguments& a, const Rows<ROWS>& rows, int warp, int step) {
  const int first = blockIdx.x * CHUNK_UNITS;
  Walk walk = plan_walk<D, FINE_SLOTS>(a, rows, first + warp, step);
  const int blocks = max(rows.row[0].blocks(), rows.row[ROWS - 1].blocks());
  walk.whole_end = min(walk.whole_end, first + CHUNK_UNITS);
  walk.end = min((blocks + UNIT_BLOCKS - 1) / UNIT_BLOCKS, first + CHUNK_UNITS);
  return walk;
}

// Pass 2 for one token. Grid: (chunks, KV heads, tokens).
template <class T, int D, int GROUP_ROWS>
DEVICE void score_fine_of_token(const ScoreArguments& a) {
  using Layout = QueryTiles<GROUP_ROWS, 1>;
  SHARED_MEMORY(shared);  // queries
  const Rows<1> rows = load_token(a, blockIdx.z);
  const Row& row = rows.row[0];
  const Walk walk = plan_chunk<D>(a, rows, warp_index(), FINE_WARPS);
  if (walk.end <= static_cast<int>(blockIdx.x) * CHUNK_UNITS) return;

  Queries<D, 1> queries = {};
  share_queries<D, GROUP_ROWS, FINE_WARPS, 1>(queries, a, row.token, reinterpret_cast<uint16_t*>(shared));
  float2 limits[Layout::HALVES];
#pragma unroll
  for (int half = 0; half < Layout::HALVES; ++half) limits[half] = load_limits(a, row.token, Layout::head(half));
  score_units<T, D, FINE_SLOTS, true>(walk, queries, [&](int unit, const Products<1>& products) {
    write_blocks(a, row, unit, group_score<GROUP_ROWS, 1>(products, limits, 0, a.scale_log2));
  });
}

// Pass 2 for pairs of tokens. Grid: (chunks, KV heads, pairs / WARPS).
template <class T, int D, int GROUP_ROWS, int WARPS>
DEVICE void score_fine(const ScoreArguments& a) {
  using Layout = QueryTiles<GROUP_ROWS, 2>;
  const Rows<2> rows = load_pair(a, blockIdx.z * WARPS + warp_index());
  const Walk walk = plan_chunk<D>(a, rows, 0, 1);
  if (walk.end <= static_cast<int>(blockIdx.x) * CHUNK_UNITS) return;

  Queries<D, Layout::TILES> queries;
  float2 limits[Layout::HALVES];
#pragma unroll
  for (int half = 0; half < Layout::HALVES; ++half) {
    const int token = rows.row[Layout::token(half)].token, head = Layout::head(half);
    load_half<D, Layout::TILES>(queries, half, queries_of<D>(a, token), head, a.group, D);
    limits[half] = load_limits(a, token, head);
  }
  score_units<T, D, FINE_SLOTS, false>(walk, queries, [&](int unit, const Products<Layout::TILES>& products) {
#pragma unroll
    for (int w = 0; w < 2; ++w)
      write_blocks(a, rows.row[w], unit, group_score<GROUP_ROWS, Layout::TILES>(products, limits, w, a.scale_log2));
  });
}

}  // namespace infllmv2
