"""Procedural scenes keep what they promise over many seeds; splits are disjoint and complete."""

import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from affnb.data import cifar, digits, relation_scenes
from affnb.data.voc import VOCSegmentation2012
from tests import fake_torchvision

SEEDS = range(25)


def scenes(seed=0, batch=40, **options):
    return relation_scenes(batch, generator=torch.Generator().manual_seed(seed), **options)


def iou(a, b):
    """Intersection over union of (B, N, 4) with (B, M, 4), written out."""
    low = torch.maximum(a[:, :, None, :2], b[:, None, :, :2])
    high = torch.minimum(a[:, :, None, 2:], b[:, None, :, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)
    return inter / (area_a[:, :, None] + area_b[:, None, :] - inter)


def test_iou_on_known_boxes():
    a = torch.tensor([[[0.0, 0, 2, 2]]])
    b = torch.tensor([[[1.0, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]]])
    torch.testing.assert_close(iou(a, b), torch.tensor([[[1 / 7, 1.0, 0.0]]]))


@pytest.mark.parametrize("seed", SEEDS)
def test_proposals_overlap_their_own_object_and_no_other(seed):
    got = scenes(seed, objects=9, background=3)
    overlap = iou(got.boxes, got.gt_boxes)
    assert overlap[got.assign].min() > 0.7
    assert overlap[:, :-3][~got.assign[:, :-3]].max() == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_background_overlaps_no_object_by_half(seed):
    got = scenes(seed, batch=200, objects=9, background=60)
    background = got.labels == 6
    assert background.sum() == 200 * 60
    assert not got.assign[background].any()
    assert iou(got.boxes, got.gt_boxes)[background].max() < 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_lie_in_the_image_and_objects_apart(seed):
    got = scenes(seed, batch=200, objects=9)
    for boxes in (got.boxes, got.gt_boxes):
        assert boxes.min() >= 0
        assert boxes.max() <= 1
        assert (boxes[..., 2:] > boxes[..., :2]).all()
    between = iou(got.gt_boxes, got.gt_boxes) - torch.eye(9)
    assert between.abs().max() < 1e-5


def test_the_worst_jitter_keeps_the_promise():
    """The extreme shifts and scales, not only those that were drawn."""
    for x in (-0.08, 0.0, 0.08):
        for y in (-0.08, 0.0, 0.08):
            for w in (0.92, 1.0, 1.08):
                for h in (0.92, 1.0, 1.08):
                    jittered = torch.tensor([[[x - w / 2, y - h / 2, x + w / 2, y + h / 2]]])
                    whole = torch.tensor([[[-0.5, -0.5, 0.5, 0.5]]])
                    assert iou(jittered, whole).item() > 0.72


def test_labels_and_assignments_agree():
    got = scenes(3, objects=5, proposals=3, background=7, num_classes=4)
    assert got.boxes.shape == (40, 22, 4)
    assert got.assign.shape == (40, 22, 5)
    assert (got.assign.sum(1) == 3).all()
    assert (got.assign.sum(2) == torch.tensor([1] * 15 + [0] * 7)).all()
    owned = torch.where(
        got.assign.any(2),
        (got.assign * got.gt_labels[:, None]).sum(2),
        torch.tensor(4),
    )
    assert torch.equal(got.labels, owned)
    assert set(got.gt_labels.flatten().tolist()) == {0, 1, 2, 3}


def test_features_are_prototypes_with_noise_and_boxes():
    got = scenes(0, noise=0.0, feature_dim=16, background=8)
    again = scenes(1, noise=0.0, feature_dim=16, background=8)
    appearance, place = got.features[..., :16], got.features[..., 16:]
    low, high = got.boxes[..., :2], got.boxes[..., 2:]
    torch.testing.assert_close(place, torch.cat([(low + high) / 2, high - low], -1))
    for label in range(6):  # one prototype a class, the same for every scene and seed
        ours = appearance[got.labels == label]
        theirs = again.features[..., :16][again.labels == label]
        assert torch.equal(torch.cat([ours, theirs]).unique(dim=0), ours[:1])
    assert appearance[got.labels == 6].abs().max() == 0
    other = scenes(0, noise=0.0, prototype_seed=1)
    assert torch.equal(other.boxes, got.boxes)
    assert not torch.equal(other.features, got.features)


def test_noise_has_the_standard_deviation_asked_for():
    got = scenes(0, batch=200, noise=0.7)
    noise = got.features[got.labels == 6][:, :16]
    assert noise.std().item() == pytest.approx(0.7, rel=0.02)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)


