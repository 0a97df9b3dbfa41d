"""The command line as such: what it costs to ask it something, and what it says to a wrong word."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "tokenizers", "matplotlib", "safetensors")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    """`--help` must answer in under half a second: torch alone takes two."""
    script = (
        "import sys, contextlib, io, json\n"
        f"sys.argv = ['picotron', *{arguments!r}]\n"
        "from picotron_core.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "print(json.dumps([len(out.getvalue()), sorted(sys.modules)]))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    length, modules = json.loads(result.stdout)
    assert length > 10
    assert not set(HEAVY) & set(modules)


def test_a_wrong_command_or_option_is_a_usage_error(picotron):
    code, _, err = picotron("trian")
    assert code == 2
    assert "Did you mean 'train'" in err
    assert picotron("generate")[0] == 2
    code, _, err = picotron("train", "--train.steps")
    assert (code, err) == (2, "error: --train.steps needs a value: --train.steps VALUE.\n")
    code, _, err = picotron("train", "--data", "a.txt", "b.txt")
    assert code == 2
    assert "repeat the flag: --data FILE --data FILE" in err
    assert picotron("train", "-h")[0] == 0
    code, _, err = picotron("train", "a.toml", "b.toml")
    assert (code, err) == (2, "error: Two config files, a.toml and b.toml: give one.\n")


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m picotron_core.cli config | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "setting" in result.stdout
    assert result.stderr == ""


def test_config_shows_what_a_file_sets(picotron, tmp_path):
    (tmp_path / "my.toml").write_text("[train]\nsteps = 7\n")
    code, out, _ = picotron("config", "my.toml", "--train.lr", "0.25")
    assert code == 0
    lines = {line.split()[0]: line.split()[1] for line in out.splitlines() if line.strip()}
    assert (lines["train.steps"], lines["train.lr"], lines["train.clip"]) == ("7", "0.25", "1.0")
    code, out, _ = picotron("config", "--run.dir", "[/x]", "--backends", "norm=auto;naive-math")
    assert code == 0
    assert "'[/x]'" in out
    assert "norm = auto  (command line)" in out
    assert "every op it has = naive-math  (command line)" in out


def answer(picotron, *arguments):
    code, out, err = picotron("backends", "--json", *arguments)
    assert err == ""
    return code, json.loads(out)


def chosen(answer):
    return {row["op"]: row["backend"] for row in answer["backends"] if row["status"] == "selected"}


def test_backends_answers_for_a_card_that_is_not_there(picotron):
    code, t4 = answer(picotron, "--device", "t4")
    assert code == 0
    assert t4["dtype"] == "float16"
    assert chosen(t4)["attention"] == "mem_efficient"
    (sdpa,) = (r for r in t4["backends"] if (r["op"], r["backend"]) == ("attention", "sdpa"))
    assert (sdpa["status"], sdpa["level"]) == ("able", "portable")
    _, h100 = answer(picotron, "--device", "h100")
    assert h100["dtype"] == "bfloat16"
    assert chosen(h100)["attention"] == "sdpa"
    _, cpu = answer(picotron, "--device", "cpu")
    assert chosen(cpu)["comm"] == "local"
    assert set(chosen(cpu)) == {
        *("attention", "norm", "rope", "swiglu", "loss", "optimizer", "comm")
    }


def test_backends_gives_every_reason_with_its_fix(picotron):
    _, cpu = answer(picotron, "--device", "cpu")
    refused = [row for row in cpu["backends"] if row["status"] == "refused"]
    assert "nccl" in {row["backend"] for row in refused}
    for row in refused:
        for reason in row["reasons"]:
            assert reason["code"]
            assert reason["detail"]
            assert reason["fix"], row
    code, out, _ = picotron("backends", "--device", "cpu")
    assert code == 0
    for row in refused:
        assert row["reasons"][0]["detail"] in out


def test_backends_says_when_a_wish_cannot_be_met(picotron):
    code, found = answer(picotron, "--device", "cpu", "--backends", "comm=nccl")
    assert code == 2
    assert "Backend 'nccl', from the command line, cannot run op 'comm'" in found["errors"][0]


def test_an_unknown_profile_is_an_error_with_the_nearest(picotron):
    code, _, err = picotron("backends", "--device", "v10")
    assert code == 2
    assert "Did you mean 'v100'?" in err
