"""The documentation cannot drift from the code: what is written down is compared with what is."""

import doctest
import inspect
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from picotron_conformance import plugin as conformance_plugin
from picotron_conformance.check import ASPECTS, Verdict
from picotron_conformance.limits import LIMITS

from picotron_core import config as config_module
from picotron_core import errors
from picotron_core.cli.config import as_markdown
from picotron_core.config import ENVIRONMENT, load_settings
from picotron_core.hardware import PROFILES
from picotron_core.ops import OPS
from picotron_core.ops.attention import FEATURES
from picotron_core.registry import Backend, hookspecs
from picotron_core.registry.plugins import load_registry

ROOT = Path(__file__).parents[2]
DOCS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOOKS = [name for name in vars(hookspecs) if name.startswith("picotron_")]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))


def test_every_setting_and_variable_is_in_the_configuration_page():
    assert as_markdown() in DOCS["configuration.md"], (
        "docs/configuration.md is not what `picotron config --markdown` prints: paste it anew"
    )


def test_no_page_names_a_variable_that_is_not_read():
    for name, text in {**DOCS, "README.md": README}.items():
        unknown = set(re.findall(r"PICOTRON_[A-Z_]*[A-Z]", text)) - ENVIRONMENT.keys()
        assert not unknown, (name, unknown)


def test_only_config_reads_picotrons_variables():
    sources = [*(ROOT / "picotron_core").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]
    assert len(sources) > 40
    for path in sources:
        text = path.read_text(encoding="utf-8")
        if re.search(r"os\.(environ|getenv)", text) and path.name != "config.py":
            # Of torchrun, the network libraries and the children that are started.
            assert "PICOTRON_" not in text, path


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_an_example(hook):
    assert f"`{hook}(" in DOCS["backends.md"]
    specification = getattr(hookspecs, hook)
    assert specification.__doc__
    assert ">>> @hookimpl" in specification.__doc__


@pytest.mark.parametrize("module", [hookspecs, config_module, errors])
def test_the_examples_in_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_profile_is_in_the_hardware_page():
    for profile in PROFILES:
        assert f"`{profile}`" in DOCS["hardware.md"]


def test_every_backend_and_op_is_in_the_backends_page():
    page = DOCS["backends.md"]
    table = page[page.index("## What is bundled") : page.index("## Choosing")]
    rows = {
        name: set(re.findall(r"\w+", ops))
        for name, ops in re.findall(r"^\| `([\w-]+)` \| ([^|]+) \|", table, re.MULTILINE)
    }
    declared: dict[str, set[str]] = {}
    for candidate in load_registry().candidates:
        declared.setdefault(candidate.backend.name, set()).add(candidate.backend.op)
    assert rows == declared
    assert set(OPS) == set().union(*declared.values())


def test_every_feature_of_attention_is_in_the_backends_page():
    page = DOCS["backends.md"]
    table = page[page.index("| feature | the call |") : page.index("The list grows")]
    rows = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", "".join(rows))) == FEATURES


def test_the_tree_in_the_architecture_page_is_the_tree():
    page = DOCS["architecture.md"]
    tree = page[page.index("## The house") : page.index("Each floor imports")]
    named = set(re.findall(r"[\w/]+\.py", tree))
    folders = ("picotron_core", "backends", "plugins", "conformance", "benchmarks", "tests")
    files = [path.as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    files += [path.as_posix() for path in ROOT.glob("*.py")]
    for name in named:
        found = any(file.endswith(f"/{name}") for file in files)
        assert found, f"docs/architecture.md names {name}: no such file"
    for folder in (ROOT / "picotron_core").iterdir():
        if folder.is_dir() and (folder / "__init__.py").exists():
            assert f"{folder.name}/" in tree, folder


def test_the_import_law_in_the_architecture_page_is_the_one_that_is_checked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    assert " < ".join(reversed(layers)) in DOCS["architecture.md"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_valid_config(path):
    settings = load_settings(path, env={})
    assert settings.config.run.name == path.stem.replace("_", "-")


def test_no_page_has_a_gap_to_fill():
    for name, text in {**DOCS, "README.md": README}.items():
        assert not re.search(r"@[A-Z]+@|TODO|TBD", text), name


def test_the_files_and_targets_that_the_readme_names_exist():
    for name in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / name).exists(), name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_page_for_authors_shows_the_files_of_the_example():
    page = DOCS["write_a_backend.md"]
    shown = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)\n```", page, re.DOTALL)
    assert len(shown) == 3
    for name, text in shown:
        assert text == (ROOT / name).read_text(encoding="utf-8").rstrip(), name


def test_the_page_for_authors_knows_every_option_verdict_aspect_and_claim(pytestconfig):
    page = DOCS["write_a_backend.md"]
    options = re.findall(r'"(--picotron-\w+)"', inspect.getsource(conformance_plugin))
    assert len(set(options)) == 6
    named = re.findall(r"^\| `?([\w-]+)", page, re.MULTILINE)
    claims = {field.name for field in fields(Backend)} - {
        *("op", "name", "level", "load", "supports", "summary")
    }
    for word in (*options, *Verdict, *claims):
        assert word in named, word
    for aspect in ASPECTS:
        assert re.search(rf"^\| (\w+, )?{aspect}\b", page, re.MULTILINE), aspect
    for limit in ("element", "row", "tensor", "bias"):
        assert limit in named
        assert limit in LIMITS
