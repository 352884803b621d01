"""Splits and image folders (acceptance A7, A8; defects D12 to D17), prompts."""

import json
import os
from collections import Counter

import pytest

from benchmarks.reference.embryo import split_by_rarity
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, OutputExists, rng_for
from medvol_nb.embryo import folders
from medvol_nb.embryo.dataset import EmptyDataset
from medvol_nb.embryo.folders import image_names, make_image_folder, read_image_folder, select_images
from medvol_nb.embryo.index import build_index
from medvol_nb.embryo.phantom import make_phantom_dataset
from medvol_nb.embryo.phases import (
    BASE_PROMPT,
    DATA_LICENCE,
    LEGACY_PROMPTS,
    PHASES,
    FocalPlane,
    Phase,
    PromptTemplate,
    parse_label,
    parse_prompt,
)
from medvol_nb.embryo.splits import check_fairness, group_of, grouped_split, legacy_embryo_split, load_split, phases_of
from medvol_nb.embryo.splits import split as split_command
from tests.faults.jobs import content

THREE = {"train": 0.6, "val": 0.2, "test": 0.2}


def random_videos(seed):
    "Videos of couples with siblings, some phases rare, some videos without any"
    rng, out = rng_for(7, seed), {}
    odds = rng.uniform(0.02, 1, 16)
    for couple in range(int(rng.integers(8, 40))):
        for well in range(int(rng.choice([1, 1, 1, 2, 3]))):
            out[f"AB{couple}-{well + 1}"] = [p for p, q in zip(PHASES, odds) if rng.random() < q]
    return out


def test_A7_invariants_of_the_grouped_split():
    for seed in range(200):
        videos = random_videos(seed)
        weights = {"train": 0.7, "test": 0.3} if seed % 3 == 0 else THREE
        sets = grouped_split(videos, weights, seed)
        assert sorted(v for vs in sets.values() for v in vs) == sorted(videos), seed
        where = {}
        for name, vs in sets.items():
            for v in vs:
                where.setdefault(group_of(v), set()).add(name)
        assert all(len(w) == 1 for w in where.values()), seed
        largest = max(Counter(map(group_of, videos)).values())
        for name, vs in sets.items():
            assert abs(len(vs) / len(videos) - weights[name]) <= max(0.02, largest / len(videos)) + 1e-9, (seed, name)
        for p in PHASES:
            holders = {group_of(v) for v, found in videos.items() if p in found}
            if len(holders) >= len(sets):
                assert all(any(p in videos[v] for v in vs) for vs in sets.values()), (seed, p)
        if seed % 20 == 0:
            keys = sorted(videos, key=lambda v: v[::-1])
            assert grouped_split({v: videos[v] for v in keys}, weights, seed) == sets


@pytest.mark.parametrize("seed", [0, 1, 1234567890])
def test_A7_legacy_split_equals_the_oracle(seed):
    videos = {f"AB{k}-1": [p for j, p in enumerate(PHASES[:12]) if (k * 7 + j) % 3 or j < 4] for k in range(90)}
    sets = legacy_embryo_split(videos, THREE, seed)
    assert list(sets.values()) == split_by_rarity(videos, [0.6, 0.2, 0.2], seed)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A tree, its index and a split"
    root = tmp_path_factory.mktemp("embryo")
    make_phantom_dataset(root / "tree", 8, 20, ["F-15", "F+00", "F15"], 16, defects=["grid"])
    split_command(root / "tree", root / "split.json", (0.5, 0.25, 0.25))
    return root


@pytest.mark.parametrize("word", ["val", "eval", "valid", "validation"])
def test_D12_eval_is_val(tmp_path, word):
    (tmp_path / "s.json").write_text(json.dumps({"train": ["a"], word: ["b"], "test": ["c"], "_meta": {"seed": 1}}))
    for asked in ("val", "eval"):
        assert load_split(tmp_path / "s.json", set=asked) == {"train": ["a"], "val": ["b"], "test": ["c"]}


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"train": ["a"], "test": ["a"]}', "1 videos come twice"),
        ('{"val": ["a"], "eval": ["b"]}', "comes twice"),
        ('["a"]', "must be an object"),
        ('{"train": "a"}', "must be a list"),
        ('{"train": ["a"], "train": ["b"]}', "appears twice"),
        ('{"train": ["a"], "val": []}', "is empty"),
        ('{"train": ["a"]}', "has no set 'val', it has train"),
    ],
)
def test_bad_splits_are_refused(tmp_path, text, words):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises((DataError, FormatError), match=words):
        load_split(tmp_path / "s.json", set="val")


