# %% [markdown]
# # Many data sets, one network
#
# > From two folders of scans that share nothing but a liver to one network that knows the organs of both.
#
# Nobody has labelled everything. One clinic drew liver, spleen and left kidney, another one liver, vertebrae and
# right kidney, each with numbers, names and file layouts of its own. VISTA3D (He et al., *VISTA3D: A Unified
# Segmentation Foundation Model For 3D Medical Imaging*, CVPR 2025) was trained on two dozen such collections at once.
# What comes before such a training, and decides whether it works, is bookkeeping: which image belongs to which label,
# who is held out, what the numbers mean, what is broken. This tutorial goes that way with two small collections,
# makes supervoxels of all scans, and ends with a network that finds an organ in scans of a clinic that never drew it.
#
# The collections are [phantoms](03_phantoms.ipynb), so the truth is known; nothing else in the tutorial depends on
# that.

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from medvol_nb import phantoms, plot
from medvol_nb.analyze import analyze
from medvol_nb.blocks import ConvBlock, ResidualBlock, UpBlock, conv, init_weights
from medvol_nb.core import read_csv, rng_for, write_json
from medvol_nb.datalists import read_datalist
from medvol_nb.grid import Grid, sweep
from medvol_nb.labels import LabelSpace, build_label_space, relabel
from medvol_nb.loader import LoaderSettings, collate_patches, training_dataset
from medvol_nb.recipes import make_datalists
from medvol_nb.sv_batch import batch_infer
from medvol_nb.sv_metrics import supervoxel_metrics
from medvol_nb.sv_points import PointDraw, PointSettings, SupervoxelPointSampler
from medvol_nb.torchcore import Batches, FitConfig, fit, seeded
from medvol_nb.verify import verify
from medvol_nb.volume import Volume, affine_from, read_volume, reorient, resample_to, write_volume

# %% [markdown]
# ## What you have
# *North* keeps its scans as nnU-Net wants them, in RAS, two visits of each patient. *South* has two parallel folders,
# LPS, other voxels. Each says in a `dataset.json` what its numbers mean, in its own words.

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
CLINICS = {"North": {"liver": 1, "spleen": 2, "kidney_left": 3},
           "South": {"vertebrae": 1, "right kidney": 2, "Liver": 5}}
TRUE_NAMES = {"kidney_left": "left kidney", "Liver": "liver"}
PLACES = {"North": ("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"), "South": ("images/{}.nii.gz", "labels/{}.nii.gz")}

def body_of(clinic, k):
    shape, spacing = ((48, 36, 42), 8.0) if clinic == "North" else ((44, 34, 36), (8.5, 8.5, 9.5))
    return phantoms.abdomen(shape, seed=k + 100*(clinic == "South"), spacing=spacing)

def write_scan(clinic, k):
    body = body_of(clinic, k)
    by_name = {name: i for i, name in body.names.items()}
    table = np.zeros(9, np.uint8)
    for name, number in CLINICS[clinic].items(): table[by_name[TRUE_NAMES.get(name, name)]] = number
    case = f"n{k//2:02d}_visit{k % 2 + 1}" if clinic == "North" else f"s{k:02d}"
    for place, data in zip(PLACES[clinic], (body.img, table[body.lbl])):
        path = root/clinic/place.format(case)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_volume(reorient(Volume(data, affine_from(body.spacing)), "RAS" if clinic == "North" else "LPS"), path)
    return case

cases = {clinic: [write_scan(clinic, k) for k in range(6)] for clinic in CLINICS}
for clinic, numbers in CLINICS.items(): write_json(root/clinic/"dataset.json", {"labels": {"background": 0, **numbers}})
sorted(p.relative_to(root).as_posix() for p in root.rglob("*.*"))[::5]

# %%
def show(clinic, title):
    image, label = (reorient(read_volume(root/clinic/p.format(cases[clinic][0])), "RAS") for p in PLACES[clinic])
    return plot.planes(image.data, label.data, image.spacing, limits=(-160, 300), title=title)

show("North", "North: 1 liver, 2 spleen, 3 left kidney")

# %%
show("South", "South: 1 vertebrae, 2 right kidney, 5 liver; colours stand for numbers, not for organs yet")

