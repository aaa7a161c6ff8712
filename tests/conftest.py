from collections.abc import Iterator

import linear_operator.settings
import pytest
import torch

# Two workers on two cores, and small problems: more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _host_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    # Importing botorch switches the hosts' fast computations off for the whole process; tests state what they need.
    for flag in ("covar_root_decomposition", "log_prob", "solves"):
        monkeypatch.setattr(getattr(linear_operator.settings.fast_computations, flag), "_default", True)
    monkeypatch.setattr(linear_operator.settings.max_cholesky_size, "_global_value", 800)
