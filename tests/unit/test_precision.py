"""The precision policy: which dtypes follow from which devices."""

import pytest

from picotron_core.errors import ConfigError
from picotron_core.hardware import Device, profile
from picotron_core.precision import choose_precision

NATIVE = Device(type="cpu", name="CPU with AMX", native_bfloat16=True)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gtx980", "float32"),
        ("gtx1080", "float32"),
        ("p100", "float16"),
        ("v100", "float16"),
        ("t4", "float16"),
        ("rtx2080", "float16"),
        ("a100", "bfloat16"),
        ("rtx3090", "bfloat16"),
        ("h100", "bfloat16"),
        ("rtx5090", "bfloat16"),
        ("cpu", "float32"),
    ],
)
def test_what_auto_takes(name, dtype):
    precision = choose_precision("auto", [profile(name)])
    assert precision.compute == dtype
    assert precision.scales_loss == (dtype == "float16")
    assert precision.master == precision.gradient == precision.reduce == "float32"
    assert profile(name).name in precision.reason
    assert choose_precision("float32", [profile(name)]).compute == "float32"


def test_a_cpu_with_instructions_for_it_takes_bfloat16():
    assert choose_precision("auto", [NATIVE]).compute == "bfloat16"


@pytest.mark.parametrize("name", ["gtx980", "gtx1080", "p100", "v100", "t4", "cpu"])
def test_emulated_bfloat16_is_refused_with_what_to_use(name):
    best = choose_precision("auto", [profile(name)]).compute
    message = rf"would only emulate it.*Use --train\.dtype {best}\."
    with pytest.raises(ConfigError, match=message):
        choose_precision("bfloat16", [profile(name)])


@pytest.mark.parametrize("name", ["gtx980", "gtx1080"])
def test_crippled_float16_is_refused(name):
    with pytest.raises(ConfigError, match=r"many times slower.*--train\.dtype float32"):
        choose_precision("float16", [profile(name)])


@pytest.mark.parametrize(
    ("names", "dtype", "part"),
    [
        (("a100", "h100"), "bfloat16", "A100 sm_80 (simulated) and H100"),
        (("a100", "t4"), "float16", "Tesla T4"),
        (("t4", "a100", "v100"), "float16", "Tesla T4"),
        (("a100", "gtx1080"), "float32", "GTX 1080"),
        (("p100", "gtx1080", "h100"), "float32", "GTX 1080"),
    ],
)
def test_mixed_cards_share_one_dtype(names, dtype, part):
    devices = [profile(name) for name in names]
    for order in (devices, devices[::-1]):
        assert choose_precision("auto", order).compute == dtype
    assert part in choose_precision("auto", devices).reason


def test_cards_without_a_common_16_bit_dtype():
    precision = choose_precision("auto", [NATIVE, profile("t4")])
    assert precision.compute == "float32"
    assert "share no 16-bit dtype" in precision.reason


def test_one_rank_that_lacks_it_refuses_for_all():
    with pytest.raises(ConfigError, match=r"Tesla T4.*Use --train\.dtype float16"):
        choose_precision("bfloat16", [profile("a100"), profile("t4")])


def test_what_gradients_travel_in_can_be_overridden():
    precision = choose_precision("auto", [profile("a100")], reduce="bfloat16")
    assert precision.reduce == "bfloat16"
    assert "travel in bfloat16" in str(precision)
    scaled = choose_precision("auto", [profile("t4")], reduce="float16")
    assert scaled.reduce == "float16"
    with pytest.raises(ConfigError, match=r"reduce_dtype.*bfloat16"):
        choose_precision("auto", [profile("a100")], reduce="float16")
