// y = x W^T for up to 8 tokens a block (decode, small batches, verification), W packed as plugins/linear/__init__.py
// says, and the language model's head: float32 logits with the best of every 32 rows.
//
// The weights are mma's A operand, 16 output rows, and the tokens its 8 columns, so up to 8 cost the same. A block of
// 8 warps owns TILES row tiles; warp w takes chunks w, w + 8, ... of the inputs, so that the block reads weights from
// one place at a time. A lane loads 16 bytes of weights each time, DEPTH tiles ahead of their use, and its part of x
// once for all tiles. Codes become exact weights (unpack.cuh); a group's products are summed by mma in float32, then
// scaled in float32. The warps' sums meet in shared memory. Grid: (ceil(tiles / TILES), ceil(tokens / 8)).
#include "plugins/linear/best.cuh"
#include "plugins/linear/unpack.cuh"

struct GemvArguments {
  const void* x;           // [tokens, k] T
  const uint4* weights;    // [row tiles][k / inputs of 16 bytes a lane][32 lanes]
  const void* scales;      // [row tiles][chunks][8][groups of a chunk][2] half; one a row: [n, padded] float
  void* y;                 // [tokens, n] T or float
  uint2* best;             // float y: [tokens, 16 TILES / 32 a block of the grid's x] (value, row); or null
  int32_t tokens, n, k;
};

namespace linear {

constexpr int GEMV_WARPS = 8, GEMV_COLUMNS = 8;

// One tile's codes and scales of one chunk, in a lane.
template <int BITS, int GROUP>
struct Piece {
  static constexpr int VECTORS = CHUNK<BITS, GROUP> / STEP / VECTOR_STEPS<BITS>;
  static constexpr int GROUPS = GROUP ? CHUNK<BITS, GROUP> / GROUP : 0;
  uint32_t words[VECTORS][4];
  uint32_t scale_word;  // of the chunk's 8 GROUPS words the lane-th: each is read once, and lanes exchange them

  // From a lane's first codes and scales of tile 0; tiles are `step` chunks apart.
  DEVICE void load(const uint4* codes, const uint32_t* scales, int tile, int step, bool wanted) {
    codes += static_cast<int64_t>(step) * (tile * VECTORS * 32);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (!wanted) continue;
      const uint4 w = ptx::load_once(codes + v * 32);
      words[v][0] = w.x, words[v][1] = w.y, words[v][2] = w.z, words[v][3] = w.w;
    }
    if (GROUP != 0 && wanted && threadIdx.x % 32 < 8 * GROUPS)
      scale_word = __ldg(scales + static_cast<int64_t>(step) * (tile * 8 * GROUPS));
  }
  // Of rows g and g + 8.
  DEVICE float2 scales(int g, int group) const {
    return ::unpack<half>(__shfl_sync(~0u, scale_word, g * GROUPS + group));
  }
};

// A lane's inputs of a chunk: of every 32, the eight from 8q on of token g.
template <int INPUTS>
struct Inputs {
  uint4 words[INPUTS / 32];

  template <class T>
  DEVICE void load(const T* source) {
#pragma unroll
    for (int i = 0; i < INPUTS / 32; ++i) words[i] = __ldg(reinterpret_cast<const uint4*>(source) + 4 * i);
  }
};

// total += tile's chunk * inputs.
template <class T, int BITS, int GROUP>
DEVICE void multiply_piece(float (&total)[4], const Piece<BITS, GROUP>& piece,
                           const Inputs<CHUNK<BITS, GROUP>>& inputs) {
  constexpr int steps = CHUNK<BITS, GROUP> / STEP, group_steps = GROUP ? GROUP / STEP : steps;
  float sum[4];
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    uint32_t a[4];
    unpack_step<T, BITS>(piece.words[step / VECTOR_STEPS<BITS>], step % VECTOR_STEPS<BITS>, a);
    const uint4 b = inputs.words[step / 2];
    const uint32_t low = step % 2 ? b.z : b.x, high = step % 2 ? b.w : b.y;
    if constexpr (GROUP == 0) {
      ptx::mma<T>(total, a, low, high, total);
    } else {
      if (step % group_steps == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0;
      ptx::mma<T>(sum, a, low, high, sum);
      if (step % group_steps == group_steps - 1) {
        const float2 scale = piece.scales(threadIdx.x % 32 / 4, step / group_steps);
        total[0] += scale.x * sum[0], total[1] += scale.x * sum[1];
        total[2] += scale.y * sum[2], total[3] += scale.y * sum[3];
      }
    }
  }
}

