"""On CUDA, the same numbers as on the CPU; run with ``pytest -m gpu``."""

import gpytorch
import pytest
import torch
from linear_operator import to_dense

import gpntk
from tests.architectures import ARCHITECTURES
from tests.cases import CASES, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", [*CASES, *ARCHITECTURES], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernels_agree_with_the_cpu(case: Case, dtype: torch.dtype) -> None:
    x, tolerance = case.x(5), 1e-10 if dtype == torch.float64 else 1e-4
    expected = to_dense(gpntk.NTKKernel(case.module(), input_shape=case.input_shape)(x))
    kernel = gpntk.NTKKernel(case.module(), input_shape=case.input_shape).to("cuda", dtype)
    on_device = x.to("cuda", dtype)
    gram = to_dense(kernel(on_device))
    assert gram.device.type == "cuda"
    scale = expected.abs().max()
    assert (gram.cpu().double() - expected).abs().max() < tolerance * scale
    product = kernel(on_device) @ torch.eye(len(expected), device="cuda", dtype=dtype)
    assert (product.cpu().double() - expected).abs().max() < tolerance * scale


def test_inputs_on_the_wrong_device_are_refused() -> None:
    with pytest.raises(gpntk.errors.InputError, match="x1 is on cuda:0 but the network's frozen weights are on cpu"):
        gpntk.NTKKernel(CASES[0].module())(CASES[0].x(3).cuda()).to_dense()


def test_exact_gp_and_estimator() -> None:
    module, x = CASES[0].module(), CASES[0].x(30)
    y = x[:, 0].sin()
    on_cpu = gpntk.TransferRegressor(module).fit(x.numpy(), y.numpy())
    on_gpu = gpntk.TransferRegressor(module.cuda()).fit(x.numpy(), y.numpy())
    for one, two in zip(on_cpu.predict(x.numpy(), True), on_gpu.predict(x.numpy(), True), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two), rtol=1e-6, atol=1e-8)
    with gpytorch.settings.max_cholesky_size(5):
        assert torch.isfinite(torch.as_tensor(on_gpu.predict(x.numpy()))).all()
