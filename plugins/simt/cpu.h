// The device language on a CPU: one block at a time, one fiber a thread (README.md). Included by device.h only.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "plugins/simt/engine.h"

#define DEVICE inline __attribute__((always_inline))
#define SHARED_MEMORY(name) unsigned char* const name = simt::shared_memory()
// The entry point that runner.cpp finds by name: every thread calls it with the struct's bytes.
#define KERNEL(symbol, threads, min_blocks, Arguments, body)                                                     \
  extern "C" __attribute__((visibility("default"))) void symbol##__run(const void* arguments) {                  \
    EXPAND body(*static_cast<const Arguments*>(arguments));                                                      \
  }                                                                                                              \
  extern "C" {                                                                                                   \
  __attribute__((visibility("default"))) extern const std::size_t symbol##__bytes;                               \
  const std::size_t symbol##__bytes = sizeof(Arguments);                                                         \
  }
#define EXPAND(...) __VA_ARGS__

#define threadIdx (simt::Dim3{simt::current->index, 0, 0})
#define blockIdx simt::block_index
#define gridDim simt::grid_size
#define blockDim (simt::Dim3{simt::block_size, 1, 1})
#define SIMT_STRING_(x) #x
#define SIMT_STRING(x) SIMT_STRING_(x)
#define SIMT_NOT_WATCHED __attribute__((no_sanitize("thread")))  // accesses are not the kernel's
#define __syncthreads() simt::sync_block(__FILE__ ":" SIMT_STRING(__LINE__))

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) int2 {
  int32_t x, y;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct half {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
struct alignas(4) half2 {
  half x, y;
};
struct alignas(4) bf162 {
  bf16 x, y;
};

namespace simt {

inline float half_value(uint16_t h) {
  Float16 x;
  memcpy(&x, &h, 2);
  return static_cast<float>(x);
}
inline float bf16_value(uint16_t b) {
  const uint32_t word = static_cast<uint32_t>(b) << 16;
  float x;
  memcpy(&x, &word, 4);
  return x;
}
// Rounded once, to nearest even; every NaN becomes the device's.
inline half to_half(double x) {
  const Float16 rounded = static_cast<Float16>(x);
  half h;
  memcpy(&h, &rounded, 2);
  return std::isnan(x) ? half{0x7fff} : h;
}
inline bf16 to_bf16(float x) {
  uint32_t word;
  memcpy(&word, &x, 4);
  return std::isnan(x) ? bf16{0x7fff} : bf16{static_cast<uint16_t>((word + 0x7fffu + (word >> 16 & 1)) >> 16)};
}
// Of the two neighbours of an inexact result the odd one: a second rounding to fewer bits is then as good as one.
inline float odd_float(double x) {
  const float near = static_cast<float>(x);
  uint32_t word;
  memcpy(&word, &near, 4);
  if (near == x || std::isnan(x) || std::isinf(near) || word & 1) return near;
  return std::nextafter(near, x > near ? INFINITY : -INFINITY);
}
inline double odd_sum(double x, double y) {
  const double sum = x + y, part = sum - x, error = (x - (sum - part)) + (y - part);
  uint64_t word;
  memcpy(&word, &sum, 8);
  if (!(error != 0) || std::isnan(error) || word & 1) return sum;
  return std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}
inline half multiply_add(half a, half b, half c) {
  const double product = static_cast<double>(half_value(a.bits)) * half_value(b.bits);  // exact
  return to_half(odd_sum(product, half_value(c.bits)));
}
inline bf16 multiply_add(bf16 a, bf16 b, bf16 c) {
  const double product = static_cast<double>(bf16_value(a.bits)) * bf16_value(b.bits);
  return to_bf16(odd_float(odd_sum(product, bf16_value(c.bits))));
}

template <class T>
struct Shuffle {
  T value, result;
  unsigned source;
};
template <class T>
inline T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  Shuffle<T> mine{value, value, source};
  collective(Collective::shuffle, mask, &mine, [](void* const(&lanes)[32], unsigned) SIMT_NOT_WATCHED {
    for (void* lane : lanes) {
      auto* s = static_cast<Shuffle<T>*>(lane);
      if (!s) continue;
      if (!lanes[s->source]) fail("a shuffle reads lane %u, which is not in its mask", s->source);
      s->result = static_cast<Shuffle<T>*>(lanes[s->source])->value;
    }
  });
  return mine.result;
}
struct Vote {
  bool value;
  unsigned result;
};
inline unsigned ballot(unsigned mask, bool value) {
  Vote mine{value, 0};
  collective(Collective::vote, mask, &mine, [](void* const(&lanes)[32], unsigned) SIMT_NOT_WATCHED {
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= lanes[i] ? static_cast<unsigned>(static_cast<Vote*>(lanes[i])->value) << i : 0;
    for (void* lane : lanes)
      if (lane) static_cast<Vote*>(lane)->result = all;
  });
  return mine.result;
}
inline unsigned lane() { return current->index % 32; }
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return d;
}
template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]);
template <>
inline void mma<half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  mma_half(d, a, b0, b1, c);
}
template <>
inline void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  mma_bf16(d, a, b0, b1, c);
}
// Fibers are not preempted, so plain code is atomic; it must only be told apart from plain accesses.
template <class T, class Change>
SIMT_NOT_WATCHED __attribute__((noinline)) T atomic(T* p, Change change) {
  note_atomic(p, sizeof(T), __builtin_return_address(0));
  const T old = *p;
  *p = change(old);
  return old;
}

}  // namespace simt

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source) {
  return simt::shuffle(mask, value, static_cast<unsigned>(source) % 32);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return simt::shuffle(mask, value, (simt::lane() ^ static_cast<unsigned>(bits)) % 32);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  return simt::shuffle(mask, value, simt::lane() < by ? simt::lane() : simt::lane() - by);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  return simt::shuffle(mask, value, simt::lane() + by > 31 ? simt::lane() : simt::lane() + by);
}
inline void __syncwarp(unsigned mask = ~0u) {
  simt::collective(simt::Collective::sync, mask, nullptr, [](void* const(&)[32], unsigned) {});
}
inline unsigned __ballot_sync(unsigned mask, bool value) { return simt::ballot(mask, value); }
inline bool __any_sync(unsigned mask, bool value) { return simt::ballot(mask, value) != 0; }
inline bool __all_sync(unsigned mask, bool value) { return simt::ballot(mask, !value) == 0; }

