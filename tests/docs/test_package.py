"""What someone has who installs Picotron by pip: its description, its files, and what they name."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from typer.testing import CliRunner

from picotron_core.cli.app import app

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
FOLDERS = ("docs", "picotron_core", "backends", "plugins", "conformance", "tests", "benchmarks")
PAGES = [*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))]
PACKAGES = ("picotron_core", "backends/picotron_backends", "conformance/picotron_conformance")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    for builder in (WheelBuilder, SdistBuilder):
        list(builder(str(ROOT)).build(directory=str(folder), versions=["standard"]))
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def links(text: str) -> list[str]:
    """The targets of all links and images outside of code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return LINK.findall(re.sub(r"^    .*$|`[^`\n]*`(?!\])", "", text, flags=re.MULTILINE))


def anchors(text: str) -> set[str]:
    """The headings of a page, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_the_description_leads_somewhere(metadata):
    description = metadata.get_payload()
    found = links(description)
    assert len(found) > 10
    repository = dict(url.split(", ") for url in metadata.get_all("Project-URL"))["Source"]
    assert "THIS-REPOSITORY" not in description
    assert f"git clone {repository}" in description
    for link in found:
        if link.startswith("#"):
            assert link[1:] in anchors(description), link
        assert link.startswith(("#", "https://")), link
        if link.startswith(repository):
            path, _, anchor = link.removeprefix(repository).partition("#")
            kind, page = re.fullmatch(r"/(blob|raw)/main/(.+)", path).groups()
            assert (ROOT / page).exists(), link
            assert (kind == "raw") == (Path(page).suffix == ".png"), link
            assert not anchor or anchor in anchors((ROOT / page).read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_in_the_repository_is_relative_and_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in links(text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_wheel_holds_the_packages_the_examples_and_nothing_else(wheel):
    wanted = {f"picotron_core/examples/{path.name}" for path in EXAMPLES}
    for package in map(Path, PACKAGES):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                wanted.add(path.relative_to((ROOT / package).parent).as_posix())
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == wanted


def test_the_source_distribution_can_be_built_and_tested(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    tops = {name.partition("/")[0] for name in names}
    assert tops == {
        *(*FOLDERS, "examples", "LICENSE", "Makefile", "README.md", "CHANGELOG.md", "PKG-INFO"),
        *("pyproject.toml", "constraints.txt", "hatch_build.py", ".gitignore"),
    }
    for path in (*EXAMPLES, ROOT / "tests/conftest.py", ROOT / "picotron_core/py.typed"):
        assert path.relative_to(ROOT).as_posix() in names
    assert not [name for name in names if name.endswith((".pyc", ".jsonl", ".safetensors"))]


def test_the_examples_of_an_installed_wheel(wheel, tmp_path):
    site, here = tmp_path / "site", tmp_path / "here"
    wheel.extractall(site)
    here.mkdir()

    def picotron(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from picotron_core.cli import main; main()", *words]
        env = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(command, capture_output=True, text=True, cwd=here, env=env)

    listed = picotron("examples").stdout.splitlines()
    assert [line.split()[0] for line in listed[: len(EXAMPLES)]] == [e.stem for e in EXAMPLES]
    assert picotron("examples", "tiny").returncode == 0
    assert (here / "tiny.toml").read_bytes() == (ROOT / "examples/tiny.toml").read_bytes()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_of_a_checkout(picotron, tmp_path, example):
    code, out, _ = picotron("examples")
    first = example.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    assert (code, bool(first)) == (0, True)
    assert re.search(rf"^{example.stem} +{re.escape(first)}$", out, re.MULTILINE)
    code, out, _ = picotron("examples", example.stem)
    assert code == 0
    assert f"picotron train {example.name}" in out
    assert (tmp_path / example.name).read_bytes() == example.read_bytes()
    assert picotron("config", example.name)[0] == 0


WRONG_NAMES = {
    "dmeo": "Did you mean 'demo'?",
    "pretrain-124m": "Did you mean 'pretrain_124m'?",
    "Tiny": "Did you mean 'tiny'?",
    "fine_tune": "Did you mean 'finetune'?",
    "../examples/x": "Choose from: demo, finetune, pretrain_124m, tiny.",
    "zzz": "Choose from: demo, finetune, pretrain_124m, tiny.",
}


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_an_example_that_there_is_not(picotron, tmp_path, name):
    code, _, err = picotron("examples", name)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert err == f"error: No example {name!r}. {WRONG_NAMES[name]}\n"


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_an_example_overwrites_nothing(picotron, tmp_path, kind):
    target, other = tmp_path / "tiny.toml", tmp_path / "other"
    other.write_text("mine")
    if kind == "link":
        target.symlink_to(other)
    elif kind == "folder":
        target.mkdir()
    else:
        target.write_text("mine")
    code, _, err = picotron("examples", "tiny.toml")
    assert (code, err.startswith("error: tiny.toml exists")) == (2, True)
    assert other.read_text() == "mine"
    assert kind == "folder" or target.read_text() == "mine"


def texts(path: Path) -> list[str]:
    """The texts in a module that are not documentation of the code itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [n.value for n in nodes if isinstance(n.value, str) and id(n) not in own]


ONLY_IN_A_CHECKOUT = re.compile(
    r"\b(docs|examples|tests|benchmarks|plugins)/|README|Makefile|CHANGELOG|constraints\.txt"
    r"|`make \w|\bmake (demo|test|check|slow|bench|conformance)\b"
)


def test_messages_name_nothing_that_only_a_checkout_has():
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(modules) > 150
    near = [path for path in modules if ONLY_IN_A_CHECKOUT.search(path.read_text("utf-8"))]
    found = [(p.name, text) for p in near for text in texts(p) if ONLY_IN_A_CHECKOUT.search(text)]
    assert not found


def test_help_names_nothing_that_only_a_checkout_has():
    runner = CliRunner()
    listed = runner.invoke(app, ["--help"]).stdout
    names = re.findall(r"^  ([a-z-]+) ", listed[listed.index("Commands") :], re.MULTILINE)
    assert {"train", "plot", "examples"} <= set(names)
    for name in names:
        shown = runner.invoke(app, [name, "--help"]).stdout
        assert not ONLY_IN_A_CHECKOUT.search(shown), name
