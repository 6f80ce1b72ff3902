// What attention works in beside its inputs and outputs: vectors that count their bytes, so that what a plan says of
// them (edge/memory/attention.py) can be held against what they took.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace edge {

// Bytes of all buffers of the process, now and at most.
struct BufferBytes {
  std::atomic<int64_t> live{0}, peak{0};

  void add(int64_t bytes) {
    const int64_t now = live.fetch_add(bytes, std::memory_order_relaxed) + bytes;
    for (int64_t most = peak.load(std::memory_order_relaxed); now > most && !peak.compare_exchange_weak(most, now);) {
    }
  }
};

inline BufferBytes buffer_bytes;

template <class T>
struct CountingAllocator {
  using value_type = T;

  CountingAllocator() = default;
  template <class U>
  CountingAllocator(const CountingAllocator<U>&) {}

  T* allocate(size_t count) {
    T* memory = std::allocator<T>().allocate(count);
    buffer_bytes.add(count * sizeof(T));
    return memory;
  }
  void deallocate(T* memory, size_t count) {
    buffer_bytes.add(-static_cast<int64_t>(count * sizeof(T)));
    std::allocator<T>().deallocate(memory, count);
  }
  friend bool operator==(const CountingAllocator&, const CountingAllocator&) { return true; }
  friend bool operator!=(const CountingAllocator&, const CountingAllocator&) { return false; }
};

template <class T>
using Buffer = std::vector<T, CountingAllocator<T>>;

// `count` values of any content. A longer buffer than before is exactly as long as asked for, and the old one goes
// first: a vector by itself would hold both, and up to twice as much.
template <class T>
inline void size_to(Buffer<T>& buffer, size_t count) {
  if (buffer.capacity() < count) {
    Buffer<T>().swap(buffer);
    buffer.reserve(count);
  }
  buffer.resize(count);
}

template <class T>
inline void fill(Buffer<T>& buffer, size_t count, T value) {
  size_to(buffer, count);
  buffer.assign(count, value);
}

}  // namespace edge
