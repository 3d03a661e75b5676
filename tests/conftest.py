"""Helpers of the tests are importable from anywhere in the suite."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
