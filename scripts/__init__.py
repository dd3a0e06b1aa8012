"""The commands: python -m scripts.NAME."""

import importlib.util
import sys

if importlib.util.find_spec("jax") is None:  # the likeliest reason, better told than by a traceback
    print(f"error: {sys.executable} has no jax: source .venv/bin/activate, which setup.sh makes", file=sys.stderr)
    sys.exit(2)
