"""`edge.InfLLMv2Attention` in standard ONNX operators: exact, for an executor without a kernel.

Windows are scored for all rows of the batch at once and masked. With at most as many rows as sequences (decode) only
the best blocks are gathered: as many as a row selects, or as a sequence below dense_len has. Longer steps score every
key and mask, as `edge.PagedAttention` does. No size depends on data, which TensorRT needs: rows that end no window
rewrite a slot that never holds one, the first of their sequence, with what it holds. Slots that no row sees may hold
anything, even NaN. `edge.InfLLMv2AttentionInt8` is the same on int8 codes with scales, and averages what these stand
for.
"""

from plugins.paged_attention.function import ROW_SEQUENCES, VISIBLE_KEYS, load, store


def _index(name: str, shape: str, *parts: str) -> str:
    """`name` [*shape, len(parts)] for GatherND and ScatterND; parts broadcast to `shape`, which ends in 1."""
    names = [f"{name}_part{i}" for i in range(len(parts))]
    expanded = "".join(f"    {n} = Expand({part}, {shape})\n" for n, part in zip(names, parts, strict=True))
    return f"{expanded}    {name} = Concat<axis = -1>({', '.join(names)})\n"


def _constants(kind: str, **values: object) -> str:
    return "".join(f"    {name} = Constant<{kind} = {value}>()\n" for name, value in values.items())


_CONSTANTS = (
    _constants("value_int", zero=0, one=1, two=2, page_tokens=64)
    + _constants("value_ints", axis0=[0], axis1=[1], axis2=[2], axis3=[3], minus_one=[-1])
    + _constants("value_ints", axes12=[1, 2], axes23=[2, 3], axes123=[1, 2, 3], end_pads=[0, 0, 0, 0, 0, 1])
    + _constants("value_float", nothing_wide=0.0, one_wide=1.0, lowest_wide=-3e38, highest_wide=3e38)
    + _constants("value_float", removed_wide=-1.0, largest_exponent=80.0)
    + _constants("value_float: float", scale_wide="@scale")
    + _constants("value_int: int", hq_scalar="@num_heads", hkv_scalar="@num_kv_heads", d_scalar="@head_dim")
    + _constants("value_int: int", use_nope_int="@use_nope")
    + """
    use_nope_bool = Cast<to = 9>(use_nope_int)
    hq = Unsqueeze(hq_scalar, axis0)
    hkv = Unsqueeze(hkv_scalar, axis0)
    d = Unsqueeze(d_scalar, axis0)
    group = Div(hq, hkv)
    nothing = CastLike(nothing_wide, qkv)
    lowest = CastLike(lowest_wide, qkv)
"""
)

_ROTATE = """
    qkv_shape = Concat<axis = 0>(axis0, minus_one, d)
    heads = Reshape(qkv, qkv_shape)
    hqk = Add(hq, hkv)
    split_qk_v = Concat<axis = 0>(hqk, hkv)
    split_q_k = Concat<axis = 0>(hq, hkv)
    qk_plain, v = Split<axis = 1>(heads, split_qk_v)
    q_plain, k_plain = Split<axis = 1>(qk_plain, split_q_k)
    qk_wide = Cast<to = 1>(qk_plain)
    first, second = Split<axis = -1, num_outputs = 2>(qk_wide)
    cos_heads = Unsqueeze(cos, axis1)
    sin_heads = Unsqueeze(sin, axis1)
    first_cos = Mul(first, cos_heads)
    second_sin = Mul(second, sin_heads)
    second_cos = Mul(second, cos_heads)
    first_sin = Mul(first, sin_heads)
    rotated_first = Sub(first_cos, second_sin)
    rotated_second = Add(second_cos, first_sin)
    qk_rotated_wide = Concat<axis = -1>(rotated_first, rotated_second)
    qk_rotated = CastLike(qk_rotated_wide, qkv)
    q, k = Split<axis = 1>(qk_rotated, split_q_k)
"""