template <class T>
inline T atomicAdd(T* p, T value) {
  return simt::atomic(p, [=](T old) { return old + value; });
}
template <class T>
inline T atomicMax(T* p, T value) {
  return simt::atomic(p, [=](T old) { return std::max(old, value); });
}

using std::max;
using std::min;
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline uint32_t __brev(uint32_t x) {
  uint32_t y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = x | static_cast<uint64_t>(y) << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
inline float __int_as_float(int x) {
  float f;
  memcpy(&f, &x, 4);
  return f;
}
inline float __uint_as_float(unsigned x) { return __int_as_float(static_cast<int>(x)); }
inline int __float_as_int(float f) {
  int x;
  memcpy(&x, &f, 4);
  return x;
}
inline unsigned __float_as_uint(float f) { return static_cast<unsigned>(__float_as_int(f)); }
// Saturating, NaN becomes 0, as the device does.
inline int __float2int_rn(float f) {
  if (std::isnan(f)) return 0;
  if (f >= 2147483648.0f) return INT32_MAX;
  return f < -2147483648.0f ? INT32_MIN : static_cast<int>(std::nearbyint(f));
}

inline half __float2half_rn(float f) { return simt::to_half(f); }
inline float __half2float(half h) { return simt::half_value(h.bits); }
inline bf16 __float2bfloat16_rn(float f) { return simt::to_bf16(f); }
inline float __bfloat162float(bf16 b) { return simt::bf16_value(b.bits); }
inline half2 __floats2half2_rn(float x, float y) { return {simt::to_half(x), simt::to_half(y)}; }
inline bf162 __floats2bfloat162_rn(float x, float y) { return {simt::to_bf16(x), simt::to_bf16(y)}; }
inline float2 __half22float2(half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline float2 __bfloat1622float2(bf162 b) { return {__bfloat162float(b.x), __bfloat162float(b.y)}; }
inline half2 __hfma2(half2 a, half2 b, half2 c) {
  return {simt::multiply_add(a.x, b.x, c.x), simt::multiply_add(a.y, b.y, c.y)};
}
inline bf162 __hfma2(bf162 a, bf162 b, bf162 c) {
  return {simt::multiply_add(a.x, b.x, c.x), simt::multiply_add(a.y, b.y, c.y)};
}
// Sums and products of two halves are exact in float64, of two bf16 but for sums of very different size.
inline half2 __hadd2_rn(half2 a, half2 b) { return __hfma2(a, {{0x3c00}, {0x3c00}}, b); }
inline bf162 __hadd2_rn(bf162 a, bf162 b) { return __hfma2(a, {{0x3f80}, {0x3f80}}, b); }
inline half2 __hsub2_rn(half2 a, half2 b) { return __hfma2(b, {{0xbc00}, {0xbc00}}, a); }
inline bf162 __hsub2_rn(bf162 a, bf162 b) { return __hfma2(b, {{0xbf80}, {0xbf80}}, a); }
inline half2 __hmul2_rn(half2 a, half2 b) {
  const float2 x = __half22float2(a), y = __half22float2(b);
  return {simt::to_half(static_cast<double>(x.x) * y.x), simt::to_half(static_cast<double>(x.y) * y.y)};
}
inline bf162 __hmul2_rn(bf162 a, bf162 b) {
  const float2 x = __bfloat1622float2(a), y = __bfloat1622float2(b);
  return {simt::to_bf16(simt::odd_float(static_cast<double>(x.x) * y.x)),
          simt::to_bf16(simt::odd_float(static_cast<double>(x.y) * y.y))};
}
