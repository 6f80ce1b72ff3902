// What the lanes of a warp do together: they deposit their operands, and the last to arrive computes for all.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "plugins/simt/block.h"

namespace simt {
namespace {

constexpr const char* NAMES[] = {"shuffle", "vote", "__syncwarp", "mma", "ldmatrix"};
char no_argument;

struct Meeting {
  bool open;
  Collective kind;
  unsigned mask, arrived;
  void* lanes[32];
};
// Disjoint masks may meet at the same time.
struct Warp {
  Meeting meetings[8];
};
std::vector<Warp> warps;

unsigned warp_mask(unsigned warp) {
  const unsigned threads = block_size - 32 * warp;
  return threads >= 32 ? ~0u : (1u << threads) - 1;
}

Meeting& find_meeting(Collective kind, unsigned mask, unsigned lane) {
  Meeting* free = nullptr;
  for (Meeting& m : warps[self().warp()].meetings) {
    if (!m.open) {
      if (!free) free = &m;
      continue;
    }
    if (m.kind == kind && m.mask == mask && !(m.arrived >> lane & 1)) return m;
    if (m.mask & mask)
      fail("lanes of one warp meet at different collectives: %s (mask %08x) and %s (mask %08x)",
           NAMES[static_cast<int>(m.kind)], m.mask, NAMES[static_cast<int>(kind)], mask);
  }
  free->open = true;
  free->kind = kind;
  free->mask = mask;
  free->arrived = 0;
  std::fill(std::begin(free->lanes), std::end(free->lanes), nullptr);
  return *free;
}

using Row8 = float __attribute__((vector_size(32)));

template <float (*VALUE)(uint16_t)>
void put(float* at, size_t step, uint32_t pair) {
  at[0] = VALUE(static_cast<uint16_t>(pair));
  at[step] = VALUE(static_cast<uint16_t>(pair >> 16));
}
float half_float(uint16_t h) {
  Float16 x;
  memcpy(&x, &h, 2);
  return static_cast<float>(x);
}
float bf16_float(uint16_t b) {
  const uint32_t word = static_cast<uint32_t>(b) << 16;
  float x;
  memcpy(&x, &word, 4);
  return x;
}

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  const float* c;
};

// The fragments' layout is in ptx.h.
template <float (*VALUE)(uint16_t)>
void multiply(void* const (&lanes)[32], unsigned) {
  ++statistics.mma;
  alignas(32) float a[16][16], b[16][8], c[16][8];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const Mma& m = *static_cast<Mma*>(lanes[lane]);
    const unsigned g = lane / 4, q = 2 * (lane % 4);
    put<VALUE>(&a[g][q], 1, m.a[0]);
    put<VALUE>(&a[g + 8][q], 1, m.a[1]);
    put<VALUE>(&a[g][q + 8], 1, m.a[2]);
    put<VALUE>(&a[g + 8][q + 8], 1, m.a[3]);
    put<VALUE>(&b[q][g], 8, m.b[0]);
    put<VALUE>(&b[q + 8][g], 8, m.b[1]);
    memcpy(&c[g][q], m.c, 8);
    memcpy(&c[g + 8][q], m.c + 2, 8);
  }
  for (unsigned i = 0; i < 16; ++i) {
    Row8 sum;
    memcpy(&sum, c[i], 32);
    for (unsigned k = 0; k < 16; ++k) {
      Row8 row;
      memcpy(&row, b[k], 32);
      sum += a[i][k] * row;
    }
    memcpy(c[i], &sum, 32);
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    float* d = static_cast<Mma*>(lanes[lane])->d;
    const unsigned g = lane / 4, q = 2 * (lane % 4);
    memcpy(d, &c[g][q], 8);
    memcpy(d + 2, &c[g + 8][q], 8);
  }
}

struct Ldmatrix {
  uint32_t* r;
  const void* row;
  bool transposed;
};

// Eight rows of 16 bytes are one wavefront if they lie in different banks.
unsigned extra_wavefronts(void* const (&lanes)[32], unsigned matrix) {
  unsigned count[8] = {}, most = 0;
  for (unsigned i = 0; i < 8; ++i) {
    const auto row = reinterpret_cast<uintptr_t>(static_cast<Ldmatrix*>(lanes[8 * matrix + i])->row);
    const unsigned c = ++count[row / 16 % 8];
    most = c > most ? c : most;
  }
  return most - 1;
}

void load_matrices(void* const (&lanes)[32], unsigned) {
  Thread* caller = current;
  const uint16_t* rows[32];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const void* row = static_cast<Ldmatrix*>(lanes[lane])->row;
    current = &fibers[caller->index / 32 * 32 + lane];
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: the row of lane %u is not aligned to 16 bytes", lane);
    note_access(row, 16, Access::read);
    rows[lane] = static_cast<const uint16_t*>(row);
  }
  current = caller;
  for (unsigned m = 0; m < 4; ++m) {
    statistics.bank_conflicts += extra_wavefronts(lanes, m);
    for (unsigned lane = 0; lane < 32; ++lane) {
      const Ldmatrix& l = *static_cast<Ldmatrix*>(lanes[lane]);
      const unsigned g = lane / 4, q = 2 * (lane % 4);
      const uint16_t low = l.transposed ? rows[8 * m + q][g] : rows[8 * m + g][q];
      const uint16_t high = l.transposed ? rows[8 * m + q + 1][g] : rows[8 * m + g][q + 1];
      l.r[m] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

void meet_lanes(Collective kind, unsigned mask, void* argument, Meet meet) {
  Fiber& me = self();
  const unsigned lane = me.lane();
  if (!(mask >> lane & 1))
    fail("lane %u takes part in a %s whose mask %08x leaves it out", lane, NAMES[static_cast<int>(kind)], mask);
  mask &= warp_mask(me.warp());
  Meeting& m = find_meeting(kind, mask, lane);
  m.arrived |= 1u << lane;
  m.lanes[lane] = argument ? argument : &no_argument;
  me.where = NAMES[static_cast<int>(kind)];
  me.state = State::at_collective;
  if (m.arrived == mask) {
    meet(m.lanes, mask);
    m.open = false;
    for (unsigned i = 32; i-- > 0;) {
      if (!(mask >> i & 1)) continue;
      Fiber& other = fibers[32 * me.warp() + i];
      if (kind == Collective::sync) ++other.warp_epoch;
      make_ready(other);
    }
  }
  wait();
}

}  // namespace

void reset_warps() { warps.assign((block_size + 31) / 32, {}); }

unsigned missing_lanes(const Fiber& fiber) {
  for (const Meeting& m : warps[fiber.warp()].meetings)
    if (m.open && m.arrived >> fiber.lane() & 1) return m.mask & ~m.arrived;
  return 0;
}

void collective(Collective kind, unsigned mask, void* argument, Meet meet) {
  SIMT_NOTE_CALLER();
  meet_lanes(kind, mask, argument, meet);
}
void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed) {
  SIMT_NOTE_CALLER();
  Ldmatrix mine{r, row, transposed};
  meet_lanes(Collective::ldmatrix, ~0u, &mine, load_matrices);
}
void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  SIMT_NOTE_CALLER();
  Mma mine{d, a, {b0, b1}, c};
  meet_lanes(Collective::mma, ~0u, &mine, multiply<half_float>);
}
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  SIMT_NOTE_CALLER();
  Mma mine{d, a, {b0, b1}, c};
  meet_lanes(Collective::mma, ~0u, &mine, multiply<bf16_float>);
}

}  // namespace simt
