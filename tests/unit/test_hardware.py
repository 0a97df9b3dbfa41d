"""Devices and the dtype that follows from each; the table is the policy of the design."""

import pytest
import torch

from picotron_core.errors import ConfigError
from picotron_core.hardware import PROFILES, Device, look, profile
from picotron_core.precision import choose_precision


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [
        ("gtx1080", (6, 1), "float32"),
        ("p100", (6, 0), "float32"),
        ("v100", (7, 0), "float32"),
        ("t4", (7, 5), "float32"),
        ("a100", (8, 0), "bfloat16"),
        ("h100", (9, 0), "bfloat16"),
        ("cpu", None, "float32"),
    ],
)
def test_profiles_and_their_dtype(name, capability, dtype):
    device = profile(name)
    assert device.capability == capability
    assert device.simulated
    assert "(simulated)" in str(device)
    assert device.below_ampere == (capability is not None and capability < (8, 0))
    assert choose_precision("auto", device).compute == dtype
    assert choose_precision("float32", device).compute == "float32"
    if dtype == "float32":
        with pytest.raises(ConfigError, match=r"would only emulate it.*--train\.dtype float32"):
            choose_precision("bfloat16", device)


def test_an_unknown_profile_or_device_is_an_error():
    with pytest.raises(ConfigError, match=r"No device profile 't44'\. Did you mean 't4'\?"):
        profile("t44")
    with pytest.raises(ConfigError, match="No device 'tpu'"):
        look("tpu")


def test_a_real_look_at_the_cpu():
    device = look("cpu")
    assert (device.type, device.capability, device.simulated) == ("cpu", None, False)
    assert device.memory_bytes > 2**28
    assert device.native_bfloat16 == bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def test_a_device_is_plain_data():
    assert Device(type="cpu", name="mine") == Device(type="cpu", name="mine")
    assert len(set(PROFILES.values())) == len(PROFILES)