# %% [markdown]
# And, as in all collections, something is wrong with one of them: a label of South was saved with the wrong place.

# %%
lost = root/"South"/PLACES["South"][1].format("s03")
label = read_volume(lost)
moved = label.affine.copy()
moved[2, 3] += 28.5
write_volume(replace(label.load(), affine=moved), lost, on_exists="overwrite")

# %% [markdown]
# ## Lists
# A data list names pairs, and deals them into a test set and folds. The layout is found out, pairs are matched by
# name and never by position, and what one patient brought stays together if the names tell who it is.
#
# ```bash
# medvol datalists make North lists --group '(n\d+)_visit' --test-ratio 0 --n-folds 3
# medvol datalists make South lists --test-ratio 0 --n-folds 3
# ```

# %%
(root/"lists").mkdir()
made = [make_datalists(root/"North", root/"lists", group=r"(n\d+)_visit", test_ratio=0, n_folds=3),
        make_datalists(root/"South", root/"lists", test_ratio=0, n_folds=3)]
lists = [m["path"] for m in made]
pd.DataFrame([{k: m[k] for k in ("name", "recipe", "folds")} | m["counts"] for m in made]).T

# %%
north, south = map(read_datalist, lists)
folds = {}
for item in north.training: folds.setdefault(item["image"][9:12], set()).add(item["fold"])
assert len(north.training) == len(south.training) == 6 and len(folds) == 3
assert all(len(f) == 1 for f in folds.values())
north.label_dict, south.label_dict, south.training[0]

# %% [markdown]
# ## What is wrong with them
# The verification opens everything, says all it found in one table, and remembers the files it has read. Images and
# labels need not have the same header, but the same place: what counts is how far a corner of one grid is from the
# corner of the other.
#
# ```bash
# medvol datalists verify lists/North_3_folds.json lists/South_3_folds.json --root . --level full --cache cache
# ```

# %%
report = verify(lists, root=root, level="full", cache=root/"cache")
pd.DataFrame(report.findings)[["code", "dataset", "path", "finding"]]

# %%
assert not report.ok and report.counts["E203"] == 1 and {r["dataset"] for r in report.findings} == {"South"}

# %% [markdown]
# Somebody has to look: is the header wrong, or the drawing? Here it is the header, so the label gets that of its
# image. Only this file is read again.

# %%
image = read_volume(root/"South"/PLACES["South"][0].format("s03"))
write_volume(replace(read_volume(lost).load(), affine=image.affine), lost, on_exists="overwrite")
report = verify(lists, root=root, level="full", cache=root/"cache")
assert report.ok
report.counts

# %% [markdown]
# ## One label space
# Each class gets one number for good. Names are compared after spelling, word order and known synonyms have been
# evened out, so *kidney_left* is *left kidney*. `--base empty` starts from nothing; without it the published classes
# of VISTA3D are extended, and keep their numbers.
#
# ```bash
# medvol datalists labels lists/North_3_folds.json lists/South_3_folds.json space --base empty
# ```

# %%
build_label_space(lists, root/"space", base="empty")
space = LabelSpace.load(root/"space"/"label_space.json")
names = [n for n in space.class_names()[1:] if n]
pd.DataFrame([{"class": n, "number": space.resolve(n)} | {
    c: next((k for k, g in space.mapping(c).items() if g == space.resolve(n)), "–") for c in CLINICS} for n in names])

# %%
assert set(names) == {"liver", "spleen", "left kidney", "vertebrae", "right kidney"}
assert space.mapping("North")[1] == space.mapping("South")[5] == space.resolve("liver")

# %% [markdown]
# ## What is in the labels
# Volumes by class, cases by class, and the weights that a balanced training wants. The files were read by the
# verification, so this is instant.
#
# ```bash
# medvol datalists analyze lists/North_3_folds.json lists/South_3_folds.json statistics --root . \
#     --space space/label_space.json --cache cache
# ```

# %%
analyze(lists, root/"statistics", root=root, space=root/"space"/"label_space.json", cache=root/"cache")
table = read_csv(root/"statistics"/"classes.csv")
plot.bars({f"{r['class']} ({r['cases']} cases)": float(r["ml_mean"]) for r in table}, "mL", log=True,
          ids=[int(r["id"]) for r in table], title="mean volume")

