"""Linear layers with float weights on the CPU: `edge.TileLinear` (x, weights) -> y = x W^T, attribute n.

x [T, K] and y [T, n] are float32, weights float32, float16 or bfloat16. They are used where the file has them, so that
those of 16 bits stay so in memory, which is half of what a token reads. They lie as the kernel takes them,
[row tiles, K, 16 rows], padded with zeros to whole tiles.
"""
