"""Four trained image classifiers and their data: Tiny-Darknet, MobileNetV1 x0.25 (depthwise), ResNet-20 and ResNet-8.

Calibration and evaluation images are disjoint, as the data's README asks.
"""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["NAMES", "MobileNet", "ResNet8", "ResNet20", "TinyDarknet", "Vision", "load_data", "load_float", "logits"]


class TinyDarknet(nn.Module):
    """`[N, 3, 224, 224]` to `[N, 1000]`: convolution, batch norm, leaky ReLU, sixteen times."""

    def __init__(self, blocks: list[dict[str, int]]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for block in blocks:
            kernel, out = block["kernel"], block["out"]
            conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
            pool = [nn.MaxPool2d(2)] if block["maxpool_after"] else []
            layers.append(nn.Sequential(conv, nn.BatchNorm2d(out, eps=1e-3), nn.LeakyReLU(0.1), *pool))
            channels = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(channels, 1000, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).mean((2, 3))


class DepthwiseBlock(nn.Module):
    """Depthwise 3x3, then 1x1, each with batch norm and ReLU; stride 2 pads right and bottom only."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.pad = (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)
        self.dw = nn.Conv2d(channels, channels, 3, stride=stride, groups=channels)
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3)
        self.pw = nn.Conv2d(channels, out, 1)
        self.bn2 = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.dw(F.pad(x, self.pad))))
        return F.relu(self.bn2(self.pw(x)))


class MobileNet(nn.Module):
    """`[N, 3, 96, 96]` to `[N, 2]`: person or not."""

    def __init__(self, blocks: list[list[int]]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.bn = nn.BatchNorm2d(8, eps=1e-3)
        widths = [8, *(out for out, _ in blocks)]
        self.blocks = nn.Sequential(
            *(DepthwiseBlock(i, out, stride) for i, (out, stride) in zip(widths, blocks, strict=False))
        )
        self.fc = nn.Linear(widths[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(F.pad(x, (0, 1, 0, 1)))))
        return self.fc(self.blocks(x).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.missing = stride, (out - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.missing:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.missing, self.missing))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """`[N, 3, 32, 32]` to `[N, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), *(BasicBlock(32, 32, 1) for _ in range(2)))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), *(BasicBlock(64, 64, 1) for _ in range(2)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class ResNet8(nn.Module):
    """`[N, 3, 32, 32]`, values 0 to 255, to `[N, 10]`; MLPerf Tiny's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(16, eps=1e-3)
        for k, (channels, out, stride) in enumerate(((16, 16, 1), (16, 32, 2), (32, 64, 2))):
            padding = 1 if stride == 1 else 0
            self.add_module(f"conv{k}a", nn.Conv2d(channels, out, 3, stride=stride, padding=padding))
            self.add_module(f"bn{k}a", nn.BatchNorm2d(out, eps=1e-3))
            self.add_module(f"conv{k}b", nn.Conv2d(out, out, 3, padding=1))
            self.add_module(f"bn{k}b", nn.BatchNorm2d(out, eps=1e-3))
            if stride == 2:
                self.add_module(f"short{k}", nn.Conv2d(channels, out, 1, stride=2))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        for k in range(3):
            layers = dict(self.named_children())
            padded = x if k == 0 else F.pad(x, (0, 1, 0, 1))
            y = F.relu(layers[f"bn{k}a"](layers[f"conv{k}a"](padded)))
            y = layers[f"bn{k}b"](layers[f"conv{k}b"](y))
            x = F.relu(y + (x if k == 0 else layers[f"short{k}"](x)))
        return self.fc(x.mean((2, 3)))


@dataclass(frozen=True)
class Vision:
    """Images as a model takes them, `[N, 3, H, W]` float32, calibration and evaluation apart, and labels of the latter."""

    calibration: Tensor
    images: Tensor
    labels: Tensor


_FOLDERS = {
    "Tiny-Darknet": "tiny_darknet",
    "MobileNetV1 0.25": "vww_mobilenet025",
    "ResNet-20": "resnet20_cifar10",
    "ResNet-8": "resnet8_cifar10",
}
NAMES = tuple(_FOLDERS)


def load_float(root: Path, name: str) -> nn.Module:
    """A float32 model in evaluation mode."""
    folder = root / "vision" / _FOLDERS[name]
    config = json.loads((folder / "config.json").read_text())
    model: nn.Module
    if name == "Tiny-Darknet":
        model = TinyDarknet(config["blocks"])
    elif name == "MobileNetV1 0.25":
        model = MobileNet(config["blocks_out_stride"])
    else:
        model = ResNet20() if name == "ResNet-20" else ResNet8()
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if unexpected or any(not key.endswith("num_batches_tracked") for key in missing):
        raise ValueError(f"{folder} does not fit {type(model).__name__}: {missing}, {unexpected}")
    return model.eval()


def load_data(root: Path, name: str, *, calibration: int = 256, images: int | None = None) -> Vision:
    """The first `calibration` and `images` images; all that there are to evaluate with None."""
    folder = root / "vision"
    if name == "Tiny-Darknet":
        pictures = _imagenet(folder / "imagenet_sample" / "images.tar")
        chosen = torch.arange(1000) % 5 == 0
        return Vision(pictures[chosen][:calibration], pictures[~chosen][:images], torch.arange(1000)[~chosen][:images])
    if name == "MobileNetV1 0.25":
        pixels, labels = _arrays(folder / "vww01.npz")
        x = pixels / 255
        return Vision(x[: min(calibration, 200)], x[200:][:images], labels[200:][:images])
    pixels, _ = _arrays(folder / "cifar10_calib.npz", calibration)
    test, labels = _arrays(folder / "cifar10_test.npz", images)
    if name == "ResNet-20":
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        pixels, test = (pixels / 255 - mean) / std, (test / 255 - mean) / std
    return Vision(pixels, test, labels)


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor, *, batch: int = 50) -> Tensor:
    """Logits of all images."""
    return torch.cat([model(part) for part in images.split(batch)])


def _arrays(path: Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    with np.load(path) as arrays:
        images = torch.from_numpy(arrays["images"][:count]).permute(0, 3, 1, 2).float()
        labels = torch.from_numpy(arrays["labels"][:count].astype(np.int64)) if "labels" in arrays else torch.empty(0)
    return images, labels


def _imagenet(path: Path) -> Tensor:
    pictures = torch.empty(1000, 3, 224, 224)
    with tarfile.open(path) as archive:
        for index in range(1000):
            member = archive.extractfile(f"{index:04d}.jpg")
            assert member is not None
            with Image.open(io.BytesIO(member.read())) as image:
                array = np.asarray(image.convert("RGB").crop((16, 16, 240, 240)), dtype=np.float32)
            pictures[index] = torch.from_numpy(array / 255).permute(2, 0, 1)
    return pictures