# %%
assert {r["class"]: int(r["cases"]) for r in table} == {**dict.fromkeys(names, 6), "liver": 12}

# %% [markdown]
# ## Supervoxels
# Supervoxels are connected pieces of a scan that follow what can be seen in it. In an interactive training they stand
# for the organs nobody drew. The published pipeline clusters the features of a Segment-Anything encoder; with
# `--features intensity` smoothed intensities and edges take their place, which needs no weights and no GPU. The list
# gets a new entry, `label_sv`.
#
# ```bash
# medvol supervoxels batch-infer --datalist lists/North_3_folds.json --basedir North --output-dir North/sv \
#     --n-segments 120 --features intensity --write-datalist lists_sv/North_3_folds.json
# ```

# %%
with_sv = {}
(root/"lists_sv").mkdir()
for path, clinic in zip(lists, CLINICS):
    with_sv[clinic] = root/"lists_sv"/Path(path).name
    batch_infer(path, root/clinic, output_dir=root/clinic/"sv", n_segments=120, features="intensity",
                write_datalist=with_sv[clinic])
item = read_datalist(with_sv["North"]).training[0]
image, pieces = (read_volume(root/"North"/item[k]).load() for k in ("image", "label_sv"))
plot.planes(image.data, pieces.data, image.spacing, at=(31, 14, 22), limits=(-160, 300),
            title=f"{pieces.data.max()} supervoxels of {item['image']}")

# %% [markdown]
# Had one to paste a segmentation of *all* organs together from these pieces, this share of voxels would be right
# (ASA). None is torn, and every scan has its supervoxels, in all folds.

# %%
k = cases["North"].index(item["image"][9:19])
told = supervoxel_metrics(pieces.data, body_of("North", k).lbl, image.spacing)
assert told["asa"] > 0.9 and told["disconnected"] == 0 and pieces.data.max() == 120
assert all("label_sv" in i for p in with_sv.values() for i in read_datalist(p).training)
{k: round(told[k], 3) for k in ("asa", "ue", "br")}

# %% [markdown]
# What they are for: an interactive network is given points and shall answer with an object. If it is only ever asked
# for labelled organs, it learns that nothing else exists. So now and then it is asked for a supervoxel *outside* all
# labels, an object without a name, under a number of its own.

# %%
lbl = relabel(read_volume(root/"North"/item["label"]).load().data, space.lut("North"))
sampler = SupervoxelPointSampler(PointSettings(min_voxels=100, margin=2))
asked = sampler.apply(lbl, pieces.data, [PointDraw(1, "zeroshot_unseen", seed=1)])
(prompt,) = asked.prompts
plot.planes(image.data, np.where(asked.lbl == 513, 8, asked.lbl), image.spacing, at=prompt.points[0],
            limits=(-160, 300), title=f"an object without a name, for points {prompt.points.tolist()}")

# %%
assert prompt.mode == "zeroshot_unseen" and prompt.target == 513 and (asked.lbl == 513).sum() > 100
assert not lbl[asked.lbl == 513].any() and all(asked.lbl[tuple(p)] == 513 for p in prompt.points)

# %% [markdown]
# ## Patches
# The loader brings all cases to one orientation, one voxel size, one intensity scale and one label space, draws both
# collections equally often, and cuts patches in which rare classes are as frequent as common ones. Fold 0 is *held
# out*. (`augment=False` leaves out the random transforms of the published lists, which need MONAI.)
#
# The patches are smaller than the scans on purpose, even though these would fit into memory: from whole scans a
# network learns *where* South's vertebrae are in its pictures, and does not find them in North's.

# %%
settings = LoaderSettings(patch_size=(24, 20, 24), patches_per_image=1, spacing=12.0, margin=2, augment=False,
                          cache_items=8)
folders = {clinic: root/clinic for clinic in CLINICS}
train, held_out = (training_dataset(list(with_sv.values()), folders, space, fold_idx=0, held_out=h, settings=settings)
                   for h in (False, True))
draws = [train.draw(i, rng_for(1, i)) for i in range(len(train))]

def cut(draw, key):
    richest = max(range(20), key=lambda y: len(np.unique(draw["label"][0, 0, :, y])))
    return np.rot90(draw[key][0, 0, :, richest])

