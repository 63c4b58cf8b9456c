// Compares the passes of a training step: elementwise results exactly, sums to rounding, since each instruction set
// adds them up in an order of its own.

#include <cmath>
#include <cstdint>
#include <list>
#include <string>
#include <type_traits>
#include <utility>

#include "selftest/numbers.h"
#include "selftest/selftest.h"
#include "training/passes.h"

namespace bnext {
namespace {

// A function for each struct that calls `visitor` with the name of each field and a pointer to that member.
#define STRUCT(Name)          \
  template <typename Visitor> \
  void visit_fields(const Name*, const Visitor& visitor) { using Struct = Name;
#define PASS(name, Name)      \
  template <typename Visitor> \
  void visit_fields(const Name*, const Visitor& visitor) { using Struct = Name;
#define FIELD(Kind, name) visitor(#name, &Struct::name);
#define END }
#include "training/shared.def"

// What a pass is tried on. The last plane of flat memory may have fewer values than `pixels`.
struct Shape {
  int type;
  int64_t planes, channels, pixels, values;
};

// Fills the fields of a pass by their kinds, at random, with memory that lives as long as this.
class Memory {
 public:
  explicit Memory(const Shape& shape) : shape_(shape) {}

  void fill(Values& field) { field.data = keep(random_numbers(shape_.values, shape_.type)); }
  void fill(ChannelVector& field) { field.data = coefficients(shape_.channels); }
  void fill(PlaneVector& field) { field.data = coefficients(shape_.planes); }
  void fill(OptionalPlaneVector& field) { field.data = chance(0.5) ? coefficients(shape_.planes) : nullptr; }
  void fill(Mask& field) {
    Bytes mask(static_cast<size_t>(shape_.values));
    for (unsigned char& one : mask) one = chance(0.7);
    field.data = keep(std::move(mask));
  }
  void fill(Grid& field) {
    const double scale = chance(0.5) ? 0.2 : 0.3;
    field = {-static_cast<double>(between(1, 5)), static_cast<double>(between(1, 5)), scale, 1 / scale};
  }
  void fill(OptionalGrid& field) {
    if (chance(0.5)) return;
    fill(grids_.emplace_back());
    field.data = &grids_.back();
  }
  void fill(Number& field) { field = 1.5; }
  void fill(Flag& field) { field = chance(0.5); }
  void fill(Answer&) {}
  void fill(Results& field) { separate(field); }
  void fill(PlaneResults& field) { separate(field); }
  void fill(MaskResults& field) { separate(field); }

  // Gives what a pass writes memory of its own.
  void separate(Results& field) { field.data = zeros(shape_.values, size_of(shape_.type)); }
  void separate(PlaneResults& field) { field.data = zeros(shape_.planes, size_of(sum_type(shape_.type))); }
  void separate(MaskResults& field) { field.data = zeros(shape_.values, 1); }
  template <typename Read>
  void separate(Read&) {}

 private:
  unsigned char* keep(Bytes bytes) { return kept_.emplace_back(std::move(bytes)).data(); }
  unsigned char* zeros(int64_t count, size_t width) { return keep(Bytes(static_cast<size_t>(count) * width)); }
  unsigned char* coefficients(int64_t count) { return keep(random_numbers(count, sum_type(shape_.type))); }

  const Shape shape_;
  std::list<Bytes> kept_;
  std::list<Grid> grids_;
};

void compare_bytes(const char* name, const void* tried, const void* right, int64_t count, size_t width) {
  const auto *one = static_cast<const unsigned char*>(tried), *other = static_cast<const unsigned char*>(right);
  for (size_t i = 0; i < static_cast<size_t>(count) * width; ++i) {
    if (one[i] != other[i]) fail(name, static_cast<int64_t>(i / width));
  }
}

template <typename S>
void compare_sums(const char* name, const void* tried, const void* right, const Shape& shape, double rounding) {
  for (int64_t plane = 0; plane < shape.planes; ++plane) {
    const double found = static_cast<const S*>(tried)[plane], expected = static_cast<const S*>(right)[plane];
    const double allowed = rounding * (static_cast<double>(shape.pixels) + std::fabs(expected));
    if (!(std::fabs(found - expected) <= allowed)) fail(name, plane);
  }
}

void compare_field(const char* name, const Results& tried, const Results& right, const Shape& shape) {
  compare_bytes(name, tried.data, right.data, shape.values, size_of(shape.type));
}
void compare_field(const char* name, const MaskResults& tried, const MaskResults& right, const Shape& shape) {
  compare_bytes(name, tried.data, right.data, shape.values, 1);
}
void compare_field(const char* name, const PlaneResults& tried, const PlaneResults& right, const Shape& shape) {
  if (shape.type == kDouble) {
    compare_sums<double>(name, tried.data, right.data, shape, 1e-13);
  } else {
    compare_sums<float>(name, tried.data, right.data, shape, 1e-5);
  }
}
void compare_field(const char* name, const Answer& tried, const Answer& right, const Shape&) {
  if (tried.value != right.value) fail(name, 0);
}
template <typename Read>
void compare_field(const char*, const Read&, const Read&, const Shape&) {}

template <typename Arguments>
void compare_pass(Run tried, Run portable, const Shape& shape) {
  Memory memory(shape);
  const Arguments* const fields = nullptr;
  Arguments one{};
  visit_fields(fields, [&](const char*, auto member) { memory.fill(one.*member); });
  Arguments other = one;
  visit_fields(fields, [&](const char*, auto member) { memory.separate(other.*member); });
  const Planes all{0, shape.planes, shape.channels, shape.pixels, shape.values};
  tried(&one, all);
  portable(&other, all);
  visit_fields(fields, [&](const char* name, auto member) {
    compare_field(name, one.*member, other.*member, shape);
  });
}

struct Comparison {
  bool is_of_flat_memory;
  void (*compare)(Run tried, Run portable, const Shape& shape);
};

template <typename Arguments>
constexpr bool is_of_flat_memory =
    std::is_same_v<Arguments, FakeQuantizePass> || std::is_same_v<Arguments, FakeQuantizeGradientPass>;

// By the numbers of the passes.
constexpr Comparison kComparisons[] = {
#define PASS(name, Name) {is_of_flat_memory<Name>, compare_pass<Name>},
#include "training/shared.def"
};
constexpr int64_t kCount = sizeof kComparisons / sizeof kComparisons[0];

}  // namespace

void compare_passes(const char* kernels) {
  const auto number = static_cast<size_t>(between(0, kCount - 1));
  const auto [is_flat, compare] = kComparisons[number];
  const NamedPass &tried = passes_of(kernels)[number], &portable = passes_of("portable")[number];
  const int64_t sides[] = {1, 2, 4, 9, 16, 49, 64, 100};
  Shape shape{};
  shape.type = static_cast<int>(between(0, kTypes - 1));
  shape.channels = between(1, 5);
  shape.planes = between(1, 3) * shape.channels;
  shape.pixels = chance(0.5) ? sides[between(0, 7)] : between(1, 70);
  shape.values = shape.planes * shape.pixels - (is_flat ? between(0, shape.pixels - 1) : 0);
  place = std::string(kernels) + " " + tried.name + " type " + std::to_string(shape.type) + ", " +
          std::to_string(shape.planes) + " planes of " + std::to_string(shape.pixels);
  compare(tried.run[shape.type], portable.run[shape.type], shape);
}

}  // namespace bnext
