"""Losses and operations on relations: between pixels, boxes, patches, labels, poses and images.

The package of *The Affinity Notebook*. A part of the book is a subpackage, and a chapter's operations
live in the module that has the chapter's name: ``affnb.affinity.affinity_mass`` holds those of the
chapter ``chapters/affinity/affinity_mass.ipynb``, importable from ``affnb.affinity``.

``import affnb`` loads torch and numpy only; what needs SymPy, matplotlib or ipywidgets imports them.
"""

__version__ = "0.1.0"
