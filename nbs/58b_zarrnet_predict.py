# %% [markdown]
# # The command that predicts
#
# > `medvol unet predict`: from a trained network and a volume of any size to a store, in one process or many.
#
# Page 58a does the work for a model in memory. What is left is to bring model and volume together from their names:
# weights that know their network and normalisation, statistics of a volume that training never saw, and parts for
# several processes, machines or GPUs. A part is a set of whole chunks of the output, so parts never meet.

# %%
#| default_exp zarrnet.predict

# %%
#| export
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvol_nb.checkpoints import device_for, precision_for
from medvol_nb.config import check_config
from medvol_nb.core import ConfigError
from medvol_nb.parallel import cpu_count, on_cluster, pmap
from medvol_nb.zarrnet.config import InferenceParams, ZarrConfig
from medvol_nb.zarrnet.data import ImageNormalizer
from medvol_nb.zarrnet.infer import predict_volume
from medvol_nb.zarrnet.io import ChunkedVolume, open_volume
from medvol_nb.zarrnet.train import TrainedModel, load_model

# %%
import tempfile

from medvol_nb import phantoms, plot
from medvol_nb.core import raises, write_json
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.stores import write_zarr
from medvol_nb.zarrnet.train import train

# %% [markdown]
# ## Statistics of a new volume
# A scheme that is fitted per volume needs the statistics of the volume that is predicted. They come from a seeded
# sample of blocks of the whole volume, so every part finds the same; a training samples its own `bbox` with its own
# seed, and may differ by what sampling does. `ct_normalization` uses what training found. Weights of the reference say
# nothing; then the scheme of the settings is taken.

# %%
#| export
def normalizer_for(
    trained: TrainedModel, # from `load_model`
    source: ChunkedVolume, # to be predicted
    scheme: str | None = None, # dataset_config.normalization, for weights that do not say
    seed: int = 0, # of the sample
) -> Any: # (c, z, y, x) -> (c, z, y, x) float32
    "Normalisation of a volume the way the network expects it"
    norm = trained.normalizer
    if norm is None:
        if scheme is None:
            raise ConfigError("these weights do not say how images were normalised. Pass the settings of their "
                              "training (--config)")
        norm = ImageNormalizer(scheme)
        if scheme == "ct_normalization":
            raise ConfigError("dataset_config.normalization: ct_normalization needs statistics that these weights do "
                              "not carry. Train with load_weights_only first, or use zscore")
    name = "the volume that is predicted"
    return _Named(norm.with_volume(name, source, seed=seed), name)

@dataclass(frozen=True)
class _Named:
    "A normalisation that knows its volume"
    norm: ImageNormalizer
    name: str
    def __call__(self, patch: np.ndarray) -> np.ndarray: return self.norm(patch, self.name)

# %% [markdown]
# ## The command
# The settings come from the `inference_params` of a file, or from a few options, or both; options win. A volume is
# divided into `num_parts`. With `workers` or `dask` one call predicts all parts in processes of their own; a batch
# system starts one call a part with `part_id`. Whoever finishes last closes the output.

# %%
#| export
def _settings(config: Any, overrides: Sequence[str], given: dict[str, Any]
              ) -> tuple[InferenceParams, ZarrConfig | None]:
    cfg = None if config is None else ZarrConfig.load(config, overrides)
    if cfg is None and overrides: raise ConfigError("overrides: change settings of a file, pass config (--config), too")
    base = {} if cfg is None else cfg.inference_params.model_dump()
    return check_config(InferenceParams, {**base, **{k: v for k, v in given.items() if v is not None}}), cfg

def _predict_part(params: InferenceParams, cfg: ZarrConfig | None, device: str, precision: str, **how: Any
                  ) -> dict[str, Any]:
    trained = load_model(params.checkpoint_path, device, cfg)
    source = open_volume(params.input_path, channels=trained.model.in_channels)
    if params.input_format.removeprefix("ome-") not in ("auto", source.kind):
        raise ConfigError(f"inference_params.input_format: {params.input_format}, but {params.input_path} is "
                          f"read as {source.kind}. Set it to auto, or name another volume")
    norm = normalizer_for(trained, source, None if cfg is None else cfg.dataset_config.normalization)
    params = params.model_copy(update={"patch_size": params.patch_size or trained.patch_size})
    return predict_volume(trained.model, source, params.output_dir, trained.targets, params, normalizer=norm,
                          checkpoint=trained.digest, device=device,
                          precision=precision_for(precision, device_for(device)), **how)

