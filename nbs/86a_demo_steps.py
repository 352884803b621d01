# %% [markdown]
# # What the components do in the demo
#
# > One function a component: it does its job on cases with labels and says in a picture and figures how it went.
#
# The demo (page 87) makes a dataset or takes the user's, and lists and verifies it. From there on every component works
# on the same cases. This page holds these steps. Each takes the list of the cases, skips those whose label does not lie
# on its image, and returns what the report shows.

# %%
#| default_exp demo_steps

# %%
#| export
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from medvol_nb import plot
from medvol_nb.core import DataError, FormatError, MissingFile, read_csv, remove_tree, write_json
from medvol_nb.datalists import item_path, read_datalist
from medvol_nb.report import Shown
from medvol_nb.volume import Volume, read_volume, reorient, resample, same_grid, to_axes, write_volume

# %%
from IPython.display import Image

from medvol_nb import phantoms
from medvol_nb.core import tmpdir
from medvol_nb.datalists import DataList, write_datalist
from medvol_nb.volume import affine_from

# %% [markdown]
# ## Cases to work on

# %%
#| export
def sound_cases(
    datalist: Path, # JSON file
    root: Path, # folder that its paths are relative to
    limit: int | None = None, # at most so many
) -> Iterator[tuple[str, Volume, Volume]]: # name, image and label in RAS
    "Cases whose label lies on its image's grid, by name"
    def usable() -> Iterator[tuple[str, Volume, Volume]]:
        items = [i for i in read_datalist(datalist).training if isinstance(i["image"], str) and "label" in i]
        for item in sorted(items, key=lambda i: i["image"]):
            try: img, lbl = (reorient(read_volume(item_path(root, item[k])), "RAS") for k in ("image", "label"))
            except (DataError, FormatError, MissingFile): continue # verification has told
            if img.channels is None and same_grid(img, lbl, 0.1*min(img.spacing)):
                yield item["image"], img, replace(lbl, data=lbl.data.astype(np.int64))
    return itertools.islice(usable(), limit)

# %% [markdown]
# ## Supervoxels
# No label is used to make them; the labels say afterwards how good they are.

# %%
#| export
def supervoxel_step(
    folder: Path, # of the step
    datalist: Path, # JSON file
    root: Path, # folder of the data
    n_segments: int = 200, # supervoxels a case
) -> Shown: # figures, table and a picture
    "Supervoxels of the first cases, measured against their labels"
    from medvol_nb.supervoxels import supervoxels
    from medvol_nb.sv_metrics import supervoxel_metrics
    rows, pictures, left = [], {}, []
    for k, (name, img, lbl) in enumerate(sound_cases(datalist, root, 3)):
        try: found = supervoxels(img, n_segments)
        except DataError as e:
            left.append(f"{name} ({e})")
            continue
        write_volume(found.labels, folder/f"{k}_seg.nii.gz")
        told = supervoxel_metrics(found.labels.data, lbl.data, img.spacing)
        rows.append({"case": name, "supervoxels": found.info["n"], "median [mL]": found.info["median_ml"],
                     "ASA": told["asa"], "UE": told["ue"], "BR": told["br"], "in pieces": told["disconnected"]})
        if pictures: continue
        fig = plot.planes(img.data, found.labels.data.astype(np.int64), img.spacing, title=name)
        plot.save_figure(fig, folder/"supervoxels.png")
        pictures = {"Supervoxels of the first case": "supervoxels.png"}
    asa = [r["ASA"] for r in rows if "ASA" in r]
    text = ("Pieces that follow the borders in the image. The labels were not used to make them, only to judge them: "
            "achievable segmentation accuracy (ASA) is the share of voxels that are right if every piece gets its "
            "commonest label, undersegmentation error (UE) is what leaks over borders, and boundary recall (BR) is "
            "what is found of them within 2 voxels.")
    if left: text += f" Left out: {'; '.join(left)}."
    return Shown(text, {"ASA": float(np.mean(asa))} if asa else {}, rows, pictures)

# %% [markdown]
# ## Synthetic anatomy
# The classes of the cases are cut out as shapes. Scenes of such shapes, each rendered twice with contrasts of its own,
# teach a network what does not depend on contrast.

