# %% [markdown]
# # A network for volumes larger than memory
#
# > From a huge, sparsely labelled zarr volume to predictions of another one, in the memory that there is.
#
# A scan of a Herculaneum scroll has a trillion voxels. Somewhere in it, somebody has traced a few sheets of papyrus,
# and noted which way they face. Two things are wanted everywhere else: *where is papyrus*, and *which way does it
# face*. The second tells a sheet's front from its back and leads from one winding to the next; as a vector it must be
# turned whenever a patch is turned. The system followed here, `multi-task-3d-resencoder-unet` of the Vesuvius
# Challenge, does both with one 3-D U-Net and one file of settings. This tutorial goes from the volume to the
# predictions. Nothing in it ever opens a whole volume: what works here on a roll of 48 × 128 × 128 voxels works on a
# trillion with the same commands.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from medvol_nb import phantoms, plot
from medvol_nb.core import ConfigError, read_csv, rng_for, write_json
from medvol_nb.stores import write_zarr
from medvol_nb.volume import Volume, affine_from
from medvol_nb.zarrnet.augment import Augment
from medvol_nb.zarrnet.config import ZarrConfig
from medvol_nb.zarrnet.data import VolumeDataset
from medvol_nb.zarrnet.geometry import decode_normals, encode_normals, normals_rgb
from medvol_nb.zarrnet.io import open_volume
from medvol_nb.zarrnet.patches import find_patches_command, patch_list
from medvol_nb.zarrnet.predict import predict
from medvol_nb.zarrnet.train import train

# %% [markdown]
# ## What you have
# Two rolls of [phantom sheets](03_phantoms.ipynb), each a zarr store of chunks of 32³. Axes are $(z, y, x)$. Of the
# first roll one part was traced: a store with the sheets, and one with three channels for their normals, $x$ first,
# as 16-bit numbers. The second roll was never labelled; its truth is kept aside to judge the result.

# %%
place = tempfile.TemporaryDirectory()
root, affine = Path(place.name), affine_from(1.0, axes="zyx")
traced, other = phantoms.sheets((48, 128, 128), seed=0), phantoms.sheets((48, 96, 96), seed=1)
known = np.zeros(traced.mask.shape, bool)
known[:, 16:, :88] = True
for name, data, axes in (("roll1", traced.img, "zyx"), ("roll1_sheet", 255*traced.mask*known, "zyx"),
                         ("roll1_normals", encode_normals(traced.normals[::-1]*known), "czyx"),
                         ("roll2", other.img, "zyx")):
    write_zarr(Volume(data.astype(np.uint16 if "normals" in name else np.uint8), affine, axes), root/f"{name}.zarr",
               chunks=32)
plot.montage([traced.img[24], (traced.mask*known)[24], normals_rgb((traced.normals[::-1]*known)[:, 24]), other.img[24]],
             4, titles=["roll 1", "traced sheets", "their normals", "roll 2"])

# %% [markdown]
# ## One file of settings
# The file has the sections and keys of the original. Paths are relative to the file. Every target gets a decoder and
# a loss that fits it: `sheet` has one channel, so it is a mask; `normals` has three and this name, so its loss is the
# cosine, on traced voxels only. `loss_only_on_label` says that the sheet, too, is only judged near what was traced,
# because elsewhere nobody looked.

# %%
task = {
    "tr_params": {"model_name": "Roll", "patch_size": [16, 32, 32], "batch_size": 2, "tr_val_split": 0.8,
                  "val_block": [16, 32, 32], "max_epoch": 1, "max_steps_per_epoch": 80, "max_val_steps_per_epoch": 4,
                  "initial_lr": 6e-3, "label_smoothing": 0.0, "loss_only_on_label": True, "num_dataloader_workers": 0,
                  "tensorboard_log_dir": None, "ckpt_out_base": "checkpoints", "debug_gif_every": 0},
    "inference_params": {"checkpoint_path": "checkpoints/Roll", "input_path": "roll2.zarr", "output_dir": "out",
                         "overlap": 0.25, "chunks": [16, 32, 32], "num_dataloader_workers": 1},
    "model_config": {"f_maps": [12, 24, 48], "num_levels": 3, "blocks_per_level": [1, 1, 1], "decoder": "shared"},
    "dataset_config": {
        "min_bbox_percent": 0.8, "min_labeled_ratio": 0.2, "use_cache": True, "cache_file": "patches.json",
        "augmentation": {"deform": {"p": 0}},
        "volume_paths": [{"input": "roll1.zarr", "sheet": "roll1_sheet.zarr", "normals": "roll1_normals.zarr",
                          "ref_label": "sheet"}],
        "targets": {"sheet": {"channels": 1, "activation": "sigmoid", "weight": 1},
                    "normals": {"channels": 3, "activation": "none", "weight": 0.75}}}}
