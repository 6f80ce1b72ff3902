// Closes up the accepted tokens of a tree behind its root: what one sequence has at slots[i] goes to slot kept[i], in
// every plane, with the scales of bytes.
//
// In place, since slots and kept ascend and no token moves up: a slot is read before it is written. Each element of a
// plane's head has one thread, which moves it token after token, so that nothing has to be waited for. Grid: (planes,
// KV heads), D threads a block.
#include "plugins/paged_attention/page.cuh"
#include "plugins/simt/device.h"

namespace attention {

struct KeepArguments {
  void* kv_pool;     // [pages, planes, KV heads, 64 * D] KV, laid out as append.cu says
  float* kv_scales;  // [pages, planes, KV heads, 64]; only with bytes
  const int* slots;  // [tokens] ascending
  const int* kept;   // [tokens] ascending, kept[i] <= slots[i]
  const int* pages;  // of the sequence
  int tokens, planes, kv_heads;
};

template <int D, class KV>
DEVICE void keep(const KeepArguments& a) {
  const int plane = blockIdx.x, kv_head = blockIdx.y, element = threadIdx.x;
  KV* pool = static_cast<KV*>(a.kv_pool);
  for (int i = 0; i < a.tokens; ++i) {
    const int slot = a.slots[i], kept = a.kept[i];
    if (slot == kept) continue;
    const Place from = place_of<D>(a.pages[slot / PAGE], a.planes, plane, a.kv_heads, kv_head, slot % PAGE);
    const Place to = place_of<D>(a.pages[kept / PAGE], a.planes, plane, a.kv_heads, kv_head, kept % PAGE);
    pool[to.start + element * to.step] = pool[from.start + element * from.step];
    if (sizeof(KV) == 1 && element == 0) a.kv_scales[to.scale] = a.kv_scales[from.scale];
  }
}

}  // namespace attention
