"""Visual Genome's relations in the split that scene graph papers use (VG-150), for ``profile="full"``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_one_of

__all__ = ["RelationImage", "VisualGenomeRelations"]

# Files that cannot be decoded; the annotations' rows do not count them.
_CORRUPTED = {1592, 1722, 4616, 4617}
# The longer side of the image to which the annotated boxes are scaled.
_SCALE = 1024
# How many images at the head of the training split are for validation.
_VALIDATION = 5000


class RelationImage(NamedTuple):
    """An image with its annotated entities and relations.

    Attributes
    ----------
    image
        (3, H, W) float32 in [0, 1].
    boxes
        (n, 4) float32: x1, y1, x2, y2 in pixels of the image.
    classes
        (n,) int64 from 0.
    relations
        (r, 3) int64: index of the subject, index of the object, predicate (from 1).
    """

    image: Tensor
    boxes: Tensor
    classes: Tensor
    relations: Tensor


class VisualGenomeRelations(torch.utils.data.Dataset[RelationImage]):
    """Images with relations, of 150 classes and 50 predicates (Krishna et al., 2017; Xu et al., 2017).

    Nothing is downloaded. ``root`` holds the images in ``VG_100K`` (both parts of the download
    together), and ``VG-SGG.h5`` and ``image_data.json`` as published with the split.

    Parameters
    ----------
    root
        The folder.
    split
        ``"train"``, ``"val"`` (the first 5,000 images of the training split) or ``"test"``. Images
        without relations are left out.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ImportError
        h5py or Pillow is not installed: ``pip install 'affnb[data]'``.
    ValueError
        Another split, or annotations and image list of different length.
    """

    num_classes = 150
    num_predicates = 50

    def __init__(self, root: str | Path, split: str = "train") -> None:
        check_one_of(split, "split", ("train", "val", "test"))
        try:
            import h5py
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "VisualGenomeRelations: expected h5py and Pillow, at least one is missing; "
                "install them with pip install 'affnb[data]'"
            ) from error
        self.folder = Path(root) / "VG_100K"
        for needed in (self.folder, self.folder.parent / "VG-SGG.h5"):
            if not needed.exists():
                raise FileNotFoundError(f"root: expected {needed}")
        with open(self.folder.parent / "image_data.json") as file:
            ids = [entry["image_id"] for entry in json.load(file)]
        ids = [i for i in ids if i not in _CORRUPTED]
        with h5py.File(self.folder.parent / "VG-SGG.h5") as file:

            def read(name: str) -> Tensor:
                return torch.from_numpy(file[name][:].astype("int64"))

            first = torch.stack([read("img_to_first_box"), read("img_to_first_rel")], 1)
            last = torch.stack([read("img_to_last_box"), read("img_to_last_rel")], 1)
            part = read("split")
            self.boxes, self.labels = read(f"boxes_{_SCALE}"), read("labels")[:, 0]
            self.pairs, self.predicates = read("relationships"), read("predicates")[:, 0]
        if len(ids) != len(part):
            raise ValueError(
                f"root: expected {len(part)} images in image_data.json (beside the corrupted ones), "
                f"got {len(ids)}"
            )
        chosen = ((part == (2 if split == "test" else 0)) & (first >= 0).all(1)).nonzero()[:, 0]
        if split != "test":
            chosen = chosen[:_VALIDATION] if split == "val" else chosen[_VALIDATION:]
        self.ids = [ids[i] for i in chosen.tolist()]
        self.first, self.last = first[chosen], last[chosen] + 1

    def __len__(self) -> int:
        return len(self.ids)

    def graph(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the classes and relations of an image without opening it."""
        (box, relation), (box_end, relation_end) = self.first[index], self.last[index]
        pairs = self.pairs[relation:relation_end] - box
        relations = torch.cat([pairs, self.predicates[relation:relation_end, None]], 1)
        return self.labels[box:box_end] - 1, relations

    def __getitem__(self, index: int) -> RelationImage:
        """Open one image; boxes are scaled to it."""
        from PIL import Image

        with Image.open(self.folder / f"{self.ids[index]}.jpg") as file:
            picture: Any = file.convert("RGB")
        wide, high = picture.size
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        image = pixels.view(high, wide, 3).permute(2, 0, 1).float() / 255
        classes, relations = self.graph(index)
        stored = self.boxes[int(self.first[index, 0]) : int(self.last[index, 0])].float()
        middle, half = stored[:, :2], stored[:, 2:] / 2
        boxes = torch.cat([middle - half, middle + half], 1) * (max(wide, high) / _SCALE)
        return RelationImage(image, boxes, classes, relations)
