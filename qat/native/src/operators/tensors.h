// Attributes, constants and tensors of an operator, checked: what is wrong is thrown as an Error that names it,
// and `guarded` hands it to onnxruntime as a status.
#pragma once

#include <cmath>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "operators/ort.h"
#include "kernels/share.h"

namespace bnext {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A status of onnxruntime's own, on its way through our code.
struct StatusError {
  ort::Status* status;
};

inline void check(ort::Status* status) {
  if (status != nullptr) throw StatusError{status};
}

inline void require(bool holds, const std::string& message) {
  if (!holds) throw Error(message);
}

// Runs `work`; every exception becomes a status. Nothing is thrown into onnxruntime, which is compiled elsewhere.
template <typename Work>
ort::Status* guarded(ort::Api api, const char* operation, Work work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const std::bad_alloc&) {
    return ort::call(api, ort::kCreateStatus, ort::kFail, "bnext_qat: out of memory");
  } catch (const std::exception& error) {
    try {
      const std::string text = std::string("bnext_qat.") + operation + ": " + error.what();
      return ort::call(api, ort::kCreateStatus, ort::kInvalidArgument, text.c_str());
    } catch (...) {
      return ort::call(api, ort::kCreateStatus, ort::kFail, "bnext_qat: out of memory");
    }
  }
}

using Shape = std::vector<int64_t>;

