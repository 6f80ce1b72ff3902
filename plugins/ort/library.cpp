// The operators of domain `edge` as ONNX Runtime custom operators. ONNX Runtime prefers them to the FunctionProtos.
#include <cstring>
#include <new>

#include "plugins/block_linear/cpu.h"
#include "plugins/infllmv2/cpu.h"
#include "plugins/infllmv2/keep.h"
#include "plugins/offload/exports.h"
#include "plugins/ort/memory.h"
#include "plugins/ort/ort_abi.h"
#include "plugins/paged_attention/cpu.h"
#include "plugins/rms_norm/cpu.h"
#include "plugins/swiglu/cpu.h"
#include "plugins/tile_linear/cpu.h"

namespace {

struct AllFloat {
  static ort::ElementType input_type(size_t) { return ort::kFloat; }
  static ort::ElementType output_type(size_t) { return ort::kFloat; }
};

struct RmsNorm : AllFloat {
  static constexpr const char* name = "RMSNorm";
  static constexpr size_t inputs = 2, outputs = 1;
  float epsilon;

  explicit RmsNorm(const void* info) : epsilon(ort::float_attribute(info, "epsilon")) {}

  void compute(void* context) {
    const auto x = ort::input(context, 0), weight = ort::input(context, 1);
    auto* y = static_cast<float*>(ort::output(context, 0, x.shape));
    edge::rms_norm(x.as<float>(), weight.as<float>(), y, x.rows(), x.columns(), epsilon, ort::parallel(context));
  }
};

struct AddRmsNorm : AllFloat {
  static constexpr const char* name = "AddRMSNorm";
  static constexpr size_t inputs = 3, outputs = 2;
  float scale, epsilon;

  explicit AddRmsNorm(const void* info)
      : scale(ort::float_attribute(info, "scale")), epsilon(ort::float_attribute(info, "epsilon")) {}

  void compute(void* context) {
    const auto hidden = ort::input(context, 0), branch = ort::input(context, 1), weight = ort::input(context, 2);
    auto* total = static_cast<float*>(ort::output(context, 0, hidden.shape));
    auto* y = static_cast<float*>(ort::output(context, 1, hidden.shape));
    edge::add_rms_norm(hidden.as<float>(), branch.as<float>(), weight.as<float>(), total, y, hidden.rows(),
                       hidden.columns(), scale, epsilon, ort::parallel(context));
  }
};

struct SwiGlu : AllFloat {
  static constexpr const char* name = "SwiGLU";
  static constexpr size_t inputs = 1, outputs = 1;

  explicit SwiGlu(const void*) {}

