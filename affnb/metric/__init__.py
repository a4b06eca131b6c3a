"""Ranking and contrast: losses on similarity matrices."""

from affnb.metric.smooth_ap import (
    PKSampler,
    SmoothAPLoss,
    average_precision,
    recall_at_k,
    smooth_ap_loss,
    smooth_average_precision,
)

__all__ = [
    "PKSampler",
    "SmoothAPLoss",
    "average_precision",
    "recall_at_k",
    "smooth_ap_loss",
    "smooth_average_precision",
]
