// What the parts of the self-test share.
#pragma once

#include <cstdint>
#include <random>
#include <string>

namespace bnext {

extern std::mt19937 generator;
extern std::string place;  // what is being compared, for the message

int64_t between(int64_t low, int64_t high);
bool chance(double probability);

// Compares the passes, or the work around a convolution of signs, that belong to kernels of this name with the
// portable ones, over one random shape.
void compare_passes(const char* kernels);
void compare_signs(const char* kernels);
void check_sign_sums();

}  // namespace bnext
