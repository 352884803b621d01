"""Rows 29, 30 and 31: useless templates, death between merging and deleting, grids and ensembles at their limits."""
import shutil

import numpy as np

from medvol_nb.core import DataError, file_digest
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.parallel import BatchError
from medvol_nb.phantoms import ball, ellipsoid
from medvol_nb.synth.labels import KINDS, EnsembleConfig, draw_plan, render_labels
from medvol_nb.synth.templates import TemplateBank, build_bank, procedural_bank
from medvol_nb.volume import write_volume

from .injectors import bit_flips, forked
from .rows import SilentlyWrong

SHAPE = (16, 18, 20)


def save(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_volume(Volume(np.asarray(data).astype(np.uint8), affine_from((1.5, 1.5, 1.5))), path, "overwrite")


def subjects(root, n=1):
    "Two good organs, two ribs and a vertebra a subject"
    for k in range(n):
        folder = root/f"s{k}"/"segmentations"
        for name, r in (("liver", 6), ("spleen", 4)): save(folder/f"{name}.nii.gz", ball(SHAPE, r))
        for j in (1, 2): save(folder/f"rib_left_{j}.nii.gz", ellipsoid(SHAPE, (8, 5*j, 9), (6, 1.5, 2)))
        save(folder/"vertebrae_L1.nii.gz", ball(SHAPE, 3))
    return root


def digests(root): return {p.relative_to(root).as_posix(): file_digest(p, 64) for p in sorted(root.rglob("*.gz"))}


def test_row_29_useless_templates(instances, tmp_path):
    "Skipped with a count or listed as damaged; the others are used, the source stays, and nothing is drawn for ever"
    def case(name, make, expect):
        root, out = subjects(tmp_path/name/"tree"), tmp_path/name/"bank"
        path = root/"s0"/"segmentations"/"odd.nii.gz"
        make(path)
        before = digests(root)
        with instances(name):
            try: report = build_bank(root, out)
            except BatchError as e:
                assert expect == "damaged" and "odd.nii.gz" in str(e)
                report = build_bank(root, out, on_exists="skip", max_bad=1)
            else: assert report["skipped"] == {expect: 1}
            bank = TemplateBank.open(out)
            if "odd" in bank.names: raise SilentlyWrong("a useless mask became a template")
            assert sorted(bank.names) == ["liver", "ribs", "spleen", "vertebrae"] and digests(root) == before

    damaged = next(raw for _, raw in bit_flips(save(tmp_path/"x.nii.gz", ball(SHAPE, 5)).read_bytes(), 1, seed=4))
    whole = save(tmp_path/"x.nii.gz", ball(SHAPE, 5)).read_bytes()
    case("empty mask", lambda p: save(p, np.zeros(SHAPE)), "empty")
    case("all voxels equal", lambda p: save(p, np.ones(SHAPE)), "every voxel is inside, this is no shape")
    case("one voxel", lambda p: save(p, ellipsoid(SHAPE, 4, 0.1)), "smaller than 2")
    case("flipped bit", lambda p: p.write_bytes(damaged), "damaged")
    case("cut off", lambda p: p.write_bytes(whole[:-40]), "damaged")
    case("no bytes", lambda p: p.write_bytes(b""), "damaged")
    for name, values in (("none left: empty masks", (0, 0)), ("none left: nothing but constants", (1, 5))):
        root, out = tmp_path/name/"tree", tmp_path/name/"bank"
        for k, v in enumerate(values): save(root/f"s{k}"/"segmentations"/"a.nii.gz", np.full(SHAPE, v))
        with instances.refuses(name, DataError, "no shape is left of 2 files", "2 skipped"): build_bank(root, out)
        assert not out.exists()
    instances.check(8)


def test_row_30_death_between_merge_and_delete(instances, tmp_path):
    "At nine steps: an original is gone only if the bank that holds it is whole; the same command finishes the work"
    def prepare():
        shutil.rmtree(tmp_path/"work", ignore_errors=True)
        return subjects(tmp_path/"work"/"tree", 2), tmp_path/"work"/"bank"

    root, out = prepare()
    build_bank(root, tmp_path/"expected")
    expected = TemplateBank.open(tmp_path/"expected").digest
    originals, work = digests(root), tmp_path/"work"
    job = lambda: build_bank(root, out, delete_sources=True, on_exists="skip")
    steps = forked(job, work)
    assert not digests(root) and TemplateBank.open(out).digest == expected
    first = steps - len(originals) # the last steps remove the originals
    for at in sorted({2, first//4, first//2, 3*first//4, first - 1, first, first + 1, first + 4, steps}):
        root, out = prepare()
        with instances(f"step {at} of {steps}"):
            assert forked(job, work, at) < 0
            left = digests(root)
            assert left.items() <= originals.items()
            if left != originals:
                bank = TemplateBank.open(out)
                bank.verify()
                if bank.digest != expected: raise SilentlyWrong("originals are gone, the bank is not what they were")
            build_bank(root, out, delete_sources=True, on_exists="skip")
            assert TemplateBank.open(out).digest == expected and not digests(root)
    with instances("without the flag nothing is deleted"):
        root, out = prepare()
        build_bank(root, out)
        assert digests(root) == originals
    instances.check(10)


def test_row_31_ensembles_at_their_limits(instances):
    "Side 1, 7 and 97, one label only: a valid map from both implementations"
    bank = procedural_bank(6, seed=1, size=(8, 40))
    for side in (1, 7, 97):
        for kind in KINDS:
            with instances(f"side {side}, {kind}"):
                masked, few = kind != KINDS[0], {"min_templates": 1, "max_templates": 1} if side == 7 else {}
                for preset in ("anatomix", "medvol"):
                    config = EnsembleConfig(preset=preset, shape=side, p_mask=float(masked),
                                            p_envelope=float(kind == KINDS[2]), **few)
                    plan = draw_plan(0, 0, config, len(bank))
                    lbl = render_labels(plan, bank)
                    assert plan.kind == kind and lbl.shape == (side,)*3 and lbl.max() <= plan.max_label
                    if not np.array_equal(lbl, render_labels(plan, bank, backend="torch")):
                        raise SilentlyWrong("the two implementations differ")
    instances.check(9)
