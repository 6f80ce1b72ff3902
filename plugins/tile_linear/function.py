"""`edge.TileLinear` in standard ONNX operators.

ONNX Runtime computes the weights once, when it loads the model, and keeps them as float32.
"""

TILE_LINEAR = """
<domain: "edge", opset_import: ["" : 21]>
TileLinear <n, plugin_namespace, plugin_version> (x, weights) => (y)
{
    axis0 = Constant<value_ints = [0]>()
    minus_one = Constant<value_ints = [-1]>()
    n_scalar = Constant<value_int: int = @n>()
    n = Unsqueeze(n_scalar, axis0)
    by_row = Transpose<perm = [0, 2, 1]>(weights)
    inputs = Shape<start = 1, end = 2>(weights)
    rows_shape = Concat<axis = 0>(minus_one, inputs)
    padded = Reshape(by_row, rows_shape)
    rows = Slice(padded, axis0, n, axis0)
    w = Cast<to = 1>(rows)
    y = Gemm<transB = 1>(x, w)
}
"""
