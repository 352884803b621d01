# %% [markdown]
# # Image folders
#
# > From an index and a split to a folder of pictures and sentences that trainers read: selected, byte-exact, traceable.
#
# Fine-tuning needs a folder: pictures, a sentence for each, a table. The published script decodes every JPEG and
# encodes it again, which changes all of them and takes most of the time; it draws balanced sets with replacement,
# accepts an empty result, and leaves half a folder when it fails. Here a picture is linked or copied as it is, a
# selection is checked before anything is written, the folder appears at once, and `folder.json` tells where every
# picture came from, so that leaks can be found later.

# %%
#| default_exp embryo.folders

# %%
#| export
import contextlib
import datetime
import errno
import os
import random
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from medvol_nb.core import (ConfigError, DataError, FormatError, MissingFile, OnExists, atomic, check_output,
                            file_digest, fingerprint, log, progress, read_csv, read_json, to_json, write_csv,
                            write_json)
from medvol_nb.embryo.dataset import EmptyDataset, _damage, read_frame, select_frames
from medvol_nb.embryo.index import EmbryoIndex, build_index
from medvol_nb.embryo.phantom import jpeg_bytes
from medvol_nb.embryo.phases import (DATA_LICENCE, PROMPT, FocalPlane, Phase, PromptTemplate, frame_label, parse_label,
                                     parse_planes)
from medvol_nb.embryo.splits import _legacy_random, load_split, set_name

# %%
from medvol_nb.core import raises, tmpdir
from medvol_nb.embryo.phantom import make_phantom_dataset
from medvol_nb.embryo.splits import split
from medvol_nb.plot import montage

# %% [markdown]
# ## Which frames
# `every-phase-vid` takes the middle frame of each phase of each video. `balanced` takes the same number of frames of
# every phase, one video after the other, never one twice. `random` takes any. One generator of the published kind
# decides: first planes are drawn in the order of selection, then the order is shuffled.

# %%
#| export
class Choice(NamedTuple):
    "A frame that was selected"
    plane: FocalPlane # where it was focused
    video: str # name
    frame: int # RUN number
    phase: Phase # what it shows

Strategy = Literal["every-phase-vid", "balanced", "random"]

def _capped(frames: list, most: int | None, rng: random.Random) -> list:
    "At most so many of a video, in their order"
    if most is None or len(frames) <= most: return frames
    return [frames[k] for k in sorted(rng.sample(range(len(frames)), most))]

def _balanced(pools: dict[Phase, dict[str, list[int]]], n: int, most: int | None, drop: bool, rng: random.Random
              ) -> list[tuple[str, int, Phase]]:
    "So many frames of every phase, one video after the other"
    used: Counter = Counter()
    out, short = [], []
    for phase in sorted(pools, key=lambda p: (sum(map(len, pools[p].values())), p.idx())): # rare ones choose first
        left = {v: rng.sample(f, len(f)) for v, f in pools[phase].items()}
        got, turn = [], rng.sample(sorted(left), len(left))
        while len(got) < n and turn:
            for v in list(turn):
                if len(got) == n: break
                if not left[v] or (most is not None and used[v] >= most): turn.remove(v); continue
                got.append((v, left[v].pop(), phase))
                used[v] += 1
        if len(got) < n: short.append(f"{phase.value} {len(got)}")
        out.append(got)
    if short and not drop: raise DataError(f"per_phase: {n} frames were asked for, there are only {', '.join(short)}. "
                                           "Lower it, or take what there is with on_shortage='drop' (--on-shortage)")
    return [c for got in sorted(out, key=lambda g: g[0][2].idx() if g else 0) for c in got]

