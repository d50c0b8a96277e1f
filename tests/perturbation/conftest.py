"""One thread: with models this small, threads wait for one another longer than they compute."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
