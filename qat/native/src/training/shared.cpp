// Describes to Python what it shares with the library.

#include "training/shared.h"

#include <cstddef>
#include <string>

#include "kernels/export.h"

namespace bnext {
namespace {

template <std::size_t count>
std::string enumeration(const char* name, const char* const (&values)[count]) {
  std::string text = std::string("enum ") + name;
  for (const char* value : values) text += std::string(" ") + value;
  return text + "\n";
}

std::string description() {
  std::string text = enumeration("Type", kTypeNames) + enumeration("SignStatus", kSignStatusNames);
#define STRUCT(Name) text += "struct " #Name " " + std::to_string(sizeof(Name));
#define PASS(name, Name) text += "pass " #name " " + std::to_string(sizeof(Name));
#define FIELD(Kind, name) text += " " #name ":" #Kind;
#define END text += "\n";
#include "training/shared.def"
  return text;
}

}  // namespace
}  // namespace bnext

// A line for each enumeration, struct and pass, the passes in the order of their numbers:
//   enum NAME value value ...
//   struct NAME bytes field:Kind field:Kind ...
//   pass NAME bytes field:Kind field:Kind ...
BNEXT_EXPORT const char* bnext_qat_description() {
  static const std::string text = bnext::description();
  return text.c_str();
}
