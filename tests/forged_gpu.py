"""A pytest plugin that runs tests/test_gpu.py on a CPU: a graph calls its step again, and nothing is compiled.

    PYTHONPATH=.:tests python -m pytest -p forged_gpu tests/test_gpu.py

It shows that those tests can pass at all. What they say of a GPU, only a GPU shows. tests/test_gpu_suite.py uses it.
"""
import pytest
import torch

import decoder
import test_gpu

record = decoder.Decoder._record


class Graph:
    def __init__(self, step):
        self.replay = step


def forged(self, kind, n_slot, tracing):
    record(self, kind, n_slot, tracing)
    return Graph(lambda: self._call(kind, n_slot)) if self.compile else None


def pytest_configure():
    test_gpu.DEVICE, test_gpu.pytestmark = torch.device("cpu"), []
    decoder.Decoder._record, decoder.compile_layers = forged, lambda layers: None
    torch.cuda.set_sync_debug_mode = lambda mode: None


def pytest_collection_modifyitems(items):
    for item in items:
        if "registers" in item.name:
            item.add_marker(pytest.mark.skip(reason="asks the compiler of GPU kernels"))
