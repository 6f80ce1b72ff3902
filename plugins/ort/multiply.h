// A small float32 matrix product for tiles that fit the caches.
#pragma once
#include <cstdint>

#include "plugins/ort/simd.h"

namespace edge {

// C[M x N] += A[M x K] B[K x N], row strides lda, ldb, ldc, for one strip of M <= MR rows and NV vectors.
template <int MR, int NV>
inline void multiply_strip(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                           int64_t k_count) {
  vf acc[MR][NV];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NV; ++n) acc[m][n] = load(c + m * ldc + n * kWidth);
  for (int64_t k = 0; k < k_count; ++k) {
    vf bv[NV];
    for (int n = 0; n < NV; ++n) bv[n] = load(b + k * ldb + n * kWidth);
    for (int m = 0; m < MR; ++m) {
      const vf av = splat(a[m * lda + k]);
      for (int n = 0; n < NV; ++n) acc[m][n] += av * bv[n];
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NV; ++n) store(c + m * ldc + n * kWidth, acc[m][n]);
}

template <int NV>
inline void multiply_columns(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                             int64_t rows, int64_t k_count) {
  int64_t m = 0;
  for (; m + 6 <= rows; m += 6) multiply_strip<6, NV>(a + m * lda, lda, b, ldb, c + m * ldc, ldc, k_count);
  for (; m + 2 <= rows; m += 2) multiply_strip<2, NV>(a + m * lda, lda, b, ldb, c + m * ldc, ldc, k_count);
  for (; m < rows; ++m) multiply_strip<1, NV>(a + m * lda, lda, b, ldb, c + m * ldc, ldc, k_count);
}

// C[rows x columns] += A B; columns is a multiple of 16.
inline void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                     int64_t columns, int64_t k_count) {
  constexpr int kVectors = kWidth == 8 ? 2 : 4;  // 6 x kVectors accumulators fill the register file
  int64_t n = 0;
  for (; n + kVectors * kWidth <= columns; n += kVectors * kWidth)
    multiply_columns<kVectors>(a, lda, b + n, ldb, c + n, ldc, rows, k_count);
  for (; n < columns; n += kWidth) multiply_columns<1>(a, lda, b + n, ldb, c + n, ldc, rows, k_count);
}

}  // namespace edge
