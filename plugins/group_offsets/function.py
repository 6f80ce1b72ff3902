"""`edge.AddGroupOffsets` in standard ONNX operators."""

ADD_GROUP_OFFSETS = """
<domain: "edge", opset_import: ["" : 21]>
AddGroupOffsets <plugin_namespace, plugin_version> (x, product, offsets) => (y)
{
    zero = Constant<value_ints = [0]>()
    minus_one = Constant<value_ints = [-1]>()
    groups = Shape<start = 0, end = 1>(offsets)
    shape = Concat<axis = 0>(zero, groups, minus_one)
    grouped = Reshape(x, shape)
    sums = ReduceSum<keepdims = 0>(grouped, minus_one)
    wide = CastLike(offsets, x)
    correction = MatMul(sums, wide)
    y = Add(product, correction)
}
"""
