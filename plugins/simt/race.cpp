// Finds data races and counts global traffic. Kernels of the race build are compiled with -fsanitize=thread but not
// linked with its library: the functions that the compiler calls at every load and store are below.
//
// An access that is partly outside shared memory or a buffer, but near it, ends the run.
//
// Two accesses of a byte, one of them a write, are ordered if the same thread makes both, or a barrier lies between,
// or, within a warp, a __syncwarp. Nothing orders blocks, but two atomic accesses never race.
#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <utility>

#include "plugins/simt/block.h"

#if !defined(SIMT_RACE)
namespace simt {

void reset_shadow(const Buffer&) {}
void watch(std::vector<Buffer>&) {}
void note_access(const void*, size_t, Access) {}
void note_atomic(const void*, size_t, const void*) {}

}  // namespace simt
#else

namespace simt {
namespace {

enum class Readers : uint8_t { none, one, warp, many };

// What a byte of memory knows of the block that touched it last. `reader` is one of the readers since the last write
// and barrier, read_warp the latest warp epoch among them.
struct Cell {
  uint32_t write_barrier = 0, write_warp = 0, read_barrier = 0, read_warp = 0;
  int16_t writer = -1, reader = -1;
  Readers readers = Readers::none;
  bool atomic = false;

  bool operator==(const Cell&) const = default;
};
struct GlobalCell {
  unsigned block = 0;   // whose `cell` it is; blocks count from 1
  unsigned writer = 0;  // blocks
  unsigned reader = 0;
  bool several_readers = false, atomic = false;
  Cell cell;

  bool operator==(const GlobalCell&) const = default;
};
struct Watched {
  Buffer* buffer;
  std::vector<GlobalCell> cells;
};

constexpr uint64_t MOST_REPORTS = 3;

std::vector<Cell> shared_cells;
Buffer shared;
std::vector<Watched> watched;
bool access_reported;  // of its bytes only the first race counts

void report(const char* kind, const std::string& where, size_t offset, const char* other, int who) {
  if (std::exchange(access_reported, true) || statistics.races++ >= MOST_REPORTS) return;
  fprintf(stderr, "race: %s of %s + %zu by thread %u of block (%u, %u, %u)%s and %s %d\n", kind, where.c_str(), offset,
          current->index, block_index.x, block_index.y, block_index.z, place(self().code).c_str(), other, who);
}

bool ordered(int thread, uint32_t barrier, uint32_t warp) {
  const Fiber& me = self();
  if (thread < 0 || thread == static_cast<int>(me.index) || barrier < barrier_epoch) return true;
  return thread / 32 == static_cast<int>(me.warp()) && warp < me.warp_epoch;
}

bool reads_ordered(const Cell& c) {
  if (c.readers == Readers::none || c.read_barrier < barrier_epoch) return true;
  if (c.readers == Readers::one) return ordered(c.reader, c.read_barrier, c.read_warp);
  return c.readers == Readers::warp && c.reader / 32 == static_cast<int>(self().warp()) &&
         c.read_warp < self().warp_epoch;
}

void note_reader(Cell& c) {
  const Fiber& me = self();
  if (reads_ordered(c))  // before this one, which then stands for them
    c.readers = Readers::one;
  else
    c.readers =
        c.readers != Readers::many && c.reader / 32 == static_cast<int>(me.warp()) ? Readers::warp : Readers::many;
  c.reader = static_cast<int16_t>(me.index);
  c.read_barrier = barrier_epoch;
  c.read_warp = std::max(c.read_warp, me.warp_epoch);
}

void check(Cell& c, Access kind, const std::string& where, size_t offset) {
  const Fiber& me = self();
  if (!(kind == Access::atomic && c.atomic) && !ordered(c.writer, c.write_barrier, c.write_warp))
    report(kind == Access::read ? "read after write" : "write after write", where, offset, "thread", c.writer);
  if (kind == Access::read) {
    note_reader(c);
    return;
  }
  if (!reads_ordered(c))
    report("write after read", where, offset, c.readers == Readers::one ? "thread" : "several threads, the last",
           c.reader);
  c = {};
  c.write_barrier = barrier_epoch;
  c.write_warp = me.warp_epoch;
  c.writer = static_cast<int16_t>(me.index);
  c.atomic = kind == Access::atomic;
}

void check_blocks(GlobalCell& g, Access kind, const std::string& where, size_t offset) {
  const unsigned block = block_number + 1;
  const bool atomics = kind == Access::atomic && g.atomic;
  if (g.writer && g.writer != block && !atomics)
    report(kind == Access::read ? "read after write" : "write after write", where, offset, "block number",
           static_cast<int>(g.writer) - 1);
  else if (kind != Access::read && g.reader && (g.reader != block || g.several_readers))
    report("write after read", where, offset, "block number", static_cast<int>(g.reader) - 1);
  if (g.block != block) g.cell = {}, g.block = block;
  check(g.cell, kind, where, offset);
  if (kind == Access::read) {
    g.several_readers |= g.reader && g.reader != block;
    g.reader = block;
  } else {
    g.writer = block;
    g.atomic = kind == Access::atomic;
  }
}

// Checks an access's bytes; those that know the same come to know the same.
template <class C>
void check_all(std::vector<C>& cells, size_t start, size_t bytes, void (*check)(C&, Access, const std::string&, size_t),
               Access kind, const std::string& where) {
  C before, after;
  for (size_t i = start; i < start + bytes; ++i) {
    if (i > start && cells[i] == before) {
      cells[i] = after;
      continue;
    }
    before = cells[i];
    check(cells[i], kind, where, i);
    after = cells[i];
  }
}

// Whether the access is of this buffer.
bool touches(const Buffer& buffer, uintptr_t address, size_t bytes, Access kind) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(buffer.start);
  if (address - (start - GUARD_BYTES) >= buffer.bytes + 2 * GUARD_BYTES) return false;
  if (address < start || address - start + bytes > buffer.bytes)
    fail("%s of %zu bytes at %+td of %s, which has %zu bytes", kind == Access::read ? "read" : "write", bytes,
         static_cast<ptrdiff_t>(address - start), buffer.name.c_str(), buffer.bytes);
  return true;
}

}  // namespace