# %%
#| export
def _shapes(datalist: Path, root: Path, most: int) -> tuple[list[np.ndarray], list[str]]:
    "Masks of all classes, with voxels of at least 1.5 mm, and what they are"
    from scipy.ndimage import find_objects
    masks, names = [], []
    for name, _, lbl in sound_cases(datalist, root, 6):
        data = resample(lbl, tuple(max(1.5, s) for s in lbl.spacing), 0).data
        for k, box in enumerate(find_objects(np.maximum(data, 0)), 1):
            if box is not None and len(masks) < most:
                masks.append(data[box] == k)
                names.append(f"{name}, class {k}")
    return masks, names

def synth_step(
    folder: Path, # of the step
    datalist: Path, # JSON file
    root: Path, # folder of the data
    steps: int = 240, # of the pretraining
    seed: int = 0, # names all random choices
    n_pairs: int = 48, # pairs, 8 of which are held out
    side: int = 128, # of the scenes [voxel]; every fourth one is kept
) -> Shown: # figures, table and pictures
    "Make scenes of the labels' shapes, store two views of each, and pretrain features on them"
    from medvol_nb.synth.features import extract_features, pca_colours, render_pairs, short_pretraining
    from medvol_nb.synth.contrast import load_network
    from medvol_nb.synth.generate import contact_sheet
    from medvol_nb.synth.pairfile import PairFile, Sample
    from medvol_nb.synth.stores import open_pairs
    from medvol_nb.synth.templates import TemplateBank
    masks, names = _shapes(datalist, root, 200)
    if not masks: return Shown("There is no labelled case to take shapes from.")
    bank = TemplateBank.of(masks, names)
    made = render_pairs(n_pairs, seed, side=side, bank=bank)
    with PairFile(folder/"pairs.hdf5", made[0]["seg"].shape, made[0]["seg"].dtype,
                  params={"seed": seed, "bank": bank.digest, "side": side}) as f:
        for i, pair in enumerate(made): f.append(Sample(f"pair {i}", pair["img"], pair["seg"], {"index": i}))
    pairs = open_pairs(folder/"pairs.hdf5")
    contact_sheet(pairs, folder/"pairs.png", 4)
    told = short_pretraining(folder/"run", pairs, steps=steps, seed=seed)
    losses = [float(r["loss"]) for r in read_csv(folder/"run"/"log.csv")]
    plot.save_figure(plot.curves({"loss": losses, "loss of guessing": [told["plateau"]]*len(losses)}, xlabel="step",
                                 ylabel="loss"), folder/"loss.png")
    name, img, _ = next(sound_cases(datalist, root, 1))
    img = resample(img, tuple(max(1.5, s) for s in img.spacing))
    seen = extract_features(load_network(folder/"run", "cpu"), np.asarray(img.data, np.float32), overlap=0.25)
    at = img.shape[2]//2
    colours = np.swapaxes(pca_colours(seen)[0][:, :, at], 0, 1)[::-1]
    plot.save_figure(plot.montage([img.data[:, :, at].T[::-1], colours], 2, [name, "its features"], width=4.5),
                     folder/"features.png")
    rows = [{"voxels described by": name, "found in the same view": s["same_view"],
             "found in the other view": s["other_view"]} for name, s in told["probes"].items()]
    chance = told["probes"]["grey"]["chance"]
    text = (f"{len(bank)} shapes were cut out of the labels, and {n_pairs} scenes made of them. Two pictures of each "
            f"scene have contrasts of their own. A network learnt from {n_pairs - 8} of them, in {steps} steps, to "
            f"give a structure the same {len(seen)} numbers in both. On the other 8 a linear probe learns the "
            f"structures of a scene from some voxels of one picture, and is asked about other voxels of this picture, "
            f"and of the other one, whose contrast it has not seen (guessing: {chance:.3f}).")
    return Shown(text, {"loss": told["loss_last"], "loss of guessing": told["plateau"],
                        "recall across contrasts": told["probes"]["trained"]["other_view"]}, rows,
                 {"Two views of scenes made of the labels' shapes": "pairs.png", "Loss by step": "loss.png",
                  "Features of a real case, their three main directions as colours": "features.png"})

