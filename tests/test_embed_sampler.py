"Mixed batches: exact slots, disjoint ranks, exact resume, equal bytes for any number of workers; bad scans replaced"
from collections import Counter

import numpy as np
import pytest
import torch

from medvol_nb.core import ConfigError, DataError, MissingFile, raises, rng_for, write_csv
from medvol_nb.embed.intensity import AUGMENTS, Augment
from medvol_nb.embed.prepare import prepare
from medvol_nb.embed.sampler import Case, MixedBatches, MixedBatchSampler, OrganSet, PairSet, ViewSet, read_cases
from medvol_nb.embed.views import ViewSampler
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.phantoms import abdomen
from medvol_nb.torchcore import FitConfig, fit, seeded
from medvol_nb.volume import write_volume

SMALL = ViewSampler("masksample", (12, 16, 16), spacing=6, degrees=5)


def scan(k, mr=False):
    p = abdomen((40, 36, 32), seed=k)
    img = np.where(p.img > -500, 400 - np.abs(p.img - 60), 0) if mr else p.img
    return Volume(img.astype(np.int16), affine_from(p.spacing)), Volume(p.lbl.astype(np.uint8), affine_from(p.spacing))


def cases(n=4, mr=False):
    made = [(scan(k), scan(k, True)) for k in range(n)]
    if mr: return [Case(f"p{k}", (a[0], b[0]), (a[1], b[1])) for k, (a, b) in enumerate(made)]
    return [Case(f"p{k}", (a[0],), (a[1],)) for k, (a, _) in enumerate(made)]


@pytest.fixture(scope="module")
def sets():
    return {"views": [ViewSet(cases(4), 6, sampler=SMALL), ViewSet(cases(2, True), 6, sampler=SMALL, odds=(0.6, 0.4))],
            "organs": [OrganSet(cases(3), 6, crop=(20, 24, 24))],
            "pairs": [PairSet(cases(2, True), 6, crop=(16, 20, 20), jitter=2)]}


