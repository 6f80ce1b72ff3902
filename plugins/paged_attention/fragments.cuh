// Keys and values as mma operands, straight from a page of global memory (page layout: append.cu).
//
// The order of mma's k is free where both operands agree on it, so a lane reads 16 contiguous bytes: lane 4g + q holds
// bytes 16q .. 16q + 15 of each 64 of row g. A span is what four lanes cover: 32 elements of 16 bits, 64 of 8 bits.
// Score tile t of a span has 8 keys as columns; column n is key PER_LOAD * (n / 2) + 2 * t + n % 2 of the span. With
// that order the probabilities lie where the product with the values (rows of 64 tokens) wants them.
#pragma once
#include "plugins/paged_attention/page.cuh"
#include "plugins/simt/device.h"

namespace attention {

template <bool CONDITION, class A, class B>
struct Choose {
  using type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using type = B;
};

// KV: T, or uint8_t for value / scale + 128. Bytes are multiplied as halves, whatever T is.
template <class T, class KV>
struct Layout {
  static constexpr bool BYTES = sizeof(KV) == 1;
  static constexpr int PER_LOAD = 16 / sizeof(KV), SPAN = 4 * PER_LOAD, SPANS = PAGE / SPAN;
  static constexpr int STEPS = PER_LOAD / 4;       // mma steps in 16 bytes
  static constexpr int SPAN_TILES = PER_LOAD / 2;  // score tiles of a span
  using Operand = typename Choose<BYTES, half, T>::type;
};

// A byte u as the half 1024 + u, which is value / scale + BYTE_OFFSET.
constexpr float BYTE_OFFSET = 1024 + 128;
DEVICE uint32_t low_bytes(uint32_t word) { return __byte_perm(word, 0x64646464u, 0x4140); }
DEVICE uint32_t high_bytes(uint32_t word) { return __byte_perm(word, 0x64646464u, 0x4342); }

// The B registers of step `step` of a lane's 16 bytes.
template <bool BYTES>
DEVICE void operand_pair(const uint4& words, int step, uint32_t& b0, uint32_t& b1) {
  if constexpr (BYTES) {
    const uint32_t word = step == 0 ? words.x : step == 1 ? words.y : step == 2 ? words.z : words.w;
    b0 = low_bytes(word);
    b1 = high_bytes(word);
  } else {
    b0 = step == 0 ? words.x : words.z;
    b1 = step == 0 ? words.y : words.w;
  }
}

// The key of a span that is column `n` of score tile `t`.
template <class L>
DEVICE int key_of(int t, int n) {
  return L::PER_LOAD * (n / 2) + 2 * t + n % 2;
}

// Keeps the first `end` of eight 16-bit values; the others were never written and may be anything.
DEVICE void zero_after(uint4& words, int end) {
  uint32_t* word[4] = {&words.x, &words.y, &words.z, &words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int left = end - 2 * i;
    *word[i] &= left >= 2 ? ~0u : left == 1 ? 0xffffu : 0u;
  }
}

}  // namespace attention
