"""`edge.InfLLMv2Attention` in standard ONNX operators: exact, for an executor without a kernel.

Windows are scored for all rows of the batch at once and masked. With at most as many rows as sequences (decode) only
the best blocks are gathered: as many as a row selects, or as a sequence below dense_len has. Longer steps score every
key and mask, as `edge.PagedAttention` does. No size depends on data, which TensorRT needs: rows that end no window
rewrite a slot that never holds one, the first of their sequence, with what it holds. Slots that no row sees may hold
anything, even NaN. Steps with rows of a tree are long ones. `edge.InfLLMv2AttentionInt8` is the same on int8 codes with
scales, and averages what these stand for.
"""

from plugins.infllmv2.window_function import compress, window_products
from plugins.paged_attention.function import ROW_SEQUENCES, ROW_SLOTS, constants, indices, load, store, visible_keys

_CONSTANTS = (
    constants("value_int", zero=0, one=1, two=2, page_tokens=64)
    + constants("value_ints", axis0=[0], axis1=[1], axis2=[2], axis3=[3], minus_one=[-1])
    + constants("value_ints", axes12=[1, 2], axes23=[2, 3], axes123=[1, 2, 3], end_pads=[0, 0, 0, 0, 0, 1])
    + constants("value_float", nothing_wide=0.0, one_wide=1.0, lowest_wide=-3e38, highest_wide=3e38)
    + constants("value_float", removed_wide=-1.0, largest_exponent=80.0)
    + constants("value_float: float", scale_wide="@scale")
    + constants("value_int: int", hq_scalar="@num_heads", hkv_scalar="@num_kv_heads", d_scalar="@head_dim")
    + constants("value_int: int", use_nope_int="@use_nope")
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
    + ROW_SLOTS
    + """
    is_before_tree_row = Less(slot, row_tree_start)
    sequence_column = Unsqueeze(sequence, axis1)

    position = Cast<to = 7>(positions)
    position_column = Unsqueeze(position, axis1)
    table = Cast<to = 7>(page_table)
    table_shape = Shape(table)
    sequences, pages_per_sequence_1d = Split<axis = 0, num_outputs = 2>(table_shape)
    pages_per_sequence = Squeeze(pages_per_sequence_1d, axis0)
    row_table = Gather<axis = 0>(table, sequence)
    page_index = Div(slot_column, page_tokens)
    place = Mod(slot, page_tokens)
    page = GatherElements<axis = 1>(row_table, page_index)

    planes_scalar = Add(use_nope_int, two)
    planes = Unsqueeze(planes_scalar, axis0)
    plane_range = Range(zero, planes_scalar, one)
    plane_parts = Unsqueeze(plane_range, axes123)
    page_parts = Unsqueeze(page, axis2)
    kv_heads = Range(zero, hkv_scalar, one)
    head_parts = Unsqueeze(kv_heads, axis1)
    place_parts = Unsqueeze(place, axes12)
    kv_shape = Concat<axis = 0>(planes, token_count, hkv, axis1)
"""
    + indices("kv_index", "kv_shape", "page_parts", "plane_parts", "head_parts", "place_parts")
    + """
    k_plane = Unsqueeze(k, axis0)
    v_plane = Unsqueeze(v, axis0)
    k_plain_plane = Unsqueeze(k_plain, axis0)
    every_plane = Concat<axis = 0>(k_plane, v_plane, k_plain_plane)
    kv_new = Slice(every_plane, axis0, planes, axis0)
    averaged_plane = Mul(use_nope_int, two)
"""
)


_SCORE = (
    """
    table_flat = Reshape(table, minus_one)
    table_size = Size(table)
    keys_flat_shape = Concat<axis = 0>(hkv, axis1, d, minus_one)
    grouped_shape = Concat<axis = 0>(axis0, hkv, group, d)
    next_position_column = Add(position_column, one)
    seen_end_column = Min(next_position_column, tree_start_column)
    q_scored = Where(use_nope_bool, q_plain, q)
    q_scored_wide = Cast<to = 1>(q_scored)
    q_scored_scaled = Mul(q_scored_wide, scale_wide)
    q_scored_grouped = Reshape(q_scored_scaled, grouped_shape)
    q_scored_by_head = Transpose<perm = [1, 2, 0, 3]>(q_scored_grouped)
"""
    + window_products("c2")
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
    + window_products("c1")
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

    block_column = Div(position_column, page_tokens)
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
    place_range = Range(zero, page_tokens, one)
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
    + indices("best_k_index", "best_index_shape", "best_page_parts", "zero", "block_head_parts")
    + indices("best_v_index", "best_index_shape", "best_page_parts", "one", "block_head_parts")
)

_GATHER_SELECTED = """
        row_keys_shape = Concat<axis = 0>(hkv, token_count, minus_one, d)
        best_k_blocks = CastLike(best_k_stored, qkv)
        best_v_blocks = CastLike(best_v_stored, qkv)
        best_k = Reshape(best_k_blocks, row_keys_shape)
        best_v_any = Reshape(best_v_blocks, row_keys_shape)

        best_column = Unsqueeze(best, axis3)
        best_start = Mul(best_column, page_tokens)
        best_slot = Add(best_start, place_range)
        last_visible = Unsqueeze(slot, axes12)
        best_not_future = LessOrEqual(best_slot, last_visible)
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
    + visible_keys(window=False)
    + """
        v_flat = Where(written_column, v_flat_any, nothing)

        chosen_keys_number = Gather<axis = 2>(chosen_number, key_block)
        chosen_keys = Cast<to = 9>(chosen_keys_number)
        tree_start_block = Div(tree_start_column, page_tokens)
        is_in_tree_block = GreaterOrEqual(key_block, tree_start_block)
        is_tree_row = Not(is_before_tree_row)
        is_tree_row_column = Unsqueeze(is_tree_row, axis1)
        is_attended_anyway = And(is_in_tree_block, is_tree_row_column)
        attended_keys = Or(chosen_keys, is_attended_anyway)
        attended = And(attended_keys, visible)
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
    before_tree_number = Cast<to = 7>(is_before_tree_row)
    no_tree_number = ReduceMin<keepdims = 0>(before_tree_number, axis0)
    no_tree = Cast<to = 9>(no_tree_number)
    few_rows_scalar = Squeeze(few_rows, axis0)
    is_decode = And(few_rows_scalar, no_tree)
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
    windows = compress("c1", 16, int8) + compress("c2", 64, int8)
    return f"""
<domain: "edge", opset_import: ["" : 21]>
InfLLMv2Attention{suffix}
    <num_heads, num_kv_heads, head_dim, scale, use_nope, max_blocks, plugin_namespace, plugin_version>
    (qkv, cos, sin, kv_pool, {scales}c1_pool, c2_pool, positions, slots, query_start, page_table, tree_start, tree_mask,
     switch_length, sparse_settings) => (output, kv_pool_out, {scales_out}c1_pool_out, c2_pool_out)
{{{_CONSTANTS}{_ROTATE}{_APPEND}{store("kv_index", int8)}{windows}{_SCORE}{_SELECT}{_attend(int8)}}}
"""


INFLLMV2_ATTENTION, INFLLMV2_ATTENTION_INT8 = _infllmv2_attention(int8=False), _infllmv2_attention(int8=True)
