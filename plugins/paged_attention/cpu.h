// CPU kernel of edge.PagedAttention (meaning: plugins/paged_attention/meaning.py), and what all attention shares.
//
// One task is one sequence, one KV head, a tile of its query tokens and a part of the blocks they see. The G query
// heads of a token are rows of the tile; each block of keys and values is converted once for all of them. Softmax
// runs online over blocks: nothing grows with the context but a list of block numbers.
#pragma once
#include <atomic>
#include <numeric>
#include <vector>

#include "plugins/offload/page_store.h"
#include "plugins/ort/parallel.h"
#include "plugins/paged_attention/quad_tile.h"

namespace edge {

constexpr int64_t kTileRows = 512;    // query rows (tokens x heads of one group) that share a block's conversion
constexpr int64_t kPartBlocks = 16;   // a single token's blocks are split into parts of this many, for more threads

// Bytes of KV pools that attention has read since the process started, for benchmarks.
inline std::atomic<uint64_t> pool_bytes_read{0};

struct AttentionStep {
  const float* qkv;  // [tokens, (heads + 2 kv_heads) * dim]
  const float* cos;  // [tokens, dim / 2]
  const float* sin;
  const int32_t* positions;    // [tokens]
  const int32_t* slots;        // [tokens]: where in its sequence a token is stored, consecutive
  const int32_t* query_start;  // [sequences + 1]
  const int32_t* page_table;   // [sequences, table_width]
  const int32_t* tree_start;   // [sequences]: slots before it are seen by all that come after them,
  const uint64_t* tree_mask;   // [tokens]: others by those whose bit says so
  int64_t sequences, table_width;
  int64_t heads, kv_heads, dim;
  float scale;
  float* out;  // [tokens, heads * dim]
  int64_t window = 0;  // blocks that a token sees, up to that of its position; 0: all
  int64_t planes = 2;  // of the pool: rotated keys, values, and perhaps the keys before rotation
  PageStore* store = nullptr;  // where the pages are, if the pool has not room for all (stored.h)

  int64_t tokens() const { return query_start[sequences]; }
  // Whether each sequence has one token. As many tokens as sequences are not enough: one may have none.
  bool is_decode() const {
    for (int64_t i = 0; i <= sequences; ++i)
      if (query_start[i] != i) return false;
    return true;
  }
  int64_t group() const { return heads / kv_heads; }
  int64_t row_stride() const { return (heads + 2 * kv_heads) * dim; }
  int64_t tile_tokens() const { return std::max<int64_t>(1, kTileRows / group()); }
  int64_t page(int64_t sequence, int64_t block) const { return page_table[sequence * table_width + block]; }
  const float* query(int64_t token, int64_t head) const { return qkv + token * row_stride() + head * dim; }
  bool is_in_tree(int64_t sequence, int64_t token) const { return slots[token] >= tree_start[sequence]; }

  // Tokens that one of the sequence may have compressed keys of: the tree's own may yet be forgotten.
  int64_t settled(int64_t sequence, int64_t token) const {
    return std::min<int64_t>(positions[token] + 1, tree_start[sequence]);
  }

  // Bit i: `token` sees slot `start` + i, which is not after its own for any i that matters.
  uint64_t sight(int64_t sequence, int64_t token, int64_t start) const {
    const int64_t before = slots[token] + 1 - start, settled = tree_start[sequence] - start;
    const uint64_t written = first_bits(before);
    if (settled >= kPage || settled >= before) return written;
    const uint64_t tree = settled >= 0 ? tree_mask[token] << settled : settled > -kPage ? tree_mask[token] >> -settled : 0;
    return written & (first_bits(settled) | tree);
  }

 private:
  static uint64_t first_bits(int64_t count) {
    return count >= kPage ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1;
  }
};

// A layer's pool [pages or slots, planes, kv_heads, 64, dim] and, of int8 codes, their scales
// [pages, planes, kv_heads, 64], which are in memory for all pages.
template <class T>
struct Cache {
  T* pool;
  float* scales = nullptr;

