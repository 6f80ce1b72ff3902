// One token a row of logits (plugins/sampling/meaning.py). One block a row, which it reads (mostly from L2) once for
// the largest logit, three times each for top_k and top_p, once for the sum that top_p needs, and once to draw.
//
// Every warp owns a run of consecutive ids and walks it 32 at a time. Logits are ordered by `key`, their bits made
// monotone; a token's mass is a whole number, so sums are exact in any order and results do not depend on scheduling.
// top_k and top_p are the same radix select over keys, 11 bits at a time, of the key at which a count or a mass is
// reached. The token drawn is the first whose cumulative mass, by id, exceeds a share of the total that Philox gives.
#include "plugins/simt/device.h"

struct SampleArguments {
  const float* logits;       // [rows, vocabulary]
  const float* temperature;  // [rows]
  const int32_t* top_k;      // [rows]
  const float* top_p;        // [rows]
  const float* min_p;        // [rows]
  const uint64_t* seed;      // [rows]
  const int32_t* step;       // [rows]
  const float* penalty;      // [rows], or null together with `seen`
  uint32_t* seen;            // [rows, ceil(vocabulary / 32)], a bit a token; the token drawn is added
  int32_t* token;            // [rows]
  int32_t vocabulary;
};

namespace sampling {

constexpr int THREADS = 1024, WARPS = THREADS / 32;
constexpr int DIGIT_BITS = 11, BINS = 1 << DIGIT_BITS;
constexpr uint32_t KEY_OF_MINUS_INFINITY = 0x007fffffu, KEY_OF_INFINITY = 0xff800000u;
constexpr int MASS_BITS = 45;  // the mass of the largest logit is 2^45: 2^18 of them fit 64 bits

struct Shared {
  uint32_t low[BINS], high[BINS];  // halves of 64-bit masses
  uint64_t warp_mass[WARPS];
  uint32_t warp_ties[WARPS];
  uint64_t above;
  uint32_t bin;
  int32_t token;
};
static_assert(WARPS == 32, "a lane for every warp");

DEVICE uint32_t key_of(float logit) {
  if (logit != logit) return 0;
  const uint32_t b = bits<uint32_t>(logit + 0.0f);  // -0 equals 0
  return b >> 31 ? ~b : b | 0x80000000u;
}
DEVICE float logit_of(uint32_t key) { return bits<float>(key >> 31 ? key & 0x7fffffffu : ~key); }

DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }

DEVICE int leading_zeros(uint64_t x) {
  const int high = __clz(static_cast<int>(x >> 32));
  return high < 32 ? high : 32 + __clz(static_cast<int>(x));
}

// floor(total * fraction / 2^32)
DEVICE uint64_t share(uint64_t total, uint32_t fraction) {
  return (total >> 32) * fraction + multiply_high(static_cast<uint32_t>(total), fraction);
}

// What the passes over a row share: its logits, this warp's ids, and how a logit becomes a mass.
struct Row {
  const float* logits;
  const uint32_t* seen;  // or null
  float penalty;
  int first, last;  // ids of this warp
  float best;       // the largest logit
  float sharpness;  // 2^26 log2(e) / temperature

  DEVICE float load(int id) const { return id < last ? __ldg(logits + id) : -INFINITY; }
  // The logit of token id after the penalty.
  DEVICE float penalised(int id, float logit) const {
    if (!seen || id >= last || !(seen[id / 32] >> (id % 32) & 1)) return logit;
    return logit < 0.0f ? logit * penalty : logit / penalty;
  }

  // 2^45 exp((logit - best) / temperature), 0 below 2^(45 - exponents): the exponent has 26 fractional bits, g = 2^32
  // times what it lacks to a whole number, and 2^g - 1 = g - g (1 - g) s(g) with a polynomial s (to 3e-9).
  DEVICE uint64_t mass(float logit, int exponents = MASS_BITS) const {
    const float distance = (best - logit) * sharpness;
    if (!(distance < static_cast<float>(exponents) * 67108864.0f)) return 0;
    const uint32_t x = static_cast<uint32_t>(distance), whole = (x + 0x3ffffffu) >> 26, g = ((whole << 26) - x) << 6;
    uint32_t s = 0x000e3b2du;
    s = 0x005fc381u + multiply_high(s, g);
    s = 0x02da0679u + multiply_high(s, g);
    s = 0x110e3c15u + multiply_high(s, g);
    s = 0x4e8dea85u + multiply_high(s, g);
    const uint64_t mantissa = 0x100000000u + (g - multiply_high(multiply_high(g, 0u - g), s));
    return mantissa << (MASS_BITS - 32) >> whole;
  }
};

