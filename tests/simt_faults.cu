// A correct kernel with one error planted at a time, for the emulator's tests (test_simt.py).
//
// Every block of 128 threads loads four tiles through two stages of shared memory, passes the result through ldmatrix,
// writes it, sums a row of x and counts itself. Shared memory ends with the 128 floats of the sum.

enum Fault {
  NONE,
  // The sum.
  MISSING_BARRIER, DIVERGENT_BARRIER, LANE_LEAVES, THREAD_LEAVES, MISSING_SYNCWARP, MASK_WITHOUT_SELF,
  SHUFFLE_OUTSIDE_MASK, DIFFERENT_COLLECTIVES, WRITTEN_WHILE_WARP_READS, WRITTEN_WHILE_BLOCK_READS, BYTE_BEFORE_WORD,
  BYTE_AFTER_WORD, SHARED_READ_PAST_END, SHARED_WRITE_PAST_END,
  // The tiles.
  NEVER_WAITED, COPIES_IN_FLIGHT, WAITED_FOR_TOO_FEW, MISSING_BARRIER_AFTER_WAIT, MISSING_BARRIER_BEFORE_REFILL,
  MISALIGNED_COPY,
  // ldmatrix.
  MISALIGNED_ROW, NOT_SWIZZLED,
  // Global memory.
  TWO_THREADS_ONE_WORD, TWO_BLOCKS_ONE_WORD, READ_OF_EARLIER_BLOCK, READ_OF_LATER_BLOCK, ATOMIC_AND_PLAIN,
  READ_PAST_END, WRITE_PAST_END, MISALIGNED_VECTOR,
};

constexpr int TILES = 4, STAGES = 2;

struct FaultyArguments {
  const float* x;      // [blocks, THREADS]
  const uint4* tiles;  // [blocks, TILES, THREADS]
  uint4* out;          // [blocks, THREADS]
  float* sums;         // [blocks]
  int* count;
  int fault;
};

