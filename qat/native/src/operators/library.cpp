// What onnxruntime calls when the library is registered.

#include "operators/attention.h"
#include "operators/binary_conv.h"
#include "operators/channel_sums.h"
#include "kernels/export.h"
#include "operators/stem.h"
#include "operators/trunk_update.h"

// The kernels in use; for tests and reports. nullptr where BNEXT_QAT_KERNELS names none that runs here.
BNEXT_EXPORT const char* bnext_qat_kernels() {
  try {
    return bnext::kernels().name;
  } catch (...) {
    return nullptr;
  }
}

// Number i of the kernels that this processor runs, best first; nullptr beyond the last.
BNEXT_EXPORT const char* bnext_qat_choice(int i) {
  for (const bnext::Choice* choice = bnext::choices(); choice->kernels != nullptr; ++choice) {
    if (choice->supported() && i-- == 0) return choice->kernels->name;
  }
  return nullptr;
}

BNEXT_EXPORT bnext::ort::Status* RegisterCustomOps(
    bnext::ort::SessionOptions* options, const bnext::ort::ApiBase* base) {
  using namespace bnext;
  const ort::Api api = ort::api_of(base);
  if (api == nullptr) {
    const ort::Api first = base != nullptr ? base->get_api(1) : nullptr;
    if (first == nullptr) return nullptr;  // nothing to make a status with
    return guarded(first, "register", [&] {
      throw Error(std::string("needs onnxruntime 1.17 or newer, this is ") + base->get_version_string());
    });
  }
  return guarded(api, "register", [&] {
    kernels();  // a wrong BNEXT_QAT_KERNELS is said here
    // Sessions keep no share in a domain: one serves them all, as long as the library is loaded.
    static ort::CustomOpDomain* const domain = [api] {
      ort::CustomOpDomain* made = nullptr;
      check(ort::call(api, ort::kCreateCustomOpDomain, "bnext_qat", &made));
      for (const ort::CustomOp* op :
           {&Operator<BinaryConv>::instance(), &Operator<ChannelAttention>::instance(),
            &Operator<TrunkUpdate>::instance(), &Operator<Stem>::instance(), &Operator<ChannelSums>::instance()}) {
        if (ort::Status* status = ort::call(api, ort::kCustomOpDomainAdd, made, op)) {
          ort::release(api, ort::kReleaseCustomOpDomain, made);
          throw StatusError{status};
        }
      }
      return made;
    }();
    check(ort::call(api, ort::kAddCustomOpDomain, options, domain));
  });
}
