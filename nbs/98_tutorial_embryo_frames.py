# %% [markdown]
# # Frames that were never photographed
#
# > From the archives of embryo time-lapses to synthetic frames of the rare phases, and a judgement of them.
#
# An incubator photographs an embryo every quarter of an hour, in seven focal planes, while it divides. Sixteen phases
# have names, and some of them are rare: of the 2.4 million frames of the public data set (Gomez et al., *Data in
# Brief* 42, 2022) very few show a hatching blastocyst. The system followed here, of a summer workshop in Nantes (2023),
# fine-tuned Stable Diffusion on these frames and drew more of what was rare. This tutorial goes that way in miniature,
# up to the question whether the drawn frames are any good.
#
# The frames are [drawn by a formula](60a_embryo_phantom.ipynb), and the diffusion model is one of
# [five megabytes that knows nothing](62_embryo_tiny.ipynb). The commands are those for the real ones.

# %%
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from medvol_nb import plot
from medvol_nb.core import MedvolError, read_csv, read_json
from medvol_nb.embryo.archives import extract
from medvol_nb.embryo.commands import classify, metrics
from medvol_nb.embryo.dataset import read_frame
from medvol_nb.embryo.finetune import finetune
from medvol_nb.embryo.folders import make_image_folder, read_image_folder
from medvol_nb.embryo.generate import SyntheticRuns, generate
from medvol_nb.embryo.index import build_index
from medvol_nb.embryo.phantom import make_phantom_archives, make_phantom_dataset
from medvol_nb.embryo.phases import PHASES, Phase
from medvol_nb.embryo.splits import split
from medvol_nb.embryo.tiny import make_tiny_sd, teach_autoencoder

# %% [markdown]
# ## What you have
# Ten downloads: one archive for each focal plane, annotations, times, and a table of grades. Here they hold eighteen
# videos of 30 frames, 32 pixels wide, and six of the seven focal planes are empty.

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
make_phantom_dataset(root/"tree", 18, 30, ["F+00"], 32, defects=["f0", "overlap", "beyond"])
make_phantom_archives(root/"tree", root/"archives")
sorted(p.name for p in (root/"archives").iterdir())

# %% [markdown]
# ## Out of the archives
# Everything is checked before the first file is written, checksums are verified to the end of each archive, and the
# target appears when all is well, or not at all. Below, one byte of one download is wrong; Python's own `tarfile`
# would unpack it without a word.
#
# ```bash
# medvol embryo extract archives data --planes F+00
# ```

# %%
make_phantom_archives(root/"tree", root/"damaged", fault="trailer")
try: extract(root/"damaged", root/"data", planes=["F+00"])
except MedvolError as e: print(type(e).__name__, str(e).replace(str(root), "")[:100])
assert not (root/"data").exists()
told = extract(root/"archives", root/"data", planes=["F+00"])
told["files"], sorted(p.name for p in (root/"data").iterdir())

# %% [markdown]
# ## What is in it
# The index knows the phase of every frame, and tells what is odd: a folder of duplicates,
# annotations that overlap, or that go on after the last picture. Real downloads have all of these.

# %%
index = build_index(root/"data", cache=False)
pd.DataFrame([{"video": v, "remark": r} for v, remarks in index.by_video().items() for r in remarks
              if not r.startswith("unlabelled")])

# %%
counts = {p: int((index.phase == k).sum()) for k, p in enumerate(PHASES)}
plot.bars(counts, "frames", title=f"{len(index)} frames of {len(index.names)} videos")

# %% [markdown]
# ## Who is kept apart
# Videos with the same code are embryos of one couple and look alike. They go to the same side, and each side gets a
# fair share of every phase.
#
# ```bash
# medvol embryo split data split.json 0.6 0.2 0.2
# ```

# %%
dealt = split(root/"data", root/"split.json", (0.6, 0.2, 0.2))
assert dealt["torn_couples"] == 0
dealt["counts"], pd.DataFrame(dealt["videos"]).T.head(4)

# %% [markdown]
# ## Pictures to learn from
# An image folder is what a training of Stable Diffusion reads: pictures, a sentence for each, and a table. Pictures
# are linked or copied byte by byte, spread over videos, and the folder remembers where each one came from. We take
# three phases from the training videos.
#
# ```bash
# medvol embryo image-folder --dataset data --split-file split.json --set train --phases t2 tM tEB \
#     --image-folder-parent . --image-folder-name frames --strategy balanced --per-phase 16
# ```

