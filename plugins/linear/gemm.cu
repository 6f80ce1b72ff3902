// y = x W^T for many tokens (prefill, tree verification), W packed as plugins/linear/__init__.py says.
//
// A block of 4 warps computes 128 output rows of TOKENS tokens. A warp has two row tiles and multiplies them by all the
// tokens, so that each code becomes a number once: exactly (unpack.cuh), then times its group's scale, rounded to T; a
// scale a row is applied to the float32 sums instead. A stage of 64 (4 bits) or 128 inputs lies in shared memory: x,
// the eight tiles' codes and their scales, all by asynchronous copies two or three stages ahead, because a warp that
// held its next codes in registers would have too few bytes under way at 16 tokens. A lane's B operands are 16
// contiguous bytes of x: two steps' worth. Eight lanes, two tokens, read at a time: odd tokens keep the halves of each
// 128 bytes the other way round, so that they use all banks. The sums leave through shared memory too, 64 contiguous
// bytes of a token at a time. Grid: (ceil(tokens / TOKENS), ceil(n / 128)): blocks of the same rows run together.
#include "plugins/linear/unpack.cuh"

struct GemmArguments {
  const void* x;         // [tokens, k] T
  const uint4* weights;  // [row tiles][k / inputs of 16 bytes a lane][32 lanes]
  const void* scales;    // [row tiles][chunks][8][groups of a chunk][2] half; one a row: [n, padded] float
  void* y;               // [tokens, n] T
  int32_t tokens, n, k;
};

namespace linear {

constexpr int GEMM_WARPS = 4, GEMM_TILES = 2 * GEMM_WARPS;

// What one stage holds, and where.
template <int BITS, int GROUP, int TOKENS>
struct Stage {
  static constexpr int COUNT = TOKENS == 64 ? 3 : 4;
  static constexpr int INPUTS = STEP * VECTOR_STEPS<BITS>;         // 64 (4 bits) or 128 (2 bits)
  static constexpr int SCALE_CHUNK = CHUNK<BITS, GROUP> / INPUTS;  // stages that share their scales
  static constexpr int GROUPS = GROUP == 0 ? 0 : CHUNK<BITS, GROUP> / GROUP;
  static constexpr int X_PITCH = INPUTS * 2, X_BYTES = TOKENS * X_PITCH;
  static constexpr int CODES = X_BYTES, SCALES = CODES + GEMM_TILES * 512, SCALE_BYTES = GROUPS * 32;
  static constexpr int BYTES = SCALES + GEMM_TILES * SCALE_BYTES;
};

// One thread's copies into stages, in order.
template <class T, int BITS, int GROUP, int TOKENS>
struct Copies {
  using S = Stage<BITS, GROUP, TOKENS>;
  static constexpr int PIECES = S::X_PITCH / 16, ROWS = GEMM_WARPS * 32 / PIECES;  // a row's copies, rows at a time
  const T* x;
  const uint4* codes;
  const uint4* scales;
  int64_t x_step, tile_step;
  int x_left, tiles_left, x_target, stage;
  bool has_scales;

  DEVICE explicit Copies(const GemmArguments& a) {
    const int thread = threadIdx.x, row = thread / PIECES, piece = thread % PIECES, stages = a.k / S::INPUTS;
    const int token = blockIdx.x * TOKENS + row, tile = blockIdx.y * GEMM_TILES + thread / 32;
    const int tiles = (a.n + TILE_ROWS - 1) / TILE_ROWS;
    x = static_cast<const T*>(a.x) + static_cast<int64_t>(token) * a.k + piece * 8;
    x_step = static_cast<int64_t>(ROWS) * a.k;
    x_left = a.tokens - token;
    x_target = row * S::X_PITCH + (piece ^ (row % 2 * 4)) * 16;
    codes = a.weights + static_cast<int64_t>(tile) * stages * 32 + thread % 32;
    tile_step = static_cast<int64_t>(GEMM_WARPS) * stages * 32;
    tiles_left = tiles - tile;
    stage = 0;
    if constexpr (GROUP != 0) {
      constexpr int pieces = S::SCALE_BYTES / 16;
      const int scales_tile = blockIdx.y * GEMM_TILES + thread / pieces;
      has_scales = thread < GEMM_TILES * pieces && scales_tile < tiles;
      scales = static_cast<const uint4*>(a.scales) +
               static_cast<int64_t>(scales_tile) * (stages / S::SCALE_CHUNK) * pieces + thread % pieces;
    }
  }

