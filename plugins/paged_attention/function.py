"""`edge.PagedAttention` in standard ONNX operators: exact, and as large as the score matrix it builds.

It is the reference an executor without a kernel runs. Every key of the batch is scored against every row and
masked, so its memory is O(Hq * T * B * P * 64); the kernels never build that matrix. Queries are scaled before
the product, which float16 could not hold otherwise, and slots that no row sees may hold anything, even NaN.
`edge.PagedAttentionInt8` is the same on int8 codes with a scale for each token, plane and KV head.
"""

# To which sequence each row of a step belongs: as many as end at or before it. Shared with edge.InfLLMv2Attention.
ROW_SEQUENCES = """
    token_count = Shape(positions)
    tokens = Squeeze(token_count, axis0)
    rows = Range(zero, tokens, one)
    far_end = Constant<value_ints = [2147483647]>()
    query_start_wide = Cast<to = 7>(query_start)
    query_end = Slice(query_start_wide, axis1, far_end)
    rows_column = Unsqueeze(rows, axis1)
    ended = LessOrEqual(query_end, rows_column)
    ended_count = Cast<to = 7>(ended)
    sequence = ReduceSum<keepdims = 0>(ended_count, axis1)
"""

# Where a row is kept, and where its sequence's tree begins. Shared with edge.InfLLMv2Attention.
ROW_SLOTS = """
    slot = Cast<to = 7>(slots)
    slot_column = Unsqueeze(slot, axis1)
    tree_start_wide = Cast<to = 7>(tree_start)
    row_tree_start = Gather<axis = 0>(tree_start_wide, sequence)
    tree_start_column = Unsqueeze(row_tree_start, axis1)
"""

_TREE_BITS = """
    mask_words_signed = Cast<to = 7>(tree_mask)
    mask_is_negative = Less(mask_words_signed, zero)
    mask_wrap = Where(mask_is_negative, mask_word_values, zero)
    mask_words = Add(mask_words_signed, mask_wrap)
    mask_words_column = Unsqueeze(mask_words, axis2)
    mask_shifted = Div(mask_words_column, mask_powers)
    mask_bits_of_words = Mod(mask_shifted, mask_base)
    mask_bits = Reshape(mask_bits_of_words, minus_one)
    first_mask_bit = Mul(rows_column, mask_width)
"""

_KEYS = """
    keys_per_sequence = Mul(pages_per_sequence, page_tokens)
    key_count = Mul(table_size, page_tokens)
    key_range = Range(zero, key_count, one)
    key_sequence = Div(key_range, keys_per_sequence)
    key_slot = Mod(key_range, keys_per_sequence)
    same_sequence = Equal(key_sequence, sequence_column)
    not_future = LessOrEqual(key_slot, slot_column)
    tree_offset = Sub(key_slot, tree_start_column)
    is_before_tree = Less(tree_offset, zero)
    tree_offset_from_0 = Max(tree_offset, zero)
    tree_offset_to_63 = Min(tree_offset_from_0, last_mask_bit)
    tree_bit_index = Add(tree_offset_to_63, first_mask_bit)
    tree_bit = Gather<axis = 0>(mask_bits, tree_bit_index)
    tree_bit_set = Equal(tree_bit, one)
    has_tree_bit = LessOrEqual(tree_offset, last_mask_bit)
    is_seen_in_tree = And(tree_bit_set, has_tree_bit)
    is_seen = Or(is_before_tree, is_seen_in_tree)
    not_future_seen = And(not_future, is_seen)
    VISIBLE = And(same_sequence, not_future_seen)
    key_block = Div(key_slot, page_tokens)
"""

_BLOCKS_IN_WINDOW = """    window_scalar = Constant<value_int: int = @window>()
    no_window = Equal(window_scalar, zero)
    own_block = Div(position_column, page_tokens)
    last_hidden_block = Sub(own_block, window_scalar)
    is_near = Greater(key_block, last_hidden_block)
    is_in_window = Or(is_near, no_window)
    visible = And(visible_anywhere, is_in_window)
"""

_WRITTEN = """    visible_number = Cast<to = 1>(visible)
    written_number = ReduceMax<keepdims = 0>(visible_number, axis0)
    written = Cast<to = 9>(written_number)
    written_column = Unsqueeze(written, axis1)
"""


def constants(kind: str, **values: object) -> str:
    """A Constant for each value; kind: the attribute that holds it."""
    return "".join(f"    {name} = Constant<{kind} = {value}>()\n" for name, value in values.items())


def indices(name: str, shape: str, *parts: str) -> str:
    """`name` [*shape, len(parts)] for GatherND and ScatterND; parts broadcast to `shape`, which ends in 1."""
    names = [f"{name}_part{i}" for i in range(len(parts))]
    expanded = "".join(f"    {n} = Expand({part}, {shape})\n" for n, part in zip(names, parts, strict=True))
    return f"{expanded}    {name} = Concat<axis = -1>({', '.join(names)})\n"


