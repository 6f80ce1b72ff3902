// What emulated kernels (through cpu.h) ask of the engine.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt {

#if defined(__aarch64__)
using Float16 = __fp16;  // g++ has the other name in C++ only since version 13
#else
using Float16 = _Float16;
#endif

struct Dim3 {
  unsigned x, y, z;
};

// The thread that runs now, and where it is.
struct Thread {
  unsigned index;  // in its block
};
extern Thread* current;
extern Dim3 block_index, grid_size;
extern unsigned block_size;

unsigned char* shared_memory();

// Ends the launch with a Failure (block.h) whose message names the block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void sync_block(const char* where);

// A warp collective: every lane of `mask` brings `argument`; the last to arrive runs `meet` for all of them.
enum class Collective { shuffle, vote, sync, mma, ldmatrix };
using Meet = void (*)(void* const (&lanes)[32], unsigned mask);
void collective(Collective kind, unsigned mask, void* argument, Meet meet);

void copy_async(void* shared, const void* global, int source_bytes);
void commit_copies();
void wait_copies(int pending);

void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed);
void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]);

// An atomic operation is about to touch [p, p + bytes); caller: an address in the kernel.
void note_atomic(const void* p, size_t bytes, const void* caller);

}  // namespace simt
