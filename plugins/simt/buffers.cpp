// Memory of an exact size, between bytes that nobody may touch.
#include <cstdlib>
#include <cstring>

#include "plugins/simt/block.h"

namespace simt {
namespace {

// Not a number in every floating type, so that reading it shows; and none that arithmetic makes, so that writing does.
constexpr unsigned char GUARD[2] = {0xc1, 0xff};

}  // namespace

Buffer allocate(const std::string& name, size_t bytes) {
  void* memory = nullptr;
  const size_t whole = bytes + 2 * GUARD_BYTES;
  if (posix_memalign(&memory, 256, whole ? whole : 1)) abort();
  unsigned char* start = static_cast<unsigned char*>(memory) + GUARD_BYTES;
  for (size_t i = 0; i < GUARD_BYTES; ++i) start[i - GUARD_BYTES] = start[bytes + i] = GUARD[i % 2];
  return {name, start, bytes};
}

void release(Buffer& buffer) {
  if (buffer.start) free(buffer.start - GUARD_BYTES);
  buffer.start = nullptr;
}

void check_guards(const Buffer& buffer) {
  for (size_t i = 0; i < GUARD_BYTES; ++i) {
    if (buffer.start[buffer.bytes + i] != GUARD[i % 2])
      fail("something was written past the end of %s (%zu bytes), at + %zu", buffer.name.c_str(), buffer.bytes,
           buffer.bytes + i);
    if (buffer.start[i - GUARD_BYTES] != GUARD[i % 2])
      fail("something was written before %s, at - %zu", buffer.name.c_str(), GUARD_BYTES - i);
  }
}

}  // namespace simt
