"""Plugins that die, hang, lie or write where they must not: found out before they can hurt."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from picotron_core.config import parse_backends
from picotron_core.hardware import look
from picotron_core.registry import Code, Request
from picotron_core.registry.bind import bind
from picotron_core.registry.breadcrumb import sweep
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.quarantine import Quarantine
from picotron_core.registry.select import resolve
from picotron_core.registry.trial import PATIENCE_S, Task, try_import, try_kernels

NORM = Request(op="norm", device=look("cpu"), dtype="float32", sizes={"E": 32})
BAD_KERNELS = {
    "segfaults": r"died of SIGSEGV in \w+ \(\w+\.py:\d+\)",
    "illegal": r"died of SIGILL in kernel \(illegal\.py:\d+\)",
    "aborts": r"died of SIGABRT in kernel",
    "hangs": r"gave no answer within",
    "nan": r"is not the reference's",
    "shape": r"is torch\.float64 for inputs of torch\.float32",
    "gradient": r"result \d is not the reference's",
    "mutates": r"changed its inputs",
}
BAD_IMPORTS = {
    "raises": r"RuntimeError: a broken build",
    "leaves": r"SystemExit: 3",
    "import_segfaults": r"died of SIGSEGV",
    "import_hangs": r"gave no answer within",
    "supports_segfaults": r"died of SIGSEGV",
    "device_exits": r"left with exit code 3 before it answered",
    "import_exits": r"left with exit code 0 before it answered: bye",
}


@pytest.fixture
def site(hostile_site, monkeypatch):
    """On sys.path here, and in the children."""
    monkeypatch.syspath_prepend(hostile_site)
    monkeypatch.setenv("PYTHONPATH", str(hostile_site))
    return hostile_site


@pytest.mark.parametrize("name", BAD_KERNELS)
def test_a_bad_kernel_is_found_out_in_a_child(site, name):
    patience = 3.0 if name == "hangs" else PATIENCE_S
    task = Task("norm", f"{name}/{name}", (NORM,))
    (evidence,) = try_kernels(name, [task], patience_s=patience).values()
    assert evidence
    assert re.search(BAD_KERNELS[name], evidence), evidence


@pytest.mark.parametrize("name", BAD_IMPORTS)
def test_a_bad_import_is_found_out_in_a_child(site, name):
    patience = 3.0 if name == "import_hangs" else PATIENCE_S
    evidence = try_import(name, patience_s=patience)
    assert re.search(BAD_IMPORTS[name], evidence), evidence


def test_a_good_one_passes(site):
    assert try_import("good") == ""
    task = Task("norm", "good/good", (NORM,))
    assert try_kernels("good", [task]) == {task: ""}


def test_after_a_death_another_child_tries_the_rest(site):
    dying = Task("norm", "later/later", (NORM,))
    assert list(try_kernels("later", [dying, Task("norm", "later/later", (NORM, NORM))]).values())


def test_a_verdict_is_kept_and_costs_no_child(site, tmp_path, monkeypatch):
    quarantine = Quarantine(tmp_path)
    points = {point.name: point for point in entry_points(group="picotron")}
    assert quarantine.plugin(points["good"]) == ""
    assert "a broken build" in quarantine.plugin(points["raises"])
    registry = load_registry(["good"], evidence_against=quarantine.plugin)
    (mine,) = (c for c in registry.candidates if c.provider.plugin == "good")
    assert quarantine.kernel(mine, (NORM,)) is None
    monkeypatch.setattr("sys.executable", "/nowhere")  # whoever starts a child now, fails
    assert quarantine.plugin(points["good"]) == ""
    assert "a broken build" in quarantine.plugin(points["raises"])
    assert quarantine.kernel(mine, (NORM,)) is None
    with pytest.raises(OSError, match="nowhere"):  # but another question is another trial
        quarantine.kernel(mine, (Request(op="norm", device=look("cpu"), dtype="bfloat16"),))


def test_changed_files_are_tried_anew(site, tmp_path):
    from picotron_core.registry import quarantine as module

    points = {point.name: point for point in entry_points(group="picotron")}
    quarantine = Quarantine(tmp_path)
    quarantine.plugin(points["good"])
    (before,) = (path.name for path, _ in quarantine.entries())
    source = site / "hostile_kernels" / "good.py"
    text = source.read_text()
    try:
        source.write_text(text + "\n# rebuilt\n")
        module._files.cache_clear()
        quarantine.plugin(points["good"])
        assert {path.name for path, _ in quarantine.entries()} > {before}
    finally:
        source.write_text(text)
        module._files.cache_clear()


def test_a_quarantined_kernel_is_passed_over_or_refused_by_name(site, tmp_path):
    quarantine = Quarantine(tmp_path)
    registry = load_registry(["mutates"], evidence_against=quarantine.plugin)

    def bound(wish):
        rules = parse_backends(wish, "command line")
        return bind(resolve(rules, [NORM], registry.candidates), registry, quarantine=quarantine)

    _, (selection,) = bound("norm=auto")
    assert selection.chosen.provider.bundled
    (refused,) = (v for v in selection.refused if v.candidate.provider.plugin == "mutates")
    assert refused.reasons[0].code is Code.QUARANTINED
    with pytest.raises(ValueError, match=r"mutates/mutates.*changed its inputs.*quarantine clear"):
        bound("norm=mutates/mutates")


def train(tiny, folder, site, name, *more, plugins="", wait=True):
    env = {**os.environ, "PYTHONPATH": str(site), "PYTHONFAULTHANDLER": ""}
    if plugins:
        env["PICOTRON_PLUGINS"] = plugins
    command = [sys.executable, "-m", "picotron_core.cli", "train", *tiny, "--run.dir", str(folder)]
    command += ["--train.steps", "4", "--name", name, *more]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not wait:
        return process
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("val_loss")) for line in lines]


TEN = [*BAD_KERNELS, "raises", "leaves"]


@pytest.mark.parametrize(
    "hostile",
    [
        ["segfaults", "nan", "mutates", "leaves"],
        pytest.param(TEN, marks=pytest.mark.slow),  # of which one hangs for a minute
    ],
)
def test_hostile_plugins_change_nothing(tiny, tmp_path, hostile_site, hostile):
    """All enabled at once: the run is the run without them, bit by bit."""
    assert len(TEN) == 10
    own = ("--data.cache_dir", str(tmp_path / "cache"))
    code, out = train(tiny, tmp_path, hostile_site, "without", *own)
    assert code == 0, out
    code, out = train(tiny, tmp_path, hostile_site, "with", *own, plugins=",".join(hostile))
    assert code == 0, out
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    selected = {s["op"]: s for s in json.loads((tmp_path / "with/backends.json").read_text())}
    refused = selected["norm"]["refused"]
    for name in BAD_KERNELS.keys() & hostile:
        assert refused[f"{name}/{name}"][0]["code"] == "quarantined", name
        assert f"{name}/{name} is not used: quarantined: " in out
    for name in {"raises", "leaves"} & set(hostile):
        assert f"plugin {name} is quarantined" in out
    kept = Quarantine(tmp_path / "cache" / "trials").entries()
    assert {entry.plugin for _, entry in kept if entry.evidence} == set(hostile)


def test_a_kernel_that_kills_a_run_is_known_to_the_next(tiny, tmp_path, hostile_site):
    own = ("--data.cache_dir", str(tmp_path / "cache"))
    wish = ("--backends", "norm=later/later,auto")
    code, out = train(tiny, tmp_path, hostile_site, "dies", *own, *wish)
    assert code == -signal.SIGSEGV, out
    code, out = train(tiny, tmp_path, hostile_site, "lives", *own, *wish)
    assert code == 0, out
    assert "norm=later/later is quarantined: it killed a run: Segmentation fault" in out
    assert "(later.py:" in out
    assert not list((tmp_path / "cache" / "trials").glob("running-*"))
    code, out = train(tiny, tmp_path, hostile_site, "named", *own, "--backends", "norm=later/later")
    assert code == 2
    assert "it killed a run" in out
    assert "Traceback" not in out


def test_a_run_that_was_killed_from_outside_accuses_nobody(tiny, tmp_path, hostile_site):
    own = ("--data.cache_dir", str(tmp_path / "cache"), "--backends", "norm=good/good")
    long = (*own, "--train.steps", "100000", "--checkpoint.every", "0")
    process = train(tiny, tmp_path, hostile_site, "killed", *long, wait=False)
    try:
        metrics = tmp_path / "killed" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.05)
        assert list((tmp_path / "cache" / "trials").glob("running-*.json"))
    finally:
        process.kill()
        process.communicate()
    code, out = train(tiny, tmp_path, hostile_site, "again", *own)
    assert code == 0, out
    assert "is quarantined" not in out
    selected = {s["op"]: s for s in json.loads((tmp_path / "again/backends.json").read_text())}
    assert selected["norm"]["backend"] == "good/good"
    assert not list((tmp_path / "cache" / "trials").glob("running-*"))


def test_a_crumb_of_another_machine_is_left_alone(tmp_path):
    """On a shared folder its process may well be alive."""
    other = tmp_path / "running-elsewhere-1.json"
    other.write_text(json.dumps({"process": "1 1 another boot", "used": []}))
    assert sweep(Quarantine(tmp_path)) == []
    assert other.exists()


def test_the_command_lists_and_clears(picotron, site, tmp_path):
    own = ("--data.cache_dir", str(tmp_path))
    code, out, _ = picotron("quarantine", "list", *own)
    assert (code, out) == (0, "No plugin was tried here yet.\n")
    points = {point.name: point for point in entry_points(group="picotron")}
    quarantine = Quarantine(tmp_path / "trials")
    for name in ("good", "raises"):
        quarantine.plugin(points[name])
    code, out, _ = picotron("quarantine", "list", *own)
    assert code == 0
    bad, good = out.splitlines()[1:]
    assert "the import of raises" in bad
    assert "quarantined: RuntimeError: a broken build" in bad
    assert "passed" in good
    code, _, err = picotron("quarantine", "clear", "raisse", *own)
    assert code == 2
    assert "Did you mean 'raises'?" in err
    code, out, _ = picotron("quarantine", "clear", "raises", *own)
    assert (code, out) == (0, "Forgot 1 verdict: the next run tries again.\n")
    assert [entry.plugin for _, entry in quarantine.entries()] == ["good"]


def norm_of(plugin, dtype="float32"):
    """The plugin's kernel as a candidate, and what it is asked."""
    (candidate,) = [c for c in load_registry([plugin]).candidates if not c.provider.bundled]
    return candidate, (replace(NORM, dtype=dtype),)


