"""Options and fixtures of the whole suite."""

import pytest


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
