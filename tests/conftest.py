import importlib.metadata
import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "2")
warnings.filterwarnings("ignore", message="No CUDA runtime is found")

if not importlib.metadata.version("nncf").startswith("2."):
    collect_ignore = ["legacy"]  # `make test-legacy` runs them, in an environment with NNCF 2.19
