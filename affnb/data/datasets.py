"""Real data sets through torchvision's loaders, for ``profile="full"``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checks import check_one_of

__all__ = ["cifar"]


def cifar(
    name: str, root: str | Path, *, train: bool, transform: Any = None, download: bool = True
) -> Any:
    """Open CIFAR-10 or CIFAR-100 (Krizhevsky, 2009) with torchvision.

    Parameters
    ----------
    name
        ``"CIFAR10"`` or ``"CIFAR100"``.
    root
        Folder of the data; created and filled when ``download`` is true.
    train
        The 50,000 training images, or the 10,000 test images.
    transform
        A torchvision transform of PIL images, or ``None``.
    download
        Download what is missing (160 to 170 MB). Default ``True``.

    Returns
    -------
    torchvision.datasets.CIFAR10 or torchvision.datasets.CIFAR100

    Raises
    ------
    ImportError
        torchvision is not installed: ``pip install 'affnb[data]'``.
    ValueError
        Another name.
    """
    check_one_of(name, "name", ("CIFAR10", "CIFAR100"))
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise ImportError(
            "cifar: expected torchvision, which is missing or does not match torch; "
            "install it with pip install 'affnb[data]'"
        ) from error
    return getattr(datasets, name)(str(root), train=train, transform=transform, download=download)