def select_images(
    index: EmbryoIndex, # of the data set
    videos: Sequence[str], # names, in the order of the split
    phases: Sequence[Phase], # wanted
    planes: Sequence[FocalPlane] = (FocalPlane.F0,), # wanted
    *,
    strategy: Strategy = "every-phase-vid", # which frames
    per_phase: int | None = None, # frames of each phase, for 'balanced'
    limit: int | None = None, # pictures in all; more are left out
    on_shortage: Literal["error", "drop"] = "error", # when a phase has fewer than `per_phase`
    plane_mode: Literal["one", "all"] = "one", # draw one plane for each frame, or take all
    max_per_video: int | None = None, # frames of one video
    shuffle: bool = True, # shuffle the result
    seed: int = 0, # of draws and shuffle
) -> list[Choice]: # in the order of the folder
    "Choose the pictures of an image folder"
    for name, value in (("per_phase", per_phase), ("limit", limit), ("max_per_video", max_per_video)):
        if value is not None and value < 1: raise ConfigError(f"{name}: must be at least 1, got {value}")
    if strategy not in ("every-phase-vid", "balanced", "random"): raise ConfigError(f"strategy: got {strategy!r}")
    if plane_mode not in ("one", "all"): raise ConfigError(f"plane_mode: 'one' or 'all', got {plane_mode!r}")
    if on_shortage not in ("error", "drop"): raise ConfigError(f"on_shortage: 'error' or 'drop', got {on_shortage!r}")
    if (strategy == "balanced") != (per_phase is not None):
        raise ConfigError("per_phase (--per-phase): goes with strategy 'balanced', and with it alone")
    rng, mask = _legacy_random(seed), sum(1 << p.idx() for p in planes)
    here: dict[str, dict[Phase, list[int]]] = {}
    for v in dict.fromkeys(videos):
        at = index.rows(v)
        seen, labels = (index.plane_bits[at] & mask) > 0, index.phase[at]
        found = {p: index.frame[at][seen & (labels == p.idx())].tolist() for p in phases}
        here[v] = dict(sorted(((p, f) for p, f in found.items() if f), key=lambda pf: pf[1][0]))
    if strategy == "every-phase-vid":
        chosen = [(v, int(select_frames(np.array(f), "median")[0]), p) for v, own in here.items()
                  for p, f in _capped(list(own.items()), max_per_video, rng)]
    elif strategy == "balanced":
        pools = {p: {v: own[p] for v, own in here.items() if p in own} for p in phases}
        chosen = _balanced(pools, per_phase, max_per_video, on_shortage == "drop", rng)
    else: chosen = [c for v, own in here.items()
                    for c in _capped([(v, n, p) for p, f in own.items() for n in f], max_per_video, rng)]
    items = []
    for v, n, p in chosen:
        at = index.rows(v)
        bits = int(index.plane_bits[at][np.searchsorted(index.frame[at], n)])
        have = [plane for plane in planes if bits >> plane.idx() & 1]
        items += [Choice(plane, v, n, p) for plane in (have if plane_mode == "all" else [rng.choice(have)])]
    if shuffle: rng.shuffle(items)
    elif strategy == "random" and limit is not None: items = _capped(items, limit, rng)
    if not items: raise EmptyDataset(f"no frame of {len(here)} videos shows {', '.join(p.value for p in phases)} in "
                                     f"{', '.join(p.pretty for p in planes)}")
    return items[:limit]

# %%
folder = tmpdir()
d = folder.__enter__()
make_phantom_dataset(d/"tree", 8, 24, ["F-15", "F+00", "F15"], 32)
index = build_index(d/"tree", cache=False)
split(d/"tree", d/"split.json", (0.5, 0.25, 0.25))
middle = select_images(index, index.names, list(Phase), shuffle=False)
even = select_images(index, index.names, [Phase.t2, Phase.tM], list(FocalPlane)[2:5], strategy="balanced", per_phase=3)
len(middle), [(*c[1:3], c[3].value, c[0].pretty) for c in even]

# %%
assert len(middle) == sum(len(np.unique(index.phase[index.rows(v)])) - (-1 in index.phase[index.rows(v)])
                          for v in index.names)
assert sorted(c.phase.value for c in even) == ["t2"]*3 + ["tM"]*3 and len(set(even)) == 6
assert even == select_images(index, index.names, [Phase.t2, Phase.tM], list(FocalPlane)[2:5], strategy="balanced",
                             per_phase=3)
with raises(DataError, match="100 frames were asked for, there are only"):
    select_images(index, index.names, [Phase.t2], strategy="balanced", per_phase=100)

# %% [markdown]
# ## What is written
# Three layouts: `split` as published (`images`, `descriptions`, `metadata.csv`), `flat` for trainers that want picture
# and text side by side, `hf` with `metadata.jsonl` as the Hugging Face loader reads it. Pictures are linked, or copied
# where links are impossible; only `encode` decodes them. The folder holds nothing that cannot be made again, so it is
# not forced to disk file by file; `read_image_folder` compares what is there with the record.

# %%
#| export
Layout, Link = Literal["split", "flat", "hf"], Literal["auto", "hard", "sym", "copy", "encode"]
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)

