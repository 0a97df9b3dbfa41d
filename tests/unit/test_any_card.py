"""Every card x build of torch x dtype x op: a backend, or one line that says how to mend it."""

import re
from dataclasses import replace

import pytest
from picotron_backends.sdpa.flash_rules import flash_serves

from picotron_core.errors import ConfigError
from picotron_core.hardware import PROFILES, profile, refuse_without_kernels
from picotron_core.model.architecture import Architecture
from picotron_core.model.requests import requests
from picotron_core.ops import OPS
from picotron_core.precision import choose_precision
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.select import resolve
from picotron_core.wheels import builds

# By compute capability: one card each, and the CPU.
CARDS = {PROFILES[name].capability: name for name in reversed(PROFILES)}
BUILDS = [f"{build.torch}+{build.cuda}" for build in builds()]
DTYPES = ("auto", "float32", "float16", "bfloat16")
CANDIDATES = load_registry().candidates
MENDS = re.compile(r"pip install|--device cpu|--train\.dtype \w+")

ARCHITECTURES = {
    "gqa": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 80},
    "odd": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 42},
}


def architecture(kind):
    fields = ARCHITECTURES[kind]
    width = fields["num_attention_heads"] * fields["head_dim"]
    return Architecture(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        vocab_size=1000,
        tie_word_embeddings=True,
        initializer_range=0.02,
        **fields,
    )


def settled(card, wanted, kind, document_mask):
    """The precision and the selections, as a run would have them; or ConfigError."""
    device = profile(card)
    refuse_without_kernels(device)
    precision = choose_precision(wanted, [device])
    asked = requests(
        architecture(kind),
        device=device,
        dtype=precision.compute,
        seq_len=128,
        micro_batch=2,
        document_mask=document_mask,
        training=True,
        world_size=1,
    )
    return device, precision, resolve((), asked, CANDIDATES)


def test_the_cards_are_those_of_the_promise():
    wanted = {(5, 2), (6, 0), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0), None}
    assert wanted <= CARDS.keys()
    assert {build.split("+")[0] for build in BUILDS} == {f"2.{minor}" for minor in range(6, 15)}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("card", CARDS.values())
def test_it_runs_or_says_how_to(card, build):
    name = card if card == "cpu" else f"{card}@{build}"
    for wanted in DTYPES:
        for kind in ARCHITECTURES:
            for document_mask in (False, True):
                try:
                    device, precision, selections = settled(name, wanted, kind, document_mask)
                except ConfigError as refusal:
                    assert_mends(str(refusal))
                    continue
                assert selections.keys() == set(OPS)
                assert_sound(device, precision, selections["attention"], document_mask)


def assert_mends(refusal):
    assert "\n" not in refusal
    assert MENDS.search(refusal), refusal


def assert_sound(device, precision, attention, document_mask):
    capability = device.capability
    if precision.compute == "bfloat16":
        assert device.native_bfloat16
        assert capability is None or capability >= (8, 0)
    if precision.compute == "float16":
        assert capability not in ((6, 1), (5, 2))
    sizes = attention.requests[0].sizes
    flash = flash_serves(
        device_type=device.type,
        capability=capability,
        dtype=precision.compute,
        D=sizes["D"],
        masked=document_mask,
    )
    if capability is not None and capability < (8, 0):
        assert not flash
    # What may make the whole (T, S) matrix is never taken by itself, grouped heads least of all.
    lean = attention.chosen.backend.memory == "linear"
    assert lean or (attention.chosen.backend.name == "sdpa" and flash)


def test_old_cards_run_with_the_build_that_is_advised():
    """The pip line of a refusal names a build on which the same card is not refused."""
    for name in ("gtx980", "gtx1080", "p100", "v100"):
        with pytest.raises(ConfigError) as refusal:
            refuse_without_kernels(profile(f"{name}@2.13+cu130"))
        advised = re.search(r"torch==(\d+\.\d+)\.\d+\+(cu\d+)", str(refusal.value))
        refuse_without_kernels(profile(f"{name}@{advised[1]}+{advised[2]}"))


def test_a_mismatch_is_found_before_anything_is_loaded(picotron, tmp_path):
    code, _, err = picotron("train", "--device", "p100@2.13+cu130", "--data", "nowhere.txt")
    assert code == 2
    assert "Tesla P100 has compute capability 6.0" in err
    assert "nowhere" not in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_torchs_own_word_on_bfloat16_is_not_taken(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    t4 = replace(profile("t4"), simulated=False)
    assert choose_precision("auto", [t4]).compute == "float16"
