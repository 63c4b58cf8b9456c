"""The names this distribution imports under: they meet no file of a user's, wherever a command is started.

`python -m` and the launchers that use it put the working directory before everything installed, so that any
top-level name that a user also chooses for a file would be taken from there.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import qat_export
from qat_export import emit_portable

from tests.helpers.native_builds import need, run
from tests.helpers.networks import ordinary, saved
from tests.helpers.paths import ROOT

ACCELERATE = ("--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no")
LAUNCHERS = {
    "python": (),
    "torchrun": ("torch.distributed.run", "--nproc-per-node", "1"),
    "accelerate": ("accelerate.commands.launch", *ACCELERATE, "--dynamo_backend", "no"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a user who has files named like parts of this project."""
    folder = tmp_path / "user"
    folder.mkdir()
    for name in ("export", "recipes", "tests"):
        (folder / f"{name}.py").write_text(f"raise ImportError('the user has a {name}.py')\n")
    return folder


def start(command: list[str], folder: Path, **environment: str) -> str:
    """What a command says that is run in ``folder`` and succeeds."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = run(*command, cwd=folder, env=variables | {"OMP_NUM_THREADS": "1"} | environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="session")
def inspect_model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of `qat` for which it loads the exporter: the inspection of an exported model."""
    path = saved(emit_portable(ordinary()[1]), tmp_path_factory.mktemp("model") / "model.onnx")
    return ["inspect", str(path)]


def launched(python: Path | str, launcher: str, arguments: list[str]) -> list[str]:
    """The command of `qat ARGUMENTS` by a launcher, as `torchrun` and `accelerate launch` start it."""
    by = ["-m", *LAUNCHERS[launcher]] if LAUNCHERS[launcher] else []
    return [str(python), *by, "-m", "qat", *arguments]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with this distribution installed from a wheel, and what it needs from this environment.

    This environment's packages are reached by a path file. Path files in them are not followed, so an
    editable install there does not count.
    """
    pytest.importorskip("scikit_build_core")
    need("cmake")
    folder = tmp_path_factory.mktemp("plain")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    start(build, folder, BNEXT_QAT_NATIVE="off")
    [wheel] = folder.glob("*.whl")
    environment = folder / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    own = sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)})
    (Path(own) / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    start([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], folder)
    return python


@pytest.mark.parametrize(
    "launcher", ["python", "torchrun", pytest.param("accelerate", marks=pytest.mark.slow)]
)
def test_commands_start_in_a_folder_with_the_users_own_export_recipes_and_tests(
    launcher: str, folder: Path, inspect_model: list[str]
) -> None:
    assert "binary: yes" in start(launched(sys.executable, launcher, inspect_model), folder)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_so_they_do_where_a_wheel_was_installed(
    launcher: str, folder: Path, plain: Path, inspect_model: list[str]
) -> None:
    where = "import qat, qat_export; print(qat.__file__, qat_export.__file__)"
    for path in start([str(plain), "-c", where], folder).split():
        assert Path(path).is_relative_to(plain.parents[1])
    assert "binary: yes" in start(launched(plain, launcher, inspect_model), folder)


@pytest.mark.slow
def test_there_the_working_directory_does_stand_before_what_is_installed(
    folder: Path, plain: Path, inspect_model: list[str]
) -> None:
    """Else these tests would say nothing. (An editable installation finds its packages before any path.)"""
    (folder / "qat_export.py").write_text("raise ImportError('the user has his own')\n")
    with pytest.raises(AssertionError, match="the user has his own"):
        start(launched(plain, "python", inspect_model), folder)


def test_beside_a_users_qat_the_console_script_works(folder: Path, inspect_model: list[str]) -> None:
    (folder / "qat.py").write_text("raise ImportError('the user has a qat.py')\n")
    script = Path(sys.executable).with_name("qat")
    assert "binary: yes" in start([str(script), *inspect_model], folder)


@pytest.mark.slow
def test_so_it_does_where_a_wheel_was_installed(folder: Path, plain: Path, inspect_model: list[str]) -> None:
    (folder / "qat.py").write_text("raise ImportError('the user has a qat.py')\n")
    assert "binary: yes" in start([str(plain.with_name("qat")), *inspect_model], folder)


@pytest.mark.slow
def test_a_wheel_brings_two_top_level_names(plain: Path) -> None:
    own = sysconfig.get_path("purelib", "venv", {"base": str(plain.parents[1]), "platbase": ""})
    names = {path.name for path in Path(own).iterdir() if path.suffix not in (".pth", ".dist-info")}
    assert names == {"qat", "qat_export"}


def test_every_public_name_of_the_exporter_is_found_by_its_module() -> None:
    assert len(set(qat_export.__all__)) == len(qat_export.__all__) > 10
    for name in qat_export.__all__:
        value = getattr(qat_export, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value is getattr(importlib.import_module(value.__module__), name)
    assert set(qat_export.__all__) <= set(dir(qat_export))


def test_a_name_that_the_exporter_lacks_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'qat_export' has no attribute 'emit'"):
        qat_export.emit  # noqa: B018
    with pytest.raises(ImportError):
        exec("from qat_export import emit")


def test_no_module_of_the_exporter_bears_the_name_of_a_public_function() -> None:
    package = ROOT / "export" / "qat_export"
    modules = {path.stem: path for path in package.rglob("*.py") if path.name != "__init__.py"}
    folders = {path.parent.name for path in package.rglob("__init__.py")}
    assert not {*modules, *folders} & set(qat_export.__all__)
    for name, path in modules.items():
        dotted = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        found = getattr(importlib.import_module(dotted), name, None)
        assert getattr(found, "__module__", None) != dotted, f"{dotted} defines {name}"


def test_importing_the_exporter_or_its_registration_loads_no_torch_and_no_onnx() -> None:
    script = "import sys; from qat_export import register; print(*sys.modules)"
    loaded = set(start([sys.executable, "-c", script], ROOT).split())
    assert not loaded & {"torch", "onnx", "onnxruntime", "numpy"}
