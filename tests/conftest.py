"""Helpers of the tests are importable from anywhere in the suite."""

import os
import sys
from pathlib import Path

# Before torch is imported: one thread is faster for small tensors, and sums in one order repeat bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))
