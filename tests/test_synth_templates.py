"""The template bank: what is cut out of segmentations, what is refused, and that nothing of the source is touched."""
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reference.synth import cropped_and_padded, literal_prepare
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, OutputExists, file_digest, fingerprint
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.parallel import BatchError
from medvol_nb.phantoms import ball, ellipsoid
from medvol_nb.synth.templates import TemplateBank, bounding_box, build_bank, find_sources, procedural_bank, templates
from medvol_nb.volume import read_volume, write_volume

from .faults.injectors import forked

SHAPE = (20, 18, 22)


def save(path: Path, data: np.ndarray, spacing=(1.5, 1.5, 1.5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data.astype(np.uint8) if data.dtype == bool else data
    return write_volume(Volume(data, affine_from(spacing)), path)


def tree(root: Path, subjects: int = 2) -> Path:
    "Subjects with three organs, two ribs, a vertebra and an empty mask each"
    for k in range(subjects):
        folder = root/f"s{k:04d}"/"segmentations"
        for j, name in enumerate(("liver", "spleen", "aorta")):
            save(folder/f"{name}.nii.gz", ellipsoid(SHAPE, (8 + j, 9, 10 + k), (5 - j, 4, 6)))
        for j in (1, 2): save(folder/f"rib_left_{j}.nii.gz", ellipsoid(SHAPE, (10, 4*j + 2, 8), (8, 1.5, 2)))
        save(folder/"vertebrae_L1.nii.gz", ball(SHAPE, 3 + k))
        save(folder/"gallbladder.nii.gz", np.zeros(SHAPE, bool))
        save(root/f"s{k:04d}"/"ct.nii.gz", np.zeros(SHAPE, np.int16))
    return root


def content(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): file_digest(p, 64) for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- the bank itself

@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 1), (3, 5, 7), (8, 8, 8)])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16])
def test_masks_come_back(shape, dtype):
    mask = (np.arange(np.prod(shape)).reshape(shape) % 3 == 0).astype(dtype)*(1 if dtype is bool else 7)
    bank = TemplateBank.of([np.pad(mask, 2), mask[:, :, ::-1]])
    assert np.array_equal(bank[0], mask[bounding_box(mask)] != 0) and bank.voxels[0] == np.count_nonzero(mask)
    assert np.array_equal(bank[-1], (mask[:, :, ::-1] != 0)[bounding_box(mask[:, :, ::-1])])


def test_identity_is_size_and_content():
    one, other = TemplateBank.of([np.ones((2, 3, 4))]), TemplateBank.of([np.ones((4, 3, 2))])
    assert one.digest != other.digest and one.digest == TemplateBank.of([np.pad(np.ones((2, 3, 4)), 1)], ["x"]).digest
    assert np.array_equal(one.packed(0), other.packed(0))


def test_saved_opened_pickled(tmp_path):
    bank = procedural_bank(5, seed=3, size=(8, 20))
    bank.save(tmp_path/"bank")
    opened = TemplateBank.open(tmp_path/"bank")
    opened.verify()
    travelled = pickle.dumps(opened)
    assert len(travelled) < 500 and isinstance(opened.bits, np.memmap)
    for other in (opened, pickle.loads(travelled), pickle.loads(pickle.dumps(bank))):
        assert other.digest == bank.digest and other.names == bank.names and other.sources == bank.sources
        assert all(np.array_equal(other[i], bank[i]) for i in range(5))
    with pytest.raises(OutputExists): bank.save(tmp_path/"bank")
    with pytest.raises(IndexError): bank[5]


def test_the_working_folder_does_not_matter(tmp_path, monkeypatch):
    procedural_bank(2, size=(6, 9)).save(tmp_path/"bank")
    monkeypatch.chdir(tmp_path)
    bank = TemplateBank.open("bank")
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(bank)).digest == bank.digest and len(bank.names) == 2


def damage(path: Path, what: str) -> None:
    if what == "no head": (path/"bank.json").unlink()
    elif what == "other version": (path/"bank.json").write_text('{"medvol template bank": 99}')
    elif what == "short masks": (path/"masks.npy").write_bytes((path/"masks.npy").read_bytes()[:-9])
    elif what == "no masks": (path/"masks.npy").unlink()
    elif what == "index of objects": np.save(path/"index.npy", np.array([{}], object), allow_pickle=True)
    elif what == "starts beyond": np.save(path/"index.npy", np.load(path/"index.npy") + np.array([2**40, 0, 0, 0, 0]))
    elif what == "huge sizes": np.save(path/"index.npy", np.load(path/"index.npy") + np.array([0, 2**40, 0, 0, 0]))
    elif what == "fewer rows": np.save(path/"index.npy", np.load(path/"index.npy")[:1])


