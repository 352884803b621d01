"""Segment Anything checkpoints in every layout, what is refused, and the cost table of the specification."""

import json
import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from medvol_nb.checkpoints import seeded
from medvol_nb.core import ConfigError, FormatError, MissingFile, file_digest
from medvol_nb.samweights import (
    _RENAMES,
    SAM_FILES,
    SAM_MODELS,
    Sam2Shape,
    SamShape,
    build_network,
    encoder_cost,
    model_name,
    random_sam,
    read_sam,
)

TINY = SamShape(32, 3, 2, 64, (1,), window=4, grid=8, neck=64)


def original(tensors):
    "Names of segment_anything for the names of transformers"
    out = {}
    for k, v in tensors.items():
        for old, new in reversed(_RENAMES):
            k = k.replace(new, old)
        out[k] = v
    return out


@pytest.fixture(scope="module")
def tiny():
    return random_sam(TINY, seed=1)


def published(model: str) -> dict[str, torch.Tensor]:
    "Tensors with the names and shapes of a published original checkpoint; one value each, repeated"
    shapes = {k: v.shape for k, v in build_network(SAM_MODELS[model]).state_dict().items()}
    return original({k: torch.full((1,), 0.01).expand(s) for k, s in shapes.items()})


# ---------------------------------------------------------------- layouts


def layouts(tensors, folder):
    "Every layout of §3.2: name -> path"
    old, hf = original(tensors), {k: v.contiguous() for k, v in tensors.items()}
    extra = {
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": torch.zeros(2, 128),
        "mask_decoder.transformer.layers.0.norm1.weight": torch.zeros(4),
        "mask_decoder.hf_token.weight": torch.zeros(1, 256),
        "mask_decoder.compress_vit_feat.0.weight": old["mask_decoder.output_upscaling.0.weight"],
        "pixel_mean": torch.zeros(3, 1, 1),
    }
    trained = {"model": old, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]}, "epoch": 3}
    files = {
        "original": old,
        "whole model": old | extra,
        "nested model": {"model": old},
        "nested state_dict": {"state_dict": old},
        "module prefix": {f"module.{k}": v for k, v in old.items()},
        "nested and prefix": {"model": {f"module.{k}": v for k, v in old.items()}},
        "sam prefix": {f"sam.{k}": v for k, v in (old | extra).items()},
        "medsam training": trained,
        "half precision": {k: v.half() for k, v in old.items()},
        "hugging face pth": hf,
    }
    paths = {}
    for name, content in files.items():
        paths[name] = folder / f"{name}.pth"
        torch.save(content, paths[name])
    paths["hugging face file"] = folder / "any name.safetensors"
    save_file(hf | {"prompt_encoder.point_embed.0.weight": torch.zeros(1, 64)}, paths["hugging face file"])
    for kind, write in (
        ("model.safetensors", lambda p: save_file(hf, p)),
        ("pytorch_model.bin", lambda p: torch.save(hf, p)),
    ):
        paths[f"folder {kind}"] = folder / f"folder {kind}"
        paths[f"folder {kind}"].mkdir()
        write(paths[f"folder {kind}"] / kind)
        (paths[f"folder {kind}"] / "config.json").write_text(json.dumps({"model_type": "sam"}))
    return paths


def test_B2_every_layout_loads(tiny, tmp_path):
    "The same weights in any layout are the same weights: shape, digest and output"
    found = {n: read_sam(p) for n, p in layouts(tiny.tensors, tmp_path).items()}
    assert len(found) == 13
    assert {w.shape for w in found.values()} == {TINY}
    same = {n: w.digest for n, w in found.items() if n != "half precision"}
    assert set(same.values()) == {tiny.digest}
    assert found["half precision"].digest != tiny.digest
    x = torch.linspace(-2, 2, 3 * 128 * 128).reshape(1, 3, 128, 128)
    outs = [found[n].network()(x) for n in ("original", "medsam training", "folder pytorch_model.bin")]
    assert all(o.equal(outs[0]) for o in outs) and outs[0].shape == (1, 8, 32, 32) and not outs[0].requires_grad


