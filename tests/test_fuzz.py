"""Random networks: compact ones must equal masked ones, and costs what they are counted to be."""

import pytest

from tests.fuzz import run_seed
from tests.fuzz_auto import check_auto

BLOCKS, SIZE = 30, 10


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_networks(block):
  for seed in range(block * SIZE, (block + 1) * SIZE):
    run_seed(seed)


@pytest.mark.parametrize("block", range(5))
def test_random_networks_without_masks(block):
  for seed in range(2000 + 3 * block, 2003 + 3 * block):
    run_seed(seed, check_auto)