def test_D13_weights_and_rare_phases():
    videos = {f"A{k}-1": ["t2"] for k in range(10)}
    assert [len(v) for v in grouped_split(videos, {"train": 3, "val": 1, "test": 1}, 0).values()] == [6, 2, 2]
    assert [len(v) for v in legacy_embryo_split(videos, THREE, 0).values()] == [6, 2, 2]
    for wrong in ((0, 1), (-1, 2), (float("nan"), 1)):
        with pytest.raises(ConfigError, match="weights"):
            grouped_split(videos, dict(zip(("train", "test"), wrong)))
    rare = videos | {"B1-1": ["tHB"], "B2-1": ["tHB"]}
    with pytest.raises(DataError, match="phase tHB cannot fill 3 sets"):
        legacy_embryo_split(rare, THREE)
    assert all(grouped_split(rare, THREE).values())
    with pytest.raises(DataError, match="2 groups cannot fill 3 sets"):
        grouped_split({"A1-1": ["t2"], "B2-1": ["t2"]}, THREE)


def test_D14_couples_do_not_leak(data):
    index = build_index(data / "tree", cache=False)
    fair = check_fairness(index, load_split(data / "split.json", index))
    assert fair["torn_couples"] == 0 and not any(fair["leaking_videos"].values())
    torn = check_fairness(index, {"train": ["AA83-7", "BM016-5"], "test": ["AA83-9"]})
    assert torn["torn_couples"] == 1 and torn["leaking_videos"] == {"train": 1, "test": 1}
    frames = sum(n for row in fair["frames"].values() for n in row.values())
    assert frames == int((index.phase >= 0).sum()) and sum(map(len, phases_of(index).values())) > 8


def test_split_command(data, tmp_path):
    told = split_command(data / "tree", tmp_path, (3, 1), seed=5)
    assert set(json.loads((tmp_path / "split.json").read_text())) == {"train", "test", "_meta"}
    assert sum(told["counts"].values()) == 8
    make_phantom_dataset(tmp_path / "same", 4, 6, ["F+00"], 16)
    for table in (tmp_path / "same" / "embryo_dataset_annotations").iterdir():
        table.write_text("t2,1,6\n")
    split_command(tmp_path / "same", tmp_path / "old.json", (3, 1), compat="upstream")
    said = [json.loads((tmp_path / n).read_text())["_meta"]["group"] for n in ("split.json", "old.json")]
    assert said == ["code", "none"]  # the published algorithm keeps no couple together
    with pytest.raises(OutputExists):
        split_command(data / "tree", tmp_path, (3, 1))
    with pytest.raises(ConfigError, match="two or three"):
        split_command(data / "tree", tmp_path / "x.json", (1,))


def make(data, name="out", **more):
    parent = data / "folders"
    parent.mkdir(exist_ok=True)
    given = {"dataset": data / "tree", "split_file": data / "split.json", "set": "train", "phases": ["all"]}
    return make_image_folder(**{**given, "image_folder_parent": parent, "image_folder_name": name, **more})


@pytest.mark.parametrize("layout", ["split", "flat", "hf"])
@pytest.mark.parametrize("link", ["auto", "copy", "sym", "hard"])
def test_A8_bytes_are_those_of_the_source(data, layout, link):
    name = f"{layout}-{link}"
    told = make(data, name, layout=layout, link=link, planes=["F+00", "F15"], seed=3)
    folder, index = data / "folders" / name, build_index(data / "tree", cache=False)
    found = read_image_folder(folder)
    assert told["images"] == len(found) and told["links"] == {{"auto": "hard"}.get(link, link): len(found)}
    for k, item in enumerate(found):
        source = index.path(*parse_label(item.label))
        assert item.path.read_bytes() == source.read_bytes() and item.prompt == PromptTemplate().format(
            item.phase, item.plane, 2
        )
        if text := image_names(layout, k)[1]:
            assert (folder / text).read_bytes() == f"{item.prompt}\n".encode()
    record = json.loads((folder / "folder.json").read_text())
    assert record["licence"] == DATA_LICENCE and record["seed"] == 3 and len(record["split_sha256"]) == 64
    if layout == "split":
        lines = (folder / "metadata.csv").read_bytes().decode().split("\n")
        assert lines[0] == "filename,label,phase" and lines[1] == f"0.jpeg,{found[0].label},{found[0].phase.value}"
    if layout == "hf":
        first = json.loads((folder / "metadata.jsonl").read_text().splitlines()[0])
        assert first["file_name"] == "images/0.jpeg" and first["text"] == found[0].prompt


