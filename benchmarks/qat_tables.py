"""The measured tables of docs/qat.md."""

from collections.abc import Mapping

from models import output

Rows = Mapping[str, Mapping[str, object]]


def language_table(rows: Rows) -> str:
    """Mean KL to the float model of a language model's formats: rounded, GPTQ, trained, and trained over GPTQ."""

    def kl(row: Mapping[str, object], key: str, digits: int = 4) -> str:
        return f"{row[key]:.{digits}f} ± {row[f'{key}_ci']:.{digits}f}" if key in row else ""

    header = ["weights", "bits per weight", "steps", "MSE scales", "GPTQ", "trained", "ratio", "ratio, other text", "s"]
    cells = [
        [
            name,
            f"{row['bits_per_weight']:.2f}",
            f"{row['steps']}",
            f"{row['mse_kl']:.4f}",
            kl(row, "gptq_kl"),
            kl(row, "trained_kl"),
            kl(row, "ratio_kl", 2),
            kl(row, "ratio_kl_other", 2),
            f"{row['trained_seconds']:.0f}",
        ]
        for name, row in rows.items()
    ]
    return output.markdown(header, cells)


def step_table(rows: Rows) -> str:
    """Time and memory of training steps beside float."""
    header = ["model", "step", "ms", "times float", "MB more than float"]
    cells, last = [], ""
    for row in rows.values():
        model, step = str(row["model"]), str(row["step"])
        more = "" if step == "float" else f"{row['over_float_mb']:.1f}"
        cells.append([model if model != last else "", step, f"{row['ms']:.0f}", f"{row['times_float']:.2f}", more])
        last = model
    return output.markdown(header, cells, left=(0, 1))


def image_table(rows: Rows) -> str:
    """Top-1 of image classifiers: a column for each model, a row for each way to quantize."""
    models = list(dict.fromkeys(str(row["model"]) for row in rows.values()))
    ways = list(dict.fromkeys(str(row["row"]) for row in rows.values()))
    found = {(row["model"], row["row"]): f"{row['top1']:.2f} %" for row in rows.values()}
    return output.markdown(["top-1", *models], [[way, *(found.get((m, way), "") for m in models)] for way in ways])
