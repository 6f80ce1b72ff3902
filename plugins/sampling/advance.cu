// Feeds the drawn tokens back (plugins/sampling/meaning.py): the next decode step's inputs, without the host. A thread
// a sequence.
#include "plugins/simt/device.h"

struct AdvanceArguments {
  const int32_t* token;    // [rows], of this step
  int32_t* input_ids;      // [rows], of the next step, as the others below
  int32_t* positions;      // [rows]
  int32_t* switch_length;  // [rows]
  int32_t* step;           // [rows]: where in the request the next token will be (plugins/sampling)
  int32_t* count;          // [rows]: tokens in `history`
  int32_t* history;        // [capacity, rows]
  int32_t rows, capacity;
};

template <int THREADS>
DEVICE void advance(const AdvanceArguments& a) {
  const int row = blockIdx.x * THREADS + threadIdx.x;
  if (row >= a.rows) return;
  const int32_t token = a.token[row], position = a.positions[row] + 1, count = a.count[row];
  a.input_ids[row] = token < 0 ? 0 : token;  // -1: no finite logit, which the host will see in the history
  a.positions[row] = position;
  // A sequence that holds this position has one token more.
  if (a.switch_length[row] < position + 1) a.switch_length[row] = position + 1;
  a.step[row] += 1;
  if (count < a.capacity) {
    a.history[count * a.rows + row] = token;
    a.count[row] = count + 1;
  }
}
