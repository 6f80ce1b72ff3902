// What remains of a tree: the tokens of the accepted path move to where they would be without it.
#pragma once
#include "plugins/infllmv2/compress.h"

namespace edge {

// A layer's pools; no compressed keys if its attention is dense.
template <class T, class W>
struct LayerPools {
  Cache<T> cache;
  W *fine, *coarse;
  int64_t averaged_plane;  // of keys, in a page
};

// One key or value of a page to another page or slot, as the pool stores it.
template <class E, class T>
void move_token(const AttentionStep& s, const Cache<T>& cache, int64_t from, int64_t to) {
  constexpr int64_t per = kPerElement<E>;
  const auto value_at = [&](int64_t c, int64_t slot) { return (slot / per * s.dim + c) * per + slot % per; };
  for (int64_t plane = 0; plane < s.planes; ++plane)
    for (int64_t head = 0; head < s.kv_heads; ++head) {
      const Slice<T> source = cache.slice(s, s.page(0, from / kPage), plane, head);
      const Slice<T> target = cache.slice(s, s.page(0, to / kPage), plane, head);
      for (int64_t c = 0; c < s.dim; ++c) {
        if (plane == 1)
          target.values[value_at(c, to % kPage)] = source.values[value_at(c, from % kPage)];
        else
          target.values[key_at<E>(c, to % kPage)] = source.values[key_at<E>(c, from % kPage)];
      }
      if (source.scales != nullptr) target.scales[to % kPage] = source.scales[from % kPage];
    }
}

// Tokens at slots `from` [count] (ascending, from[i] >= first + i) of a sequence with pages s.page_table go to slots
// first, first + 1, ..., and the windows that end there are written. False if a page cannot be had.
template <class T, class E, class W>
bool keep_tokens(AttentionStep s, const LayerPools<T, W>& pools, int64_t first, const int32_t* from, int64_t count) {
  std::vector<int32_t> slots(count);
  std::iota(slots.begin(), slots.end(), static_cast<int32_t>(first));
  const int32_t query_start[] = {0, static_cast<int32_t>(count)}, no_tree = std::numeric_limits<int32_t>::max();
  s.slots = slots.data(), s.query_start = query_start, s.tree_start = &no_tree, s.sequences = 1;
  // A window reaches back one page.
  const int64_t first_page = std::max<int64_t>(0, first / kPage - 1), end = from[count - 1] / kPage + 1;
  const PageUnits units = s.store == nullptr ? PageUnits{} : units_of(s, 0, first_page, end, end);
  if (s.store != nullptr && !s.store->hold(units)) return false;
  for (int64_t i = 0; i < count; ++i)
    if (from[i] != slots[i]) move_token<E>(s, pools.cache, from[i], slots[i]);
  if (pools.fine != nullptr)
    compress<E>(s, pools.cache, pools.fine, pools.coarse, pools.averaged_plane, Parallel::serial());
  if (s.store != nullptr) s.store->unlock(units, true, false);
  return true;
}

}  // namespace edge
