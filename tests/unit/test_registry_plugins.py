"""Plugins as they lie on a disk: found by their metadata, loaded one by one, kept apart."""

import logging
import textwrap

import pytest

from picotron_core.errors import BackendError, ConfigError
from picotron_core.registry.plugins import BUNDLED, described_device, load_registry, notify

DECLARES = """
from picotron_core.registry import Backend, Level, hookimpl, kernel_from

@hookimpl
def picotron_backends():
    yield Backend(op={op!r}, name={name!r}, level=Level.SPECIALIZED,
                  load=kernel_from("os:sep"), supports=lambda request: ())
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Lay a distribution with one module on sys.path, as pip would."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(plugin: str, source: str) -> None:
        module = f"{plugin}_of_this_test"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{plugin}_kernels-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {plugin}-kernels\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[picotron]\n{plugin} = {module}\n")
        monkeypatch.delitem(__import__("sys").modules, module, raising=False)

    return install


def names(registry, plugin):
    return [c.backend.name for c in registry.candidates if c.provider.plugin == plugin]


def test_the_bundled_are_loaded_by_the_same_hook():
    registry = load_registry()
    assert {plugin.provider.plugin for plugin in registry.plugins} == set()
    assert len(names(registry, "picotron")) >= 14
    assert all(registry.manager.has_plugin(module) for module in BUNDLED)


def test_a_plugin_is_inactive_until_it_is_named(installed):
    installed("acme", DECLARES.format(op="norm", name="fast"))
    registry = load_registry()
    (record,) = registry.plugins
    assert (record.status, names(registry, "acme")) == ("inactive", [])
    registry = load_registry(["Acme"])
    (record,) = registry.plugins
    assert (record.status, names(registry, "acme")) == ("active", ["fast"])
    assert record.provider.distribution == "acme-kernels"
    assert record.provider.version == "1.5"


def test_two_backends_of_one_name_are_an_error_that_names_both(installed):
    installed("acme", DECLARES.format(op="norm", name="fast"))
    installed("zeta", DECLARES.format(op="norm", name="FAST"))
    load_registry(["acme"])
    with pytest.raises(BackendError, match=r"norm.*acme-kernels.*zeta-kernels"):
        load_registry(["acme", "zeta"])


def test_a_bundled_name_cannot_be_taken(installed):
    installed("acme", DECLARES.format(op="attention", name="mem-efficient"))
    with pytest.raises(BackendError, match=r"from picotron, one from acme-kernels"):
        load_registry(["acme"])


BROKEN = {
    "it raises at import": ("raise ImportError('libacme.so')", "ImportError: libacme.so"),
    "it exits at import": ("raise SystemExit(3)", "SystemExit: 3"),
    "its source is not Python": ("def def", "SyntaxError"),
    "its generator raises half way": (
        DECLARES.format(op="norm", name="fast") + "    raise OSError('gone')\n",
        "OSError: gone",
    ),
    "it yields something else": (
        "from picotron_core.registry import hookimpl\n"
        "@hookimpl\ndef picotron_backends():\n    yield 'flash'\n",
        "must yield Backend, got 'flash'",
    ),
    "its op does not exist": (
        DECLARES.format(op="atention", name="fast"),
        "names op 'atention'. Did you mean 'attention'?",
    ),
    "its name is a word of the grammar": (DECLARES.format(op="norm", name="auto"), "reserved"),
    "its hook takes an argument that there is none of": (
        "from picotron_core.registry import hookimpl\n"
        "@hookimpl\ndef picotron_backends(device):\n    return []\n",
        "PluginValidationError",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_is_a_record_and_hurts_nobody(installed, how):
    source, message = BROKEN[how]
    installed("bad", source)
    installed("good", DECLARES.format(op="norm", name="fine"))
    registry = load_registry(["bad", "good"])
    (record,) = registry.failed()
    assert record.provider.distribution == "bad-kernels"
    assert message in record.error
    assert "Traceback" in record.traceback
    assert names(registry, "good") == ["fine"]
    assert names(registry, "bad") == []
    assert not registry.manager.has_plugin("bad")


def test_an_unknown_plugin_is_an_error_with_the_nearest(installed):
    with pytest.raises(ConfigError, match="No plugin is installed"):
        load_registry(["acme"])
    installed("acme", "")
    with pytest.raises(ConfigError, match=r"Did you mean 'acme'\?"):
        load_registry(["acne"])


OBSERVERS = """
from picotron_core.registry import hookimpl
from picotron_core.hardware import Device

seen = []

@hookimpl
def picotron_on_step(record):
    seen.append(record["step"])
    raise RuntimeError("the logger is down")

@hookimpl
def picotron_device():
    return Device(type="cpu", name="described by a plugin")
"""


def test_an_observer_cannot_break_the_host(installed, caplog):
    installed("loud", OBSERVERS)
    installed("quiet", OBSERVERS.replace("    raise RuntimeError", "    # raise RuntimeError"))
    registry = load_registry(["loud", "quiet"])
    with caplog.at_level(logging.WARNING, "picotron"):
        notify(registry, "picotron_on_step", record={"step": 7})
    assert registry.manager.get_plugin("loud").seen == [7]
    assert registry.manager.get_plugin("quiet").seen == [7]
    assert "picotron_on_step of loud failed" in caplog.text
    assert "the logger is down" in caplog.text


def test_two_distributions_of_one_plugin_name_are_an_error(installed, tmp_path):
    installed("acme", DECLARES.format(op="norm", name="fast"))
    info = tmp_path / "copy_of_acme-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: copy-of-acme\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[picotron]\nAcme = acme_of_this_test\n")
    with pytest.raises(BackendError, match=r"acme-kernels and copy-of-acme|copy-of-acme and acme"):
        load_registry(["acme"])
    assert load_registry().candidates


def test_a_device_hook_that_raises_is_passed_over(installed, caplog):
    installed("bad", OBSERVERS.replace("return Device(", "return gone("))
    assert described_device(load_registry(["bad"])) is None
    assert "name 'gone' is not defined" in caplog.text


def test_a_plugin_may_describe_the_device(installed):
    assert described_device(load_registry()) is None
    installed("vendor", OBSERVERS)
    device = described_device(load_registry(["vendor"]))
    assert device is not None
    assert device.name == "described by a plugin"
