// Where memory lies: every allocation alone between pages that nobody may touch, at addresses that are not used again.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "plugins/simt/block.h"
#include "plugins/simt/driver/driver.h"

namespace driver {

Usage usage;

namespace {

constexpr size_t RESERVED_BYTES = size_t{1} << 40;  // of addresses, at a time
constexpr size_t POISON_BYTES = size_t{16} << 20;
constexpr size_t GRANULE = 512;  // what a device rounds sizes up to
// Behind an allocation, to the end of its last page. No float arithmetic makes it, so that writing it shows.
constexpr unsigned char GUARD[2] = {0xc1, 0xff};

std::map<uintptr_t, Allocation> allocations;

const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

char* reserve(size_t bytes) {
  static char* next;
  static size_t left;
  if (left < bytes) {
    const size_t size = std::max(RESERVED_BYTES, bytes);
    void* memory = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(memory != MAP_FAILED, CUDA_ERROR_OUT_OF_MEMORY);
    next = static_cast<char*>(memory);
    left = size;
  }
  left -= bytes;
  return std::exchange(next, next + bytes);
}

// A file of bytes that are NaN in every type, which pages stand for until they are written.
int poison_file() {
  static const int file = [] {
    const int made = memfd_create("poison", MFD_CLOEXEC);
    const std::string bytes(POISON_BYTES, '\xff');
    if (made < 0 || write(made, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) abort();
    return made;
  }();
  return file;
}

void check_guard(const Allocation& a) {
  const auto* end = reinterpret_cast<const unsigned char*>(a.start + a.bytes);
  for (size_t i = 0; i < round_up(a.bytes, page) - a.bytes; ++i)
    if (end[i] != GUARD[i % 2])
      simt::fail("something was written past the end of %s memory of %zu bytes, at + %zu",
                 a.kind == Memory::device ? "device" : "pinned", a.bytes, a.bytes + i);
}

void unmap(const Allocation& a) {
  mmap(reinterpret_cast<void*>(a.start), round_up(a.bytes, page), PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

void count(const Allocation& a, int sign) {
  size_t& sum = a.kind == Memory::device ? usage.device : usage.pinned;
  sum += static_cast<size_t>(sign) * round_up(a.bytes, GRANULE);
  usage.peak = std::max(usage.peak, usage.device);
}

}  // namespace

uintptr_t allocate(size_t bytes, Memory kind) {
  require(bytes > 0, CUDA_ERROR_INVALID_VALUE);
  const bool fits = bytes <= device.memory && usage.device + round_up(bytes, GRANULE) <= device.memory;
  require(kind != Memory::device || fits, CUDA_ERROR_OUT_OF_MEMORY);
  const size_t whole = round_up(bytes, page);
  char* memory = reserve(page + whole + page) + page;
  for (size_t done = 0; done < whole; done += POISON_BYTES)
    require(mmap(memory + done, std::min(whole - done, POISON_BYTES), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
                 poison_file(), 0) != MAP_FAILED,
            CUDA_ERROR_OUT_OF_MEMORY);
  for (size_t i = bytes; i < whole; ++i) memory[i] = static_cast<char>(GUARD[(i - bytes) % 2]);
  const auto start = reinterpret_cast<uintptr_t>(memory);
  allocations[start] = {start, bytes, kind, &current_context()};
  count(allocations[start], 1);
  return start;
}

void add_registered(uintptr_t start, size_t bytes) {
  require(bytes > 0, CUDA_ERROR_INVALID_VALUE);
  require(!find(start, 1) && !find(start + bytes - 1, 1), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  allocations[start] = {start, bytes, Memory::registered, &current_context()};
  count(allocations[start], 1);
}

void release(uintptr_t start, Memory kind) {
  const auto found = allocations.find(start);
  require(found != allocations.end() && found->second.kind == kind, CUDA_ERROR_INVALID_VALUE);
  const Allocation a = found->second;
  allocations.erase(found);
  count(a, -1);
  if (kind != Memory::registered) unmap(a);
}

void release_all(const Context& context) {
  std::erase_if(allocations, [&](const auto& entry) {
    const Allocation& a = entry.second;
    if (a.context != &context) return false;
    if (a.kind == Memory::device) unmap(a);
    count(a, -1);
    return true;
  });
}

const Allocation* find(uintptr_t address, size_t bytes) {
  auto after = allocations.upper_bound(address);
  if (after == allocations.begin()) return nullptr;
  const Allocation& a = std::prev(after)->second;
  return address - a.start <= a.bytes && bytes <= a.bytes - (address - a.start) ? &a : nullptr;
}

bool is_device(uintptr_t address, size_t bytes) {
  const Allocation* a = find(address, bytes);
  return a && a->kind == Memory::device;
}

bool is_pinned(const void* address, size_t bytes) {
  const Allocation* a = find(reinterpret_cast<uintptr_t>(address), bytes);
  return a && a->kind != Memory::device;
}

size_t count_allocations(Memory kind) {
  return static_cast<size_t>(
      std::count_if(allocations.begin(), allocations.end(), [=](const auto& e) { return e.second.kind == kind; }));
}

void check_guards() {
  for (const auto& entry : allocations)
    if (entry.second.kind != Memory::registered) check_guard(entry.second);
}

std::string describe(uintptr_t address) {
  auto after = allocations.upper_bound(address);
  if (after != allocations.begin()) {
    const Allocation& a = std::prev(after)->second;
    const size_t past = address - a.start;
    if (past < round_up(a.bytes, page) + page)
      return "byte " + std::to_string(past) + " of an allocation of " + std::to_string(a.bytes) + " bytes";
  }
  char text[80];
  snprintf(text, sizeof text, "0x%zx, which was freed or never allocated", address);
  return text;
}

}  // namespace driver
