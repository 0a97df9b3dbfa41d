"""A run's folder from elsewhere may hold links: nothing is written or removed through them."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from users import ALICE, BOB, needs_root, open_folder, run

from picotron_core import cli
from picotron_core.files import user_id

assert open_folder  # a fixture
FILES = (  # that a resume, or `picotron trace`, writes anew
    *("backends.json", "environment.json", "loss.png"),
    *("trace/rank-0000.json", "trace/all.json", "trace/schedule.png"),
)
KEPT = (
    *("lock", "metrics.jsonl", "config.toml", "model/config.json"),
    *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
)
FOLDERS = ("checkpoints", "tokenizer", "trace", "model")


def call(*arguments):
    """`picotron ARGUMENTS` in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["picotron", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A run of four steps, with checkpoints at 2 and 4, a trace and pictures."""
    folder = tmp_path_factory.mktemp("made")
    assert call(
        *("train", *tiny, "--run.dir", folder, "--name", "a", "--train.steps", "4"),
        *("--checkpoint.every", "2", "--checkpoint.keep", "2", "--trace"),
    ) == 0  # fmt: skip
    assert call("trace", folder / "a") == 0
    return folder / "a"


@pytest.fixture
def copied(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "a", symlinks=True))


@pytest.fixture
def victim(tmp_path):
    (tmp_path / "victim").mkdir()
    return tmp_path / "victim"


def snapshot(folder):
    return {
        path: (status.st_mode, path.read_bytes() if stat.S_ISREG(status.st_mode) else b"")
        for path in sorted(folder.rglob("*"))
        for status in [path.lstat()]
    }


def changed(victim, before):
    after = snapshot(victim)
    differ = [path for path in before | after if before.get(path) != after.get(path)]
    return sorted(str(path.relative_to(victim)) for path in differ)


def resume(copied, steps=6):
    words = ("--train.steps", steps, "--checkpoint.keep", 2, "--trace")
    return call("train", "--resume", copied, *words)


def test_files_that_are_links_are_replaced_and_their_targets_kept(copied, victim):
    for name in FILES:
        target = victim / name.replace("/", "-")
        (copied / name).rename(target)
        (copied / name).symlink_to(target)
    before = snapshot(victim)
    assert resume(copied) == 0
    assert call("trace", copied) == 0
    assert changed(victim, before) == []
    assert [name for name in FILES if (copied / name).is_symlink()] == []


def test_temporary_names_that_are_links_are_replaced_and_their_targets_kept(copied, victim):
    for name in (*FILES, *KEPT):
        path = copied / name
        for temporary in (f".{path.name}.writing", f".{path.name}.{os.getpid()}.writing"):
            target = victim / temporary
            target.write_text("precious")
            path.with_name(temporary).symlink_to(target)
    before = snapshot(victim)
    assert resume(copied) == 0
    assert call("trace", copied) == 0
    assert changed(victim, before) == []
    assert [path.name for path in copied.rglob("*") if path.suffix in (".json", ".png", ".toml")]


def test_a_copy_of_hard_links_changes_nothing_of_the_run_it_was_made_from(made, tmp_path, capsys):
    """As of `cp -al` and `rsync --link-dest`: of its files, those are refused that would be changed
    in place, until they are its own.
    """
    copied = Path(shutil.copytree(made, tmp_path / "a", copy_function=os.link))
    before = snapshot(made)
    for name in ("lock", "metrics.jsonl"):
        assert resume(copied) == 1
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert f"{copied / name}: has other names (hard links)" in said[0]
        data = (copied / name).read_bytes()
        (copied / name).unlink()
        (copied / name).write_bytes(data)
    assert resume(copied) == 0
    assert changed(made, before) == []


def test_checkpoints_that_are_links_are_neither_swept_nor_pruned(copied, victim):
    checkpoints = copied / "checkpoints"
    (checkpoints / "step-00000002").rename(victim / "step-00000002")
    (checkpoints / "step-00000002").symlink_to(victim / "step-00000002")
    for name in (".writing-mine", ".writing-step-00000004-x-1", "step-00000006"):
        shutil.copytree(victim / "step-00000002", victim / name)
        (checkpoints / name).symlink_to(victim / name)
    before = snapshot(victim)
    assert resume(copied, steps=7) == 0
    assert changed(victim, before) == []


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_a_link_is_refused_before_anything_is_written(
    copied, victim, capsys, name
):
    if (copied / name).exists():
        (copied / name).rename(victim / name)
    else:
        (victim / name).mkdir()
    (copied / name).symlink_to(victim / name)
    (victim / "checkpoints" / ".writing-mine").mkdir(parents=True, exist_ok=True)
    before = snapshot(copied)
    before_victim = snapshot(victim)
    for command in (
        ("train", "--resume", copied, "--train.steps", 6, "--trace"),
        ("trace", copied),
        ("checkpoint", "prune", copied, "--keep", 2),
    ):
        assert call(*command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {copied / name} is a link")
        assert changed(victim, before_victim) == []
        assert snapshot(copied) == before


@pytest.mark.parametrize("name", KEPT)
def test_a_file_that_is_kept_and_is_a_link_is_refused(copied, victim, capsys, name):
    target = victim / name.replace("/", "-")
    (copied / name).rename(target)
    (copied / name).symlink_to(target)
    before = snapshot(victim)
    assert resume(copied) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(copied / name) in line
    assert "a link" in line
    assert changed(victim, before) == []


def test_the_run_itself_may_be_reached_through_a_link(copied, tmp_path):
    (tmp_path / "latest").symlink_to("a")
    assert resume(tmp_path / "latest") == 0
    assert (copied / "checkpoints/step-00000006").is_dir()


@pytest.mark.parametrize("kind", ["folder", "temporary", "dangling"])
def test_an_export_goes_through_no_link(copied, victim, tmp_path, kind):
    target = tmp_path / "exported"
    (victim / "precious").write_text("precious")
    before = snapshot(victim)
    if kind == "temporary":
        (tmp_path / ".exported.writing").symlink_to(victim)
    else:
        target.symlink_to(victim if kind == "folder" else victim / "nothing")
    assert call("export", copied, target) == (0 if kind == "temporary" else 2)
    assert changed(victim, before) == []
    assert target.is_symlink() == (kind != "temporary")


def test_a_cache_of_trials_from_elsewhere(tmp_path, victim):
    from picotron_core.registry.breadcrumb import _prefix, sweep
    from picotron_core.registry.quarantine import Entry, Quarantine

    trials = tmp_path / "trials"
    trials.mkdir()
    quarantine = Quarantine(trials)
    entry = Entry("acme", "acme", "1", "norm=acme/fast", "it died", "now")
    content = '{"plugin": "acme", "distribution": "d", "version": "1", "what": "w", "evidence": ""}'
    for name in ("verdict-1.json", f".verdict-1.json.{os.getpid()}.writing", "lock"):
        (victim / name).write_text(content)
        (trials / name).symlink_to(victim / name)
    os.mkfifo(trials / f"{_prefix()}1.json")
    os.mkfifo(trials / "verdict-2.json")
    before = snapshot(victim)
    assert list(quarantine.entries()) == []
    quarantine.keep("1", entry, "it died")
    with pytest.raises(Exception, match="is a link"):
        sweep(quarantine)
    (trials / "lock").unlink()
    assert sweep(quarantine) == []
    assert changed(victim, before) == []
    assert [entry.evidence for _, entry in quarantine.entries()] == ["it died"]


@needs_root
def test_what_another_user_says_of_plugins_is_ignored(tmp_path, caplog):
    from picotron_core.registry.breadcrumb import _prefix, sweep
    from picotron_core.registry.quarantine import Entry, Quarantine

    quarantine = Quarantine(tmp_path / "trials")
    entry = Entry("acme", "acme", "1", "norm=acme/fast", "", "")
    for key in ("own", "bobs"):
        quarantine.keep(key, entry, f"said by {key}")
    crumb = quarantine.folder / f"{_prefix()}999999999.json"
    crumb.write_text('{"process": "gone", "used": [{"key": "x", "package": "p", "entry": {}}]}')
    crumb.with_suffix(".faults").write_text("Fatal Python error: Segmentation fault")
    for path in (crumb, quarantine.folder / "verdict-bobs.json"):
        os.chown(path, BOB, BOB)
    assert [entry.evidence for _, entry in quarantine.entries()] == ["said by own"]
    assert sweep(quarantine) == []
    assert f"belongs to user {BOB}" in caplog.text


OF_OTHERS = f"""
import shutil
from picotron_core import cli
ALICE, BOB = {ALICE}, {BOB}
here, arguments = Path(sys.argv[1]), sys.argv[2:]

def call(*words):
    sys.argv = ["picotron", *map(str, words)]
    try:
        cli.main()
    except SystemExit as end:
        return end.code

def owned(path, owner, mode):
    for each in (path, *path.rglob("*")):
        os.chown(each, owner, owner)
    path.chmod(mode)

def train(name, *more):
    return call("train", *arguments, "--run.dir", here, "--name", name, "--train.steps", 2, *more)

def all_commands():
    train("a")
    call("generate", here / "a", "--prompt", "x", "--max-new-tokens", 2)
    call("train", "--resume", here / "a", "--train.steps", 3)

os.environ["HOME"] = str(here)
import_what_is_needed_for(all_commands, here / "modules")
owned(here / "a", ALICE, 0o755)
owned(here / "cache", ALICE, 0o755)
print("BEGIN")
"""


def of_others(code, open_folder, tiny, text_folder):
    shutil.copytree(text_folder, open_folder / "text")
    (open_folder / "text").chmod(0o755)
    arguments = list(tiny)
    arguments[arguments.index("--data") + 1] = open_folder / "text"
    arguments[arguments.index("--data.cache_dir") + 1] = open_folder / "cache"
    lines = run(OF_OTHERS + code, open_folder, *arguments, errors_too=True)
    return lines[lines.index("BEGIN") + 1 :]


@needs_root
def test_a_run_of_another_user(open_folder, tiny, text_folder):
    """Bob may read Alice's run: he generates from it; to resume, he copies it."""
    lines = of_others(
        """
resumed = lambda path: call("train", "--resume", path, "--train.steps", 4)
before = sorted((p, p.stat().st_mtime_ns) for p in (here / "a").rglob("*"))
as_user(BOB, lambda: call("generate", here / "a", "--prompt", "x", "--max-new-tokens", 2))
print("RESUME")
as_user(BOB, lambda: resumed(here / "a"))
assert before == sorted((p, p.stat().st_mtime_ns) for p in (here / "a").rglob("*"))
print("COPY")
shutil.copytree(here / "a", here / "b")
owned(here / "b", BOB, 0o755)
as_user(BOB, lambda: resumed(here / "b"))
print("HIDDEN")
owned(here / "a", ALICE, 0o700)
as_user(BOB, lambda: resumed(here / "a"))
as_user(BOB, lambda: call("generate", here / "a", "--prompt", "x"))
print("ROOT")
as_user(0, lambda: resumed(here / "a"))
""",
        open_folder,
        tiny,
        text_folder,
    )
    text = "\n".join(lines)
    generated, rest = text.split("RESUME\n")
    resumed, rest = rest.split("COPY\n")
    copy, rest = rest.split("HIDDEN\n")
    hidden, root = rest.split("ROOT\n")
    assert generated.endswith("DONE 0\n")
    assert "error: Cannot lock" in resumed
    assert "Permission denied" in resumed
    assert "copy the run's folder" in resumed
    assert resumed.endswith("DONE 1\n")
    assert copy.endswith("DONE 0\n")
    assert hidden.count("rror: ") == hidden.count("DONE ") == 2
    assert "lets you not read it" in hidden
    assert "DONE 0" not in hidden
    assert "it is a bug" not in hidden
    assert root.endswith("DONE 0")


def test_this_user_has_a_number():
    assert user_id() == os.geteuid()