def equal(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return all(map(equal, a, b)) if isinstance(a, list) else a == b


# ------------------------------------------------------------------------------------------------------- the sampler

@pytest.mark.parametrize("lengths, size, tail", [([7, 3], 4, 1), ([5, 6, 11], 5, 2), ([2, 50], 3, 3), ([9, 1], 2, 1)])
def test_A3_slots_are_exact_in_every_batch(lengths, size, tail):
    sampler, first = MixedBatchSampler(lengths, size, tail, seed=3), sum(lengths[:-1])
    for b in range(100):
        idx = [d.index for d in sampler.batch(b)]
        assert len(idx) == size and sum(i >= first for i in idx) == tail


@pytest.mark.parametrize("world", [1, 2, 3])
def test_A3_ranks_are_disjoint_and_every_item_comes_once_a_round(world):
    samplers = [MixedBatchSampler([10, 5], 3, 1, seed=1, rank=r, world=world) for r in range(world)]
    body, tail = [], []
    for b in range(30):
        for j in (0, 1): body += [s.batch(b)[j].index for s in samplers]
        tail += [s.batch(b)[2].index for s in samplers]
    for k in range(0, len(body) - 10, 10): assert sorted(body[k:k + 10]) == list(range(10))
    for k in range(0, len(tail) - 5, 5): assert sorted(tail[k:k + 5]) == list(range(10, 15))


@pytest.mark.parametrize("world", [2, 4])
def test_A3_processes_see_together_what_one_sees(world):
    "Items and random streams: rank r's slot j is slot j W + r of the single process"
    one = MixedBatchSampler([11, 4], 2*world, world, seed=5)
    many = [MixedBatchSampler([11, 4], 2, 1, seed=5, rank=r, world=world) for r in range(world)]
    for b in range(40): assert sorted(d for s in many for d in s.batch(b)) == sorted(one.batch(b))


def test_A3_start_batch_is_skipping():
    for k in (1, 7, 100):
        later, all_ = iter(MixedBatchSampler([6, 5], 4, start_batch=k)), iter(MixedBatchSampler([6, 5], 4))
        for _ in range(k): next(all_)
        assert [next(later) for _ in range(5)] == [next(all_) for _ in range(5)]


def test_D01_a_single_data_set_is_legal():
    "The reference's only sampler reads boundaries that a single data set does not have"
    seen = [d.index for b in range(3) for d in MixedBatchSampler([6], 2).batch(b)]
    assert sorted(seen) == list(range(6))


def test_D08_E3_no_data_set_is_lost():
    "tail_slots=1 gives 3 : 1, tail_slots=0 uniform; only the quirk gives 4 : 0"
    def histogram(**options):
        sampler = MixedBatchSampler([20, 20], 4, **options)
        count = Counter(d.index >= 20 for b in range(1000) for d in sampler.batch(b))
        return count[False]/1000, count[True]/1000
    assert histogram(tail_slots=1) == (3, 1)
    assert histogram(tail_slots=0) == (2, 2)
    assert histogram(tail_slots=0, exclude_tail=True) == (4, 0)


def test_D22_ranks_draw_different_tails_and_nothing_depends_on_history():
    a, b = (MixedBatchSampler([9, 50], 3, rank=r, world=2) for r in (0, 1))
    tails = [(a.batch(k)[-1].index, b.batch(k)[-1].index) for k in range(20)]
    assert all(x != y for x, y in tails)
    assert a.batch(1234) == MixedBatchSampler([9, 50], 3, rank=0, world=2).batch(1234)
    d = a.batch(3)[0]
    assert d.rng(0).random() == d.rng(0).random() != d.rng(1).random()


def test_D30_a_batch_holds_what_its_branch_needs(sets):
    "The reference loads all slots and then throws away what the branch does not use"
    loaded = Counter()
    class Spy:
        keys = ["a", "b"]
        def __init__(self, kind): self.kind = kind
        def __len__(self): return 2
        def draw(self, i, rng):
            loaded[self.kind] += 1
            return {"index": i, "images": np.zeros((2, 1, 1, 1), np.float32)}
    batches = MixedBatches({"views": [Spy("views")], "organs": [Spy("organs")]}, {"views": 4, "organs": 1},
                           odds={"views": 0.6, "organs": 0.4}, per_epoch=100)
    kinds = Counter(b["branch"] for _, b in batches.epoch(0))
    assert loaded == {"views": 4*kinds["views"], "organs": kinds["organs"]} and 25 <= kinds["organs"] <= 55


def test_branches_are_shared_and_far_batches_are_quick():
    odds = {"a": 0.3, "b": 0.7}
    kinds, slots = {"a": 5, "b": 9}, {"a": 1, "b": 2}
    samplers = [MixedBatchSampler(kinds, slots=slots, odds=odds, rank=r, world=3) for r in range(3)]
    for b in (0, 1, 4095, 4096, 50_000): assert len({s.branch(b) for s in samplers}) == 1
    share = np.mean([samplers[0].branch(b) == "a" for b in range(5000)])
    assert 0.27 < share < 0.33


@pytest.mark.parametrize("call, kind, word", [
    (lambda: MixedBatchSampler([3, 4], 2, 3), ConfigError, "tail_slots: must be 0...2"),
    (lambda: MixedBatchSampler([], 2), DataError, "need data sets"),
    (lambda: MixedBatchSampler([3, 0], 2), DataError, "need data sets"),
    (lambda: MixedBatchSampler([3], 2, rank=2, world=2), ConfigError, "rank: must be"),
    (lambda: MixedBatchSampler([3, 3], 2, tail=5), ConfigError, "tail: must be"),
    (lambda: MixedBatchSampler({"a": 2}, slots={"a": 1}, odds={"b": 1}), ConfigError, "odds: need numbers"),
    (lambda: MixedBatchSampler({"a": 2}, slots={"a": 1}, odds={"a": 0}), ConfigError, "odds: need numbers"),
    (lambda: MixedBatchSampler({"a": 2}, slots={"a": 1}, odds={}), ConfigError, "odds: need numbers")])
def test_wrong_settings_are_refused(call, kind, word):
    with raises(kind, match=word): call()


# ------------------------------------------------------------------------------------------------------- the samples

ODDS = {"views": 0.5, "organs": 0.25, "pairs": 0.25}


def batches(sets, workers=0, n=8):
    return MixedBatches(sets, {"views": 3, "organs": 1, "pairs": 1}, odds=ODDS, per_epoch=n, seed=2, workers=workers)


def test_R1_same_bytes_for_any_number_of_workers_and_any_start(sets):
    whole = [b for _, b in batches(sets).epoch(1)]
    assert {b["branch"] for b in whole} == {"views", "organs", "pairs"}
    for workers, start in ((1, 0), (2, 3), (0, 5)):
        part = [b for _, b in batches(sets, workers).epoch(1, start)]
        assert all(map(equal, part, whole[start:])) and len(part) == 8 - start


@pytest.mark.slow
def test_R1_four_workers(sets):
    assert all(map(equal, [b for _, b in batches(sets, 4).epoch(0)], [b for _, b in batches(sets).epoch(0)]))


def test_R4_two_processes_load_the_global_batch_of_one(sets):
    one = MixedBatches(sets, {"views": 4, "organs": 2, "pairs": 2}, odds=ODDS, per_epoch=6)
    two = MixedBatches(sets, {"views": 2, "organs": 1, "pairs": 1}, odds=ODDS, per_epoch=6)
    whole = [b for _, b in one.epoch(0)]
    parts = [[b for _, b in two.epoch(0, 0, r, 2)] for r in (0, 1)]
    for w, a, b in zip(whole, *parts):
        assert w["branch"] == a["branch"] == b["branch"]
        if w["branch"] == "views":
            for k in ("images", "matrix", "offset", "valid"):
                assert torch.equal(w[k][0::2], a[k]) and torch.equal(w[k][1::2], b[k])


def test_shapes_and_kinds_of_a_batch(sets):
    seen = {b["branch"]: b for _, b in batches(sets, n=12).epoch(0)}
    v, o, p = seen["views"], seen["organs"], seen["pairs"]["pairs"][0]
    assert v["images"].shape == v["valid"].shape == (3, 2, 12, 16, 16) and v["matrix"].shape == (3, 2, 3, 3)
    assert v["images"].dtype == torch.float32 and v["offset"].dtype == v["matrix"].dtype == torch.float64
    assert len(o["volumes"]) == 2 and all(a.shape == b.shape for a, b in zip(o["volumes"], o["labels"]))
    assert o["labels"][0].dtype == torch.int64 and o["labels"][0].max() > 0
    assert [a.shape for a in p["images"]] == [a.shape for a in p["mask"]] == [a.shape for a in p["valid"]]
    assert p["mask"][0].dtype == torch.bool and p["matrix"].dtype == torch.float64


def test_modalities_come_with_their_odds():
    chosen = []
    class Watched(ViewSet):
        def _source(self, case, k, *rest, **options):
            chosen.append(k)
            return super()._source(case, k, *rest, **options)
    many = Watched(cases(1, True), 6, sampler=SMALL, odds=(0.6, 0.4))
    for k in range(100): many.make(0, rng_for(k))
    assert 0.45 < 1 - np.mean(chosen) < 0.75
    assert [many._source(many.cases[0], k, "auto").contrast for k in (0, 1)] == ["ct", "mr"]


def test_pairs_show_the_same_place(sets):
    plain = PairSet(cases(2, True), 6, crop=(16, 20, 20), jitter=1, degrees=8, augment=AUGMENTS["none"])
    for k in range(6):
        s = plain.draw(k % 2, rng_for(k))
        centres = [s["matrix"][i] @ ((np.array(s["images"][i].shape) - 1)/2) + s["offset"][i] for i in (0, 1)]
        assert np.linalg.norm(centres[0] - centres[1]) < 6*1.2*1.8 # faces move by up to one voxel each
        q = np.argwhere(s["mask"][1])
        at = (q @ s["matrix"][1].T + s["offset"][1] - s["offset"][0]) @ np.linalg.inv(s["matrix"][0]).T
        assert ((at > -3) & (at < np.array(s["images"][0].shape) + 2)).all(axis=1).mean() > 0.8


def test_regions_get_a_contrast_of_their_own(tmp_path):
    "From the folder that `prepare --regions` writes; without regions nothing changes"
    vol = scan(0)[0]
    (tmp_path/"in").mkdir()
    write_volume(vol, tmp_path/"in"/"a.nii.gz")
    prepare(tmp_path/"in", tmp_path/"out", spacing=6, regions=True)
    found = read_cases(tmp_path/"out")
    assert len(found[0].regions) == 1
    how = Augment(noise=(0, 0), regions=1.0)
    plain, shifted, bare = (ViewSet(c, 6, sampler=SMALL, augment=a).draw(0, rng_for(3))["images"] for c, a in
                            ((found, AUGMENTS["none"]), (found, how), ([found[0]._replace(regions=())], how)))
    assert np.array_equal(plain, bare) and not np.array_equal(plain, shifted)


def test_a_whole_volume_is_cut_only_if_it_is_long():
    longer = OrganSet(cases(2), 6, crop=(20, 24, 24))
    shape = longer.draw(0, rng_for(0))["volumes"][0].shape # 336 x 288 x 384 mm: 56 x 48 x 64 voxels of 6 mm
    assert shape == (20, 24, 24)
    assert OrganSet(cases(2), 6, crop=(50, 44, 60)).draw(0, rng_for(0))["volumes"][0].shape == (56, 48, 64)


# ------------------------------------------------------------------------------------------------------- bad scans

def test_R3_bad_scans_are_replaced_the_same_way_each_time(tmp_path, caplog):
    good = cases(3)
    (tmp_path/"cut.nii.gz").write_bytes(b"\x1f\x8b\x08")
    flat = Volume(np.full((30, 30, 30), -1000, np.int16), affine_from(6))
    thin = Volume(np.zeros((60, 60, 2), np.int16), affine_from(6))
    holes = good[0].images[0].data.astype(np.float32)
    holes[3, 4, 5] = np.nan
    nan = Volume(holes, good[0].images[0].affine)
    write_volume(good[0].images[0], tmp_path/"chunk.zarr")
    stored = [p for p in (tmp_path/"chunk.zarr"/"image"/"c").rglob("*") if p.is_file()]
    for p in stored: p.write_bytes(p.read_bytes()[:-9])
    assert stored
    bad = [Case("cut", (tmp_path/"cut.nii.gz",)), Case("air", (flat,)), Case("thin", (thin,)),
           Case("nan", (nan,), good[0].masks), Case("chunk", (tmp_path/"chunk.zarr",), good[0].masks),
           Case("masked", (good[0].images[0],), (Volume(good[0].masks[0].data[1:], good[0].masks[0].affine),)),
           Case("empty mask", (good[0].images[0],), (Volume(good[0].masks[0].data*0, good[0].masks[0].affine),))]
    every = ViewSampler("masksample", (12, 16, 16), spacing=6, independent=0)
    for case in bad:
        views = ViewSet([*good, case], 6, sampler=every)
        samples = []
        for seed in range(4):
            one, two = (views.draw(3, rng_for(seed)) for _ in range(2))
            assert np.array_equal(one["images"], two["images"])
            samples.append(one["index"])
        assert any(i < 3 for i in samples), case.name
        assert case.name in caplog.text


def test_R3_organs_and_pairs_without_what_they_need_are_replaced():
    good, pairs = cases(2), cases(2, True)
    organs = OrganSet([*good, Case("bare", good[0].images)], 6, crop=(20, 24, 24))
    assert organs.draw(2, rng_for(1))["index"] < 2
    two = PairSet([*pairs, Case("single", pairs[0].images[:1])], 6, crop=(16, 20, 20), jitter=1)
    assert two.draw(2, rng_for(1))["index"] < 2


def test_all_bad_ends_with_an_error():
    with raises(DataError, match="20 of 1 cases in a row"):
        ViewSet([Case("x", ("nowhere.nii.gz",))]).draw(0, rng_for(0))
    with raises(DataError, match="has no cases"): ViewSet([])


def test_folders_are_read_by_index_or_by_name(tmp_path):
    img, lbl = scan(0)
    for folder in ("images", "masks"): (tmp_path/"done"/folder).mkdir(parents=True)
    for name in ("b.nii.gz", "a.zarr"):
        write_volume(img, tmp_path/"done"/"images"/name)
        write_volume(lbl, tmp_path/"done"/"masks"/name)
    write_volume(img, tmp_path/"done"/"images"/"unlisted.nii.gz")
    write_csv(tmp_path/"done"/"index.csv", [{"name": "b.nii.gz"}, {"name": "a.zarr"}])
    found = read_cases(tmp_path/"done")
    assert [c.name for c in found] == ["a", "b"] and all(len(c.masks) == 1 for c in found)
    assert [c.name for c in read_cases(tmp_path/"done"/"images")] == ["a", "b", "unlisted"]
    (tmp_path/"done"/"images"/"b.nii.gz").unlink()
    with raises(MissingFile, match="lists b"): read_cases(tmp_path/"done")
    with raises(DataError, match="holds no scans"): read_cases(tmp_path)
    write_volume(img, tmp_path/"done"/"images"/"a.nii.gz") # cached sources and suffixes go by the name
    with raises(DataError, match="several scans are called 'a'"): read_cases(tmp_path/"done"/"images")


def test_scans_in_memory_are_dropped_beyond_the_cache():
    views = ViewSet(cases(4), 6, sampler=SMALL, cache_bytes=2*scan(0)[0].data.nbytes)
    for k in range(8): views.draw(k % 4, rng_for(k))
    assert len(views._shelf.open) == 1 # two scans would fit, but not with their masks


def test_a_kind_without_slots_does_not_make_an_epoch_longer():
    few, many = ViewSet(cases(2), 6, sampler=SMALL), OrganSet(cases(4)*3, 6)
    assert MixedBatches({"views": [few], "organs": [many]}, {"views": 1, "organs": 0}).steps() == 2


# --------------------------------------------------------------------------------------------------------- training

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with seeded(0, "net"): self.conv = torch.nn.Conv3d(1, 2, 3)
    def forward(self, x): return self.conv(x)


def loss(model, batch):
    x = batch["images"].flatten(0, 1)[:, None] if "images" in batch else \
        (batch["volumes"][0] if "volumes" in batch else batch["pairs"][0]["images"][0])[None, None]
    return (model(x)/100).square().mean()


def test_R1_fit_resumes_to_the_same_losses(sets, tmp_path):
    cfg = FitConfig(steps=10, lr=1e-3, device="cpu", checkpoint_every=4, tensorboard=False)
    straight = fit(Net(), batches(sets, n=6), loss, cfg, out_dir=tmp_path/"a").log
    for stop in (3, 7, None): done = fit(Net(), batches(sets, n=6), loss, cfg, out_dir=tmp_path/"b", stop_at=stop)
    assert done.log == straight and len(straight) == 10
