// What Python and the library give each other: the structs of training/shared.def, and what their fields are.
// Nothing here may be a function: files that are compiled for different instruction sets include this one, and the
// linker keeps one of several equal functions, which another processor might not run.
#pragma once

#include <cstdint>

namespace bnext {

// Types of tensors, and what PyTorch calls them.
enum Type : int32_t { kFloat, kDouble, kBfloat16, kTypes };
constexpr const char* kTypeNames[] = {"float32", "float64", "bfloat16"};
static_assert(sizeof kTypeNames == kTypes * sizeof kTypeNames[0], "one name of each type");

// What became of a convolution of signs, and what Python calls it: a value that is neither -1 nor +1, with which
// the results mean nothing, or no memory.
enum SignStatus : int32_t { kSummed, kNotSigns, kNoMemory, kSignStatuses };
constexpr const char* kSignStatusNames[] = {"summed", "not_signs", "no_memory"};
static_assert(sizeof kSignStatusNames == kSignStatuses * sizeof kSignStatusNames[0], "one name of each status");

// Kinds of fields. Each has a type of its own, so that one can't be taken for another, and an entry of the table in
// qat/native/structures.py. In passes tensors are [planes][pixels], a plane is one channel of one image.
// Coefficients and sums are float, or double beside tensors of double.
struct Grid;
struct Values { const void* data; };               // a tensor that is read
struct Results { void* data; };                    // a tensor that is written
struct ChannelVector { const void* data; };        // [channels], read
struct PlaneVector { const void* data; };          // [planes], read
struct OptionalPlaneVector { const void* data; };  // the same, or nullptr
struct PlaneResults { void* data; };               // [planes], written
struct Mask { const uint8_t* data; };              // [planes][pixels] of 0 and 1, read
struct MaskResults { uint8_t* data; };             // the same, written
struct OptionalGrid { const Grid* data; };         // nullptr: values stay as they are
struct Answer { int32_t value; };                  // 0 before; the pass writes 1 for yes
using Size = int64_t;
using Number = double;
using Flag = int32_t;

#define STRUCT(Name) struct Name {
#define PASS(name, Name) struct Name {
#define FIELD(Kind, name) Kind name;
#define END };
#include "training/shared.def"

}  // namespace bnext
