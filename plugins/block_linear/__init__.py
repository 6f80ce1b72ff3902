"""Linear layers with low-bit weights on the CPU: y = x W^T, W[n, k] = (code - zero) * scale (+ offset).

`edge.BlockLinear` (x, codes, scales) -> y, and `edge.BlockLinearOffsets` with offsets behind the scales, for groups
with a minimum of their own. Attributes: bits (2, 4 or 8, zero as in plugins/linear), block, n, k. A scale, and an
offset, belongs to `block` consecutive inputs of a row. x and y are float32. What plugins/linear is to a GPU's tensor
cores, this is to a processor's dot products of bytes: the kernels round x to int8 codes with a scale a block, the
function does not.

Codes, uint8 [row tiles, blocks, vectors, 16 rows, 4]: a vector has 32 / bits inputs of each of the tile's 16 rows, so
that a 512-bit register holds it whole, two 256-bit ones or four of 128 bits by halves or quarters. Byte j of a row has
code j of the vector in its lowest bits, code 4 + j in the next, and so on: each field of the whole register is four
neighbouring inputs of every row, what one dot product takes.

Scales float32 and offsets float16, [row tiles, blocks, 16 rows]. Rows are padded to whole tiles and inputs to whole
blocks, with code `zero`, scale 0 and offset 0.
"""
