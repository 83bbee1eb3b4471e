"""Networks of full size with random weights, for speed and memory: MobileNetV2, ResNet-50, and a small U-Net.

Batch normalization gets its statistics from data, so that activations have the ranges of a trained network's.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BACKBONES", "MobileNetV2", "ResNet50", "UNet", "backbone"]


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out)]


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, 1x1 projection; a shortcut where sizes allow."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        expand = [*_conv(channels, hidden, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
        depthwise = [*_conv(hidden, hidden, 3, stride, hidden), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*expand, *depthwise, *_conv(hidden, out, 1))
        self.shortcut = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class MobileNetV2(nn.Module):
    """`[N, 3, 224, 224]` to `[N, 1000]` (Sandler et al. 2018); `width` multiplies the channels."""

    def __init__(self, width: float = 1.0, classes: int = 1000) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(8, int(channels * width + 4) // 8 * 8)

        channels = scaled(32)
        layers: list[nn.Module] = [*_conv(3, channels, 3, 2), nn.ReLU6(inplace=True)]
        settings = [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        for expansion, wide, count, stride in settings:
            for index in range(count):
                out = scaled(wide)
                layers.append(InvertedResidual(channels, out, stride if index == 0 else 1, expansion))
                channels = out
        last = max(1280, scaled(1280))
        self.features = nn.Sequential(*layers, *_conv(channels, last, 1), nn.ReLU6(inplace=True))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut, which has weights where sizes change."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.layers = nn.Sequential(
            *_conv(channels, width, 1), relu, *_conv(width, width, 3, stride), relu, *_conv(width, 4 * width, 1)
        )
        same = stride == 1 and channels == 4 * width
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(channels, 4 * width, 1, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.layers(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """`[N, 3, 224, 224]` to `[N, 1000]` (He et al. 2015); `width` is 64 there."""

    def __init__(self, width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_conv(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        channels = width
        for stage, count in enumerate((3, 4, 6, 3)):
            for index in range(count):
                layers.append(Bottleneck(channels, width << stage, 2 if stage and index == 0 else 1))
                channels = 4 * (width << stage)
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class UNet(nn.Module):
    """`[N, 3, H, W]` to `[N, 2, H, W]`: two levels down, transposed convolutions up, concatenated with what went down."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def double(channels: int, out: int) -> nn.Sequential:
            return nn.Sequential(*_conv(channels, out, 3), nn.ReLU(), *_conv(out, out, 3), nn.ReLU())

        self.down1, self.down2, self.middle = double(3, width), double(width, 2 * width), double(2 * width, 4 * width)
        self.up2, self.up1 = (
            nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2),
            nn.ConvTranspose2d(2 * width, width, 2, stride=2),
        )
        self.out2, self.out1 = double(4 * width, 2 * width), double(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.up2(self.middle(F.max_pool2d(second, 2)))
        x = self.out2(torch.cat([x, second], 1))
        return self.head(self.out1(torch.cat([self.up1(x), first], 1)))


BACKBONES: dict[str, Callable[[], nn.Module]] = {"MobileNetV2": MobileNetV2, "ResNet-50": ResNet50}


def backbone(make: Callable[[], nn.Module], images: Tensor) -> nn.Module:
    """A network in evaluation mode, the statistics of its batch normalizations set by `images`."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        model.train()(images)
    return model.eval()
