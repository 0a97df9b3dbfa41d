"""What the tests share: a small real text, one token cache, the command line in this process."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import settings

from picotron_core import cli

settings.register_profile("picotron", deadline=None)  # a busy machine is no failure
settings.load_profile("picotron")

# Before torch is imported anywhere, here or in a child: models this small are slower on threads,
# and the test processes would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# Small enough for seconds on a CPU, with every part of the architecture: GQA, tying, two layers.
TINY = (
    *("--model.hidden_size", "32", "--model.intermediate_size", "48"),
    *("--model.num_hidden_layers", "2", "--model.num_attention_heads", "4"),
    *("--model.num_key_value_heads", "2", "--model.max_position_embeddings", "128"),
    *("--data.vocab_size", "300", "--data.seq_len", "32", "--data.val_fraction", "0.2"),
    *("--train.micro_batch", "4", "--train.eval_samples", "8", "--train.warmup_steps", "2"),
    *("--train.dtype", "float32", "--run.device", "cpu"),
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape names that are not UTF-8 in what a test logged: xdist's workers send reports as UTF-8,
    and one that cannot be sent ends the whole session.
    """
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PICOTRON_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen documents of real text: modules of the standard library."""
    folder = tmp_path_factory.mktemp("text")
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("abc", "bisect", "calendar", "cmd", "csv", "glob", "heapq", "keyword", "queue"):
        text = (library / f"{name}.py").read_text(encoding="utf-8")
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(text_folder: Path, cache_dir: Path) -> tuple[str, ...]:
    """The arguments of a run of seconds."""
    return (*TINY, "--data", str(text_folder), "--data.cache_dir", str(cache_dir))


@pytest.fixture
def every_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waits for each save: on a busy machine some would be skipped."""
    from picotron_core.checkpoint.save import Saver

    start = Saver.start

    def and_wait(saver: Saver) -> bool:
        begun = start(saver)
        saver.finish()
        return begun

    monkeypatch.setattr(Saver, "start", and_wait)


@pytest.fixture
def picotron(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """`picotron ARGUMENTS` in an empty folder -> exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["picotron", *arguments])
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call