# %%
CHOSEN = ["t2", "tM", "tEB"]
make_image_folder(dataset=root/"data", split_file=root/"split.json", set="train", phases=CHOSEN,
                  image_folder_parent=root, image_folder_name="frames", strategy="balanced", per_phase=16,
                  on_shortage="drop")
items = read_image_folder(root/"frames")
frames = [read_frame(i.path, 32) for i in items]
by_phase = {p: [f for f, i in zip(frames, items) if i.phase is Phase.parse(p)] for p in CHOSEN}
print((root/"frames"/"descriptions"/"0.txt").read_text())
plot.montage([f for p in CHOSEN for f in by_phase[p][:8]], 8, title="real frames, a row each: t2, tM, tEB")

# %%
videos = {r["label"].split("_")[1] for r in read_csv(root/"frames"/"metadata.csv")}
assert min(map(len, by_phase.values())) >= 8 and videos <= set(read_json(root/"split.json")["train"])

# %% [markdown]
# ## Fine-tuning
# Stable Diffusion has three parts: an autoencoder, which turns pictures into small latent ones and back, a text
# encoder, and a U-Net that removes noise from latent pictures. Fine-tuning trains the U-Net only. Our base knows
# nothing, so its autoencoder is taught first; a real base needs no such step. The condition is a learnt vector for
# each phase; with a real base one takes the descriptions, or one sentence for all pictures, as the original did.
#
# ```bash
# medvol embryo finetune --model base --image-folder frames --run-name run --train full --conditioning class \
#     --max-train-steps 80 --batch-size 8 --lr 2e-3
# ```

# %%
make_tiny_sd(root/"nothing", resolution=32)
error = teach_autoencoder(root/"nothing", frames, root/"base", steps=50, device="cpu")
finetune(model=str(root/"base"), image_folder=root/"frames", output_dir=root, run_name="run", train="full",
         conditioning="class", max_train_steps=80, batch_size=8, lr=2e-3, num_validation_images=0, device="cpu",
         overrides=("n_tokens=4", "schedule=cosine"))
losses = [float(r["loss"]) for r in read_csv(root/"run"/"log.csv")]
plot.curves({"loss": losses}, xlabel="step", ylabel="loss", height=2.2)

# %%
assert np.mean(losses[-20:]) < 0.5*np.mean(losses[:20])

# %% [markdown]
# ## Drawing
# One folder for each phase. Image $k$ has a seed of its own, so a run can be continued and does not depend on the
# size of batches. Every file says that it is synthetic: in its own header, in the record of its folder, and there
# also by which model, from which prompt and seed.
#
# ```bash
# medvol embryo generate --phase t2 tM tEB --dataset-name drawn --synthetic-dataset-parent runs --model-path run \
#     --num-images 8 --steps 12 --guidance-scale 1.5
# ```

# %%
(root/"runs").mkdir()
generate(phase=CHOSEN, dataset_name="drawn", synthetic_dataset_parent=root/"runs", model_path=root/"run", num_images=8,
         steps=12, guidance_scale=1.5, device="cpu", max_rejects=8)
drawn = SyntheticRuns(root/"runs", transform=lambda x: x)
made = {p: [d.image for d in (drawn[i] for i in range(len(drawn))) if d.phase == PHASES.index(p)] for p in CHOSEN}
plot.montage([f for p in CHOSEN for f in made[p][:8]], 8, title="synthetic frames, a row each: t2, tM, tEB")

# %%
record = read_json(root/"runs"/"drawn-tM"/"metadata.json")
assert len(drawn) == 24 and record["synthetic"] and record["complete"] and record["phase"] == "tM"
{k: record[k] for k in ("prompt", "phase", "focal-plane", "num_images", "steps")}

# %% [markdown]
# ## Are they any good?
# The judge is a network that learnt phases from real training videos. It looks at the synthetic frames of a phase and
# at real ones of the *test* videos: does it see the phase in them that they were drawn for? How far apart are the
# distributions of its features (`fid`)? How many are copies of training frames?
#
# ```bash
# medvol embryo classify train --dataset data --split-file split.json --out judge --architecture small --size 32
# medvol embryo metrics --orig-data-path data --synth-data-path runs --model-weights-path judge \
#     --result-fold-path quality
# ```

