// The operators of domain `edge` as ONNX Runtime custom operators. ONNX Runtime prefers them to the FunctionProtos.
#include <cstring>

#include "plugins/group_offsets/cpu.h"
#include "plugins/ort/ort_abi.h"
#include "plugins/paged_attention/cpu.h"
#include "plugins/rms_norm/cpu.h"
#include "plugins/swiglu/cpu.h"

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

struct AddGroupOffsets {
  static constexpr const char* name = "AddGroupOffsets";
  static constexpr size_t inputs = 3, outputs = 1;

  static ort::ElementType input_type(size_t i) { return i == 2 ? ort::kFloat16 : ort::kFloat; }
  static ort::ElementType output_type(size_t) { return ort::kFloat; }

  explicit AddGroupOffsets(const void*) {}

  void compute(void* context) {
    const auto x = ort::input(context, 0), product = ort::input(context, 1), offsets = ort::input(context, 2);
    edge::GroupOffsets a{};
    a.x = x.as<float>(), a.product = product.as<float>(), a.offsets = offsets.as<edge::half>();
    a.rows = product.rows(), a.columns = product.columns(), a.groups = offsets.rows();
    a.group_size = x.columns() / a.groups;
    a.y = static_cast<float*>(ort::output(context, 0, product.shape));
    edge::add_group_offsets(a, ort::parallel(context));
  }
};

struct PagedAttention {
  static constexpr const char* name = "PagedAttention";
  static constexpr size_t inputs = 7, outputs = 2;
  enum Input { kQkv, kCos, kSin, kPool, kPositions, kQueryStart, kPageTable };

  static ort::ElementType input_type(size_t i) {
    if (i == kPool) return ort::kUndefined;  // float or float16
    return i > kPool ? ort::kInt32 : ort::kFloat;
  }
  static ort::ElementType output_type(size_t i) { return i == 0 ? ort::kFloat : ort::kUndefined; }

  int64_t heads, kv_heads, dim;
  float scale;

  explicit PagedAttention(const void* info)
      : heads(ort::int_attribute(info, "num_heads")),
        kv_heads(ort::int_attribute(info, "num_kv_heads")),
        dim(ort::int_attribute(info, "head_dim")),
        scale(ort::float_attribute(info, "scale")) {}

  void compute(void* context) {
    const auto qkv = ort::input(context, kQkv), pool = ort::input(context, kPool);
    const auto query_start = ort::input(context, kQueryStart), table = ort::input(context, kPageTable);
    edge::AttentionStep step{};
    step.qkv = qkv.as<float>();
    step.cos = ort::input(context, kCos).as<float>();
    step.sin = ort::input(context, kSin).as<float>();
    step.positions = ort::input(context, kPositions).as<int32_t>();
    step.query_start = query_start.as<int32_t>();
    step.page_table = table.as<int32_t>();
    step.sequences = query_start.rows() - 1;
    step.table_width = table.columns();
    step.heads = heads, step.kv_heads = kv_heads, step.dim = dim;
    step.scale = scale;
    step.out = static_cast<float*>(ort::output(context, 0, {qkv.rows(), heads * dim}));

    // The executor binds one buffer as kv_pool and kv_pool_out; only a caller who did not pays for a copy.
    void* pool_out = ort::output(context, 1, pool.shape);
    const bool is_half = pool.type == ort::kFloat16;
    if (pool_out != pool.data) {
      size_t bytes = is_half ? 2 : 4;
      for (const int64_t n : pool.shape) bytes *= n;
      memcpy(pool_out, pool.data, bytes);
    }
    if (is_half)
      edge::paged_attention(step, static_cast<edge::half*>(pool_out), ort::parallel(context));
    else
      edge::paged_attention(step, static_cast<float*>(pool_out), ort::parallel(context));
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void* RegisterCustomOps(void* options, const ort::ApiBase* base) {
  ort::api = base->GetApi(ort::kApiVersion);
  if (ort::api == nullptr) return nullptr;  // older than 1.17, which pyproject.toml rules out: the functions run
  static ort::CustomOp ops[] = {ort::make_custom_op<RmsNorm>(), ort::make_custom_op<AddRmsNorm>(),
                                ort::make_custom_op<SwiGlu>(), ort::make_custom_op<AddGroupOffsets>(),
                                ort::make_custom_op<PagedAttention>()};
  void* domain = nullptr;
  if (auto* status = ort::call(ort::kCreateCustomOpDomain, "edge", &domain)) return status;
  for (auto& op : ops)
    if (auto* status = ort::call(ort::kCustomOpDomainAdd, domain, static_cast<const ort::CustomOp*>(&op)))
      return status;
  return ort::call(ort::kAddCustomOpDomain, options, domain);
}