def visible_keys(window: bool) -> str:
    """Every key of the batch against every row, and which keys any row sees. Shared with edge.InfLLMv2Attention.

    Bits are taken by divisions: TensorRT has no BitShift.
    """
    powers = constants("value_ints", mask_powers=[2**bit for bit in range(32)])
    numbers = constants("value_int", mask_word_values=2**32, mask_base=2, mask_width=64, last_mask_bit=63)
    keys = (
        _KEYS.replace("VISIBLE", "visible_anywhere") + _BLOCKS_IN_WINDOW
        if window
        else _KEYS.replace("VISIBLE", "visible")
    )
    return powers + numbers + _TREE_BITS + keys + _WRITTEN


# kv_new, with an index for each vector of it, to the pool. Shared with edge.InfLLMv2Attention.
_STORE = """
    kv_new_stored = CastLike(kv_new, kv_pool)
    kv_pool_out = ScatterND(kv_pool, INDEX, kv_new_stored)
"""

# The largest magnitude of a vector becomes 127 steps. Casts, because TensorRT's parser refuses the second copy of a
# function with a QuantizeLinear: it gives both layers one name.
_STORE_INT8 = """
    most_steps = Constant<value_float = 127.0>()
    no_steps = Constant<value_float = 0.0>()
    kv_new_wide = Cast<to = 1>(kv_new)
    kv_new_size = Abs(kv_new_wide)
    kv_new_most = ReduceMax(kv_new_size, minus_one)
    kv_new_is_something = Greater(kv_new_most, no_steps)
    kv_new_steps_any = Div(most_steps, kv_new_most)
    kv_new_steps = Where(kv_new_is_something, kv_new_steps_any, no_steps)
    kv_new_in_steps = Mul(kv_new_wide, kv_new_steps)
    kv_new_rounded = Round(kv_new_in_steps)
    kv_new_codes = Cast<to = 3>(kv_new_rounded)
    kv_new_scale = Div(kv_new_most, most_steps)
    kv_new_scales = Squeeze(kv_new_scale, minus_one)
    kv_pool_out = ScatterND(kv_pool, INDEX, kv_new_codes)
    kv_scales_out = ScatterND(kv_scales, INDEX, kv_new_scales)
"""

_LOAD_INT8 = """    NAME_codes = GATHER(kv_pool_out, INDEX)
    NAME_in_steps = Cast<to = 1>(NAME_codes)
    NAME_scales = GATHER(kv_scales_out, INDEX)
    NAME_scale = Unsqueeze(NAME_scales, minus_one)
    NAME = Mul(NAME_in_steps, NAME_scale)
"""


def store(index: str, int8: bool) -> str:
    """The vectors kv_new [..., d] to the places that `index` [..., 4] names; slots keep what they have elsewhere."""
    return (_STORE_INT8 if int8 else _STORE).replace("INDEX", index)


def load(name: str, gather: str, index: str, int8: bool) -> str:
    """`name`: what the pool holds at `index`, [..., d], as it is stored or, of int8, as float32."""
    text = _LOAD_INT8 if int8 else "    NAME = GATHER(kv_pool_out, INDEX)\n"
    return text.replace("NAME", name).replace("GATHER", gather).replace("INDEX", index)


def _paged_attention(int8: bool) -> str:
    suffix, scales, scales_out = ("Int8", "kv_scales, ", ", kv_scales_out") if int8 else ("", "", "")
    return f"""
<domain: "edge", opset_import: ["" : 21]>
PagedAttention{suffix} <num_heads, num_kv_heads, head_dim, scale, plugin_namespace, plugin_version, window: int = 0>
    (qkv, cos, sin, kv_pool, {scales}positions, slots, query_start, page_table, tree_start, tree_mask)
    => (output, kv_pool_out{scales_out})
{{{_ROTATE}{ROW_SEQUENCES}{ROW_SLOTS}{_INDEX}{store("index", int8)}
{load("pages", "Gather<axis = 0>", "table_flat", int8)}{_ATTEND}}}
"""


