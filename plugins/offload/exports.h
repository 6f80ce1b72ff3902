// The C interface of page files and stores (binding: plugins/offload/store.py), and how attention finds a pool's store.
#pragma once
#include <unordered_map>

#include "plugins/offload/page_store.h"

#define EDGE_EXPORT extern "C" __attribute__((visibility("default")))

namespace edge {

struct StoreRegistry {
  std::mutex mutex;
  std::unordered_map<const void*, PageStore*> stores;  // by the address of the pool, their first part
};

inline StoreRegistry& store_registry() {
  static StoreRegistry registry;
  return registry;
}

// The store of the pool at an address; null if the pool holds all its pages.
inline PageStore* find_store(const void* pool) {
  StoreRegistry& registry = store_registry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  const auto found = registry.stores.find(pool);
  return found == registry.stores.end() ? nullptr : found->second;
}

}  // namespace edge

EDGE_EXPORT void* edge_page_file_open(int fd, int direct, const char* folder) {
  return new edge::PageFile(fd, direct != 0, folder);
}

EDGE_EXPORT void edge_page_file_close(void* file) { delete static_cast<edge::PageFile*>(file); }

// hits, misses, bytes read and bytes written since the last call.
EDGE_EXPORT void edge_page_file_take_counters(void* file, uint64_t* counters) {
  auto& f = *static_cast<edge::PageFile*>(file);
  std::atomic<uint64_t>* all[] = {&f.hits, &f.misses, &f.bytes_read, &f.bytes_written};
  for (auto* counter : all) *counters++ = counter->exchange(0);
}

// What failed since the last call, cut to `size` bytes; "" if nothing did.
EDGE_EXPORT void edge_page_file_take_failure(void* file, char* text, uint64_t size) {
  const std::string failure = static_cast<edge::PageFile*>(file)->take_failure();
  text[failure.copy(text, size - 1)] = 0;
}

// `parts` tensors at `addresses`, each [slots, planes, heads, slice_bytes].
EDGE_EXPORT void* edge_page_store_open(void* file, int64_t layer, int64_t heads, int64_t pages, int64_t slots,
                                       int64_t offset, int64_t parts, char* const* addresses, const int64_t* planes,
                                       const int64_t* slice_bytes) {
  std::vector<edge::PagePart> list;
  for (int64_t i = 0; i < parts; ++i) list.push_back({addresses[i], planes[i], slice_bytes[i]});
  auto* store =
      new edge::PageStore(*static_cast<edge::PageFile*>(file), layer, heads, pages, slots, offset, std::move(list));
  edge::StoreRegistry& registry = edge::store_registry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  registry.stores[store->address()] = store;
  return store;
}

EDGE_EXPORT void edge_page_store_close(void* store) {
  auto* s = static_cast<edge::PageStore*>(store);
  edge::StoreRegistry& registry = edge::store_registry();
  {
    std::lock_guard<std::mutex> lock(registry.mutex);
    registry.stores.erase(s->address());
  }
  delete s;
}

// units [count, 3]: page, head, and whether nothing of it is needed -> whether all of them are in the pool now.
EDGE_EXPORT int edge_page_store_lock(void* store, const int32_t* units, int64_t count) {
  auto& s = *static_cast<edge::PageStore*>(store);
  edge::PageUnits list;
  for (int64_t i = 0; i < count; ++i) list.push_back({units[3 * i], units[3 * i + 1], units[3 * i + 2] != 0});
  return s.hold(list);
}

EDGE_EXPORT void edge_page_store_unlock(void* store, const int32_t* units, int64_t count, int changed, int streamed) {
  edge::PageUnits list;
  for (int64_t i = 0; i < count; ++i) list.push_back({units[3 * i], units[3 * i + 1], false});
  static_cast<edge::PageStore*>(store)->unlock(list, changed != 0, streamed != 0);
}

EDGE_EXPORT int64_t edge_page_store_slot(void* store, int64_t page, int64_t head) {
  return static_cast<edge::PageStore*>(store)->slot(page, head);
}

EDGE_EXPORT int edge_page_store_copy(void* store, int64_t page, char* values, int is_write) {
  return static_cast<edge::PageStore*>(store)->copy(page, values, is_write != 0);
}