@pytest.mark.parametrize("model", ["vit_b", "vit_l", "vit_h", "slimsam_50", "slimsam_77"])
def test_B2_published_models_are_told_by_their_shapes(model, tmp_path):
    "The file name lies; the tensors do not (their values are one number, so the file is small)"
    torch.save(published(model), tmp_path / "sam_vit_b_01ec64.pth")
    found = read_sam(tmp_path / "sam_vit_b_01ec64.pth", model=model)
    assert found.name == model and found.shape == SAM_MODELS[model]
    build_network(found.shape).load_state_dict(dict(found.tensors), strict=True, assign=True)


def test_B2_hugging_face_folder_equals_the_whole_model(tmp_path):
    "What transformers itself writes: its embeddings, and the upscaling of its mask decoder"
    from transformers import SamConfig, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 48, "image_size": 128,
            "global_attn_indexes": [1], "window_size": 3, "output_channels": 64, "num_pos_feats": 32},
        mask_decoder_config={"hidden_size": 64, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 8},
        prompt_encoder_config={"hidden_size": 64, "image_size": 128},
    )  # fmt: skip
    whole = SamModel(config).eval()
    x = torch.linspace(-2, 2, 3 * 128 * 128).reshape(1, 3, 128, 128)
    with seeded(0, "sam"), torch.no_grad():
        for p in whole.parameters():
            p.normal_(0, 0.2)
        e, up = whole.get_image_embeddings(x), whole.mask_decoder
        expected = up.activation(up.upscale_conv2(up.activation(up.upscale_layer_norm(up.upscale_conv1(e)))))
    whole.save_pretrained(tmp_path / "sam")
    found = read_sam(tmp_path / "sam")
    assert found.shape == SamShape(32, 2, 2, 48, (1,), window=3, grid=8, neck=64)
    assert torch.allclose(found.network()(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads, folder", [(4, True), (2, False)])
def test_B2_sam2_hugging_face_equals_the_whole_model(heads, folder, tmp_path):
    "SAM 2.1: the first map of get_image_embeddings, from a folder, or from one file of a known width"
    from transformers import Sam2Config, Sam2Model

    width = 16 if folder else 112
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": width,
        "blocks_per_stage": [2, 1, 1, 1],
        "embed_dim_per_stage": [width, 32, 16, 32],
        "num_attention_heads_per_stage": [heads, 2, 2, 2],
        "global_attention_blocks": [],
        "window_positional_embedding_background_size": [5, 5],
    }
    config = Sam2Config(
        vision_config={
            "backbone_config": backbone,
            "backbone_channel_list": [32, 16, 32, width],
            "fpn_hidden_size": 64,
        },
        mask_decoder_config={"hidden_size": 64, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 8},
        prompt_encoder_config={"hidden_size": 64},
    )
    whole = Sam2Model(config).eval()
    with seeded(0, "sam2"), torch.no_grad():
        for p in whole.parameters():
            p.normal_(0, 0.2)
        x = torch.rand(1, 3, 1024, 1024)
        expected = whole.get_image_embeddings(x)[0]
    whole.save_pretrained(tmp_path / "sam2")
    found = read_sam(tmp_path / "sam2" if folder else tmp_path / "sam2" / "model.safetensors")
    assert found.shape == Sam2Shape(width, 2, heads, 4 * width, 8, 5, 64) and x.shape[2] == found.shape.image_size
    got = found.network()(x)
    assert got.shape == (1, 8, 256, 256) and torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    if folder:
        with pytest.raises(FormatError, match="number of heads is not known for width 16; name the folder"):
            read_sam(tmp_path / "sam2" / "model.safetensors")


def test_B2_original_sam2_is_refused_with_the_reason(tmp_path):
    torch.save({"model": {"image_encoder.trunk.pos_embed": torch.zeros(1, 96, 7, 7)}}, tmp_path / "sam2.pt")
    with pytest.raises(FormatError, match="original SAM 2 file, which is not read.*Hugging Face layout"):
        read_sam(tmp_path / "sam2.pt")


# ---------------------------------------------------------------- what does not fit


def refuse(path, words, network=False):
    "One error of this library that names all of `words`, and the file"
    with pytest.raises(FormatError) as e:
        read_sam(path).network() if network else read_sam(path)
    for w in [*words, re.escape(str(path))]:
        assert re.search(w, str(e.value)), f"{w!r} not in {e.value}"


EXPLAINED = ["nearest known model is", "sam_vit_h_4b8939.pth", "dl.fbaipublicfiles.com", "Nothing is downloaded"]


def test_B2_corrupt_variants_end_in_one_message(tiny, tmp_path):
    "Wrong width, missing layer, missing tensor, adapter inside: expected, found, nearest, where to get a good one"
    old = original(tiny.tensors)
    bad = {
        "wrong width": (
            old | {"image_encoder.blocks.1.attn.qkv.weight": torch.zeros(90, 32)},
            [r"1 changed in shape: .*layers.1.attn.qkv.weight \(90, 32\) -> \(96, 32\)"],
        ),
        "missing layer": (
            {k: v for k, v in old.items() if "blocks.1." not in k},
            [r"14 missing: .*layers.1.attn.rel_pos_h", "width 32, 3 layers, mlp 64"],
        ),
        "missing tensor": (
            {k: v for k, v in old.items() if k != "image_encoder.neck.3.bias"},
            ["1 missing: vision_encoder.neck.layer_norm2.bias"],
        ),
        "no upscaling": (
            {k: v for k, v in old.items() if "output_upscaling" not in k},
            ["6 missing: mask_decoder.upscale_conv1"],
        ),
        "adapter": (
            old | {"image_encoder.blocks.0.MLP_Adapter.D_fc1.weight": torch.zeros(8, 32)},
            ["1 unexpected: vision_encoder.layers.0.MLP_Adapter"],
        ),
    }
    for name, (content, words) in bad.items():
        torch.save(content, tmp_path / f"{name}.pth")
        refuse(tmp_path / f"{name}.pth", [*words, *EXPLAINED], network=True)


def test_files_of_something_else(tmp_path):
    expected = ["Expected the image encoder and the output upscaling of a SAM model", *EXPLAINED[1:]]
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(9)}, tmp_path / "resnet.pth")
    refuse(tmp_path / "resnet.pth", ["layout not recognised", "conv1.weight", *expected])
    torch.save({"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "mobile_sam.pt")
    refuse(tmp_path / "mobile_sam.pt", ["layout not recognised", "patch_embed.seq", *expected])
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 4, 4, 8)}, tmp_path / "only.pth")
    refuse(tmp_path / "only.pth", ["parts of the encoder are missing", *expected])
    bomb = {
        "image_encoder.pos_embed": torch.zeros(1, 4, 4, 8),
        "image_encoder.blocks.999999999.norm1.bias": torch.zeros(8),
        "image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(7, 4),
    }
    torch.save(bomb, tmp_path / "bomb.pth")
    refuse(tmp_path / "bomb.pth", ["tensors for 1000000000 layers", *expected])
    (tmp_path / "page.pth").write_text("<html>404</html>")
    refuse(tmp_path / "page.pth", ["refused or damaged", *expected])


