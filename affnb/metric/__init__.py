"""Ranking and contrast: losses on similarity matrices."""

from affnb.metric.broadface import (
    BroadFaceHead,
    BroadFaceLosses,
    DriftReport,
    EmbeddingQueue,
    arcface_logits,
    compensate,
    cosface_logits,
    drift_report,
    margin_cross_entropy,
    tar_at_far,
)
from affnb.metric.patch_nce import (
    PatchNCELoss,
    PatchProjector,
    encoder_features,
    lsgan_d,
    lsgan_g,
    patch_nce_loss,
    receptive_field,
    sample_patch_ids,
)
from affnb.metric.smooth_ap import (
    PKSampler,
    SmoothAPLoss,
    average_precision,
    recall_at_k,
    smooth_ap_loss,
    smooth_average_precision,
)

__all__ = [
    "BroadFaceHead",
    "BroadFaceLosses",
    "DriftReport",
    "EmbeddingQueue",
    "PKSampler",
    "PatchNCELoss",
    "PatchProjector",
    "SmoothAPLoss",
    "arcface_logits",
    "average_precision",
    "compensate",
    "cosface_logits",
    "drift_report",
    "encoder_features",
    "lsgan_d",
    "lsgan_g",
    "margin_cross_entropy",
    "patch_nce_loss",
    "recall_at_k",
    "receptive_field",
    "sample_patch_ids",
    "smooth_ap_loss",
    "smooth_average_precision",
    "tar_at_far",
]
