# %% [markdown]
# # Finding the same place in everybody
#
# > A network learns from unlabelled scans what a place in the body looks like; then it finds a point, and aligns scans.
#
# A radiologist who is shown a spot in one scan finds it in the next one, of another day or another patient, in
# seconds. SAM (Yan et al., *SAM: Self-supervised Learning of Pixel-wise Anatomical Embeddings*, IEEE TMI 2022) and
# its successors SAM++ and Cross-SAM teach this to a network without a single label. Two crops of one scan are cut,
# turned and scaled at random. Where they overlap, two voxels show the same place: their vectors shall be alike, and
# unlike those of all other places. Since people resemble each other, the vectors of the same place in *different*
# people come out alike as well. This tutorial goes from a folder of scans to a trained embedding, a matched point,
# and an aligned pair; the network is tiny and trained for seconds.
#
# (This SAM has nothing to do with Segment Anything; the library says *anatomical embedding*.)

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from medvol_nb import phantoms, plot
from medvol_nb.core import read_csv
from medvol_nb.embed.match import Matcher
from medvol_nb.embed.model import build_model, load_embedder
from medvol_nb.embed.points import match, read_points, write_points
from medvol_nb.embed.prepare import prepare
from medvol_nb.embed.register import register
from medvol_nb.embed.store import embed_volume
from medvol_nb.embed.train import train
from medvol_nb.embed.transforms import Transform, read_transform, warp
from medvol_nb.volume import Volume, affine_from, read_volume, to_index, to_world, write_volume

# %% [markdown]
# ## What you have
# A folder of CT scans of different people. These are [phantoms](03_phantoms.ipynb); their labels are not used for
# training, but they tell at the end whether a point was found.

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
ORGANS = ("liver", "spleen", "right kidney", "left kidney")

def patient(k):
    body = phantoms.abdomen((64, 50, 56), seed=k, spacing=6.0)
    scan, number = Volume(body.img, affine_from(6.0)), {n: i for i, n in body.names.items()}
    middle = [to_world(scan.affine, np.argwhere(body.lbl == number[o]).mean(0)) for o in ORGANS]
    return scan, np.array(middle)

