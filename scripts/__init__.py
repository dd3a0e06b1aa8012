"""The commands: python -m scripts.NAME."""

import importlib.util
import sys

if importlib.util.find_spec("jax") is None:  # usually the wrong Python is running; one line is clearer than a traceback
    print(f"error: {sys.executable} has no jax: run 'source .venv/bin/activate' (setup.sh creates it)", file=sys.stderr)
    sys.exit(2)
