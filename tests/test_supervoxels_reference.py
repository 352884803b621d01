"The literal algorithm that parity is measured against: its own facts, step by step"
import numpy as np
import pytest
import torch

from benchmarks.reference import supervoxels as reference
from medvol_nb import phantoms
from medvol_nb.core import rng_for


def grey(images): return images[:, None] # the picture itself as its only feature


@pytest.fixture(scope="module")
def body(): return phantoms.abdomen((24, 20, 18)).img


def test_window():
    np.testing.assert_allclose(reference.window(np.array([-3000, -1000, 0, 500, 1000, 3000])), # by hand
                               [0, 0, 127.5, 191.25, 255, 255])


def test_three_views_of_the_picture_are_three_times_the_picture(body):
    img = reference.window(body)
    for axis in range(3): np.testing.assert_array_equal(reference.view_features(img, axis, grey)[0], img)
    np.testing.assert_allclose(reference.sum_of_views(img, grey)[0], 3*img, rtol=1e-6)


@pytest.mark.parametrize("axis, inside", [(2, (0, 1)), (1, (0, 2)), (0, (1, 2))])
def test_rows_and_columns_of_a_slice_are_the_other_two_axes_in_order(axis, inside):
    def places(images): return np.stack([np.indices(images.shape[1:])]*len(images)) # features: row, column
    img = np.zeros((5, 11, 9), np.float32)
    out, at = reference.view_features(img, axis, places), np.indices(img.shape)
    np.testing.assert_array_equal(out, at[list(inside)])


def test_slices_come_eight_at_a_time(body):
    seen = []
    def spy(images):
        seen.append(images.shape)
        return grey(images)
    reference.sum_of_views(reference.window(body), spy)
    assert seen == [(8, 24, 20), (8, 24, 20), (2, 24, 20), (8, 24, 18), (8, 24, 18), (4, 24, 18)] + [(8, 20, 18)]*3


@pytest.mark.parametrize("h, w", [(12, 20), (20, 12), (16, 16)])
def test_padding_is_air_at_the_end_and_is_cut_again(h, w):
    seen = []
    def encode(x):
        seen.append(x)
        return x[:, :1]*58.395 + 123.675
    images = rng_for(0, h, w).uniform(100, 200, (2, h, w)).astype(np.float32)
    side = 4*max(h, w)
    out = reference.encode_slices(images, encode, side)
    (given,) = seen
    assert out.shape == (2, 1, h, w) and given.shape == (2, 3, side, side)
    black = -torch.tensor(reference.MEAN)/torch.tensor(reference.SD) # a grey value of 0 in each colour
    for c in range(3):
        if h < w: assert torch.allclose(given[:, c, 4*h + 2:], black[c])
        if w < h: assert torch.allclose(given[:, c, :, 4*w + 2:], black[c])
        assert given[:, c, :4*h - 2, :4*w - 2].min() > black[c] + 1.5
    smooth = np.broadcast_to(np.linspace(0, 255, max(h, w), dtype=np.float32)[:h, None], (1, h, w))
    inner = np.s_[0, ..., 1:min(h, w) - 1, 1:min(h, w) - 1] # a ramp survives both resizings away from its ends
    back = reference.encode_slices(smooth, lambda x: x[:, :1]*58.395 + 123.675, side)[:, 0]
    np.testing.assert_allclose(back[inner], smooth[inner], atol=1e-2)


def test_clusters_are_scikit_images(body):
    from skimage.segmentation import slic
    features = reference.sum_of_views(reference.window(body), grey)
    labels = reference.clusters(features, 12)
    assert labels.min() == 1
    np.testing.assert_array_equal(labels, slic(features, n_segments=12, compactness=0.01, max_num_iter=10, sigma=3,
                                               enforce_connectivity=True, min_size_factor=0.5, max_size_factor=3,
                                               start_label=1, channel_axis=0))


def test_air_is_the_largest_component_closed():
    vol = np.zeros((12, 12, 12))
    vol[:4] = -1000
    vol[1, 5, 5] = 0 # a hole of one voxel is closed
    vol[4, 4, 4] = -1000 # touches by a corner or face: belongs to it
    vol[8:10, 8:10, 8:10] = -1000 # another one, smaller
    expected = np.zeros(vol.shape, bool)
    expected[:4] = expected[4, 4, 4] = True
    np.testing.assert_array_equal(reference.air(vol), expected)
    assert not reference.air(np.zeros((3, 4, 5))).any() and reference.air(np.full((3, 4, 5), -1000)).all()


def test_all_steps(body):
    labels = reference.supervoxels(body, grey, 30)
    outside = reference.air(body)
    assert labels.dtype == np.int16 and labels.shape == body.shape
    assert (labels[outside] == 0).all() and (labels[~outside] > 0).all() and 0 < outside.sum() < body.size
    kept = reference.clusters(reference.sum_of_views(reference.window(body), grey), 30)
    np.testing.assert_array_equal(labels[~outside], kept[~outside])
