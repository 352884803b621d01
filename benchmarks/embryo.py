"Embryo time-lapse: archives, index, image folders, metrics of generated pictures"
import importlib
from pathlib import Path

ROWS: dict = {}
for _part in sorted(Path(__file__).parent.glob("_embryo_*.py")):
    ROWS |= importlib.import_module(f"benchmarks.{_part.stem}").ROWS