def test_scenes_follow_their_generator():
    state = torch.random.get_rng_state()
    first, second, other = scenes(5), scenes(5), scenes(6)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global one is not touched
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.boxes, other.boxes)
    torch.manual_seed(1)
    a = relation_scenes(2)
    torch.manual_seed(1)
    assert torch.equal(a.features, relation_scenes(2).features)


def test_object_cells_are_all_used():
    got = scenes(0, batch=300, objects=1)
    centre = (got.gt_boxes[..., :2] + got.gt_boxes[..., 2:]) / 2
    cells = Counter(map(tuple, (centre[:, 0] * 3).long().tolist()))
    assert len(cells) == 9
    assert min(cells.values()) > 10


def test_scenes_without_background():
    got = scenes(0, background=0)
    assert got.boxes.shape == (40, 16, 4)
    assert (got.labels < 6).all()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"objects": 0}, "objects"),
        ({"objects": 10}, "objects"),
        ({"proposals": 0}, "proposals"),
        ({"background": -1}, "background"),
        ({"num_classes": 0}, "num_classes"),
        ({"feature_dim": 0}, "feature_dim"),
        ({"noise": -0.1}, "noise"),
        ({"noise": float("nan")}, "noise"),
    ],
)
def test_scenes_refuse(options, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        relation_scenes(1, **options)
    with pytest.raises(ValueError, match=r"^batch: expected"):
        relation_scenes(0)


@pytest.mark.parametrize("train", [1, 1000, 1796])
def test_digits_are_split_without_overlap_or_loss(train):
    from sklearn.datasets import load_digits

    split = digits(train=train, seed=3)
    assert split.train_images.shape == (train, 8, 8)
    assert len(split.train_labels) == train
    assert len(split.test_images) == len(split.test_labels) == 1797 - train
    images = torch.cat([split.train_images, split.test_images])
    labels = torch.cat([split.train_labels, split.test_labels])
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.min() == 0
    assert images.max() == 1
    bunch = load_digits()  # the same images with the same labels, each once
    whole = sorted((tuple(i.flatten()), y) for i, y in zip(bunch.images / 16, bunch.target))  # noqa: B905
    ours = sorted((tuple(i.flatten()), y) for i, y in zip(images.numpy(), labels.numpy()))  # noqa: B905
    assert ours == whole
    assert len({image for image, _ in whole}) == 1797  # no image twice, so the split is disjoint


def test_digits_follow_their_seed():
    a, b, c = digits(seed=1), digits(seed=1), digits(seed=2)
    assert torch.equal(a.train_images, b.train_images)
    assert torch.equal(a.test_labels, b.test_labels)
    assert not torch.equal(a.train_labels, c.train_labels)
    assert set(a.train_labels.tolist()) == set(a.test_labels.tolist()) == set(range(10))


@pytest.mark.parametrize("train", [0, 1797, 5000])
def test_digits_leave_no_set_empty(train):
    with pytest.raises(ValueError, match=rf"^train: expected .*got {train}"):
        digits(train=train)


def test_cifar_checks_the_name_first(tmp_path):
    with pytest.raises(ValueError, match=r"^name: expected one of 'CIFAR10', 'CIFAR100'"):
        cifar("MNIST", tmp_path, train=True)


@pytest.mark.parametrize("module", ["missing", "built for another torch"])
def test_cifar_says_how_to_get_torchvision(tmp_path, monkeypatch, module):
    if module == "missing":
        monkeypatch.setitem(sys.modules, "torchvision", None)
    else:  # what importing a torchvision of another torch raises
        (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator does not exist')")
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"pip install 'affnb\[data\]'"):
        cifar("CIFAR10", tmp_path, train=True)


def test_cifar_passes_its_arguments_on(tmp_path, monkeypatch):
    datasets = types.SimpleNamespace(CIFAR100=lambda *a, **k: (a, k))
    fake = types.ModuleType("torchvision")
    fake.datasets = datasets
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    got = cifar("CIFAR100", tmp_path, train=False, transform=abs, download=False)
    assert got == ((str(tmp_path),), {"train": False, "transform": abs, "download": False})


def test_importing_the_room_imports_no_heavy_library():
    code = (
        "import sys, torch, numpy\n"
        "before = set(sys.modules)\n"
        "import affnb.data\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'sklearn', 'torchvision', 'matplotlib', 'sympy', 'ipywidgets', 'scipy', 'tqdm'}\n"
        "assert 'affnb' in new and not heavy & new, heavy & new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.fixture
def voc_root(tmp_path, monkeypatch):
    """A tiny VOC 2012 with SBD, and a stand-in for the torchvision that reads it."""
    fake_torchvision.fake_voc(tmp_path)
    fake_torchvision.install(monkeypatch)
    return tmp_path


@pytest.mark.parametrize("split", ["train", "val", "train_aug"])
def test_voc_splits(voc_root, split):
    """`train_aug` adds what is neither validated on nor there already."""
    expected = {
        "train": fake_torchvision.TRAIN,
        "val": fake_torchvision.VAL,
        "train_aug": [*fake_torchvision.TRAIN, "2010_000001", "2010_000002"],
    }[split]
    data = VOCSegmentation2012(voc_root, split, crop=None if split == "val" else 24, download=False)
    assert len(data) == len(expected)
    for name, (picture, annotation) in zip(expected, data.pairs, strict=True):
        own, classes, _ = fake_torchvision.scene(name)
        assert torch.equal(
            torch.as_tensor(np.array(annotation)) % 255, torch.as_tensor(classes) % 255
        )
        assert np.abs(np.array(picture).astype(int) - own).mean() < 30  # JPEG
    if split == "train_aug":  # of the images in both, VOC's own annotation, which ignores a band
        ignores = [bool((np.array(annotation) == 255).any()) for _, annotation in data.pairs]
        assert ignores == [True, True, True, False, False]


def test_voc_whole_images(voc_root):
    data = VOCSegmentation2012(voc_root, "val", download=False)
    image, labels, instances = data[0]
    picture, classes, _ = fake_torchvision.scene(fake_torchvision.VAL[0])
    assert image.shape == (3, 513, 513)
    assert image.dtype == torch.float32
    assert torch.equal(labels[:40, :52], torch.from_numpy(classes).long())
    assert (labels[40:] == 255).all()
    assert (labels[:, 52:] == 255).all()
    assert (image[:, 40:] == 0).all()
    assert (image[:, :, 52:] == 0).all()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    back = 255 * (image[:, :40, :52].movedim(0, -1) * std + mean)
    assert (back - torch.from_numpy(picture)).abs().mean() < 30
    assert instances.tolist() == [1 if c == 0 else 2 if c == 8 else int(c == 12) for c in range(21)]


@pytest.mark.parametrize("crop", [24, 65])
def test_voc_crops(voc_root, crop):
    """Crops keep image and labels together, bring no new label, and follow the global generator."""
    data = VOCSegmentation2012(voc_root, "train", crop=crop, download=False)
    torch.manual_seed(0)
    samples = [data[i % 3] for i in range(60)]
    for image, labels, instances in samples:
        assert image.shape == (3, crop, crop)
        assert labels.shape == (crop, crop)
        assert set(labels.unique().tolist()) <= {0, 8, 12, 255}
        assert not instances.any()
        # The picture is redder where there is an object.
        inside, outside = (labels == 8) | (labels == 12), labels == 0
        if inside.sum() > 100 and outside.sum() > 100:
            assert image[0][inside].mean() > image[0][outside].mean() + 0.5
    if crop == 65:  # smaller images stay whole, so that their sizes show
        assert len({int((labels != 255).any(0).sum()) for _, labels, _ in samples}) > 5
    torch.manual_seed(0)
    again = data[0]
    assert torch.equal(again.image, samples[0].image)
    # The dog, on the right in the file, is on the left of the cats in half of the crops.
    sides = []
    for _, labels, _ in samples:
        cats, dogs = ((labels == c).any(0).nonzero().double().mean() for c in (8, 12))
        sides += [bool(dogs < cats)] if torch.isfinite(cats + dogs) else []
    assert 0.25 < sum(sides) / len(sides) < 0.75


def test_voc_refuses(voc_root, monkeypatch):
    with pytest.raises(ValueError, match=r"^split: expected one of 'train', 'train_aug', 'val'"):
        VOCSegmentation2012(voc_root, "test")
    with pytest.raises(ValueError, match=r"^crop: expected"):
        VOCSegmentation2012(voc_root, "train", crop=0)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'affnb\[data\]'"):
        VOCSegmentation2012(voc_root, "train")