plot.montage([cut(d, "image") for d in draws], 4, limits=(0.4, 0.65), alpha=0.35, width=6,
             lbls=[cut(d, "label") for d in draws], titles=[d["dataset_name"] for d in draws])

# %%
assert len(train) == 8 and len(held_out) == 4 and not set(train.keys) & set(held_out.keys)
assert all(d["image"].shape == (1, 1, 24, 20, 24) and d["has_label_sv"] for d in draws)

# %% [markdown]
# ## One network for both
# A voxel of North that is not labelled may be a vertebra; North does not say. So each class is a question of its own,
# and a patch is only asked about classes that its collection knows. The loss of the rest is not computed. What is
# left is ordinary: a small U-Net from the library's [blocks](09_blocks.ipynb), cross-entropy plus Dice, and [the
# loop](08a_torchcore.ipynb) that trains everything here.

# %%
class UNet(nn.Module):
    def __init__(self, n_classes, widths=(8, 16, 32)):
        super().__init__()
        steps = list(zip((widths[0], *widths), widths, (1, 2, 2)))
        self.stem, self.head = ConvBlock(1, widths[0]), conv(3, widths[0], n_classes, 1)
        self.down = nn.ModuleList(ResidualBlock(a, b, stride=s) for a, b, s in steps)
        self.up = nn.ModuleList(UpBlock(b, a, a, fit="fit") for a, b in zip(widths, widths[1:]))

    def forward(self, x):
        x, skips = self.stem(x), []
        for level in self.down: skips.append(x := level(x))
        for level, skip in zip(reversed(self.up), reversed(skips[:-1])): x = level(x, skip)
        return self.head(x)

classes = range(1, len(names) + 1)
knows = {clinic: torch.tensor([g in space.mapping(clinic).values() for g in classes]) for clinic in CLINICS}

def loss(model, batch):
    answers = model(batch["image"])
    truth = torch.cat([batch["label"] == g for g in classes], 1).float()
    asked = torch.stack([knows[c] for c in batch["dataset_name"]])[:, :, None, None, None].expand_as(truth)
    p = torch.sigmoid(answers)*asked
    truth = truth*asked
    dice = 2*(p*truth).sum((0, 2, 3, 4))/((p**2 + truth).sum((0, 2, 3, 4)) + 1)
    return F.binary_cross_entropy_with_logits(answers[asked], truth[asked]) + 1 - dice.mean()

# %%
with seeded(0, "network"): net = init_weights(UNet(len(names)))
nn.init.constant_(net.head.bias, -2)
batches = Batches(train, 2, seed=0, weights=train.weights(), collate=collate_patches)
run = fit(net, batches, loss, FitConfig(steps=110, lr=1e-2, warmup_steps=10, tensorboard=False, device="cpu"),
          out_dir=root/"run")
losses = [float(r["loss"]) for r in run.log]
plot.curves({"loss": losses}, xlabel="step", ylabel="loss", height=2.2)

# %%
assert np.mean(losses[-20:]) < 0.7*np.mean(losses[:20])

# %% [markdown]
# ## What it finds
# The held-out scans are predicted patch by patch with blended borders, and brought back to the grid of the file. In
# the table a star marks what the clinic of this scan never drew.

# %%
def find(image, like):
    ask = lambda x: torch.sigmoid(net(torch.from_numpy(x))).numpy()
    with torch.no_grad(): p = sweep(ask, image.data, Grid(image.shape, settings.patch_size, 0.5))
    return resample_to(Volume(p, image.affine, "cxyz"), like.affine, like.shape).data > 0.5

net.eval()
found, rows, strangers = {}, [], []
for i, item in enumerate(held_out.items):
    clinic, name = item["dataset_name"], Path(item["image"]).name.removesuffix(".nii.gz").removesuffix("_0000")
    scan = reorient(read_volume(item["image"]), "RAS").load()
    found[name] = scan, find(held_out.case(i)["image"], scan)
    body = body_of(clinic, cases[clinic].index(name))
    by_name, row = {n: k for k, n in body.names.items()}, {"scan": name, "clinic": clinic}
    for g, n in zip(classes, names):
        truth, mask = body.lbl == by_name[n], found[name][1][g - 1]
        dice = 2*(truth & mask).sum()/(truth.sum() + mask.sum())
        row[n] = f"{dice:.2f}" + "*"*(not knows[clinic][g - 1])
        if not knows[clinic][g - 1]: strangers.append(dice)
    rows.append(row)
