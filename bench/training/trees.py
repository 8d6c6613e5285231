"""What is sliced by rows without a look inside: a tensor, or dicts and tuples of such, or None for what there is none of.

A generator's condition is one: class labels (B,), token states with their mask, an image to start from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tree = Any  # a tensor (B, ...), None, or a dict or tuple of trees: a type checker cannot say it more exactly


def each(change: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """``change`` of every tensor of a tree, and of the tensors at the same places of the others, which are of the same form."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {name: each(change, part, *(o[name] for o in others)) for name, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(each(change, *parts) for parts in zip(tree, *others, strict=True))
    return change(tree, *others)


def joined(trees: Sequence[Tree]) -> Tree:
    """The rows of several trees of one form, one after the other."""
    return each(lambda *parts: torch.cat(parts), *trees)
