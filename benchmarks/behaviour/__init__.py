"""Record what the product computes, as digests and exact numbers, to compare two commits.

    python -m benchmarks.behaviour -o BEFORE.json [--quick]     at one commit
    python -m benchmarks.behaviour -o AFTER.json [--quick]      at the other, on the same machine
    python -m benchmarks.behaviour --compare BEFORE.json AFTER.json

The comparison prints each name whose value differs, and has exit code 1 if there is one. A record holds:

- losses, gradient norms and digests of gradients and weights over several training steps of a toy network and
  of BNext-Tiny: float, bfloat16, fake-quantized, with learned scales; binary weights of temperature 0.3 and
  1e-8; with and without channel attention; frozen binary weights; by the native library's passes and by torch
  alone (`steps.py`);
- digests of what the commands write for a toy network: runs that were stopped by SIGTERM and resumed, and
  runs that were not (`runs.py`); exported models of every target, the report, what the commands print as
  JSON, the gate's verdict and exit code on baselines with given answers (`models.py`); messages and exit
  codes for bad input (`refusals.py`);
- digests of the exports of the two shipped networks, quantized by calibration alone. CIFAR-10 is taken from
  ``$QAT_DATA/cifar10`` (`train.parquet`, `test.parquet`); without it that part is left out, and the record
  says so.

What would change between any two runs is left out or replaced: durations, dates, the folders of the run and
of the repository, and the version of this package, which is 0 in a record (`project.py` sets it; all imports
from the project are there). Everything is computed with one thread.

Floating-point sums depend on the processor and on torch: records are compared on one machine with the same
packages, which a record names under ``environment``. ``BNEXT_QAT_KERNELS=avx2 ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2`` makes the record of a processor with AVX2 alone, where bfloat16 is emulated.

``--quick`` leaves out BNext-Tiny and the shipped networks. On one core it takes about a minute, a full record
about three.
"""
