"""A teacher that was trained elsewhere, kept as it is.

    python main.py --train-teacher --epochs 0 --teacher-network examples/trained_elsewhere.py:trained
    python main.py --epochs 200 --alpha 0.9 --teacher-network examples/trained_elsewhere.py:trained

Put your own in place of this network, its file of weights and its mean and standard deviation. Its outputs must be in
the order of this program's classes: CIFAR's own, or the sorted names of the folders.
"""

from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet18

WEIGHTS = Path(__file__).with_name("resnet18.pt")  # its state_dict, as torch.save writes it
OURS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # mean and std of CIFAR-10: `mean` and `std` of any model.pt
ITS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # with which its images were normalized


class Renormalized(nn.Module):
    """A `network` that gets the images (B, 3, S, S) normalized as it was trained with."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        (mean, std), (its_mean, its_std) = (torch.tensor(each).view(2, 3, 1, 1) for each in (OURS, ITS))
        self.register_buffer("scale", std / its_std)
        self.register_buffer("shift", (mean - its_mean) / its_std)

    def forward(self, x):
        return self.network(x * self.scale + self.shift)


def trained(classes):
    network = resnet18(num_classes=classes)
    network.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True))
    return Renormalized(network)