pd.DataFrame(rows)

# %%
def show_found(name, title):
    scan, masks = found[name]
    lbl = np.where(masks.any(0), masks.argmax(0) + 1, 0)
    return plot.planes(scan.data, lbl, scan.spacing, limits=(-160, 300), title=title,
                       at=np.argwhere(masks[names.index("right kidney")]).mean(0).round().astype(int))

show_found(rows[0]["scan"], "North, held out: vertebrae and right kidney are found, though North never drew them")

# %%
show_found(rows[-1]["scan"], "South, held out: spleen and left kidney are found, though South never drew them")

# %%
assert np.mean(strangers) > 0.5
place.cleanup()

# %% [markdown]
# ## What was different in the original
# | original | here |
# |---|---|
# | `data.make_datalists`: 42 functions, fixed folders, pairs by position | recipes, pairs by name (`datalists make`) |
# | 80/20 and five folds, seed 20230808, each scan on its own | the same numbers, patients stay together |
# | `data.datasets` looks whether files exist, up to the first that does not | headers, voxels, leaks; one table |
# | `label_dict.json`: ids in order of appearance; an old file is kept as it is | ids are only ever added |
# | a class without a global id keeps its number, and becomes another organ | it is ignored by the loss |
# | `data.analyzer` resamples every label to 1.5 mm | one pass, shared with the verification |
# | "fold 0 is used for training", says the manual; the code holds it out | fold 0 is held out |
# | `slic_process_sam`: a patched segment-anything with ViT-H; fold 0 gets none | any SAM weights, or none; all folds |
# | SLIC at full resolution, 25 minutes for 512×512×300 (estimated) | at 2 mm, half a minute |
#
# `medvol datalists make --legacy` writes the published lists, `medvol supervoxels infer --legacy` follows the
# published steps. The network of VISTA3D itself is not part of this library; the loader and the point sampler feed
# it.

# %% [markdown]
# ## On your data, on a GPU
# Published trainings used patches of 128³ at 1.5 mm, two from each image, and 100 supervoxels for most collections.
# The encoder of a published SAM model is the expensive part: ViT-B takes 0.97 TFLOP a slice and ViT-H 5.96, and a
# scan of 512×512×300 has 1,324 slices in three directions, or 625 on a grid of 2 mm. Estimated at 100 TFLOP/s, that
# is 13 seconds for ViT-B and 79 for ViT-H at full resolution, and on one core 40 hours for ViT-H, which is why
# `--dry-run` tells the cost first. The weights are [yours to bring](21_samweights.ipynb).
#
# ```bash
# medvol datalists make /data/AMOS22 lists
# medvol datalists verify lists/AMOS22_5_folds.json --root /data/AMOS22 --level full --workers -1 --cache cache \
#     --out findings
# medvol datalists labels lists/AMOS22_5_folds.json space
# medvol datalists analyze lists/AMOS22_5_folds.json statistics --root /data/AMOS22 --space space/label_space.json \
#     --cache cache
# medvol supervoxels batch-infer --datalist lists/AMOS22_5_folds.json --basedir /data/AMOS22 \
#     --output-dir /data/AMOS22/sv --n-segments 100 --checkpoint sam_vit_b_01ec64.pth --dry-run
# medvol supervoxels batch-infer --datalist lists/AMOS22_5_folds.json --basedir /data/AMOS22 \
#     --output-dir /data/AMOS22/sv --n-segments 100 --checkpoint sam_vit_b_01ec64.pth \
#     --write-datalist lists_sv/AMOS22_5_folds.json
# ```
#
# The loader is `training_dataset([...], {"AMOS22": "/data/AMOS22", ...}, LabelSpace.load(...), fold_idx=0)` with no
# settings at all: the defaults are the published ones. More about it in [its page](14a_loader.ipynb), about
# supervoxels in [theirs](22_supervoxels.ipynb).
