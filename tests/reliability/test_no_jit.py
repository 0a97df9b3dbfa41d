"""Nothing in a default run compiles: no Triton, no Inductor, no NVRTC, no C++ compiler."""

import json
import subprocess
import sys

# Runs the command line under an audit hook, which no code can remove, and tells what it saw.
WATCHED = """
import json, sys

seen = {"processes": [], "imports": [], "libraries": []}

def hook(event, arguments):
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.spawn", "os.system"):
        seen["processes"].append(str(arguments[0]))
    elif event == "import":
        seen["imports"].append(arguments[0])
    elif event == "ctypes.dlopen":
        seen["libraries"].append(str(arguments[0]))

told = sys.argv.pop()  # no argument of the command
sys.addaudithook(hook)
from picotron_core.cli import main
try:
    main()
finally:
    with open(told, "w") as file:
        json.dump(seen, file)
"""
COMPILERS = ("triton", "torch._inductor", "torch.utils.cpp_extension", "numba", "cupy", "pycuda")


def test_a_default_run_compiles_nothing(tiny, tmp_path):
    told = tmp_path / "seen.json"
    command = [sys.executable, "-c", WATCHED, "train", *tiny, "--run.dir", str(tmp_path)]
    command += ["--train.steps", "2", "--name", "watched"]
    result = subprocess.run([*command, str(told)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    seen = json.loads(told.read_text())
    assert "torch" in seen["imports"]
    compiling = [
        name
        for name in seen["imports"]
        for tool in COMPILERS
        if (name + ".").startswith(tool + ".")
    ]
    assert not compiling
    assert set(seen["processes"]) <= {"uname"}  # the standard library's platform.processor()
    assert not [library for library in seen["libraries"] if "nvrtc" in library]