  DEVICE void next(unsigned char* target) {
#pragma unroll
    for (int j = 0; j < TOKENS / ROWS; ++j)
      ptx::copy_async(target + x_target + j * ROWS * S::X_PITCH, x + j * x_step, j * ROWS < x_left);
    x += S::INPUTS;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      ptx::copy_async(target + S::CODES + (j * GEMM_WARPS * 32 + threadIdx.x) * 16, codes + j * tile_step,
                      j * GEMM_WARPS < tiles_left);
    codes += 32;
    if constexpr (GROUP != 0) {
      if (has_scales) ptx::copy_async(target + S::SCALES + threadIdx.x * 16, scales);
      if (++stage % S::SCALE_CHUNK == 0) scales += S::SCALE_BYTES / 16;
    }
  }
};

// Scale of row g (odd = 0) or g + 8 of the two as halves in `pair`, as T in both halves.
template <class T>
DEVICE uint32_t row_scale(uint32_t pair, int odd) {
  if constexpr (Format<T>::mantissa == Format<half>::mantissa) return __byte_perm(pair, 0, odd ? 0x3232 : 0x1010);
  const float2 scales = ::unpack<half>(pair);
  return odd ? pack<T>(scales.y, scales.y) : pack<T>(scales.x, scales.x);
}

// sums += this warp's two tiles * the tokens' inputs of a stage.
template <class T, int BITS, int GROUP, int TOKENS>
DEVICE void multiply_stage(float (&sums)[2][TOKENS / 8][4], const unsigned char* stage, int warp, int lane) {
  using S = Stage<BITS, GROUP, TOKENS>;
  const int g = lane / 4, q = lane % 4;
  const unsigned char* x = stage + g * S::X_PITCH;
  const int even = q * 16 + g % 2 * 64;
  uint32_t words[2][4], scales[2][2][S::GROUPS ? S::GROUPS : 1];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const uint4 w = reinterpret_cast<const uint4*>(stage + S::CODES)[(2 * warp + t) * 32 + lane];
    words[t][0] = w.x, words[t][1] = w.y, words[t][2] = w.z, words[t][3] = w.w;
#pragma unroll
    for (int group = 0; group < S::GROUPS; ++group) {
      const uint32_t* pairs = reinterpret_cast<const uint32_t*>(stage + S::SCALES + (2 * warp + t) * S::SCALE_BYTES);
      const uint32_t pair = pairs[g * S::GROUPS + group];
      scales[t][0][group] = row_scale<T>(pair, 0), scales[t][1][group] = row_scale<T>(pair, 1);
    }
  }
#pragma unroll
  for (int span = 0; span < S::INPUTS / 32; ++span) {
    uint32_t a[2][2][4];  // steps, tiles
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int step = i / 2, t = i % 2;
      unpack_step<T, BITS>(words[t], 2 * span + step, a[step][t]);
      if constexpr (GROUP != 0) {
        const int group = (2 * span + step) * STEP / GROUP % S::GROUPS;
#pragma unroll
        for (int r = 0; r < 4; ++r) a[step][t][r] = multiply<T>(a[step][t][r], scales[t][r % 2][group]);
      }
    }
#pragma unroll
    for (int c = 0; c < TOKENS / 8; ++c) {
      const int offset = c * 8 * S::X_PITCH + span / 2 * 128;
      const uint4 b = *reinterpret_cast<const uint4*>(x + (even ^ (span % 2 * 64)) + offset);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        ptx::mma<T>(sums[t][c], a[0][t], b.x, b.y, sums[t][c]);
        ptx::mma<T>(sums[t][c], a[1][t], b.z, b.w, sums[t][c]);
      }
    }
  }
}

