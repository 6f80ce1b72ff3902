"""`edge.PackedLinear` and `edge.PackedHead` in standard ONNX operators: exact, for an executor without the kernels.

TensorRT knows no bit operations, so codes are taken out of their words by whole division and remainder. A word's
remainder by 2^16 is never negative, and what is left divides without a rest, so the sign bit does no harm. Values and
sums are float32: it holds a code times a float16 scale exactly, and ONNX Runtime multiplies no bfloat16.
"""

# -> w [n, k] float32. Eight dimensions are TensorRT's most: a step and its pairs share one.
_UNPACK = """
    axis0 = Constant<value_ints = [0]>()
    axis1 = Constant<value_ints = [1]>()
    axis2 = Constant<value_ints = [2]>()
    minus_one = Constant<value_ints = [-1]>()
    two = Constant<value_ints = [2]>()
    four = Constant<value_ints = [4]>()
    eight = Constant<value_ints = [8]>()
    sixteen = Constant<value_ints = [16]>()
    narrow_chunk = Constant<value_ints = [64]>()
    wide_chunk = Constant<value_ints = [128]>()
    bits_scalar = Constant<value_int: int = @bits>()
    group_scalar = Constant<value_int: int = @group>()
    n_scalar = Constant<value_int: int = @n>()
    k_scalar = Constant<value_int: int = @k>()
    bits = Unsqueeze(bits_scalar, axis0)
    group = Unsqueeze(group_scalar, axis0)
    n = Unsqueeze(n_scalar, axis0)
    k = Unsqueeze(k_scalar, axis0)
    is_ternary = Equal(bits, two)

    powers_wide = Constant<value_ints = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]>()
    powers = Cast<to = 6>(powers_wide)
    half_wide = Constant<value_ints = [65536]>()
    half = Cast<to = 6>(half_wide)
    word_shape = Constant<value_ints = [-1, 1, 1]>()
    words = Reshape(weights, word_shape)
    low = Mod(words, half)
    rest = Sub(words, low)
    high_signed = Div(rest, half)
    high = Mod(high_signed, half)
    halves = Concat<axis = 2>(low, high)
    field_powers = Slice(powers, axis0, sixteen, axis0, bits)
    field_column = Unsqueeze(field_powers, axis1)
    shifted = Div(halves, field_column)
    code_count = Gather<axis = 0>(powers, bits)
    fields = Mod(shifted, code_count)

    tiles_vectors = Shape<start = 0, end = 2>(weights)
    spans = Div(eight, bits)
    lanes_shape = Concat<axis = 0>(tiles_vectors, eight, four, spans, four, two, two)
    by_lane = Reshape(fields, lanes_shape)
    by_row = Transpose<perm = [0, 6, 2, 1, 4, 3, 5, 7]>(by_lane)

    is_whole_row = Equal(group, axis0)
    scale_inputs = Where(is_whole_row, k, group)
    least_chunk = Where(is_ternary, wide_chunk, narrow_chunk)
    chunk = Max(scale_inputs, least_chunk)
    chunks = Div(k, chunk)
    chunk_scales = Div(chunk, scale_inputs)
    row_scales = Div(k, scale_inputs)
    scale_lanes_shape = Concat<axis = 0>(minus_one, chunks, eight, chunk_scales, two)
    scale_rows_shape = Concat<axis = 0>(minus_one, row_scales)
    scales_flat = Reshape(scales, minus_one)
    scales_by_lane = Reshape(scales_flat, scale_lanes_shape)
    scales_transposed = Transpose<perm = [0, 4, 2, 1, 3]>(scales_by_lane)
    scales_by_row = Reshape(scales_transposed, scale_rows_shape)
    scales_in_order = Reshape(scales_flat, scale_rows_shape)
    row_scale = Where(is_whole_row, scales_in_order, scales_by_row)
    row_scale_wide = Cast<to = 1>(row_scale)
    scale_column = Unsqueeze(row_scale_wide, axis2)

    two_codes = Cast<to = 6>(two)
    middle_code = Div(code_count, two_codes)
    ternary_zero = Cast<to = 6>(axis1)
    zero = Where(is_ternary, ternary_zero, middle_code)
    centred = Sub(by_row, zero)
    centred_wide = Cast<to = 1>(centred)
    groups_shape = Concat<axis = 0>(minus_one, row_scales, scale_inputs)
    grouped = Reshape(centred_wide, groups_shape)
    scaled = Mul(grouped, scale_column)
    rows_shape = Concat<axis = 0>(minus_one, k)
    rows = Reshape(scaled, rows_shape)
    w = Slice(rows, axis0, n, axis0)
    x_wide = Cast<to = 1>(x)
"""

PACKED_LINEAR = f"""
<domain: "edge", opset_import: ["" : 21]>
PackedLinear <bits, group, n, k, plugin_namespace, plugin_version> (x, weights, scales) => (y)
{{{_UNPACK}
    y_wide = Gemm<transB = 1>(x_wide, w)
    y = CastLike(y_wide, x)
}}
"""

PACKED_HEAD = f"""
<domain: "edge", opset_import: ["" : 21]>
PackedHead <bits, group, n, k, plugin_namespace, plugin_version> (x, weights, scales) => (logits, token)
{{{_UNPACK}
    logits = Gemm<transB = 1>(x_wide, w)
    is_nan = IsNaN(logits)
    lowest = Constant<value_float = -inf>()
    ranked = Where(is_nan, lowest, logits)
    largest = ArgMax<axis = 1, keepdims = 0>(ranked)
    token = Cast<to = 6>(largest)
}}
"""
