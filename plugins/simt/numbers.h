// Numbers in registers: fp16 and bf16 values, and pairs of them in one 32-bit register, by element type.
#pragma once

template <class To, class From>
DEVICE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
struct PairOf;  // PairOf<half>::type is half2
template <>
struct PairOf<half> {
  using type = half2;
};
template <>
struct PairOf<bf16> {
  using type = bf162;
};
template <class T>
using Pair = typename PairOf<T>::type;

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(half x) { return __half2float(x); }
DEVICE float to_float(bf16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
  return x;
}
template <>
DEVICE half from_float<half>(float x) {
  return __float2half_rn(x);
}
template <>
DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two floats as a pair; `low` is the element at the lower address.
template <class T>
DEVICE uint32_t pack(float low, float high);
template <>
DEVICE uint32_t pack<half>(float low, float high) {
  return bits<uint32_t>(__floats2half2_rn(low, high));
}
template <>
DEVICE uint32_t pack<bf16>(float low, float high) {
  return bits<uint32_t>(__floats2bfloat162_rn(low, high));
}

DEVICE float2 unpack_pair(half2 x) { return __half22float2(x); }
DEVICE float2 unpack_pair(bf162 x) { return __bfloat1622float2(x); }
template <class T>
DEVICE float2 unpack(uint32_t pair) {
  return unpack_pair(bits<Pair<T>>(pair));
}

// Both elements equal.
template <class T>
DEVICE uint32_t twice(T x) {
  return bits<uint16_t>(x) * 0x10001u;
}

// Element-wise on pairs, each rounded once: _rn keeps ptxas from fusing a product and a sum.
template <class T>
DEVICE uint32_t add(uint32_t a, uint32_t b) {
  return bits<uint32_t>(__hadd2_rn(bits<Pair<T>>(a), bits<Pair<T>>(b)));
}
template <class T>
DEVICE uint32_t subtract(uint32_t a, uint32_t b) {
  return bits<uint32_t>(__hsub2_rn(bits<Pair<T>>(a), bits<Pair<T>>(b)));
}
template <class T>
DEVICE uint32_t multiply(uint32_t a, uint32_t b) {
  return bits<uint32_t>(__hmul2_rn(bits<Pair<T>>(a), bits<Pair<T>>(b)));
}
template <class T>
DEVICE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  return bits<uint32_t>(__hfma2(bits<Pair<T>>(a), bits<Pair<T>>(b), bits<Pair<T>>(c)));
}