// One warp's sums to y, by way of `memory`, where a token has OUT_PITCH bytes.
constexpr int OUT_PITCH = 2 * TILE_ROWS * 2 + 16;
template <class T, int TOKENS>
DEVICE void store_sums(const GemmArguments& a, const float (&sums)[2][TOKENS / 8][4], unsigned char* memory, int row0,
                       int lane) {
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int c = 0; c < TOKENS / 8; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * c + 2 * q + i % 2, row = t * TILE_ROWS + g + i / 2 * 8;
        *reinterpret_cast<T*>(memory + token * OUT_PITCH + row * 2) = from_float<T>(sums[t][c][i]);
      }
    }
  }
  __syncwarp();
  const int row = row0 + 8 * q, token0 = blockIdx.x * TOKENS;
#pragma unroll
  for (int c = 0; c < TOKENS / 8; ++c) {
    const int token = token0 + 8 * c + g;
    const unsigned char* source = memory + (8 * c + g) * OUT_PITCH + q * 16;
    T* target = static_cast<T*>(a.y) + static_cast<int64_t>(token) * a.n + row;
    if (token < a.tokens && a.n % 8 == 0) {
      if (row < a.n) *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
    } else if (token < a.tokens) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (row + i < a.n) target[i] = reinterpret_cast<const T*>(source)[i];
    }
  }
}

}  // namespace linear

template <class T, int BITS, int GROUP, int TOKENS>
DEVICE void gemm(const GemmArguments& a) {
  using namespace linear;
  using S = Stage<BITS, GROUP, TOKENS>;
  static_assert(GEMM_WARPS * TOKENS * OUT_PITCH <= S::COUNT * S::BYTES, "outputs fit where the stages were");
  SHARED_MEMORY(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, stages = a.k / S::INPUTS;
  const int row0 = blockIdx.y * (GEMM_TILES * TILE_ROWS) + warp * (2 * TILE_ROWS);
  float sums[2][TOKENS / 8][4] = {};
  Copies<T, BITS, GROUP, TOKENS> copies(a);
#pragma unroll
  for (int s = 0; s < S::COUNT - 1; ++s) {
    if (s < stages) copies.next(memory + s * S::BYTES);
    ptx::commit_copies();
  }
  unsigned char *reading = memory, *writing = memory + (S::COUNT - 1) * S::BYTES;
  const auto step_to = [&](unsigned char* stage) {
    return stage == memory + (S::COUNT - 1) * S::BYTES ? memory : stage + S::BYTES;
  };
  for (int s = 0; s < stages; ++s) {
    ptx::wait_copies<S::COUNT - 2>();
    __syncthreads();  // everyone's copies of stage s are here, and its predecessor is free
    if (s + S::COUNT - 1 < stages) copies.next(writing);
    ptx::commit_copies();
    multiply_stage<T, BITS, GROUP, TOKENS>(sums, reading, warp, lane);
    reading = step_to(reading), writing = step_to(writing);
  }
  if constexpr (GROUP == 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + i * 8 + lane / 4;
      const float scale = row < a.n ? __ldg(static_cast<const float*>(a.scales) + row) : 0;
#pragma unroll
      for (int c = 0; c < TOKENS / 8; ++c)
        sums[i / 2][c][i % 2 * 2] *= scale, sums[i / 2][c][i % 2 * 2 + 1] *= scale;
    }
  }
  ptx::wait_copies<0>();
  __syncthreads();
  store_sums<T, TOKENS>(a, sums, memory + warp * (TOKENS * OUT_PITCH), row0, lane);
}
