// What every kernel that reads or writes the cache agrees on.
#pragma once
#include "plugins/simt/device.h"

constexpr int PAGE = 64;  // tokens of a page, which is one attention block

namespace attention {

enum Plane { KEYS, VALUES, PLAIN_KEYS };

// Where a token's elements of one plane and head start, how far they are apart, and its scale.
struct Place {
  int64_t start;
  int step;
  int64_t scale;
};

// Of `slot` of a page. Pools: [pages, planes, KV heads, 64 * D], scales [pages, planes, KV heads, 64].
template <int D>
DEVICE Place place_of(int page, int planes, int plane, int kv_heads, int kv_head, int slot) {
  const int64_t row = (static_cast<int64_t>(page) * planes + plane) * kv_heads + kv_head;
  if (plane == VALUES) return {row * (PAGE * D) + slot, PAGE, row * PAGE + slot};
  return {row * (PAGE * D) + slot * D, 1, row * PAGE + slot};
}

}  // namespace attention