// use(id, logit) for this thread's ids of the row, four loads at a time; past the end the logit is -infinity.
template <class Use>
DEVICE void for_each(const Row& row, Use use) {
  for (int start = row.first + threadIdx.x % 32; start < row.last; start += 4 * 32) {
    float logits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) logits[i] = row.load(start + 32 * i);
#pragma unroll
    for (int i = 0; i < 4; ++i) use(start + 32 * i, row.penalised(start + 32 * i, logits[i]));
  }
}

DEVICE uint64_t shuffle_up(uint64_t x, int lanes) {
  const uint32_t low = __shfl_up_sync(~0u, static_cast<uint32_t>(x), lanes);
  return static_cast<uint64_t>(__shfl_up_sync(~0u, static_cast<uint32_t>(x >> 32), lanes)) << 32 | low;
}
DEVICE uint64_t shuffle(uint64_t x, int lane) {
  const uint32_t low = __shfl_sync(~0u, static_cast<uint32_t>(x), lane);
  return static_cast<uint64_t>(__shfl_sync(~0u, static_cast<uint32_t>(x >> 32), lane)) << 32 | low;
}

// The sum of x over this lane and those before it.
DEVICE uint64_t warp_scan(uint64_t x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t before = shuffle_up(x, step);
    if (lane >= step) x += before;
  }
  return x;
}