@pytest.mark.parametrize("what", ["no head", "other version", "short masks", "no masks", "index of objects",
                                  "starts beyond", "huge sizes", "fewer rows"])
def test_damaged_banks_are_refused(tmp_path, what):
    path = procedural_bank(3, size=(6, 9)).save(tmp_path/"bank")
    damage(path, what)
    with pytest.raises((FormatError, MissingFile), match=str(path)): TemplateBank.open(path)


def test_verify_finds_a_flipped_bit(tmp_path):
    path = procedural_bank(3, size=(6, 9)).save(tmp_path/"bank")
    raw = bytearray((path/"masks.npy").read_bytes())
    raw[-3] ^= 4
    (path/"masks.npy").write_bytes(raw)
    with pytest.raises(FormatError, match="template 2 .*is not what was stored"): TemplateBank.open(path).verify()


def test_procedural_shapes_do_not_depend_on_their_number():
    few, many = procedural_bank(4, seed=9, size=(8, 30)), procedural_bank(9, seed=9, size=(8, 30))
    assert all(np.array_equal(few[i], many[i]) for i in range(4))
    assert few.digest != procedural_bank(4, seed=10, size=(8, 30)).digest and (many.voxels >= 2).all()


# ---------------------------------------------------------------- building

def test_tree(tmp_path):
    root = tree(tmp_path/"tree")
    before = content(root)
    report = build_bank(root, tmp_path/"bank")
    bank = TemplateBank.open(tmp_path/"bank")
    bank.verify()
    assert content(root) == before
    assert bank.names == 2*["aorta", "liver", "spleen", "ribs", "vertebrae"]
    assert bank.sources == 5*["s0000"] + 5*["s0001"]
    assert report["templates"] == 10 and report["skipped"] == {"empty": 2} and report["bad"] == []
    for row, i in zip(bank.table, range(len(bank))):
        union = sum(np.asarray(read_volume(root/row["source"]/"segmentations"/f).data) for f in
                    [Path(f).name for f in row["files"]]) > 0
        lo, hi = row["bbox"]
        assert np.array_equal(bank[i], union[bounding_box(union)]) and union.sum() == row["voxels"]
        assert [s.start for s in bounding_box(union)] == lo and [s.stop for s in bounding_box(union)] == hi


def test_equal_to_step_0_of_the_reference(tmp_path):
    "Same shapes as the reference leaves behind, which it does in place"
    build_bank(tree(tmp_path/"tree", 1), tmp_path/"bank")
    literal_prepare(tmp_path/"tree"/"s0000")
    left = sorted((tmp_path/"tree").rglob("*.nii.gz"))
    assert [p.name for p in left] == ["all_ribs.nii.gz", "all_vertebrae.nii.gz", "aorta.nii.gz", "liver.nii.gz",
                                      "spleen.nii.gz"]
    bank = TemplateBank.open(tmp_path/"bank")
    theirs = [cropped_and_padded(np.asarray(read_volume(p).data), (1, 1, 1)) > 0 for p in left]
    ours = {n: bank[i] for i, n in enumerate(bank.names)}
    for p, mask in zip(left, theirs): assert np.array_equal(ours[p.name[:-7].replace("all_", "")], mask)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_do_not_change_a_byte(tmp_path, workers):
    root = tree(tmp_path/"tree", 3)
    build_bank(root, tmp_path/"a")
    build_bank(root, tmp_path/"b", workers=workers)
    assert content(tmp_path/"a") == content(tmp_path/"b")
    assert not list(tmp_path.glob(".*parts"))


