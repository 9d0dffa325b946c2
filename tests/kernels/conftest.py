import pytest


@pytest.fixture(autouse=True)
def tiny_tensors(one_thread):
    """Every test in this folder runs on one thread, but for those that set their own number."""