def predict(
    config: str | os.PathLike | None = None, # settings with inference_params, .json or .yaml
    *,
    checkpoint_path: str | os.PathLike | None = None, # run folder or weights; default: that of the settings
    input_path: str | None = None, # volume to predict; default: that of the settings
    output_dir: str | os.PathLike | None = None, # folder that gets predictions.zarr; created
    overlap: float | None = None, # part of a patch shared with the next one; default 0.25
    batch_size: int | None = None, # patches in a forward pass; default 2
    max_memory_gb: float | None = None, # for sums and slabs of one part [GB]; default 2
    part_id: int | None = None, # predict only this part
    num_parts: int | None = None, # into how many the volume is divided
    overrides: Sequence[str] = (), # settings of the file to change, 'inference_params.tta=mirror'
    device: str = "auto", # where the network runs
    precision: str = "auto", # fp32, bf16 or fp16; 'auto' suits the device
    workers: int = 0, # processes that share the parts; 0: this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler whose workers share the parts
    overwrite: bool | None = None, # start over instead of going on
) -> dict: # outputs, patches, bytes, shares of time
    "Predict a volume of any size, or go on where an interrupted prediction stopped"
    given = {"checkpoint_path": checkpoint_path, "input_path": input_path, "output_dir": output_dir, "overlap": overlap,
             "batch_size": batch_size, "max_memory_gb": max_memory_gb, "part_id": part_id, "num_parts": num_parts,
             "overwrite": overwrite}
    params, cfg = _settings(config, overrides, given)
    for name in ("checkpoint_path", "input_path"):
        if getattr(params, name) is None:
            option = name.replace("_", "-")
            raise ConfigError(f"inference_params.{name}: is needed. Pass --{option}, or set it in the file")
    Path(params.output_dir).mkdir(parents=True, exist_ok=True)
    if not workers and dask is None: return _predict_part(params, cfg, device, precision)
    if part_id is not None:
        raise ConfigError("part_id: one part needs no workers. Leave out part_id, or workers and dask")
    n = params.num_parts if params.num_parts > 1 else cpu_count() if workers == -1 else max(1, workers)
    if params.overwrite or not params.resume: # once, not by every part
        _predict_part(params.model_copy(update={"num_parts": n}), cfg, device, precision, begin_only=True)
    jobs = [params.model_copy(update={"num_parts": n, "part_id": k, "overwrite": False, "resume": True})
            for k in range(n)]
    with on_cluster(dask):
        told = pmap(lambda p: _predict_part(p, cfg, device, precision), jobs, workers or n,
                    keys=[f"part {k}" for k in range(n)], desc="predicting parts")
    last = next((t for t in told if t.get("complete")), told[-1])
    return {**last, "patches": sum(t["patches"] for t in told), "parts": n}

# %% [markdown]
# ## From settings to a store
# A rolled sheet again: a short training, then the prediction of the whole volume from its store into another one, in
# one process and in three parts. The bytes are the same.

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
roll, affine = phantoms.sheets((32, 80, 80), 0), affine_from(1.0, axes="zyx")
write_zarr(Volume(roll.img, affine, "zyx"), root/"ct.zarr", chunks=16)
write_zarr(Volume(roll.mask, affine, "zyx"), root/"sheet.zarr", chunks=16)
task = {
    "tr_params": {"model_name": "Sheet", "patch_size": [16, 32, 32], "tr_val_split": 1, "max_steps_per_epoch": 60,
                  "max_epoch": 1, "initial_lr": 4e-3, "num_dataloader_workers": 0, "tensorboard_log_dir": None},
    "inference_params": {"checkpoint_path": "checkpoints/Sheet", "input_path": "ct.zarr", "output_dir": "out",
                         "chunks": [16, 32, 32], "overlap": 0.5},
    "model_config": {"f_maps": [8, 16]},
    "dataset_config": {"volume_paths": [{"input": "ct.zarr", "sheet": "sheet.zarr"}], "use_cache": False,
                       "min_bbox_percent": 0.5, "min_labeled_ratio": 0.05,
                       "targets": {"sheet": {"channels": 1, "activation": "sigmoid"}}}}
write_json(root/"task.json", task)
train(root/"task.json")
told = predict(root/"task.json")
told

# %%
found = open_volume(root/"out"/"predictions.zarr"/"sheet")[...]
plot.montage([roll.img[16], roll.mask[16], found[16]], titles=["image", "sheet", "predicted"])

# %%
both = ((found > 127) & (roll.mask > 0)).sum()
dice = 2*both/((found > 127).sum() + (roll.mask > 0).sum())
assert dice > 0.8, dice
parts = [predict(root/"task.json", output_dir=root/"parts", part_id=k, num_parts=3) for k in (2, 0, 1)]
assert (open_volume(root/"parts"/"predictions.zarr"/"sheet")[...] == found).all() and parts[-1]["complete"]
assert predict(root/"task.json")["patches"] == 0

# %%
with raises(ConfigError, match="--checkpoint-path"): predict(input_path=str(root/"ct.zarr"))
with raises(ConfigError, match="part_id"): predict(root/"task.json", part_id=1, num_parts=2, workers=2)
place.cleanup()
