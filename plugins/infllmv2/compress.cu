// Averages keys into compressed keys: every window whose last token is among the step's new tokens (spec:
// infllmv2.md 3.2, 3.3), but none of a tree. Fine windows have 32 tokens and end every 16, coarse ones have 128 and end
// every 64.
//
// Grid: (new tokens / tokens_per_block, KV heads, 2: fine, coarse), whatever the positions are; a block looks for
// window ends among its tokens and mostly finds none. A window is read 16 bytes a thread: D / PIECE threads take one
// key, the block's other threads the keys after it; the float32 sums meet in shared memory and are rounded once.
//
// Keys: rows [64][D] of plane `plane` of the pages, of type T or bytes of value + 128 with a scale for each token.
#pragma once
#include "plugins/infllmv2/step.cuh"

namespace infllmv2 {

constexpr int COMPRESS_THREADS = 128;

struct CompressArguments {
  const void* kv_pool;      // [pages, planes, Hkv, 64 * D]
  const float* kv_scales;   // [pages, planes, Hkv, 64], for bytes
  void* c1_pool;            // [pages, Hkv, 4, D] of T
  void* c2_pool;            // [pages, Hkv, 1, D] of T
  const int* slots;         // [tokens] where in its sequence's pages each is
  const int* query_start;   // [sequences + 1]
  const int* page_table;    // [sequences, table_width]
  const int* key_table;     // [sequences, table_width]: as page_table, but pages of kv_pool; they may lie elsewhere
  const int* tree_start;    // [sequences]: the slot at which its tree begins; 2^31 - 1: it has none
  int tokens, sequences, table_width, kv_heads, planes, plane, tokens_per_block;
};

// Adds the values in 16 bytes to `total`; bytes hold value / scale + 128.
template <class T>
DEVICE void add_piece(float (&total)[8], uint4 piece, float) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(words[i]);
    total[2 * i] += pair.x;
    total[2 * i + 1] += pair.y;
  }
}
template <class T>
DEVICE void add_piece(float (&total)[16], uint4 piece, float scale) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int byte = words[i / 4] >> (8 * (i % 4)) & 255;
    total[i] += static_cast<float>(byte - 128) * scale;
  }
}

// This thread's share of the sums over tokens [begin, end): every ROWS-th key, from key `row` on; `pages` of kv_pool.
template <class T, class KV, int D, int PIECE>
DEVICE void add_keys(const CompressArguments& a, const int* pages, int begin, int end, float (&total)[PIECE]) {
  constexpr int LANES = D / PIECE, ROWS = COMPRESS_THREADS / LANES;
  const int piece = threadIdx.x % LANES, row = threadIdx.x / LANES;
  const int heads = a.planes * a.kv_heads, head = a.plane * a.kv_heads + blockIdx.y;  // of a page, over all planes
#pragma unroll 4
  for (int token = begin + row; token < end; token += ROWS) {
    const int64_t key = (static_cast<int64_t>(pages[token / PAGE]) * heads + head) * PAGE + token % PAGE;
    const KV* keys = static_cast<const KV*>(a.kv_pool) + key * D + piece * PIECE;
    add_piece<T>(total, __ldg(reinterpret_cast<const uint4*>(keys)), sizeof(KV) == 1 ? a.kv_scales[key] : 1.0f);
  }
}

// The average of the window of `window` tokens that ends with token `last`, into `slot` of its page in `pool`. Which
// page that is, is looked up in the end: the sums need the registers.
template <class T, class KV, int D>
DEVICE void average(const CompressArguments& a, int64_t table_row, int last, int window, T* pool, int slots, int slot) {
  constexpr int PIECE = 16 / sizeof(KV), LANES = D / PIECE, ROWS = COMPRESS_THREADS / LANES;
  SHARED_MEMORY(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [ROWS][D]
  float total[PIECE] = {};
  add_keys<T, KV, D>(a, a.key_table + table_row, last + 1 - window, last + 1, total);
#pragma unroll
  for (int i = 0; i < PIECE; i += 4)
    reinterpret_cast<float4*>(sums)[(threadIdx.x * PIECE + i) / 4] =
        make_float4(total[i], total[i + 1], total[i + 2], total[i + 3]);
  __syncthreads();
  if (threadIdx.x < D) {
    float sum = 0;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) sum += sums[row * D + threadIdx.x];
    const int64_t page = static_cast<int64_t>(a.page_table[table_row + last / PAGE]) * a.kv_heads + blockIdx.y;
    pool[(page * slots + slot) * D + threadIdx.x] = from_float<T>(sum / static_cast<float>(window));
  }
  __syncthreads();
}

// T: the compressed keys' type; KV: the keys' type in the pages, T or uint8_t.
template <class T, class KV, int D>
DEVICE void compress(const CompressArguments& a) {
  const bool coarse = blockIdx.z == 1;
  const int slots = coarse ? COARSE_SLOTS : FINE_SLOTS, stride = PAGE / slots;
  T* pool = static_cast<T*>(coarse ? a.c2_pool : a.c1_pool);
  const int first = blockIdx.x * a.tokens_per_block;
  for (int token = first; token < min(first + a.tokens_per_block, a.tokens); ++token) {
    const int last = a.slots[token];
    if ((last + 1) % stride != 0 || last + 1 < 2 * stride) continue;
    const int sequence = sequence_of(a.query_start, a.sequences, token);
    if (sequence == a.sequences || last >= a.tree_start[sequence]) continue;
    const int64_t table_row = static_cast<int64_t>(sequence) * a.table_width;
    average<T, KV, D>(a, table_row, last, 2 * stride, pool, slots, last % PAGE / stride);
  }
}

}  // namespace infllmv2
