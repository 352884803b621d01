# %% [markdown]
# # Learning from scans that never were
#
# > Shapes of organs become scenes, each scene is rendered twice, and a network learns what both pictures share.
#
# A network that shall work with any scanner must not learn what grey values mean, since the next scanner gives them
# another meaning. anatomix (Dey et al., *Learning General-Purpose Biomedical Volume Representations using Randomized
# Synthesis*, ICLR 2025) draws the conclusion: train with pictures whose grey values mean nothing. Shapes are cut out
# of segmentations and thrown together at random. Each such scene is rendered twice, every shape with a grey level, a
# texture and a noise of its own, under other shading and resolution. A network gets points of both pictures and must
# give those of one shape alike features, whatever they look like. It has then learnt boundaries, shapes and
# neighbourhoods, and its features serve registration and segmentation with few labels. This tutorial goes from a
# folder of organ masks to the features of a scan, in the three steps of the original.

# %%
import tempfile
from pathlib import Path

import numpy as np

from medvol_nb import phantoms, plot
from medvol_nb.blocks import count_parameters
from medvol_nb.synth.contrast import build_network, load_network
from medvol_nb.synth.features import compare_probes, features, pca_colours
from medvol_nb.synth.generate import ensembles, pack, views
from medvol_nb.synth.pairfile import array_digest
from medvol_nb.synth.pretrain import pretrain
from medvol_nb.synth.stores import open_pairs
from medvol_nb.synth.templates import TemplateBank, templates
from medvol_nb.volume import Volume, affine_from, read_volume, write_volume

# %% [markdown]
# ## What you have
# Masks of organs, one file each, in the folders of TotalSegmentator: `<case>/segmentations/<organ>.nii.gz`. Here they
# come from four [phantoms](03_phantoms.ipynb) with voxels of 6 mm, since nobody waits for 1.5 mm on one core. Ribs
# and vertebrae come in pieces, and one mask is empty because the organ was not in the picture.

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
for k in range(4):
    body = phantoms.abdomen((64, 48, 56), seed=k)
    masks = {name.replace(" ", "_"): body.lbl == i for i, name in body.names.items()}
    ribs, spine = masks.pop("ribs"), masks.pop("vertebrae")
    left, low = (np.arange(64) < 32)[:, None, None], np.arange(56) < 28
    masks |= {"rib_left_5": ribs & left, "rib_right_5": ribs & ~left, "vertebrae_L1": spine & low,
              "vertebrae_T9": spine & ~low, "pancreas": ribs & False}
    (root/"masks"/f"s{k:04d}"/"segmentations").mkdir(parents=True)
    for name, mask in masks.items():
        write_volume(Volume(mask.astype(np.uint8), affine_from(6.0)),
                     root/"masks"/f"s{k:04d}"/"segmentations"/f"{name}.nii.gz")
sorted(p.name for p in (root/"masks"/"s0000"/"segmentations").iterdir())

# %% [markdown]
# ## Step 0: a bank of shapes
# The masks are read once, merged (all ribs are one shape, all vertebrae another), cut to their boxes and packed, a
# bit a voxel. The folder of masks is left as it is.
#
# ```bash
# medvol synth templates --totalsegmentator-path masks --out bank
# ```

# %%
told = templates(root/"bank", totalsegmentator_path=[str(root/"masks")], max_workers=0)
bank = TemplateBank.open(root/"bank")

