// cos and sin of every token's rotation angles (plugins/rope/meaning.py), a thread one angle of one token: blocks are
// rows of tokens, grid (ceil(tokens half / THREADS)).
//
// sinf and cosf would reduce large angles with a table on the stack. Angles here stay below 2^19, where two
// multiply-adds reduce them: pi/2 is split so that the first is exact and cancels all that can cancel.
#include "plugins/simt/device.h"

struct RopeArguments {
  const int32_t* positions;      // [tokens]
  const int32_t* query_start;    // [sequences + 1]
  const int32_t* switch_length;  // [sequences], or null: every sequence takes the short list
  const float* inverse_short;    // [half], 1 / LongRoPE's short factors
  const float* inverse_long;     // [half]
  const float* frequency;        // [half], 1 / theta^(2c / d)
  float* cos;                    // [tokens, half]
  float* sin;                    // [tokens, half]
  int32_t tokens, half, sequences, original_length;
  float attention_factor;
};

namespace rope {

// The sequence of token t: how many sequences end at or before it.
DEVICE int sequence_of(const int32_t* query_start, int sequences, int t) {
  int low = 0, high = sequences - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (__ldg(query_start + middle + 1) <= t) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// (cos, sin) of |x| < 2^19, to 1.5e-7.
DEVICE float2 cos_sin(float x) {
  const int quarters = __float2int_rn(x * 0.636619772f);
  const float turns = static_cast<float>(quarters);
  const float r = fmaf(turns, -3.13916473e-07f, fmaf(turns, -1.57079601f, x));
  const float s = r * r;
  const float sine = fmaf(r * s, fmaf(s, fmaf(s, -1.95152959e-4f, 8.33216087e-3f), -1.66666546e-1f), r);
  const float cosine =
      fmaf(s * s, fmaf(s, fmaf(s, 2.44331571e-5f, -1.38873162e-3f), 4.16666457e-2f), fmaf(s, -0.5f, 1.0f));
  const bool swapped = quarters & 1;
  const float c = swapped ? sine : cosine, d = swapped ? cosine : sine;
  return make_float2((quarters + 1) & 2 ? -c : c, quarters & 2 ? -d : d);
}

}  // namespace rope

template <int THREADS>
DEVICE void rope_table(const RopeArguments& a) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= a.tokens * a.half) return;
  const int t = i / a.half, c = i % a.half;
  const float* inverse = a.inverse_short;
  if (a.switch_length &&
      __ldg(a.switch_length + rope::sequence_of(a.query_start, a.sequences, t)) > a.original_length)
    inverse = a.inverse_long;
  const float stretched = static_cast<float>(__ldg(a.positions + t)) * __ldg(inverse + c);
  const float2 turned = rope::cos_sin(stretched * __ldg(a.frequency + c));
  a.cos[i] = turned.x * a.attention_factor;
  a.sin[i] = turned.y * a.attention_factor;
}
