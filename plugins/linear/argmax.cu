// The token of each row of logits, from the best of every 32 that gemv.cu left: one block a row.
#include "plugins/linear/best.cuh"

struct ArgmaxArguments {
  const uint2* best;  // [rows, parts] (value, token)
  int32_t* token;     // [rows]
  int32_t parts;
};

template <int THREADS>
DEVICE void argmax(const ArgmaxArguments& a) {
  SHARED_MEMORY(memory);
  linear::Best* warps = reinterpret_cast<linear::Best*>(memory);
  linear::Best best;
  for (int i = threadIdx.x; i < a.parts; i += THREADS) {
    const uint2 part = a.best[static_cast<int64_t>(blockIdx.x) * a.parts + i];
    best.take(bits<float>(part.x), part.y);
  }
  best.reduce();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 1; warp < THREADS / 32; ++warp) best.take(warps[warp].value, warps[warp].row);
    a.token[blockIdx.x] = best.row;
  }
}
