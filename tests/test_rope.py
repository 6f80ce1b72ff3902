"""The graph's cos and sin tables against float64, at the positions where float32 has little left to give."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

import plugins
from build_engine.graph import build_graph
from edge.config import LongRope, ModelConfig
from tests.synthetic import tiny_config

# MiniCPM4-8B's list for 128K contexts, which replaces both lists (spec: infllmv2.md 1.3).
# fmt: off
FACTORS_128K = (
    0.9977997200264581, 1.014658295992452, 1.0349680404997148, 1.059429246056193, 1.0888815016813513,
    1.1243301355211495, 1.166977103606075, 1.2182568066927284, 1.2798772354275727, 1.3538666751582975,
    1.4426259039919596, 1.5489853358570191, 1.6762658237220625, 1.8283407612492941, 2.0096956085876183,
    2.225478927469756, 2.481536379650452, 2.784415934557119, 3.1413289096347365, 3.560047844772632,
    4.048719380066383, 4.752651957515948, 5.590913044973868, 6.584005926629993, 7.7532214876576155,
    9.119754865903639, 10.704443927019176, 12.524994176518703, 14.59739595363613, 16.93214476166354,
    19.53823297353041, 22.417131025031697, 25.568260840911098, 28.991144156566317, 32.68408069090375,
    36.65174474170465, 40.90396065611201, 45.4664008671033, 50.37147343433591, 55.6804490772103,
    61.470816952306556, 67.8622707390618, 75.00516023410414, 83.11898235973767, 92.50044360202462,
    103.57086856690864, 116.9492274587385, 118.16074567836519, 119.18497548708795, 120.04810876261652,
    120.77352815196981, 121.38182790207875, 121.89094985353891, 122.31638758099915, 122.6714244963338,
    122.9673822552567, 123.21386397019609, 123.41898278254268, 123.58957065488238, 123.73136519024158,
    123.84917421274221, 123.94701903496814, 124.02825801299717, 124.09569231686116,
)
# fmt: on
POSITIONS = np.array([0, 1, 32767, 32768, 65535, 131071], np.int32)


def config_128k() -> ModelConfig:
    rope = LongRope(FACTORS_128K, FACTORS_128K, 32768)
    return tiny_config(head_dim=128, rope_theta=10000.0, max_position_embeddings=32768, long_rope=rope)


def run_tables(config: ModelConfig, **feeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tables that every attention node of the graph reads, [T, d/2] each."""
    model = build_graph(config)
    attention = next(node for node in model.graph.node if node.op_type == "PagedAttention")
    tables = onnx.ModelProto()
    tables.CopyFrom(model)
    graph = tables.graph
    for values in (graph.node, graph.input, graph.output, graph.initializer):
        del values[:]
    names = list(attention.input[1:3])
    graph.node.extend(node for node in model.graph.node if set(node.output) & set(names))
    graph.input.extend(value for value in model.graph.input if value.name in feeds)
    graph.initializer.extend(t for t in model.graph.initializer if t.name in graph.node[0].input)
    shape = ["T", config.head_dim // 2]
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names)
    onnx.checker.check_model(tables)
    cos, sin = ort.InferenceSession(tables.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)
    return cos, sin


def hf_angles(positions: np.ndarray, factors: tuple[float, ...], theta: float) -> np.ndarray:
    """fl(fl(p * fl(1/ext)) * base) with torch's float32 (spec: infllmv2.md 2)."""
    exponent = torch.arange(0, 2 * len(factors), 2, dtype=torch.int64).float() / (2 * len(factors))
    inverse = 1.0 / torch.tensor(factors, dtype=torch.float32)
    stretched = torch.outer(torch.from_numpy(positions).float(), inverse)
    return (stretched * (1.0 / theta**exponent)).double().numpy()