_APPEND = (
    ROW_SEQUENCES
    + """
    sequence_column = Unsqueeze(sequence, axis1)

    position = Cast<to = 7>(positions)
    position_column = Unsqueeze(position, axis1)
    table = Cast<to = 7>(page_table)
    table_shape = Shape(table)
    sequences, pages_per_sequence_1d = Split<axis = 0, num_outputs = 2>(table_shape)
    pages_per_sequence = Squeeze(pages_per_sequence_1d, axis0)
    row_table = Gather<axis = 0>(table, sequence)
    block = Div(position, page_tokens)
    block_column = Unsqueeze(block, axis1)
    slot = Mod(position, page_tokens)
    page = GatherElements<axis = 1>(row_table, block_column)

    planes_scalar = Add(use_nope_int, two)
    planes = Unsqueeze(planes_scalar, axis0)
    plane_range = Range(zero, planes_scalar, one)
    plane_parts = Unsqueeze(plane_range, axes123)
    page_parts = Unsqueeze(page, axis2)
    kv_heads = Range(zero, hkv_scalar, one)
    head_parts = Unsqueeze(kv_heads, axis1)
    slot_parts = Unsqueeze(slot, axes12)
    kv_shape = Concat<axis = 0>(planes, token_count, hkv, axis1)
"""
    + _index("kv_index", "kv_shape", "page_parts", "plane_parts", "head_parts", "slot_parts")
    + """
    k_plane = Unsqueeze(k, axis0)
    v_plane = Unsqueeze(v, axis0)
    k_plain_plane = Unsqueeze(k_plain, axis0)
    every_plane = Concat<axis = 0>(k_plane, v_plane, k_plain_plane)
    kv_new = Slice(every_plane, axis0, planes, axis0)
    averaged_plane = Mul(use_nope_int, two)
"""
)