void reset_shadow(const Buffer& memory) {
  shared = memory;
  shared_cells.assign(memory.bytes, {});
}

void watch(std::vector<Buffer>& buffers) {
  watched.clear();
  for (Buffer& buffer : buffers)
    watched.push_back({&buffer, std::vector<GlobalCell>(buffer.is_checked ? buffer.bytes : 0)});
  std::sort(watched.begin(), watched.end(),
            [](const Watched& x, const Watched& y) { return x.buffer->start < y.buffer->start; });
}

void note_access(const void* p, size_t bytes, Access kind) {
  access_reported = false;
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address - reinterpret_cast<uintptr_t>(self().stack) < STACK_BYTES) return;
  if (touches(shared, address, bytes, kind)) {
    const size_t start = static_cast<size_t>(static_cast<const unsigned char*>(p) - shared.start);
    check_all(shared_cells, start, bytes, check, kind, shared.name);
    return;
  }
  const auto after = std::upper_bound(watched.begin(), watched.end(), address, [](uintptr_t x, const Watched& w) {
    return x < reinterpret_cast<uintptr_t>(w.buffer->start) - GUARD_BYTES;
  });
  if (after == watched.begin()) return;
  Watched& w = *(after - 1);
  if (!touches(*w.buffer, address, bytes, kind)) return;
  (kind == Access::read ? w.buffer->read : w.buffer->written) += bytes;
  const size_t start = static_cast<size_t>(static_cast<const unsigned char*>(p) - w.buffer->start);
  if (!w.cells.empty()) check_all(w.cells, start, bytes, check_blocks, kind, w.buffer->name);
}

void note_atomic(const void* p, size_t bytes, const void* caller) {
  self().code = caller;
  note_access(p, bytes, Access::atomic);
}

}  // namespace simt

extern "C" {
#define HOOK(name, parameters, bytes, kind)          \
  void name parameters {                             \
    if (!simt::current) return;                      \
    SIMT_NOTE_CALLER();                              \
    simt::note_access(p, bytes, simt::Access::kind); \
  }
#define HOOKS(bytes)                                         \
  HOOK(__tsan_read##bytes, (void* p), bytes, read)           \
  HOOK(__tsan_write##bytes, (void* p), bytes, write)         \
  HOOK(__tsan_unaligned_read##bytes, (void* p), bytes, read) \
  HOOK(__tsan_unaligned_write##bytes, (void* p), bytes, write)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
HOOK(__tsan_read_range, (void* p, size_t n), n, read)
HOOK(__tsan_write_range, (void* p, size_t n), n, write)
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}
#endif
