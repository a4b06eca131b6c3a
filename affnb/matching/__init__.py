"""Matching and cost volumes."""

from affnb.matching.learnable_cost_volume import (
    CayleySPD,
    CayleySPDParametrization,
    atan_positive,
    cayley,
    cost_volume,
    inverse_atan_positive,
    inverse_cayley,
    matching_score,
    signature_fix,
    soft_argmax_flow,
)

__all__ = [
    "CayleySPD",
    "CayleySPDParametrization",
    "atan_positive",
    "cayley",
    "cost_volume",
    "inverse_atan_positive",
    "inverse_cayley",
    "matching_score",
    "signature_fix",
    "soft_argmax_flow",
]
