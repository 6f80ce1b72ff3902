// Rows of a table, scaled (plugins/embedding/meaning.py): the embedding, the choice of the rows that need logits, and
// the scale before the head. Block (x, y) copies 8 * THREADS columns of row x, a thread 16 bytes.
#include "plugins/simt/device.h"

struct RowsArguments {
  const void* table;     // [table_rows, 8 vectors]
  const int32_t* index;  // [rows], or null: row x is the table's row x
  void* y;               // [rows, 8 vectors]
  int32_t vectors, table_rows;
  float scale;  // rounded to T before the product
};

template <class T, int THREADS>
DEVICE void scaled_rows(const RowsArguments& a) {
  const int v = blockIdx.y * THREADS + threadIdx.x;
  if (v >= a.vectors) return;
  const int32_t row = a.index ? __ldg(a.index + blockIdx.x) : static_cast<int32_t>(blockIdx.x);
  uint4 x = make_uint4(0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu);  // NaN in half and bf16
  if (row >= 0 && row < a.table_rows) {
    x = static_cast<const uint4*>(a.table)[static_cast<int64_t>(row) * a.vectors + v];
    const uint32_t scale = twice(from_float<T>(a.scale));
    x = make_uint4(multiply<T>(x.x, scale), multiply<T>(x.y, scale), multiply<T>(x.z, scale), multiply<T>(x.w, scale));
  }
  static_cast<uint4*>(a.y)[static_cast<int64_t>(blockIdx.x) * a.vectors + v] = x;
}