def test_resumed_equals_uninterrupted(tmp_path):
    "Death at counted steps; subjects that were done are not read again"
    root = tree(tmp_path/"tree", 4)
    build_bank(root, tmp_path/"whole")
    expected, out = content(tmp_path/"whole"), tmp_path/"work"/"bank"
    out.parent.mkdir()
    steps = forked(lambda: build_bank(root, out), tmp_path/"work")
    shutil.rmtree(out)
    for at in range(4, steps, max(1, steps//6)):
        assert forked(lambda: build_bank(root, out), tmp_path/"work", at) < 0
        build_bank(root, out, on_exists="overwrite")
        assert content(out) == expected
        shutil.rmtree(out)
        assert not [p for p in out.parent.iterdir() if p.name.endswith(".parts")]


def test_a_changed_source_is_not_resumed(tmp_path):
    root = tree(tmp_path/"tree", 2)
    out = tmp_path/"work"/"bank"
    out.parent.mkdir()
    steps = forked(lambda: build_bank(root, out), tmp_path/"work")
    shutil.rmtree(out)
    forked(lambda: build_bank(root, out), tmp_path/"work", steps - 8)
    save_again(root/"s0000"/"segmentations"/"liver.nii.gz", ball(SHAPE, 6).astype(np.uint8))
    build_bank(root, out)
    assert TemplateBank.open(out)[1].sum() == ball(SHAPE, 6).sum()


def test_two_roots_and_a_procedural_bank(tmp_path):
    a, b = tree(tmp_path/"a", 1), tree(tmp_path/"b", 1)
    report = build_bank([a, b], tmp_path/"bank")
    assert report["templates"] == 10 and set(TemplateBank.open(tmp_path/"bank").sources) == {"0/s0000", "1/s0000"}
    made = templates(tmp_path/"made", procedural=4, seed=2)
    assert made["digest"] == procedural_bank(4, 2).digest


def test_own_merge_rules(tmp_path):
    root = tree(tmp_path/"tree", 1)
    templates(tmp_path/"bank", totalsegmentator_path=[str(root)], merge=("soft=*e*n*",), max_workers=0)
    assert TemplateBank.open(tmp_path/"bank").names == ["aorta", "liver", "rib_left_1", "rib_left_2", "vertebrae_L1",
                                                        "soft"]
    with pytest.raises(ConfigError, match="name=pattern"): templates(tmp_path/"b2", merge=("x",))


def test_D16_any_label_map_is_a_source(tmp_path):
    "The reference only finds **/segmentations/*.nii.gz"
    lbl = np.zeros(SHAPE, np.int16)
    lbl[2:6, 3:9, 4:12], lbl[10:15, 3:9, 4:12], lbl[17:, 15:, 20:] = 300, 2, 7
    save(tmp_path/"maps"/"deep"/"case_1.nii.gz", lbl)
    write_volume(Volume((lbl == 2).astype(np.float32), np.eye(4)), tmp_path/"maps"/"case_2.npy")
    build_bank(tmp_path/"maps", tmp_path/"bank")
    bank = TemplateBank.open(tmp_path/"bank")
    assert dict(zip(bank.names, bank.voxels.tolist())) == {"case_2": 240, "case_1:2": 240, "case_1:7": 3*3*2,
                                                           "case_1:300": 192}
    assert bank.table[-1]["label"] == 300 and bank.table[-1]["bbox"] == [[2, 3, 4], [6, 9, 12]]
    build_bank(tmp_path/"maps"/"deep"/"case_1.nii.gz", tmp_path/"single")
    assert len(TemplateBank.open(tmp_path/"single")) == 3


def test_components_and_spacing(tmp_path):
    lbl = np.zeros((24, 24, 24), np.uint8)
    lbl[2:8, 2:8, 2:8] = lbl[12:20, 12:20, 12:20] = 1
    lbl[22, 22, 22] = 1
    save(tmp_path/"a.nii.gz", lbl, (1, 1, 2))
    report = build_bank(tmp_path/"a.nii.gz", tmp_path/"pieces", components=True)
    assert TemplateBank.open(tmp_path/"pieces").voxels.tolist() == [216, 512]
    assert report["skipped"] == {"smaller than 2": 1}
    build_bank(tmp_path/"a.nii.gz", tmp_path/"fine", components=True, spacing=1.0)
    assert TemplateBank.open(tmp_path/"fine").voxels.tolist() == [432, 1024, 2]


# ---------------------------------------------------------------- what is refused, and what survives

def test_D3_a_damaged_rib_is_told_and_nothing_is_lost(tmp_path):
    "The reference skips the merge silently, deletes the ribs, and ends with 0"
    root = tree(tmp_path/"tree")
    broken = root/"s0001"/"segmentations"/"rib_left_2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-20])
    before = content(root)
    with pytest.raises(BatchError, match="rib_left_2.nii.gz"):
        build_bank(root, tmp_path/"bank", delete_sources=True)
    assert content(root) == before
    bank = TemplateBank.open(tmp_path/"bank")
    assert bank.names.count("ribs") == 1 and bank.names.count("vertebrae") == 2
    report = build_bank(root, tmp_path/"bank", max_bad=1, on_exists="skip")
    assert len(report["bad"]) == 1 and report["skipped"] == {"empty": 2, "not merged, a part of it is damaged": 1}


CORRUPT = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-25]),
    "half": lambda p: p.write_bytes(p.read_bytes()[:len(p.read_bytes())//2]),
    "wrong magic": lambda p: p.write_bytes(b"NOPE" + p.read_bytes()[4:]),
    "no bytes": lambda p: p.write_bytes(b""),
    "NaN": lambda p: save_again(p, np.full(SHAPE, np.nan, np.float32)),
    "fractions": lambda p: save_again(p, np.full(SHAPE, 0.3, np.float32)),
    "4D": lambda p: save_again(p, np.ones((2, *SHAPE), np.uint8), "cxyz"),
    "negative": lambda p: save_again(p, np.full(SHAPE, -1, np.int16)),
    "mismatched grid": lambda p: save_again(p, np.ones((5, 5, 5), np.uint8)),
}


def save_again(path: Path, data: np.ndarray, axes: str = "xyz") -> None:
    write_volume(Volume(data, np.eye(4), axes), path, "overwrite")


@pytest.mark.parametrize("kind", CORRUPT)
def test_A8_corrupt_inputs(tmp_path, kind):
    root = tree(tmp_path/"tree")
    path = root/"s0000"/"segmentations"/"liver.nii.gz"
    CORRUPT[kind](path)
    before = content(root)
    with pytest.raises(BatchError, match="s0000/segmentations/liver.nii.gz"): build_bank(root, tmp_path/"bank")
    assert content(root) == before and len(TemplateBank.open(tmp_path/"bank")) == 9
    build_bank(root, tmp_path/"b2", max_bad=1)


def test_A8_an_image_is_not_a_label_map(tmp_path):
    img = np.arange(20*18*22, dtype=np.int16).reshape(SHAPE)
    save(tmp_path/"maps"/"ct.nii.gz", img)
    with pytest.raises(DataError, match="no shape is left .*Is it an image"):
        build_bank(tmp_path/"maps", tmp_path/"bank")
    assert not (tmp_path/"bank").exists() and not list(tmp_path.glob(".*"))


def test_D18_nothing_to_draw_from_is_an_error_at_once(tmp_path):
    "The reference draws again and again while masks are empty"
    save(tmp_path/"tree"/"s1"/"segmentations"/"a.nii.gz", np.zeros(SHAPE, bool))
    with pytest.raises(DataError, match="no shape is left"): build_bank(tmp_path/"tree", tmp_path/"bank")
    (tmp_path/"nothing").mkdir()
    with pytest.raises(DataError, match="no masks or label maps"): build_bank(tmp_path/"nothing", tmp_path/"bank")
    with pytest.raises(MissingFile, match="does not exist"): build_bank(tmp_path/"gone", tmp_path/"bank")
    with pytest.raises(DataError, match="no folder was given"): build_bank([], tmp_path/"bank")
    assert [p.name for p in tmp_path.iterdir() if "bank" in p.name] == []


def test_the_bank_does_not_lie_in_its_source(tmp_path):
    root = tree(tmp_path/"tree", 1)
    with pytest.raises(DataError, match="would lie inside its source"): build_bank(root, root/"bank")
    with pytest.raises(DataError): build_bank(root, root, on_exists="overwrite")


def test_deletion_on_request_only_and_only_what_is_in_the_bank(tmp_path):
    root = tree(tmp_path/"tree", 1)
    save(root/"s0000"/"segmentations"/"dot.nii.gz", ellipsoid(SHAPE, 5, 0.1))
    build_bank(root, tmp_path/"bank")
    assert len(list(root.rglob("*.nii.gz"))) == 9
    late = root/"s0000"/"segmentations"/"later.nii.gz"
    save(late, ball(SHAPE, 4))
    report = build_bank(root, tmp_path/"bank", on_exists="skip", delete_sources=True)
    assert report["deleted"] == 7
    assert sorted(p.name for p in root.rglob("*.nii.gz")) == ["ct.nii.gz", "dot.nii.gz", "later.nii.gz"]


def test_deletion_stops_at_a_file_that_changed(tmp_path):
    root = tree(tmp_path/"tree", 1)
    build_bank(root, tmp_path/"bank")
    save_again(root/"s0000"/"segmentations"/"aorta.nii.gz", ball(SHAPE, 5).astype(np.uint8))
    with pytest.raises(DataError, match="aorta.nii.gz has changed"):
        build_bank(root, tmp_path/"bank", on_exists="skip", delete_sources=True)
    assert (root/"s0000"/"segmentations"/"aorta.nii.gz").exists()


def test_a_bank_of_something_else_is_not_used_again(tmp_path):
    a, b = tree(tmp_path/"a", 1), tree(tmp_path/"b", 1)
    (tmp_path/"link").symlink_to(a)
    build_bank(a, tmp_path/"bank")
    for roots, more in ((b, {}), ([a, b], {}), (a/"s0000"/"segmentations"/"liver.nii.gz", {}), (a, {"min_voxels": 9}),
                        (b, {"delete_sources": True})):
        with pytest.raises(OutputExists, match="made from other sources or with other settings"):
            build_bank(roots, tmp_path/"bank", on_exists="skip", **more)
    for root in (a, tmp_path/"link", a/"s0000"): # the same files below each of them
        assert build_bank(root, tmp_path/"bank", on_exists="skip")["templates"] == 5
    assert len(list(a.rglob("*.nii.gz"))) == len(list(b.rglob("*.nii.gz"))) == 8
    procedural_bank(3, size=(6, 8)).save(tmp_path/"other")
    with pytest.raises(OutputExists, match="other sources"): build_bank(a, tmp_path/"other", on_exists="skip")
    templates(tmp_path/"made", procedural=3)
    assert templates(tmp_path/"made", procedural=3, on_exists="skip")["templates"] == 3
    for other in ({"procedural": 4}, {"procedural": 3, "seed": 1}):
        with pytest.raises(OutputExists, match="other sources"): templates(tmp_path/"made", on_exists="skip", **other)


def test_find_sources_of_a_single_subject(tmp_path):
    root = tree(tmp_path/"tree", 1)
    assert find_sources(root/"s0000")[1][0][0] == "." and find_sources(root/"s0000"/"segmentations")[1][0][1] == "masks"


def test_import_is_light():
    "Workers read banks; neither torch nor MONAI comes with it"
    code = "import sys, medvol_nb.synth.templates, medvol_nb.synth.labels; print({'torch', 'monai'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert out.stdout.strip() == "set()", out.stderr


# ---------------------------------------------------------------- real organs

@pytest.mark.parametrize("subject, files, shapes", [("s0001", 61, 43), ("s0002", 95, 95)])
def test_real_organs(data_dir, tmp_path, subject, files, shapes):
    "61 organs of one subject, ribs and vertebrae merged; 95 structures of an atlas whose ribs are named otherwise"
    source = data_dir/"synthetic_labels"/"totalseg_layout"/subject
    found = find_sources(source)[1]
    assert len(found) == 1 and len(found[0][2]) == files
    report = build_bank(source, tmp_path/"bank")
    bank = TemplateBank.open(tmp_path/"bank")
    bank.verify()
    assert report["templates"] == shapes and report["bad"] == [] and report["skipped"] == {}
    total = sum(np.prod(read_volume(source/f).shape) for f in found[0][2][:1])*files
    assert report["bytes"] < total/30
    merged = [r for r in bank.table if len(r["files"]) > 1]
    assert sorted(r["name"] for r in merged) == (["ribs", "vertebrae"] if subject == "s0001" else [])
    for i in range(0, len(bank), 7):
        if len(bank.table[i]["files"]) > 1: continue
        mask = np.asarray(read_volume(source/bank.table[i]["files"][0]).data) != 0
        assert np.array_equal(bank[i], mask[bounding_box(mask)])
    assert fingerprint([r["sha256"] for r in bank.table]) == bank.digest
