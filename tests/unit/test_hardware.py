"""Devices: profiles, a real look, and whether the installed torch has kernels for them."""

import platform
from dataclasses import replace

import pytest
import torch

from picotron_core.errors import ConfigError
from picotron_core.hardware import (
    PROFILES,
    Device,
    cpu_features,
    find,
    look,
    profile,
    refuse_cpu_without_torch,
    refuse_without_kernels,
    stand_in,
)


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("gtx980", (5, 2)),
        ("gtx1080", (6, 1)),
        ("p100", (6, 0)),
        ("v100", (7, 0)),
        ("t4", (7, 5)),
        ("rtx2080", (7, 5)),
        ("a100", (8, 0)),
        ("rtx3090", (8, 6)),
        ("rtx4090", (8, 9)),
        ("h100", (9, 0)),
        ("rtx5090", (12, 0)),
        ("cpu", None),
    ],
)
def test_profiles(name, capability):
    device = profile(name)
    assert device.capability == capability
    assert device.simulated
    assert "(simulated)" in str(device)
    assert device.below_ampere == (capability is not None and capability < (8, 0))
    refuse_without_kernels(device)  # without a build, it is one that has kernels for the card


def test_a_profile_with_a_build_has_its_arch_list():
    device = profile("P100@2.13+cu130")
    assert device.torch == "2.13.0+cu130"
    assert device.cuda == "13.0"
    assert "sm_75" in device.arch_list
    assert "sm_60" not in device.arch_list
    newest = profile("p100@cu126")
    assert newest.torch == "2.14.0+cu126"
    assert newest.arch_list[0] == "sm_50"
    with pytest.raises(ConfigError, match=r"No build '2\.13\+cu131' of torch\. Did you mean"):
        profile("p100@2.13+cu131")


def test_an_unknown_profile_or_device_is_an_error():
    with pytest.raises(ConfigError, match=r"No device profile 't44'\. Did you mean 't4'\?"):
        profile("t44")
    with pytest.raises(ConfigError, match=r"No device 'cuda0'\. Did you mean 'cuda'\?"):
        find("cuda0")
    with pytest.raises(ConfigError, match="No device 'tpu'"):
        look("tpu")


def test_a_wish_is_a_real_device_or_a_profile():
    assert find("CPU") == look("cpu")
    assert find("T4") == profile("t4")
    assert stand_in(look("cpu")) is look("cpu")
    assert stand_in(profile("cpu")) == look("cpu")
    assert not stand_in(profile("t4")).simulated


def test_a_real_look_at_the_cpu():
    device = look("cpu")
    assert (device.type, device.capability, device.simulated) == ("cpu", None, False)
    assert device.memory_bytes > 2**28
    assert device.native_bfloat16 == bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    assert device.torch == torch.__version__
    if platform.machine() == "x86_64":
        capability = torch.backends.cpu.get_cpu_capability()
        assert ("avx2" in device.cpu_features) == (capability in ("AVX2", "AVX512"))


def test_a_device_is_plain_data():
    assert Device(type="cpu", name="mine") == Device(type="cpu", name="mine")
    assert len(set(PROFILES.values())) == len(PROFILES)


def test_a_torch_without_kernels_for_the_card_is_one_line_with_the_fix():
    with pytest.raises(ConfigError) as caught:
        refuse_without_kernels(profile("p100@2.13+cu130"))
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "Tesla P100 has compute capability 6.0",
        "torch 2.13.0+cu130 has kernels for sm_75 sm_80",
        "pip install torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126",
        "--device cpu",
    ):
        assert part in message


def test_a_card_that_no_build_serves_is_told_so():
    kepler = replace(profile("p100"), name="Tesla K80", capability=(3, 7))
    with pytest.raises(ConfigError, match=r"No build of torch .*--device cpu"):
        refuse_without_kernels(kepler)


def test_where_torch_does_not_say_nothing_is_refused():
    refuse_without_kernels(replace(profile("p100"), arch_list=()))
    refuse_without_kernels(look("cpu"))


def test_cpu_features_are_read_from_the_first_core(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nflags\t\t: fpu sse4_1 avx avx2 amx_bf16\n\nprocessor\t: 1\nflags\t: fpu\n"
    )
    assert cpu_features(cpuinfo) == ("sse4_1", "avx", "avx2", "amx_bf16")
    assert cpu_features(tmp_path / "missing") == ()


def test_a_cpu_that_torch_would_die_on_is_refused_before_torch_is_imported():
    with pytest.raises(ConfigError, match=r"no SSE 4\.1.*would kill"):
        refuse_cpu_without_torch(("avx",), "x86_64")
    refuse_cpu_without_torch(("sse4_1",), "x86_64")
    refuse_cpu_without_torch((), "x86_64")  # a system that does not tell
    refuse_cpu_without_torch(("asimd",), "aarch64")
