// Every function of the device language on many inputs, for test_simt_numbers.py: arithmetic of numbers.h and fragments
// of ptx.h by element type, and bits, warps, atomics and copies.

struct NumberArguments {
  const uint32_t* a;  // [n]
  const uint32_t* b;
  const uint32_t* c;
  uint32_t* out;             // [9, n]
  const uint32_t* operands;  // [32 lanes, 4 of a, 2 of b, 4 of c]
  float* products;           // [32, 4]
  const uint4* matrix;       // [32], a row of eight 16-bit values each
  uint32_t* fragments;       // [2, 32, 4]: as they are, transposed
  int n;
};

template <class T>
DEVICE void write_arithmetic(const NumberArguments& s, int i) {
  const uint32_t a = s.a[i], b = s.b[i], c = s.c[i];
  const float2 pair = unpack<T>(a);
  const float x = __uint_as_float(b), y = __uint_as_float(c);
  const uint32_t results[] = {add<T>(a, b),
                              subtract<T>(a, b),
                              multiply<T>(a, b),
                              multiply_add<T>(a, b, c),
                              pack<T>(x, y),
                              twice(from_float<T>(y)),
                              __float_as_uint(pair.x),
                              __float_as_uint(pair.y),
                              __float_as_uint(to_float(bits<T>(static_cast<uint16_t>(b))))};
#pragma unroll
  for (int k = 0; k < 9; ++k) s.out[k * s.n + i] = results[k];
}

template <class T>
DEVICE void write_fragments(const NumberArguments& s, uint4* rows) {
  const int lane = threadIdx.x % 32;
  const uint32_t* o = s.operands + 10 * lane;
  const uint32_t a[4] = {o[0], o[1], o[2], o[3]};
  const float c[4] = {__uint_as_float(o[6]), __uint_as_float(o[7]), __uint_as_float(o[8]), __uint_as_float(o[9])};
  float d[4];
  ptx::mma<T>(d, a, o[4], o[5], c);
#pragma unroll
  for (int k = 0; k < 4; ++k) s.products[4 * lane + k] = d[k];
  uint4* row = rows + 5 * lane % 32;  // so that an address of another lane shows
  *row = s.matrix[lane];
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix(r, row);
#pragma unroll
  for (int k = 0; k < 4; ++k) s.fragments[4 * lane + k] = r[k];
  ptx::ldmatrix_transposed(r, row);
#pragma unroll
  for (int k = 0; k < 4; ++k) s.fragments[128 + 4 * lane + k] = r[k];
}

template <class T>
DEVICE void numbers(const NumberArguments& s) {
  SHARED_MEMORY(shared);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < s.n) write_arithmetic<T>(s, i);
  if (i < 32) write_fragments<T>(s, reinterpret_cast<uint4*>(shared));
}

struct IntegerArguments {
  const uint32_t* a;  // [n], n a multiple of the block
  const uint32_t* b;
  const uint32_t* c;
  uint32_t* out;      // [24, n]
  const uint4* rows;  // [n]
  uint4* copied;      // [n]
  int* count;         // [256]: in shared memory first
  unsigned* most;     // [2]: unsigned and int
  float* total;
  int n;
};

template <int THREADS>
DEVICE void integers(const IntegerArguments& s) {
  SHARED_MEMORY(shared);
  const int t = threadIdx.x, i = blockIdx.x * THREADS + t;
  const uint32_t a = s.a[i], b = s.b[i], c = s.c[i];
  const float x = __uint_as_float(a), y = __uint_as_float(b);
  const int signed_a = static_cast<int>(a), signed_b = static_cast<int>(b);
  const uint32_t results[] = {__byte_perm(a, b, c),
                              static_cast<uint32_t>(__popc(a)),
                              static_cast<uint32_t>(__ffs(signed_a)),
                              static_cast<uint32_t>(__clz(signed_a)),
                              static_cast<uint32_t>(__float2int_rn(x)),
                              ptx::lop3<0x96>(a, b, c),
                              ptx::lop3<0xEA>(a, b, c),
                              ptx::lop3<0xCA>(a, b, c),
                              ptx::lop3<0x1B>(a, b, c),
                              __shfl_up_sync(~0u, a, 3),
                              __shfl_down_sync(~0u, a, 5),
                              __shfl_xor_sync(~0u, a, 21),
                              __shfl_sync(~0u, a, b % 64),
                              __ballot_sync(~0u, a % 3 == 0),
                              static_cast<uint32_t>(__any_sync(~0u, a % 32 == 0)),
                              static_cast<uint32_t>(__all_sync(~0u, a % 32 != 0)),
                              static_cast<uint32_t>(min(signed_a, signed_b)),
                              max(a, b),
                              __float_as_uint(ptx::minimum(x, y)),
                              __float_as_uint(fminf(x, y)),
                              __float_as_uint(fmaxf(x, y)),
                              __float_as_uint(__shfl_xor_sync(~0u, x, 1)),
                              __float_as_uint(ptx::exp2(static_cast<float>(signed_a) * 0x1p-25f)),
                              __float_as_uint(ptx::log2(static_cast<float>(a % 0xffffff + 1)))};
#pragma unroll
  for (int k = 0; k < 24; ++k) s.out[k * s.n + i] = results[k];

  uint4* rows = reinterpret_cast<uint4*>(shared);
  int* count = reinterpret_cast<int*>(rows + THREADS);
  count[t] = count[t + THREADS] = 0;
  ptx::copy_async(rows + t, a % 2 ? s.rows + i : nullptr, a % 2);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  __syncthreads();
  s.copied[i] = rows[(t + 1) % THREADS];
  atomicAdd(count + a % 256, 1);
  atomicMax(s.most, a);
  atomicMax(reinterpret_cast<int*>(s.most) + 1, signed_a);
  atomicAdd(s.total, static_cast<float>(a % 16));
  __syncthreads();
  atomicAdd(s.count + t, count[t]);
  atomicAdd(s.count + t + THREADS, count[t + THREADS]);
}