write_json(root/"task.json", task)
cfg = ZarrConfig.load(root/"task.json")
{name: target.kind for name, target in cfg.targets.items()}

# %% [markdown]
# Wrong settings are refused before anything is opened, all at once, and by their path in the file. The original took
# unknown keys for granted and so ignored several that its own manual named.

# %%
wrong = {**task, "tr_params": {**task["tr_params"], "patch_size": [16, 32, 30], "batchsize": 4}}
write_json(root/"wrong.json", wrong)
try: ZarrConfig.load(root/"wrong.json")
except ConfigError as e: print(str(e).replace(str(root) + "/", ""))

# %%
assert cfg.tr_params.patch_size == (16, 32, 32) and [t.weight for t in cfg.targets.values()] == [1, 0.75]

# %% [markdown]
# What a network costs, level by level, is told before anything is trained:
#
# ```bash
# medvol unet summary --config task.json
# ```

# %% [markdown]
# ## Patches worth training on
# Most of a huge volume holds no label. A patch is taken if the box around its labelled voxels fills most of it
# (`min_bbox_percent`) and enough of its voxels are labelled (`min_labeled_ratio`). Every stored chunk is read once,
# chunks that were never written not at all, and the list is kept until something changes on which it depends.
#
# ```bash
# medvol unet find-patches --config task.json
# ```

# %%
told = find_patches_command(root/"task.json")
patches = patch_list(cfg)
fig, ax = plt.subplots(figsize=(4, 4))
ax.imshow(traced.img[8], cmap="gray")
ax.imshow(np.ma.masked_equal((traced.mask*known)[8], 0), cmap="autumn", alpha=0.5)
for z, y, x in patches.starts:
    if z == 0: ax.add_patch(plt.Rectangle((x + 0.5, y + 0.5), 31, 31, fill=False, color="tab:cyan", lw=1))
ax.set(xticks=[], yticks=[], title=f"{len(patches)} patches, those with z = 0")
told

# %%
inside = [known[tuple(slice(a, a + p) for a, p in zip(s, patches.patch_size))].mean() for s in patches.starts]
assert len(patches) > 20 and min(inside) > 0.5 and patches.counts.min() >= 0.2*16*32*32

# %% [markdown]
# ## Turning what has a direction
# Patches are flipped and turned to make few of them go further. A mask only moves. The numbers of a normal change as
# well: mirrored along $x$ its first component changes its sign. Below, one patch as it is stored, and three random
# draws of it. The normals, in colours, keep pointing from the dark side of a sheet to its bright one. [Their
# page](53_zarrnet_geometry.ipynb) checks that with fields whose gradient is known.
#
# ```bash
# medvol unet preview --config task.json --out preview
# ```

# %%
bare = VolumeDataset(cfg, patches)
k = int(patches.counts.argmax())
samples = [bare[k]]
data = VolumeDataset(cfg, patches, augment=Augment(cfg.dataset_config.augmentation, bare.kinds),
                     normalizer=bare.normalizer)
samples += [data.draw(k, rng_for(s, "look")) for s in range(3)]
plot.montage([t for s in samples for t in (s["image"][0, 8], normals_rgb(s["normals"])[8])], 8,
             titles=[t for k in ("stored", "draw 1", "draw 2", "draw 3") for t in (k, "its normals")])

# %%
def uphill(sample):
    "How far brightness grows along the normals"
    on = sample["sheet"][0] > 0
    return float((np.stack(np.gradient(sample["image"][0])[::-1])*sample["normals"]).sum(0)[on].mean())

assert all(uphill(s) > 0.02 for s in samples)
[round(uphill(s), 2) for s in samples]

# %% [markdown]
# ## Training
# The patches are divided into blocks for training and for validation that share no voxel. Interrupted, the same
# command goes on where it stopped.
#
# ```bash
# medvol unet train --config task.json --dry-run
# medvol unet train --config task.json
# ```

# %%
plan = train(root/"task.json", dry_run=True)
done = train(root/"task.json")
losses = [float(r["loss"]) for r in read_csv(Path(done["run"])/"log.csv")]
smooth = np.convolve(losses, np.ones(10)/10, "valid")
plot.curves({"loss": losses, "mean of 10 steps": (np.arange(9, 80), smooth)}, xlabel="step", ylabel="loss", height=2.2)

# %%
{k: v for k, v in plan.items() if k != "run"}, {k: v for k, v in done["last"].items() if k.startswith("val_")}

# %%
assert plan["val"] > 0 and done["steps"] == 80 and smooth[-1] < 0.8*smooth[0]

