"""A stand-in for torchvision where it cannot be imported: its VOC data sets, a ResNet-101's shape, a VGG-16.

`fake_voc` writes a tiny VOC 2012 and SBD in the layout that torchvision's data sets read, and
`install` makes ``import torchvision`` find classes that read it in the same way. `run_on_voc` runs a
chapter's cells on them, so that ``profile="full"`` is no dead code.
"""

import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import grid_sample

from tests.chapter_cells import fake_modules, run_cells

# Images of VOC, and those of SBD: one of each set is in both, one of SBD's is new.
TRAIN, VAL = ["2007_000001", "2007_000002", "2007_000003"], [f"2008_00000{i}" for i in range(1, 7)]
SBD = {"train": [TRAIN[0], VAL[0], "2010_000001"], "val": [VAL[1], "2010_000002"]}


def scene(name, height=40, width=52):
    """A picture, its classes (two cats, a dog, an ignored band) and its objects."""
    generator = np.random.default_rng(int(name[-3:]) + 1000 * int(name[:4]))
    classes = np.zeros((height, width), np.uint8)
    objects = np.zeros_like(classes)
    for number, (kind, left) in enumerate(((8, 2), (8, 20), (12, 36)), 1):
        window = np.s_[10:30, left : left + 12]
        classes[window], objects[window] = kind, number
    classes[8:10], objects[8:10] = 255, 255
    picture = generator.integers(0, 50, (height, width, 3), dtype=np.uint8)
    picture[..., 0] += np.where(classes == 255, 0, classes * 10).astype(np.uint8)
    return picture, classes, objects


def fake_voc(root):
    """Write the data sets under ``root``."""
    from scipy.io import savemat

    voc, sbd = root / "VOCdevkit" / "VOC2012", root / "sbd"
    for folder in (
        "JPEGImages",
        "SegmentationClass",
        "SegmentationObject",
        "ImageSets/Segmentation",
    ):
        (voc / folder).mkdir(parents=True)
    for folder in ("img", "cls"):
        (sbd / folder).mkdir(parents=True)
    for split, names in (("train", TRAIN), ("val", VAL)):
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            picture, classes, objects = scene(name)
            Image.fromarray(picture).save(voc / "JPEGImages" / f"{name}.jpg")
            for folder, values in (("SegmentationClass", classes), ("SegmentationObject", objects)):
                mask = Image.fromarray(values, mode="P")
                mask.putpalette([i % 256 for i in range(768)])  # as VOC's: indices with colours
                mask.save(voc / folder / f"{name}.png")
    for split, names in SBD.items():
        (sbd / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            picture, classes, _ = scene(name)
            Image.fromarray(picture).save(sbd / "img" / f"{name}.jpg")
            marked = np.where(classes == 255, 0, classes).astype(np.uint8)  # SBD ignores nothing
            savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": marked}})


class VOCSegmentation:
    """Reads what torchvision's class of this name reads, and refuses what it refuses."""

    def __init__(self, root, year="2012", image_set="train", download=False):
        assert year == "2012"
        voc = Path(root) / "VOCdevkit" / "VOC2012"
        names = (voc / "ImageSets" / "Segmentation" / f"{image_set}.txt").read_text().split()
        self.images = [str(voc / "JPEGImages" / f"{name}.jpg") for name in names]
        self.targets = [str(voc / "SegmentationClass" / f"{name}.png") for name in names]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Image.open(self.images[index]).convert("RGB"), Image.open(self.targets[index])


class SBDataset:
    """Reads what torchvision's class of this name reads, with ``mode="segmentation"``."""

    def __init__(self, root, image_set="train", mode="boundaries", download=False):
        assert mode == "segmentation"
        assert not download, "the folder is there already"
        names = (Path(root) / f"{image_set}.txt").read_text().split()
        self.images = [f"{root}/img/{name}.jpg" for name in names]
        self.masks = [f"{root}/cls/{name}.mat" for name in names]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        from scipy.io import loadmat

        mat = loadmat(self.masks[index])
        mask = Image.fromarray(mat["GTcls"][0]["Segmentation"][0])
        return Image.open(self.images[index]).convert("RGB"), mask


class Bottleneck(nn.Module):
    """A block with the names, strides and dilations of torchvision's, and very few channels inside."""

    def __init__(self, inside, outside, stride, dilation):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, 4, 1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, stride, dilation, dilation, bias=False)
        self.conv3 = nn.Conv2d(4, outside, 1, bias=False)
        self.bn = nn.BatchNorm2d(outside)
        self.downsample = None
        if inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False))

    def forward(self, x):
        kept = x if self.downsample is None else self.downsample(x)
        return (self.bn(self.conv3(self.conv2(self.conv1(x)))) + kept).relu()


