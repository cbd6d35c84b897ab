"""Random networks: compact ones must equal masked ones, and costs what they are counted to be."""

import pytest

from tests.fuzz import run_seed

BLOCKS, SIZE = 30, 10


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_networks(block):
  for seed in range(block * SIZE, (block + 1) * SIZE):
    run_seed(seed)
