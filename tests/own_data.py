"""Data sets, losses and a module as users write them, for `"kind": "factory"` in tests; started from this folder."""

import torch
import torch.nn.functional as F
from torch import nn


class Counting(torch.utils.data.Dataset):
    """Texts that count up in a circle."""

    def __init__(self, first, items):
        self.first, self.items = first, items

    def __len__(self):
        return self.items

    def __getitem__(self, index):
        ids = (torch.arange(17) * 3 + self.first + index) % 64
        return {"inputs": ids[:-1], "targets": ids[1:]}


def counting():
    return Counting(0, 40), Counting(1000, 6)


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([index / 12]), torch.tensor([index / 6])


def points():
    return Points()


def empty():
    return []


def endless():
    return iter(range(3))


def line():
    return nn.Sequential(nn.Linear(1, 1))


def averaged():
    return lambda module, batch: F.mse_loss(module(batch[0]), batch[1])
