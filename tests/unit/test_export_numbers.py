"""What an export writes is what was trained: no number becomes another without a word."""

import pytest
import torch
from safetensors import SafetensorError
from small_state import save_at

from picotron_core.checkpoint.pieces import numbers_of
from picotron_core.cli import export
from picotron_core.cli.export import _in, run_export
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import RunError
from picotron_core.parallel.piece import whole


def test_a_number_that_float16_has_not_is_refused():
    tensor = torch.tensor([1.0, -70000.0])
    with pytest.raises(RunError, match=r"model.norm has numbers up to 70000, above torch.float16"):
        _in(torch.float16, "model.norm", tensor)
    assert _in(torch.bfloat16, "model.norm", tensor).tolist() == [1.0, -70144.0]


def test_a_disk_that_is_full_is_one_line(tmp_path, monkeypatch):
    """safetensors says it by an error of its own."""

    def full(*given):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    save_at(1, tmp_path)
    monkeypatch.setattr(export, "open_run", lambda path: (RunDirectory(path), None))
    monkeypatch.setattr(export, "_write", full)
    with pytest.raises(RunError, match=r"Cannot write .*No space left"):
        run_export(tmp_path, tmp_path / "out", dtype="float32", shard_mb=1)
    assert not list(tmp_path.glob("*out*"))


def test_a_rank_saves_its_numbers_and_no_copy_of_them():
    """A tensor that is not contiguous would be copied, and loading would fill the copy."""
    with pytest.raises(RuntimeError, match="view"):
        numbers_of(torch.zeros(3, 4).t(), whole(12), whole(12))
