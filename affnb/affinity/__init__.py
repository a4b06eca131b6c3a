"""Supervising affinity: losses on matrices of pairwise weights."""

from affnb.affinity.affinity_mass import (
    BatchAffinityLoss,
    affinity_mass,
    affinity_mass_loss,
    batch_affinity_loss,
    log_affinity_mass,
    pair_recall_at_k,
    pairwise_sq_dist,
    relation_target,
    same_class_target,
)

__all__ = [
    "BatchAffinityLoss",
    "affinity_mass",
    "affinity_mass_loss",
    "batch_affinity_loss",
    "log_affinity_mass",
    "pair_recall_at_k",
    "pairwise_sq_dist",
    "relation_target",
    "same_class_target",
]