# %% [markdown]
# ## A multi-task U-Net
# The cases become chunked stores on one voxel size: image, classes, and the normals of the borders between them. A
# small network learns both tasks for a short while; the last case is kept from it, predicted patch by patch from its
# store into another one, and compared with its label.

# %%
#| export
def _stores(folder: Path, datalist: Path, root: Path, most: int) -> tuple[list[str], list[int], tuple[float, ...]]:
    "Names of the cases, class ids, and the common voxel size"
    from medvol_nb.stores import write_zarr
    from medvol_nb.zarrnet.geometry import boundary_normals, encode_normals
    cases = list(sound_cases(datalist, root, 3))
    if not cases: return [], [], ()
    spacing = np.median([img.spacing for _, img, _ in cases], axis=0)
    largest = max(float(np.prod(img.shape)*np.prod(img.spacing)/np.prod(spacing)) for _, img, _ in cases)
    spacing = tuple(float(s) for s in spacing*max(1, largest/2e6)**(1/3))
    counts: dict[int, int] = {}
    for _, _, lbl in cases:
        for k, n in zip(*np.unique(lbl.data, return_counts=True)): counts[int(k)] = counts.get(int(k), 0) + int(n)
    ids = sorted(sorted((k for k in counts if k > 0), key=lambda k: (-counts[k], k))[:most])
    table = np.zeros(max(counts) + 1, np.uint8)
    table[ids] = np.arange(1, len(ids) + 1)
    for k, (_, img, lbl) in enumerate(cases):
        dense = replace(lbl, data=table[np.maximum(lbl.data, 0)])
        img, dense = (to_axes(resample(v, spacing, order), "zyx") for v, order in ((img, 1), (dense, 0)))
        normals = boundary_normals(dense.data)[1]
        for name, vol in (("image", replace(img, data=img.data.astype(np.float32))), ("classes", dense),
                          ("normals", Volume(encode_normals(normals), img.affine, "czyx"))):
            write_zarr(vol, folder/f"{k}_{name}.zarr", chunks=32)
    return [name for name, _, _ in cases], ids, spacing