def test_a_wrong_dtype_is_found_in_16_bits_too(site, tmp_path):
    quarantine = Quarantine(tmp_path)
    assert quarantine.kernel(*norm_of("widens")) is None
    reason = quarantine.kernel(*norm_of("widens", "bfloat16"))
    assert reason
    assert "is torch.float32 for inputs of torch.bfloat16" in reason.detail


def test_a_full_card_is_no_lasting_verdict(site, tmp_path):
    """It rules the kernel out of this run; the next one tries again."""
    quarantine = Quarantine(tmp_path)
    reason = quarantine.kernel(*norm_of("busy"))
    assert reason
    assert "out of memory" in reason.detail
    assert quarantine.kernel(*norm_of("busy"))
    assert list(quarantine.entries()) == []


def test_another_batch_size_is_no_other_kernel(site, tmp_path):
    candidate, (request,) = norm_of("good")
    quarantine = Quarantine(tmp_path)
    for rows in (8, 4096):
        assert quarantine.kernel(candidate, (replace(request, sizes={"N": rows, "E": 32}),)) is None
    assert len(list(quarantine.entries())) == 1


def test_crumbs_that_are_cut_short_or_of_a_like_named_machine_stop_nobody(tmp_path):
    quarantine = Quarantine(tmp_path)
    name = f"running-{platform.node()}"
    empty, other = tmp_path / f"{name}-99999999.json", tmp_path / f"{name}-1-4242.json"
    empty.touch()
    other.write_text("{}")
    assert sweep(quarantine) == []
    assert not empty.exists()
    assert other.exists()


def test_an_abort_in_nobodys_file_accuses_nobody(tmp_path):
    """As of NCCL's watchdog, when another rank is gone."""
    entry = {"plugin": "a", "distribution": "a", "version": "1", "what": "norm=a/b"}
    crumb = tmp_path / f"running-{platform.node()}-99999999.json"
    suspect = {"key": "k", "package": "acme", "entry": {**entry, "evidence": "", "when": ""}}
    for first, count in (("Aborted", 0), ("Segmentation fault", 1)):
        crumb.write_text(json.dumps({"process": "gone", "used": [suspect]}))
        crumb.with_suffix(".faults").write_text(
            f'Fatal Python error: {first}\n\n  File "/x/torch/nn.py", line 3 in forward\n'
        )
        assert len(sweep(Quarantine(tmp_path))) == count
