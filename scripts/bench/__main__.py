"""Compares parts of this project with their alternatives.

    python -m scripts.bench tokenizer --corpus=FOLDER --peer_python=PATH
    python -m scripts.bench data --data_dir=FOLDER
    python -m scripts.bench decode --peer=hf --peer_python=PATH
    python -m scripts.bench serve
    python -m scripts.bench train --peer=hf --peer_python=PATH

`python -m scripts.bench NAME --help` shows the settings of the benchmark NAME.
"""

import importlib
import sys

from nanochat_jax import commandline

BENCHMARKS = ("tokenizer", "data", "decode", "serve", "train")  # modules in this folder; each defines Settings and main


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in BENCHMARKS:
        problem = f"there is no benchmark {name!r}" if name else "no benchmark is named"
        print(f"error: {problem}: must be one of {', '.join(BENCHMARKS)}", file=sys.stderr)
        sys.exit(2)
    else:
        del sys.argv[1]
        benchmark = importlib.import_module(f"scripts.bench.{name}")
        commandline.run(benchmark.main, benchmark.Settings)


if __name__ == "__main__":
    main()
