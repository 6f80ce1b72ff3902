"""`edge.BlockLinear` and `edge.BlockLinearOffsets` in standard ONNX operators: exact, x is not rounded.

ONNX Runtime computes the weights once, when it loads the model, and keeps them as float32.
"""

# -> scaled [n padded * blocks, block] float32, and the shapes that go on.
_SCALED = """
    axis0 = Constant<value_ints = [0]>()
    axis1 = Constant<value_ints = [1]>()
    minus_one = Constant<value_ints = [-1]>()
    two = Constant<value_ints = [2]>()
    eight = Constant<value_ints = [8]>()
    sixteen = Constant<value_ints = [16]>()
    bits_scalar = Constant<value_int: int = @bits>()
    block_scalar = Constant<value_int: int = @block>()
    n_scalar = Constant<value_int: int = @n>()
    k_scalar = Constant<value_int: int = @k>()
    bits = Unsqueeze(bits_scalar, axis0)
    block = Unsqueeze(block_scalar, axis0)
    n = Unsqueeze(n_scalar, axis0)
    k = Unsqueeze(k_scalar, axis0)

    powers_wide = Constant<value_ints = [1, 2, 4, 8, 16, 32, 64, 128, 256]>()
    powers = Cast<to = 6>(powers_wide)
    field_powers = Slice(powers, axis0, eight, axis0, bits)
    code_count = Gather<axis = 0>(powers, bits)
    bytes = Cast<to = 6>(codes)
    byte_column = Unsqueeze(bytes, minus_one)
    moved = Div(byte_column, field_powers)
    fields = Mod(moved, code_count)
    by_row = Transpose<perm = [0, 3, 1, 2, 5, 4]>(fields)
    block_shape = Concat<axis = 0>(minus_one, block)
    grouped = Reshape(by_row, block_shape)

    two_codes = Cast<to = 6>(two)
    middle_code = Div(code_count, two_codes)
    ternary_zero = Cast<to = 6>(axis1)
    is_ternary = Equal(bits, two)
    zero = Where(is_ternary, ternary_zero, middle_code)
    centred = Sub(grouped, zero)
    centred_wide = Cast<to = 1>(centred)
    column_shape = Constant<value_ints = [-1, 1]>()
    scale_rows = Transpose<perm = [0, 2, 1]>(scales)
    scale_column = Reshape(scale_rows, column_shape)
    scaled = Mul(centred_wide, scale_column)
"""

# values [n padded * blocks, block] -> y
_MULTIPLY = """
    tiles_blocks = Shape<start = 0, end = 2>(codes)
    tiles = Slice(tiles_blocks, axis0, axis1)
    all_rows = Mul(tiles, sixteen)
    rows_shape = Concat<axis = 0>(all_rows, minus_one)
    rows = Reshape(values, rows_shape)
    starts = Constant<value_ints = [0, 0]>()
    ends = Concat<axis = 0>(n, k)
    w = Slice(rows, starts, ends)
    y = Gemm<transB = 1>(x, w)
"""

BLOCK_LINEAR = f"""
<domain: "edge", opset_import: ["" : 21]>
BlockLinear <bits, block, n, k, plugin_namespace, plugin_version> (x, codes, scales) => (y)
{{{_SCALED}
    values = Identity(scaled)
{_MULTIPLY}}}
"""

BLOCK_LINEAR_OFFSETS = f"""
<domain: "edge", opset_import: ["" : 21]>
BlockLinearOffsets <bits, block, n, k, plugin_namespace, plugin_version> (x, codes, scales, offsets) => (y)
{{{_SCALED}
    offset_rows = Transpose<perm = [0, 2, 1]>(offsets)
    offset_flat = Reshape(offset_rows, column_shape)
    offset_column = Cast<to = 1>(offset_flat)
    values = Add(scaled, offset_column)
{_MULTIPLY}}}
"""
