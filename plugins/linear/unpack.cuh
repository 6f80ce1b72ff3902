// Weights in registers: how 16 bytes of packed codes (plugins/linear/__init__.py) become mma's A operand.
//
// One step is 16 inputs of a tile of 16 output rows, in lane 4g + q the pairs of registers a0..a3. Counting pairs over
// the lane's 16 bytes, pair p is field p % (16 / BITS) of both 16-bit halves of word p / (16 / BITS), field f being
// BITS bits from bit f * BITS up. One lop3 ORs a field into the mantissa of 2^10 (half) or 2^7 (bf16), whose last bit
// counts 1; subtracting that power and the code of zero leaves the weight, exactly. A field `shift` bits up counts
// 2^shift times as much, which one fma undoes, also exactly; fields beyond the mantissa are shifted down first.
#pragma once
#include "plugins/simt/device.h"

namespace linear {

constexpr int STEP = 16;       // inputs of an mma
constexpr int TILE_ROWS = 16;  // output rows of an mma

// Steps whose codes fill a lane's 16 bytes.
template <int BITS>
constexpr int VECTOR_STEPS = 16 / BITS;
// Inputs whose scales are stored together (group 0: one float32 scale a row, no chunks of scales).
template <int BITS, int GROUP>
constexpr int CHUNK = GROUP == 128 || BITS == 2 ? 128 : 64;

template <class T>
struct Format {
  static constexpr uint32_t mantissa = 10, bias = 15;
};
template <>
struct Format<bf16> {
  static constexpr uint32_t mantissa = 7, bias = 127;
};

constexpr int AND_OR = (0xF0 & 0xCC) | 0xAA, AND_XOR = (0xF0 & 0xCC) ^ 0xAA;

// Field `field` of both halves of `word` as numbers: code - zero. `field` is known where this is inlined.
template <class T, int BITS>
DEVICE uint32_t weight_pair(uint32_t word, int field) {
  constexpr uint32_t both = 0x10001u, m = Format<T>::mantissa, bias = Format<T>::bias;
  constexpr uint32_t zero = BITS == 2 ? 1 : 1 << (BITS - 1);
  if constexpr (BITS > m) {
    // Eight bits in bf16: 128 + the low seven, less 256, or less 128 if the eighth is set: one bit of 256 apart.
    const uint32_t codes = word >> (BITS * field);
    return subtract<T>(ptx::lop3<AND_OR>(codes, 0x7fu * both, 0x4300u * both),
                       ptx::lop3<AND_XOR>(codes, 0x80u * both, 0x4380u * both));
  } else {
    constexpr int fit = m / BITS;
    const int shift = field % fit * BITS;
    const uint32_t mask = ((1u << BITS) - 1) << shift, power = (bias + m) << m;
    const uint32_t raised = ptx::lop3<AND_OR>(word >> (field / fit * fit * BITS), mask * both, power * both);
    if (shift == 0) return subtract<T>(raised, (power | zero) * both);
    const uint32_t inverse = (bias - shift) << m;  // 2^-shift
    const uint32_t offset = (bias + m - shift) << m | zero << shift | 0x8000u;  // -(2^(m - shift) + zero)
    return multiply_add<T>(raised, inverse * both, offset * both);
  }
}

// The A registers of step `step` of a lane's 16 bytes.
template <class T, int BITS>
DEVICE void unpack_step(const uint32_t (&words)[4], int step, uint32_t (&a)[4]) {
  constexpr int fields = 16 / BITS;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int pair = 4 * step + i;
    a[i] = weight_pair<T, BITS>(words[pair / fields], pair % fields);
  }
}

}  // namespace linear
