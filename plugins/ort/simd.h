// Short vectors for the CPU kernels: GCC/Clang vector extensions, one width an instruction set.
// The library is compiled whole, once for each instruction set (setup.py): no run-time dispatch in here.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace edge {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint16_t half;  // IEEE binary16 as stored in the KV pool

struct bfloat16 {
  uint16_t bits;
};

// Two bfloat16 values, the first in the low half: what one lane of a bfloat16 product takes.
struct Pair {
  bfloat16 first, second;
};

// Four bytes: what one lane of an integer product takes, signed ones on one side and unsigned ones on the other.
struct Quad {
  int8_t bytes[4];
};
struct UnsignedQuad {
  uint8_t bytes[4];
};

#if defined(__AVX512BF16__)
constexpr bool kMultipliesPairs = true;
#else
constexpr bool kMultipliesPairs = false;
#endif

#if defined(__AVX512VNNI__)
constexpr bool kMultipliesQuads = true;
#else
constexpr bool kMultipliesQuads = false;
#endif

template <class E>
struct VectorOf {
  typedef vf type;
};
template <>
struct VectorOf<Pair> {
  typedef vi type;
};
template <>
struct VectorOf<Quad> {
  typedef vi type;
};
template <>
struct VectorOf<UnsignedQuad> {
  typedef vi type;
};
template <>
struct VectorOf<int32_t> {
  typedef vi type;
};
template <class E>
using Vector = typename VectorOf<E>::type;

inline vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

inline vf splat(float x) { return vf{} + x; }

// Pairs, quads or integers.
template <class Lane>
inline vi load(const Lane* p) {
  static_assert(sizeof(Lane) == 4);
  vi v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class Lane>
inline vi splat(Lane x) {
  static_assert(sizeof(Lane) == 4);
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return vi{} + bits;
}

inline void store(int32_t* p, vi v) { memcpy(p, &v, sizeof v); }

// sum += a * b in every lane, with the types of a and b.
template <class A, class B>
inline vf multiply_add(Vector<A> a, Vector<B> b, vf sum) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<A, Pair>)  // a.first * b.first + a.second * b.second
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
  if constexpr (std::is_same_v<A, float>) return sum + a * b;
}

#if defined(__AVX512VNNI__)
template <class A, class B>
inline vi multiply_add(Vector<A> a, Vector<B> b, vi sum) {
  static_assert(std::is_same_v<A, UnsignedQuad> != std::is_same_v<B, UnsignedQuad>);
  if constexpr (std::is_same_v<A, UnsignedQuad>)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
  else
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, (__m512i)a);
}
#endif

inline vf load(const half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__ARM_NEON)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
#error "the CPU kernels need AVX2, AVX-512 or NEON"
#endif
}

inline void store(half* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v)));
#endif
}

inline vf load(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__ARM_NEON)
  uint32_t bytes;
  memcpy(&bytes, p, sizeof bytes);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(bytes)))));
#endif
}

typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));

inline vf load(const bfloat16* p) {
  vh v;
  memcpy(&v, p, sizeof v);
  return (vf)(__builtin_convertvector(v, vu) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(bfloat16* p, vf v) {
#if defined(__AVX512BF16__)
  const auto rounded = _mm512_cvtneps_pbh(v);
#else
  const vu bits = (vu)v;
  const vu nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vh rounded = __builtin_convertvector(v == v ? nearest : vu{} + 0x7fc0u, vh);
#endif
  memcpy(p, &rounded, sizeof rounded);
}

// The first `count` < kWidth values, zeros behind them.
inline vf load_first(const half* p, int64_t count) {
  half padded[kWidth] = {};
  memcpy(padded, p, count * sizeof(half));
  return load(padded);
}

inline vf max(vf a, vf b) { return a > b ? a : b; }

inline vf min(vf a, vf b) { return a < b ? a : b; }

inline float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float s = 0;
  for (int i = 0; i < kWidth; ++i) s += v[i];
  return s;
#endif
}

inline float max(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// Whether any value is greater than x.
inline bool any_above(vf v, float x) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, splat(x), _CMP_GT_OQ) != 0;
#else
  return max(v) > x;
#endif
}

// exp(x) for x <= 88: 2^n * p(r) with |r| <= ln2/2, relative error below 3e-7; 0 below -87.
inline vf exp(vf x) {
  const vf clamped = max(x, splat(-87.3f));
#if defined(__AVX512F__)
  const vf n = _mm512_maskz_roundscale_ps(0xffff, clamped * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf biased = clamped * 1.44269504f + shifter;
  const vf n = biased - shifter;
#endif
  const vf r = clamped - n * 0.693145752f - n * 1.42860677e-6f;
  vf p = splat(8.31249911e-3f);  // minimax: 1.05e-7
  p = p * r + 4.18903317e-2f;
  p = p * r + 1.66671154e-1f;
  p = p * r + 4.99992303e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-87.3f), _CMP_GE_OQ), p, n);
#else
  const vi exponent = (vi)biased << 23;  // the low bits of `biased` hold n
  const vf y = (vf)((vi)p + exponent);
  return x < splat(-87.3f) ? vf{} : y;
#endif
}

// Transposes a kWidth x kWidth tile held in rows: stage s exchanges blocks of size s (s = 1, 2, 4, ...).
template <int S>
inline void transpose_stage(vf (&rows)[kWidth]) {
  vi low, high;
  for (int k = 0; k < kWidth; ++k) {
    low[k] = (k & S) == 0 ? k : kWidth + k - S;
    high[k] = (k & S) == 0 ? k + S : kWidth + k;
  }
  for (int i = 0; i < kWidth; ++i) {
    if (i & S) continue;
    const vf a = rows[i], b = rows[i + S];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + S] = __builtin_shuffle(a, b, high);
  }
}

inline void transpose(vf (&rows)[kWidth]) {
  transpose_stage<1>(rows);
  transpose_stage<2>(rows);
  if constexpr (kWidth > 4) transpose_stage<4>(rows);
  if constexpr (kWidth > 8) transpose_stage<8>(rows);
}

}  // namespace edge
