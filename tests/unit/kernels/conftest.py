"""The kernels' library: the host build everywhere, the CUDA build where a GPU is."""

from __future__ import annotations

import pytest
import torch

from xdlm_megatron.kernels.build import find_cxx
from xdlm_megatron.kernels.library import Library, load_cuda, load_host


@pytest.fixture(scope="session", params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def library(request: pytest.FixtureRequest) -> Library:
    """The same sources by g++, on CPU tensors, and by nvcc, on the GPU's."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return load_cuda(*torch.cuda.get_device_capability())
    if find_cxx() is None:
        pytest.skip("needs g++")
    return load_host()
