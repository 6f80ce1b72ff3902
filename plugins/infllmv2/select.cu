// Chooses the blocks that each new token attends to in each KV head (spec: infllmv2.md 3.6, 3.7, 3.9): at most
// `selected`, forced ones (the first `init`, the token's own and the `local` before it) and then by (score descending,
// block ascending), never a block after the token's own. A row of a tree is given the tree's blocks too, chosen or not.
//
// One thread block a row (grid: tokens, KV heads). Scores are not negative, so their bits are ordered as they are;
// forced blocks get a key above all of them. Four passes over the keys in shared memory, 8 bits each, find the last
// chosen key and how many equal ones are chosen; then every warp counts and writes its range of blocks in order.
// Writes the chosen blocks in ascending order, -1 after them, and their number; of dense sequences 0.
#pragma once
#include "plugins/infllmv2/step.cuh"

namespace infllmv2 {

constexpr int SELECT_THREADS = 256, SELECT_WARPS = SELECT_THREADS / 32;
constexpr uint32_t FORCED = 0xffffffff;

struct SelectArguments {
  const float2* scores;      // [tokens, Hkv, score_width]: own, first (score.cu)
  const int* positions;      // [tokens]
  const int* slots;          // [tokens] where in its sequence's pages each is
  const int* query_start;    // [sequences + 1]
  const int* switch_length;  // [sequences]
  const int* settings;       // [4], see Setting
  const int* tree_start;     // [sequences]: the slot at which its tree begins; 2^31 - 1: it has none
  int* blocks;               // [tokens, Hkv, columns]
  int* counts;               // [tokens, Hkv]
  int sequences, kv_heads, score_width, limit, columns;
};

// The state of the search: the key's bits found so far, and how many of the keys that have them are chosen.
struct Search {
  uint32_t prefix, remaining;
};

struct SelectShared {
  uint32_t histogram[256];
  Search search;
  int greater[SELECT_WARPS], equal[SELECT_WARPS];  // keys in each warp's range of blocks
};
static_assert(sizeof(SelectShared) == 1096, "launch.py says how much shared memory there is");

// Keys of blocks 0 .. own. `scored`: the last block with a score; of a tree's row it may be the one before its own.
DEVICE void load_keys(uint32_t* keys, const float2* scores, int own, int scored, int init, int local) {
  for (int b = threadIdx.x; b <= own; b += SELECT_THREADS) {
    const bool forced = b < init || b >= own - local;
    keys[b] = forced ? FORCED : bits<uint32_t>(fmaxf(scores[b].x, scores[b + 1].y));
  }
  const bool is_last = scored < own && scored >= init && scored < own - local;
  if (is_last && threadIdx.x == scored % SELECT_THREADS) keys[scored] = bits<uint32_t>(scores[scored].x);
}

// One warp: finds the digit at `shift` of the last chosen key among those in the histogram, and clears it.
DEVICE void find_digit(SelectShared& shared, Search search, int shift) {
  const int lane = threadIdx.x % 32;
  uint4* bins = reinterpret_cast<uint4*>(shared.histogram) + 2 * (31 - lane);  // high digits first
  const uint4 high = bins[1], low = bins[0];
  const uint32_t count[8] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
  bins[0] = bins[1] = make_uint4(0, 0, 0, 0);
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) own += count[i];
  uint32_t through = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t before = __shfl_up_sync(~0u, through, step);
    if (lane >= step) through += before;
  }
  if (through - own >= search.remaining || through < search.remaining) return;
  uint32_t left = search.remaining - (through - own);  // chosen ones that are not in higher bins
  bool found = false;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (!found && left <= count[i]) {
      shared.search = {search.prefix | static_cast<uint32_t>(255 - 8 * lane - i) << shift, left};
      found = true;
    }
    left -= count[i];
  }
}

// The last chosen key, and how many of those equal to it are chosen.
DEVICE Search find_last_key(SelectShared& shared, const uint32_t* keys, int count, uint32_t chosen) {
  Search search = {0, chosen};
  shared.histogram[threadIdx.x] = 0;
  __syncthreads();
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int b = threadIdx.x; b < count; b += SELECT_THREADS)
      if (shift == 24 || (keys[b] ^ search.prefix) >> (shift + 8) == 0)
        atomicAdd(&shared.histogram[keys[b] >> shift & 255], 1u);
    __syncthreads();
    if (threadIdx.x < 32) find_digit(shared, search, shift);
    __syncthreads();
    search = shared.search;
  }
  return search;
}

