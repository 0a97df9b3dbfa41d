"""A distribution of hostile plugins, installed by pip as any other."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DECLARATION = """
import ctypes, os, signal, sys, time

import torch

from picotron_core.registry import Backend, Level, hookimpl


def right(x, weight, eps):
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def kernel(x, weight, *, eps):
{body}


@hookimpl
def picotron_backends():
    yield Backend(
        op="norm",
        name="{name}",
        level=Level.SPECIALIZED,
        load=lambda: kernel,
        supports=lambda request: (),
    )
"""

KERNELS = {
    "segfaults": "ctypes.string_at(0)",
    "illegal": "os.kill(os.getpid(), signal.SIGILL)",
    "aborts": "os.abort()",
    "hangs": "time.sleep(3600)",
    "nan": "return right(x, weight, eps) * torch.nan",
    "shape": "return right(x, weight, eps).double()",
    "gradient": "return right(x, weight.detach() * 0.5, eps) + 0.5 * weight * right(x, 1, eps)",
    "mutates": "y = right(x, weight, eps); x.data.zero_(); return y",
    # Right in its trial, and not with the sizes of a run: found by its breadcrumb.
    "later": "if x[..., 0].numel() > 64: ctypes.string_at(0)\\nreturn right(x, weight, eps)",
    "widens": "return right(x, weight, eps).float()",
    "busy": "raise torch.OutOfMemoryError('CUDA out of memory')",
    "good": "return right(x, weight, eps)",
}
IMPORTS = {
    "raises": "raise RuntimeError('a broken build')",
    "leaves": "raise SystemExit(3)",
    "import_segfaults": "import ctypes; ctypes.string_at(0)",
    "import_hangs": "import time; time.sleep(3600)",
    "import_exits": "import os; print('bye', flush=True); os._exit(0)",
}
# The host itself asks `supports`: it must not be the first to.
IMPORTS["supports_segfaults"] = DECLARATION.format(body="    pass", name="deadly").replace(
    "supports=lambda request: ()", "supports=lambda request: ctypes.string_at(0)"
)
IMPORTS["device_exits"] = """
import os
from picotron_core.registry import hookimpl

@hookimpl
def picotron_device():
    os._exit(3)
"""
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "hostile-kernels"
version = "6.66"

[project.entry-points.picotron]
{points}

[tool.hatch.build.targets.wheel]
packages = ["hostile_kernels"]
"""


@pytest.fixture(scope="session")
def hostile_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed them in: to be put on PYTHONPATH."""
    project, site = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    package = project / "hostile_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, body in KERNELS.items():
        lines = textwrap.indent(body.replace("\\n", "\n"), "    ")
        (package / f"{name}.py").write_text(DECLARATION.format(body=lines, name=name))
    for name, source in IMPORTS.items():
        (package / f"{name}.py").write_text(source)
    points = "\n".join(f'{name} = "hostile_kernels.{name}"' for name in (*KERNELS, *IMPORTS))
    (project / "pyproject.toml").write_text(PROJECT.format(points=points))
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation"),
            *("--no-deps", "--no-index", "--target", str(site), str(project)),
        ],
        check=True,
    )
    return site


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-failure", action="store_true", help="every way in which a rank may be lost"
    )
    parser.addoption("--kills", type=int, default=10, help="test_torture: how often each run is.")