_ROTATE = """
    zero = Constant<value_int = 0>()
    one = Constant<value_int = 1>()
    axis0 = Constant<value_ints = [0]>()
    axis1 = Constant<value_ints = [1]>()
    axis2 = Constant<value_ints = [2]>()
    axes12 = Constant<value_ints = [1, 2]>()
    minus_one = Constant<value_ints = [-1]>()
    page_tokens = Constant<value_int = 64>()
    hq_scalar = Constant<value_int: int = @num_heads>()
    hkv_scalar = Constant<value_int: int = @num_kv_heads>()
    d_scalar = Constant<value_int: int = @head_dim>()
    hq = Unsqueeze(hq_scalar, axis0)
    hkv = Unsqueeze(hkv_scalar, axis0)
    d = Unsqueeze(d_scalar, axis0)
    group = Div(hq, hkv)

    qkv_shape = Concat<axis = 0>(axis0, minus_one, d)
    heads = Reshape(qkv, qkv_shape)
    split_heads = Concat<axis = 0>(hq, hkv, hkv)
    q, k, v = Split<axis = 1>(heads, split_heads)
    cos_heads = Unsqueeze(cos, axis1)
    sin_heads = Unsqueeze(sin, axis1)
    q_wide = Cast<to = 1>(q)
    q_first, q_second = Split<axis = -1, num_outputs = 2>(q_wide)
    q_fc = Mul(q_first, cos_heads)
    q_ss = Mul(q_second, sin_heads)
    q_sc = Mul(q_second, cos_heads)
    q_fs = Mul(q_first, sin_heads)
    q_rot_first = Sub(q_fc, q_ss)
    q_rot_second = Add(q_sc, q_fs)
    q_rot_wide = Concat<axis = -1>(q_rot_first, q_rot_second)
    scale_wide = Constant<value_float: float = @scale>()
    q_scaled_wide = Mul(q_rot_wide, scale_wide)
    q_scaled = CastLike(q_scaled_wide, qkv)
    k_wide = Cast<to = 1>(k)
    k_first, k_second = Split<axis = -1, num_outputs = 2>(k_wide)
    k_fc = Mul(k_first, cos_heads)
    k_ss = Mul(k_second, sin_heads)
    k_sc = Mul(k_second, cos_heads)
    k_fs = Mul(k_first, sin_heads)
    k_rot_first = Sub(k_fc, k_ss)
    k_rot_second = Add(k_sc, k_fs)
    k_rot_wide = Concat<axis = -1>(k_rot_first, k_rot_second)
    k_rot = CastLike(k_rot_wide, qkv)

"""

_INDEX = """
    position = Cast<to = 7>(positions)
    table = Cast<to = 7>(page_table)
    page_index = Div(slot, page_tokens)
    place = Mod(slot, page_tokens)
    sequence_column = Unsqueeze(sequence, axis1)
    page_index_column = Unsqueeze(page_index, axis1)
    table_index = Concat<axis = 1>(sequence_column, page_index_column)
    page = GatherND(table, table_index)

    index_shape = Concat<axis = 0>(token_count, hkv, axis1)
    page_column = Unsqueeze(page, axes12)
    place_column = Unsqueeze(place, axes12)
    kv_heads = Range(zero, hkv_scalar, one)
    kv_heads_row = Unsqueeze(kv_heads, axis1)
    page_part = Expand(page_column, index_shape)
    place_part = Expand(place_column, index_shape)
    head_part = Expand(kv_heads_row, index_shape)
    key_part = Mul(page_part, zero)
    value_part = Add(key_part, one)
    key_index = Concat<axis = 2>(page_part, key_part, head_part, place_part)
    value_index = Concat<axis = 2>(page_part, value_part, head_part, place_part)
    index = Concat<axis = 0>(key_index, value_index)
    kv_new = Concat<axis = 0>(k_rot, v)
    table_flat = Reshape(table, minus_one)
"""

_ATTEND = (
    """
    k_pages_5d, v_pages_5d = Split<axis = 1, num_outputs = 2>(pages)
    k_pages = Squeeze(k_pages_5d, axis1)
    v_pages = Squeeze(v_pages_5d, axis1)
    k_by_head = Transpose<perm = [1, 3, 0, 2]>(k_pages)
    v_by_head = Transpose<perm = [1, 0, 2, 3]>(v_pages)
    k_flat_shape = Concat<axis = 0>(hkv, axis1, d, minus_one)
    v_flat_shape = Concat<axis = 0>(hkv, axis1, minus_one, d)
    k_flat_stored = Reshape(k_by_head, k_flat_shape)
    v_flat_stored = Reshape(v_by_head, v_flat_shape)
    k_flat = CastLike(k_flat_stored, qkv)
    v_flat_any = CastLike(v_flat_stored, qkv)

    table_shape = Shape(table)
    pages_per_sequence = Gather<axis = 0>(table_shape, one)
    table_size = Size(table)
    position_column = Unsqueeze(position, axis1)
"""
    + visible_keys(window=True)
    + """    nothing_wide = Constant<value_float = 0.0>()
    nothing = CastLike(nothing_wide, qkv)
    v_flat = Where(written_column, v_flat_any, nothing)

    q_grouped_shape = Concat<axis = 0>(axis0, hkv, group, d)
    q_grouped = Reshape(q_scaled, q_grouped_shape)
    q_by_head = Transpose<perm = [1, 2, 0, 3]>(q_grouped)
    lowest_wide = Constant<value_float = -3.0e38>()
    lowest = CastLike(lowest_wide, qkv)
    scores = MatMul(q_by_head, k_flat)
    masked = Where(visible, scores, lowest)
    weights = Softmax<axis = -1>(masked)
    mixed = MatMul(weights, v_flat)
    by_token = Transpose<perm = [2, 0, 1, 3]>(mixed)
    output_shape = Concat<axis = 0>(axis0, minus_one)
    output = Reshape(by_token, output_shape)
"""
)

PAGED_ATTENTION, PAGED_ATTENTION_INT8 = _paged_attention(int8=False), _paged_attention(int8=True)
