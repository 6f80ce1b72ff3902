// RoPE, and the new keys and values into their pages.
//
// A page has 64 tokens of every KV head, plane by plane: keys [64][D]; values transposed, [D][64], so that attention
// multiplies by 16 contiguous bytes of tokens; with use_nope also the keys before rotation, [64][D]. The KV type is T,
// or a byte u: value = (u - 128) * scale, with a float32 scale for each token and head of a plane.
//
// A warp takes one head of one token: query heads (rotated, to `q`), then keys, then values. A lane has elements
// lane + 32 i of both halves of the head. A value goes to D places 64 elements apart: in a decode step these are few;
// in prefill the L2 cache joins what neighbouring tokens write to a sector.
// Grid: (ceil(tokens * (heads + 2 KV heads) / WARPS)).
#include "plugins/paged_attention/page.cuh"
#include "plugins/simt/device.h"

namespace attention {

struct AppendArguments {
  const uint16_t* qkv;    // [tokens, heads + 2 KV heads, D] T, before rotation
  const float* cos;       // [tokens, D / 2]
  const float* sin;       // [tokens, D / 2]
  uint16_t* q;            // [tokens, heads, D] T
  uint8_t* kv_pool;       // [pages, planes, KV heads, 64 * D] KV
  float* kv_scales;       // [pages, planes, KV heads, 64]; only with bytes
  const int* slots;       // [tokens] where in its sequence's pages each goes
  const int* query_start; // [sequences + 1]
  const int* page_table;  // [sequences, table_width]
  int tokens, sequences, table_width, heads, kv_heads, planes;
};

// A lane's part of a head: values[i] is element lane + 32 i.
template <int D>
using Head = float[D / 32];

// Half rotation: elements c and c + D / 2 turn by angle c. Rounded to T once.
template <class T, int D>
DEVICE void rotate(Head<D>& x, const float* cos, const float* sin) {
  constexpr int HALF = D / 64;  // of a lane's elements
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    const int c = threadIdx.x % 32 + 32 * i;
    const float first = x[i], second = x[i + HALF];
    x[i] = to_float(from_float<T>(first * cos[c] - second * sin[c]));
    x[i + HALF] = to_float(from_float<T>(second * cos[c] + first * sin[c]));
  }
}

template <class T, int D>
DEVICE void store(T* pool, float*, const Place& place, const Head<D>& x) {
#pragma unroll
  for (int i = 0; i < D / 32; ++i) pool[place.start + (threadIdx.x % 32 + 32 * i) * place.step] = from_float<T>(x[i]);
}

// The largest magnitude of the head becomes 127 steps.
template <class T, int D>
DEVICE void store(uint8_t* pool, float* scales, const Place& place, const Head<D>& x) {
  float most = 0;
#pragma unroll
  for (int i = 0; i < D / 32; ++i) most = fmaxf(most, fabsf(x[i]));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  const float steps = most > 0 ? 127.0f / most : 0.0f;
#pragma unroll
  for (int i = 0; i < D / 32; ++i)
    pool[place.start + (threadIdx.x % 32 + 32 * i) * place.step] =
        static_cast<uint8_t>(128 + max(-127, min(127, __float2int_rn(x[i] * steps))));
  if (threadIdx.x % 32 == 0) scales[place.scale] = most / 127.0f;
}

// The sequence of a token.
DEVICE int sequence_of_token(const AppendArguments& a, int token) {
  int sequence = 0;
  while (sequence + 1 < a.sequences && a.query_start[sequence + 1] <= token) ++sequence;
  return sequence;
}

template <class T, int D, class KV, int WARPS>
DEVICE void append(const AppendArguments& a) {
  const int lane = threadIdx.x % 32, rows = a.heads + 2 * a.kv_heads;
  const int item = blockIdx.x * WARPS + threadIdx.x / 32, token = item / rows, head = item % rows;
  if (token >= a.tokens) return;
  const T* source = reinterpret_cast<const T*>(a.qkv) + static_cast<int64_t>(item) * D;
  Head<D> x;
#pragma unroll
  for (int i = 0; i < D / 32; ++i) x[i] = to_float(source[lane + 32 * i]);

  const int64_t angles = static_cast<int64_t>(token) * (D / 2);
  const float *cos = a.cos + angles, *sin = a.sin + angles;
  if (head < a.heads) {
    rotate<T, D>(x, cos, sin);
    T* q = reinterpret_cast<T*>(a.q) + (static_cast<int64_t>(token) * a.heads + head) * D;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) q[lane + 32 * i] = from_float<T>(x[i]);
    return;
  }
  const int in_sequence = a.slots[token], slot = in_sequence % PAGE;
  const int* pages = a.page_table + static_cast<int64_t>(sequence_of_token(a, token)) * a.table_width;
  const int page = pages[in_sequence / PAGE];
  KV* pool = reinterpret_cast<KV*>(a.kv_pool);
  const auto place = [&](int plane, int kv_head) {
    return place_of<D>(page, a.planes, plane, a.kv_heads, kv_head, slot);
  };
  const bool is_key = head < a.heads + a.kv_heads;
  const int kv_head = head - a.heads - (is_key ? 0 : a.kv_heads);
  if (is_key) {
    if (a.planes > PLAIN_KEYS) store<T, D>(pool, a.kv_scales, place(PLAIN_KEYS, kv_head), x);
    rotate<T, D>(x, cos, sin);
  }
  store<T, D>(pool, a.kv_scales, place(is_key ? KEYS : VALUES, kv_head), x);
}

}  // namespace attention
