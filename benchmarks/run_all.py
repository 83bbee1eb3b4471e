"""Runs every benchmark in its quick form, writes `benchmarks/results/*.json`, and renders the documentation from them.

    python benchmarks/run_all.py [--only peers elementwise] [--peers-python ggml=PATH]

Minutes on two cores. A benchmark that fails, or whose data is absent, is named at the end and the others still run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import halfbyte as hb

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SCHEMES = ["bf16", "int8_weight_only", "int8_dynamic", "int4 g32, MSE", "W4A8 g32, MSE"]
MODELS = ["--parts", "speed", "--repeats", "5", "--schemes", *SCHEMES]
LINEAR = ["--shapes", "4096x4096", "--rows", "1,16,256", "--seconds", "2"]
SUITE: dict[str, list[str]] = {  # name: script and arguments that make it quick
    "peers": ["bench_peers.py", "--json", str(RESULTS / f"peers_{hb.cpu_capability()}.json")],
    "linear": ["bench_linear.py", *LINEAR, "--json", str(RESULTS / "linear.json")],
    "elementwise": ["bench_elementwise.py", "--json", str(RESULTS / "elementwise.json")],
    "gptq": ["bench_gptq.py", "--sizes", "768", "2048", "--json", str(RESULTS / "gptq.json")],
    "recurrent": ["bench_recurrent.py", "--json", str(RESULTS / "recurrent.json")],
    "language_model": ["bench_language_model.py", *MODELS, "--json", str(RESULTS / "novels5M.json")],
    "sentence_encoder": ["bench_sentence_encoder.py", *MODELS, "--json", str(RESULTS / "minilm.json")],
}


def main() -> None:
    """Runs the suite; exits with 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SUITE), default=list(SUITE))
    parser.add_argument("--peers-python", action="append", default=[], help="as bench_peers.py --python")
    arguments = parser.parse_args()
    failed = []
    for name in arguments.only:
        script, *rest = SUITE[name]
        if name == "peers":
            rest += [text for value in arguments.peers_python for text in ("--python", value)]
        print(f"== {script} {' '.join(rest)}", flush=True)
        begin = time.perf_counter()
        code = subprocess.run([sys.executable, str(HERE / script), *rest], check=False).returncode
        print(f"== {script}: {time.perf_counter() - begin:.0f} s{f', exit code {code}' if code else ''}", flush=True)
        failed += [name] * bool(code)
    subprocess.run([sys.executable, str(HERE / "render_docs.py")], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
