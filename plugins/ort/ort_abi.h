// The slice of ONNX Runtime's C ABI that a custom operator needs, written from its documentation.
// The wheels ship no headers. The function table OrtApi is append-only, so a slot's number never changes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "plugins/ort/parallel.h"

namespace ort {

typedef void* (*Function)(...);
typedef void Status;  // null is success

struct ApiBase {
  const Function* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum Slot : int {
  kCreateStatus = 0,
  kCreateEnv = 3,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kCreateCpuMemoryInfo = 69,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseTensorTypeAndShapeInfo = 99,
  kRegisterAllocator = 176,
  kKernelContextParallelFor = 274,  // since API version 17
};

constexpr uint32_t kApiVersion = 17;

enum ElementType : int { kUndefined = 0, kFloat = 1, kUInt8 = 2, kInt8 = 3, kInt32 = 6, kFloat16 = 10, kBFloat16 = 16 };

// OrtCustomOp, version 16 of the struct: the first whose kernels can say that they failed.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Function* api, const void* info);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, void* context);  // older than KernelComputeV2, and not used beside it
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  void* variadic[4];  // of variadic signatures
  Status* (*CreateKernelV2)(const CustomOp*, const Function* api, const void* info, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, void* context);
  void* unused[16];  // later versions' fields: never read at version 16, here for safety
};

// OrtAllocator, as of version 17 (later versions' fields are never read then).
struct Allocator {
  uint32_t version;
  void* (*Alloc)(Allocator*, size_t);
  void (*Free)(Allocator*, void*);
  const void* (*Info)(const Allocator*);
};

inline const Function* api = nullptr;

template <class... Arguments>
Status* call(Slot slot, Arguments... arguments) {
  return reinterpret_cast<Status* (*)(Arguments...)>(api[slot])(arguments...);
}

inline Status* failure(const char* message) {
  constexpr int kFail = 1;
  return reinterpret_cast<Status* (*)(int, const char*)>(api[kCreateStatus])(kFail, message);
}

struct Tensor {
  void* data = nullptr;
  std::vector<int64_t> shape;
  ElementType type = kUndefined;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t rows() const { return shape[0]; }
  int64_t columns() const { return shape.back(); }
};

inline Tensor input(void* context, size_t index) {
  const void* value = nullptr;
  call(kKernelContextGetInput, context, index, &value);
  void* info = nullptr;
  call(kGetTensorTypeAndShape, value, &info);
  Tensor tensor;
  size_t rank = 0;
  call(kGetDimensionsCount, static_cast<const void*>(info), &rank);
  tensor.shape.resize(rank);
  call(kGetDimensions, static_cast<const void*>(info), tensor.shape.data(), rank);
  call(kGetTensorElementType, static_cast<const void*>(info), reinterpret_cast<int*>(&tensor.type));
  call(kReleaseTensorTypeAndShapeInfo, info);
  call(kGetTensorMutableData, const_cast<void*>(value), &tensor.data);
  return tensor;
}

inline void* output(void* context, size_t index, const std::vector<int64_t>& shape) {
  void *value = nullptr, *data = nullptr;
  call(kKernelContextGetOutput, context, index, shape.data(), shape.size(), &value);
  if (value == nullptr) throw std::bad_alloc();  // which ONNX Runtime catches
  call(kGetTensorMutableData, value, &data);
  return data;
}

inline float float_attribute(const void* info, const char* name) {
  float value = 0;
  call(kKernelInfoGetAttributeFloat, info, name, &value);
  return value;
}

inline int64_t int_attribute(const void* info, const char* name) {
  int64_t value = 0;
  call(kKernelInfoGetAttributeInt64, info, name, &value);
  return value;
}

// The session's own intra-op thread pool, so that our kernels never compete with ONNX Runtime's.
inline edge::Parallel parallel(void* context) {
  return {[](void* ctx, void (*body)(void*, size_t), size_t n, void* state) {
            call(kKernelContextParallelFor, static_cast<const void*>(ctx), body, n, size_t{0}, state);
          },
          context};
}

// An operator from a struct `Op` with: name, inputs, outputs, a constructor from OrtKernelInfo, compute(context), which
// gives nothing or a status, and input_type(i) / output_type(i) (kUndefined accepts any type).
template <class Op>
CustomOp make_custom_op() {
  CustomOp op{};
  op.version = 16;
  op.CreateKernelV2 = [](const CustomOp*, const Function*, const void* info, void** kernel) -> Status* {
    *kernel = new Op(info);
    return nullptr;
  };
  op.GetName = [](const CustomOp*) { return Op::name; };
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const CustomOp*, size_t i) { return Op::input_type(i); };
  op.GetInputTypeCount = [](const CustomOp*) { return Op::inputs; };
  op.GetOutputType = [](const CustomOp*, size_t i) { return Op::output_type(i); };
  op.GetOutputTypeCount = [](const CustomOp*) { return Op::outputs; };
  op.KernelComputeV2 = [](void* kernel, void* context) -> Status* {
    try {
      if constexpr (std::is_void_v<decltype(std::declval<Op>().compute(context))>)
        return static_cast<Op*>(kernel)->compute(context), nullptr;
      else
        return static_cast<Op*>(kernel)->compute(context);
    } catch (const std::bad_alloc&) {
      return failure("an operator found no memory to work in");
    }
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
  op.GetInputCharacteristic = [](const CustomOp*, size_t) { return 0; };   // required
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return 0; };  // required
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };       // the processor's own
  return op;
}

}  // namespace ort