# %% [markdown]
# ## Predictions of the other roll
# The prediction goes through the store patch by patch, keeps a few planes of sums, and writes every chunk once. How
# much it may keep is said in gigabytes; a volume can be divided into parts for as many processes or machines, and the
# borders of the parts do not show: they are the same bytes. The last part to end closes the output.
#
# ```bash
# medvol unet predict --config task.json --num-parts 2 --part-id 0
# medvol unet predict --config task.json --num-parts 2 --part-id 1
# ```

# %%
parts = [predict(root/"task.json", num_parts=2, part_id=k, max_memory_gb=0.05) for k in range(2)]
at_once = predict(root/"task.json", output_dir=root/"at_once")
stores = {name: open_volume(root/"out"/"predictions.zarr"/name) for name in cfg.targets}
{name: (v.shape, str(v.dtype), v.channels) for name, v in stores.items()}, [p["patches"] for p in parts]

# %%
sheet, normals = stores["sheet"][...], decode_normals(stores["normals"][...])
again = open_volume(root/"at_once"/"predictions.zarr"/"sheet")[...]
assert parts[-1]["complete"] and np.array_equal(sheet, again) and predict(root/"task.json", num_parts=2)["patches"] == 0

# %% [markdown]
# A sheet is predicted as a probability in bytes, a normal as three 16-bit numbers. The truth that was kept aside:

# %%
truth, on = other.normals[::-1], other.mask > 0
plot.montage([other.img[24], other.mask[24], sheet[24], normals_rgb(truth[:, 24]),
              normals_rgb(np.where(on, normals, 0)[:, 24])], 5,
             titles=["roll 2", "its sheets", "predicted", "their normals", "predicted"])

# %% [markdown]
# The last figure is the one that no edge filter can have: a filter finds the direction of a sheet, but not its front.

# %%
found = sheet > 127
angle = np.degrees(np.arccos(np.clip((normals*truth).sum(0)[on], -1, 1)))
figures = {"Dice": 2*(found & on).sum()/(found.sum() + on.sum()), "median angle [degree]": np.median(angle),
           "front and back confused": (angle > 90).mean()}
assert figures["Dice"] > 0.7 and figures["median angle [degree]"] < 45 and figures["front and back confused"] < 0.35
place.cleanup()
{k: round(float(v), 2) for k, v in figures.items()}

# %% [markdown]
# ## What was different in the original
# `multi-task-3d-resencoder-unet` at the state that its README describes.
#
# | original | here |
# |---|---|
# | unknown keys are ignored; both thresholds have no effect where documented | refused by name; they act |
# | `ignore_label`, `dilate_label`, `loss_only_on_label`, `load_weights_only` are not used | they are |
# | the patch finder decodes a chunk about 68 times for the published patch | once |
# | the list of patches is trusted whatever changed | made again, and says what changed |
# | patches divided at random at every start: 97 % of validation voxels are trained on | in blocks: none is |
# | 16-bit normals are scaled twice, so all of them become one diagonal | decoded once, unit length, 0 stays 0 |
# | a 0/1 mask in bytes becomes 0 and 0.004 | a mask is what is not 0 |
# | z-score of every patch | statistics of the volume, kept with the weights |
# | activation inside the network, in training too | only in predictions |
# | a missing checkpoint means training from scratch | an error |
# | prediction: sums and counts on disk, rewritten for every patch; no resuming | chunks written once; goes on |
# | its network, 23 % of whose parameters are never used | `preset: seed` in `model_config`, without these |

# %% [markdown]
# ## On your data, on a GPU
# The published example has patches of 64 × 192 × 192, batches of 4, six levels of 32 to 528 channels, and 500 epochs
# of 500 steps. With the four-level network (32 to 256 channels) a training sample of that size takes about 4.6 TFLOP,
# so a GPU that sustains 50 TFLOP/s sees 11 samples a second and needs about a day for the million samples
# (estimated). A prediction takes about 18 ms per million voxels at that speed: five hours for a trillion voxels, on
# one GPU. Store training copies with plain zstd in chunks of 64³, or of 32³ in shards; the loading processes must keep
# up with about 200 MB a second.
#
# ```bash
# medvol unet find-patches --config task.json --workers -1
# medvol unet summary --config task.json --overrides tr_params.batch_size=4
# torchrun --standalone --nproc-per-node 4 -m medvol_nb.cli unet train --config task.json
# medvol unet predict --config task.json --num-parts 8 --part-id 3 --max-memory-gb 2
# ```
#
# A run that was interrupted is started with the same line. What settings there are is told in
# [their page](51a_zarrnet_config.ipynb), how to look at a prediction in [another one](59a_zarrnet_browse.ipynb).
