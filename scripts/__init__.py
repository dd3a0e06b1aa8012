"""The commands of this project. Each one runs as python -m scripts.NAME."""

import importlib.util
import sys

# If JAX is missing, the wrong Python is probably running. One line says this more clearly than a traceback.
if importlib.util.find_spec("jax") is None:
    print(f"error: {sys.executable} has no jax: run 'source .venv/bin/activate' (setup.sh creates it)", file=sys.stderr)
    sys.exit(2)