// Writes the blocks whose key is greater than the last one or among the first `last.remaining` equal ones. Lanes beyond
// the last block have key 0: if that is the last chosen key, they are equal but come after all that are wanted.
DEVICE void write_chosen(SelectShared& shared, const uint32_t* keys, int count, Search last, int* out) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int range = (count + SELECT_THREADS - 1) / SELECT_THREADS * 32, begin = warp * range;
  const int end = min(begin + range, count);
  int greater = 0, equal = 0;
  for (int first = begin; first < end; first += 32) {
    const uint32_t key = first + lane < end ? keys[first + lane] : 0;
    greater += __popc(__ballot_sync(~0u, key > last.prefix));
    equal += __popc(__ballot_sync(~0u, key == last.prefix));
  }
  if (lane == 0) {
    shared.greater[warp] = greater;
    shared.equal[warp] = equal;
  }
  __syncthreads();
  greater = equal = 0;
  for (int w = 0; w < warp; ++w) {
    greater += shared.greater[w];
    equal += shared.equal[w];
  }
  const int wanted = last.remaining;
  for (int first = begin; first < end; first += 32) {
    const uint32_t key = first + lane < end ? keys[first + lane] : 0;
    const bool is_greater = key > last.prefix, is_equal = key == last.prefix;
    const uint32_t below = (1u << lane) - 1;
    const uint32_t greater_lanes = __ballot_sync(~0u, is_greater), equal_lanes = __ballot_sync(~0u, is_equal);
    const int greater_before = greater + __popc(greater_lanes & below);
    const int equal_before = equal + __popc(equal_lanes & below);
    if (is_greater || (is_equal && equal_before < wanted))
      out[greater_before + min(equal_before, wanted)] = first + lane;
    greater += __popc(greater_lanes);
    equal += __popc(equal_lanes);
  }
}

// Empty if the last comes before the first.
struct TreeBlocks {
  int first, last;
};

// The blocks that a row is given besides: those of its sequence's tree up to its own slot, at most `room`.
DEVICE TreeBlocks tree_blocks(int slot, int tree_start, int room) {
  if (slot < tree_start) return {0, -1};
  return {tree_start / PAGE, min(slot / PAGE, tree_start / PAGE + room - 1)};
}

// One thread: puts them behind the chosen ones before them, in the place of others. -> how many there are in all.
DEVICE int add_tree(int* out, int chosen, TreeBlocks tree) {
  while (chosen > 0 && out[chosen - 1] >= tree.first) --chosen;
  for (int b = tree.first; b <= tree.last; ++b) out[chosen++] = b;
  return chosen;
}

DEVICE void select(const SelectArguments& a) {
  SHARED_MEMORY(raw);  // SelectShared, keys [score_width]
  SelectShared& shared = *reinterpret_cast<SelectShared*>(raw);
  uint32_t* keys = reinterpret_cast<uint32_t*>(raw + sizeof(SelectShared));
  const int token = blockIdx.x, sequence = sequence_of(a.query_start, a.sequences, token);
  const int64_t row = static_cast<int64_t>(token) * a.kv_heads + blockIdx.y;
  int* out = a.blocks + row * a.columns;

  int blocks = 0, scored = 0;  // blocks: that the row may choose among
  TreeBlocks tree = {0, -1};
  if (sequence < a.sequences && is_sparse(a.settings, a.switch_length, sequence)) {
    blocks = a.positions[token] / PAGE + 1;
    scored = last_scored(a.positions[token], a.tree_start[sequence]) / PAGE;
    tree = tree_blocks(a.slots[token], a.tree_start[sequence], a.columns - a.limit);
  }
  const int chosen = min(min(a.settings[SELECTED], a.limit), blocks);
  if (threadIdx.x == 0) a.counts[row] = chosen;
  for (int i = chosen + threadIdx.x; i < a.columns; i += SELECT_THREADS) out[i] = -1;
  if (chosen == blocks) {
    for (int b = threadIdx.x; b < blocks; b += SELECT_THREADS) out[b] = b;
  } else if (chosen > 0) {
    load_keys(keys, a.scores + row * a.score_width, blocks - 1, scored, a.settings[INIT], a.settings[LOCAL]);
    const Search last = find_last_key(shared, keys, blocks, chosen);
    write_chosen(shared, keys, blocks, last, out);
  }
  if (tree.first > tree.last) return;
  __syncthreads();
  if (threadIdx.x == 0) a.counts[row] = add_tree(out, chosen, tree);
}

}  // namespace infllmv2
