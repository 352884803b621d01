"Zarr U-Net: finding and loading patches, the network, prediction"
import importlib
from pathlib import Path

ROWS: dict = {}
for _part in sorted(Path(__file__).parent.glob("_unet_*.py")):
    ROWS |= importlib.import_module(f"benchmarks.{_part.stem}").ROWS
