"""`edge.SwiGLU` in standard ONNX operators."""

SWIGLU = """
<domain: "edge", opset_import: ["" : 21]>
SwiGLU <plugin_namespace, plugin_version> (gate_up) => (y)
{
    gate, up = Split<axis = -1, num_outputs = 2>(gate_up)
    wide = Cast<to = 1>(gate)
    sigmoid = Sigmoid(wide)
    silu_wide = Mul(wide, sigmoid)
    silu = CastLike(silu_wide, gate_up)
    y = Mul(silu, up)
}
"""
