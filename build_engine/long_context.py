"""Attention and rotation of an export: sparse settings that a checkpoint does not state, and the 128K factor lists.

MiniCPM4's documentation has the user edit config.json for both; `edge export` takes them as options instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edge.config import LongRope, ModelConfig, SparseConfig
from edge.errors import UsageError

CONTEXT_128K = 131072

# LongRoPE factors for 128K, by the length the checkpoint was trained for (spec: infllmv2.md 1.3, 1.4). Both lists of
# the config are replaced and nothing else, so the attention factor stays 1.
# fmt: off
_MINICPM4_8B = (
    0.9977997200264581, 1.014658295992452, 1.0349680404997148, 1.059429246056193, 1.0888815016813513,
    1.1243301355211495, 1.166977103606075, 1.2182568066927284, 1.2798772354275727, 1.3538666751582975,
    1.4426259039919596, 1.5489853358570191, 1.6762658237220625, 1.8283407612492941, 2.0096956085876183,
    2.225478927469756, 2.481536379650452, 2.784415934557119, 3.1413289096347365, 3.560047844772632, 4.048719380066383,
    4.752651957515948, 5.590913044973868, 6.584005926629993, 7.7532214876576155, 9.119754865903639,
    10.704443927019176, 12.524994176518703, 14.59739595363613, 16.93214476166354, 19.53823297353041,
    22.417131025031697, 25.568260840911098, 28.991144156566317, 32.68408069090375, 36.65174474170465,
    40.90396065611201, 45.4664008671033, 50.37147343433591, 55.6804490772103, 61.470816952306556, 67.8622707390618,
    75.00516023410414, 83.11898235973767, 92.50044360202462, 103.57086856690864, 116.9492274587385,
    118.16074567836519, 119.18497548708795, 120.04810876261652, 120.77352815196981, 121.38182790207875,
    121.89094985353891, 122.31638758099915, 122.6714244963338, 122.9673822552567, 123.21386397019609,
    123.41898278254268, 123.58957065488238, 123.73136519024158, 123.84917421274221, 123.94701903496814,
    124.02825801299717, 124.09569231686116,
)
_MINICPM4_1_8B = (
    0.9982316082870437, 1.033048153422584, 1.0749920956484724, 1.1255096879436193, 1.1863348602111476,
    1.259543828902579, 1.3476188888731149, 1.4535223827776373, 1.5807816745852985, 1.7335856049489526,
    1.9168922912975785, 2.1365471404135326, 2.3994084200118646, 2.713475511863602, 3.0880118452194134,
    3.533650295140154, 4.062463396503134, 4.687974098908333, 5.425075306704039, 6.289818967956352, 7.29902962722721,
    8.6357018163639, 10.210822723989212, 12.053807765671676, 14.193944598909404, 16.65780676784363,
    19.463620727694074, 22.628311203524586, 26.150106147261315, 30.02526691405111, 34.23183327975347,
    38.73811934094828, 43.502489489729555, 48.47627117965394, 53.61139491762471, 58.857366522037935,
    64.16798299215064, 69.51359464319125, 74.86555458220285, 80.21497790341579, 85.55322183307433, 90.89611806932027,
    96.26245306514224, 101.68269304046481, 107.18619510219668, 112.82253283014026, 118.63764063163615,
    119.88866203644656, 120.9462882391725, 121.837565139014, 122.58663780572562, 123.2147719894291,
    123.74049454862576, 124.17980424685767, 124.54641761955492, 124.85202548028222, 125.10654406389756,
    125.31835105170659, 125.49450117164764, 125.64091910903052, 125.76256945356558, 125.86360463815589,
    125.94749252260765, 126.01712561287873,
)
# fmt: on
_FACTORS_128K = {32768: _MINICPM4_8B, 65536: _MINICPM4_1_8B}


@dataclass(frozen=True)
class LongContext:
    """attention: 'model', 'dense' or 'sparse'; sparse: fields of SparseConfig to set; rope: 'model' or '128k'."""

    attention: str = "model"
    sparse: Mapping[str, int] = field(default_factory=dict)
    rope: str = "model"


def apply_long_context(config: ModelConfig, options: LongContext) -> ModelConfig:
    """The model with the attention and rotation that were asked for; UsageError if it cannot have them."""
    config = replace(config, sparse=_sparse(config, options))
    if options.rope == "model":
        return config
    if options.rope != "128k":
        raise UsageError(f"unknown --rope {options.rope!r}; choose 128k, or leave it out to keep the model's lists")
    return replace(config, long_rope=_rope_128k(config))


def max_context(config: ModelConfig, options: LongContext) -> int:
    """Tokens the exported model is made for."""
    return CONTEXT_128K if options.rope == "128k" else config.max_position_embeddings


def _sparse(config: ModelConfig, options: LongContext) -> SparseConfig | None:
    if options.attention not in ("model", "dense", "sparse"):
        raise UsageError(f"unknown --attention {options.attention!r}; choose dense or sparse")
    sparse = config.sparse
    if options.attention == "sparse":
        sparse = sparse or SparseConfig()
    if options.attention == "dense" or sparse is None:
        if options.sparse:
            raise UsageError("--sparse sets sparse attention, which this export has none of; add --attention sparse")
        return None
    return sparse.change(options.sparse)


def _rope_128k(config: ModelConfig) -> LongRope:
    rope = config.long_rope
    published = None if rope is None else _FACTORS_128K.get(rope.original_max_position_embeddings)
    if rope is None or published is None or len(published) != config.head_dim // 2:
        raise UsageError(
            "--rope 128k is published for MiniCPM4-8B and MiniCPM4.1-8B (head_dim 128, LongRoPE from 32768 or 65536 "
            "tokens), and this model is another; leave it out"
        )
    return replace(rope, short_factor=published, long_factor=published)
