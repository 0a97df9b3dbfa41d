"""A rank begins with its part of what one process would have drawn, and never holds the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from picotron_conformance.launched import peak_bytes
from safetensors.torch import save_file

from picotron_core.model.architecture import Architecture
from picotron_core.model.init import drawn, initialise
from picotron_core.model.llama import Llama
from picotron_core.model.pretrained import stored_weights
from picotron_core.ops import Ops
from picotron_core.parallel.mesh import make_mesh
from picotron_core.parallel.parallelize import parallelize
from picotron_core.schema import Parallel

CPU = torch.device("cpu")


class Groups:
    """As much of a `comm` as a mesh asks for."""

    def new_group(self, ranks):
        return tuple(ranks)


def no_ops():
    return Ops(**dict.fromkeys(Ops.__slots__))


def architecture(**changed):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return Architecture(**{**sizes, **heads, **changed})


def on_meta(of):
    with torch.device("meta"):
        return Llama(of, no_ops())


def part(name, whole, tp):
    """Rows, or columns where a block ends; what is missing at the vocabulary's end is zero."""
    if whole.ndim == 1:
        return whole
    dim = 1 if name.split(".")[-2] in ("o_proj", "down_proj") else 0
    size = -(-whole.shape[dim] // tp.size)
    missing = list(whole.shape)
    missing[dim] = size * tp.size - whole.shape[dim]
    padded = torch.cat((whole, whole.new_zeros(missing)), dim)
    return padded.narrow(dim, size * tp.index, size)


def begin(model, settings, *, rank, ranks, values, dtype=torch.float32):
    mesh = make_mesh(Groups(), rank=rank, world_size=ranks, pp=settings.pp, tp=settings.tp)
    return parallelize(model, settings, mesh, device=CPU, dtype=dtype, values=values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_every_rank_begins_with_its_part_of_one_processes_values(zero, tied, dtype):
    of = architecture(tie_word_embeddings=tied)
    whole = Llama(of, no_ops())
    initialise(whole, seed=5)
    settings = Parallel(zero=zero, tp=2, pp=2, bucket_mb=0.004)
    for rank in range(8):
        model = on_meta(of)
        values = drawn(model, 5)
        weights, layout = begin(model, settings, rank=rank, ranks=8, values=values, dtype=dtype)
        if tied and hasattr(model, "lm_head"):
            assert model.lm_head.weight is model.model.embed_tokens.weight
        for name, parameter in model.named_parameters():
            right = part(name, whole.get_parameter(name), layout.mesh.tp)
            assert torch.equal(parameter, right.to(dtype)), (rank, name)
            assert weights.parameters[name] is parameter
        for name, master in weights.masters.items():
            start, stop = weights.span(name)
            right = part(name, whole.get_parameter(name), layout.mesh.tp).flatten()[start:stop]
            assert master.dtype == torch.float32
            assert torch.equal(master.flatten(), right), (rank, name)


@pytest.mark.parametrize("stored_as", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folders_weights_are_read_into_the_parts(tmp_path, tied, stored_as):
    of = architecture(tie_word_embeddings=tied)
    whole = Llama(of, no_ops())
    initialise(whole, seed=6)
    stored = {name: p.detach().to(stored_as) for name, p in whole.named_parameters()}
    if tied:  # as many files have it
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(of.to_transformers()))
    settings = Parallel(tp=2, pp=2, zero=1)
    for rank in range(8):
        model = on_meta(of)
        values = stored_weights(model, tmp_path)
        _, layout = begin(model, settings, rank=rank, ranks=8, values=values)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, part(name, stored[name].float(), layout.mesh.tp)), name


def test_a_rank_never_holds_the_whole_model():
    of = architecture(hidden_size=256, intermediate_size=704, head_dim=64, vocab_size=2048)
    largest = 4 * of.vocab_size * of.hidden_size
    for parallel, share in (({"zero": 1}, 1), ({"tp": 4, "zero": 1}, 4), ({"pp": 4}, 4)):
        settings = Parallel.model_validate({"bucket_mb": 0.5, **parallel})
        kept = []

        def start(settings=settings, kept=kept):
            model = on_meta(of)
            weights, _ = begin(
                model, settings, rank=0, ranks=8, values=drawn(model, 5), dtype=torch.bfloat16
            )
            kept.append(sum(p.nbytes for p in model.parameters()))
            kept.append(sum(m.nbytes for m in weights.masters.values()))

        peak = peak_bytes(start, CPU)
        assert kept[0] < 2 * of.num_parameters / share + largest
        sharers = 8 // share if "zero" in parallel else 1
        assert kept[1] < 4 * of.num_parameters / share / sharers + 0.6 * largest
        # One parameter as it is drawn, and twice more as it is cut, or laid out.
        assert peak < sum(kept) + 3 * largest + 2**20, parallel
    assert 4 * of.num_parameters > 5 * largest  # or it would show nothing


def test_to_build_on_meta_does_not_load_torchs_compiler():
    """Which takes three seconds, of every rank's start."""
    here = str(Path(__file__).parent)
    script = (
        f"import sys; sys.path.insert(0, {here!r})\n"
        "from test_first_values import architecture, begin, drawn, on_meta, Parallel\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "model = on_meta(architecture())\n"
        "begin(model, Parallel(tp=2), rank=1, ranks=2, values=drawn(model, 0))\n"
        "print(before, 'torch._dynamo' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.stdout == "False False\n", result.stderr
