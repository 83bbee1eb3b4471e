"""Memory of a conversion: beside the model, at most twice its largest layer; afterwards the float weights are gone."""

import json
import subprocess
import sys

import pytest

# In a process of its own: the resident set of a test session says nothing about one call. Linux can reset its high-water
# mark. Layers are large against the few megabytes that the allocator itself keeps.
SCRIPT = """
import gc, json, sys
from pathlib import Path
import torch
from torch import nn
import halfbyte as hb

def resident(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) * 1024

scheme = {"int8": hb.int8_weight_only(), "int4": hb.int4_weight_only(32), "bf16": hb.bf16()}[sys.argv[1]]
hb.quantize_(nn.Sequential(nn.Linear(64, 64)), scheme, progress=False)  # loads what the first call loads
model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12)))
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
hb.quantize_(model, scheme, progress=False)
peak = resident("VmHWM")
gc.collect()
print(json.dumps({"peak": peak - before, "after": resident("VmRSS") - before}))
"""


@pytest.mark.parametrize("scheme", ["int8", "int4", "bf16"])
def test_conversion_takes_at_most_two_layers_beside_the_model(scheme: str) -> None:
    layer = 2048 * 2048 * 4
    done = subprocess.run([sys.executable, "-c", SCRIPT, scheme], capture_output=True, text=True, check=True)
    grown = json.loads(done.stdout)
    assert grown["peak"] <= 2 * layer
    left = {"int8": 1 / 4, "int4": 1 / 6, "bf16": 1 / 2}[scheme]
    assert grown["after"] <= -12 * layer * (1 - left) + 2 * layer  # two for what the allocator keeps


CALIBRATION = """
import json
from pathlib import Path
import torch
from torch import nn
import halfbyte as hb

def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1])

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()).eval()
hb.prepare_(model, hb.int8_static())
images = (torch.rand(10, 3, 32, 32) for _ in range(100))
hb.calibrate(model, [next(images)], progress=False)
after_ten = peak()
hb.calibrate(model, images, progress=False)
print(json.dumps({"ten": after_ten, "thousand": peak()}))
"""


def test_calibration_on_a_thousand_images_takes_the_memory_of_ten() -> None:
    done = subprocess.run([sys.executable, "-c", CALIBRATION], capture_output=True, text=True, check=True)
    peaks = json.loads(done.stdout)
    assert peaks["thousand"] <= 1.05 * peaks["ten"]
