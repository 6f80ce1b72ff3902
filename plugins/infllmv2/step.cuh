// What the kernels of this folder share: a step's tokens, their sequences, and which of them choose blocks.
#pragma once
#include "plugins/paged_attention/page.cuh"
#include "plugins/simt/device.h"

namespace infllmv2 {

constexpr int FINE_STRIDE = 16;     // tokens between fine windows; each is two strides long
constexpr int FINE_SLOTS = 4;       // fine windows that end in a page
constexpr int COARSE_SLOTS = 1;     // coarse windows: 128 tokens, every 64
constexpr int FIRST_SCORED = 127;   // the first position that a coarse window ends at

// The order of `sparse_settings`.
enum Setting { DENSE_LEN, INIT, LOCAL, SELECTED };

// The sequence of new token `token`, or `sequences` if a padded step has no such token. Whole warps call it.
DEVICE int sequence_of(const int* query_start, int sequences, int token) {
  const int lane = threadIdx.x % 32;
  int sequence = 0;
  for (int first = 0; first < sequences; first += 32) {
    const bool ended = first + lane < sequences && query_start[first + lane + 1] <= token;
    sequence += __popc(__ballot_sync(~0u, ended));
  }
  return sequence;
}

// The last token of the windows and blocks that are scored for a row: those of a tree choose among what is before it.
DEVICE int last_scored(int position, int tree_start) { return min(position, tree_start - 1); }

// Is the sequence's attention sparse in this step? Lengths are not negative, so that a negative dense_len says always.
DEVICE bool is_sparse(const int* settings, const int* switch_length, int sequence) {
  return switch_length[sequence] >= settings[DENSE_LEN];
}

}  // namespace infllmv2
