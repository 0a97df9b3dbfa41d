"""What one rank has against a plugin's kernel counts on all: they must run the same."""

import json

# Right, but on the second machine: there it gives NaN.
SOURCE = """
import os
import torch
from picotron_core.registry import Backend, Level, hookimpl


def rms_norm(x, weight, *, eps):
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = normed.to(x.dtype) * weight
    return y * torch.nan if os.environ["RANK"] == "1" else y


@hookimpl
def picotron_backends():
    yield Backend(
        op="norm",
        name="fast",
        level=Level.SPECIALIZED,
        load=lambda: rms_norm,
        supports=lambda request: (),
    )
"""


def test_a_kernel_that_fails_on_one_rank_runs_on_none(tiny, tmp_path, run_ranks):
    site = tmp_path / "site"
    info = site / "acme_kernels-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme_here.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-kernels\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[picotron]\nacme = acme_here\n")
    # A cache each, as on two machines; or the first rank's verdict would serve both.
    env = [
        {
            "PYTHONPATH": str(site),
            "PICOTRON_PLUGINS": "acme",
            "PICOTRON_CACHE_DIR": str(tmp_path / f"cache-{rank}"),
        }
        for rank in range(2)
    ]
    place = tiny.index("--data.cache_dir")
    kept = [*tiny[:place], *tiny[place + 2 :]]
    run = ["--run.dir", str(tmp_path), "--name", "two", "--train.steps", "2"]
    results = run_ranks(["-m", "picotron_core.cli", "train", *kept, *run], world_size=2, env=env)
    assert [result.returncode for result in results] == [0, 0], results
    assert "norm: acme/fast is not used: on rank 1: quarantined" in results[0].stdout
    selected = {s["op"]: s for s in json.loads((tmp_path / "two" / "backends.json").read_text())}
    assert selected["norm"]["backend"].startswith("picotron/")
    assert "on rank 1" in selected["norm"]["refused"]["acme/fast"][0]["detail"]
