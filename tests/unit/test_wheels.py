"""Which build of torch has kernels for which card: CUDA's rules of binary compatibility."""

import warnings

import pytest
import torch

from picotron_core.wheels import BUILDS, builds, has_kernels, pip_line


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("sm_60", (6, 0), True),
        ("sm_60", (6, 1), True),  # a later minor version of the same major one
        ("sm_61", (6, 0), False),
        ("sm_50 sm_60", (7, 0), False),
        ("sm_70", (7, 5), True),
        ("sm_75", (7, 0), False),
        ("sm_80", (8, 9), True),
        ("sm_80", (9, 0), False),
        ("sm_90", (12, 0), False),
        ("compute_90", (12, 0), True),  # PTX, by the driver
        ("compute_90", (8, 0), False),
        ("sm_120", (12, 1), True),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),  # code for one chip
        ("sm_100f", (10, 3), True),  # code for a family
        ("compute_90a", (12, 0), False),
        ("sm_60", (6, 2), False),  # a Jetson runs no code of cards, nor the reverse
        ("sm_62", (6, 2), True),
        ("sm_53", (5, 2), False),
        ("sm_80", (8, 7), False),
        ("gfx90a", (9, 0), False),
        ("", (9, 0), False),
    ],
)
def test_who_runs_what(archs, capability, expected):
    assert has_kernels(archs.split(), capability) is expected


def test_torch_has_the_same_rules_for_machine_code():
    rules = getattr(torch.cuda, "DEVICE_REQUIREMENT", None)
    if rules is None:
        pytest.skip("this torch keeps no table of its own")
    capabilities = [*rules, 89, 103]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for code in rules:
            for device in capabilities:
                if {code, device} & {101, 110}:
                    continue  # torch counts two names of one chip as the same
                mine = has_kernels([f"sm_{code}"], divmod(device, 10))
                assert mine == (device in rules[code]), (code, device)


@pytest.mark.parametrize(
    ("capability", "installed", "line"),
    [
        ((6, 1), "2.13.0+cu130", "torch==2.13.0+cu126 --index-url {}/cu126"),
        ((7, 0), "2.11.0+cu128", "torch==2.11.0+cu126 --index-url {}/cu126"),
        ((5, 2), "2.7.1+cu128", "torch==2.7.1+cu118 --index-url {}/cu118"),
        ((12, 0), "2.6.0+cu124", "'torch==2.14.*' --index-url {}/cu130"),  # 2.6 has none
        ((12, 0), "2.8.0+cu126", "torch==2.8.0+cu128 --index-url {}/cu128"),
        ((6, 0), "2.15.0+cu132", "'torch==2.14.*' --index-url {}/cu126"),  # the last that has
    ],
)
def test_the_pip_line(capability, installed, line):
    expected = "pip install " + line.format("https://download.pytorch.org/whl")
    assert pip_line(capability, installed, "x86_64") == expected


def test_no_line_is_better_than_a_wrong_one():
    assert pip_line((3, 7), "2.13.0+cu130", "x86_64") == ""
    assert pip_line((6, 0), "2.13.0+cu130", "aarch64") == ""  # other builds, not known here


def test_old_cards_keep_one_build_of_every_release():
    for release in BUILDS:
        for capability in ((5, 2), (6, 0), (6, 1), (7, 0)):
            assert any(
                has_kernels(b.arch_list, capability) for b in builds() if b.torch == release
            ), (release, capability)


@pytest.mark.parametrize("installed", ["2.7.0a0+6c54e2b", "2.7.0.dev20260601+cu128"])
def test_a_number_that_is_on_no_index_is_not_asked_for(installed):
    line = pip_line((6, 1), installed, machine="x86_64")
    assert line.startswith("pip install 'torch==2.7.*' --force-reinstall --index-url")
