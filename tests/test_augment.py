"""Changed training pictures: their points, angles, masks and letterboxes go with them, and nothing else changes."""
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from captcha_hrnet.augment import augmented, recolored
from captcha_hrnet.config import AugmentConfig
from captcha_hrnet.geometry import Letterbox, letterbox, unletterbox
from toys import batch_of

HEIGHT, WIDTH = 96, 192
ROW, COLUMN = torch.arange(HEIGHT)[:, None] + .5, torch.arange(WIDTH) + .5
sizes = st.tuples(st.integers(150, 700), st.integers(120, 400)).filter(lambda size: .8 < size[0]/size[1] < 4)
seeds = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6))


def captcha(size, at, channels=4) -> dict:
    "A batch of one grey picture with a bright blob at each of two points, given as shares of its width and height."
    box = Letterbox(*size, WIDTH, HEIGHT)
    gap, slider = (torch.from_numpy(letterbox([x*size[0], y*size[1]], box.params)).float() for x, y in at)
    (w, h), (left, top) = box.scaled, map(int, box.params[2:4])
    assume(min((p - q).abs().min() for p in (gap, slider) for q in (torch.tensor([left, top]), torch.tensor([left + w, top + h]))) > 13 and (gap - slider).norm() > 40)   # so that neither is near the other at half the size either
    image = torch.zeros(1, 4, HEIGHT, WIDTH)
    for x, y in (gap, slider): image[:, :3] += 200*torch.exp(-((COLUMN - x)**2 + (ROW - y)**2)/(2*3**2))
    inside = ((COLUMN >= left) & (COLUMN < left + w) & (ROW >= top) & (ROW < top + h)).float()
    image = torch.cat([(image[:, :3] + 40)*inside, 255*inside.expand(1, 1, -1, -1)], 1).round().to(torch.uint8)[:, :channels]
    return dict(image=image, gap_coords=gap[None], slider_coords=slider[None], decoys=slider[None, None], decoy_mask=torch.ones(1, 1, dtype=torch.bool),
                piece_size=torch.tensor([[20., 30.]]), gap_angle=torch.tensor([20.], dtype=torch.float64), letterbox=torch.from_numpy(box.params)[None], index=torch.tensor([7]))


def found_at(image, point):
    "The centre of mass of what is brighter than the ground near a point."
    x, y = point
    near = ((COLUMN - x).abs() < 11) & ((ROW - y).abs() < 11)
    mass = (image[0].double() - 40).clamp_min(0)*near
    return torch.stack([(mass*COLUMN).sum(), (mass*ROW).sum()])/mass.sum()


places = st.tuples(*[st.tuples(st.floats(.1, .9), st.floats(.1, .9))]*2)


@settings(max_examples=60, deadline=None)
@given(sizes, places, seeds, st.floats(.5, 1), st.sampled_from([0., .5, 1.]), st.sampled_from([3, 4]))
def test_points_stay_on_what_they_marked(size, at, seed, low, flip, channels):
    batch = captcha(size, at, channels)
    one = augmented(batch, AugmentConfig(flip=flip, scale=(low, 1.)), seed)
    for name in ('gap_coords', 'slider_coords'): assert (found_at(one['image'][0], one[name][0]) - one[name][0]).abs().max() < .1
    assert torch.equal(one['decoys'][:, 0], one['slider_coords'])
    assert torch.allclose(one['piece_size']*batch['letterbox'][:, :2], batch['piece_size']*one['letterbox'][:, :2])   # the same size in px of the original picture
    before, after = (unletterbox(b['gap_coords'], b['letterbox'])[0] for b in (batch, one))   # px of the original picture
    turned = one['gap_angle'].item() == -20
    assert abs(before[0] - after[0]) < 1e-2 and abs(before[1] - (size[1] - after[1] if turned else after[1])) < .02
    assert turned == (flip == 1) or flip == .5
    assert one['letterbox'].dtype == torch.float64 and torch.equal(one['letterbox'][:, 4:], batch['letterbox'][:, 4:])