def framed(shape, side=40):
    "How thick the shape is, seen from the front, in the middle of a square"
    view = shape.sum(1).T[::-1][:side, :side]
    (top, bottom), (left, right) = (((side - n)//2, side - n - (side - n)//2) for n in view.shape)
    return np.pad(view, ((top, bottom), (left, right)))

plot.montage([framed(bank[i]) for i in range(8)], 8, titles=[n.replace("_", " ") for n in bank.names[:8]])

# %%
assert len(bank) == 4*8 and bank.names.count("vertebrae") == 4 and "pancreas" not in bank.names
{k: told[k] for k in ("templates", "bytes") if k in told}

# %% [markdown]
# ## Step 1: scenes
# A scene takes some shapes, turns, stretches and shears each, and paints one over the other. Two of three are cut out
# by a warped ball, as a body ends somewhere, and half of these get a skin. Colours are labels; they name nothing.
#
# ```bash
# medvol synth ensembles --templatedir bank --savedir labels --n-ensembles 24 --side-length 48 \
#     --min-templates 14 --max-templates 24
# ```

# %%
few = dict(n_ensembles=24, side_length=48, min_templates=14, max_templates=24, workers=0, backend="torch")
ensembles(templatedir=root/"bank", savedir=root/"labels", **few)
scenes = [read_volume(p).load().data for p in sorted((root/"labels").glob("*.nii.gz"))]
middle = lambda a: np.asarray(a)[:, :, 24].T
plot.montage([np.full((48, 48), 128)]*8, 8, lbls=[middle(s) for s in scenes[:8]], alpha=1, limits=(0, 255))

# %% [markdown]
# A scene depends on its number and the seed, and on nothing else: neither on the number of processes nor on what was
# made before. So a data set can be made in parts, continued, and made larger without repeating itself.

# %%
again = ensembles(templatedir=root/"bank", savedir=root/"part", start_idx=5, end_idx=7, **few)
parts = [array_digest(read_volume(p).load().data) for p in sorted((root/"part").glob("*.nii.gz"))]
assert len(scenes) == 24 and len(parts) == 2 and set(parts) <= {array_digest(s) for s in scenes}
again

# %% [markdown]
# ## Step 2: two pictures of each
# Grey level and noise of every label, texture, shading, spikes, contrast, blur, ringing and resolution are drawn anew
# for each picture. Only the borders are common to both.
#
# ```bash
# medvol synth views --ensembledir labels --savedir views
# ```

# %%
views(ensembledir=root/"labels", savedir=root/"views", workers=0)
pictures = [[read_volume(p).load().data for p in sorted((root/"views"/f"view{v}").glob("*.nii.gz"))] for v in (1, 2)]
plot.montage([middle(p) for p in [*pictures[0][:8], *pictures[1][:8]]], 8, title="above view 1, below view 2")

# %%
likeness = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(*pictures)]
assert len(likeness) == 24 and abs(np.mean(likeness)) < 0.5
f"correlation of the two views: mean {np.mean(likeness):.2f}, from {min(likeness):.2f} to {max(likeness):.2f}"

# %% [markdown]
# ## Step 3: one file
# Pictures and labels are matched by name and packed, with checksums, into the HDF5 files that the original's training
# reads. Four scenes are held out. (`medvol synth generate` does steps 1 to 3 at once, without files in between.)
#
# ```bash
# medvol synth pack --view1-dir views/view1 --view2-dir views/view2 --seg-dir labels --out-dir h5 --val-count 4
# ```

# %%
pack(view1_dir=root/"views"/"view1", view2_dir=root/"views"/"view2", seg_dir=root/"labels", out_dir=root/"h5",
     val_count=4)
train, held_out = (open_pairs(root/"h5", split) for split in ("train", "val"))
assert (len(train), len(held_out)) == (20, 4) and held_out.verify()["ok"]
{k: (v.shape, str(v.dtype)) for k, v in train[0].items()}

# %% [markdown]
# ## Pretraining
# At several depths of a U-Net, points of both pictures are compared: vectors of points with the same label, in either
# picture, shall be alike, and unlike all others (supervised contrastive loss). The network sees crops of 24³, and is
# tiny.
#
# ```bash
# medvol synth pretrain h5 --out pretrained --overrides crop_size=24 network.width=8 network.levels=2 \
#     fit.steps=90 fit.lr=5e-3
# ```

# %%
small = ["crop_size=24", "val_pairs=2", "network.width=8", "network.levels=2", "contrast.points=128",
         "contrast.projector_width=64", "augment.p_flip=1", "fit.steps=90", "fit.lr=5e-3", "fit.schedule=constant",
         "fit.validate_every=90", "fit.tensorboard=false"]
done = pretrain(root/"h5", out=root/"pretrained", overrides=small, device="cpu")
trained = load_network(root/"pretrained", "cpu")
{k: done[k] for k in ("steps", "finished")}, count_parameters(trained.net)

# %% [markdown]
# In so short a run the loss tells little: it depends on how many labels a crop happens to hold. What counts is what
# the features are good for. A *linear probe* learns the labels of a held-out scene from some voxels and is asked
# about others of the same picture; whether a voxel's features are more useful than its grey value shows at once.

# %%
fresh = build_network(trained.net.cfg, 0).eval()
probes = compare_probes({"untrained": fresh, "trained": trained.net}, held_out)
found = {name: p["same_view"] for name, p in probes.items()}
plot.bars({"guessing": probes["grey"]["chance"], **found}, title="labels of held-out scenes found by a linear probe")

# %%
assert found["trained"] > 0.08 + max(found["grey"], found["untrained"])

# %% [markdown]
# ## Features of a scan
# The network has never seen a scan. Now it gets two, and every voxel becomes sixteen numbers. The picture shows their
# three main directions as colours, the same for both patients. Much of what varies is *where* a voxel is, which so
# small a network can tell by the borders of the picture; edges and organs are in it, too. Whether such features help
# with a task of yours takes a training of real length to say: so short a one beats grey values on scans with some
# seeds, and with others it does not.
#
# ```bash
# medvol synth features --image-file scans/p8.nii.gz --image-file scans/p9.nii.gz --checkpoint pretrained
# ```

# %%
(root/"scans").mkdir()
scans = {f"p{k}": phantoms.abdomen((48, 36, 42), seed=k) for k in (8, 9)}
for name, p in scans.items():
    write_volume(Volume(np.clip(p.img, -160, 300), affine_from(p.spacing)), root/"scans"/f"{name}.nii.gz")
features(sorted((root/"scans").iterdir()), checkpoint=root/"pretrained", output_dir=root/"features", overlap=0.25,
         device="cpu")
made = [read_volume(root/"features"/f"{n}.nii.gz").load().data for n in scans]
upright = lambda a: np.swapaxes(a[:, 11], 0, 1)[::-1]
pairs = zip(scans.values(), pca_colours(*made))
plot.montage([upright(v) for p, colours in pairs for v in (np.clip(p.img, -160, 300), colours)], 4,
             titles=["a patient", "its features", "another patient", "its features"])

# %%
assert made[0].shape == (16, 48, 36, 42) and np.isfinite(made[1]).all()
place.cleanup()

# %% [markdown]
# ## What was different in the original
# | original | here |
# |---|---|
# | `step0_preprocess_totalsegmentator.py` deletes and merges masks in place; a damaged mask loses its case | a bank |
# | `step1_generate_labels.py`: crops and resamples whole masks for every shape | 50 times faster, the same voxels |
# | `step2_generate_views.py`: the same seed gives other pictures | the same bytes, 7 times faster |
# | no seed; a data set that is extended repeats a tenth of its scenes | a scene depends on seed and number |
# | no resuming; an interrupted run leaves torn files | goes on where it stopped |
# | `step3_generate_h5_w_segs.py` pairs sorted lists by position | by name, with checksums |
# | `--max_workers`, `--n_ensembles`, `--templatedir` ... | the same names; also `--shard 2/8` and `--dask` |
# | pretraining needs a GPU and a batch of one pair | any device, any batch, several processes |
#
# The default preset, `anatomix`, follows the original's drawing exactly, with its quirks: the first shape of a scene
# is invisible, and shapes repeat periodically. `--preset medvol` repairs them.

# %% [markdown]
# ## On your data, on a GPU
# The published data set was made from the 1,204 subjects of TotalSegmentator 1 (Zenodo record 6802614): 45,000
# shapes, 120,000 scenes of 128³, 755 GB of HDF5. The original needed about 375 core-hours for it. Here a scene and
# its two pictures take about 0.2 seconds of one core, less than ten core-hours in all, and a store of compressed
# parts takes about half of the space. Five passes over 120,000 pairs, one pair a step, are 600,000 steps; the
# defaults of `medvol synth pretrain` are the published ones.
#
# ```bash
# medvol synth templates --totalsegmentator-path Totalsegmentator_dataset --out bank
# medvol synth generate --out pairs --templatedir bank --n-ensembles 120000 --shard 1/8
# medvol synth pretrain pairs --out pretrained --device cuda --workers 8 --overrides fit.precision=bf16
# medvol synth features --image-file scan.nii.gz --checkpoint pretrained --normalizer ct:-450,450
# ```
#
# Each of eight machines makes a part of the pairs; whoever finishes last closes the store. `--checkpoint` takes the
# published weights, too: [features of any volume](44b_synth_features.ipynb). What to do with a few labelled scans is
# told in [few-shot segmentation](44c_synth_fewshot.ipynb).