class ResNet(nn.Module):
    """The four stages of a ResNet-101, its numbers of output channels, two blocks each."""

    def __init__(self, replace_stride_with_dilation=(False, False, False)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(64), nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inside, dilation = 64, 1
        for number, replaced in enumerate((False, *replace_stride_with_dilation), 1):
            stride, before = 1 if number == 1 else 2, dilation
            if replaced:
                stride, dilation = 1, dilation * stride
            outside = 128 * 2**number
            self.add_module(
                f"layer{number}",
                nn.Sequential(
                    Bottleneck(inside, outside, stride, before),
                    Bottleneck(outside, outside, 1, dilation),
                ),
            )
            inside = outside
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(inside, 1000)


class ASPP(nn.Module):
    """The names and shapes of torchvision's atrous spatial pyramid pooling."""

    def __init__(self, channels, rates, out=256):
        super().__init__()

        def block(kernel, rate=1):
            padding = rate if kernel > 1 else 0
            conv = nn.Conv2d(channels, out, kernel, padding=padding, dilation=rate, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())

        self.convs = nn.ModuleList([block(1), *(block(3, rate) for rate in rates)])
        self.project = nn.Conv2d(out * len(self.convs), out, 1)

    def forward(self, x):
        return self.project(torch.cat([conv(x) for conv in self.convs], 1))


def thin_vgg16(weights=None):
    """The layers of torchvision's VGG-16 in their places, with 2 channels and 6 hidden units."""
    torch.manual_seed(0)
    layers, channels = [], 3
    for count in (2, 2, 3, 3, 3):
        for _ in range(count):
            layers += [nn.Conv2d(channels, 2, 3, padding=1), nn.ReLU(inplace=True)]
            channels = 2
        layers.append(nn.MaxPool2d(2))
    vgg = nn.Module()
    vgg.features = nn.Sequential(*layers)
    hidden = [nn.Linear(2 * 49, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 6)]
    vgg.classifier = nn.Sequential(*hidden, nn.ReLU(True), nn.Dropout(), nn.Linear(6, 10))
    vgg.weights = weights
    return vgg


def sampled_roi(maps, boxes, output_size, spatial_scale):
    """The map at the middle of each cell of a grid over the box: RoIAlign with one sample a cell."""
    (boxes,), (high, wide) = boxes, maps.shape[-2:]
    step = (torch.arange(output_size) + 0.5) / output_size
    corner, extent = boxes[:, :2] * spatial_scale, (boxes[:, 2:] - boxes[:, :2]) * spatial_scale
    x, y = (corner[:, i, None] + extent[:, i, None] * step for i in range(2))
    grid = torch.stack(
        [
            (2 * x / wide - 1)[:, None, :].expand(-1, output_size, -1),
            (2 * y / high - 1)[:, :, None].expand(-1, -1, output_size),
        ],
        -1,
    )
    return grid_sample(maps.expand(len(boxes), -1, -1, -1), grid, align_corners=False)


def resnet101(weights=None, replace_stride_with_dilation=(False, False, False)):
    assert weights == "pretrained"
    return ResNet(replace_stride_with_dilation)


def install(monkeypatch):
    """Make ``import torchvision`` find these classes."""
    pretrained = types.SimpleNamespace(IMAGENET1K_V1="pretrained")
    models = {"resnet101": resnet101, "ResNet101_Weights": pretrained}
    models |= {"vgg16": thin_vgg16, "VGG16_Weights": pretrained}
    fake_modules(
        monkeypatch,
        {
            "torchvision": {},
            "torchvision.datasets": {"VOCSegmentation": VOCSegmentation, "SBDataset": SBDataset},
            "torchvision.models": models,
            "torchvision.models.segmentation": {},
            "torchvision.models.segmentation.deeplabv3": {"ASPP": ASPP},
            "torchvision.ops": {"roi_align": sampled_roi},
        },
    )


def run_on_voc(chapter, root, monkeypatch, **options):
    """Run cells of a chapter on the stand-in for VOC, which is written into the empty folder ``root``.

    Parameters
    ----------
    chapter, monkeypatch, options
        As for `tests.chapter_cells.run_cells`.

    Returns
    -------
    dict, dict, list
        The names that the cells leave; the verdicts that they record, by id; and for each training the
        optimiser's name and groups (with the number of parameters for these), the scheduler's values,
        the number of steps and the images.
    """
    fake_voc(root)
    install(monkeypatch)
    monkeypatch.setattr("affnb.data.voc._SIDE", 73)
    trainings = []

    def fit(real, step, batches, optimizer, **options):
        groups = [
            {**g, "params": sum(p.numel() for p in g["params"])} for g in optimizer.param_groups
        ]
        schedule = {k: v for k, v in vars(options["scheduler"]).items() if k != "optimizer"}
        name = type(optimizer).__name__
        trainings.append((name, groups, schedule, len(batches), batches.dataset))
        return real(step, batches, optimizer, **options)

    found = run_cells(chapter, monkeypatch, fit=fit, data_root=str(root), **options)
    return *found, trainings