@settings(max_examples=40, deadline=None)
@given(sizes, places, seeds, st.floats(.5, 1), st.floats(0, 1))
def test_the_mask_is_where_the_picture_is(size, at, seed, low, color):
    "Its edge is as bright as its inside: no padding is mixed in."
    one = augmented(captcha(size, at), AugmentConfig(flip=.5, scale=(low, 1.), color=color), seed)
    (sx, sy, left, top, w, h), mask = one['letterbox'][0].tolist(), one['image'][0, 3]
    right, bottom = left + sx*w, top + sy*h
    assert -.01 <= left and right <= WIDTH + .01 and -.01 <= top and bottom <= HEIGHT + .01
    inside = (COLUMN > left + .51) & (COLUMN < right - .51) & (ROW > top + .51) & (ROW < bottom - .51)
    outside = (COLUMN < left - .51) | (COLUMN > right + .51) | (ROW < top - .51) | (ROW > bottom + .51)
    assert (mask[inside] == 255).all() and (mask[outside] == 0).all() and set(mask.unique().tolist()) <= {0, 255}
    assert (one['image'][0, :3][:, mask == 0] == 0).all()
    if not color: assert (one['image'][0, :3][:, mask > 0] >= 39).all()


@settings(max_examples=30, deadline=None)
@given(sizes, places, seeds)
def test_upside_down_twice_is_nothing(size, at, seed):
    batch, settings = captcha(size, at), AugmentConfig(flip=1.)
    once = augmented(batch, settings, seed)
    twice = augmented(once, settings, seed)
    assert torch.equal(once['image'], batch['image'].flip(2)) and torch.equal(twice['image'], batch['image'])
    for name in ('gap_coords', 'slider_coords', 'decoys', 'letterbox'): torch.testing.assert_close(twice[name], batch[name], atol=1e-4, rtol=0)
    assert torch.equal(twice['gap_angle'], batch['gap_angle'])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), seeds)
def test_the_first_view_is_the_sample(count, views, seed):
    batch, settings = batch_of(count, seed[0]), AugmentConfig(flip=.5, scale=(.6, .9), color=.5, views=views)
    many = augmented(batch, settings, seed)
    assert set(many) == set(batch) and all(len(value) == views*count for value in many.values())
    assert many['index'].tolist() == [i for i in range(count) for _ in range(views)]
    for name in batch: assert views == 1 or torch.equal(many[name][::views], batch[name])
    again, other = augmented(batch, settings, seed), augmented(batch, settings, (*seed, 1))
    assert all(torch.equal(again[name], many[name]) for name in many)
    assert views*count == count*(views > 1) or not torch.equal(other['image'], many['image'])


def test_nothing_asked_for_is_nothing_done():
    batch = batch_of(3)
    assert augmented(batch, AugmentConfig(), (0,)) is batch
    color = augmented(batch, AugmentConfig(color=1.), (0,))
    assert not torch.equal(color['image'][:, :3], batch['image'][:, :3]) and torch.equal(color['image'][:, 3], batch['image'][:, 3])
    for name in ('gap_coords', 'slider_coords', 'decoys', 'gap_angle'): assert torch.equal(color[name], batch[name])
    torch.testing.assert_close(color['letterbox'], batch['letterbox'], atol=1e-5, rtol=0)


@pytest.mark.parametrize('where', [(0, 16), (16, 48), (40, 56)])
def test_colours_do_not_depend_on_the_padding(where):
    "A contrast that turned about the mean of picture and padding would be a brightness."
    image = torch.randint(0, 256, (2, 4, 32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    image[:, 3], picture = 255, slice(*where)
    alone, draw = image[..., picture], torch.rand(2, 6, generator=torch.Generator().manual_seed(2))
    padded = torch.zeros_like(image)
    padded[..., picture] = alone
    assert (recolored(padded, draw, 1.)[..., picture].int() - recolored(alone.contiguous(), draw, 1.).int()).abs().max() <= 1
    assert torch.equal(recolored(alone[:, :3], draw, 1.), recolored(alone, draw, 1.)[:, :3])
