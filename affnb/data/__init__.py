"""Data of the book: bundled real data, procedural data with known truth, and real data sets.

Nothing here is downloaded unless a function's name and documentation say so.
"""

from .bundled import Digits, digits
from .datasets import cifar
from .procedural import RelationScenes, relation_scenes
from .regions import SpeckledRegions, speckled_regions
from .scene_graphs import SceneGraphs, scene_graphs
from .segmentation import ShapeScenes, shape_scenes
from .visual_genome import RelationImage, VisualGenomeRelations

__all__ = [
    "Digits",
    "RelationImage",
    "RelationScenes",
    "SceneGraphs",
    "ShapeScenes",
    "SpeckledRegions",
    "VisualGenomeRelations",
    "cifar",
    "digits",
    "relation_scenes",
    "scene_graphs",
    "shape_scenes",
    "speckled_regions",
]