@pytest.mark.parametrize("function", [np.cos, np.sin])
def test_tables_follow_hugging_faces_order_to_128k(function: np.ufunc) -> None:
    table = dict(zip((np.cos, np.sin), run_tables(config_128k(), positions=POSITIONS), strict=True))[function]
    angle = hf_angles(POSITIONS, FACTORS_128K, 10000.0)
    difference = np.abs(table - function(angle))
    # Two libraries' powers differ by one float32 step here and there, which turns an angle of 1e5 by 1e-2 ...
    assert (difference <= 2e-7 + 2.5e-7 * angle).all()
    # ... but where they round alike nothing may be lost. Any other order of operations changes most channels.
    assert np.median(difference[-1, :24]) < 1e-6
    exact = POSITIONS[:, None] / np.array(FACTORS_128K) / 10000.0 ** (np.arange(64) / 64)
    np.testing.assert_allclose(table, function(exact), atol=1e-2, rtol=0)


def test_every_sequence_of_a_step_chooses_its_own_list() -> None:
    short, long = tuple(1 + 0.1 * i for i in range(8)), tuple(2 + 3.0 * i for i in range(8))
    config = tiny_config(max_position_embeddings=100, long_rope=LongRope(short, long, 100))
    positions = np.array([99, 0, 1, 2, 100, 7], np.int32)
    starts, lengths = np.array([0, 1, 4, 5, 6], np.int32), np.array([100, 101, 101, 8], np.int32)
    cos, sin = run_tables(config, positions=positions, query_start=starts, switch_length=lengths)
    lists = [short, long, long, long, long, short]
    angle = np.concatenate([hf_angles(positions[i : i + 1], factors, 10000.0) for i, factors in enumerate(lists)])
    np.testing.assert_allclose(cos, np.cos(angle), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angle), atol=1e-5)


def run_functions(angle: np.ndarray) -> list[np.ndarray]:
    """ONNX Runtime's own cosine and sine of float32 angles."""
    names = {"Cos": "cos", "Sin": "sin"}
    nodes = [helper.make_node(kind, ["angle"], [name]) for kind, name in names.items()]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in ("angle", "cos", "sin")]
    graph = helper.make_graph(nodes, "trigonometry", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", plugins.OPSET)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"angle": angle})


@pytest.mark.parametrize("stretch", [1, 4])
@pytest.mark.parametrize("differ", [False, True])
def test_angles_and_factor_are_rounded_to_the_last_bit_as_before(differ: bool, stretch: int) -> None:
    """Every position of a long context, in either list: float32 products in this order and no other."""
    long = tuple(2 * factor for factor in FACTORS_128K) if differ else FACTORS_128K
    rope = LongRope(FACTORS_128K, long, 32768)
    config = dataclasses.replace(config_128k(), long_rope=rope, max_position_embeddings=32768 * stretch)
    positions = np.arange(0, 131072, 97, dtype=np.int32)
    starts = np.array([0, 500, len(positions)], np.int32)
    feeds = {"query_start": starts, "switch_length": np.array([32769, 32768], np.int32)} if differ else {}
    got = run_tables(config, positions=positions, **feeds)
    exponent = np.arange(0, 128, 2, dtype=np.float32) / np.float32(128)
    frequency = np.float32(1) / np.float32(10000) ** exponent
    inverses = [np.float32(1) / np.array(factors, np.float32) for factors in (long, FACTORS_128K)]
    inverse = np.repeat(inverses, np.diff(starts), axis=0)
    angle = (positions.astype(np.float32)[:, None] * inverse) * frequency
    factor = np.float32(config.rope_attention_factor)
    for table, plain in zip(got, run_functions(angle), strict=True):
        np.testing.assert_array_equal(table, plain * factor)


def test_attention_factor_scales_both_tables() -> None:
    config = config_128k()
    stretched = dataclasses.replace(config, max_position_embeddings=131072)
    plain, scaled = (run_tables(c, positions=POSITIONS) for c in (config, stretched))
    # sqrt(1 + ln 4 / ln 32768) (spec: infllmv2.md 2); the shipped configurations have exactly 1.
    np.testing.assert_allclose(scaled, np.multiply(plain, 1.0645813), rtol=1e-6)
    np.testing.assert_array_equal(run_tables(config_128k(), positions=POSITIONS[:1])[0], 1.0)
