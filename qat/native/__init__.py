"""The native library: where it is, how it is called, and the autograd functions that use it."""