def _linked(source: Path, target: str, link: Link) -> str:
    "Make the second name of a file; what was done, or '' if it has to be copied"
    if link in ("copy", "encode"): return ""
    if link == "sym":
        os.symlink(source.absolute(), target)
        return "sym"
    try: os.link(os.path.realpath(source) if os.path.islink(source) else source, target) # of the file, not of a link
    except OSError as e:
        if link == "hard" or e.errno not in _NO_LINKS: raise
        return ""
    return "hard"

def image_names(
    layout: Layout, # of the folder
    i: int, # position
) -> tuple[str, str]: # picture and text; the text is '' where it is not a file
    "Names of a picture and its text inside the folder"
    if layout == "flat": return f"{i}.jpeg", f"{i}.txt"
    return f"images/{i}.jpeg", f"descriptions/{i}.txt" if layout == "split" else ""

def write_image_folder(
    folder: str | os.PathLike, # to make
    index: EmbryoIndex, # of the data set
    items: Sequence[Choice], # in order
    *,
    template: PromptTemplate | None = None, # sentence of each picture; None: the usual one
    n_planes: int = 1, # focal planes in play
    layout: Layout = "split", # of the files
    link: Link = "auto", # how a picture gets there: hard link or copy, only one of them, or decoded and encoded
    about: dict[str, Any] | None = None, # goes into folder.json
    pseudonym_key: str = "", # replace names of videos by keyed hashes; '': keep them
    on_exists: OnExists = "error", # what to do when the folder is there already
) -> dict[str, Any]: # what folder.json holds, without the list of pictures
    "Write pictures, sentences and their origin as one folder"
    if layout not in ("split", "flat", "hf"): raise ConfigError(f"layout: 'split', 'flat' or 'hf', got {layout!r}")
    if link not in ("auto", "hard", "sym", "copy", "encode"): raise ConfigError(f"link: got {link!r}")
    if pseudonym_key and link == "sym": raise ConfigError("link: symbolic links tell the names of the videos")
    from medvol_nb import __version__
    template = template or PromptTemplate()
    sources = [index.path(c.plane, c.video, c.frame) for c in items]
    if bad := [(s, found[1]) for s in sources if (found := _damage(s, decode=False))]: # before anything is written
        raise FormatError(f"{len(bad)} of {len(items)} selected pictures are damaged: " +
                          "; ".join(f"{s}: {why}" for s, why in bad[:5]))
    shown = {v: fingerprint([pseudonym_key, v], 12) if pseudonym_key else v for v in {c.video for c in items}}
    rows, lines, used = [], [], Counter()
    with atomic(folder, on_exists, folder=True, sync=False) as t:
        for sub in {"split": ("images", "descriptions"), "hf": ("images",), "flat": ()}[layout]: (t/sub).mkdir()
        for i, (c, source) in enumerate(zip(progress(items, "image folder"), sources)):
            (image, text), prompt = image_names(layout, i), template.format(c.phase, c.plane, n_planes)
            if (how := _linked(source, f"{t}/{image}", link)) == "":
                how = "encode" if link == "encode" else "copy"
                data = jpeg_bytes(read_frame(source)) if how == "encode" else source.read_bytes()
                with open(f"{t}/{image}", "wb") as f: f.write(data)
            if text:
                with open(f"{t}/{text}", "wb") as f: f.write(f"{prompt}\n".encode())
            label = frame_label(c.plane, shown[c.video], c.frame)
            lines.append({"filename": f"{i}.jpeg", "label": label, "phase": c.phase.value})
            origin = None if pseudonym_key else source.relative_to(index.root).as_posix()
            rows.append({"file": image, "prompt": prompt, **{k: lines[-1][k] for k in ("label", "phase")},
                         "plane": c.plane.pretty, "source": origin, "bytes": os.stat(f"{t}/{image}").st_size})
            used[how] += 1
        if layout == "split": write_csv(t/"metadata.csv", lines, ("filename", "label", "phase"))
        if layout == "hf":
            each = (to_json({"file_name": r["file"], "text": r["prompt"], "label": r["label"], "phase": r["phase"]},
                            None) for r in rows)
            (t/"metadata.jsonl").write_bytes(("\n".join(each) + "\n").encode())
        facts = {"format": 1, "tool": f"medvol_nb {__version__}", **(about or {}), "layout": layout,
                 "links": dict(used), "prompt": template.text, "prompt_plane": template.plane, "n_planes": n_planes,
                 "synthetic": False, "phases": dict(sorted(Counter(c.phase.value for c in items).items())),
                 "images": len(items), "pseudonymised": bool(pseudonym_key), "licence": DATA_LICENCE,
                 "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        write_json(t/"folder.json", {**facts, "items": rows})
    return facts

# %%
#| export
class FolderItem(NamedTuple):
    "One picture of an image folder"
    path: Path # file
    prompt: str # its sentence
    label: str # identifier, '' if unknown
    phase: Phase | None # what it shows
    plane: FocalPlane | None # where it was focused

def _told(folder: Path) -> list[FolderItem]:
    "Pictures of a folder without record, in the published layout"
    with contextlib.suppress(MissingFile):
        rows = {Path(r["filename"]).stem: r for r in read_csv(folder/"metadata.csv", ("filename", "label", "phase"))}
        if not (folder/"images").is_dir():
            raise FormatError(f"image folder {folder}: metadata.csv without a folder images. Copy the whole folder")
        found = []
        for p in sorted((folder/"images").iterdir(), key=lambda p: (len(p.stem), p.stem)):
            text, row = folder/"descriptions"/f"{p.stem}.txt", rows.get(p.stem, {})
            prompt = text.read_text(encoding="utf-8").removesuffix("\n") if text.is_file() else ""
            plane = parse_label(row["label"])[0] if row else None
            found.append(FolderItem(p, prompt, row.get("label", ""), Phase.parse(row["phase"]) if row else None, plane))
        return found
    raise MissingFile(f"image folder {folder}: holds neither folder.json nor metadata.csv")

def read_image_folder(
    folder: str | os.PathLike, # made by `write_image_folder`, or a published one
) -> list[FolderItem]: # in order
    "Read an image folder; files that are missing or of another size are errors"
    folder = Path(folder)
    if not (folder/"folder.json").is_file(): return _told(folder)
    found, wrong = read_json(folder/"folder.json"), []
    try: odd = [r["file"] for i, r in enumerate(found["items"]) if r["file"] != image_names(found["layout"], i)[0]]
    except (KeyError, TypeError): raise FormatError(f"{folder}/folder.json: is not the record of one") from None
    if odd: raise FormatError(f"{folder}/folder.json: {odd[0]!r} is not the name of a picture of this folder")
    for r in found["items"]:
        path = folder/r["file"]
        if not path.is_file(): wrong.append(f"{r['file']} is missing")
        elif path.stat().st_size != r["bytes"]: wrong.append(f"{r['file']} has {path.stat().st_size} bytes, not "
                                                             f"{r['bytes']}")
    if wrong: raise FormatError(f"image folder {folder}: {len(wrong)} of {len(found['items'])} pictures changed: "
                                f"{'; '.join(wrong[:5])}. Make it again")
    return [FolderItem(folder/r["file"], r["prompt"], r["label"], Phase.parse(r["phase"]), FocalPlane.parse(r["plane"]))
            for r in found["items"]]

# %% [markdown]
# ## The command
# `medvol embryo image-folder`, with the words of the published script and a few more.

# %%
#| export
def _phases(given: Sequence[str]) -> list[Phase]:
    if "all" in given:
        if len(given) > 1: raise ConfigError(f"phases: 'all' stands alone, got {list(given)}")
        return list(Phase)
    if not given: raise ConfigError("phases: at least one is needed, or 'all'")
    if len(set(given)) < len(given): raise ConfigError(f"phases: one comes twice in {list(given)}")
    return [Phase.parse(p) for p in given]

def make_image_folder(
    *,
    dataset: str | os.PathLike, # extracted data set
    split_file: str | os.PathLike, # JSON file from set to videos
    set: str, # train, val (or eval) or test
    phases: Sequence[str], # labels of phases, or all
    image_folder_parent: str | os.PathLike, # existing folder that the new one goes into
    image_folder_name: str | None = None, # name of the new folder; default: a new random one
    shuffle: bool = True, # shuffle the pictures
    seed: int = 0, # of plane, selection and shuffle
    planes: Sequence[str] = ("F+00",), # focal planes, or all
    strategy: Literal["every-phase-vid", "balanced", "random"] = "every-phase-vid", # which frames
    per_phase: int | None = None, # frames of each phase, for balanced
    limit: int | None = None, # pictures in all; more are left out
    on_shortage: Literal["error", "drop"] = "error", # when a phase has fewer than asked for
    plane_mode: Literal["one", "all"] = "one", # one plane for each frame, drawn, or all of them
    layout: Literal["split", "flat", "hf"] = "split", # of the files
    link: Literal["auto", "hard", "sym", "copy", "encode"] = "auto", # how pictures get there
    prompt_template: str | None = None, # sentence with {phase} and {focal_plane}; default: the usual one
    max_per_video: int | None = None, # frames of one video
    exclude_suspects: bool = False, # leave out videos whose tables run on another clock
    pseudonym_key: str | None = None, # replace names of videos by hashes with this key
    on_exists: OnExists = "error", # what to do when the folder is there already
    dry_run: bool = False, # select and check, write nothing
) -> dict[str, Any]: # folder, number of pictures of every phase, links, licence
    "Make a folder of pictures and sentences to train a generator with"
    if not Path(image_folder_parent).is_dir():
        raise MissingFile(f"image_folder_parent: {image_folder_parent} is not a folder")
    name = str(uuid.uuid4()) if image_folder_name is None else image_folder_name
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ConfigError(f"image_folder_name: must be a plain name, got {name!r}")
    folder = Path(image_folder_parent)/name
    if not check_output(folder, on_exists, inputs=[dataset, split_file]):
        return {"folder": str(folder), "skipped": True}
    chosen, template = parse_planes(planes), PromptTemplate(PROMPT if prompt_template is None else prompt_template)
    load_split(split_file, set=set)
    index = build_index(dataset, planes=chosen)
    videos, wanted = load_split(split_file, index, set)[set_name(set)], _phases(phases)
    suspects = [v for v in videos if "timeline_suspect" in index.videos[index.place(v)].flags]
    if exclude_suspects: videos = [v for v in videos if v not in suspects]
    given = {"strategy": strategy, "per_phase": per_phase, "limit": limit, "on_shortage": on_shortage,
             "plane_mode": plane_mode, "max_per_video": max_per_video, "shuffle": shuffle, "seed": seed}
    items = select_images(index, videos, wanted, chosen, **given)
    told = {"folder": str(folder), "images": len(items), "suspect_videos": len(suspects), "licence": DATA_LICENCE}
    if dry_run: return {**told, "phases": dict(sorted(Counter(c.phase.value for c in items).items()))}
    about = {**given, "set": set_name(set), "planes": [p.pretty for p in chosen],
             "requested_phases": [p.value for p in wanted], "exclude_suspects": exclude_suspects, "link": link,
             "split_sha256": file_digest(split_file, 64)}
    facts = write_image_folder(folder, index, items, template=template, n_planes=len(chosen), layout=layout, link=link,
                               about=about, pseudonym_key=pseudonym_key or "", on_exists=on_exists)
    log.info("%s: %d pictures. %s", folder, len(items), DATA_LICENCE)
    return {**told, "phases": facts["phases"], "links": facts["links"]}

# %%
told = make_image_folder(dataset=d/"tree", split_file=d/"split.json", set="eval", phases=["all"],
                         image_folder_parent=d, image_folder_name="val", planes=["F+00", "F15"])
items = read_image_folder(d/"val")
print((d/"val"/"metadata.csv").read_text()[:120])
montage([read_frame(i.path) for i in items[:12]], 6, [f"{i.phase.value} {i.plane.pretty}" for i in items[:12]])

# %%
assert told["links"] == {"hard": len(items)} and items[0].prompt.endswith(f"focal plane {items[0].plane.pretty}")
for i in items:
    plane, video, frame = parse_label(i.label)
    assert os.path.samefile(i.path, index.path(plane, video, frame))
assert (d/"val"/"descriptions"/"0.txt").read_text() == items[0].prompt + "\n"

# %%
common = {"dataset": d/"tree", "split_file": d/"split.json", "set": "train", "image_folder_parent": d}
with raises(ConfigError, match="'all' stands alone"): make_image_folder(**common, phases=["all", "t2"])
with raises(DataError, match="has no set 'trian'"): make_image_folder(**{**common, "set": "trian"}, phases=["all"])
with raises(EmptyDataset, match="no frame of 0 videos shows tHB"): select_images(index, [], [Phase.tHB])
folder.__exit__(None, None, None)
