"""`edge.RopeTable` and `edge.LongRopeTable` in standard ONNX operators, rounding in Hugging Face's order (spec 2).

| input | shape | |
|---|---|---|
| positions | [T] int32 | |
| query_start, switch_length | [B + 1], [B] int32 | LongRopeTable: a sequence longer than original_length is long |
| inverse_short, inverse_long | [d / 2] float32 | 1 / LongRoPE's factors; RopeTable takes the short ones only |
| frequency | [d / 2] float32 | 1 / theta^(2c / d) |

Outputs: cos, sin [T, d / 2] float32 of fl(fl(p * inverse) * frequency), times attention_factor.
"""

from plugins.paged_attention.function import ROW_SEQUENCES

_TABLES = """
    position_column = Unsqueeze(positions, axis1)
    position = Cast<to = 1>(position_column)
    stretched = Mul(position, inverse)
    angle = Mul(stretched, frequency)
    factor = Constant<value_float: float = @attention_factor>()
    cos_plain = Cos(angle)
    sin_plain = Sin(angle)
    cos = Mul(cos_plain, factor)
    sin = Mul(sin_plain, factor)
"""

ROPE_TABLE = f"""
<domain: "edge", opset_import: ["" : 21]>
RopeTable <attention_factor, plugin_namespace, plugin_version> (positions, inverse_short, frequency) => (cos, sin)
{{
    axis1 = Constant<value_ints = [1]>()
    inverse = Identity(inverse_short)
{_TABLES}}}
"""

LONG_ROPE_TABLE = f"""
<domain: "edge", opset_import: ["" : 21]>
LongRopeTable <original_length, attention_factor, plugin_namespace, plugin_version>
    (positions, query_start, switch_length, inverse_short, inverse_long, frequency) => (cos, sin)
{{
    zero = Constant<value_int = 0>()
    one = Constant<value_int = 1>()
    axis0 = Constant<value_ints = [0]>()
    axis1 = Constant<value_ints = [1]>()
{ROW_SEQUENCES}
    limit = Constant<value_int: int = @original_length>()
    length = Cast<to = 7>(switch_length)
    sequence_is_long = Greater(length, limit)
    is_long = Gather<axis = 0>(sequence_is_long, sequence)
    is_long_column = Unsqueeze(is_long, axis1)
    inverse = Where(is_long_column, inverse_long, inverse_short)
{_TABLES}}}
"""
