// The piece of onnxruntime's C interface that these operators need, declared by ourselves: the Python package
// ships no headers.
//
// Source of the facts: onnxruntime's public header onnxruntime_c_api.h. The interface is a table of function
// pointers that only ever grows at its end, so an entry's index never changes, and a library that asks for
// API version 17 gets a table that holds all entries below from every onnxruntime >= 1.17. `api_of` asks for
// that version and takes no other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bnext::ort {

constexpr uint32_t kApiVersion = 17;

// Opaque objects of onnxruntime.
struct Status;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct CustomOpDomain;
struct ShapeInferContext;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt16 = 5, kInt32 = 6 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

using Api = void* const*;  // the table

struct ApiBase {
  Api (*get_api)(uint32_t version);
  const char* (*get_version_string)();
};

// Index of each function in the table.
enum Entry : size_t {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelContextGetInputCount = 88,
  kKernelContextGetOutputCount = 89,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShapeInfo = 99,
  kReleaseCustomOpDomain = 101,
  kKernelInfoGetConstantInputTensor = 249,
  kKernelContextParallelFor = 274,
};

// Calls an entry whose last result is a status (nullptr: no error).
template <typename... Arguments>
Status* call(Api api, Entry entry, Arguments... arguments) {
  return reinterpret_cast<Status* (*)(Arguments...)>(api[entry])(arguments...);
}

// Calls an entry without a result.
template <typename... Arguments>
void release(Api api, Entry entry, Arguments... arguments) {
  reinterpret_cast<void (*)(Arguments...)>(api[entry])(arguments...);
}

// A custom operator as onnxruntime reads it, up to the fields of version 17.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, Api, const KernelInfo*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_execution_provider)(const CustomOp*);
  ElementType (*get_input_type)(const CustomOp*, size_t);
  size_t (*get_input_count)(const CustomOp*);
  ElementType (*get_output_type)(const CustomOp*, size_t);
  size_t (*get_output_count)(const CustomOp*);
  void (*kernel_compute)(void*, KernelContext*);
  void (*kernel_destroy)(void*);
  Characteristic (*get_input_characteristic)(const CustomOp*, size_t);
  Characteristic (*get_output_characteristic)(const CustomOp*, size_t);
  int (*get_input_memory_type)(const CustomOp*, size_t);
  int (*get_variadic_input_min_arity)(const CustomOp*);
  int (*get_variadic_input_homogeneity)(const CustomOp*);
  int (*get_variadic_output_min_arity)(const CustomOp*);
  int (*get_variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, Api, const KernelInfo*, void**);
  Status* (*kernel_compute_v2)(void*, KernelContext*);
  Status* (*infer_output_shape)(const CustomOp*, ShapeInferContext*);
  int (*get_start_version)(const CustomOp*);
  int (*get_end_version)(const CustomOp*);
  size_t (*get_may_inplace)(int**, int**);
  void (*release_may_inplace)(int*, int*);
  size_t (*get_alias_map)(int**, int**);
  void (*release_alias_map)(int*, int*);
};
static_assert(sizeof(void*) != 8 || sizeof(CustomOp) == 208, "the layout that onnxruntime reads");

// The table of version kApiVersion, or nullptr where this onnxruntime is older.
inline Api api_of(const ApiBase* base) { return base == nullptr ? nullptr : base->get_api(kApiVersion); }

}  // namespace bnext::ort
