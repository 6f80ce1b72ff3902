// CPU kernel of edge.BlockLinear (meaning: plugins/block_linear/meaning.py): codes of 2, 4 or 8 bits times activations
// rounded to int8, both with a scale a block. A row's result does not depend on how many rows are computed with it.
#pragma once
#include <algorithm>

#include "plugins/ort/parallel.h"
#include "plugins/ort/simd.h"

namespace edge {

constexpr int64_t kTileOutputs = 16;  // outputs whose codes are stored together

struct BlockLinear {
  const float* x;        // [rows, inputs]
  const uint8_t* codes;  // [tiles, blocks, vectors of a block, kTileOutputs, 4]
  const float* scales;   // [tiles, blocks, kTileOutputs]
  const half* offsets;   // the same shape, or null
  float* y;              // [rows, outputs]
  int64_t rows, inputs, outputs, block;

  int64_t blocks() const { return (inputs + block - 1) / block; }
  int64_t tiles() const { return (outputs + kTileOutputs - 1) / kTileOutputs; }
};

// Activations: x = scale * code for every block of a row, codes from -127 to 127.
struct RoundedRows {
  float* scales;    // [rows, blocks]
  float* sums;      // [rows, blocks], of x
  int32_t* totals;  // [rows, blocks], of codes
  int8_t* codes;    // [rows, blocks * block]

  RoundedRows(const BlockLinear& a, void* memory) {
    const int64_t count = a.rows * a.blocks();
    scales = static_cast<float*>(memory), sums = scales + count;
    totals = reinterpret_cast<int32_t*>(sums + count);
    codes = reinterpret_cast<int8_t*>(totals + count);
  }
};

inline size_t rounded_bytes(const BlockLinear& a) { return a.rows * a.blocks() * (a.block + 12); }

// sum += a * b of four unsigned and four signed bytes a lane. No byte of `a` is above 15, or the processor multiplies
// all of them exactly.
inline vi multiply_add_bytes(vi a, vi b, vi sum) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)a, (__m512i)b);
  return sum + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
  return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b);
#endif
}

// The same of signed bytes on both sides, none of `b` below -127.
inline vi multiply_add_signed(vi a, vi b, vi sum) {
#if defined(__AVX512BW__)
  const __mmask64 negative = _mm512_movepi8_mask((__m512i)a);
  const __m512i turned = _mm512_mask_sub_epi8((__m512i)b, negative, _mm512_setzero_si512(), (__m512i)b);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8((__m512i)a), turned);
  return sum + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i turned = _mm256_sign_epi8((__m256i)b, (__m256i)a);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)a), turned);
  return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  return multiply_add_bytes(a, b, sum);
#endif
}

// Whether codes of this width are multiplied as signed bytes, code - 128: only VNNI multiplies unsigned ones exactly.
template <int kBits>
constexpr bool kAsSigned = kBits == 8 && !kMultipliesQuads;

template <int kBits>
inline vi multiply_add_codes(vi codes, vi x, vi sum) {
  if constexpr (kAsSigned<kBits>) return multiply_add_signed(codes ^ (vi{} + int32_t(0x80808080)), x, sum);
  return multiply_add_bytes(codes, x, sum);
}

typedef int8_t vb __attribute__((vector_size(kWidth)));

// One whole block -> its scale; `total` is the sum of the codes, `sum` that of x.
inline float round_block(const float* x, int64_t block, int8_t* codes, int32_t* total, float* sum) {
  vf largest{}, sums{};
  for (int64_t i = 0; i < block; i += kWidth) {
    const vf v = load(x + i);
    largest = max(largest, max(v, -v));
    sums += v;
  }
  const float most = max(largest), inverse = most > 0 ? 127 / most : 0;
  const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  vi totals{};
  for (int64_t i = 0; i < block; i += kWidth) {
    const vi code = (vi)(load(x + i) * inverse + shifter) - (vi)shifter;
    const vb bytes = __builtin_convertvector(code, vb);
    memcpy(codes + i, &bytes, sizeof bytes);
    totals += code;
  }
  *total = 0;
  for (int i = 0; i < kWidth; ++i) *total += totals[i];
  *sum = edge::sum(sums);
  return most / 127;
}

inline void round_row(const float* x, int64_t inputs, int64_t block, int8_t* codes, float* scales, int32_t* totals,
                      float* sums) {
  constexpr int64_t kMostBlock = 128;
  for (int64_t b = 0; b * block < inputs; ++b) {
    const float* from = x + b * block;
    float padded[kMostBlock] = {};
    if (const int64_t left = inputs - b * block; left < block) {
      std::copy_n(from, left, padded);
      from = padded;
    }
    scales[b] = round_block(from, block, codes + b * block, totals + b, sums + b);
  }
}

