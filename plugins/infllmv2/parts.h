// Block selection of single tokens, of which many threads share each: a head's windows come in parts, by their number
// alone, so that a token chooses the same blocks whatever is computed beside it and by however many threads.
#pragma once
#include "plugins/infllmv2/select.h"

namespace edge {

constexpr int64_t kPartWindows = 1024;  // fine ones, of 16 K tokens
constexpr int64_t kPartCoarse = kPartWindows * kCoarseSlots / kFineSlots;

// What a thread chooses blocks in.
template <class T, class E>
SelectionBuffers<T, E>& selection_buffers() {
  static thread_local SelectionBuffers<T, E> buffers;
  return buffers;
}

inline bool is_dense(const SparseSettings& settings, const int32_t* switch_length, const TokenTile& tile) {
  return settings.dense_len >= 0 && switch_length[tile.sequence] < settings.dense_len;
}

inline void set_all_blocks(const AttentionStep& s, const TokenTile& tile, BlockMask& mask) {
  for (int64_t t = tile.first; t < tile.last; ++t) set_range(mask.row(t, tile.head), 0, s.slots[t] / kPage + 1);
}

// One token of one KV head.
struct TokenScores {
  TokenTile tile;
  bool is_chosen;                // by score; otherwise all blocks are
  Buffer<float> row_max, row_sum;  // [parts, group], brought together in the first part
  Buffer<float> block_scores;    // [score_stride(blocks)]
  Buffer<float> before;          // [parts]: what a part found for the block in front of its own
};

template <class T, class E>
class TokenSelection {
 public:
  TokenSelection(const AttentionStep& s, const T* fine, const T* coarse, const SparseSettings& settings,
                 const int32_t* switch_length, const TokenTile* tiles, size_t count)
      : s_(s), fine_(fine), coarse_(coarse), settings_(settings) {
    for (const TokenTile* tile = tiles; tile != tiles + count; ++tile) {
      const int64_t blocks = s.positions[tile->first] / kPage + 1;
      const bool is_chosen = blocks > settings.selected_blocks && !is_dense(settings, switch_length, *tile);
      tokens_.push_back({*tile, is_chosen, {}, {}, {}, {}});
      if (!is_chosen) continue;
      const int64_t parts = std::max(divide_up(coarse_windows(s, *tile).end, kPartCoarse),
                                     divide_up(fine_windows(s, settings, *tile).end, kPartWindows));
      for (int64_t part = 0; part < parts; ++part) parts_.push_back({tokens_.size() - 1, part});
      TokenScores& token = tokens_.back();
      fill(token.row_max, parts * s.group(), 0.0f);
      fill(token.row_sum, parts * s.group(), 0.0f);
      fill(token.block_scores, score_stride(blocks), 0.0f);
      fill(token.before, parts, 0.0f);
    }
  }

  void run(BlockMask& mask, Parallel parallel) {
    parallel(parts_.size(), [&](size_t i) { sum_up(tokens_[parts_[i].token], parts_[i].index); });
    for (TokenScores& token : tokens_) bring_together(token);
    parallel(parts_.size(), [&](size_t i) { score(tokens_[parts_[i].token], parts_[i].index); });
    for (TokenScores& token : tokens_) choose(token, mask);
  }

 private:
  struct Part {
    size_t token;
    int64_t index;
  };

  static WindowRange part_of_range(WindowRange all, int64_t part, int64_t windows) {
    return {part * windows, std::min(all.end, (part + 1) * windows)};
  }

  void sum_up(TokenScores& token, int64_t part) const {
    SelectionBuffers<T, E>& buffers = selection_buffers<T, E>();
    load_selecting_queries(s_, settings_, token.tile, buffers);
    coarse_pass(s_, coarse_, token.tile, part_of_range(coarse_windows(s_, token.tile), part, kPartCoarse), buffers);
    std::copy_n(buffers.tile.row_max.begin(), s_.group(), &token.row_max[part * s_.group()]);
    std::copy_n(buffers.tile.row_sum.begin(), s_.group(), &token.row_sum[part * s_.group()]);
  }

  void bring_together(TokenScores& token) const {
    const int64_t group = s_.group(), values = token.row_max.size();
    for (int64_t r = group; r < values; ++r) {
      float &row_max = token.row_max[r % group], &row_sum = token.row_sum[r % group];
      const float top = std::max(row_max, token.row_max[r]);
      row_sum = row_sum * exp(splat(row_max - top))[0] + token.row_sum[r] * exp(splat(token.row_max[r] - top))[0];
      row_max = top;
    }
  }

  void score(TokenScores& token, int64_t part) const {
    const WindowRange range = part_of_range(fine_windows(s_, settings_, token.tile), part, kPartWindows);
    if (range.begin >= range.end) return;  // the last windows belong to local blocks
    SelectionBuffers<T, E>& buffers = selection_buffers<T, E>();
    load_selecting_queries(s_, settings_, token.tile, buffers);
    std::copy_n(token.row_max.begin(), s_.group(), buffers.tile.row_max.begin());
    std::copy_n(token.row_sum.begin(), s_.group(), buffers.tile.row_sum.begin());
    fine_pass(s_, fine_, token.tile, range, 0, &token.block_scores[range.begin / kFineSlots], &token.before[part],
              buffers);
  }

  void choose(TokenScores& token, BlockMask& mask) const {
    if (!token.is_chosen) return set_all_blocks(s_, token.tile, mask);
    for (size_t part = 1; part < token.before.size(); ++part) {
      const size_t block = part * kPartWindows / kFineSlots - 1;
      if (block < token.block_scores.size())
        token.block_scores[block] = std::max(token.block_scores[block], token.before[part]);
    }
    choose_blocks(settings_, s_.positions[token.tile.first] / kPage, token.block_scores.data(),
                  mask.row(token.tile.first, token.tile.head));
    set_tree_blocks(s_, token.tile, mask);
  }

  const AttentionStep& s_;
  const T *fine_, *coarse_;
  const SparseSettings& settings_;
  std::vector<TokenScores> tokens_;
  std::vector<Part> parts_;
};

}  // namespace edge
