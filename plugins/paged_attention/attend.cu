// Attention over 64-token pages: dense causal, in a window or not, block-sparse (lists from infllmv2/select.cu) and
// tree-masked, for fp16 and bf16, head sizes 64 and 128, 1 to 16 query heads a KV head, keys and values of 16 bits or
// bytes. WINDOW is a kernel of its own: its inner loop needs more instructions, which budgets.toml counts.
//
// attend_tiles: a warp attends with one tile of 16 rows (attend.cuh) to all its blocks; the warps of a thread block
// have neighbouring tiles of one KV head, so that what one reads is in L1 for the next. Nothing is shared, no barrier.
// Grid: (ceil(tiles / WARPS), KV heads).
// attend_split: a tile's blocks are dealt to the warps of all `splits` thread blocks of the tile. The warps meet in
// shared memory, the thread blocks in `combine`. Grid: (splits, KV heads, tiles).
#include "plugins/paged_attention/attend.cuh"

namespace attention {

// Where row `row` of a tile is written or read: tokens are `heads` rows of D.
template <int D>
DEVICE int64_t row_of(const AttendArguments& a, const Tile& tile, int kv_head, int group, int row) {
  return (static_cast<int64_t>(tile.first + row / group) * a.heads + kv_head * group + row % group) * D;
}

template <class T, int D, class KV, int WARPS, bool WINDOW = false>
DEVICE void attend_tiles(const AttendArguments& a) {
  const int kv_head = blockIdx.y, group = a.heads / a.kv_heads, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const Tile tile = find_tile(a, blockIdx.x * WARPS + warp_index());
  if (!tile.tokens) return;
  const int rows = tile.tokens * group;

  Queries<D> queries;
  load_queries<T, D, KV>(queries, rows, [&](int row) { return a.q + row_of<D>(a, tile, kv_head, group, row); });
  Attended<D> attended;
  const Windows windows = windows_of<WINDOW>(a, tile);
  const Blocks blocks = blocks_of(a, tile, windows, kv_head);
  const Sight<WINDOW> sight = sight_of<WINDOW>(a, tile, windows, group);
  attend_blocks<T, D, KV>(attended, queries, a, tile, blocks, sight, kv_head, 0, 1);

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (g + 8 * i >= rows) continue;
    uint16_t* out = a.output + row_of<D>(a, tile, kv_head, group, g + 8 * i) + 2 * q;
    const float share = attended.sum[i] > 0 ? 1 / attended.sum[i] : 0;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<uint32_t*>(out + 8 * n) =
          pack<T>(attended.output[n][2 * i] * share, attended.output[n][2 * i + 1] * share);
  }
}

// A softmax of some keys: its maximum (before scaling) and its sum.
DEVICE float weight_of(float maximum, float most, float scale_log2) {
  return maximum == -INFINITY ? 0 : ptx::exp2((maximum - most) * scale_log2);
}

// Adds the warps' parts of a tile up; thread `threadIdx.x` owns columns threadIdx.x, ... of every row.
template <int D, int WARPS>
DEVICE void meet(const AttendArguments& a, const Attended<D>& mine, float* shared, int rows, int64_t first_row) {
  constexpr int PITCH = D + 8;  // rows g, g + 1 in different banks
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  float* outputs = shared;                                                     // [WARPS][16][PITCH]
  float2* softmax = reinterpret_cast<float2*>(shared + WARPS * 16 * PITCH);  // [WARPS][16]
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp * 16 + g + 8 * i;
    if (q == 0) softmax[row] = make_float2(mine.maximum[i], mine.sum[i]);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<float2*>(outputs + row * PITCH + 8 * n + 2 * q) =
          make_float2(mine.output[n][2 * i], mine.output[n][2 * i + 1]);
  }
  __syncthreads();
  for (int item = threadIdx.x; item < rows * D; item += WARPS * 32) {
    const int row = item / D, column = item % D;
    float most = -INFINITY, sum = 0, output = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) most = fmaxf(most, softmax[w * 16 + row].x);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float weight = weight_of(softmax[w * 16 + row].x, most, a.scale_log2);
      sum += weight * softmax[w * 16 + row].y;
      output += weight * outputs[(w * 16 + row) * PITCH + column];
    }
    a.partial[(first_row + row) * D + column] = output;
    if (column == 0) a.partial_softmax[first_row + row] = make_float2(most, sum);
  }
}

template <class T, int D, class KV, int WARPS, bool WINDOW = false>
DEVICE void attend_split(const AttendArguments& a) {
  SHARED_MEMORY(shared);
  const int split = blockIdx.x, kv_head = blockIdx.y, group = a.heads / a.kv_heads;
  const Tile tile = find_tile(a, blockIdx.z);
  if (!tile.tokens) return;
  const int rows = tile.tokens * group;

  constexpr int PIECES = D / 8, PITCH = D + 8;  // queries are read once a thread block
  uint16_t* staging = reinterpret_cast<uint16_t*>(shared);
  for (int i = threadIdx.x; i < rows * PIECES; i += WARPS * 32)
    *reinterpret_cast<uint4*>(staging + i / PIECES * PITCH + i % PIECES * 8) =
        *reinterpret_cast<const uint4*>(a.q + row_of<D>(a, tile, kv_head, group, i / PIECES) + i % PIECES * 8);
  __syncthreads();
  Queries<D> queries;
  load_queries<T, D, KV>(queries, rows, [&](int row) { return staging + row * PITCH; });
  __syncthreads();  // `meet` uses the same memory

  Attended<D> attended;
  const int warp = split * WARPS + warp_index(), warps = gridDim.x * WARPS;
  const Windows windows = windows_of<WINDOW>(a, tile);
  const Blocks blocks = blocks_of(a, tile, windows, kv_head);
  const Sight<WINDOW> sight = sight_of<WINDOW>(a, tile, windows, group);
  attend_blocks<T, D, KV>(attended, queries, a, tile, blocks, sight, kv_head, warp, warps);
  const int64_t first_row = ((static_cast<int64_t>(split) * gridDim.z + blockIdx.z) * a.kv_heads + kv_head) * 16;
  meet<D, WARPS>(a, attended, reinterpret_cast<float*>(shared), rows, first_row);
}

// The splits of a tile. Grid: (tiles, KV heads); a thread block has D threads, thread c column c.
template <class T, int D>
DEVICE void combine(const AttendArguments& a) {
  const int kv_head = blockIdx.y, group = a.heads / a.kv_heads;
  const Tile tile = find_tile(a, blockIdx.x);
  const int64_t rows_of_split = static_cast<int64_t>(gridDim.x) * a.kv_heads * 16;
  for (int row = 0; row < tile.tokens * group; ++row) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * a.kv_heads + kv_head) * 16 + row;
    float most = -INFINITY, sum = 0, output = 0;
    for (int s = 0; s < a.splits; ++s) most = fmaxf(most, a.partial_softmax[s * rows_of_split + first].x);
    for (int s = 0; s < a.splits; ++s) {
      const int64_t part = s * rows_of_split + first;
      const float2 softmax = a.partial_softmax[part];
      const float weight = weight_of(softmax.x, most, a.scale_log2);
      sum += weight * softmax.y;
      output += weight * a.partial[part * D + threadIdx.x];
    }
    a.output[row_of<D>(a, tile, kv_head, group, row) + threadIdx.x] =
        bits<uint16_t>(from_float<T>(sum > 0 ? output / sum : 0));
  }
}

}  // namespace attention