DEVICE int block_number() { return (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x; }

// The tiles' sum, as each thread's right neighbour in the next warp loaded it.
template <int THREADS>
DEVICE uint4 sum_tiles(const FaultyArguments& a, uint4* staging) {
  const int t = threadIdx.x;
  const uint4* tiles = a.tiles + block_number() * TILES * THREADS + t;
  const int shift = a.fault == MISALIGNED_COPY && t == 70 ? 8 : 0;
  for (int i = 0; i < STAGES; ++i) {
    ptx::copy_async(reinterpret_cast<unsigned char*>(staging + i * THREADS + t) + shift, tiles + i * THREADS);
    ptx::commit_copies();
  }
  uint4 sum = make_uint4(0, 0, 0, 0);
  for (int i = 0; i < TILES; ++i) {
    if (a.fault == WAITED_FOR_TOO_FEW)
      ptx::wait_copies<STAGES>();
    else if (a.fault != NEVER_WAITED)
      ptx::wait_copies<STAGES - 1>();
    if (a.fault != MISSING_BARRIER_AFTER_WAIT) __syncthreads();
    const uint4 x = staging[i % STAGES * THREADS + (t + 32) % THREADS];
    sum = make_uint4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    if (a.fault != MISSING_BARRIER_BEFORE_REFILL) __syncthreads();
    if (i + STAGES < TILES) ptx::copy_async(staging + i % STAGES * THREADS + t, tiles + (i + STAGES) * THREADS);
    ptx::commit_copies();
  }
  if (a.fault == WAITED_FOR_TOO_FEW) ptx::wait_copies<0>();
  if (a.fault == COPIES_IN_FLIGHT) {
    ptx::copy_async(staging + t, tiles);
    ptx::commit_copies();
  }
  return sum;
}

// x as a matrix of 32 rows of 8 pieces of 16 bytes, of which a warp reads two columns of pieces: the first registers of
// both ldmatrix.
DEVICE uint4 through_matrices(const FaultyArguments& a, unsigned char* matrix, uint4 x) {
  const int t = threadIdx.x, lane = t % 32, piece = 2 * (t / 32);
  const bool swizzled = a.fault != NOT_SWIZZLED;
  auto place = [&](int row, int column) { return matrix + row * 128 + (swizzled ? column ^ row % 8 : column) * 16; };
  *reinterpret_cast<uint4*>(place(t / 4, t % 4)) = x;
  *reinterpret_cast<uint4*>(place(t / 4, t % 4 + 4)) = make_uint4(x.w, x.z, x.y, x.x);
  __syncthreads();
  uint32_t left[4], right[4];
  ptx::ldmatrix(left, place(lane, piece) + (a.fault == MISALIGNED_ROW && t == 40 ? 8 : 0));
  ptx::ldmatrix_transposed(right, place(lane, piece + 1));
  __syncthreads();
  return make_uint4(left[0], left[3], right[0], right[3]);
}

DEVICE float sum_warp(const FaultyArguments& a, float* s) {
  const int t = threadIdx.x;
  for (int step = 16; step >= 8; step /= 2) {
    if (t < step) s[t] += s[t + step];
    if (a.fault != MISSING_SYNCWARP) __syncwarp();
  }
  if (a.fault == LANE_LEAVES && t == 5) return 0;
  float sum = s[t % 8];
  if (a.fault == WRITTEN_WHILE_WARP_READS && t == 31) s[t % 8] = 0;
  if (a.fault == DIFFERENT_COLLECTIVES && t < 16) return static_cast<float>(__ballot_sync(~0u, sum > 0));
  if (a.fault == SHUFFLE_OUTSIDE_MASK)
    return t < 16 ? __shfl_xor_sync(0xffffu, sum, 16) : __shfl_xor_sync(0xffff0000u, sum, 16);
  for (int step = 4; step; step /= 2)
    sum += __shfl_xor_sync(a.fault == MASK_WITHOUT_SELF ? 0xffffu : ~0u, sum, step);
  return sum;
}

template <int THREADS>
DEVICE void sum_block(const FaultyArguments& a, float* s) {
  const int t = threadIdx.x;
  s[t + (a.fault == SHARED_WRITE_PAST_END)] = a.x[block_number() * THREADS + t + (a.fault == READ_PAST_END)];
  if (a.fault == THREAD_LEAVES && t == 77) return;
  if (a.fault != MISSING_BARRIER) __syncthreads();
  if (a.fault == BYTE_BEFORE_WORD && t == 0) reinterpret_cast<unsigned char*>(s + 36)[3] = 0;
  for (int step = 64; step >= 32; step /= 2) {
    if (t < step) s[t] += s[t + step + (a.fault == SHARED_READ_PAST_END && step == 64)];
    if (a.fault == BYTE_AFTER_WORD && t == 64 && step == 64) reinterpret_cast<unsigned char*>(s)[3] = 0;
    if (a.fault != DIVERGENT_BARRIER || t < 64) __syncthreads();
  }
  if (a.fault == WRITTEN_WHILE_BLOCK_READS) {
    const float read = s[100];
    __syncwarp();
    if (t == THREADS - 1) s[100] = read + 1;
  }
  if (t >= 32) return;
  float sum = sum_warp(a, s);
  if (t) return;
  if (a.fault == READ_OF_EARLIER_BLOCK && block_number() == 3) sum += a.sums[1];
  if (a.fault == READ_OF_LATER_BLOCK && block_number() == 1) sum += a.sums[3];
  a.sums[block_number() + (a.fault == WRITE_PAST_END)] = sum;
  if (a.fault == TWO_BLOCKS_ONE_WORD && block_number() == 3) a.sums[2] = sum;
}

template <int THREADS>
DEVICE void faulty(const FaultyArguments& a) {
  SHARED_MEMORY(shared);
  const int t = threadIdx.x;
  const uint4 x = sum_tiles<THREADS>(a, reinterpret_cast<uint4*>(shared));
  __syncthreads();
  const uint4 y = through_matrices(a, shared, x);
  uint4* out = a.out + block_number() * THREADS;
  out[t] = y;
  if (a.fault == TWO_THREADS_ONE_WORD && t == 64) out[3] = y;
  if (a.fault == MISALIGNED_VECTOR && t == 9) *reinterpret_cast<uint4*>(reinterpret_cast<uint32_t*>(out) + 1) = y;
  atomicAdd(a.count, 1);
  if (a.fault == ATOMIC_AND_PLAIN && t == 8) *a.count = 0;
  sum_block<THREADS>(a, reinterpret_cast<float*>(shared + STAGES * THREADS * 16));
}
