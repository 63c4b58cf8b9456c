// What onnxruntime calls when the library is registered.

#include "attention.h"
#include "binaryconv.h"
#include "channelsums.h"
#include "stem.h"
#include "trunkupdate.h"

#if defined(_WIN32)
#define BNEXT_EXPORT extern "C" __declspec(dllexport)
#else
#define BNEXT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

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
  // Without the table there is no status to return; onnxruntime has printed which versions it knows.
  if (api == nullptr) return nullptr;
  return guarded(api, "register", [&] {
    kernels();  // a wrong BNEXT_QAT_KERNELS is said here
    ort::CustomOpDomain* domain = nullptr;
    check(ort::call(api, ort::kCreateCustomOpDomain, "bnext_qat", &domain));
    // Sessions keep no share in a domain: it lives as long as the process, like the library.
    for (const ort::CustomOp* op :
         {&Operator<BinaryConv>::instance(), &Operator<ChannelAttention>::instance(),
          &Operator<TrunkUpdate>::instance(), &Operator<Stem>::instance(), &Operator<ChannelSums>::instance()}) {
      check(ort::call(api, ort::kCustomOpDomainAdd, domain, op));
    }
    check(ort::call(api, ort::kAddCustomOpDomain, options, domain));
  });
}
