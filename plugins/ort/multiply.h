// A small matrix product for tiles that fit the caches: float32 sums of float32 or bfloat16 products, int32 sums of bytes'.
#pragma once
#include <cstdint>

#include "plugins/ort/simd.h"

namespace edge {

// What a product does besides, once for every step along K: nothing.
struct Idle {
  void operator()() {}
};

// C[M x N] += A[M x K] B[K x N], row strides lda, ldb, ldc, for one strip of M = MR rows and NV vectors.
// A and B are float, Pair (two neighbours along K in one 32-bit element, so that K counts pairs), or Quad and
// UnsignedQuad (four).
template <int MR, int NV, class A, class B, class C, class Aside>
inline void multiply_strip(const A* a, int64_t lda, const B* b, int64_t ldb, C* c, int64_t ldc, int64_t k_count,
                           Aside& aside) {
  Vector<C> acc[MR][NV];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NV; ++n) acc[m][n] = load(c + m * ldc + n * kWidth);
  for (int64_t k = 0; k < k_count; ++k) {
    aside();
    Vector<B> bv[NV];
    for (int n = 0; n < NV; ++n) bv[n] = load(b + k * ldb + n * kWidth);
    for (int m = 0; m < MR; ++m) {
      const Vector<A> av = splat(a[m * lda + k]);
      for (int n = 0; n < NV; ++n) acc[m][n] = multiply_add<A, B>(av, bv[n], acc[m][n]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NV; ++n) store(c + m * ldc + n * kWidth, acc[m][n]);
}

template <int NV, class A, class B, class C, class Aside>
inline void multiply_columns(const A* a, int64_t lda, const B* b, int64_t ldb, C* c, int64_t ldc, int64_t rows,
                             int64_t k_count, Aside& aside) {
  int64_t m = 0;
  // 8 rows, a common group of query heads, go better as 4 + 4 than as 6 + 2.
  for (; m + 6 <= rows && m + 8 != rows; m += 6)
    multiply_strip<6, NV>(a + m * lda, lda, b, ldb, c + m * ldc, ldc, k_count, aside);
  for (; m + 4 <= rows; m += 4) multiply_strip<4, NV>(a + m * lda, lda, b, ldb, c + m * ldc, ldc, k_count, aside);
  for (; m + 2 <= rows; m += 2) multiply_strip<2, NV>(a + m * lda, lda, b, ldb, c + m * ldc, ldc, k_count, aside);
  for (; m < rows; ++m) multiply_strip<1, NV>(a + m * lda, lda, b, ldb, c + m * ldc, ldc, k_count, aside);
}

// C[rows x columns] += A B; columns is a multiple of 16. `aside` runs along, as to prefetch what comes next.
template <class A, class B, class C, class Aside = Idle>
inline void multiply(const A* a, int64_t lda, const B* b, int64_t ldb, C* c, int64_t ldc, int64_t rows,
                     int64_t columns, int64_t k_count, Aside&& aside = {}) {
  constexpr int kVectors = kWidth == 8 ? 2 : 4;  // 6 x kVectors accumulators fill the register file
  int64_t n = 0;
  for (; n + kVectors * kWidth <= columns; n += kVectors * kWidth)
    multiply_columns<kVectors>(a, lda, b + n, ldb, c + n, ldc, rows, k_count, aside);
  for (; n < columns; n += kWidth) multiply_columns<1>(a, lda, b + n, ldb, c + n, ldc, rows, k_count, aside);
}

}  // namespace edge
