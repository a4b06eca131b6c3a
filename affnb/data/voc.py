"""PASCAL VOC 2012 for semantic segmentation, with instance counts, for ``profile="full"``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_one_of, check_positive

__all__ = ["VOCSample", "VOCSegmentation2012"]

_CLASSES, _IGNORE = 21, 255
# Of ImageNet, as torchvision's weights want.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIDE = 513  # the images have at most 500 pixels a side; whole ones are padded to this


class VOCSample(NamedTuple):
    """One image.

    Attributes
    ----------
    image
        (3, H, W) float32, normalised as torchvision's ImageNet weights expect; 0 where padded.
    labels
        (H, W) int64: 0 background, 1 to 20 the classes in alphabetical order, 255 ignored or padded.
    instances
        (21,) int64: how many objects of each class there are (1 background); all 0 in training.
    """

    image: Tensor
    labels: Tensor
    instances: Tensor


class VOCSegmentation2012(torch.utils.data.Dataset[VOCSample]):
    """Images and label maps of PASCAL VOC 2012 (Everingham et al., 2010), through torchvision.

    Parameters
    ----------
    root
        Folder of the data, in torchvision's layout (``VOCdevkit/VOC2012``, and ``sbd`` for
        ``"train_aug"``); filled when ``download`` is true.
    split
        ``"train"`` (1,464 images), ``"val"`` (1,449), or ``"train_aug"``: training images with those of
        the Semantic Boundaries Dataset (Hariharan et al., 2011) that VOC does not validate on, the
        10,582 images that most papers train on. VOC's own annotation is taken where there are two.
    crop
        ``None`` for testing: whole images, padded to 513 pixels a side. An integer for training: random
        mirroring, resizing by 0.5 to 2 and cropping to this side, from PyTorch's global generator.
    download
        Download what is missing (2 GB). Default ``True``.

    Raises
    ------
    ImportError
        torchvision is not installed: ``pip install 'affnb[data]'``.
    ValueError
        Another split, or a crop that is not positive.
    """

    def __init__(
        self, root: str | Path, split: str, *, crop: int | None = None, download: bool = True
    ) -> None:
        check_one_of(split, "split", ("train", "train_aug", "val"))
        if crop is not None:
            check_positive(crop, "crop")
        try:
            from torchvision.datasets import SBDataset, VOCSegmentation
        except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
            raise ImportError(
                "VOCSegmentation2012: expected torchvision, which is missing or does not match torch; "
                "install it with pip install 'affnb[data]'"
            ) from error
        self.crop = crop

        def own(image_set: str) -> Any:
            return VOCSegmentation(str(root), year="2012", image_set=image_set, download=download)

        if split != "train_aug":
            self.pairs = own(split)
            return
        train = own("train")
        taken = {Path(name).stem for part in (train, own("val")) for name in part.images}
        parts = [train]
        for image_set in ("train", "val"):  # SBD's own halves, which VOC's cut across
            folder = Path(root) / "sbd"
            more = SBDataset(
                str(folder),
                image_set=image_set,
                mode="segmentation",
                download=download and not (folder / "img").exists(),
            )
            fresh = [i for i, name in enumerate(more.images) if Path(name).stem not in taken]
            parts.append(torch.utils.data.Subset(more, fresh))
        self.pairs = torch.utils.data.ConcatDataset(parts)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> VOCSample:
        import numpy as np

        picture, annotation = self.pairs[index]
        image = torch.from_numpy(np.array(picture)).movedim(-1, 0) / 255
        image = (image - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]
        labels = torch.from_numpy(np.array(annotation, dtype=np.int64))
        instances = torch.zeros(_CLASSES, dtype=torch.int64)
        if self.crop is None:
            instances = self._instances(index, labels)
            return VOCSample(*_padded(image, labels, _SIDE), instances)
        factor = float(torch.empty(()).uniform_(0.5, 2.0))
        size = [max(1, round(factor * length)) for length in labels.shape]
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        # Nearest: no new label may appear.
        labels = F.interpolate(labels[None, None].float(), size, mode="nearest-exact")[0, 0].long()
        if torch.rand(()) < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        image, labels = _padded(image, labels, self.crop)
        top, left = (int(torch.randint(n - self.crop + 1, ())) for n in labels.shape)
        window = (..., slice(top, top + self.crop), slice(left, left + self.crop))
        return VOCSample(image[window], labels[window], instances)

    def _instances(self, index: int, labels: Tensor) -> Tensor:
        """Count the objects of each class. Their masks lie beside the class masks."""
        import numpy as np
        from PIL import Image

        path = Path(self.pairs.targets[index])
        objects = np.array(Image.open(path.parents[1] / "SegmentationObject" / path.name))
        counts = torch.zeros(_CLASSES, dtype=torch.int64)
        for number in np.unique(objects[(objects > 0) & (objects < _IGNORE)]):
            inside = labels[torch.from_numpy(objects == number)]  # an object has the class of these
            counts[torch.bincount(inside[inside < _CLASSES], minlength=_CLASSES).argmax()] += 1
        counts[0] = 1
        return counts


def _padded(image: Tensor, labels: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Fill up below and to the right: the mean colour, the ignored label."""
    height, width = labels.shape
    pad = [0, max(0, side - width), 0, max(0, side - height)]
    return F.pad(image, pad), F.pad(labels, pad, value=_IGNORE)
