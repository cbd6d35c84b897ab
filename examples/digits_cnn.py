"""Runs ``showcase/digits_cnn``: ``python examples/digits_cnn.py --flops-target 0.1 --out demo``."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parent / "showcase" / "digits_cnn" / "main.py"), run_name="__main__")
