"""Quantization, search and dynamical networks."""

from affnb.efficient.bp_nas import (
    MixedPrecisionConv2d,
    argmax_feasible_bound,
    average_bits,
    barrier_penalty,
    expected_average_bits,
    feasible_choice,
    feasible_init,
    prob1,
    reshape_clip,
    uniform_quantize,
)

__all__ = [
    "MixedPrecisionConv2d",
    "argmax_feasible_bound",
    "average_bits",
    "barrier_penalty",
    "expected_average_bits",
    "feasible_choice",
    "feasible_init",
    "prob1",
    "reshape_clip",
    "uniform_quantize",
]
