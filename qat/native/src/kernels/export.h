// Marks what the library offers by name.
#pragma once

#if defined(_WIN32)
#define BNEXT_EXPORT extern "C" __declspec(dllexport)
#else
#define BNEXT_EXPORT extern "C" __attribute__((visibility("default")))
#endif
