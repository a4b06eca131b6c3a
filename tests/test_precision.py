"""Half precision is computed in float32, double precision in itself."""

import pytest
import torch

from affnb.precision import wide_dtype

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((HALF,), SINGLE),
        ((BRAIN,), SINGLE),
        ((SINGLE,), SINGLE),
        ((DOUBLE,), DOUBLE),
        ((HALF, BRAIN), SINGLE),
        ((HALF, DOUBLE), DOUBLE),
        ((DOUBLE, SINGLE, BRAIN), DOUBLE),
    ],
)
def test_wide_dtype(given, expected):
    assert wide_dtype(*(torch.zeros(2, dtype=dtype) for dtype in given)) == expected


def test_what_is_wide_is_not_copied():
    for dtype in (SINGLE, DOUBLE):
        x = torch.zeros(3, dtype=dtype)
        assert x.to(wide_dtype(x)) is x


def test_traced_whole():
    widened = torch.compile(lambda x: x.to(wide_dtype(x)) * 2, backend="eager", fullgraph=True)
    assert widened(torch.ones(3, dtype=BRAIN)).dtype == SINGLE
    assert widened(torch.ones(3, dtype=DOUBLE)).dtype == DOUBLE