def unet_step(
    folder: Path, # of the step
    datalist: Path, # JSON file
    root: Path, # folder of the data
    steps: int = 120, # of the training
    seed: int = 0, # names all random choices
) -> Shown: # figures, table and a picture
    "Train a small two-task network on all cases but one, and predict that one out of core"
    import torch

    from medvol_nb.zarrnet.geometry import decode_normals, normals_rgb
    from medvol_nb.zarrnet.io import open_volume
    from medvol_nb.zarrnet.metrics import Scores
    from medvol_nb.zarrnet.predict import predict
    from medvol_nb.zarrnet.train import load_model, train
    names, ids, spacing = _stores(folder, datalist, root, 8)
    if not ids: return Shown("There is no labelled case to train with.")
    last, patch = len(names) - 1, [24, 40, 40]
    shape = open_volume(folder/f"{last}_image.zarr").shape
    patch = [max(4, min(p, n//4*4)) for p, n in zip(patch, shape)]
    volumes = [{"name": f"case{k}", "input": f"{k}_image.zarr", "classes": f"{k}_classes.zarr",
                "normals": f"{k}_normals.zarr"} for k in range(max(1, last))]
    write_json(folder/"task.json", {
        "tr_params": {"model_name": "demo", "patch_size": patch, "batch_size": 2, "tr_val_split": 1, "max_epoch": 1,
                      "max_steps_per_epoch": steps, "initial_lr": 1e-2, "warmup_steps": min(10, steps - 1),
                      "label_smoothing": 0.0, "num_dataloader_workers": 0, "tensorboard_log_dir": None, "seed": seed,
                      "debug_gif_every": 0, "keep_checkpoints": 1, "ckpt_out_base": "run", "pad_small": True},
        "inference_params": {"checkpoint_path": "run/demo", "input_path": f"{last}_image.zarr", "output_dir": "out",
                             "chunks": [32, 32, 32], "overlap": 0.25, "num_dataloader_workers": 1},
        "model_config": {"f_maps": [12, 24, 48], "blocks_per_level": [1, 1, 1], "decoder": "shared"},
        "dataset_config": {"volume_paths": volumes, "min_bbox_percent": 0.3, "min_labeled_ratio": 0.01,
                           "use_cache": False, "augmentation": {"deform": {"p": 0}},
                           "targets": {"classes": {"channels": len(ids) + 1, "activation": "softmax"},
                                       "normals": {"channels": 3, "weight": 0.75}}}})
    run = train(folder/"task.json")
    predict(folder/"task.json")
    remove_tree(folder/"out"/"predictions.zarr"/".progress") # its times are not part of the result
    stores = folder/"out"/"predictions.zarr"
    probabilities, vectors = (open_volume(stores/n)[...] for n in ("classes", "normals"))
    found = {"classes": probabilities/np.float32(255), "normals": decode_normals(vectors)}
    truth = {"classes": open_volume(folder/f"{last}_classes.zarr")[...][None].astype(np.int64),
             "normals": decode_normals(open_volume(folder/f"{last}_normals.zarr")[...])}
    scores = Scores(load_model(folder/"run"/"demo", "cpu").targets)
    as_batch = lambda arrays: {k: torch.from_numpy(np.ascontiguousarray(v))[None] for k, v in arrays.items()}
    masks = {f"{n}__mask": torch.ones(1, 1, *shape, dtype=torch.uint8) for n in truth}
    scores.add(as_batch(found), {**as_batch(truth), **masks})
    told, middle = scores.result(), shape[0]//2
    image, guess = open_volume(folder/f"{last}_image.zarr")[...], found["classes"].argmax(0)
    given = truth["normals"][:, middle]
    tiles = [image[middle], truth["classes"][0, middle]/len(ids), guess[middle]/len(ids), normals_rgb(given),
             normals_rgb(found["normals"][:, middle]*(given != 0))]
    titles = ["image", "classes", "predicted", "normals", "predicted"]
    plot.save_figure(plot.montage(tiles, cols=5, titles=titles), folder/"unet.png")
    losses = [float(r["loss"]) for r in read_csv(folder/"run"/"demo"/"log.csv")]
    plot.save_figure(plot.curves({"loss": losses}, xlabel="step", ylabel="loss"), folder/"loss.png")
    held = f"{names[last]}, which it has not seen," if last else f"{names[0]}, the case it was trained on,"
    text = (f"A network of two tasks, classes and normals of their borders, learnt for {run['steps']} steps on "
            f"{max(1, last)} cases with voxels of {' x '.join(f'{s:.2g}' for s in spacing)} mm. It was then applied to "
            f"{held} patch by patch, from one store into another. Its training was short: it shows the way, not the "
            f"limit.")
    return Shown(text, {"Dice": told["classes_dice"], "angle [degree]": told["normals_angle_median"]}, [],
                 {"Middle slice of the predicted case": "unet.png", "Loss by step": "loss.png"})

# %% [markdown]
# ## The steps on two phantoms
# The real thing runs on brains in the demo; two small abdomens and a training of a few steps show that the parts fit.

# %%
with tmpdir() as d:
    items = []
    for k in range(2):
        case = phantoms.abdomen(seed=k)
        vol = Volume(case.img[::2, ::2, ::2].astype(np.int16), affine_from([2*s for s in case.spacing]))
        for kind, data in (("img", vol.data), ("lbl", case.lbl[::2, ::2, ::2])):
            write_volume(replace(vol, data=data), d/f"{kind}_{k}.nii.gz")
        items.append({"image": f"img_{k}.nii.gz", "label": f"lbl_{k}.nii.gz"})
    write_datalist(DataList("toy", tuple(items)), d/"list.json")
    for name in ("sv", "synth", "unet"): (d/name).mkdir()
    pieces = supervoxel_step(d/"sv", d/"list.json", d, 60)
    views = synth_step(d/"synth", d/"list.json", d, steps=4, n_pairs=10, side=64)
    network = unet_step(d/"unet", d/"list.json", d, steps=30)
    picture = Image((d/"synth"/"pairs.png").read_bytes())
pieces.table, views.figures, network.figures

# %%
picture

# %%
assert [r["in pieces"] for r in pieces.table] == [0, 0] and pieces.figures["ASA"] > 0.8
assert [r["voxels described by"] for r in views.table] == ["grey", "untrained", "trained"]
assert 0 < network.figures["Dice"] <= 1 and 0 < network.figures["angle [degree]"] < 180