  Slice<T> slice(const AttentionStep& s, int64_t page, int64_t plane, int64_t head) const {
    const int64_t slot = s.store == nullptr ? page : s.store->slot(page, head);
    return {pool + first(s, slot, plane, head) * s.dim,
            scales == nullptr ? nullptr : scales + first(s, page, plane, head)};
  }

 private:
  static int64_t first(const AttentionStep& s, int64_t page, int64_t plane, int64_t head) {
    return ((page * s.planes + plane) * s.kv_heads + head) * kPage;
  }
};

// Half-rotation RoPE of one head (spec: infllmv2.md 2), times `scale`.
inline void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t dim, float scale) {
  const int64_t half_dim = dim / 2;
  for (int64_t c = 0; c < half_dim; ++c) {
    const float a = x[c], b = x[c + half_dim];
    y[c] = (a * cos[c] - b * sin[c]) * scale;
    y[c + half_dim] = (b * cos[c] + a * sin[c]) * scale;
  }
}

// The query heads of one group for tokens [first, last), scaled -> the tile's q [tokens * G, dim].
template <class E>
inline void load_queries(const AttentionStep& s, int64_t head, int64_t first, int64_t last, Tile<E>& tile,
                         bool rotated) {
  float row[kMaxHeadDim];
  for (int64_t t = first; t < last; ++t)
    for (int64_t g = 0; g < s.group(); ++g) {
      const float* query = s.query(t, head * s.group() + g);
      if (rotated)
        rotate(query, s.cos + t * s.dim / 2, s.sin + t * s.dim / 2, row, s.dim, s.scale);
      else
        for (int64_t c = 0; c < s.dim; ++c) row[c] = query[c] * s.scale;
      tile.set_query((t - first) * s.group() + g, row, s.dim);
    }
}

// Rotates the step's keys and writes keys and values to their pages.
template <class T, class E>
void append(const AttentionStep& s, const Cache<T>& cache, Parallel parallel) {
  parallel(s.sequences, [&](size_t b) {
    float rotated[kMaxHeadDim];
    for (int64_t t = s.query_start[b]; t < s.query_start[b + 1]; ++t) {
      const int64_t page = s.page(b, s.slots[t] / kPage), slot = s.slots[t] % kPage;
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        const float* key = s.query(t, s.heads + h);
        rotate(key, s.cos + t * s.dim / 2, s.sin + t * s.dim / 2, rotated, s.dim, 1.0f);
        store_key<E>(cache.slice(s, page, 0, h), slot, rotated, s.dim);
        store_value<E>(cache.slice(s, page, 1, h), slot, key + s.kv_heads * s.dim, s.dim);
        if (s.planes == 3) store_key<E>(cache.slice(s, page, 2, h), slot, key, s.dim);
      }
    }
  });
}

// Query tokens [first, last) of a sequence and one KV head.
struct TokenTile {
  int64_t sequence, head, first, last;
};

// All tiles of a step. Late tiles see the longest context: started first, they leave the short ones to even out
// the threads.
inline std::vector<TokenTile> token_tiles(const AttentionStep& s) {
  std::vector<TokenTile> tiles;
  for (int64_t b = 0; b < s.sequences; ++b)
    for (int64_t last = s.query_start[b + 1]; last > s.query_start[b]; last -= s.tile_tokens())
      for (int64_t h = 0; h < s.kv_heads; ++h)
        tiles.push_back({b, h, std::max<int64_t>(s.query_start[b], last - s.tile_tokens()), last});
  return tiles;
}

// Which blocks a tile's tokens attend to: `blocks` in any order, and of them token t those with
// selected(t, block); blocks past the token itself are left out by the kernel.
template <class Selected>
struct BlockChoice {
  Buffer<int32_t> blocks;
  Selected selected;
};

template <class E>
void start_tile(const AttentionStep& s, const TokenTile& tile, Tile<E>& buffer) {
  buffer.start((tile.last - tile.first) * s.group(), s.dim);
  load_queries(s, tile.head, tile.first, tile.last, buffer, true);
}