  void compute(void* context) {
    const auto gate_up = ort::input(context, 0);
    const int64_t width = gate_up.columns() / 2;
    auto* y = static_cast<float*>(ort::output(context, 0, {gate_up.rows(), width}));
    edge::swiglu(gate_up.as<float>(), y, gate_up.rows(), width, ort::parallel(context));
  }
};

// ONNX Runtime checks for null while it loads a model, but not in a step; there it expects exceptions.
void* take(ort::Allocator*, size_t bytes) {
  void* memory = edge::memory_pools().take(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// What an operator works in, from where a step's tensors are.
struct Workspace {
  void* memory;

  explicit Workspace(size_t bytes) : memory(take(nullptr, bytes)) {}
  Workspace(const Workspace&) = delete;
  ~Workspace() { edge::memory_pools().give_back(memory); }
};

template <bool kOffsets>
struct BlockLinear {
  static constexpr const char* name = kOffsets ? "BlockLinearOffsets" : "BlockLinear";
  static constexpr size_t inputs = 3 + kOffsets, outputs = 1;
  enum Input { kX, kCodes, kScales, kOffsetsInput };

  static ort::ElementType input_type(size_t i) {
    return i == kCodes ? ort::kUInt8 : i == kOffsetsInput ? ort::kFloat16 : ort::kFloat;
  }
  static ort::ElementType output_type(size_t) { return ort::kFloat; }

  int64_t bits, block, columns;

  explicit BlockLinear(const void* info)
      : bits(ort::int_attribute(info, "bits")),
        block(ort::int_attribute(info, "block")),
        columns(ort::int_attribute(info, "n")) {}

  void compute(void* context) {
    const auto x = ort::input(context, kX);
    edge::BlockLinear a{};
    a.x = x.template as<float>(), a.rows = x.rows(), a.inputs = x.columns();
    a.codes = ort::input(context, kCodes).template as<uint8_t>();
    a.scales = ort::input(context, kScales).template as<float>();
    if constexpr (kOffsets) a.offsets = ort::input(context, kOffsetsInput).template as<edge::half>();
    a.outputs = columns, a.block = block;
    a.y = static_cast<float*>(ort::output(context, 0, {a.rows, columns}));
    const Workspace workspace(edge::rounded_bytes(a));
    const auto run = [&](auto code_bits) {
      edge::block_linear<code_bits(), kOffsets>(a, workspace.memory, ort::parallel(context));
    };
    if (bits == 2)
      run(std::integral_constant<int, 2>{});
    else if (bits == 4)
      run(std::integral_constant<int, 4>{});
    else
      run(std::integral_constant<int, 8>{});
  }
};

template <ort::ElementType kType, class W>
struct TileLinear {
  static constexpr const char* name = "TileLinear";
  static constexpr size_t inputs = 2, outputs = 1;
  static ort::ElementType input_type(size_t i) { return i == 1 ? kType : ort::kFloat; }
  static ort::ElementType output_type(size_t) { return ort::kFloat; }

  int64_t columns;

  explicit TileLinear(const void* info) : columns(ort::int_attribute(info, "n")) {}

  void compute(void* context) {
    const auto x = ort::input(context, 0), weights = ort::input(context, 1);
    auto* y = static_cast<float*>(ort::output(context, 0, {x.rows(), columns}));
    edge::tile_linear(
        edge::TileLinear<W>{x.template as<float>(), weights.template as<W>(), y, x.rows(), x.columns(), columns},
        ort::parallel(context));
  }
};

// Attributes and inputs that dense and sparse attention share.
struct AttentionShape {
  int64_t heads, kv_heads, dim;
  float scale;

  explicit AttentionShape(const void* info)
      : heads(ort::int_attribute(info, "num_heads")),
        kv_heads(ort::int_attribute(info, "num_kv_heads")),
        dim(ort::int_attribute(info, "head_dim")),
        scale(ort::float_attribute(info, "scale")) {}

  // `positions`: the input of that name, which the others of a step follow. Makes output 0.
  edge::AttentionStep step(void* context, size_t positions, int64_t planes) const {
    const auto qkv = ort::input(context, 0), query_start = ort::input(context, positions + 2);
    const auto table = ort::input(context, positions + 3);
    edge::AttentionStep s{};
    s.qkv = qkv.as<float>();
    s.cos = ort::input(context, 1).as<float>();
    s.sin = ort::input(context, 2).as<float>();
    s.positions = ort::input(context, positions).as<int32_t>();
    s.slots = ort::input(context, positions + 1).as<int32_t>();
    s.query_start = query_start.as<int32_t>();
    s.page_table = table.as<int32_t>();
    s.tree_start = ort::input(context, positions + 4).as<int32_t>();
    s.tree_mask = ort::input(context, positions + 5).as<uint64_t>();
    s.sequences = query_start.rows() - 1;
    s.table_width = table.columns();
    s.heads = heads, s.kv_heads = kv_heads, s.dim = dim;
    s.scale = scale;
    s.planes = planes;
    s.out = static_cast<float*>(ort::output(context, 0, {qkv.rows(), heads * dim}));
    return s;
  }
};

// The executor binds one buffer as a pool's input and output; only a caller who did not pays for a copy.
void* pool_output(void* context, size_t index, const ort::Tensor& pool) {
  void* out = ort::output(context, index, pool.shape);
  if (out != pool.data) {
    size_t bytes = pool.type == ort::kFloat ? 4 : pool.type == ort::kInt8 ? 1 : 2;
    for (const int64_t n : pool.shape) bytes *= n;
    memcpy(out, pool.data, bytes);
  }
  return out;
}

// What a step of attention ends in: null, or why a page could not be had.
ort::Status* outcome(edge::PageStore* store) {
  return store != nullptr && store->file().failed() ? ort::failure(store->file().failure().c_str()) : nullptr;
}

// Calls run(pool type, element type): products of bfloat16 pairs, or of bytes, where the processor has them.
template <ort::ElementType Type, class Run>
void with_types(int64_t dim, Run run) {
  if constexpr (Type == ort::kFloat) {
    run(float{}, float{});
  } else if constexpr (Type == ort::kFloat16) {
    run(edge::half{}, float{});
  } else if constexpr (Type == ort::kBFloat16) {
    if constexpr (edge::kMultipliesPairs)
      if (dim % (2 * edge::kWidth) == 0) return run(edge::bfloat16{}, edge::Pair{});
    run(edge::bfloat16{}, float{});
  } else {
    static_assert(Type == ort::kInt8);
    if constexpr (edge::kMultipliesQuads)
      if (dim <= edge::kMaxQuadDim) return run(int8_t{}, edge::Quad{});
    run(int8_t{}, float{});
  }
}

template <bool kInt8Cache>
struct PagedAttention {
  static constexpr const char* name = kInt8Cache ? "PagedAttentionInt8" : "PagedAttention";
  static constexpr size_t inputs = 10 + kInt8Cache, outputs = 2 + kInt8Cache;
  enum Input { kQkv, kCos, kSin, kPool, kScales, kPositions = 4 + kInt8Cache };

  static ort::ElementType input_type(size_t i) {
    if (i == kPool) return kInt8Cache ? ort::kInt8 : ort::kUndefined;  // undefined: float, float16 or bfloat16
    return i >= kPositions ? ort::kInt32 : ort::kFloat;
  }
  static ort::ElementType output_type(size_t i) { return i == 1 ? input_type(kPool) : ort::kFloat; }

  AttentionShape shape;
  int64_t window;

  explicit PagedAttention(const void* info) : shape(info), window(ort::int_attribute(info, "window")) {}

  ort::Status* compute(void* context) {
    const auto pool = ort::input(context, kPool);
    auto step = shape.step(context, kPositions, pool.shape[1]);
    step.store = edge::find_store(pool.data);
    step.window = window;
    void* pool_out = pool_output(context, 1, pool);
    float* scales = nullptr;
    if constexpr (kInt8Cache) scales = static_cast<float*>(pool_output(context, 2, ort::input(context, kScales)));
    const auto run = [&](auto type, auto element) {
      using T = decltype(type);
      edge::paged_attention<T, decltype(element)>(step, {static_cast<T*>(pool_out), scales}, ort::parallel(context));
    };
    if constexpr (kInt8Cache)
      with_types<ort::kInt8>(shape.dim, run);
    else if (pool.type == ort::kFloat)
      with_types<ort::kFloat>(shape.dim, run);
    else if (pool.type == ort::kFloat16)
      with_types<ort::kFloat16>(shape.dim, run);
    else
      with_types<ort::kBFloat16>(shape.dim, run);
    return outcome(step.store);
  }
};

// ONNX Runtime infers an output's type from one input at most, so each pool type is an operator of its own.
template <ort::ElementType Pool>
struct InfLlmV2Attention {
  static constexpr bool kInt8Cache = Pool == ort::kInt8;
  static constexpr ort::ElementType kCompressed = kInt8Cache ? ort::kBFloat16 : Pool;
  static constexpr const char* name = kInt8Cache ? "InfLLMv2AttentionInt8" : "InfLLMv2Attention";
  static constexpr size_t inputs = 14 + kInt8Cache, outputs = 4 + kInt8Cache;
  enum Input { kQkv, kCos, kSin, kPool, kScales, kC1 = 4 + kInt8Cache, kC2, kPositions,
               kSwitchLength = kPositions + 6, kSettings };

  static ort::ElementType input_type(size_t i) {
    if (i == kPool) return Pool;
    if (i == kC1 || i == kC2) return kCompressed;
    return i > kC2 ? ort::kInt32 : ort::kFloat;
  }
  static ort::ElementType output_type(size_t i) { return i == 0 ? ort::kFloat : input_type(kPool + i - 1); }

  AttentionShape shape;
  bool use_nope;

  explicit InfLlmV2Attention(const void* info) : shape(info), use_nope(ort::int_attribute(info, "use_nope") != 0) {}

  ort::Status* compute(void* context) {
    const auto pool = ort::input(context, kPool), c1 = ort::input(context, kC1), c2 = ort::input(context, kC2);
    auto step = shape.step(context, kPositions, pool.shape[1]);
    step.store = edge::find_store(pool.data);
    const auto* switch_length = ort::input(context, kSwitchLength).template as<int32_t>();
    const auto* given = ort::input(context, kSettings).template as<int32_t>();
    const edge::SparseSettings settings{given[0], given[1], given[2], given[3], use_nope};
    void *pool_out = pool_output(context, 1, pool), *c1_out = pool_output(context, kC1 - kPool + 1, c1);
    void* c2_out = pool_output(context, kC2 - kPool + 1, c2);
    float* scales = nullptr;
    if constexpr (kInt8Cache) scales = static_cast<float*>(pool_output(context, 2, ort::input(context, kScales)));
    const auto run = [&](auto type, auto element, auto window, auto window_element) {
      using T = decltype(type);
      using W = decltype(window);
      edge::infllmv2_attention<T, decltype(element), W, decltype(window_element)>(
          step, {static_cast<T*>(pool_out), scales}, static_cast<W*>(c1_out), static_cast<W*>(c2_out), switch_length,
          settings, ort::parallel(context));
    };
    with_types<Pool>(shape.dim, [&](auto type, auto element) {
      if constexpr (kInt8Cache)
        with_types<kCompressed>(shape.dim, [&](auto window, auto window_element) {
          run(type, element, window, window_element);
        });
      else
        run(type, element, type, element);
    });
    return outcome(step.store);
  }
};

// Offers the pools to every session of the process that asks for its environment's allocators.
ort::Status* register_pools() {
  static bool is_registered = false;
  static const void* info = nullptr;
  if (is_registered) return nullptr;
  static ort::Allocator allocator = {ort::kApiVersion, take,
                                     [](ort::Allocator*, void* p) { edge::memory_pools().give_back(p); },
                                     [](const ort::Allocator*) { return info; }};
  void* environment = nullptr;  // the process has one; it is told here again by the name of its log
  constexpr int kWarnings = 2, kDeviceAllocator = 0, kDefaultMemory = 0;
  if (auto* status = ort::call(ort::kCreateEnv, kWarnings, "edge", &environment)) return status;
  if (auto* status = ort::call(ort::kCreateCpuMemoryInfo, kDeviceAllocator, kDefaultMemory, &info)) return status;
  is_registered = true;
  return ort::call(ort::kRegisterAllocator, environment, &allocator);
}

}  // namespace

EDGE_EXPORT void* RegisterCustomOps(void* options, const ort::ApiBase* base) {
  ort::api = base->GetApi(ort::kApiVersion);
  if (ort::api == nullptr) return nullptr;  // older than 1.17, which pyproject.toml rules out: the functions run
  if (auto* status = register_pools()) return status;
  static ort::CustomOp ops[] = {ort::make_custom_op<RmsNorm>(), ort::make_custom_op<AddRmsNorm>(),
                                ort::make_custom_op<SwiGlu>(), ort::make_custom_op<BlockLinear<false>>(),
                                ort::make_custom_op<BlockLinear<true>>(),
                                ort::make_custom_op<TileLinear<ort::kFloat, float>>(),
                                ort::make_custom_op<TileLinear<ort::kFloat16, edge::half>>(),
                                ort::make_custom_op<TileLinear<ort::kBFloat16, edge::bfloat16>>(),
                                ort::make_custom_op<PagedAttention<false>>(),
                                ort::make_custom_op<PagedAttention<true>>(),
                                ort::make_custom_op<InfLlmV2Attention<ort::kFloat>>(),
                                ort::make_custom_op<InfLlmV2Attention<ort::kFloat16>>(),
                                ort::make_custom_op<InfLlmV2Attention<ort::kBFloat16>>(),
                                ort::make_custom_op<InfLlmV2Attention<ort::kInt8>>()};
  void* domain = nullptr;
  if (auto* status = ort::call(ort::kCreateCustomOpDomain, "edge", &domain)) return status;
  for (auto& op : ops)
    if (auto* status = ort::call(ort::kCustomOpDomainAdd, domain, static_cast<const ort::CustomOp*>(&op)))
      return status;
  return ort::call(ort::kAddCustomOpDomain, options, domain);
}

// A layer's pools for edge_keep_tokens; `type`: ONNX's number of the pool's. Binding: plugins/ort/keep.py.
struct EdgeLayer {
  void *pool, *scales, *fine, *coarse;
  int64_t type, planes, kv_heads, dim;
};

// What keep_tokens of plugins/infllmv2/keep.h does, in one layer -> whether all pages could be had.
EDGE_EXPORT int edge_keep_tokens(const EdgeLayer* layer, const int32_t* pages, int64_t page_count, int64_t first,
                                 const int32_t* slots, int64_t count) {
  edge::AttentionStep s{};
  s.kv_heads = layer->kv_heads, s.dim = layer->dim, s.planes = layer->planes;
  s.page_table = pages, s.table_width = page_count;
  s.store = edge::find_store(layer->pool);
  bool done = false;
  const auto keep = [&](auto type, auto element, auto window) {
    using T = decltype(type);
    using W = decltype(window);
    const edge::LayerPools<T, W> pools{{static_cast<T*>(layer->pool), static_cast<float*>(layer->scales)},
                                       static_cast<W*>(layer->fine), static_cast<W*>(layer->coarse),
                                       layer->planes == 3 ? 2 : 0};
    done = edge::keep_tokens<T, decltype(element), W>(s, pools, first, slots, count);
  };
  const auto same = [&](auto type, auto element) { keep(type, element, type); };
  if (layer->type == ort::kInt8)
    with_types<ort::kInt8>(s.dim, [&](auto type, auto element) { keep(type, element, edge::bfloat16{}); });
  else if (layer->type == ort::kFloat)
    with_types<ort::kFloat>(s.dim, same);
  else if (layer->type == ort::kFloat16)
    with_types<ort::kFloat16>(s.dim, same);
  else
    with_types<ort::kBFloat16>(s.dim, same);
  return done;
}

// Bytes of KV pools that attention has read since the last call.
EDGE_EXPORT uint64_t edge_take_pool_bytes_read() { return edge::pool_bytes_read.exchange(0); }

// Most bytes that attention's buffers have had at once, in this process.
EDGE_EXPORT uint64_t edge_attention_peak() { return edge::buffer_bytes.peak; }

// The memory of one executor (plugins/ort/memory.h).
EDGE_EXPORT uint64_t edge_memory_open(uint64_t weights, uint64_t step) {
  return edge::memory_pools().open(weights, step);
}
EDGE_EXPORT void edge_memory_use(uint64_t pool, int region) { edge::memory_pools().use(pool, region); }
EDGE_EXPORT void edge_memory_stats(uint64_t pool, int region, uint64_t* out) {
  edge::memory_pools().stats(pool, region, out);
}
EDGE_EXPORT void edge_memory_close(uint64_t pool) { edge::memory_pools().close(pool); }
