"""Page 14b, and what pages 04b, 07d and 11c write: opened by the readers of the programs they are for."""
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from medvol_nb import phantoms
from medvol_nb.colours import table_colours, write_label
from medvol_nb.convert import from_msd, to_msd, to_nnunet
from medvol_nb.core import DataError, MissingExtra, MissingFile
from medvol_nb.datalists import DataList
from medvol_nb.geometry import Volume, affine_from, corner_displacement, reorient, same_grid, to_axes, to_world
from medvol_nb.interchange import from_monai, from_subject, read_for_torchio, to_monai, to_subject
from medvol_nb.loading import located_items
from medvol_nb.stores import write_ome_zarr
from medvol_nb.volume import read_volume, write_volume

TURN = np.array([[.96, -.28, 0, -3], [.2688, .9216, -.28, 7], [.0784, .2688, .96, 11], [0, 0, 0, 1]]) # a rotation


@pytest.fixture(scope="module")
def body() -> tuple[np.ndarray, np.ndarray, tuple, dict]:
    b = phantoms.abdomen((24, 18, 21))
    return b.img, b.lbl, (3.0, 4.0, 5.5), dict(b.names)


def placed(data: np.ndarray, codes: str, turned: bool, spacing: tuple = (3.0, 4.0, 5.5)) -> Volume:
    "A volume that runs along `codes`, tilted or not"
    affine = affine_from(spacing, (-90, -70, -40))
    return reorient(Volume(data, TURN @ affine if turned else affine), codes)


GRIDS = list(itertools.product(("RAS", "LPS", "PIL", "SAR"), (False, True)))


# ------------------------------------------------------------------------------------------------------------ OME-Zarr