// A started tile over blocks [begin, end) of its choice; adds sums of weights x values to `buffer`, not yet divided.
template <class T, class E, class Selected>
void attend_blocks(const AttentionStep& s, const Cache<T>& cache, const TokenTile& tile,
                   const BlockChoice<Selected>& choice, int64_t begin, int64_t end, Tile<E>& buffer) {
  const int64_t group = s.group(), dim = s.dim;
  const int64_t highest = s.slots[tile.last - 1];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block = choice.blocks[i], start = block * kPage;
    const auto attends = [&](int64_t t) { return s.slots[t] >= start && choice.selected(t, block); };
    const int64_t written = std::min<int64_t>(kPage, highest + 1 - start);
    const auto visible = [&](int64_t row) { return s.sight(tile.sequence, tile.first + row / group, start); };
    LoadedBlock<E> loaded{};
    for (int64_t t = tile.first, run = t; t < tile.last; t = run) {
      const bool wanted = attends(t);
      for (run = t + 1; run < tile.last && attends(run) == wanted;) ++run;
      if (!wanted) continue;
      if (loaded.written == 0) {
        const int64_t page = s.page(tile.sequence, block);
        if (s.store != nullptr && !s.store->wait(page, tile.head)) return;  // the step has failed, and will say so
        const int64_t next = s.page(tile.sequence, choice.blocks[std::min(i + 1, end - 1)]);
        const auto keys = cache.slice(s, page, 0, tile.head), next_keys = cache.slice(s, next, 0, tile.head);
        const auto values = cache.slice(s, page, 1, tile.head), next_values = cache.slice(s, next, 1, tile.head);
        loaded = {load_keys(keys.values, buffer.keys.data(), dim),
                  load_values(values.values, buffer.values.data(), dim, written),
                  load_scales(keys, next_keys, buffer.key_scales, written),
                  load_scales(values, next_values, buffer.value_scales, written),
                  written,
                  Prefetch::of(next_keys.values, kPage * dim),
                  Prefetch::of(next_values.values, kPage * dim)};
        const int64_t scale_bytes = cache.scales == nullptr ? 0 : sizeof(float);
        pool_bytes_read.fetch_add(2 * written * (dim * sizeof(T) + scale_bytes), std::memory_order_relaxed);
      }
      attend_rows(buffer, (t - tile.first) * group, (run - tile.first) * group, dim, loaded, visible);
    }
  }
}

// Divides by the sum of weights and writes the tile's rows to the output.
inline void write_rows(const AttentionStep& s, const TokenTile& tile, const float* rows, const float* row_sum) {
  const int64_t group = s.group(), dim = s.dim;
  for (int64_t r = 0; r < (tile.last - tile.first) * group; ++r) {
    float* out = s.out + (tile.first + r / group) * s.heads * dim + (tile.head * group + r % group) * dim;
    const float inverse = 1.0f / row_sum[r];
    for (int64_t c = 0; c < dim; c += kWidth) store(out + c, load(rows + r * dim + c) * inverse);
  }
}

// What several threads found for one tile, each over a part of its blocks.
struct Partial {
  Buffer<float> out, row_max, row_sum;
};

// Brings the parts to their common maximum and adds them up in the first.
inline void merge(Partial* parts, int64_t count, int64_t rows, int64_t dim) {
  Partial& total = parts[0];
  for (int64_t p = 1; p < count; ++p) {
    for (int64_t r = 0; r < rows; ++r) {
      const float top = std::max(total.row_max[r], parts[p].row_max[r]);
      const float ours = exp(splat(total.row_max[r] - top))[0], theirs = exp(splat(parts[p].row_max[r] - top))[0];
      total.row_max[r] = top;
      total.row_sum[r] = total.row_sum[r] * ours + parts[p].row_sum[r] * theirs;
      float *sum = &total.out[r * dim], *part = &parts[p].out[r * dim];
      for (int64_t c = 0; c < dim; c += kWidth) store(sum + c, load(sum + c) * ours + load(part + c) * theirs);
    }
  }
}

// Blocks [begin, end) of a tile's choice.
struct AttentionTask {
  size_t tile;
  int64_t begin, end;
};

