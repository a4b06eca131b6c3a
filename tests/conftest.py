"""Options and fixtures of the whole suite."""

import os

import pytest
import torch

# Without a GPU the kernels run under Triton's interpreter, which must be chosen before they are made.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="auto", help="where the chapters run: auto (default), cpu, cuda"
    )
    parser.addoption(
        "--profile", default="ci", choices=["ci", "full"], help="how much the chapters run"
    )


@pytest.fixture(scope="session")
def device(request):
    """Return the device asked for on the command line."""
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def profile(request):
    """Return the profile asked for on the command line."""
    return request.config.getoption("--profile")


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """Send operations to their kernels: on the GPU if there is one, else under the interpreter."""
    from affnb import kernels

    if not kernels.triton_available():
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(kernels, "wanted", lambda x: x.dtype != torch.float64)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
