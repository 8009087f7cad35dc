"""The programs: `lcrf NAME`, or `python -m experiments.NAME` in a clone.

They need the extra `train`; without it they end with one line that says so.
"""

import importlib.util
import sys

from . import beginning

NEEDED = ("absl", "array_record", "flax", "grain", "jinja2", "ml_collections", "optax", "orbax", "PIL", "safetensors", "tqdm")

# One folder under two names: `experiments` in a clone, `lcrf_jax.experiments` in an install. Configurations, those of users
# too, import the latter, which here is the former.
sys.modules.setdefault("lcrf_jax.experiments", sys.modules[__name__])
beginning.answer_signals()
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(f"error: the programs need {', '.join(missing)}: pip install '.[train]' in your clone")
