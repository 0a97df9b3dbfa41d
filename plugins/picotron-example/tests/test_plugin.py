"""The plugin as a user meets it: built, installed, listed, enabled, selected, refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parents[1]


def install(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", target, source], check=True, capture_output=True)


def picotron(site: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PICOTRON_")}
    return subprocess.run(
        [sys.executable, "-m", "picotron_core.cli", *arguments],
        env={
            **environment,
            "PYTHONPATH": str(site),
            "PICOTRON_CACHE_DIR": str(site.parent / "cache"),
            **env,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def backends(site: Path, *arguments: str, **env: str):
    """The answer of `picotron backends --json`, and the row of the plugin's backend, if any."""
    result = picotron(site, "backends", "--json", *arguments, **env)
    answer = json.loads(result.stdout)
    rows = [row for row in answer["backends"] if row["qualified_name"] == "example/one-pass"]
    return answer, rows[0] if rows else None, result.returncode


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """A folder on sys.path with this distribution and one whose import raises."""
    target = tmp_path_factory.mktemp("site")
    install(PROJECT, target)
    broken = tmp_path_factory.mktemp("broken")
    (broken / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "picotron-broken"\nversion = "3.0"\n'
        '[project.entry-points.picotron]\nbroken = "picotron_broken"\n'
    )
    (broken / "picotron_broken").mkdir()
    (broken / "picotron_broken" / "__init__.py").write_text('raise SystemExit("libcuda is gone")\n')
    install(broken, target)
    return target


def test_installed_is_listed_but_not_active(site):
    answer, row, code = backends(site)
    assert code == 0
    assert row is None
    status = {plugin["plugin"]: plugin["status"] for plugin in answer["plugins"]}
    assert status == {"example": "inactive", "broken": "inactive"}
    table = picotron(site, "backends").stdout
    assert "Enable it with PICOTRON_PLUGINS=example" in table


def test_enabled_it_wins_by_its_level(site):
    _, row, code = backends(site, PICOTRON_PLUGINS="example")
    assert code == 0
    assert row["status"] == "selected"
    assert row["provider"] == "picotron-example 0.1.0"


def test_its_qualified_name_enables_and_selects_it(site):
    _, row, code = backends(site, "--backends", "norm=example/one-pass")
    assert (row["status"], code) == ("selected", 0)
    _, row, code = backends(site, PICOTRON_BACKENDS="norm=example/one_pass")
    assert (row["status"], code) == ("selected", 0)


def test_on_a_device_that_it_does_not_claim_it_is_refused_with_the_reason(site):
    answer, row, code = backends(site, "--device", "t4", "--backends", "norm=example/one-pass")
    assert row["status"] == "refused"
    assert row["reasons"][0]["detail"] == "one-pass was only tried on CPUs, this is a cuda device"
    assert code == 2
    assert "one-pass was only tried on CPUs" in answer["errors"][0]
    answer, row, code = backends(site, "--device", "t4", PICOTRON_PLUGINS="example")
    assert (row["status"], code) == ("refused", 0)


def test_a_plugin_that_raises_at_import_is_reported_and_hurts_nobody(site):
    answer, row, code = backends(site, PICOTRON_PLUGINS="broken,example")
    assert code == 0
    assert row["status"] == "selected"
    (broken,) = (plugin for plugin in answer["plugins"] if plugin["plugin"] == "broken")
    assert broken["status"] == "quarantined"
    assert broken["error"] == "SystemExit: libcuda is gone"


def test_a_plugin_that_is_not_enabled_is_never_imported(site):
    script = (
        "import sys; from picotron_core.registry.plugins import load_registry; load_registry();"
        "print([name for name in sys.modules if name.startswith(('picotron_ex', 'picotron_br'))])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_a_plugin_that_is_not_installed_is_an_error_with_the_nearest_name(site):
    result = picotron(site, "backends", PICOTRON_PLUGINS="exmaple")
    assert result.returncode == 2
    assert result.stderr.startswith("error: Plugin 'exmaple' is not installed. Did you mean 'exam")
    assert "Traceback" not in result.stderr


def test_the_kernel_keeps_the_contract(site):
    """Value and gradients against float64 autograd of the contract's formula."""
    sys.path.insert(0, str(site))
    try:
        from picotron_example.norm import rms_norm
    finally:
        sys.path.remove(str(site))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 33, generator=generator)
    weight, upstream = torch.randn(33, generator=generator), torch.randn(3, 5, 33)
    found, wanted = [], []
    for dtype, results in ((torch.float32, found), (torch.float64, wanted)):
        a, w = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
        if dtype == torch.float32:
            y = rms_norm(a, w, eps=1e-5)
        else:
            y = a / (a.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w
        results += [y, *torch.autograd.grad(y, (a, w), upstream.to(dtype))]
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