def test_A8_same_seed_same_folder(data):
    def made(name, seed):
        make(data, name, seed=seed, planes=["F-15", "F+00", "F15"])
        out = content(data / "folders" / name)
        record = json.loads(out.pop("folder.json"))
        return out, record

    (a, first), (b, second), (c, _) = made("s1", 1), made("s2", 1), made("s3", 2)
    assert a == b and a != c and {**first, "created": 0} == {**second, "created": 0}


def test_A8_no_partial_folder_after_an_error(data, monkeypatch):
    make(data, "first")
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == 5:
            raise OSError("gone")
        return ""

    monkeypatch.setattr(folders, "_linked", fail)
    before = sorted(os.listdir(data / "folders"))
    with pytest.raises(OSError, match="gone"):
        make(data, "broken")
    assert sorted(os.listdir(data / "folders")) == before


def test_errors_before_anything_is_written(data, tmp_path):
    with pytest.raises(MissingFile, match="image_folder_parent"):
        make(data, image_folder_parent=tmp_path / "none")
    for words, more in {
        "'all' stands alone": {"phases": ["all", "t2"]},
        "must be one of tPB2": {"phases": ["t17"]},
        "has no set 'trian'": {"set": "trian"},
        "plain name": {"image_folder_name": "../x"},
        "only {phase}": {"prompt_template": "{pahse}"},
        "goes with strategy": {"per_phase": 3},
        "at least 1": {"limit": 0},
    }.items():
        with pytest.raises((ConfigError, DataError), match=words):
            make(data, **{"image_folder_name": "never", **more})
    assert not (data / "folders" / "never").exists()
    (tmp_path / "s.json").write_text('{"train": ["XX1-1"]}')
    with pytest.raises(DataError, match="1 videos are not in .*XX1-1"):
        make(data, "never", split_file=tmp_path / "s.json")


def test_damaged_sources_are_refused(tmp_path):
    make_phantom_dataset(tmp_path / "tree", 2, 8, ["F+00"], 16, defects=["truncated"])
    (tmp_path / "s.json").write_text('{"train": ["AA83-7", "AA83-9"]}')
    with pytest.raises(FormatError, match="selected pictures are damaged.*AA83-7"):
        make_image_folder(
            dataset=tmp_path / "tree",
            split_file=tmp_path / "s.json",
            set="train",
            phases=["all"],
            image_folder_parent=tmp_path,
            image_folder_name="out",
        )
    assert not (tmp_path / "out").exists()


def test_D16_balanced_draws_no_frame_twice(data):
    index = build_index(data / "tree", cache=False)
    pools = Counter(PHASES[p] for p in index.phase.tolist() if p >= 0)
    rare, rich = pools.most_common()[-1][0], pools.most_common(1)[0][0]
    wanted = [Phase.parse(p) for p in (rare, rich)]
    n = pools[rare] + 2
    with pytest.raises(DataError, match=f"only {rare.replace('+', '.')} {pools[rare]}"):
        select_images(index, index.names, wanted, strategy="balanced", per_phase=n)
    items = select_images(index, index.names, wanted, strategy="balanced", per_phase=n, on_shortage="drop")
    assert Counter(c.phase.value for c in items) == {rare: pools[rare], rich: min(n, pools[rich])}
    assert len({c[1:3] for c in items}) == len(items)
    few = select_images(index, index.names, list(Phase), strategy="random", limit=9, max_per_video=2)
    assert len(few) == 9 and max(Counter(c.video for c in few).values()) <= 2
    every = select_images(index, index.names, list(Phase), list(FocalPlane)[2:5], plane_mode="all", shuffle=False)
    assert [c.plane for c in every[:3]] == list(FocalPlane)[2:5]
    with pytest.raises(EmptyDataset):
        select_images(index, [], list(Phase))


