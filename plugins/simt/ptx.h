// The instructions that CUDA C++ has no word for: each function's first body is the PTX, the second its meaning.
// No other file contains assembly. The compiled text is executed too (interpreter.py), which checks the first bodies.
#pragma once
namespace ptx {

#ifdef __CUDACC_RTC__
DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// d [16 x 8] = a [16 x 16] b [16 x 8] + c for one warp, operands of type T, float32 sums (mma.m16n8k16). Lane
// 4g + q holds a: rows g, g+8, columns 2q,2q+1 then rows g, g+8, columns 2q+8,2q+9; b: rows 2q,2q+1 and 2q+8,2q+9 of
// column g; c, d: columns 2q,2q+1 of row g, then of row g+8. d and c may be the same array.
template <class T>
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]);

#ifdef __CUDACC_RTC__
#define MMA(T, name)                                                                                              \
  template <>                                                                                                     \
  DEVICE void mma<T>(float(&d)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1, const float(&c)[4]) {         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                           \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                                 \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                   "f"(c[3]));                                                                                    \
  }
#else
#define MMA(T, name)                                                                                      \
  template <>                                                                                             \
  DEVICE void mma<T>(float(&d)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1, const float(&c)[4]) { \
    simt::mma<T>(d, a, b0, b1, c);                                                                        \
  }
#endif
MMA(half, "f16")
MMA(bf16, "bf16")
#undef MMA

// Four 8 x 8 matrices of 16-bit values from shared memory: lane l gives the address of row l % 8 of matrix l / 8 and
// receives, of every matrix, columns 2q,2q+1 of row g; transposed: rows 2q,2q+1 of column g.
DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC_RTC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  simt::ldmatrix(r, row, false);
#endif
}
DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC_RTC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  simt::ldmatrix(r, row, true);
#endif
}

// 16 bytes from global to shared memory, asynchronously; zeros if !valid (the source is then not read).
DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
#ifdef __CUDACC_RTC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  simt::copy_async(shared, global, valid ? 16 : 0);
#endif
}
// Ends a group of this thread's copies.
DEVICE void commit_copies() {
#ifdef __CUDACC_RTC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::commit_copies();
#endif
}
// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
DEVICE void wait_copies() {
#ifdef __CUDACC_RTC__
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
  simt::wait_copies(PENDING);
#endif
}

// Any function of three bits, 32 times: bit 4a + 2b + c of TABLE.
template <int TABLE>
DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC_RTC__
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
  return d;
#else
  return simt::lop3(a, b, c, TABLE);
#endif
}

// 2^x and log2 x to about 2 ulp.
DEVICE float exp2(float x) {
#ifdef __CUDACC_RTC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
DEVICE float log2(float x) {
#ifdef __CUDACC_RTC__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}

// The smaller number; not a number if either is none (fminf would return the other).
DEVICE float minimum(float a, float b) {
#ifdef __CUDACC_RTC__
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a != a || a < b ? a : b;
#endif
}

// 16 bytes that are read once: kept out of L1, so that they evict nothing.
DEVICE uint4 load_once(const uint4* p) {
#ifdef __CUDACC_RTC__
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#else
  return *p;
#endif
}

}  // namespace ptx