def _compress(name: str, stride: int, int8: bool) -> str:
    """Average the windows of two strides that end in this step: every sequence has at most one in each stride.

    Sums run over the innermost axis: ONNX Runtime's order of summation depends on the number of windows otherwise.
    """
    window = 2 * stride
    return (
        _constants("value_int", NAME_stride=stride, NAME_per_page=64 // stride, NAME_last_in_stride=stride - 1)
        + _constants("value_int", NAME_first_end=window - 1, NAME_first_token=1 - window)
        + _constants("value_ints", NAME_window_1d=[window])
        + """
    NAME_in_stride = Mod(position, NAME_stride)
    NAME_at_edge = Equal(NAME_in_stride, NAME_last_in_stride)
    NAME_is_full = GreaterOrEqual(position, NAME_first_end)
    NAME_ends = And(NAME_at_edge, NAME_is_full)
    NAME_ends_wide = Cast<to = 1>(NAME_ends)
    NAME_whole_strides = Div(token_count, NAME_stride)
    NAME_most_ends = Add(NAME_whole_strides, sequences)
    NAME_count = Min(NAME_most_ends, token_count)
    NAME_is_end, NAME_row = TopK<axis = 0>(NAME_ends_wide, NAME_count)
    NAME_valid = Cast<to = 9>(NAME_is_end)

    NAME_position = Gather<axis = 0>(position, NAME_row)
    NAME_position_column = Unsqueeze(NAME_position, axis1)
    NAME_row_table = Gather<axis = 0>(row_table, NAME_row)
    NAME_span = Range(NAME_first_token, one, one)
    NAME_token_any = Add(NAME_position_column, NAME_span)
    NAME_token = Max(NAME_token_any, zero)
    NAME_token_block = Div(NAME_token, page_tokens)
    NAME_token_page = GatherElements<axis = 1>(NAME_row_table, NAME_token_block)
    NAME_token_slot = Mod(NAME_token, page_tokens)
    NAME_page_of = Unsqueeze(NAME_token_page, axes23)
    NAME_slot_of = Unsqueeze(NAME_token_slot, axes23)
    NAME_keys_shape = Concat<axis = 0>(NAME_count, NAME_window_1d, hkv, axis1)
"""
        + _index("NAME_keys_index", "NAME_keys_shape", "NAME_page_of", "averaged_plane", "head_parts", "NAME_slot_of")
        + load("NAME_keys_stored", "GatherND", "NAME_keys_index", int8)
        + """
    NAME_keys = Cast<to = 1>(NAME_keys_stored)
    NAME_keys_by_channel = Transpose<perm = [0, 2, 3, 1]>(NAME_keys)
    NAME_mean = ReduceMean<keepdims = 0>(NAME_keys_by_channel, minus_one)
"""
    ).replace("NAME", name) + _store_windows(name)


def _store_windows(name: str) -> str:
    """The averages to their slots; rows that end no window rewrite the slot that never holds one."""
    return (
        """
    NAME_window_slot = Div(NAME_position, NAME_stride)
    NAME_any_slot = Where(NAME_valid, NAME_window_slot, zero)
    NAME_page_index = Div(NAME_any_slot, NAME_per_page)
    NAME_page_index_column = Unsqueeze(NAME_page_index, axis1)
    NAME_page = GatherElements<axis = 1>(NAME_row_table, NAME_page_index_column)
    NAME_page_parts = Unsqueeze(NAME_page, axis2)
    NAME_slot = Mod(NAME_any_slot, NAME_per_page)
    NAME_slot_parts = Unsqueeze(NAME_slot, axes12)
    NAME_index_shape = Concat<axis = 0>(NAME_count, hkv, axis1)
"""
        + _index("NAME_index", "NAME_index_shape", "NAME_page_parts", "head_parts", "NAME_slot_parts")
        + """
    NAME_old_stored = GatherND(NAME_pool, NAME_index)
    NAME_old = Cast<to = 1>(NAME_old_stored)
    NAME_valid_parts = Unsqueeze(NAME_valid, axes12)
    NAME_new_wide = Where(NAME_valid_parts, NAME_mean, NAME_old)
    NAME_new = CastLike(NAME_new_wide, NAME_pool)
    NAME_pool_out = ScatterND(NAME_pool, NAME_index, NAME_new)
"""
    ).replace("NAME", name)


def _window_products(name: str) -> str:
    """Every row times every window of the batch, and which of them the row may see; window j is slot j + 1."""
    return """
    NAME_pages_stored = Gather<axis = 0>(NAME_pool_out, table_flat)
    NAME_pages = Cast<to = 1>(NAME_pages_stored)
    NAME_by_head = Transpose<perm = [1, 3, 0, 2]>(NAME_pages)
    NAME_flat = Reshape(NAME_by_head, keys_flat_shape)
    NAME_product = MatMul(q_scored_by_head, NAME_flat)
    NAME_slots_per_sequence = Mul(pages_per_sequence, NAME_per_page)
    NAME_slot_count = Mul(table_size, NAME_per_page)
    NAME_slot_range = Range(zero, NAME_slot_count, one)
    NAME_slot_sequence = Div(NAME_slot_range, NAME_slots_per_sequence)
    NAME_slot_index = Mod(NAME_slot_range, NAME_slots_per_sequence)
    NAME_same_sequence = Equal(NAME_slot_sequence, sequence_column)
    NAME_past_strides = Div(next_position_column, NAME_stride)
    NAME_not_future = Less(NAME_slot_index, NAME_past_strides)
    NAME_is_window = GreaterOrEqual(NAME_slot_index, one)
    NAME_past = And(NAME_same_sequence, NAME_not_future)
    NAME_visible = And(NAME_past, NAME_is_window)
""".replace("NAME", name)


_SCORE = (
    """
    table_flat = Reshape(table, minus_one)
    table_size = Size(table)
    keys_flat_shape = Concat<axis = 0>(hkv, axis1, d, minus_one)
    grouped_shape = Concat<axis = 0>(axis0, hkv, group, d)
    next_position_column = Add(position_column, one)
    q_scored = Where(use_nope_bool, q_plain, q)
    q_scored_wide = Cast<to = 1>(q_scored)
    q_scored_scaled = Mul(q_scored_wide, scale_wide)
    q_scored_grouped = Reshape(q_scored_scaled, grouped_shape)
    q_scored_by_head = Transpose<perm = [1, 2, 0, 3]>(q_scored_grouped)
"""
    + _window_products("c2")
    + """
    c2_masked = Where(c2_visible, c2_product, lowest_wide)
    c2_maximum = ReduceMax(c2_masked, minus_one)
    c2_shifted = Sub(c2_masked, c2_maximum)
    c2_weight_any = Exp(c2_shifted)
    c2_weight = Where(c2_visible, c2_weight_any, nothing_wide)
    c2_total_any = ReduceSum(c2_weight, minus_one)
    c2_total = Max(c2_total_any, one_wide)
    has_coarse = Greater(c2_past_strides, one)
"""
    + _window_products("c1")
    + """
    c1_shifted_any = Sub(c1_product, c2_maximum)
    c1_shifted = Min(c1_shifted_any, largest_exponent)
    c1_weight_raw = Exp(c1_shifted)
    c1_weight = Div(c1_weight_raw, c2_total)
    window_score_any = ReduceSum<keepdims = 0>(c1_weight, axis1)
    is_nan = IsNaN(window_score_any)
    is_number = Not(is_nan)
    scored_windows = And(c1_visible, has_coarse)
    scored = And(scored_windows, is_number)
    window_score_batch = Where(scored, window_score_any, nothing_wide)
    own_shape = Concat<axis = 0>(hkv, token_count, sequences, minus_one)
    window_score_sequences = Reshape(window_score_batch, own_shape)
    window_score_flat = ReduceMax<keepdims = 0>(window_score_sequences, axis2)
    paged_shape = Concat<axis = 0>(hkv, token_count, pages_per_sequence_1d, minus_one)
    window_score = Reshape(window_score_flat, paged_shape)
    own_best = ReduceMax<keepdims = 0>(window_score, axis3)
    first_of_page = Gather<axis = 3>(window_score, zero)
    first_of_next = Slice(first_of_page, axis1, far_end, axis2)
    first_of_next_padded = Pad(first_of_next, end_pads)
    block_score = Max(own_best, first_of_next_padded)
"""
)

_SELECT = """
    settings = Cast<to = 7>(sparse_settings)
    dense_len, init_blocks, local_blocks, selected_blocks = Split<axis = 0, num_outputs = 4>(settings)
    switch_wide = Cast<to = 7>(switch_length)
    switch_row = Gather<axis = 0>(switch_wide, sequence)
    is_dense = Less(switch_row, dense_len)
    is_dense_column = Unsqueeze(is_dense, axis1)

    block_range = Range(zero, pages_per_sequence, one)
    is_init = Less(block_range, init_blocks)
    first_local = Sub(block_column, local_blocks)
    is_local = GreaterOrEqual(block_range, first_local)
    is_forced = Or(is_init, is_local)
    is_known = LessOrEqual(block_range, block_column)
    forced_score = Where(is_forced, highest_wide, block_score)
    priority = Where(is_known, forced_score, removed_wide)

    dense_len_and_page = Add(dense_len, page_tokens)
    dense_last_page = Sub(dense_len_and_page, one)
    dense_pages = Div(dense_last_page, page_tokens)
    wanted = Max(dense_pages, selected_blocks)
    candidates = Min(wanted, pages_per_sequence_1d)
    best_priority, best = TopK<axis = -1>(priority, candidates)
    candidates_scalar = Squeeze(candidates, axis0)
    rank = Range(zero, candidates_scalar, one)
    is_selected = Less(rank, selected_blocks)
    kept = Or(is_dense_column, is_selected)
    best_shape = Concat<axis = 0>(hkv, token_count, candidates)

    q_wide = Cast<to = 1>(q)
    q_scaled_wide = Mul(q_wide, scale_wide)
    q_scaled = CastLike(q_scaled_wide, qkv)
    q_grouped = Reshape(q_scaled, grouped_shape)
    slot_range = Range(zero, page_tokens, one)
"""

_CHOOSE = (
    """
        row_table_shape = Concat<axis = 0>(hkv, token_count, pages_per_sequence_1d)
        row_table_heads = Expand(row_table, row_table_shape)
        best_page = GatherElements<axis = 2>(row_table_heads, best)
        best_page_parts = Unsqueeze(best_page, axis3)
        block_head_parts = Unsqueeze(kv_heads, axes123)
        best_index_shape = Concat<axis = 0>(best_shape, axis1)
"""
    + _index("best_k_index", "best_index_shape", "best_page_parts", "zero", "block_head_parts")
    + _index("best_v_index", "best_index_shape", "best_page_parts", "one", "block_head_parts")
)

_GATHER_SELECTED = """
        row_keys_shape = Concat<axis = 0>(hkv, token_count, minus_one, d)
        best_k_blocks = CastLike(best_k_stored, qkv)
        best_v_blocks = CastLike(best_v_stored, qkv)
        best_k = Reshape(best_k_blocks, row_keys_shape)
        best_v_any = Reshape(best_v_blocks, row_keys_shape)

        best_column = Unsqueeze(best, axis3)
        best_start = Mul(best_column, page_tokens)
        best_position = Add(best_start, slot_range)
        last_visible = Unsqueeze(position, axes12)
        best_not_future = LessOrEqual(best_position, last_visible)
        kept_column = Unsqueeze(kept, axis2)
        best_visible_blocks = And(best_not_future, kept_column)
        best_visible_shape = Concat<axis = 0>(hkv, token_count, minus_one)
        best_visible = Reshape(best_visible_blocks, best_visible_shape)
        best_visible_column = Unsqueeze(best_visible, axis3)
        best_v = Where(best_visible_column, best_v_any, nothing)

        q_by_row = Transpose<perm = [1, 0, 2, 3]>(q_grouped)
        best_k_transposed = Transpose<perm = [0, 1, 3, 2]>(best_k)
        row_scores = MatMul(q_by_row, best_k_transposed)
        best_visible_row = Unsqueeze(best_visible, axis2)
        row_masked = Where(best_visible_row, row_scores, lowest)
        row_weights = Softmax<axis = -1>(row_masked)
        row_mixed = MatMul(row_weights, best_v)
        row_by_token = Transpose<perm = [1, 0, 2, 3]>(row_mixed)
        gathered = Cast<to = 1>(row_by_token)
"""

_MASK_ALL = (
    """
        kept_number = Cast<to = 1>(kept)
        kept_heads = Expand(kept_number, best_shape)
        chosen_shape = Concat<axis = 0>(hkv, token_count, pages_per_sequence_1d)
        none_chosen = Expand(nothing_wide, chosen_shape)
        chosen_number = ScatterElements<axis = 2>(none_chosen, best, kept_heads)

        k_pages = Gather<axis = 1>(pages, zero)
        v_pages = Gather<axis = 1>(pages, one)
        k_by_head = Transpose<perm = [1, 3, 0, 2]>(k_pages)
        v_by_head = Transpose<perm = [1, 0, 2, 3]>(v_pages)
        v_flat_shape = Concat<axis = 0>(hkv, axis1, minus_one, d)
        k_flat_stored = Reshape(k_by_head, keys_flat_shape)
        v_flat_stored = Reshape(v_by_head, v_flat_shape)
        k_flat = CastLike(k_flat_stored, qkv)
        v_flat_any = CastLike(v_flat_stored, qkv)

"""
    + VISIBLE_KEYS
    + """
        v_flat = Where(written_column, v_flat_any, nothing)

        key_block = Div(key_position, page_tokens)
        chosen_keys_number = Gather<axis = 2>(chosen_number, key_block)
        chosen_keys = Cast<to = 9>(chosen_keys_number)
        attended = And(chosen_keys, visible)
        attended_heads = Unsqueeze(attended, axis1)
        q_by_head = Transpose<perm = [1, 2, 0, 3]>(q_grouped)
        scores = MatMul(q_by_head, k_flat)
        masked = Where(attended_heads, scores, lowest)
        weights = Softmax<axis = -1>(masked)
        mixed = MatMul(weights, v_flat)
        by_token = Transpose<perm = [2, 0, 1, 3]>(mixed)
        all_masked = Cast<to = 1>(by_token)
"""
)


def _attend(int8: bool) -> str:
    best = "".join(load(f"best_{x}_stored", "GatherND", f"best_{x}_index", int8) for x in "kv")
    pages = load("pages", "Gather<axis = 0>", "table_flat", int8)
    return f"""
    few_rows = LessOrEqual(token_count, sequences)
    is_decode = Squeeze(few_rows, axis0)
    attention_wide = If (is_decode) <
        then_branch = selected_blocks_graph () => (float gathered) {{{_CHOOSE}{best}{_GATHER_SELECTED}        }},
        else_branch = all_blocks_graph () => (float all_masked) {{
{pages}{_MASK_ALL}        }}
    >
    attention = CastLike(attention_wide, qkv)
    output_shape = Concat<axis = 0>(axis0, minus_one)
    output = Reshape(attention, output_shape)
"""


def _infllmv2_attention(int8: bool) -> str:
    suffix, scales, scales_out = ("Int8", "kv_scales, ", "kv_scales_out, ") if int8 else ("", "", "")
    windows = _compress("c1", 16, int8) + _compress("c2", 64, int8)
    return f"""
<domain: "edge", opset_import: ["" : 21]>
InfLLMv2Attention{suffix}
    <num_heads, num_kv_heads, head_dim, scale, use_nope, max_blocks, plugin_namespace, plugin_version>
    (qkv, cos, sin, kv_pool, {scales}c1_pool, c2_pool, positions, query_start, page_table, switch_length,
     sparse_settings) => (output, kv_pool_out, {scales_out}c1_pool_out, c2_pool_out)
{{{_CONSTANTS}{_ROTATE}{_APPEND}{store("kv_index", int8)}{windows}{_SCORE}{_SELECT}{_attend(int8)}}}
"""


INFLLMV2_ATTENTION, INFLLMV2_ATTENTION_INT8 = _infllmv2_attention(int8=False), _infllmv2_attention(int8=True)
