// CPU kernel of edge.InfLLMv2Attention (contract: plugins/infllmv2/__init__.py, meaning: meaning.py beside it).
#pragma once
#include "plugins/infllmv2/parts.h"

namespace edge {

// Blocks that any token of the tile selected.
inline Buffer<int32_t> selected_by_any(const BlockMask& mask, const TokenTile& tile) {
  Buffer<uint64_t> any(mask.words);
  for (int64_t t = tile.first; t < tile.last; ++t)
    for (int64_t w = 0; w < mask.words; ++w) any[w] |= mask.row(t, tile.head)[w];
  int64_t count = 0;
  for (const uint64_t bits : any) count += __builtin_popcountll(bits);
  Buffer<int32_t> blocks;
  blocks.reserve(count);
  for (int64_t w = 0; w < mask.words; ++w)
    for (uint64_t bits = any[w]; bits != 0; bits &= bits - 1) blocks.push_back(w * 64 + __builtin_ctzll(bits));
  return blocks;
}

// T, E: the cache and what it is multiplied as; W, WE: the compressed keys.
template <class T, class E, class W, class WE>
void infllmv2_attention(const AttentionStep& s, const Cache<T>& cache, W* fine, W* coarse,
                        const int32_t* switch_length, const SparseSettings& settings, Parallel parallel) {
  const auto keep = [&](const AttentionStep& part) {
    append<T, E>(part, cache, parallel);
    compress<E>(part, cache, fine, coarse, settings.use_nope ? 2 : 0, parallel);
  };
  if (s.store == nullptr)
    keep(s);
  else
    in_stored_parts(s, 1, keep);  // a window reaches back one page
  const auto tiles = token_tiles(s);
  BlockMask mask(s.tokens(), s.kv_heads, s.table_width);
  struct InMask {
    const BlockMask* mask;
    int64_t head;
    bool operator()(int64_t token, int64_t block) const {
      return mask->row(token, head)[block / 64] >> (block % 64) & 1;
    }
  };
  std::vector<BlockChoice<InMask>> choices;
  choices.reserve(tiles.size());
  EarlyLocks early(s);
  const bool is_decode = s.is_decode();
  // With pages on disk a head's are read while the next head chooses.
  const size_t together = is_decode && s.store != nullptr ? 1 : tiles.size();
  for (size_t first = 0; first < tiles.size(); first += together) {
    if (is_decode)
      TokenSelection<W, WE>(s, fine, coarse, settings, switch_length, &tiles[first], together).run(mask, parallel);
    else
      parallel(tiles.size(), [&](size_t i) {
        if (is_dense(settings, switch_length, tiles[i]))
          set_all_blocks(s, tiles[i], mask);
        else
          select_tile(s, fine, coarse, settings, tiles[i], mask, selection_buffers<W, WE>());
      });
    for (size_t i = first; i < first + together; ++i) {
      choices.push_back({selected_by_any(mask, tiles[i]), InMask{&mask, tiles[i].head}});
      if (is_decode) early.lock(tiles[i], choices.back().blocks);
    }
  }
  attend<T, E>(s, cache, tiles, choices, parallel, early.units());
}

}  // namespace edge