def test_a_small_file_cannot_claim_a_huge_model(tmp_path):
    "Tables that promise a width of 10^5: refused before a byte of it is allocated"
    big = {
        "image_encoder.pos_embed": torch.zeros(1, 4, 4, 10**5),
        "image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(7, 4),
        "image_encoder.blocks.0.mlp.lin1.weight": torch.zeros(10**5, 1),
        "image_encoder.patch_embed.proj.weight": torch.zeros(1, 1, 16, 1),
        "image_encoder.neck.0.weight": torch.zeros(256, 1),
    }
    torch.save(big, tmp_path / "big.pth")
    refuse(tmp_path / "big.pth", ["less than half of the model is in the file", *EXPLAINED], network=True)


def test_no_checkpoint_is_an_error_with_instructions(tmp_path):
    with pytest.raises(FileNotFoundError, match="none was named.*sam_vit_b_01ec64.pth.*facebook/sam-vit-base"):
        read_sam(None)
    with pytest.raises(MissingFile, match="does not exist. Files that work"):
        read_sam(tmp_path / "sam.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFile, match="holds model.safetensors or pytorch_model.bin, this one has nothing"):
        read_sam(tmp_path / "empty")


def test_model_and_digest_can_be_demanded(tiny, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(original(tiny.tensors), path)
    digest = file_digest(path, 64)
    assert read_sam(path, sha256=digest).digest == read_sam(path, sha256=digest[:8].upper(), model="custom").digest
    with pytest.raises(FormatError, match=f"SHA-256 is {digest}, must be a7bf3b02"):
        read_sam(path, sha256="a7bf3b02")
    with pytest.raises(ConfigError, match="8 to 64 hexadecimal digits"):
        read_sam(path, sha256="a7bf")
    with pytest.raises(ConfigError, match="'vit_b' was asked for, .* holds custom"):
        read_sam(path, model="vit_b")
    assert all(re.fullmatch("[0-9a-f]{64}", v) for v in SAM_FILES.values())


def test_one_changed_weight_changes_the_digest(tiny, tmp_path):
    name = next(iter(tiny.tensors))
    torch.save(original(dict(tiny.tensors) | {name: tiny.tensors[name] + 1e-3}), tmp_path / "b.pth")
    assert read_sam(tmp_path / "b.pth").digest != tiny.digest


def test_pth_archives_are_read_without_running_code(tiny, tmp_path):
    "A published layout with a pickle inside that is not a table of tensors"
    torch.save(original(tiny.tensors), tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as z, zipfile.ZipFile(tmp_path / "evil.pth", "w") as out:
        for n in z.namelist():
            evil = b"cos\nmkdir\n(V" + str(tmp_path / "canary").encode() + b"\ntR."
            out.writestr(n, evil if n.endswith("data.pkl") else z.read(n))
    refuse(tmp_path / "evil.pth", ["refused or damaged"])
    assert not (tmp_path / "canary").exists()


# ---------------------------------------------------------------- cost

TABLE = [  # §4.1: model, image, parameters [M], GMAC, TFLOP a slice, 1,324 slices, 625 slices [PFLOP]
    ("vit_h", 1024, 637, 2981, "5.96", "7.9", "3.7"),
    ("vit_l", 1024, 308, 1493, "2.99", "4.0", "1.9"),
    ("vit_b", 1024, 90, 486, "0.97", "1.29", "0.61"),
    ("vit_b", 512, None, 113, "0.23", "0.30", "0.14"),
]


@pytest.mark.parametrize("model, image, parameters, gmac, slice_, full, coarse", TABLE)
def test_cost_table_of_the_specification(model, image, parameters, gmac, slice_, full, coarse):
    "Every number as printed, rounded as printed; only 113 GMAC (it is 113.6) was cut, not rounded"
    c = encoder_cost(model, image)
    shown = lambda x, like: f"{x:.{len(like.partition('.')[2])}f}"
    assert (int if image == 512 else round)(c.macs / 1e9) == gmac
    assert parameters is None or round(c.parameters / 1e6) == parameters
    assert [shown(c.tflop, slice_), shown(1324 * c.tflop / 1e3, full), shown(625 * c.tflop / 1e3, coarse)] == [
        slice_,
        full,
        coarse,
    ]
    assert c.embedding == (256, image // 16, image // 16) and c.cache_bytes == 2 * 256 * (image // 16) ** 2


@pytest.mark.parametrize("model, image", [("vit_b", 1024), ("vit_h", 1024), ("vit_b", 512), ("slimsam_77", 256)])
def test_cost_equals_the_count_by_hand(model, image):
    "Multiply-adds of a vision transformer with windows padded to a multiple of 14, on paper"
    s, g = SAM_MODELS[model], image // 16
    n, padded, window = g * g, (-(-g // 14) * 14) ** 2, 14
    d, k = s.width, len(s.global_layers)
    attention = lambda tokens, seen, side: tokens * 4 * d * d + 2 * tokens * seen * d + 2 * side * tokens * d
    total = n * d * 3 * 16 * 16 + (s.layers - k) * attention(padded, window**2, window) + k * attention(n, n, g)
    total += s.layers * n * 2 * d * s.mlp + n * (d * 256 + 9 * 256 * 256) + n * 4 * 256 * 64 + 4 * n * 4 * 64 * 32
    assert encoder_cost(model, image).macs == total


def test_cost_of_sam2_counts_only_what_is_needed():
    tiny, large = encoder_cost("sam2_tiny"), encoder_cost("sam2_large")
    assert tiny.embedding == (32, 256, 256) and 10e9 < tiny.macs < 12e9 and tiny.macs < large.macs / 3


@pytest.mark.parametrize("size", [0, -16, 1000, 8, True, 1024.0, "1024"])
def test_image_sizes_that_cannot_be(size):
    with pytest.raises(ConfigError, match="image_size: must be a multiple of 16"):
        encoder_cost("vit_b", size)


def test_names_of_models():
    assert (
        model_name(SamShape(768, 12, 12, 3072, ())) == "vit_b" and model_name(Sam2Shape(768, 12, 12, 3072)) == "custom"
    )
    with pytest.raises(ConfigError, match="model: must be one of vit_b, vit_l, vit_h"):
        encoder_cost("vit_g")


# ---------------------------------------------------------------- networks


def test_position_tables_are_stretched_for_other_sizes(tiny):
    "At the size of the weights nothing changes; a stretched constant table stays constant"
    flat = {k: torch.ones_like(v) if "pos" in k else v for k, v in tiny.tensors.items()}
    state = type(tiny)(TINY, flat, "flat").network(192).state_dict()
    assert state["vision_encoder.pos_embed"].shape == (1, 12, 12, 32)
    assert state["vision_encoder.layers.1.attn.rel_pos_w"].shape == (23, 16)
    assert state["vision_encoder.layers.0.attn.rel_pos_w"].shape == (7, 16)
    for k in ("pos_embed", "layers.1.attn.rel_pos_h", "layers.1.attn.rel_pos_w"):
        assert torch.allclose(state[f"vision_encoder.{k}"], torch.tensor(1.0), atol=1e-5)
    same = tiny.network(128).state_dict()
    assert all(v.equal(same[k]) for k, v in tiny.tensors.items())


def test_features_of_a_token_depend_on_that_token_alone(tiny):
    "§3.1: the transposed convolutions do not overlap, true resolution is one token"
    net, e = tiny.network(), torch.zeros(1, 64, 8, 8)
    before = net.expand(e)
    e[0, :, 3, 5] = 1
    changed = (net.expand(e) != before).any(1)[0].nonzero()
    assert changed.min(0).values.tolist() == [12, 20] and changed.max(0).values.tolist() == [15, 23]


def test_random_encoders_are_reproducible_and_not_trivial():
    a, b, c = random_sam(), random_sam(), random_sam(seed=1)
    assert a.digest == b.digest != c.digest and a.name == "random"
    x = torch.linspace(-2, 2, 3 * 256 * 256).reshape(1, 3, 256, 256)
    f = a.network()(x)[0]
    assert f.isfinite().all() and f.std() > 0.01 and (np.ptp(f.numpy(), axis=(1, 2)) > 0).mean() > 0.9