// `combine` over x of the whole block, in every thread.
template <class Combine>
DEVICE uint64_t block_reduce(uint64_t x, Shared& shared, Combine combine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = combine(x, shuffle(x, (threadIdx.x % 32) ^ step));
  if (threadIdx.x % 32 == 0) shared.warp_mass[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared.warp_mass[threadIdx.x % 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = combine(x, shuffle(x, (threadIdx.x % 32) ^ step));
  __syncthreads();
  return x;
}
DEVICE uint64_t block_sum(uint64_t x, Shared& shared) {
  return block_reduce(x, shared, [](uint64_t a, uint64_t b) { return a + b; });
}

// Adds to a bin. The carry out of the lower half is exact whoever comes first.
DEVICE void add_mass(Shared& shared, uint32_t bin, uint64_t mass) {
  const uint32_t low = static_cast<uint32_t>(mass), before = atomicAdd(&shared.low[bin], low);
  const uint32_t high = static_cast<uint32_t>(mass >> 32) + (before + low < before);
  if (high) atomicAdd(&shared.high[bin], high);
}

// Finds the bin, from the last one down, in which the sum of masses reaches `target`; the sum before it goes to
// shared.above. Thread t sums the bins BINS - 1 - 2t and the one below.
DEVICE void find_bin(Shared& shared, uint64_t target) {
  static_assert(BINS == 2 * THREADS, "two bins a thread");
  const int bin = BINS - 1 - 2 * threadIdx.x;
  const uint64_t upper = static_cast<uint64_t>(shared.high[bin]) << 32 | shared.low[bin];
  const uint64_t lower = static_cast<uint64_t>(shared.high[bin - 1]) << 32 | shared.low[bin - 1];
  const uint64_t sum = warp_scan(upper + lower);
  if (threadIdx.x % 32 == 31) shared.warp_mass[threadIdx.x / 32] = sum;
  __syncthreads();
  const uint64_t warps = warp_scan(shared.warp_mass[threadIdx.x % 32]);
  const uint64_t earlier = threadIdx.x < 32 ? 0 : shuffle(warps, threadIdx.x / 32 - 1);
  const uint64_t before = earlier + sum - upper - lower;
  if (before < target && before + upper >= target) {
    shared.bin = bin;
    shared.above = before;
  } else if (before + upper < target && before + upper + lower >= target) {
    shared.bin = bin - 1;
    shared.above = before + upper;
  }
  __syncthreads();
}

// The largest key such that the tokens with at least this key have a mass of at least `target` by mass(key, logit),
// and the mass of those above it. Their mass in all must be at least `target` > 0.
struct Threshold {
  uint32_t key;
  uint64_t above;
};
template <class Mass>
DEVICE Threshold select(const Row& row, uint64_t target, Shared& shared, Mass mass) {
  Threshold found = {0, 0};
  uint32_t known = 0;  // the bits of found.key that are decided
  for (int digit = 0; digit < 3; ++digit) {
    const int shift = max(32 - DIGIT_BITS * (digit + 1), 0);
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) shared.low[bin] = shared.high[bin] = 0;
    __syncthreads();
    for_each(row, [&](int, float logit) {
      const uint32_t key = key_of(logit);
      const uint64_t m = (key & known) == found.key ? mass(key, logit) : 0;
      if (m) add_mass(shared, key >> shift & (BINS - 1), m);
    });
    __syncthreads();
    find_bin(shared, target - found.above);
    found.key |= shared.bin << shift;
    found.above += shared.above;
    known |= static_cast<uint32_t>(BINS - 1) << shift;
  }
  return found;
}

// The first word of Philox4x32-10 with counter (step, 0, 0, 0) and the seed as key.
DEVICE uint32_t philox(uint64_t seed, uint32_t step) {
  uint32_t a = step, b = 0, c = 0, d = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = static_cast<uint64_t>(0xd2511f53u) * a, q = static_cast<uint64_t>(0xcd9e8d57u) * c;
    a = static_cast<uint32_t>(q >> 32) ^ b ^ key0;
    c = static_cast<uint32_t>(p >> 32) ^ d ^ key1;
    b = static_cast<uint32_t>(q);
    d = static_cast<uint32_t>(p);
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return a;
}

// Which tokens can be drawn: keys above `key`, and of those equal to it the first `ties`; masses of at least `floor`.
struct Kept {
  uint32_t key, ties;
  uint64_t floor;
};

// The row's filters, one after the other.
DEVICE Kept filter(const Row& row, int top_k, int candidates, float top_p, float min_p, int vocabulary,
                   Shared& shared) {
  Kept kept = {KEY_OF_MINUS_INFINITY + 1, ~0u, 1};
  if (top_k > 0 && top_k < candidates)
    kept.key = select(row, top_k, shared, [](uint32_t key, float) { return key > KEY_OF_MINUS_INFINITY; }).key;
  if (top_p < 1.0f) {
    uint64_t total = 0;
    for_each(row, [&](int, float logit) { total += key_of(logit) >= kept.key ? row.mass(logit) : 0; });
    total = block_sum(total, shared);
    const uint64_t target = max(share(total, static_cast<uint32_t>(top_p * 4294967296.0f)), uint64_t{1});
    // Masses up to `small` sum to no more than total - target, so the others reach the target without them.
    const uint64_t small = (total - target) >> (32 - __clz(vocabulary));
    const int exponents = MASS_BITS - 63 + leading_zeros(small);
    const Threshold found = select(row, target, shared, [&](uint32_t key, float logit) {
      return key >= kept.key ? row.mass(logit, exponents) : 0;
    });
    const uint64_t each = row.mass(logit_of(found.key));
    kept = {found.key, static_cast<uint32_t>((target - found.above + each - 1) / each), 1};
  }
  kept.floor = max(static_cast<uint64_t>(static_cast<uint32_t>(min_p * 2147483648.0f)) << (MASS_BITS - 31), kept.floor);
  return kept;
}

// This warp's token at which the cumulative mass, `reached` before the warp, exceeds `position`; all of the warp walk.
DEVICE int find_position(const Row& row, const Kept& kept, uint64_t position, uint64_t reached, uint32_t ties_before) {
  const int lane = threadIdx.x % 32;
  for (int start = row.first; start < row.last; start += 32) {
    const int id = start + lane;
    const float logit = row.penalised(id, row.load(id));
    const uint32_t key = key_of(logit);
    const uint32_t tied = __ballot_sync(~0u, id < row.last && key == kept.key);
    const bool counts = key > kept.key ||
                        (key == kept.key && ties_before + __popc(tied & ((1u << lane) - 1)) < kept.ties);
    uint64_t m = counts ? row.mass(logit) : 0;
    if (m < kept.floor) m = 0;
    const uint64_t sum = reached + warp_scan(m);
    const uint32_t beyond = __ballot_sync(~0u, sum > position);
    if (beyond) return start + __ffs(beyond) - 1;
    reached = shuffle(sum, 31);
    ties_before += __popc(tied);
  }
  return -1;
}

// A token drawn from those kept, in every thread: the first whose cumulative mass exceeds the share `random` / 2^32.
DEVICE int draw(const Row& row, const Kept& kept, uint32_t random, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t above = 0;
  uint32_t ties = 0;
  for_each(row, [&](int, float logit) {
    const uint32_t key = key_of(logit);
    const uint64_t m = key > kept.key ? row.mass(logit) : 0;
    if (m >= kept.floor) above += m;
    ties += key == kept.key;
  });
  above = warp_scan(above);
  ties = static_cast<uint32_t>(warp_scan(ties));
  if (lane == 31) {
    shared.warp_mass[warp] = above;
    shared.warp_ties[warp] = ties;
  }
  __syncthreads();

  // Now lane l stands for warp l.
  uint64_t each = row.mass(logit_of(kept.key));
  if (each < kept.floor) each = 0;
  ties = shared.warp_ties[lane];
  const uint32_t earlier_ties = static_cast<uint32_t>(warp_scan(ties)) - ties;
  const uint32_t kept_ties = min(ties, kept.ties - min(kept.ties, earlier_ties));
  const uint64_t mass = shared.warp_mass[lane] + kept_ties * each, until = warp_scan(mass);
  const uint64_t position = share(shuffle(until, 31), random);
  const int owner = __ffs(__ballot_sync(~0u, until > position)) - 1;
  if (warp == owner) {
    const int found = find_position(row, kept, position, shuffle(until - mass, owner),
                                    __shfl_sync(~0u, earlier_ties, owner));
    if (lane == 0) shared.token = found;
  }
  __syncthreads();
  return shared.token;
}

DEVICE void sample(const SampleArguments& a) {
  SHARED_MEMORY(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int r = blockIdx.x, run = (a.vocabulary + THREADS - 1) / THREADS * 32;
  const int first = min(static_cast<int>(threadIdx.x) / 32 * run, a.vocabulary);
  const int64_t words = (a.vocabulary + 31) / 32;
  Row row = {};
  row.logits = a.logits + static_cast<int64_t>(r) * a.vocabulary;
  if (a.seen) {
    row.seen = a.seen + r * words;
    row.penalty = a.penalty[r];
  }
  row.first = first;
  row.last = min(first + run, a.vocabulary);

  uint64_t best = 0, candidates = 0;  // best: key, then the complement of the id, so that the lower id wins
  for_each(row, [&](int id, float logit) {
    const uint32_t key = key_of(logit);
    best = max(best, static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(id));
    candidates += key > KEY_OF_MINUS_INFINITY;
  });
  best = block_reduce(best, shared, [](uint64_t x, uint64_t y) { return max(x, y); });
  const uint32_t key = static_cast<uint32_t>(best >> 32);
  const bool finite = key > KEY_OF_MINUS_INFINITY && key < KEY_OF_INFINITY;
  int token = finite ? static_cast<int>(~static_cast<uint32_t>(best)) : -1;
  if (finite && a.temperature[r] > 0.0f) {
    candidates = block_sum(candidates, shared);
    row.best = logit_of(key);
    row.sharpness = fminf(96817624.0f / a.temperature[r], 3.40282347e38f);  // finite, so that 0 distance stays 0
    const Kept kept =
        filter(row, a.top_k[r], static_cast<int>(candidates), a.top_p[r], a.min_p[r], a.vocabulary, shared);
    token = draw(row, kept, philox(a.seed[r], static_cast<uint32_t>(a.step[r])), shared);
  }
  if (threadIdx.x != 0) return;
  a.token[r] = token;
  if (a.seen && token >= 0) a.seen[r * words + token / 32] |= 1u << (token % 32);
}

}  // namespace sampling
