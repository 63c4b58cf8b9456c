// Makes an operator that onnxruntime can register from a class with
//   static constexpr const char* kName;
//   static constexpr Slot kInputs[], kOutputs[];
//   explicit Class(const Info&);            // reads attributes and constants
//   void compute(const Run&) const;         // may be called by several threads at once
#pragma once

#include <iterator>
#include <new>

#include "operators/tensors.h"

namespace bnext {

struct Slot {
  ort::ElementType type;
  ort::Characteristic characteristic = ort::kRequired;
};

template <typename Class>
class Operator {
 public:
  static const ort::CustomOp& instance() {
    static const ort::CustomOp op = make();
    return op;
  }

 private:
  struct Kernel {
    Kernel(ort::Api table, const ort::KernelInfo* info) : api(table), body(Info(table, info)) {}
    ort::Api api;
    Class body;
  };

  static ort::CustomOp make() {
    ort::CustomOp op{};
    op.version = ort::kApiVersion;
    op.get_name = [](const ort::CustomOp*) { return Class::kName; };
    op.get_execution_provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
    op.get_input_type = [](const ort::CustomOp*, size_t i) { return Class::kInputs[i].type; };
    op.get_input_count = [](const ort::CustomOp*) { return std::size(Class::kInputs); };
    op.get_output_type = [](const ort::CustomOp*, size_t i) { return Class::kOutputs[i].type; };
    op.get_output_count = [](const ort::CustomOp*) { return std::size(Class::kOutputs); };
    op.get_input_characteristic = [](const ort::CustomOp*, size_t i) { return Class::kInputs[i].characteristic; };
    op.get_output_characteristic = [](const ort::CustomOp*, size_t i) { return Class::kOutputs[i].characteristic; };
    op.get_input_memory_type = [](const ort::CustomOp*, size_t) { return 0; };  // the processor's
    op.get_variadic_input_min_arity = one;
    op.get_variadic_input_homogeneity = one;
    op.get_variadic_output_min_arity = one;
    op.get_variadic_output_homogeneity = one;
    op.get_start_version = one;
    op.get_end_version = one;
    op.create_kernel_v2 = [](const ort::CustomOp*, ort::Api api, const ort::KernelInfo* info, void** kernel) {
      return guarded(api, Class::kName, [&] { *kernel = new Kernel(api, info); });
    };
    op.kernel_compute_v2 = [](void* kernel, ort::KernelContext* context) {
      const Kernel& self = *static_cast<const Kernel*>(kernel);
      return guarded(self.api, Class::kName, [&] { self.body.compute(Run(self.api, context)); });
    };
    op.kernel_destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
  }

  static int one(const ort::CustomOp*) { return 1; }
};

}  // namespace bnext