// The field of `bits` bits that begins at bit `first`, of all bytes.
template <int kBits>
inline vi field_of(vi packed, int first) {
  if constexpr (kBits == 8) return packed;
  constexpr uint32_t kMask = 0x01010101u * ((1 << kBits) - 1);
  return (vi)(((vu)packed >> first) & kMask);
}

template <int kBits>
constexpr int32_t kZeroCode = kBits == 2 ? 1 : 1 << (kBits - 1);

// y of R rows and one part of a tile, `part` * kWidth outputs from its first.
template <int kBits, int R, bool kOffsets>
inline void multiply_tile(const BlockLinear& a, const RoundedRows& x, int64_t tile, int64_t part, int64_t row) {
  constexpr int kFields = 8 / kBits, kVectorInputs = 4 * kFields;
  const int64_t blocks = a.blocks(), vectors = a.block / kVectorInputs, width = blocks * a.block;
  const uint8_t* codes = a.codes + (tile * blocks * vectors * kTileOutputs + part * kWidth) * 4;
  const int64_t column = part * kWidth;
  vf out[R] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    vi sums[R];
    for (int r = 0; r < R; ++r)
      sums[r] = vi{} - (kAsSigned<kBits> ? 0 : kZeroCode<kBits> * x.totals[(row + r) * blocks + b]);
    const int8_t* quads = x.codes + row * width + b * a.block;
    for (int64_t v = 0; v < vectors; ++v, codes += 4 * kTileOutputs, quads += kVectorInputs) {
      vi packed;
      memcpy(&packed, codes, sizeof packed);
      for (int f = 0; f < kFields; ++f) {
        const vi field = field_of<kBits>(packed, kBits * f);
        for (int r = 0; r < R; ++r) {
          Quad quad;
          memcpy(&quad, quads + r * width + 4 * f, sizeof quad);
          sums[r] = multiply_add_codes<kBits>(field, splat(quad), sums[r]);
        }
      }
    }
    const int64_t place = (tile * blocks + b) * kTileOutputs + column;
    const vf scale = load(a.scales + place);
    for (int r = 0; r < R; ++r)
      out[r] += __builtin_convertvector(sums[r], vf) * (x.scales[(row + r) * blocks + b] * scale);
    if constexpr (kOffsets) {
      const vf offset = load(a.offsets + place);
      for (int r = 0; r < R; ++r) out[r] += x.sums[(row + r) * blocks + b] * offset;
    }
  }
  const int64_t first = tile * kTileOutputs + column;
  const int64_t count = std::min<int64_t>(kWidth, a.outputs - first);  // the rest is beyond the matrix
  for (int r = 0; r < R; ++r) {
    float* y = a.y + (row + r) * a.outputs + first;
    if (count == kWidth)
      store(y, out[r]);
    else
      for (int64_t i = 0; i < count; ++i) y[i] = out[r][i];
  }
}

// All parts of a tile, rows from `row` to `last`, at most R at once.
template <int kBits, int R, bool kOffsets>
inline void multiply_rows(const BlockLinear& a, const RoundedRows& x, int64_t tile, int64_t row, int64_t last) {
  for (; last - row >= R; row += R)
    for (int64_t part = 0; part * kWidth < kTileOutputs && tile * kTileOutputs + part * kWidth < a.outputs; ++part)
      multiply_tile<kBits, R, kOffsets>(a, x, tile, part, row);
  if constexpr (R > 1) {
    if (row < last) multiply_rows<kBits, R - 1, kOffsets>(a, x, tile, row, last);
  }
}

// `memory`: rounded_bytes(a).
template <int kBits, bool kOffsets>
inline void block_linear(const BlockLinear& a, void* memory, Parallel parallel) {
  constexpr int kStrip = kWidth == 16 ? 8 : 4;  // rows whose sums fit the registers
  constexpr int64_t kRows = 64, kTiles = 4;
  constexpr int64_t kFew = 16;  // rows that one thread has rounded before another wakes
  const RoundedRows x(a, memory);
  const int64_t blocks = a.blocks();
  (a.rows < kFew ? Parallel::serial() : parallel)(a.rows, [&](size_t r) {
    round_row(a.x + r * a.inputs, a.inputs, a.block, x.codes + r * blocks * a.block, x.scales + r * blocks,
              x.totals + r * blocks, x.sums + r * blocks);
  });
  const int64_t row_parts = (a.rows + kRows - 1) / kRows, tile_parts = (a.tiles() + kTiles - 1) / kTiles;
  parallel(row_parts * tile_parts, [&](size_t i) {
    const int64_t first = i % row_parts * kRows, last = std::min(a.rows, first + kRows);
    const int64_t tile = i / row_parts * kTiles, end = std::min(a.tiles(), tile + kTiles);
    for (int64_t row = first; row < last; row += kStrip)
      for (int64_t t = tile; t < end; ++t)
        multiply_rows<kBits, kStrip, kOffsets>(a, x, t, row, std::min<int64_t>(last, row + kStrip));
  });
}

}  // namespace edge
