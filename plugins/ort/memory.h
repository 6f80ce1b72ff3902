// The memory of one executor: two regions that are reserved once and never grow. ONNX Runtime takes what it packs of
// the weights from the first and the tensors of a step from the second, through an allocator that this library
// registers with its environment. What does not fit is an error of that step, not of the machine.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

namespace edge {

// Address space of a fixed size, handed out first fit; the system gives memory to what is touched.
class Region {
 public:
  explicit Region(size_t size) : size_(round_up(size)) {
    if (size_ == 0) return;
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return;
    base_ = static_cast<char*>(memory);
    free_[0] = size_;
  }
  Region(const Region&) = delete;
  ~Region() {
    if (base_ != nullptr) munmap(base_, size_);
  }

  bool is_reserved() const { return base_ != nullptr || size_ == 0; }
  bool holds(const void* p) const { return p >= base_ && p < base_ + size_ && base_ != nullptr; }
  bool is_empty() const { return taken_.empty(); }
  size_t live() const { return live_; }
  size_t peak() const { return peak_; }  // highest end of what was ever taken: all that the system can have given

  // Null if no gap is long enough.
  void* take(size_t bytes) {
    bytes = round_up(bytes);
    for (auto gap = free_.begin(); gap != free_.end(); ++gap) {
      const auto [offset, length] = *gap;
      if (length < bytes) continue;
      free_.erase(gap);
      if (length > bytes) free_[offset + bytes] = length - bytes;
      taken_[offset] = bytes;
      live_ += bytes;
      peak_ = std::max(peak_, offset + bytes);
      return base_ + offset;
    }
    return nullptr;
  }

  void give_back(void* p) {
    const auto entry = taken_.find(static_cast<char*>(p) - base_);
    size_t offset = entry->first, length = entry->second;
    taken_.erase(entry);
    live_ -= length;
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && next->first == offset + length) {
      length += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin() && std::prev(next)->first + std::prev(next)->second == offset) {
      --next;
      offset = next->first, length += next->second;
    }
    free_[offset] = length;
  }

 private:
  static constexpr size_t kAlignment = 64;
  static size_t round_up(size_t n) { return (std::max<size_t>(n, 1) + kAlignment - 1) / kAlignment * kAlignment; }

  char* base_ = nullptr;
  size_t size_, live_ = 0, peak_ = 0;
  std::map<size_t, size_t> free_, taken_;  // offset -> length
};

// The pools of a process. Executors take turns: allocations go to the pool and region that is in use, or, while none
// is, to malloc.
class MemoryPools {
 public:
  enum Use : int { kNothing = -1, kWeights = 0, kStep = 1 };

  // A number for the other calls; 0 if the address space cannot be had.
  uint64_t open(size_t weights, size_t step) {
    const std::lock_guard<std::mutex> guard(mutex_);
    auto pool = std::make_unique<Pool>(weights, step);
    if (!pool->regions[0].is_reserved() || !pool->regions[1].is_reserved()) return 0;
    pools_[++last_] = std::move(pool);
    return last_;
  }

  void use(uint64_t pool, int region) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto entry = pools_.find(pool);
    current_ = entry == pools_.end() || region == kNothing ? nullptr : &entry->second->regions[region];
  }

  // -> bytes taken now, and at most.
  void stats(uint64_t pool, int region, uint64_t out[2]) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const Region& chosen = pools_.at(pool)->regions[region];
    out[0] = chosen.live(), out[1] = chosen.peak();
  }

  // The pool goes once the last of its blocks was given back.
  void close(uint64_t pool) {
    const std::lock_guard<std::mutex> guard(mutex_);
    pools_.at(pool)->is_closed = true;
    drop_closed();
  }

  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    return current_ == nullptr ? aligned_alloc(64, (bytes + 63) / 64 * 64) : current_->take(bytes);
  }

  void give_back(void* p) {
    const std::lock_guard<std::mutex> guard(mutex_);
    for (auto& [number, pool] : pools_)
      for (Region& region : pool->regions)
        if (region.holds(p)) {
          region.give_back(p);
          if (pool->is_closed) drop_closed();
          return;
        }
    free(p);
  }

 private:
  struct Pool {
    Pool(size_t weights, size_t step) : regions{Region(weights), Region(step)} {}
    Region regions[2];
    bool is_closed = false;
  };

  void drop_closed() {
    for (auto entry = pools_.begin(); entry != pools_.end();) {
      Pool& pool = *entry->second;
      const bool is_gone = pool.is_closed && pool.regions[0].is_empty() && pool.regions[1].is_empty();
      if (is_gone && (current_ == &pool.regions[0] || current_ == &pool.regions[1])) current_ = nullptr;
      entry = is_gone ? pools_.erase(entry) : std::next(entry);
    }
  }

  std::mutex mutex_;
  std::map<uint64_t, std::unique_ptr<Pool>> pools_;
  uint64_t last_ = 0;
  Region* current_ = nullptr;
};

// Never destroyed: sessions may outlive the library's static objects.
inline MemoryPools& memory_pools() {
  static auto* pools = new MemoryPools;
  return *pools;
}

}  // namespace edge