(root/"scans").mkdir()
for k in range(6): write_volume(patient(k)[0], root/"scans"/f"p{k}.nii.gz")
coronal = lambda vol: np.clip(vol.data[:, vol.shape[1]//3].T[::-1].astype(float), -160, 300)
plot.montage([coronal(patient(k)[0]) for k in range(6)], 6, titles=[f"p{k}" for k in range(6)])

# %% [markdown]
# ## Preparation
# All scans come on one voxel size, with a mask of the body, in chunked stores that can be read in part. Scans that
# cannot be used are listed and left out. (They are usually cut to the body, too; `--no-crop` keeps the air of these
# small ones.)
#
# ```bash
# medvol embedding prepare scans prepared --spacing 6 --no-crop
# ```

# %%
told = prepare(root/"scans", root/"prepared", spacing=6.0, crop=False)
assert told["cases"] == 6 and told["failed"] == 0
sorted(p.relative_to(root).as_posix() for p in (root/"prepared").glob("*/p0*")), told["files"]

# %% [markdown]
# ## Training
# A step draws two views of two scans. Each voxel of one view that also lies in the other has a *positive*, the voxel
# at the same place, and thousands of *negatives*; the loss asks the network to tell which is which. A fine head, with
# the resolution of two voxels, knows what a place looks like; a coarse head, with a view of the whole region, knows
# where in the body it is; its loss goes up and down with how far apart two views happen to be. `--tiny` makes
# network, views and batches small, and the few changes beside it suit voxels of 6 mm.
#
# ```bash
# medvol embedding train --scans prepared --out run --tiny --steps 70 \
#     --overrides spacing=6 views.patch=[16,32,32] views.degrees=5 views.rule=sample fit.lr=5e-3
# ```

# %%
changes = ["spacing=6", "views.patch=[16,32,32]", "views.degrees=5", "views.rule=sample", "fit.lr=5e-3",
           "fit.validate_every=1000", "fit.tensorboard=false"]
train([root/"prepared"], out=root/"run", tiny=True, steps=70, device="cpu", overrides=changes)
rows = [{k: float(r[k]) for k in ("fine", "coarse")} for r in read_csv(root/"run"/"log.csv")]
smooth = {k: np.convolve([r[k] for r in rows], np.ones(10)/10, "valid") for k in ("fine", "coarse")}
plot.curves({k: (np.arange(9, 70), v) for k, v in smooth.items()}, xlabel="step", ylabel="loss, mean of 10",
            height=2.2)

# %%
assert smooth["fine"][-1] < 0.85*smooth["fine"][0]

# %% [markdown]
# ## A point in another person
# Two people that the network has not seen. The scan of the second begins higher and shows less, so nothing can be
# told from the distance to the border. Four points of the first, the middles of organs, are written to a file as a
# viewer would, and looked for in the second. A match is *mutual* if the way back from it ends where one began.
#
# ```bash
# medvol embedding match first.nii.gz second.nii.gz points.csv found.csv --model run
# ```

# %%
one, organs_one = patient(20)
whole, organs_two = patient(21)
two = Volume(whole.data[4:60, 2:46, 12:50], affine_from(6.0, to_world(whole.affine, (4, 2, 12))))
for name, vol in (("first", one), ("second", two)): write_volume(vol, root/f"{name}.nii.gz")
write_points(root/"points.csv", organs_one, ORGANS)
told = match(root/"first.nii.gz", root/"second.nii.gz", root/"points.csv", root/"found.csv", model=root/"run",
             device="cpu")
found = read_points(root/"found.csv")
errors = np.linalg.norm(found.xyz - organs_two, axis=1)
dict(zip(found.names, errors.round(1))), {k: told[k] for k in told if k != "out"}

# %% [markdown]
# The similarity of every place of the second scan to the middle of the first one's spleen: red is alike. The cross is
# the best place, the circle the true one.

# %%
net, about = load_embedder(root/"run", "cpu")
pair = [embed_volume(net, v, config=about, body="auto", device="cpu") for v in (one, two)]
heat = Matcher(*pair).similarity_map(organs_one[1])
shown = warp(heat, Transform(), two.affine, two.shape)
at = to_index(two.affine, organs_two[1]).round().astype(int)
fig, axes = plt.subplots(1, 2, figsize=(7, 2.8))
for ax, vol, p, title in ((axes[0], one, to_index(one.affine, organs_one[1]), "first: the point"),
                          (axes[1], two, at, "second: similarity to it")):
    ax.imshow(np.clip(vol.data[:, int(round(p[1]))].T.astype(float), -160, 300), cmap="gray", origin="lower")
    ax.set(xticks=[], yticks=[], title=title)
axes[0].plot(*to_index(one.affine, organs_one[1])[[0, 2]], "rx")
axes[1].imshow(shown.data[:, at[1]].T, cmap="jet", alpha=0.4, origin="lower")
axes[1].plot(*to_index(two.affine, found.xyz[1])[[0, 2]], "kx")
axes[1].plot(*at[[0, 2]], "wo", mfc="none");

# %% [markdown]
# Is it the training, or would any network do? The same, for several people, with a network of random weights:

# %%
def misses(model):
    "Mean distance from the true middle of organs, over people [mm]"
    query = embed_volume(model, one, config=about, body="auto", device="cpu")
    out = []
    for k in (21, 22, 23):
        scan, truth = patient(k)
        cut = Volume(scan.data[4:60, 2:46, 12:50], affine_from(6.0, to_world(scan.affine, (4, 2, 12))))
        key = embed_volume(model, cut, config=about, body="auto", device="cpu")
        out.append(np.linalg.norm(Matcher(query, key).match(organs_one, "nn").matched - truth, axis=1))
    return float(np.mean(out))

missed = {"random weights": misses(build_model(net.cfg, 5).eval()), "trained": misses(net)}
assert missed["trained"] < 0.7*missed["random weights"]
plot.bars(missed, "mm", title="distance from the true place, 4 organs of 3 people")

# %% [markdown]
# ## An aligned pair
# Matches of a whole grid of points, less those that disagree with the rest, give a first guess of how one scan lies
# in the other; a registration on image structure refines it. No guess has to be given, and the images may be of
# different kinds. Here the second person lay elsewhere in the scanner, ten centimetres off. The result is the second
# scan on the grid of the first, the transform, and a report. (`--no-deformable` stops at an affine map, `--spacing`
# and `--max-angle` keep the search short.)
#
# ```bash
# medvol embedding register first.nii.gz aligned --moving elsewhere.nii.gz --embedder run --spacing 10 --max-angle 10 \
#     --no-deformable
# ```

# %%
off = np.array([60.0, -40.0, 70.0])
write_volume(Volume(two.data, affine_from(6.0, two.affine[:3, 3] + off)), root/"elsewhere.nii.gz")
elsewhere, goal = read_volume(root/"elsewhere.nii.gz"), organs_two + off
register(root/"first.nii.gz", root/"aligned", root/"elsewhere.nii.gz", embedder=root/"run", spacing=10.0,
         max_angle=10.0, deformable=False, device="cpu")
move = read_transform(root/"aligned"/"elsewhere_field.nii.gz")
before, after = (np.linalg.norm(x - goal, axis=1).mean() for x in (organs_one, move(organs_one)))
tiles = [one, *(warp(elsewhere, t, one.affine, one.shape, fill=-1000) for t in (Transform(), move))]
plot.montage([coronal(v) for v in tiles], 3,
             titles=["first", f"second: {before:.0f} mm off", f"aligned: {after:.0f} mm"])

# %%
names = sorted(p.name for p in (root/"aligned").iterdir())
assert before > 80 and after < 30
place.cleanup()
names

# %% [markdown]
# ## What was different in the original
# | original | here |
# |---|---|
# | paths edited in `misc/*.py` and `configs/*/*.py` | arguments; presets with the names of the configurations |
# | `tools/train_sam.sh configs/sam/...`: the first stage stops with an error at its start | `--preset sam_NIHLN` |
# | edit one line of the sampler, run, edit it back; the edit also drops a data set | `slots` in the settings |
# | the last stage starts from photographs unless a checkpoint is added by hand | an error without `--start-from` |
# | "confidence 1.5" on a scale that ends at 1 keeps nothing | one scale, mean cosine; mutual matches |
# | a point takes 15 to 23 seconds on one core, an embedding is a 434 MB pickle for one GPU | 10 ms; a zarr store |
# | rigid fit without rejection of outliers; 5 % of them cost 3 mm | robust, in millimetres of the world |
# | deeds with a source file that was never published | own registration, no compiler |
# | `tools/deeplesion_eval...`: laxer rules under the benchmark's names | both are told (`embedding evaluate`) |
#
# SAM++ adds a head that learns organs from masks (`--organs`), Cross-SAM trains on registered CT and MR (`--pairs`);
# the four stages in a row are one call, `train_stages` of [its page](37_embed_pipeline.ipynb).

# %% [markdown]
# ## On your data, on a GPU
# The published trainings run 20,000 steps with views of 32 × 96 × 96 voxels at 2 mm, from 1.6 mm scans. On one core a
# step of that size takes 20 seconds; it is work for a GPU, or several.
#
# ```bash
# medvol embedding prepare lymph_nodes prepared --workers -1
# medvol embedding prepare Totalsegmentator_dataset organs --kind totalseg --workers -1
# medvol embedding prepare ct_mr pairs --kind pairs --workers -1
# torchrun --standalone --nproc-per-node 4 -m medvol_nb.cli embedding train --scans prepared --out sam
# medvol embedding train --scans prepared --organs organs --out sampp --preset samv2_NIHLN --start-from sam
# medvol embedding train --scans pairs --out intra --preset ct_mri_intra --start-from sampp
# medvol embedding register ct_mr registered --embedder intra
# medvol embedding prepare registered ready --kind pairs
# medvol embedding train --pairs ready --out inter --preset ct_mri_inter --start-from intra
# medvol embedding embed scans stores inter
# ```
