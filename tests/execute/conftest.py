"""Eight fake CPU devices for the tests of the executor, and the marker of tests that start mpiexec."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # at collection, before any test has used a device


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "mpi: starts mpiexec with several ranks")
