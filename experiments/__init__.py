"""The programs. They need the extra `train`; without it they end with one line that says so."""

import importlib.util
import sys

from experiments import beginning

NEEDED = ("absl", "flax", "grain", "jinja2", "ml_collections", "optax", "orbax", "PIL", "safetensors", "tqdm")

beginning.answer_signals()
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(f"error: the programs need {', '.join(missing)}: pip install '.[train]' in your clone")