def test_suspects_pseudonyms_and_dry_run(data):
    whole = make(data, "dry", dry_run=True, set="train")
    assert not (data / "folders" / "dry").exists() and whole["images"] > 8
    make(data, "hidden", pseudonym_key="secret", set="train")
    text = b"\n".join(v for k, v in content(data / "folders" / "hidden").items() if not k.endswith("jpeg")).decode()
    assert not any(v in text for v in build_index(data / "tree", cache=False).names)
    with pytest.raises(ConfigError, match="tell the names"):
        make(data, "hidden2", pseudonym_key="secret", link="sym")


def test_changed_folders_are_noticed(data):
    make(data, "changed", link="copy")
    image = data / "folders" / "changed" / "images" / "0.jpeg"
    image.write_bytes(image.read_bytes()[:-1])
    with pytest.raises(FormatError, match="1 of .* pictures changed: images/0.jpeg"):
        read_image_folder(data / "folders" / "changed")


def test_a_folder_without_its_pictures_is_told(tmp_path):
    (tmp_path / "metadata.csv").write_text("filename,label,phase\n")
    with pytest.raises(FormatError, match="metadata.csv without a folder images"):
        read_image_folder(tmp_path)


def test_published_folders_are_read(data):
    make(data, "published")
    folder = data / "folders" / "published"
    mine = read_image_folder(folder)
    (folder / "folder.json").unlink()
    assert read_image_folder(folder) == mine


@pytest.mark.parametrize("text", ['say "t2", {phase}', "line one\nline two {phase}", "ünïcode {phase}, or not"])
def test_captions_round_trip(data, text):
    name = f"caption{len(text)}"
    make(data, name, prompt_template=text)
    for item in read_image_folder(data / "folders" / name):
        assert item.prompt == text.replace("{phase}", item.phase.value)
    (data / "folders" / name / "folder.json").unlink()
    for item in read_image_folder(data / "folders" / name):
        assert item.prompt == text.replace("{phase}", item.phase.value)


def test_D17_one_grammar():
    assert BASE_PROMPT == "a grayscale microscopic image of a human embryo"
    assert PromptTemplate().format("t9+") == f"{BASE_PROMPT} at phase t9+"
    assert parse_prompt("a microscopic image of human embryo at phase t7 recorded at focal plane F+00") == (
        Phase.t7,
        FocalPlane.F0,
    )
    assert parse_prompt("a grayscale microscopic image of human embryo at phase t2") == (Phase.t2, None)
    assert parse_prompt("grayscale microscopic image of a human embryo at phase t2")[0] is Phase.t2
    assert len(LEGACY_PROMPTS) == 4
    for bad in ("{}", "{phase!r}", "{0}", "{phase.value}", "{{phase}}", "a {phase", "x}", "", "a [b [c]]", "[a] [b]"):
        with pytest.raises(ConfigError):
            PromptTemplate(bad)


def test_D15_shuffle_seed_and_planes_decide_order_and_choice(data):
    common = {"dataset": data / "tree", "split_file": data / "split.json", "set": "train", "phases": ["all"],
              "image_folder_parent": data, "planes": ["F-15", "F+00", "F15"]}  # fmt: skip
    folders = {"plain": {"shuffle": False}, "again": {"shuffle": False}, "s0": {"seed": 0}, "s1": {"seed": 1}}
    for name, how in folders.items():
        make_image_folder(**common, **how, image_folder_name=f"d15-{name}")
    labels = {n: [i.label for i in read_image_folder(data / f"d15-{n}")] for n in folders}
    assert labels["plain"] == labels["again"] != labels["s0"] != labels["s1"]
    where = {n: [parse_label(x)[1:] for x in found] for n, found in labels.items()}
    assert sorted(where["plain"]) == sorted(where["s0"]) == sorted(where["s1"])  # the same frames in another order
    videos = [v for v, _ in where["plain"]]
    assert sorted(set(videos), key=videos.index) == load_split(data / "split.json")["train"]  # without: video by video
    assert {parse_label(x)[0].pretty for x in labels["s0"]} == {"F-15", "F+00", "F+15"}
