"""Data of the book: bundled real data, procedural data with known truth, and real data sets.

Nothing here is downloaded unless a function's name and documentation say so.
"""

from .bundled import Digits, digits
from .datasets import cifar
from .procedural import RelationScenes, relation_scenes
from .segmentation import ShapeScenes, shape_scenes

__all__ = [
    "Digits",
    "RelationScenes",
    "ShapeScenes",
    "cifar",
    "digits",
    "relation_scenes",
    "shape_scenes",
]
