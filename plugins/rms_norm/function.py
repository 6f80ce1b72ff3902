"""`edge.RMSNorm` and `edge.AddRMSNorm` in standard ONNX operators; any float type, statistics in float32."""

RMS_NORM = """
<domain: "edge", opset_import: ["" : 21]>
RMSNorm <epsilon, plugin_namespace, plugin_version> (x, weight) => (y)
{
    wide = Cast<to = 1>(x)
    square = Mul(wide, wide)
    axis = Constant<value_ints = [-1]>()
    mean = ReduceMean<keepdims = 1>(square, axis)
    eps = Constant<value_float: float = @epsilon>()
    shifted = Add(mean, eps)
    root = Sqrt(shifted)
    normal = Div(wide, root)
    rounded = CastLike(normal, x)
    y = Mul(rounded, weight)
}
"""

ADD_RMS_NORM = """
<domain: "edge", opset_import: ["" : 21]>
AddRMSNorm <scale, epsilon, plugin_namespace, plugin_version> (hidden, branch, weight) => (total, y)
{
    factor = Constant<value_float: float = @scale>()
    branch_wide = Cast<to = 1>(branch)
    scaled_wide = Mul(branch_wide, factor)
    scaled = CastLike(scaled_wide, hidden)
    total = Add(hidden, scaled)
    wide = Cast<to = 1>(total)
    square = Mul(wide, wide)
    axis = Constant<value_ints = [-1]>()
    mean = ReduceMean<keepdims = 1>(square, axis)
    eps = Constant<value_float: float = @epsilon>()
    shifted = Add(mean, eps)
    root = Sqrt(shifted)
    normal = Div(wide, root)
    rounded = CastLike(normal, hidden)
    y = Mul(rounded, weight)
}
"""
