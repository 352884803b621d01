"Row 19: masks that do not fit, nothing in the mask, views larger than the scan, single voxels, slices of 8 mm"
import numpy as np

from medvol_nb.core import DataError, read_csv, rng_for
from medvol_nb.embed.data import network_volume
from medvol_nb.embed.prepare import prepare
from medvol_nb.embed.sampler import Case, OrganSet, ViewSet, read_cases
from medvol_nb.embed.views import ViewSampler, open_source
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.parallel import BatchError
from medvol_nb.phantoms import abdomen
from medvol_nb.volume import read_volume, write_volume

from .rows import SilentlyWrong

PLACE = affine_from((5, 5, 8))


def person(k=0): return abdomen((60, 50, 40), seed=k)


def save(img, path, affine=PLACE):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_volume(Volume(img, affine), path, "overwrite")


def case(img, mask, name="odd", affine=PLACE):
    return Case(name, (Volume(img, affine),), (Volume(mask, affine),))


def good(): return [case(person(k).img, person(k).lbl.astype(np.uint8), f"good{k}") for k in range(2)]


def replaced(sampler, odd, word, caplog):
    "The odd case never becomes a sample; the reason is logged with its name"
    views = ViewSet([*good(), odd], 6, sampler=sampler)
    for seed in range(4):
        if views.draw(2, rng_for(seed))["index"] == 2: raise SilentlyWrong("a useless case became a sample")
    assert odd.name in caplog.text and word in caplog.text


def test_row_19_masks_views_and_voxels_at_their_limits(instances, tmp_path, caplog):
    "Skipped with a reason, replaced, or handled; always ends"
    p, always = person(), ViewSampler("masksample", (12, 16, 16), 6, independent=0)
    lbl = p.lbl.astype(np.uint8)

    with instances("an organ on another grid than its scan"):
        for k in range(2):
            save(p.img, tmp_path/"ts"/f"s{k}"/"ct.nii.gz")
            save((lbl == 2).astype(np.uint8)[: 60 - k], tmp_path/"ts"/f"s{k}"/"segmentations"/"liver.nii.gz")
        try: prepare(tmp_path/"ts", tmp_path/"ts_out", kind="totalseg")
        except BatchError as e: assert "1 of 2" in str(e) and "another grid" in str(e)
        else: raise SilentlyWrong("a mask of another shape was merged")
        assert [r["name"] for r in read_csv(tmp_path/"ts_out"/"index.csv")] == ["s0.zarr"]
        assert "s1" in read_csv(tmp_path/"ts_out"/"failed.csv")[0]["path"]

    with instances("a training mask of another shape"):
        odd = Case("odd", (Volume(p.img, PLACE),), (Volume(lbl[1:], PLACE),))
        replaced(always, odd, "another grid", caplog)

    with instances.refuses("a body mask of another shape", DataError, "mask of shape", "for a scan of shape"):
        network_volume(Volume(p.img, PLACE), body=np.ones((2, 2, 2), bool))

    with instances("a scan of nothing but air"):
        save(p.img, tmp_path/"in"/"good.nii.gz")
        save(np.random.default_rng(0).integers(-1024, -990, p.img.shape).astype(np.int16), tmp_path/"in"/"air.nii.gz")
        try: prepare(tmp_path/"in", tmp_path/"out", spacing=6)
        except BatchError as e: assert "empty body mask" in str(e)
        else: raise SilentlyWrong("air was prepared")
        assert [c.name for c in read_cases(tmp_path/"out")] == ["good"]

    with instances("an empty training mask"):
        replaced(always, case(p.img, lbl*0), "its mask is empty", caplog)

    with instances("views a little larger than the scan"):
        source = open_source(Volume(p.img, PLACE))
        pair = ViewSampler(patch=(40, 48, 60), spacing=8)(source, rng_for(0))
        assert not pair.valid.all() and pair.valid.any() and (pair.images[~pair.valid] == -50).all()

    with instances("views of more than twice the scan"):
        thin = person().img[:, :, :4]
        replaced(ViewSampler(patch=(12, 16, 16), spacing=6), case(thin, thin*0 + 1), "too small", caplog)

    with instances("an organ of a single voxel"):
        one = np.zeros(p.img.shape, np.uint8)
        one[30, 25, 20] = 1
        save(p.img, tmp_path/"dot"/"s0"/"ct.nii.gz")
        save(one, tmp_path/"dot"/"s0"/"segmentations"/"dot.nii.gz")
        prepare(tmp_path/"dot", tmp_path/"dot_out", kind="totalseg")
        assert (read_volume(tmp_path/"dot_out"/"masks"/"s0.zarr").data > 0).sum() == 1
        organs = OrganSet([*good(), case(p.img, one)], 6, crop=(20, 20, 20))
        for seed in range(4): assert all((a > 0).any() for a in organs.draw(2, rng_for(seed))["labels"])

    with instances("a training mask of a single voxel"):
        source = open_source(Volume(p.img, PLACE), Volume(one, PLACE))
        place = PLACE[:3, :3] @ (30, 25, 20) + PLACE[:3, 3]
        views = [v for k in range(10) for v in always(source, rng_for(k)).views]
        at = np.array([v.to_index(place) for v in views])
        assert ((at > -1.5) & (at < np.array([12, 16, 16]) + 0.5)).all(axis=1).mean() > 0.7

    with instances("voxels of 0.3 x 0.3 x 8 mm"):
        fine = np.repeat(np.repeat(person(1).img[10:50, 10:40, :6], 5, 0), 5, 1)
        vol = Volume(fine, affine_from((0.3, 0.3, 8)))
        img, grid = network_volume(vol)
        assert img.shape == grid.shape == (24, 23, 30)
        save(fine, tmp_path/"flat"/"a.nii.gz", vol.affine)
        prepare(tmp_path/"flat", tmp_path/"flat_out")
        pair = ViewSampler(patch=(12, 16, 16))(open_source(vol), rng_for(0))
        assert np.isfinite(pair.images).all() and pair.valid.any()
    instances.check(10)
