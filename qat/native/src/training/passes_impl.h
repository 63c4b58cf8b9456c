// The list of passes. They are written once, in the files that this one includes; each passes_*.cpp includes it
// and is compiled for an instruction set, whose vectors the compiler finds.

#include "training/norm_prelu_impl.h"
#include "training/quantize_impl.h"
#include "training/scale_add_impl.h"

namespace bnext {
namespace {

// The pass whose arguments are a struct of this kind, over tensors of T: as a `Run`.
template <typename T, typename Arguments>
void run_untyped(void* arguments, Planes planes) {
  run<T>(*static_cast<Arguments*>(arguments), planes);
}

constexpr NamedPass kPasses[] = {
#define PASS(name, Name) {#name, {run_untyped<float, Name>, run_untyped<double, Name>, run_untyped<Bfloat16, Name>}},
#include "training/shared.def"
    {nullptr, {}},
};

}  // namespace
}  // namespace bnext
