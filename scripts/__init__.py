"""The commands of this project. Each one runs as python -m scripts.NAME."""

import importlib.util
import sys

# If JAX is missing, the wrong Python is probably running. One line says this more clearly than a traceback.
if importlib.util.find_spec("jax") is None:
    advice = "run 'source .venv/bin/activate' ('bash setup.sh' creates it)"
    print(f"error: {sys.executable} has no jax: {advice}", file=sys.stderr)
    sys.exit(2)