@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_by_zarr(version, body, tmp_path):
    "What the specification says, looked up without our reader: axes, scales and translations put voxels where ours are"
    vol = to_axes(placed(body[0], "RAS", False), "zyx")
    write_ome_zarr(vol, tmp_path/"a.ome.zarr", version=version, unit="micrometer")
    group = zarr.open_group(str(tmp_path/"a.ome.zarr"), mode="r")
    assert group.metadata.zarr_format == (2 if version == "0.4" else 3)
    image = group.attrs["multiscales"][0] if version == "0.4" else group.attrs["ome"]["multiscales"][0]
    assert [(a["name"], a["type"], a["unit"]) for a in image["axes"]] == [(a, "space", "micrometer") for a in "zyx"]
    assert np.array_equal(group[image["datasets"][0]["path"]][:], vol.data)
    for level, entry in enumerate(image["datasets"]):
        scale, shift = (np.array(t[t["type"]])/1000 for t in entry["coordinateTransformations"])
        array = group[entry["path"]]
        if version == "0.5": assert array.metadata.dimension_names == ("z", "y", "x")
        else: assert array.metadata.dimension_separator == "/"
        assert array.shape == tuple(-(-n//2**level) for n in vol.shape)
        centre = (scale*(np.array(array.shape) - 1)/2 + shift)[::-1]
        ours = to_world(vol.affine, (np.array(vol.shape) - 1)/2)
        assert np.abs(centre - ours).max() <= 2**level*max(vol.spacing)/2 + 1e-6
        assert np.allclose(scale, np.array(vol.spacing)*2**level)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_by_ome_zarr(version, body, tmp_path):
    "The reference reader finds image, labels, names and colours"
    io, reader = pytest.importorskip("ome_zarr.io"), pytest.importorskip("ome_zarr.reader")
    img, lbl, _, names = body
    store = tmp_path/"scan.ome.zarr"
    write_ome_zarr(to_axes(placed(img, "RAS", False), "zyx"), store, version=version)
    write_label(placed(lbl, "LPS", False), store/"labels"/"organs", names)
    nodes = list(reader.Reader(io.parse_url(str(store)))())
    assert np.array_equal(np.asarray(nodes[0].data[0]), img.transpose(2, 1, 0)) and len(nodes[0].data) == 3
    organs = next(n for n in nodes if n.zarr.basename() == "organs")
    assert np.array_equal(np.asarray(organs.data[0]), lbl.transpose(2, 1, 0))
    assert {k: v["name"] for k, v in organs.metadata["properties"].items()} == names
    found = {k: tuple(round(255*c) for c in v[:3]) for k, v in organs.metadata["color"].items() if k}
    assert found == table_colours(names)


def test_ome_zarr_by_its_specification(body, tmp_path):
    "The models of OME-NGFF 0.5: every attribute is there and has its form"
    models = pytest.importorskip("ome_zarr_models.v05")
    img, lbl, _, names = body
    store = tmp_path/"scan.ome.zarr"
    write_ome_zarr(to_axes(placed(img, "RAS", False), "zyx"), store)
    write_label(placed(lbl, "RAS", False), store/"labels"/"organs", names)
    for path, kind in ((store, models.Image), (store/"labels"/"organs", models.ImageLabel),
                       (store/"labels", models.Labels)):
        assert kind.from_zarr(zarr.open_group(str(path), mode="r")).ome_zarr_version == "0.5"


# --------------------------------------------------------------------------------------------------------------- NIfTI

@pytest.mark.parametrize("codes, turned", GRIDS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_nifti_by_nibabel_and_simpleitk(codes, turned, dtype, body, tmp_path):
    "The same voxel has the same value and the same place in all three"
    nib, sitk = pytest.importorskip("nibabel"), pytest.importorskip("SimpleITK")
    vol = placed(body[1].astype(dtype), codes, turned)
    path = write_volume(vol, tmp_path/"a.nii.gz")
    theirs, itk = nib.load(path), sitk.ReadImage(str(path))
    assert np.array_equal(np.asarray(theirs.dataobj), vol.data) and theirs.get_data_dtype() == vol.dtype
    assert sitk.GetArrayFromImage(itk).dtype == vol.dtype and nib.aff2axcodes(theirs.affine) == tuple(codes)
    assert int(theirs.header["sform_code"]) > 0 and theirs.header.get_xyzt_units()[0] == "mm"
    for ijk in [(0, 0, 0), *map(tuple, np.argwhere(vol.data)[::97])]:
        xyz = to_world(vol.affine, ijk)
        assert np.abs(nib.affines.apply_affine(theirs.affine, ijk) - xyz).max() < 1e-4
        ijk = [int(k) for k in ijk]
        assert np.abs(np.array(itk.TransformIndexToPhysicalPoint(ijk))*(-1, -1, 1) - xyz).max() < 1e-3
        assert itk[ijk] == vol.data[tuple(ijk)]


@pytest.mark.parametrize("codes, turned", GRIDS)
def test_files_of_nibabel_and_simpleitk(codes, turned, body, tmp_path):
    "The other direction: what they write is read here at the same place"
    nib, sitk = pytest.importorskip("nibabel"), pytest.importorskip("SimpleITK")
    vol = placed(body[0], codes, turned)
    nib.save(nib.Nifti1Image(vol.data, vol.affine), tmp_path/"nib.nii.gz")
    sitk.WriteImage(sitk.ReadImage(str(tmp_path/"nib.nii.gz")), str(tmp_path/"itk.nii.gz"))
    sitk.WriteImage(sitk.ReadImage(str(tmp_path/"nib.nii.gz")), str(tmp_path/"itk.nrrd"))
    for name in ("nib.nii.gz", "itk.nii.gz", "itk.nrrd"):
        back = read_volume(tmp_path/name)
        assert np.array_equal(back.data, vol.data) and corner_displacement(back, vol) < 1e-3


# ------------------------------------------------------------------------------------------------- nnU-Net, Decathlon

def dataset(root: Path, body, n: int = 4) -> DataList:
    "Cases on grids of their own, with labels 1 to the last"
    img, lbl, _, names = body
    for folder in ("scans", "labels"): (root/folder).mkdir(parents=True)
    items = []
    for k in range(n):
        codes, turned = GRIDS[k]
        write_volume(placed(img + k, codes, turned), root/f"scans/p{k}.nii.gz")
        write_volume(placed(lbl, codes, turned), root/f"labels/p{k}.nii.gz")
        items.append({"image": f"scans/p{k}.nii.gz", "label": f"labels/p{k}.nii.gz", "fold": k % 2})
    write_volume(placed(img, "RAS", False), root/"scans/t.nii.gz")
    return DataList("Abdomen", tuple(items), ({"image": "scans/t.nii.gz"},), names)


@pytest.mark.parametrize("files", ["refer", "copy"])
def test_nnunet_by_its_rules(files, body, tmp_path):
    "The rules of nnU-Net's page on the dataset format, followed to the voxels with its default reader, SimpleITK"
    sitk = pytest.importorskip("SimpleITK")
    dl, out = dataset(tmp_path/"mine", body), tmp_path/"Dataset007_Abdomen"
    to_nnunet(dl, out, tmp_path/"mine", files=files, channel_names=["CT"])
    about = json.loads((out/"dataset.json").read_text())
    assert about["channel_names"] == {"0": "CT"} and about["file_ending"] == ".nii.gz" and about["numTraining"] == 4
    ids = about["labels"]
    assert sorted(ids.values()) == list(range(len(dl.label_dict) + 1)) and ids["background"] == 0
    if files == "refer":
        cases = {c: ([out/p for p in e["images"]], out/e["label"]) for c, e in about["dataset"].items()}
    else:
        found = sorted({p.name[:-len("_0000.nii.gz")] for p in (out/"imagesTr").iterdir()})
        cases = {c: ([out/"imagesTr"/f"{c}_0000.nii.gz"], out/"labelsTr"/f"{c}.nii.gz") for c in found}
        assert [p.name for p in (out/"imagesTs").iterdir()] == ["t_0000.nii.gz"]
    assert sorted(cases) == ["p0", "p1", "p2", "p3"]
    for c, (images, label) in cases.items():
        img, lbl = (sitk.ReadImage(str(p)) for p in (images[0], label))
        assert len(images) == 1 and img.GetSize() == lbl.GetSize()
        for of in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert np.allclose(getattr(img, of)(), getattr(lbl, of)())
        assert set(np.unique(sitk.GetArrayFromImage(lbl))) <= set(ids.values())
        assert np.array_equal(sitk.GetArrayFromImage(img).T, read_volume(tmp_path/f"mine/scans/{c}.nii.gz").data)
    splits = json.loads((out/"splits_final.json").read_text())
    assert splits == [{"train": ["p1", "p3"], "val": ["p0", "p2"]}, {"train": ["p0", "p2"], "val": ["p1", "p3"]}]


@pytest.mark.parametrize("files", ["refer", "copy"])
def test_nnunet_by_nnunet(files, body, tmp_path, capfd, monkeypatch):
    "Its own check of a data set, `--verify_dataset_integrity`"
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"): monkeypatch.setenv(name, str(tmp_path))
    integrity = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity")
    dl, out = dataset(tmp_path/"mine", body), tmp_path/"Dataset007_Abdomen"
    to_nnunet(dl, out, tmp_path/"mine", files=files, channel_names=["CT"])
    integrity.verify_dataset_integrity(str(out), num_processes=1)
    assert "verify_dataset_integrity Done" in capfd.readouterr().out


@pytest.mark.parametrize("reader", ["NibabelReader", "ITKReader"])
def test_decathlon_by_monai(reader, body, tmp_path):
    "load_decathlon_datalist and LoadImaged, with both of MONAI's readers: places and voxels as ours"
    from monai.data import load_decathlon_datalist
    from monai.transforms import LoadImaged
    if reader == "ITKReader": pytest.importorskip("itk")
    dl = dataset(tmp_path, body)
    to_msd(dl, tmp_path/"dataset.json")
    items = load_decathlon_datalist(tmp_path/"dataset.json", is_segmentation=True, base_dir=tmp_path)
    assert [i["fold"] for i in items] == [0, 1, 0, 1] and len(load_decathlon_datalist(
        tmp_path/"dataset.json", data_list_key="test", base_dir=tmp_path)) == 1
    assert items == [{k: v for k, v in i.items() if k != "dataset_name"} for i in located_items(dl, tmp_path)]
    for item in items:
        loaded = LoadImaged(["image", "label"], reader=reader, ensure_channel_first=True)(item)
        for key, vol in from_monai(loaded).items():
            if key not in ("image", "label"): continue
            ours = read_volume(item[key])
            assert corner_displacement(vol, ours) < 1e-3 and np.array_equal(vol.data, ours.data)
        assert from_monai(loaded)["label"].dtype == np.int32, "MONAI loads labels as floats"
    assert from_msd(tmp_path) == dl


# --------------------------------------------------------------------------------------------------------------- MONAI

ORDERS = ["xyz", "zyx", "yxz", "cxyz", "czyx"]
DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float16, np.float32,
          np.float64, bool, np.dtype(">i2"), np.dtype(">f4")]


def centre(vol: Volume, organ: int) -> np.ndarray:
    return to_world(vol.affine, np.argwhere(vol.data == organ).mean(axis=0))


def stored(data: np.ndarray, axes: str, codes: str = "LPS", turned: bool = True) -> Volume:
    "A volume in a given storage order"
    vol = placed(data, codes, turned)
    if axes[0] == "c": vol = replace(vol, data=np.stack([vol.data, vol.data[::-1]]), axes="cxyz")
    return to_axes(vol, axes)


def equal(a: Volume, b: Volume) -> bool:
    same = np.array_equal(a.data, b.data) and np.array_equal(a.affine, b.affine)
    return a.axes == b.axes and a.dtype == b.dtype and same


@pytest.mark.parametrize("there, back", [(to_monai, from_monai), (to_subject, from_subject)], ids=["monai", "torchio"])
@pytest.mark.parametrize("axes", ORDERS)
@pytest.mark.parametrize("codes, turned", GRIDS)
def test_axes_and_places_survive(there, back, axes, codes, turned, body):
    if there is to_subject: pytest.importorskip("torchio")
    case = {"image": stored(body[0], axes, codes, turned), "label": stored(body[1], axes, codes, turned)}
    again = back(there(case | {"age": 63}))
    assert all(equal(again[k], v) for k, v in case.items()) and again["age"] == 63
    one = replace(case["image"], data=case["image"].data[:1]) if axes[0] == "c" else case["image"]
    assert equal(back(there({"image": one}))["image"], one), "one channel stays one channel"


@pytest.mark.parametrize("there, back", [(to_monai, from_monai), (to_subject, from_subject)], ids=["monai", "torchio"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_number_types_survive(there, back, dtype, body):
    if there is to_subject: pytest.importorskip("torchio")
    dtype = np.dtype(dtype)
    data = (body[1] % 100).astype(dtype)
    if dtype.kind in "iu": data[0, 0, 0] = min(np.iinfo(dtype).max, 2**63 - 1)
    vol = stored(data, "xyz")
    for key in ("image", "label") if dtype.kind in "iub" else ("image",):
        again = back(there({key: vol}))[key]
        assert again.dtype == vol.dtype.newbyteorder("=") and np.array_equal(again.data, vol.data)


def test_voxels_are_copied(body):
    "Transforms that work in place do not reach the volume"
    pytest.importorskip("torchio")
    vol = placed(body[0].copy(), "RAS", False)
    before = vol.data.copy()
    to_monai({"image": vol})["image"].zero_()
    to_subject({"image": vol}).image.data.zero_()
    assert np.array_equal(vol.data, before)
    frozen = placed(body[0], "LPS", True)
    frozen.data.setflags(write=False)
    assert torch.equal(to_monai({"image": frozen})["image"][0].as_tensor(), torch.from_numpy(frozen.data.copy()))


def test_values_without_room():
    with pytest.raises(DataError, match="above 9223372036854775807"):
        to_monai({"image": Volume(np.full((2, 2, 2), 2**64 - 1, np.uint64), np.eye(4))})


@pytest.mark.parametrize("codes, turned", GRIDS)
def test_monai_transforms(codes, turned, body):
    "Orientationd and Spacingd on our dictionary, and back: as reorienting here, and the same places after resampling"
    from monai.transforms import Compose, EnsureChannelFirstd, Orientationd, Spacingd
    case = {"image": placed(body[0], codes, turned), "label": placed(body[1].astype(np.uint16), codes, turned)}
    keys = ["image", "label"]
    turn = Compose([to_monai, EnsureChannelFirstd(keys), Orientationd(keys, "ILP", labels=None)])
    turned_round = from_monai(turn(case))
    for k, v in case.items():
        ours = reorient(v, "ILP")
        assert np.array_equal(turned_round[k].data, ours.data) and same_grid(turned_round[k], ours)
        assert turned_round[k].dtype == v.dtype
    finer = from_monai(Compose([turn, Spacingd(keys, (2, 2, 2), mode=("bilinear", "nearest"))])(case))
    assert finer["label"].dtype == np.uint16 and np.allclose(finer["image"].spacing, 2, atol=1e-5)
    assert same_grid(finer["image"], finer["label"])
    for organ in (1, 2):
        assert np.abs(centre(case["label"], organ) - centre(finer["label"], organ)).max() < 2


def test_lps_of_monai(body):
    "A MetaTensor that says its affine is LPS"
    from monai.data import MetaTensor
    vol = placed(body[0], "LPS", True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ vol.affine
    tensor = MetaTensor(torch.from_numpy(vol.data.copy())[None], affine=torch.from_numpy(lps), meta={"space": "LPS"})
    back = from_monai({"image": tensor})["image"]
    assert np.array_equal(back.affine, vol.affine) and back.axes == "xyz" and back.orientation == "LPS"


def test_what_cannot_come_back_from_monai(body):
    from monai.transforms import Compose, Orientationd, Spacingd
    case = {"image": placed(body[0], "RAS", False), "label": placed(body[1], "RAS", False)}
    wrong = Compose([to_monai, Spacingd(["label"], (2, 2, 2), mode="bilinear")])(case)
    with pytest.raises(DataError, match="label: a label holds fractions such as .*nearest"): from_monai(wrong)
    assert from_monai(wrong, maps=())["label"].dtype == np.float32, "unless it is said to be none"
    lazy = Compose([to_monai, Orientationd(["image"], "LPS", labels=None), Spacingd(["image"], (2, 2, 2))], lazy=True)
    assert from_monai(lazy(case))["image"].orientation == "LPS", "Compose applies them at its end"
    pending = Orientationd(["image"], "LPS", labels=None, lazy=True)(to_monai(case))
    with pytest.raises(DataError, match="image: 1 lazy transforms are not applied yet"): from_monai(pending)
    batch = {"image": torch.stack([to_monai(case)["image"]]*2)}
    with pytest.raises(DataError, match="image: one case .* is needed"): from_monai(batch)
    assert isinstance(from_monai({"x": torch.zeros(2), "y": "text"})["x"], torch.Tensor)


def test_monai_data_set_of_items(body, tmp_path):
    "A data list through MONAI's Dataset and DataLoader, in processes; errors name the case"
    from monai.data import DataLoader, Dataset
    from monai.transforms import Compose, Orientationd, Spacingd, SpatialPadd
    dl = dataset(tmp_path, body)
    keys = ["image", "label"]
    steps = Compose([to_monai, Orientationd(keys, "RAS", labels=None),
                     Spacingd(keys, (8, 8, 8), mode=("bilinear", "nearest")), SpatialPadd(keys, (24, 24, 24))])
    items = located_items(dl, tmp_path)
    for workers in (0, 1):
        batches = list(DataLoader(Dataset(items, steps), batch_size=2, num_workers=workers))
        assert [b["dataset_name"] for b in batches] == [["Abdomen"]*2]*2 and batches[0]["image"].shape[:2] == (2, 1)
    got = to_monai(items[1])
    assert np.array_equal(got["image"][0].numpy(), read_volume(items[1]["image"]).data) and got["fold"] == 1
    assert got["image"].meta["filename_or_obj"] == items[1]["image"]
    with pytest.raises(MissingFile, match="data set 'Abdomen', case .*p0.nii.gz, label: .*none.nii.gz"):
        to_monai({**items[0], "label": str(tmp_path/"none.nii.gz")})


# ------------------------------------------------------------------------------------------------------------- TorchIO

def test_torchio_reads_our_files_as_we_do(body, tmp_path):
    tio = pytest.importorskip("torchio")
    for n, (codes, turned) in enumerate(GRIDS):
        vol = placed(body[0], codes, turned)
        path = write_volume(vol, tmp_path/f"{n}.nii.gz")
        theirs, ours = tio.ScalarImage(path), to_subject({"image": vol}).image
        assert torch.equal(theirs.data, ours.data) and np.allclose(theirs.affine, ours.affine, atol=1e-4)
        assert theirs.orientation_str == codes and ours.orientation_str == codes
        back = from_subject(tio.Subject(image=theirs))["image"]
        assert corner_displacement(back, vol) < 1e-3 and np.array_equal(back.data, vol.data) and back.axes == "xyz"


@pytest.mark.parametrize("codes, turned", GRIDS)
def test_torchio_transforms(codes, turned, body):
    tio = pytest.importorskip("torchio")
    case = {"image": placed(body[0], codes, turned), "label": placed(body[1].astype(np.uint16), codes, turned)}
    subject = to_subject(case | {"site": "B"})
    assert isinstance(subject.label, tio.LabelMap) and isinstance(subject.image, tio.ScalarImage)
    ras = from_subject(tio.ToCanonical()(subject))
    for k, v in case.items():
        ours = reorient(v, "RAS")
        assert np.array_equal(ras[k].data, ours.data) and same_grid(ras[k], ours) and ras[k].dtype == v.dtype
    moved = from_subject(tio.Compose([tio.ToCanonical(), tio.Resample(2)])(subject))
    assert moved["site"] == "B" and moved["label"].dtype == np.uint16 and same_grid(moved["image"], moved["label"])
    for organ in (1, 2): assert np.abs(centre(case["label"], organ) - centre(moved["label"], organ)).max() < 2
    cut = from_subject(tio.Crop((1, 0, 0, 2, 0, 0))(subject))["label"] # makes new images, without our notes
    assert cut.dtype == np.int32 and np.array_equal(cut.data, case["label"].data[1:, :-2])
    assert np.allclose(cut.affine[:3, 3], to_world(case["label"].affine, (1, 0, 0)))
    flipped = tio.RandomFlip(axes=(0, 1, 2), flip_probability=1)(subject)
    restored = from_subject(flipped.apply_inverse_transform())
    assert equal(restored["label"], case["label"])


def test_torchio_subjects_of_items(body, tmp_path):
    "Files are read when they are needed, in any format, by this library, also in other processes"
    tio = pytest.importorskip("torchio")
    dl = dataset(tmp_path, body)
    items = located_items(dl, tmp_path)
    vol = placed(body[0], "LPS", True)
    for name in ("scan.zarr", "scan.h5", "scan.npz"): write_volume(vol, tmp_path/name)
    for name in ("scan.zarr", "scan.h5", "scan.npz"):
        back = from_subject(to_subject({"image": str(tmp_path/name)}))["image"]
        assert np.array_equal(back.data, vol.data) and same_grid(back, vol)
    subjects = [to_subject(i) for i in items]
    assert all("data" not in s.image for s in subjects) and subjects[2].fold == 0
    loaded = tio.SubjectsDataset(subjects, transform=tio.Compose([tio.ToCanonical(), tio.CropOrPad((16, 16, 16))]))
    assert [s.label.orientation_str for s in loaded] == ["RAS"]*4
    assert all("data" not in s.image for s in subjects), "the data set works on copies"
    first = next(iter(tio.SubjectsLoader(loaded, batch_size=2, num_workers=1)))
    assert first["image"]["data"].shape == (2, 1, 16, 16, 16)
    two = to_subject({"image": [items[0]["image"]]*2})
    assert two.image.shape[0] == 2, "several files are channels"
    damaged = Path(items[0]["image"])
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(ValueError, match="p0.nii.gz"): to_subject(items[0]).image.load()
    with pytest.raises(MissingFile, match="none.nii.gz"): read_for_torchio(tmp_path/"none.nii.gz")


def test_labels_that_torchio_interpolated(body):
    tio = pytest.importorskip("torchio")
    tensor = torch.from_numpy(body[1].copy())[None].float() + 0.5
    with pytest.raises(DataError, match="label: a label holds fractions such as"):
        from_subject(tio.Subject(label=tio.LabelMap(tensor=tensor)))
    assert from_subject(tio.Subject(label=tio.LabelMap(tensor=tensor - 0.5)))["label"].dtype == np.int32


def test_without_torchio(body, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "torchio", None)
    for call in (lambda: to_subject({"image": placed(body[0], "RAS", False)}), lambda: from_subject({})):
        with pytest.raises(MissingExtra, match=r"torchio.*medvol_nb\[interop\]"): call()


# ----------------------------------------------------------------------------------------------------------- real data

REAL = ["datalists_supervoxels/totalseg/abdomen_512", "datalists_supervoxels/totalseg/abdomen_mr",
        "datalists_supervoxels/totalseg/abdomen_3mm"]


@pytest.mark.realdata
@pytest.mark.parametrize("name", REAL)
def test_real_cases_in_all_of_them(name, data_dir, tmp_path):
    "CT and MR in LPS, labels in LAS: the same voxel at the same place in nibabel, SimpleITK, TorchIO, MONAI and here"
    nib, sitk, tio = (pytest.importorskip(m) for m in ("nibabel", "SimpleITK", "torchio"))
    from monai.transforms import LoadImaged
    item = {"image": f"{data_dir}/{name}{'' if name.endswith('mr') else '_ct'}.nii.gz",
            "label": f"{data_dir}/{name}_seg.nii.gz"}
    for key, path in item.items():
        vol = read_volume(path)
        itk, theirs = sitk.ReadImage(path), nib.load(path)
        lazy = from_subject(to_subject({key: path}))[key]
        native = from_subject(tio.Subject({key: (tio.LabelMap if key == "label" else tio.ScalarImage)(path)}))[key]
        monai = from_monai(LoadImaged([key], ensure_channel_first=True)({key: path}))[key]
        for ijk in np.argwhere(np.asarray(vol.data) > 0)[::50_000]:
            xyz = to_world(vol.affine, ijk)
            assert np.abs(nib.affines.apply_affine(theirs.affine, ijk) - xyz).max() < 1e-3
            assert np.abs(np.array(itk.TransformIndexToPhysicalPoint(ijk.tolist()))*(-1, -1, 1) - xyz).max() < 1e-2
            assert itk[ijk.tolist()] == vol.data[tuple(ijk)]
        for other in (lazy, native, monai):
            assert np.array_equal(other.data, vol.data) and corner_displacement(other, vol) < 1e-2
    case = from_monai(to_monai(item))
    assert same_grid(case["image"], case["label"], 0.05) and case["label"].orientation == case["image"].orientation
    write_volume(case["label"], tmp_path/"label.nii.gz")
    assert np.array_equal(reorient(read_volume(tmp_path/"label.nii.gz"), "RAS").data.squeeze(),
                          reorient(read_volume(item["label"]), "RAS").data)


@pytest.mark.realdata
def test_real_decathlon_folder(data_dir, tmp_path):
    "OpenKBP as a Decathlon list, opened by MONAI, brought to one grid, and compared with the stored labels"
    from monai.data import load_decathlon_datalist
    from monai.transforms import Compose, LoadImaged, Orientationd, Spacingd
    root = data_dir/"datalists_supervoxels"/"openkbp"
    items = tuple({"image": f"imagesTr/{p.name}", "label": f"labelsTr/{p.name}", "fold": k}
                  for k, p in enumerate(sorted((root/"imagesTr").glob("*.nii.gz"))))
    to_msd(DataList("OpenKBP", items, label_dict={k: f"organ {k}" for k in range(1, 8)}), tmp_path/"dataset.json")
    loaded = load_decathlon_datalist(tmp_path/"dataset.json", base_dir=root)
    keys = ["image", "label"]
    grid = Compose([Orientationd(keys, "RAS", labels=None), Spacingd(keys, (6, 6, 6), mode=("bilinear", "nearest"))])
    for item in loaded[:2]:
        ours, theirs = (from_monai(Compose([load, grid])(item)) for load in (
            to_monai, LoadImaged(keys, ensure_channel_first=True)))
        for key in keys:
            assert np.array_equal(ours[key].data.squeeze(), theirs[key].data)
            assert same_grid(ours[key], theirs[key], 0.01)
        assert ours["label"].orientation == "RAS" and set(np.unique(ours["label"].data)) <= set(range(8))
