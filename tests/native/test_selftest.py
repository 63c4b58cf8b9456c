"""The kernels of each instruction set against the portable ones, for other processors under an emulator."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.helpers.native_builds import build, copied_sources, need, run, set_property
from tests.helpers.native_models import KERNELS

# One process: each would build the program for itself.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("selftest")]

#: Shapes tried; `selftest` alone tries 1000.
ROUNDS = "200"
#: Where kernels that also run without an emulator only have to get through: it takes twenty times as long.
FEW_ROUNDS = "40"
ARM = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
)


def selftest(sources: Path, *options: str) -> Path:
    """The program built from ``sources``, again if they changed."""
    build(sources, sources / "build", *options, target="selftest")
    return sources / "build" / "selftest"


def optimize(sources: Path, level: str, *files: str) -> None:
    """Compile ``files`` with another level of optimization."""
    set_property(sources, files, f"APPEND PROPERTY COMPILE_OPTIONS {level}")


def quickly_compiled(folder: Path) -> Path:
    """Sources whose kernels are compiled as those that ship; the program around them need not be fast."""
    copy = copied_sources(folder)
    programs = [f"selftest/{name}.cpp" for name in ("selftest", "selftest_passes", "selftest_signs")]
    optimize(copy, "-O1", *programs)
    return copy


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources for this processor; later builds compile what changed."""
    need("cmake", "c++")
    copy = quickly_compiled(tmp_path_factory.mktemp("selftest"))
    idle = [f"kernels/kernels_{name}.cpp" for name in ("avx512_vpopcntdq", "avx512") if name not in KERNELS]
    idle += ["training/passes_avx512.cpp"] * ("avx512" not in KERNELS)
    if KERNELS and idle:  # what cannot run here
        optimize(copy, "-O0", *idle)
    return copy


def test_all_kernels_of_this_processor_are_equal(sources: Path) -> None:
    done = run(selftest(sources), ROUNDS)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == list(KERNELS or [line.split(":")[0] for line in lines])
    assert all(line.endswith(f": equal in {ROUNDS} rounds") for line in lines)


@pytest.mark.parametrize(
    ("processor", "names"), [("Nehalem", ["portable"]), ("Haswell", ["avx2", "portable"])]
)
def test_a_processor_without_avx_512_runs_what_it_has(
    sources: Path, processor: str, names: list[str]
) -> None:
    """An instruction that an emulated processor lacks would end the program."""
    need("qemu-x86_64", always=False)
    if platform.machine() != "x86_64":
        pytest.skip("needs x86_64")
    done = run("qemu-x86_64", "-cpu", processor, selftest(sources), FEW_ROUNDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{name}: equal in {FEW_ROUNDS} rounds" for name in names]


@pytest.mark.skipif("avx2" not in KERNELS, reason="needs a processor with AVX2")
def test_a_difference_is_found_and_named(sources: Path) -> None:
    """Rounding towards zero, planted into the kernels for AVX2."""
    vectors = sources / "src" / "kernels" / "vectors_avx2.h"
    text = vectors.read_text()
    assert "_MM_FROUND_TO_NEAREST_INT" in text
    vectors.write_text(text.replace("_MM_FROUND_TO_NEAREST_INT", "_MM_FROUND_TO_ZERO"))
    try:
        done = run(selftest(sources), ROUNDS)
    finally:
        vectors.write_text(text)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("avx2 ")
    assert ", portable " in done.stdout.splitlines()[-1]


def test_neon_kernels_are_equal_under_an_emulator(tmp_path: Path) -> None:
    need("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64", always=False)
    sources = quickly_compiled(tmp_path)
    done = run("qemu-aarch64", selftest(sources, *ARM), ROUNDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{name}: equal in {ROUNDS} rounds" for name in ("neon", "portable")]
    vectors = sources / "src" / "kernels" / "vectors_neon.h"
    text = vectors.read_text()
    assert "vrndnq_f32" in text
    vectors.write_text(text.replace("vrndnq_f32", "vrndaq_f32"))  # halves away from zero
    done = run("qemu-aarch64", selftest(sources), ROUNDS)
    assert done.returncode == 1
    assert done.stdout.startswith("neon ")
