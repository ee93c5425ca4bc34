"Properties of the one frame of reference, over random sizes and points."
import cv2
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captcha_hrnet.geometry import HeatmapCodec, Letterbox, letterbox, letterbox_image, unletterbox

side = st.integers(16, 4096)
input_side = st.integers(1, 32).map(lambda n: 32*n)
share = st.floats(0, 1)


@settings(max_examples=400)
@given(side, side, input_side, input_side, share, share)
def test_letterbox_round_trip(width, height, input_width, input_height, u, v):
    params = Letterbox(width, height, input_width, input_height).params
    point = np.array([u*width, v*height])
    there = letterbox(point, params)
    assert np.abs(unletterbox(there, params) - point).max() < 1e-4
    assert (there >= 0).all() and (there <= np.array([input_width, input_height]) + 1e-9).all()
    tensor = torch.tensor(point)
    assert torch.allclose(letterbox(tensor, params), torch.tensor(there), atol=1e-9, rtol=0)


@settings(max_examples=100)
@given(side, side, input_side, input_side)
def test_letterbox_keeps_shape_and_centres(width, height, input_width, input_height):
    box = Letterbox(width, height, input_width, input_height)
    (w, h), (scale_x, scale_y, left, top, *_) = box.scaled, box.params
    assert w == input_width or h == input_height
    assert abs(2*left + w - input_width) <= 1 and abs(2*top + h - input_height) <= 1
    assert np.allclose([scale_x*width, scale_y*height], [w, h], atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(96, 700), st.integers(96, 400), st.floats(.3, .7), st.floats(.3, .7))
def test_picture_and_point_move_together(width, height, u, v):
    point, sigma = np.array([u*width, v*height]), min(width, height)/14
    rows, cols = np.indices((height, width)) + .5
    grey = 255*np.exp(-((cols - point[0])**2 + (rows - point[1])**2) / (2*sigma**2))
    box = Letterbox(width, height, 512, 256)
    fitted = letterbox_image(np.repeat(grey.round().astype(np.uint8)[..., None], 3, 2), box)
    weight = fitted[0].astype(float)
    rows, cols = np.indices(weight.shape) + .5
    found = np.array([(cols*weight).sum(), (rows*weight).sum()]) / weight.sum()
    assert np.abs(found - letterbox(point, box.params)).max() < .1
    assert (fitted[3] == 255).sum() == np.prod(box.scaled)


@settings(max_examples=400)
@given(input_side, input_side, st.lists(st.tuples(share, share), min_size=1, max_size=8), st.sampled_from([2, 4, 8]))
def test_grid_round_trip_borders_included(width, height, shares, stride):
    points = torch.tensor(shares, dtype=torch.float32) * torch.tensor([width, height])
    codec, size = HeatmapCodec(stride), (height//stride, width//stride)
    heat, cell, offset = codec.encode(points, size, 1.)
    assert (codec.decode(cell, offset) - points).abs().max() <= 1e-3
    inside = (points < torch.tensor([width, height])).all(-1)
    assert (offset[inside] >= -.5).all() and (offset[inside] <= .5).all()
    _, found = codec.peaks(torch.logit(heat, eps=1e-6), torch.ones_like(heat, dtype=torch.bool), 1)
    assert torch.equal(found[:, 0], cell) and heat.amax((1, 2, 3)).eq(1).all()


def slow_heat(point, size, sigma, stride):
    "The Gaussian target cell by cell, as a person would write it."
    heat = np.zeros(size)
    for row in range(size[0]):
        for col in range(size[1]):
            dx, dy = col + .5 - point[0]/stride, row + .5 - point[1]/stride
            heat[row, col] = np.exp(-(dx*dx + dy*dy) / (2*sigma**2))
    heat[min(int(point[1]//stride), size[0] - 1), min(int(point[0]//stride), size[1] - 1)] = 1
    return heat


@settings(max_examples=50, deadline=None)
@given(share, share, st.floats(.5, 4))
def test_heat_map_equals_its_slow_twin(u, v, sigma):
    point = np.array([u*96, v*64], np.float32)
    heat, _, _ = HeatmapCodec().encode(torch.tensor(point)[None], (16, 24), sigma)
    np.testing.assert_allclose(heat[0, 0], slow_heat(point, (16, 24), sigma, 4), atol=1e-5)


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_padding_never_wins(seed, k):
    generator = torch.Generator().manual_seed(seed)
    logits = 30*torch.randn(2, 1, 12, 20, generator=generator)
    valid = torch.zeros_like(logits, dtype=torch.bool)
    valid[..., 3:9, :] = True
    best, cell = HeatmapCodec().peaks(logits, valid, k)
    kept = best > -torch.inf
    assert kept[:, 0].all() and valid[0, 0, cell[..., 1], cell[..., 0]][kept].all()
    assert (best.sigmoid().diff(dim=1) <= 0).all()


def test_opencv_draws_half_a_pixel_away():
    "OpenCV's drawing functions count from pixel centres: a fact that the generator relies on."
    canvas = np.zeros((32, 32), np.uint8)
    cv2.fillPoly(canvas, [np.array([[8, 8], [15, 8], [15, 15], [8, 15]])], 1)
    assert canvas.sum() == 64 and canvas[8, 8] and canvas[15, 15]
