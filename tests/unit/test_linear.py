"""Products on packed weights."""

import pytest
import torch
import torch.nn.functional as F

from tidegate.engine.model.linear import projection

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("rows", [0, 1, 64, 70])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_projection_equals_the_plain_product(dtype: torch.dtype, biased: bool, rows: int) -> None:
    """In every dtype that weights may have, whether oneDNN packs it on this CPU or not."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(50, 40, generator=generator).to(dtype)
    bias_O = torch.randn(50, generator=generator).to(dtype) if biased else None
    x_TI = torch.randn(rows, 40, generator=generator).to(dtype)
    expected_TO = F.linear(x_TI.double(), weight_OI.double(), None if bias_O is None else bias_O.double())
    result_TO = projection(weight_OI, bias_O)(x_TI)
    assert result_TO.dtype == dtype
    torch.testing.assert_close(result_TO.double(), expected_TO, rtol=DTYPES[dtype], atol=DTYPES[dtype])