inline std::string text_of(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i != 0 ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

template <typename T>
struct ElementTypeOf;
template <>
struct ElementTypeOf<float> { static constexpr int value = ort::kFloat; };
template <>
struct ElementTypeOf<uint8_t> { static constexpr int value = ort::kUint8; };
template <>
struct ElementTypeOf<int8_t> { static constexpr int value = ort::kInt8; };
template <>
struct ElementTypeOf<int16_t> { static constexpr int value = ort::kInt16; };
template <>
struct ElementTypeOf<int32_t> { static constexpr int value = ort::kInt32; };

template <typename T>
struct Tensor {
  const T* data = nullptr;  // nullptr: an optional input that is absent
  Shape shape;

  explicit operator bool() const { return data != nullptr; }
};

template <typename T>
Tensor<T> tensor_of(ort::Api api, const ort::Value* value, const char* name) {
  Tensor<T> tensor;
  if (value == nullptr) return tensor;
  ort::ShapeInfo* info = nullptr;
  check(ort::call(api, ort::kGetTensorTypeAndShape, value, &info));
  int type = 0;
  size_t rank = 0;
  ort::Status* status = ort::call(api, ort::kGetTensorElementType, static_cast<const ort::ShapeInfo*>(info), &type);
  if (status == nullptr) {
    status = ort::call(api, ort::kGetDimensionsCount, static_cast<const ort::ShapeInfo*>(info), &rank);
  }
  if (status == nullptr) {
    try {
      tensor.shape.resize(rank);
    } catch (...) {
      ort::release(api, ort::kReleaseTensorTypeAndShapeInfo, info);
      throw;
    }
    status = ort::call(
        api, ort::kGetDimensions, static_cast<const ort::ShapeInfo*>(info), tensor.shape.data(), rank);
  }
  ort::release(api, ort::kReleaseTensorTypeAndShapeInfo, info);
  check(status);
  require(type == ElementTypeOf<T>::value, std::string(name) + ": element type " + std::to_string(type) +
                                               ", need " + std::to_string(ElementTypeOf<T>::value));
  void* data = nullptr;
  check(ort::call(api, ort::kGetTensorMutableData, const_cast<ort::Value*>(value), &data));
  static const T kNothing{};  // of an empty tensor; absent ones alone have no data
  tensor.data = data != nullptr ? static_cast<const T*>(data) : &kNothing;
  return tensor;
}

// What is known when a kernel is created: attributes and constant inputs.
class Info {
 public:
  Info(ort::Api api, const ort::KernelInfo* info) : api_(api), info_(info) {}

  int64_t integer(const char* name, int64_t low, int64_t high) const {
    int64_t value = 0;
    present(ort::call(api_, ort::kKernelInfoGetAttributeInt64, info_, name, &value), name, "an integer");
    require(value >= low && value <= high, std::string(name) + " is " + std::to_string(value) + ", allowed are " +
                                               std::to_string(low) + " to " + std::to_string(high));
    return value;
  }

  float real(const char* name) const {
    float value = 0;
    present(ort::call(api_, ort::kKernelInfoGetAttributeFloat, info_, name, &value), name, "a real number");
    require(std::isfinite(value), std::string(name) + " is not finite");
    return value;
  }

  // A constant; absent where `required` is false and the model leaves it out.
  template <typename T>
  Tensor<T> constant(size_t index, const char* name, bool required = true) const {
    int is_constant = 0;
    const ort::Value* value = nullptr;
    check(ort::call(api_, ort::kKernelInfoGetConstantInputTensor, info_, index, &is_constant, &value));
    require(!required || (is_constant != 0 && value != nullptr), std::string(name) + " must be a constant");
    return is_constant != 0 ? tensor_of<T>(api_, value, name) : Tensor<T>{};
  }

  // A constant vector (channels), padded with zeros for the kernels, converted to `To`.
  template <typename T, typename To = T>
  std::vector<To> vector(size_t index, const char* name, int64_t channels) const {
    const Tensor<T> tensor = constant<T>(index, name);
    require(tensor.shape == Shape{channels},
            std::string(name) + " has shape " + text_of(tensor.shape) + ", need (" + std::to_string(channels) + ")");
    std::vector<To> values(static_cast<size_t>(padded(channels)), To{});
    for (int64_t i = 0; i < channels; ++i) values[static_cast<size_t>(i)] = static_cast<To>(tensor.data[i]);
    return values;
  }

 private:
  // onnxruntime's own words name no attribute where it has another type.
  void present(ort::Status* status, const char* name, const char* need) const {
    if (status == nullptr) return;
    ort::release(api_, ort::kReleaseStatus, status);
    throw Error("attribute " + std::string(name) + " is missing or not " + need);
  }

  ort::Api api_;
  const ort::KernelInfo* info_;
};

// What is known when a kernel runs.
class Run {
 public:
  Run(ort::Api api, ort::KernelContext* context) : api_(api), context_(context) {}

  template <typename T>
  Tensor<T> input(size_t index, const char* name) const {
    size_t count = 0;
    check(ort::call(api_, ort::kKernelContextGetInputCount, static_cast<const ort::KernelContext*>(context_), &count));
    if (index >= count) return {};
    const ort::Value* value = nullptr;
    check(ort::call(
        api_, ort::kKernelContextGetInput, static_cast<const ort::KernelContext*>(context_), index, &value));
    return tensor_of<T>(api_, value, name);
  }

  // Activations (N, H, W, C) with at least one pixel and channel.
  template <typename T>
  Tensor<T> activations(size_t index, const char* name) const {
    const Tensor<T> tensor = input<T>(index, name);
    const bool fits = tensor && tensor.shape.size() == 4 && tensor.shape[1] > 0 && tensor.shape[2] > 0 &&
                      tensor.shape[3] > 0;
    require(fits, std::string(name) + " has shape " + text_of(tensor.shape) +
                      ", need 4 dimensions, those after the first at least 1");
    // Sums of int8 over more pixels do not fit into int32. (One row and column may count twice.)
    const auto most = int64_t{1} << 23;
    require(tensor.shape[1] <= most && tensor.shape[2] <= most && tensor.shape[1] * tensor.shape[2] <= most,
            std::string(name) + " has shape " + text_of(tensor.shape) + ", more than 8388608 pixels");
    return tensor;
  }

  // Where to write an output; nullptr where nobody reads it.
  template <typename T>
  T* output(size_t index, const Shape& shape) const {
    size_t count = 0;
    check(ort::call(
        api_, ort::kKernelContextGetOutputCount, static_cast<const ort::KernelContext*>(context_), &count));
    if (index >= count) return nullptr;
    ort::Value* value = nullptr;
    check(ort::call(api_, ort::kKernelContextGetOutput, context_, index, shape.data(), shape.size(), &value));
    if (value == nullptr) return nullptr;
    void* data = nullptr;
    check(ort::call(api_, ort::kGetTensorMutableData, value, &data));
    return static_cast<T*>(data);
  }

  // Runs `work(i)` for i below `count` on onnxruntime's threads; `work` must not throw.
  template <typename Work>
  void parallel(int64_t count, const Work& work) const {
    if (count <= 0) return;
    if (count == 1) return work(0);
    const auto one = [](void* data, size_t i) { (*static_cast<const Work*>(data))(static_cast<int64_t>(i)); };
    void (*function)(void*, size_t) = one;
    check(ort::call(api_, ort::kKernelContextParallelFor, static_cast<const ort::KernelContext*>(context_), function,
                    static_cast<size_t>(count), static_cast<size_t>(0),
                    const_cast<void*>(static_cast<const void*>(&work))));
  }

 private:
  ort::Api api_;
  ort::KernelContext* context_;
};

}  // namespace bnext
