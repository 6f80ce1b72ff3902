// Asynchronous copies. A destination holds NaN until the copy is waited for, or, by the seed's choice, the data at
// once: reading too early and overwriting too early both show.
#include <cstring>

#include "plugins/simt/block.h"

namespace simt {
namespace {

constexpr int BYTES = 16;

void finish(Copy& copy) {
  note_access(copy.shared, BYTES, Access::write);
  if (copy.done) return;
  if (copy.source_bytes) memcpy(copy.shared, copy.global, static_cast<size_t>(copy.source_bytes));
  memset(static_cast<char*>(copy.shared) + copy.source_bytes, 0, static_cast<size_t>(BYTES - copy.source_bytes));
}

}  // namespace

void copy_async(void* shared, const void* global, int source_bytes) {
  SIMT_NOTE_CALLER();
  if (reinterpret_cast<uintptr_t>(shared) % BYTES) fail("cp.async to shared memory that is not aligned to 16 bytes");
  if (source_bytes && reinterpret_cast<uintptr_t>(global) % BYTES)
    fail("cp.async from global memory that is not aligned to 16 bytes");
  note_access(shared, BYTES, Access::write);  // the destination is in use from here to the wait
  if (source_bytes) note_access(global, static_cast<size_t>(source_bytes), Access::read);
  Copy copy{shared, global, source_bytes, false};
  if (seed && random_number() % 2) {
    finish(copy);
    copy.done = true;
  } else {
    memset(shared, 0xff, BYTES);
  }
  self().open_group.push_back(copy);
}

void commit_copies() {
  Fiber& me = self();
  me.groups.push_back(std::move(me.open_group));
  me.open_group.clear();
}

void wait_copies(int pending) {
  SIMT_NOTE_CALLER();
  auto& groups = self().groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (Copy& copy : groups.front()) finish(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace simt
