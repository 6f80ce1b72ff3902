"""Averaged keys in standard ONNX operators: kept up with every step, and multiplied with every row."""

from plugins.paged_attention.function import constants, indices, load


def compress(name: str, stride: int, int8: bool) -> str:
    """Average the windows of two strides that end with a row before its sequence's tree: at most one in each stride.

    Sums run over the innermost axis: ONNX Runtime's order of summation depends on the number of windows otherwise.
    """
    window = 2 * stride
    return (
        constants("value_int", NAME_stride=stride, NAME_per_page=64 // stride, NAME_last_in_stride=stride - 1)
        + constants("value_int", NAME_first_end=window - 1, NAME_first_token=1 - window)
        + constants("value_ints", NAME_window_1d=[window])
        + """
    NAME_in_stride = Mod(slot, NAME_stride)
    NAME_at_edge = Equal(NAME_in_stride, NAME_last_in_stride)
    NAME_is_full = GreaterOrEqual(slot, NAME_first_end)
    NAME_is_whole = And(NAME_at_edge, NAME_is_full)
    NAME_ends = And(NAME_is_whole, is_before_tree_row)
    NAME_ends_wide = Cast<to = 1>(NAME_ends)
    NAME_whole_strides = Div(token_count, NAME_stride)
    NAME_most_ends = Add(NAME_whole_strides, sequences)
    NAME_count = Min(NAME_most_ends, token_count)
    NAME_is_end, NAME_row = TopK<axis = 0>(NAME_ends_wide, NAME_count)
    NAME_valid = Cast<to = 9>(NAME_is_end)

    NAME_last = Gather<axis = 0>(slot, NAME_row)
    NAME_last_column = Unsqueeze(NAME_last, axis1)
    NAME_row_table = Gather<axis = 0>(row_table, NAME_row)
    NAME_span = Range(NAME_first_token, one, one)
    NAME_token_any = Add(NAME_last_column, NAME_span)
    NAME_token = Max(NAME_token_any, zero)
    NAME_token_block = Div(NAME_token, page_tokens)
    NAME_token_page = GatherElements<axis = 1>(NAME_row_table, NAME_token_block)
    NAME_token_place = Mod(NAME_token, page_tokens)
    NAME_page_of = Unsqueeze(NAME_token_page, axes23)
    NAME_place_of = Unsqueeze(NAME_token_place, axes23)
    NAME_keys_shape = Concat<axis = 0>(NAME_count, NAME_window_1d, hkv, axis1)
"""
        + indices("NAME_keys_index", "NAME_keys_shape", "NAME_page_of", "averaged_plane", "head_parts", "NAME_place_of")
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
    NAME_window_slot = Div(NAME_last, NAME_stride)
    NAME_any_slot = Where(NAME_valid, NAME_window_slot, zero)
    NAME_page_index = Div(NAME_any_slot, NAME_per_page)
    NAME_page_index_column = Unsqueeze(NAME_page_index, axis1)
    NAME_page = GatherElements<axis = 1>(NAME_row_table, NAME_page_index_column)
    NAME_page_parts = Unsqueeze(NAME_page, axis2)
    NAME_slot = Mod(NAME_any_slot, NAME_per_page)
    NAME_slot_parts = Unsqueeze(NAME_slot, axes12)
    NAME_index_shape = Concat<axis = 0>(NAME_count, hkv, axis1)
"""
        + indices("NAME_index", "NAME_index_shape", "NAME_page_parts", "head_parts", "NAME_slot_parts")
        + """
    NAME_old_stored = GatherND(NAME_pool, NAME_index)
    NAME_old = Cast<to = 1>(NAME_old_stored)
    NAME_valid_parts = Unsqueeze(NAME_valid, axes12)
    NAME_new_wide = Where(NAME_valid_parts, NAME_mean, NAME_old)
    NAME_new = CastLike(NAME_new_wide, NAME_pool)
    NAME_pool_out = ScatterND(NAME_pool, NAME_index, NAME_new)
"""
    ).replace("NAME", name)


def window_products(name: str) -> str:
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
    NAME_past_strides = Div(seen_end_column, NAME_stride)
    NAME_not_future = Less(NAME_slot_index, NAME_past_strides)
    NAME_is_window = GreaterOrEqual(NAME_slot_index, one)
    NAME_past = And(NAME_same_sequence, NAME_not_future)
    NAME_visible = And(NAME_past, NAME_is_window)
""".replace("NAME", name)