# %%
classify("train", dataset=root/"data", split_file=root/"split.json", out=root/"judge", architecture="small", size=32,
         steps=150, lr=4e-3, device="cpu")
judged = metrics(orig_data_path=root/"data", synth_data_path=root/"runs", model_weights_path=root/"judge",
                 split_file_path=root/"split.json", result_fold_path=root/"quality", device="cpu")
rows = read_csv(judged["table"])
shown = {"phase": "label", "real frames recognised": "accuracy_orig", "synthetic frames recognised": "accuracy_synth",
         "distance (fid)": "fid_same_n", "of real from real": "fid_reference", "copies": "copies"}
pd.DataFrame([{n: r[c] if c == "label" else round(float(r[c]), 2) for n, c in shown.items()} for r in rows])

# %% [markdown]
# The verdict is clear, and it is *no*: the frames are further from real ones than real ones are from each other, and
# the judge does not see the phases in them. A model that began with random weights and trained for seconds draws
# where the bright body is and little else, and the falling loss has not told. That is what a judgement is for. With a
# real base and hours of training the same two commands say whether to go on, and `medvol embryo classify experiment`
# says the rest: whether a classifier gets better on *real test videos* when these frames join its training.

# %%
assert all(float(r["fid_same_n"]) > float(r["fid_reference"]) and int(r["copies"]) == 0 for r in rows)
assert any((root/"quality").glob("*.png"))
place.cleanup()

# %% [markdown]
# ## What was different in the original
# | original | here |
# |---|---|
# | `extract_dataset` unpacks a damaged archive without a word, or leaves half a tree | checked; all or nothing |
# | the first frame of every phase but the first is lost, phases of one frame vanish | intervals are inclusive |
# | the split tears couples apart: 45 of 141 test videos have siblings in training | couples stay together |
# | `make_image_folder.py --set eval` fails on the shipped split | `eval` and `val` are one word |
# | pictures are encoded again | linked or copied byte by byte |
# | `finetune_unet.py`: all phases under one prompt, `"... at phase t2"` | refused unless allowed |
# | the class-conditional prototype never saves its table of phases, so it cannot draw | saved with the model |
# | `make_synthetic_dataset.py --model-path`: must be a file, is read as a folder | run folder, checkpoint, LoRA |
# | the base model's name is fixed; it was removed from the hub in 2025 | `--model` is required |
# | a metric called FID that kept one picture a batch | FID and KID with the judge's features, copies, diversity |
#
# Options of the original keep their names, `--instance-prompt`, `--wandb-run-name`, `--steps-per-image` and others.

# %% [markdown]
# ## On your data, on a GPU
# The data set is on Zenodo (10.5281/zenodo.6390798, CC BY-NC-SA 4.0): 704 videos, seven planes, 2.4 million frames. A
# base is a folder of diffusers or a checkpoint of Stable Diffusion 1.x or 2.x. Full fine-tuning needs 14 GB for the
# weights and the optimiser's state alone; LoRA, the default, is for GPUs with less than 24 GB. Published: resolution
# 512, batches of one, rate 7e-6, 550 steps for each picture, 50 frames a run. Steps on a GPU have not been timed
# here.
#
# ```bash
# medvol embryo extract archives data --report extraction.json
# medvol embryo split data split.json 0.6 0.2 0.2
# medvol embryo image-folder --dataset data --split-file split.json --set train --phases all --image-folder-parent . \
#     --image-folder-name training
# medvol embryo finetune --model stable-diffusion-2-1-base --image-folder training --run-name unet-all \
#     --mixed-precision bf16 --device cuda
# medvol embryo generate --phase t3 tHB --dataset-name rare --synthetic-dataset-parent runs --model-path unet-all
# medvol embryo classify train --dataset data --split-file split.json --out judge --device cuda
# medvol embryo metrics --orig-data-path data --synth-data-path runs --model-weights-path judge \
#     --result-fold-path quality
# medvol embryo classify experiment --dataset data --split-file split.json --synthetic runs --out experiment
# ```
