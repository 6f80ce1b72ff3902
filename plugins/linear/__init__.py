"""Linear layers with low-bit weights: y = x W^T, W[n, k] = (code - zero) * scale, and the language model's head.

`edge.PackedLinear` (x, weights, scales) -> y, and `edge.PackedHead` -> logits and token, the number of the largest;
their attributes are bits, group, n and k.

| bits | codes | zero | |
|---|---|---|---|
| 4 | 0..15 | 8 | symmetric int4 (GPTQ) |
| 2 | 0..2 (3 is 2) | 1 | ternary (BitCPM) |
| 8 | 0..255 | 128 | int8, the head |

A scale belongs to 32, 64 or 128 consecutive inputs of a row (`group`), then it is float16, or to the whole row (group
0), then it is float32. x and y are float16 or bfloat16, sums float32, the head's logits float32.

Packed codes, int32 [row tiles, vectors, 32 lanes, 4]: a tile has 16 rows, a vector 256 / bits inputs, which fill 16
bytes of each lane in mma's A layout, so that a warp reads 512 contiguous bytes into registers and needs no shuffle. mma
leaves the order of its inputs open as long as weights and x agree; this one gives a lane x in natural order, 16 bytes
at a time. Lane 4g + q has of rows g and g + 8, of every 32 inputs, those from 8q to 8q + 7: four (from 8q on) for one
step of 16 inputs, four for the next. A step's four pairs are

    (row g, inputs 0, 1) (row g + 8, inputs 0, 1) (row g, inputs 2, 3) (row g + 8, inputs 2, 3)

and of all pairs in a lane's order, pair p is bits `bits * f` and up of both halves of word p // (16 / bits), with
f = p % (16 / bits); the lower input is in the lower half.

Packed scales, float16 [row tiles, chunks, 8, groups of a chunk, 2]: those of rows g and g + 8 side by side. A chunk is
128 inputs for group 128 and for 2 bits, else 64. Group 0: float32 [rows].
Rows are padded to whole tiles, with code `zero` and scale 0; inputs must be whole vectors and chunks.
"""