// The tasks of all tiles, tile after tile.
template <class Choices>
std::vector<AttentionTask> attention_tasks(const AttentionStep& s, const std::vector<TokenTile>& tiles,
                                           const Choices& choices) {
  std::vector<AttentionTask> tasks;
  for (size_t i = 0; i < tiles.size(); ++i) {
    const int64_t blocks = choices[i].blocks.size();
    // Not for what a longer step leaves alone in its first tile: how a prompt is cut must not change how it is rounded.
    const int64_t b = tiles[i].sequence, tokens = s.query_start[b + 1] - s.query_start[b];
    const int64_t parts = tokens > 1 ? 1 : divide_up(blocks, kPartBlocks);
    for (int64_t p = 0; p < parts; ++p) tasks.push_back({i, blocks * p / parts, blocks * (p + 1) / parts});
  }
  return tasks;
}

// Attends over pages of which some are on disk -> what each task found (stored.h). `locked`: all its units, or none.
template <class T, class E, class Choices>
std::vector<Partial> attend_stored(const AttentionStep& s, const Cache<T>& cache, const std::vector<TokenTile>& tiles,
                                   const Choices& choices, const std::vector<AttentionTask>& tasks, Parallel parallel,
                                   const PageUnits& locked);

// Attention of every tile over the blocks of its choice; of pages on disk all those, or none, may be locked already.
template <class T, class E, class Choices>
void attend(const AttentionStep& s, const Cache<T>& cache, const std::vector<TokenTile>& tiles,
            const Choices& choices, Parallel parallel, const PageUnits& locked = {}) {
  const auto tasks = attention_tasks(s, tiles, choices);
  std::vector<Partial> partials(tasks.size());
  if (s.store != nullptr)
    partials = attend_stored<T, E>(s, cache, tiles, choices, tasks, parallel, locked);
  else
    parallel(tasks.size(), [&](size_t i) {
      static thread_local Tile<E> buffer;
      const TokenTile& tile = tiles[tasks[i].tile];
      start_tile(s, tile, buffer);
      attend_blocks(s, cache, tile, choices[tasks[i].tile], tasks[i].begin, tasks[i].end, buffer);
      const bool is_only = tasks[i].end - tasks[i].begin == int64_t(choices[tasks[i].tile].blocks.size());
      if (is_only)
        write_rows(s, tile, buffer.out.data(), buffer.row_sum.data());
      else
        partials[i] = {buffer.out, buffer.row_max, buffer.row_sum};
    });
  for (size_t i = 0, next; i < tasks.size(); i = next) {
    for (next = i + 1; next < tasks.size() && tasks[next].tile == tasks[i].tile;) ++next;
    if (partials[i].out.empty()) continue;  // written above
    const TokenTile& tile = tiles[tasks[i].tile];
    merge(&partials[i], next - i, (tile.last - tile.first) * s.group(), s.dim);
    write_rows(s, tile, partials[i].out.data(), partials[i].row_sum.data());
  }
}

// Calls work(part of the step) until every token has been in one, with the pages that these tokens are written to in
// the pool, and `before` pages before them.
template <class Work>
void in_stored_parts(const AttentionStep& s, int64_t before, Work work);

template <class T, class E>
void paged_attention(const AttentionStep& s, const Cache<T>& cache, Parallel parallel) {
  if (s.store == nullptr)
    append<T, E>(s, cache, parallel);
  else
    in_stored_parts(s, 0, [&](const AttentionStep& part) { append<T, E>(part, cache, parallel); });
  const auto in_window = [&](int64_t token, int64_t block) {
    return s.window == 0 || block > s.positions[token] / kPage - s.window;
  };
  const auto tiles = token_tiles(s);
  std::vector<BlockChoice<decltype(in_window)>> choices;
  choices.reserve(tiles.size());
  for (const auto& tile : tiles) {
    choices.push_back({{}, in_window});
    const int64_t end = s.slots[tile.last - 1] / kPage + 1;
    int64_t first = 0;
    if (s.window != 0) {
      const int64_t lowest = *std::min_element(s.positions + tile.first, s.positions + tile.last);
      first = std::max<int64_t>(0, lowest / kPage - s.window + 1);
    }
    choices.back().blocks.resize(end - first);
    std::iota(choices.back().blocks.begin(), choices.back().blocks.end(), first);
  }
  attend<T, E>(s, cache, tiles, choices, parallel);
}

}  // namespace edge

#include "plugins/paged_attention/stored.h"
