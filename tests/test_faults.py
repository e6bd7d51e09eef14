"""Runs go on after kills, stops, power cuts and damage; `make faults` tries many more."""

import sys

import pytest
from faults import Faults

pytestmark = [
    pytest.mark.xdist_group("faults"),  # one worker makes what its tests share
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc"),
]


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return Faults(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("seed", range(20))
def test_a_run_survives(faults, seed):
    faults.check(seed)
