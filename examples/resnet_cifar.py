"""ResNet-20 and ResNet-56 for CIFAR (He et al., arXiv 1512.03385, section 4.2): 0.27 and 0.85 million parameters, the
pair of much of the literature on distillation.

    python main.py --train-teacher --teacher-network examples/resnet_cifar.py:resnet56
    python main.py --teacher-network examples/resnet_cifar.py:resnet56 --student examples/resnet_cifar.py:resnet20
"""

from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """relu(x + branch(x)). Where the image is halved the shortcut has no weights (option A): every second
    pixel, and zeros for the new channels."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.step, self.new = outputs // inputs, outputs - inputs
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, self.step, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x):
        shortcut = F.pad(x[:, :, :: self.step, :: self.step], (0, 0, 0, 0, self.new // 2, self.new // 2))
        return F.relu(shortcut + self.branch(x))


class ResNet(nn.Sequential):
    """(B, 3, S, S) -> logits (B, classes): three stages of `depth` blocks, 16, 32 and 64 channels wide."""

    def __init__(self, classes, depth):
        first = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        widths = [16] * (depth + 1) + [32] * depth + [64] * depth
        blocks = map(Block, widths[:-1], widths[1:])
        super().__init__(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)


def resnet20(classes):
    """ResNet-20: 0.27 million parameters with 10 classes."""
    return ResNet(classes, 3)


def resnet56(classes):
    """ResNet-56: 0.85 million parameters with 10 classes."""
    return ResNet(classes, 9)
