"""The commands: python -m scripts.NAME."""

import importlib.util
import sys

if importlib.util.find_spec("jax") is None:  # usually the wrong Python: one line says more than a traceback
    print(f"error: {sys.executable} has no jax: source .venv/bin/activate, which setup.sh creates", file=sys.stderr)
    sys.exit(2)
