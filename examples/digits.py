"""Trains a classifier of handwritten digits, quantizes it ten ways and shows what each costs and gives.

    python examples/digits.py

Needs no network: the 1,797 images come with scikit-learn. Every pixel has one of 17 intensities, so the model embeds
intensities (an `nn.Embedding`) and classifies the 64 embedded pixels with a residual MLP of 4.2 M parameters. Writes
`demo_output/digits.png` and the smallest model that lost nothing, as `demo_output/digits.safetensors`.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import halfbyte as hb

FLOAT = "float32"
TEST_IMAGES = 719
SCHEMES: dict[str, Callable[[], hb.Scheme]] = {
    "bf16": hb.bf16,
    "int8_dynamic": hb.int8_dynamic,
    "int8_static": hb.int8_static,
    "int8_weight_only": hb.int8_weight_only,
    "int4_weight_only": lambda: hb.int4_weight_only(group_size=64),
    "W4A8": lambda: hb.int4_int8_dynamic(group_size=64),
    "3 bits": lambda: hb.int_weight_only(3, group_size=64),
    "2 bits": lambda: hb.int_weight_only(2, group_size=64),
    "ternary": lambda: hb.ternary_weight_only(group_size=64),
    "binary": lambda: hb.int_weight_only(1, group_size=64),
}


class Block(nn.Module):
    """A residual two-layer perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class DigitClassifier(nn.Module):
    """`[N, 64]` integer intensities to `[N, 10]` logits."""

    def __init__(self, embedding: int = 32, width: int = 1024) -> None:
        super().__init__()
        self.intensity = nn.Embedding(17, embedding)
        with torch.no_grad():  # start with neighbouring intensities close to each other: worth four points here
            phase = torch.outer(torch.arange(17) / 16, torch.arange(1, embedding // 2 + 1) * torch.pi / 4)
            damping = torch.arange(1, embedding // 2 + 1).rsqrt()
            self.intensity.weight.copy_(torch.cat([phase.sin() * damping, phase.cos() * damping], dim=1))
        self.stem = nn.Linear(64 * embedding, width)
        self.block = Block(width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(self.intensity(pixels).flatten(1))
        return self.head(self.norm(self.block(x)))


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images `[N, 64]` int64 in 0..16 and their labels."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=TEST_IMAGES, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = (torch.as_tensor(part, dtype=torch.int64) for part in split)
    return x_train, x_test, y_train, y_test


def train(x: Tensor, y: Tensor, *, epochs: int, embedding: int = 32, width: int = 1024) -> DigitClassifier:
    """A trained model in eval mode."""
    torch.manual_seed(0)
    model = DigitClassifier(embedding, width)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=epochs * -(-len(x) // 64))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return (model(x).argmax(-1) == y).float().mean().item()


@torch.inference_mode()
def latencies(models: dict[str, nn.Module], x: Tensor, *, rounds: int) -> dict[str, float]:
    """Median milliseconds a call. The models take turns, so that a busy machine slows all of them alike."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            model(x)  # brings its weights back into the caches: this measures the model, not its neighbours
            start = time.perf_counter()
            model(x)
            samples[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in samples.items()}


@dataclass(frozen=True)
class Row:
    """One line of the table and one point of the plot."""

    name: str
    accuracy: float
    file_bytes: int
    one_row_ms: float
    many_rows_ms: float


def print_table(rows: list[Row]) -> None:
    base = rows[0]
    print(
        f"{'':18}{'accuracy':>10}{'file, kB':>10}{'smaller':>9}{'1 row':>12}{'faster':>8}{'256 rows':>12}{'faster':>8}"
    )
    for row in rows:
        print(
            f"{row.name:18}{row.accuracy:>10.2%}"
            f"{row.file_bytes / 1000:>10,.0f}{base.file_bytes / row.file_bytes:>8.1f}x"
            f"{row.one_row_ms:>9.3f} ms{base.one_row_ms / row.one_row_ms:>7.1f}x"
            f"{row.many_rows_ms:>9.2f} ms{base.many_rows_ms / row.many_rows_ms:>7.1f}x"
        )


def plot(rows: list[Row], path: Path) -> None:
    """Accuracy against bytes, coloured by speed, beside the latencies of one row and of 256 rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    base = rows[0]
    ink, muted, grid = "#1f2430", "#6b7280", "#e5e7eb"
    plt.rcParams.update({"font.size": 10, "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": muted})
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, 5.6), gridspec_kw={"width_ratios": [1.25, 1]}, layout="constrained"
    )

    speedups = [base.one_row_ms / row.one_row_ms for row in rows]
    points = left.scatter(
        [row.file_bytes / 1000 for row in rows],
        [100 * row.accuracy for row in rows],
        c=speedups,
        cmap="viridis_r",
        vmin=0,
        s=110,
        edgecolors="white",
        linewidths=1.2,
        zorder=3,
    )
    left.axhline(100 * base.accuracy, color=muted, linewidth=1, linestyle=(0, (4, 4)), zorder=1)
    left.set_xscale("log")
    left.margins(x=0.12, y=0.15)
    noise = 196 * (base.accuracy * (1 - base.accuracy) / TEST_IMAGES) ** 0.5
    left.axhspan(
        100 * base.accuracy - noise, 100 * base.accuracy + noise, color=muted, alpha=0.1, linewidth=0, zorder=0
    )
    left.annotate(
        f"float32 ± what {TEST_IMAGES} test images can tell (95 %)",
        (0.99, 100 * base.accuracy + noise),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color=muted,
    )
    labels: dict[tuple[float, int], list[str]] = {}  # schemes that differ in activations alone lie on one point
    for row in rows:
        labels.setdefault((row.accuracy, row.file_bytes // 20_000), []).append(row.name)
    for (share, size), names in labels.items():
        left.annotate(
            "\n".join(names),
            (20 * (size + 0.5), 100 * share),
            xytext=(0, -10),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9,
        )
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    left.set_xlabel("file, kB (log scale)")
    left.set_ylabel("test accuracy, %")
    left.set_title("Accuracy against bytes", loc="left", fontweight="bold")
    figure.colorbar(points, ax=left, label="times faster than float32 at one row", pad=0.01, aspect=30)

    names = [row.name for row in rows][::-1]
    places = range(len(names))
    for offset, values, colour, label in (
        (0.2, [base.one_row_ms / row.one_row_ms for row in rows][::-1], "#2563eb", "1 row"),
        (-0.2, [base.many_rows_ms / row.many_rows_ms for row in rows][::-1], "#f59e0b", "256 rows"),
    ):
        bars = right.barh(
            [place + offset for place in places], values, height=0.38, color=colour, label=label, zorder=2
        )
        right.bar_label(bars, labels=[f"{value:.1f}x" for value in values], padding=3, fontsize=8, color=muted)
    right.axvline(1, color=muted, linewidth=1, linestyle=(0, (4, 4)), zorder=3)
    right.set_yticks(list(places), names)
    right.set_xlabel("speed relative to float32")
    right.set_title(
        f"Speed; threads: {torch.get_num_threads()}, level: {hb.cpu_capability()}", loc="left", fontweight="bold"
    )
    right.legend(frameon=False, loc="upper right")
    right.margins(x=0.12)

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=grid, zorder=0)
        axes.set_axisbelow(True)
    figure.suptitle("Handwritten digits: one trained classifier, quantized without retraining", x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the plot and the model")
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    x_train, x_test, y_train, y_test = load_data()
    start = time.perf_counter()
    float_model = train(x_train, y_train, epochs=arguments.epochs)
    print(
        f"Trained {sum(p.numel() for p in float_model.parameters()):,} parameters on {len(x_train)} images in "
        f"{time.perf_counter() - start:.1f} s; threads: {torch.get_num_threads()}, level: {hb.cpu_capability()}.\n"
    )

    recipe = hb.Recipe(default=hb.int4_weight_only(group_size=64), overrides={"head": hb.int8_weight_only()})
    print("The plan of one recipe: 4 bits, the output layer at 8. Nothing has been changed yet.")
    print(hb.plan(float_model, recipe), end="\n\n")

    models: dict[str, nn.Module] = {FLOAT: float_model}
    for name, scheme in SCHEMES.items():
        models[name] = copy.deepcopy(float_model)
        calibration = x_train[:512].split(64) if scheme().static else None
        hb.quantize_(models[name], scheme(), calibration, progress=False)
    one_row = latencies(models, x_test[:1], rounds=100)
    many_rows = latencies(models, x_test[:256], rounds=15)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            path = Path(folder) / "model.safetensors"
            if name == FLOAT:
                save_file(model.state_dict(), path)
            else:
                hb.save(model, path)
            rows.append(Row(name, accuracy(model, x_test, y_test), path.stat().st_size, one_row[name], many_rows[name]))
    print_table(rows)

    best = min((row for row in rows if row.accuracy >= rows[0].accuracy - 0.002), key=lambda row: row.file_bytes)
    print(f"\nThe smallest that lost at most 0.2 points: {best.name}. Do its kernels compute what they should?")
    print(hb.verify(models[best.name], [x_test[:32]]))
    path = arguments.out / "digits.safetensors"
    hb.save(models[best.name], path)
    with torch.device("meta"):
        skeleton = DigitClassifier().eval()
    reloaded = hb.load_(skeleton, path)
    with torch.inference_mode():
        same = torch.equal(reloaded(x_test), models[best.name](x_test))
    print(f"Saved to {path}, reloaded without the float weights: logits {'equal bit for bit' if same else 'DIFFER'}.")
    plot(rows, arguments.out / "digits.png")
    print(f"Plot: {arguments.out / 'digits.png'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