// The 8 warps' sums of the block's rows, added and scaled, to y, and the best of every 32 rows.
template <int GROUP, int TILES, class Y>
DEVICE void finish(const GemvArguments& a, const float (&totals)[TILES][4], int token0, int tokens, int row0) {
  SHARED_MEMORY(memory);
  constexpr int rows = TILES * TILE_ROWS, pitch = rows + 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  float* sums = reinterpret_cast<float*>(memory);  // [warps][tokens][pitch]
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 2 * q + i % 2, row = tile * TILE_ROWS + g + i / 2 * 8;
      if (column < tokens) sums[(warp * tokens + column) * pitch + row] = totals[tile][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tokens * rows; i += GEMV_WARPS * 32) {
    const int column = i / rows, row = i % rows, output = row0 + row;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < GEMV_WARPS; ++w) sum += sums[(w * tokens + column) * pitch + row];
    const bool real = output < a.n;
    if (GROUP == 0 && real) sum *= __ldg(static_cast<const float*>(a.scales) + output);
    const int64_t token = token0 + column;
    if (real) static_cast<Y*>(a.y)[token * a.n + output] = from_float<Y>(sum);
    if constexpr (sizeof(Y) == sizeof(float)) {
      static_assert(rows % 32 == 0, "a warp's lanes have the same token");
      Best best;
      best.take(real ? sum : -INFINITY, output);
      best.reduce();
      if (lane == 0)
        a.best[token * (gridDim.x * (rows / 32)) + blockIdx.x * (rows / 32) + row / 32] =
            make_uint2(bits<uint32_t>(best.value), best.row);
    }
  }
}

}  // namespace linear

template <class T, int BITS, int GROUP, int TILES, class Y>
DEVICE void gemv(const GemvArguments& a) {
  using namespace linear;
  constexpr int chunk_inputs = CHUNK<BITS, GROUP>;
  using Tile = Piece<BITS, GROUP>;
  constexpr int ahead = 4 / Tile::VECTORS, depth = ahead < TILES ? ahead : TILES;  // about 2 KiB a warp
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int token0 = blockIdx.y * GEMV_COLUMNS, tokens = min(a.tokens - token0, GEMV_COLUMNS);
  const int tile0 = blockIdx.x * TILES, tiles = min((a.n + TILE_ROWS - 1) / TILE_ROWS - tile0, TILES);
  const int chunks = a.k / chunk_inputs;
  const T* x = static_cast<const T*>(a.x) + static_cast<int64_t>(token0 + g) * a.k + warp * chunk_inputs + 8 * q;

  Tile pieces[depth] = {};
  Inputs<chunk_inputs> inputs = {};
  float totals[TILES][4] = {};
  const int64_t first = static_cast<int64_t>(tile0) * chunks + warp;
  const uint4* codes = a.weights + first * (Tile::VECTORS * 32) + lane;
  const uint32_t* scales = static_cast<const uint32_t*>(a.scales) + first * (8 * Tile::GROUPS) + lane;
#pragma unroll
  for (int tile = 0; tile < depth; ++tile)
    pieces[tile].load(codes, scales, tile, chunks, warp < chunks && tile < tiles);
  if (warp < chunks && g < tokens) inputs.load(x);

  for (int chunk = warp; chunk < chunks; chunk += GEMV_WARPS) {
    const bool more = chunk + GEMV_WARPS < chunks;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      multiply_piece<T, BITS, GROUP>(totals[tile], pieces[tile % depth], inputs);
      if (tile + depth == TILES) codes += GEMV_WARPS * Tile::VECTORS * 32, scales += GEMV_WARPS * 8 * Tile::GROUPS;
      const int next = (tile + depth) % TILES;
      pieces[tile % depth].load(codes, scales, next, chunks, next < tiles && (tile + depth < TILES || more));
    }
    x += GEMV_WARPS * chunk_inputs;
    if (more && g < tokens) inputs.load(x);
  }
  finish<GROUP, TILES, Y>(a, totals, token0, tokens, tile0 * TILE_ROWS);
}
