"""The piece laid over the gap: a slow twin, outlines drawn at known places, and what must not change."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captcha_hrnet.model import create_lite_hrnet_18_fpn
from captcha_hrnet.registration import REACH, correlation, edge_maps, refined_peak, registered, windows

torch.set_num_threads(1)
HEIGHT, WIDTH = 128, 256
ROW, COLUMN = np.arange(HEIGHT)[:, None] + .5, np.arange(WIDTH) + .5
seeds = st.integers(0, 10**6)


def outline(seed):
    "Whether points are inside of a smooth closed curve around the origin, as a value that rises from 0 to 1 over a pixel."
    rng = np.random.default_rng(seed)
    size, waves = rng.uniform(13, 20), [(k, rng.uniform(0, .2), rng.uniform(0, 2*np.pi)) for k in (2, 3, 5)]
    def inside(x, y):
        angle = np.arctan2(y, x)
        return 1/(1 + np.exp(-3*(size*(1 + sum(a*np.sin(k*angle + p) for k, a, p in waves)) - np.hypot(x, y))))
    return inside


def captcha(seed, gap, slider, noise=.01):
    "A dark gap and a bright piece of one outline on a ground that changes slowly."
    rng, inside = np.random.default_rng([seed, 1]), outline(seed)
    ground = .5 + .1*np.sin(COLUMN/rng.uniform(30, 60) + rng.uniform(0, 6))*np.cos(ROW/rng.uniform(30, 60))
    picture = ground*(1 - .5*inside(COLUMN - gap[0], ROW - gap[1]))
    piece = inside(COLUMN - slider[0], ROW - slider[1])
    picture = picture*(1 - piece) + piece*np.clip(ground*1.4 + .1, 0, 1) + noise*rng.standard_normal((HEIGHT, WIDTH))
    return torch.from_numpy(np.concatenate([picture.clip(0, 1)[None].repeat(3, 0), np.ones((1, HEIGHT, WIDTH))])).float()[None]


places = st.tuples(st.floats(140, 210), st.floats(40, 88), st.floats(36, 90), st.floats(40, 88))
errors = st.tuples(*[st.floats(-1.4, 1.4)]*4)


@settings(max_examples=40, deadline=None)
@given(seeds, places, errors)
def test_the_distance_is_found_and_the_middle_kept(seed, place, error):
    "Of a dark gap and a bright piece: edges agree whichever side is brighter."
    truth = [torch.tensor([p]) for p in (place[:2], place[2:])]
    gap, slider = (point + torch.tensor([e]) for point, e in zip(truth, (error[:2], error[2:])))
    found = registered(captcha(seed, place[:2], place[2:]), gap, slider)
    wrong = found[0] - found[1] - truth[0] + truth[1]
    before = gap - slider - truth[0] + truth[1]
    assert wrong.norm() < .25 + .4*before.norm()
    torch.testing.assert_close(found[0] + found[1], gap + slider, atol=1e-3, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seeds, st.lists(st.tuples(*[st.floats(-5, 300)]*4), min_size=1, max_size=4), st.sampled_from([3, 4]))
def test_anywhere_in_anything(seed, answers, channels):
    "On noise, at borders and beyond: moved by no more than the search reaches, or not at all, and each as if it were alone."
    image = torch.rand(len(answers), channels, 64, 128, generator=torch.Generator().manual_seed(seed))
    gap, slider = torch.tensor(answers).split(2, 1)
    found = registered(image, gap, slider)
    for after, before in zip(found, (gap, slider)):
        assert after.isfinite().all()
    size = torch.tensor([128, 64])
    both = ((gap >= 0) & (gap < size) & (slider >= 0) & (slider < size)).all(1)
    beyond = ((gap < -1) | (gap > size + 1)).any(1)
    assert ((found[0] - gap)[both].abs() <= REACH/2 + 1).all() and torch.equal(found[0][beyond], gap[beyond])
    for i in range(len(answers)):
        alone = registered(image[i:i + 1], gap[i:i + 1], slider[i:i + 1])
        for one, many in zip(alone, found): torch.testing.assert_close(one[0], many[i], atol=1e-2, rtol=0)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(4, 8), st.integers(1, 3))
def test_correlation_is_what_it_is_called(seed, count, channels, radius, reach):
    "One displacement, one pixel at a time."
    generator = torch.Generator().manual_seed(seed)
    piece, around = (torch.randn(count, channels, 2*r + 1, 2*r + 1, generator=generator) for r in (radius, radius + reach))
    found = correlation(piece, around)
    weight = np.array([[min(1, max(0, (radius - np.hypot(x, y))*4/radius)) for x in range(-radius, radius + 1)] for y in range(-radius, radius + 1)])
    weight /= weight.sum()
    for b in range(count):
        for dy in range(2*reach + 1):
            for dx in range(2*reach + 1):
                p, q = piece[b].double().numpy(), around[b, :, dy:dy + 2*radius + 1, dx:dx + 2*radius + 1].double().numpy()
                p, q = ([layer - (layer*weight).sum() for layer in x] for x in (p, q))
                dot = lambda x, y: sum((a*c*weight).sum() for a, c in zip(x, y))
                assert found[b, dy, dx].item() == pytest.approx(dot(p, q)/np.sqrt(dot(p, p)*dot(q, q)), abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3))
def test_the_top_of_a_parabola(x, y):
    steps = torch.arange(-4, 5.)
    values = -(steps - x)**2 - 2*(steps[:, None] - y)**2
    peak, at = refined_peak(values[None])
    torch.testing.assert_close(peak, torch.tensor([[x, y]]), atol=1e-3, rtol=0)
    assert values.flatten()[at] == values.max()


def test_edges_know_no_sign_and_see_no_padding():
    image = captcha(3, (180, 60), (60, 60))
    negative = torch.cat([1 - image[:, :3], image[:, 3:]], 1)
    torch.testing.assert_close(edge_maps(negative), edge_maps(image), atol=1e-4, rtol=0)
    image[..., 100:, :] = 0   # a letterbox's padding: black, without a mask
    maps = edge_maps(image)
    assert (maps[..., 94:, :] == 0).all() and maps[..., :90, :].abs().max() > 0
    beyond = windows(image, torch.tensor([[0, 0]]), 9)
    assert (beyond[0, 3, :9] == 0).all() and (beyond[0, 3, :, :9] == 0).all() and torch.equal(beyond[0, :, 9:, 9:], image[0, :, :10, :10])


def test_a_network_registers_where_it_is_asked_to():
    "While it evaluates; scores and candidates stay."
    torch.manual_seed(0)
    plain, asked = (create_lite_hrnet_18_fpn(dict(name='naive_lite_hrnet_18', neck_channels=8, head_channels=8, registration=on)) for on in (False, True))
    asked.load_state_dict(plain.state_dict())
    picture = (captcha(5, (180, 60), (60, 62))*255).to(torch.uint8)
    with torch.no_grad(): before, after = (net.decode_predictions(net.eval()(picture)) for net in (plain, asked))
    expected = registered(picture/255, before['gap_coords'], before['slider_coords'])
    for point, name in zip(expected, ('gap', 'slider')):
        assert torch.equal(after[f'{name}_coords'], point)
        for kind in ('score', 'candidates', 'candidate_scores'): assert torch.equal(after[f'{name}_{kind}'], before[f'{name}_{kind}'])
    assert 'image' not in asked.train()(picture)


def test_doubt_keeps_what_the_network_says():
    "The dearer a displacement, the nearer the answer stays to the network's."
    image, points = captcha(9, (180.3, 60.2), (60.1, 61.4)), (torch.tensor([[182., 60.2]]), torch.tensor([[60.1, 61.4]]))
    moved = [(registered(image, *points, doubt=doubt)[0] - points[0]).norm().item() for doubt in (.001, .1, 10.)]
    assert moved[0] > moved[1] > moved[2] and moved[2] < .05
