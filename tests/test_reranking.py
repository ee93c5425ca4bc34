"""The second look: which pairs it is shown, what is in its views, when it has a say, and how it learns."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from captcha_hrnet import train_reranking
from captcha_hrnet.config import Config, UserError, load_config
from captcha_hrnet.geometry import HeatmapCodec
from captcha_hrnet.model import APART_PX, CaptchaKeypointNet, candidate_pairs, create_lite_hrnet_18_fpn, decode_outputs, load_model, save_weights
from captcha_hrnet.predict import letterboxed
from captcha_hrnet.registration import REACH, edge_maps, registered
from captcha_hrnet.reranking import BEHIND, BELIEVED, FAR, RADIUS, SURE, PairNet, believed, judged_pairs, laid_further, middle_pixels, off_distance, off_middle, pair_views, recentred, weighed
from captcha_hrnet.synth import CaptchaSynth
from captcha_hrnet.train_reranking import BESIDE, BESIDE_PX, CENTRE_WEIGHT, DISTANCE_WEIGHT, LEAST, SAME_PX, SIDES_WEIGHT, answers_again, compared_pairs, fit_doubts, fit_trust, fit_shares, fit_worth, look_losses, second_looks, turned
from test_registration import captcha

torch.set_num_threads(1)
CODEC, seeds = HeatmapCodec(stride=4), st.integers(0, 10**6)
SMALL = dict(name='rep_hrnet_18', neck_channels=8, head_channels=8)


def maps(seed, count=2, rows=8, columns=12) -> dict:
    "What a network might say of pictures."
    chance = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(count, *shape, rows, columns, generator=chance)
    return dict(gap_heatmap=3*rand(1), slider_heatmap=3*rand(1), offsets=rand(4).sigmoid(), valid=rand(1) > -1.5,
                image=torch.rand(count, 4, 4*rows, 4*columns, generator=chance))


class Says(PairNet):
    "Gives a pair what a function of its views says, and counts what it was shown."
    def __init__(self, function, shares=(1., 1.)):
        super().__init__()
        self.function, self.shown = function, 0
        self.shares.copy_(torch.tensor(shares))

    def forward(self, views):
        self.shown += len(views)
        return self.function(views)


def slow_pairs(outputs, i, top_k):
    "The pairs of one picture, place by place."
    valid, found = outputs['valid'][i, 0], []
    logits = [outputs[name][i, 0].masked_fill(~valid, -torch.inf) for name in ('gap_heatmap', 'slider_heatmap')]
    peaks = []
    for each in logits:
        around = lambda r, c: each[max(r - 1, 0):r + 2, max(c - 1, 0):c + 2]
        tops = [(each[r, c].item(), r, c) for r, c in itertools.product(*map(range, each.shape)) if valid[r, c] and each[r, c] == around(r, c).max()]
        peaks.append([(r, c) for _, r, c in sorted(tops, reverse=True)[:top_k]])
    places = peaks[0] + [(r, c) for r, c in peaks[1] if all(max(abs(r - y), abs(c - x)) > 1 for y, x in peaks[0])]
    def role(k, place):
        cells = [(r, c) for r, c in itertools.product(*(range(max(v - 1, 0), min(v + 2, n)) for v, n in zip(place, valid.shape)))]
        r, c = max(cells, key=lambda cell: logits[k][cell])
        return logits[k][r, c].item(), CODEC.decode(torch.tensor([c, r]), outputs['offsets'][i, 2*k:2*k + 2, r, c]).tolist()
    for gap, slider in itertools.product(places, places):
        (a, p), (b, q) = role(0, gap), role(1, slider)
        if a + b > -np.inf and np.hypot(p[0] - q[0], p[1] - q[1]) >= APART_PX: found.append((a + b, *p, *q))
    return sorted(found, reverse=True)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 12))
def test_candidate_pairs(seed, top_k, count):
    "Against the slow twin: every place in both roles, likeliest first."
    outputs = maps(seed)
    gaps, sliders, logits, alone = candidate_pairs(outputs, CODEC, top_k=top_k, count=count)
    for i in range(2):
        slow = slow_pairs(outputs, i, top_k)[:count]
        known = logits[i] > -torch.inf
        assert known.sum() == len(slow) and (known.long().diff() <= 0).all()
        fast = torch.cat([logits[i, :, None], gaps[i], sliders[i]], 1)[known]
        torch.testing.assert_close(fast, torch.tensor(slow).view(-1, 5), atol=1e-3, rtol=0)
        torch.testing.assert_close(alone[i].sum(1)[known], logits[i][known])


@settings(max_examples=30, deadline=None)
@given(seeds, st.lists(st.tuples(*[st.floats(-9, 130)]*8), min_size=1, max_size=3), st.sampled_from([3, 4]))
def test_views(seed, places, channels):
    "Cut out of each of two pictures as if it went on in black."
    image = torch.rand(2, channels, 64, 96, generator=torch.Generator().manual_seed(seed))
    gap, slider = torch.tensor(places).view(len(places), 2, 4).transpose(0, 1).split(2, 2)   # [2, P, 2]
    views = pair_views(image, gap, slider)
    whole = image if channels > 3 else torch.cat([image, torch.ones(2, 1, 64, 96)], 1)
    black = torch.nn.functional.pad(whole*(whole[:, 3:] > 0), [RADIUS]*4)   # a random mask may be 0 anywhere
    for k, points in enumerate((slider, gap)):
        for n, (x, y) in enumerate(points.flatten(0, 1).floor().long().tolist()):
            x, y = min(max(x, 0), 95), min(max(y, 0), 63)
            assert torch.equal(views[n, 4*k:4*k + 4], black[n // len(places), :, y:y + 2*RADIUS + 1, x:x + 2*RADIUS + 1])


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0, 60))
def test_only_pairs_in_question_are_looked_at_and_each_picture_alone(seed, strength):
    "Against the slow twin, one pair at a time; what is in question after the first look is also looked at upside down."
    outputs, rows = maps(seed, 3), torch.linspace(-1, 1, 129)[:, None]
    net = Says(lambda views: strength*(views*rows).mean((1, 2, 3)) + 9*views.mean((1, 2, 3)))
    gaps, sliders, logits, _ = candidate_pairs(outputs, CODEC)
    best = judged_pairs(net, outputs['image'], gaps, sliders, logits).argmax(1)
    shown, shown_all = 0, net.shown
    for i in range(3):
        laid = registered(outputs['image'][i:i + 1], gaps[i], sliders[i])
        views = pair_views(outputs['image'][i:i + 1], *(points[None] for points in laid))
        asked = [k for k, logit in enumerate(logits[i].tolist()) if logit >= logits[i, 0] - BEHIND]
        if len(asked) < 2:
            assert best[i] == 0
            continue
        upright, turned_over = (net.function(each) for each in (views, views.flip(2)))
        both = {k: (logits[i, k] + upright[k]).item() for k in asked}
        again = [k for k in asked if both[k] >= max(both.values()) - BEHIND]
        if len(again) > 1: both |= {k: (logits[i, k] + (upright[k] + turned_over[k])/2).item() for k in again}
        shown += len(asked) + len(again)*(len(again) > 1)
        assert both[int(best[i])] >= max(both.values()) - 1e-4
        assert judged_pairs(net, outputs['image'][i:i + 1], gaps[i:i + 1], sliders[i:i + 1], logits[i:i + 1]).argmax() == best[i]
    assert shown_all == shown


def one_outline(views):
    "How well the edges of both views agree around their middle."
    slider, gap = (edge_maps(each[:, :, 32:-32, 32:-32]) for each in views.split(4, 1))
    return -400*(slider - gap).abs().mean((1, 2, 3))


@settings(max_examples=30, deadline=None)
@given(seeds, st.tuples(st.floats(140, 200), st.floats(44, 84), st.floats(40, 80), st.floats(44, 84)), st.floats(0, 2*np.pi), st.floats(9, 15), st.floats(0, 1))
def test_a_pair_that_lies_badly_is_laid_over_from_further_away(seed, place, angle, far, share):
    "Too far off for registration, both points are put right by what shows one outline; a pair that is out of the question is not tried, and one that lies well stays."
    gap, slider = torch.tensor(place).view(2, 1, 2)
    image, off = captcha(seed, place[:2], place[2:]), far*torch.tensor([[np.cos(angle), np.sin(angle)]], dtype=torch.float)
    pairs = [torch.stack([points, points + 30.], 1) for points in (gap + share*off, slider - (1 - share)*off)]   # and a pair that lies well, but is none
    net, logits, judged = Says(one_outline), torch.tensor([[2., 9.]]), torch.tensor([[3., -torch.inf]])
    *found, which = laid_further(net, image, *pairs, logits, judged)
    assert which == 0 and net.shown == 2*2*2
    assert (found[0] - found[1] - gap + slider).norm() < 1.5 < 6 < off.norm()
    torch.testing.assert_close(found[0] + found[1], (pairs[0] + pairs[1])[:, 0], atol=1e-3, rtol=0)
    stays = laid_further(net, image, gap[None], slider[None], logits[:, :1], judged[:, :1])
    assert (stays[0] - stays[1] - gap + slider).norm() < .5


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_decoding_with_a_second_look(seed):
    "Coordinates and scores are those of the pair that it chose; candidates stay. Without a say it changes nothing but which of equals is first."
    outputs = maps(seed)
    gaps, sliders, logits, alone = candidate_pairs(outputs, CODEC)
    before, silent = decode_outputs(outputs, CODEC), decode_outputs(outputs, CODEC, reranking=PairNet().eval())
    last = Says(lambda views: torch.arange(len(views))*100.)
    found = decode_outputs(outputs, CODEC, reranking=last)
    for i in range(2):
        single = {name: value[i:i + 1] for name, value in outputs.items()}
        chosen = int((logits[i] >= logits[i, 0] - BEHIND).sum()) - 1
        one = decode_outputs(single, CODEC, reranking=last)
        for k, (name, points) in enumerate((('gap', gaps), ('slider', sliders))):
            for answers, row, pair in ((one, 0, chosen), (silent, i, 0)):
                assert torch.equal(answers[f'{name}_coords'][row], points[i, pair]) and torch.equal(answers[f'{name}_score'][row], alone[i, pair, k].sigmoid())
    for name in found:
        if 'candidate' in name: assert torch.equal(found[name], before[name])
    assert torch.equal(decode_outputs({name: value for name, value in outputs.items() if name != 'image'}, CODEC, reranking=last)['gap_coords'], before['gap_coords'])


def trained(tmp_path, **more):
    "A small network with settings of a run, in a file; scores that follow the picture."
    torch.manual_seed(0)
    model = create_lite_hrnet_18_fpn(dict(SMALL, **more)).eval()
    model.config = load_config('configs/quickstart.yaml', [f'model.{key}={value}' for key, value in dict(SMALL, **more).items()]).to_dict()
    save_weights(model, tmp_path/'net.safetensors')
    return model


def test_files_keep_it_and_other_networks_may_leave_it_behind(tmp_path):
    model = trained(tmp_path, reranking=True)
    model.pair_net.shares.copy_(torch.tensor([2., .5]))
    save_weights(model, tmp_path/'net.safetensors')
    again = load_model(tmp_path/'net.safetensors')
    assert torch.equal(again.pair_net.shares, torch.tensor([2., .5])) and not any(p.requires_grad for p in again.pair_net.parameters())
    image = torch.randint(0, 256, (2, 4, 64, 128), dtype=torch.uint8)
    older = {name: value for name, value in again.state_dict().items() if not name.endswith(('worth', 'usual', 'laid')) and '.distance.' not in name}
    from_older = create_lite_hrnet_18_fpn(dict(SMALL, reranking=True)).eval()
    from_older.load_state_dict(older)   # a file that was written before scores knew of the likeness and it told distances: its head for them has no say
    assert from_older.pair_net.laid == SURE
    for one, other in zip(*(each.decode_predictions(each(image)).values() for each in (again, from_older))): assert torch.equal(one, other)
    assert 'image' in again(image) and 'image' not in again.train()(image)
    plain = create_lite_hrnet_18_fpn(dict(SMALL, start_from=str(tmp_path/'net.safetensors')))
    with_it = create_lite_hrnet_18_fpn(dict(SMALL, reranking=True, start_from=str(tmp_path/'net.safetensors')))
    assert plain.pair_net is None and torch.equal(with_it.pair_net.shares, again.pair_net.shares)
    trained(tmp_path)
    with pytest.raises(UserError, match='another network .*reranking: False there, True here'):
        create_lite_hrnet_18_fpn(dict(SMALL, reranking=True, start_from=str(tmp_path/'net.safetensors')))


class Batches(list):
    "A loader of batches that are there already."
    batch_sampler = property(lambda self: self)
    def set_position(self, epoch): pass


@pytest.mark.parametrize('kind', [torch.float64, torch.bfloat16])
def test_a_network_that_ships_answers_in_any_precision(kind):
    "Second look, registration and the doubt in it included."
    model, exact = (load_model('pretrained-fast') for _ in range(2))
    image, _ = letterboxed([CaptchaSynth(Config().synth, 3, 'val').draw(index).image for index in range(3)], (256, 512))
    with torch.no_grad(): found, truth = (net.decode_predictions(net(image)) for net in (model.to(kind), exact))
    for name in ('gap_coords', 'slider_coords'): torch.testing.assert_close(found[name].float(), truth[name], atol=1e-2 if kind == torch.float64 else 1., rtol=0)


def drawn(count, seed=0):
    "Black pictures, each with a dark and a bright square, and maps that cannot tell which is which."
    chance, batch = np.random.default_rng(seed), dict(image=torch.zeros(count, 4, 64, 128, dtype=torch.uint8))
    batch['image'][:, 3] = 255
    places = []
    for i in range(count):
        x = chance.permutation([24, 64, 104])[:2]
        y = int(chance.integers(16, 48))
        for at, value in zip(x, (60, 220)): batch['image'][i, :3, y - 8:y + 8, at - 8:at + 8] = value
        places.append([[at + .5, y + .5] for at in x])
    gap, slider = torch.tensor(places).unbind(1)
    return batch | dict(gap_coords=gap, slider_coords=slider, piece_size=torch.full((count, 2), 16.))


class Blind(torch.nn.Module):
    "A detector that sees both squares and takes each for either."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.codec, self.pair_net, self.decode_options = CODEC, PairNet(), dict(decode='offset', top_k=5, same_row=False, slider_left=False, registration=False)
        self.register_buffer('calibration', torch.ones(2, 2))

    decode_predictions = CaptchaKeypointNet.decode_predictions

    def forward(self, image):
        there = torch.nn.functional.avg_pool2d(image[:, :1].float().clamp_max(60)/6, 17, 4, 8)
        there = there + 1e-3*torch.rand(there.shape)
        return dict(gap_heatmap=there, slider_heatmap=there.clone(), offsets=torch.full((len(image), 4, *there.shape[2:]), .5),
                    valid=torch.ones_like(there, dtype=torch.bool), image=image.float()/255)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_compared_pairs(seed):
    "First the truth, then the truth exchanged, then the truth laid over wrongly, then others, each of them wrong; both places of a pair a little away, by the same. Where something is lacking there are only others."
    batch, found = drawn(5, seed), {}
    for name, lacking in (('gap', 3), ('slider', 4)): batch[f'{name}_coords'][lacking] = torch.nan
    for away, hidden in ((0., 0.), (5., 0.), (5., 1.)):
        torch.manual_seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_reranking, 'AWAY', away); patch.setattr(train_reranking, 'HIDDEN', hidden)
            found[away, hidden] = compared_pairs(Blind(), batch, 8)
    still, moved, untold = found.values()
    assert not untold[2][:, 0].any() and torch.equal(untold[2][:, 1:], moved[2][:, 1:]) and torch.equal(untold[0], moved[0])
    assert all(points.isfinite().all() for points in still) and not still[2][3:, :2 + BESIDE].any() and still[2][3:].any()
    (gaps, sliders, known), others, batch = [points[:3] for points in still], [points[:3] for points in moved], {name: values[:3] for name, values in batch.items()}
    moved = [others[0] - gaps, others[1] - sliders]
    torch.testing.assert_close(*moved, atol=1e-4, rtol=0)
    assert moved[0].abs().max() > 1 and torch.equal(known, others[2])
    gap, slider = batch['gap_coords'][:, None], batch['slider_coords'][:, None]
    near = lambda a, b: (a - b).abs().amax(-1) < SAME_PX
    assert known[:, :2 + BESIDE].all() and (near(gaps[:, :1], gap) & near(sliders[:, :1], slider)).all()
    assert torch.equal(gaps[:, 1], sliders[:, 0]) and torch.equal(sliders[:, 1], gaps[:, 0])
    apart = (gaps - sliders - (gap - slider)).norm(dim=2)   # the truth has an error there, of .7 or 2.1 px in x and in y before it is laid over
    assert apart[:, 0].max() < 12 and apart[:, 2:2 + BESIDE].mean() > BESIDE_PX[0] and apart[:, 2:2 + BESIDE].max() < BESIDE_PX[1] + 2**.5*REACH + 12
    wrong = (apart >= BESIDE_PX[0]) | ((gaps - gap).norm(dim=2) >= BESIDE_PX[1])
    assert wrong[:, 2 + BESIDE:][known[:, 2 + BESIDE:]].all()


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_turned_views_keep_what_is_said_of_them(seed):
    "A rectangle's centre and size are found again after the turn, and how far it is from another one; masks stay masks, and both views are turned alike."
    torch.manual_seed(seed)
    left, top, width, height = (int(torch.randint(low, high, ())) for low, high in ((1, 20), (1, 20), (3, 12), (3, 12)))
    views, apart = torch.zeros(2, 8, 41, 41), torch.randint(0, 9, (2,)).tolist()
    views[:, :4, top:top + height, left:left + width] = torch.arange(1., 5)[:, None, None]
    views[:, 4:, top + apart[1]:top + apart[1] + height, left + apart[0]:left + apart[0] + width] = torch.arange(5., 9)[:, None, None]
    steps, size = torch.tensor([[[left + width/2 - 20.5, top + height/2 - 20.5], apart]]*2), torch.tensor([[width, height]]*2)
    views, steps, size = turned(views, steps, size)
    assert set(views[:, 3].unique().tolist()) == {0, 4} and set(views[:, 7].unique().tolist()) == {0, 8}
    assert sorted(views[0, :3].amax((1, 2)).tolist()) == [1, 2, 3] and torch.equal(views[0, 4:7].amax((1, 2)), views[0, :3].amax((1, 2)) + 4)
    for axis in range(2):
        places = [(views[0, channel] > 0).nonzero()[:, 1 - axis] for channel in (3, 7)]
        middles = [(found.min().item() + found.max().item())/2 - 20 for found in places]
        assert abs(middles[0] - steps[0, 0, axis]) < 1e-4 and abs(middles[1] - middles[0] - steps[0, 1, axis]) < 1e-4
        assert all(found.max() - found.min() + 1 == size[0, axis] for found in places)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(2, 6))
def test_look_losses_against_a_slow_twin(seed, pictures, pairs):
    "Picture by picture: the surprise that it is this pair, or none; where something is lacking nothing is asked of the outline."
    torch.manual_seed(seed)
    net, views = PairNet().eval(), torch.rand(pictures*pairs, 8, 65, 65)
    known, steps, size = torch.rand(pictures, pairs) < .7, 9*torch.randn(pictures, 3, 2), 40*torch.rand(pictures, 2)*(torch.rand(pictures, 2) < .8)
    lacking = torch.rand(pictures) < .3
    steps[lacking] = torch.nan; known[lacking, 0] = False
    with torch.no_grad():
        maps = net.maps(views)
        likeness, (seen, doubt) = net.likeness(maps[-1]).view(pictures, pairs), net.outline([each[::pairs] for each in maps])
        apart, unsure = net.distance([each[::pairs] for each in maps], steps[:, 2].nan_to_num(9))
        surprise, right, errors, blames, sides, alone, both = ([] for _ in range(7))
        for i in range(pictures):
            likely = [0.] + likeness[i][known[i]].tolist()   # the first: none
            surprise.append(np.log(np.exp(likely).sum()) - likely[int(known[i, 0])])
            right.append(int(np.argmax(likely)) == int(known[i, 0]))
            for axis in range(2) if not lacking[i] else ():
                errors.append(abs(float(seen[i, axis].mean() - steps[i, 0, axis])))
                blames.append(errors[-1]*np.exp(-float(doubt[i, axis])) + float(doubt[i, axis]))
                if size[i, axis] > 0: sides.append(np.mean([abs(float(seen[i, axis, k] - steps[i, 0, axis] + (.5 - k)*size[i, axis])) for k in (0, 1)]))
                one, other, weight = steps[i, 2, axis], apart[i, axis], np.exp(-2*float(unsure[i, axis]))
                alone.append(abs(float(other - steps[i, 1, axis])))
                both.append(abs(float((one + weight*other)/(1 + weight) - steps[i, 1, axis])))
        def mean(values): return sum(values)/max(len(values), 1)
        found = look_losses(net, views, known, steps, size)
    expected = mean(surprise) + CENTRE_WEIGHT*mean(blames) + SIDES_WEIGHT*mean(sides) + DISTANCE_WEIGHT*(mean(alone) + mean(both))/2, mean(right), mean(errors), mean(both)
    np.testing.assert_allclose(torch.stack(found).numpy(), expected, rtol=1e-4, atol=1e-4)


class Sees(PairNet):
    "Says where sides are, how far apart the places, and how far off both may be."
    def __init__(self, sides, doubt, apart, unsure): super().__init__(); self.said = [torch.as_tensor(each) for each in (sides, doubt, apart, unsure)]
    def maps(self, views): return [views]
    def likeness(self, views): return torch.arange(len(views))
    def outline(self, maps): return self.of(maps[0], self.said[:2])
    def distance(self, maps, laid): return self.of(maps[0], self.said[2:])
    def of(self, views, said): return tuple(each.expand(len(views), *each.shape) for each in said)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(4, 60), min_size=8, max_size=8), st.lists(st.floats(-9, 9), min_size=6, max_size=6), st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_recentred(places, said, doubts):
    "Middle and distance lie between two opinions each, nearer to the surer one."
    image, (gap, slider) = torch.rand(2, 4, 64, 64), torch.tensor(places).view(2, 2, 2)
    net = Sees(torch.tensor(said[:4]).view(2, 2), [doubts[1]]*2, said[4:], [doubts[3]]*2)
    assert net.doubt == net.laid == SURE
    *before, likeness = recentred(net, image, gap, slider)
    assert torch.equal(before[0], gap) and torch.equal(before[1], slider) and likeness.tolist() == [0, 1]   # it has no say before its doubts are fitted
    middles = [middle_pixels(points, image) + .5 for points in (gap, slider)]
    seen = dict(middle=net.said[0].mean(1) + sum(middles)/2, distance=net.said[2] + middles[0] - middles[1])
    def of(gap, slider): return dict(middle=(gap + slider)/2, distance=gap - slider)
    expected = of(gap, slider)
    for name, fitted, (ours, theirs) in (('middle', net.doubt, doubts[:2]), ('distance', net.laid, doubts[2:])):   # one after the other
        fitted.fill_(ours)
        weight = np.exp(-2*theirs)/(np.exp(-2*ours) + np.exp(-2*theirs))
        expected[name] = expected[name] + weight*(seen[name] - expected[name])
        for key, found in of(*recentred(net, image, gap, slider)[:2]).items(): torch.testing.assert_close(found, expected[key], atol=1e-3, rtol=0)
    torch.testing.assert_close(off_middle(image, gap, slider) - off_middle(image, gap + 1, slider + 3, of=(gap, slider)), torch.full((2, 2), -2.), atol=1e-4, rtol=0)
    torch.testing.assert_close(off_distance(image, gap + 1, slider + 3, of=(gap, slider)) - off_distance(image, gap, slider), torch.full((2, 2), -2.), atol=1e-4, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seeds, st.lists(st.floats(-2, 2), min_size=5, max_size=5))
def test_registration_is_taken_back_where_the_evidence_says_so(seed, trust):
    "Pair by pair; never where it moved a pair by little, and not before anything is fitted."
    chance, image = torch.Generator().manual_seed(seed), torch.rand(6, 4, 64, 64)
    found = [20 + 24*torch.rand(6, 2, generator=chance) for _ in range(2)]
    half = (torch.rand(6, 2, generator=chance) - .5)*torch.tensor([.5]*2 + [6.]*4)[:, None]
    laid = [found[0] + half, found[1] - half]
    net = Sees(torch.zeros(2, 2), [0., 0.], [1., -.5], [.3, .5])
    for before, after in zip(laid, recentred(net, image, *laid, found)): assert torch.equal(before, after)
    net.trust.copy_(torch.tensor(trust))
    points, seen = believed(net, image, found, laid)
    far = [i for i in range(6) if (2*half[i]).abs().max() > FAR]
    for i in range(6):
        off, moved = off_distance(image[:1], *(each[i:i + 1] for each in found))[0], 2*half[i]
        # the second look says of the n-th view that its likeness is n
        likelier = far.index(i) - i if i in far else 0
        further = net.said[2] - off
        weight = trust[0]*likelier + trust[1]*float((further - moved).abs().sum() - further.abs().sum()) + trust[2]*float(moved.abs().sum()) + trust[3]*.4 + trust[4]
        if abs(weight) < 1e-3: continue
        back = i in far and weight < 0
        for point, one, other in zip(points, found, laid): assert torch.equal(point[i], (one if back else other)[i])
        assert seen[4][i] == (far.index(i) if back else i)


@settings(max_examples=30, deadline=None)
@given(seeds, st.lists(st.floats(-1, 1), min_size=5, max_size=5))
def test_the_trust_that_is_fitted_errs_less(seed, trust):
    "Where evidence tells which of two distances is right, most of what can be gained is."
    chance, net = torch.Generator().manual_seed(seed), PairNet()
    evidence = 2*torch.randn(2000, 4, generator=chance, dtype=torch.float64)
    after = torch.rand(2000, generator=chance, dtype=torch.float64) < (4*(evidence @ torch.tensor(trust[:4]).double() + trust[4])).sigmoid()   # is right
    errors = torch.stack([after, ~after], 1).double()
    either = torch.stack([errors, errors, torch.zeros_like(errors), torch.zeros_like(errors)], 2)[..., None].expand(-1, -1, -1, 2)   # both opinions are the same
    seen = dict(far=torch.rand(2000, generator=chance) < .9, right=torch.ones(2000, 2), evidence=evidence, either=either)
    fitted = fit_trust(net, seen)
    assert (fitted['far'], fitted['better']) == (seen['far'].sum(), after[seen['far']].sum())
    if 'after' not in fitted: assert fitted['far'] - fitted['better'] < LEAST and net.trust.tolist() == BELIEVED; return
    known = torch.where(evidence @ torch.tensor(trust[:4]).double() + trust[4] < 0, errors[:, 0], errors[:, 1])[seen['far']].mean().item()
    assert fitted['after'] <= min(fitted['before'], known + .05)
    assert fit_trust(PairNet(), dict(right=seen['right'])) == {}   # a model that doesn't register
    net = PairNet()
    assert fit_trust(net, seen | dict(far=torch.arange(2000) < LEAST - 1)) == dict(far=LEAST - 1, better=after[:LEAST - 1].sum()) and net.trust.tolist() == BELIEVED


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.floats(-9, 9)]*4))
def test_weighed(said):
    "Between two measurements, whichever of them comes first, and nearer to the surer one; one that is as unsure as can be has no say."
    ours, theirs, our_doubt, their_doubt = torch.tensor(said, dtype=torch.float64)
    found = weighed(ours, theirs, our_doubt, their_doubt)
    torch.testing.assert_close(found, weighed(theirs, ours, their_doubt, our_doubt), atol=1e-9, rtol=0)
    ends = [(found - ours).abs(), (theirs - found).abs()]
    assert abs(sum(ends) - (theirs - ours).abs()) < 1e-9 and (ends[0] - ends[1])*(our_doubt - their_doubt) >= -1e-9
    for pair in ((ours, theirs, our_doubt, -SURE), (theirs, ours, SURE, -SURE)): torch.testing.assert_close(weighed(*pair[:2], *map(torch.as_tensor, pair[2:])), pair[0], atol=1e-9, rtol=0)


def test_the_distance_alone_is_learnt_without_the_detector():
    "Nothing else of the second look moves by a bit, and nobody asks the detector."
    model = Blind()
    model.forward = None
    torch.manual_seed(0)
    before = {name: value.clone() for name, value in model.pair_net.state_dict().items()}
    second_looks(model, Batches(drawn(4, seed) for seed in range(3)), epochs=1, lr=5e-3, weight_decay=.01, distance_only=True)
    for name, value in model.pair_net.state_dict().items(): assert torch.equal(value, before[name]) != name.startswith('distance.'), name
    assert not model.pair_net.training and not any(p.requires_grad for p in model.pair_net.parameters())


def test_it_learns_what_the_detector_cannot_tell():
    "The gap is the dark one. Before training half the answers are right, after it nearly all; and the squares' middles are seen where the detector sees cells."
    model = Blind()
    torch.manual_seed(0)
    second_looks(model, Batches(drawn(8, seed) for seed in range(12)), epochs=12, lr=5e-3, weight_decay=.01, pairs=5, looks=1)
    held_out = Batches(drawn(16, 100 + seed) for seed in range(6))
    found = fit_shares(model, held_out)
    assert found['captchas'] == 96 and found['candidates'] > 90
    assert found['before'] < .75*found['candidates'] and found['after'] > .9*found['candidates']
    assert not model.pair_net.training and not any(p.requires_grad for p in model.pair_net.parameters())
    assert model.pair_net.shares[1] > 0
    doubts = fit_doubts(model.pair_net, answers_again(model, held_out))
    centres, distances = doubts['middle'], doubts['distance']
    assert doubts['right'] >= .9*found['candidates'] and centres['after'] < .6*centres['before'] and centres['after'] <= centres['alone'] + .01
    assert distances['before'] == 0 and distances['after'] < 1e-3   # both squares lie alike in their cells: nothing to put right, and nothing is spoilt


def squares(count, chance):
    "Views of a bright square over a dark one, up to 3 px away each way; half of the time registration is wrong by some px."
    views, known = torch.zeros(count, 8, 49, 49), torch.ones(count, 1, dtype=torch.bool)
    centre, distance = (torch.randint(-most, most + 1, (count, 2), generator=chance) for most in (4, 3))
    for view, slider, gap in zip(views, (centre + 24).tolist(), (centre + distance + 24).tolist()):
        for (x, y), value, channel in ((slider, .8, 0), (gap, .3, 4)): view[channel:channel + 3, y - 6:y + 7, x - 6:x + 7] = value
    views[:, 3::4] = 1
    wrong = 3*torch.randn(count, 2, generator=chance)*(torch.rand(count, 1, generator=chance) < .5)
    return views, known, torch.stack([centre + distance/2, distance, distance + wrong], 1), torch.full((count, 2), 13.)


def test_it_learns_how_far_apart_two_places_are():
    "Nearer than registration, with or without it (with three seeds 0.25 px off at most, registration 1.3)."
    torch.manual_seed(0)
    net, chance = PairNet(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=300, pct_start=.1)
    for _ in range(300):
        optimizer.zero_grad(); look_losses(net, *squares(16, chance))[0].backward(); optimizer.step(); schedule.step()
    views, _, steps, _ = squares(128, torch.Generator().manual_seed(99))
    _, truth, laid = steps.unbind(1)
    with torch.no_grad(): apart, unsure = net.eval().distance(net.maps(views), laid)
    before, alone, both = ((each - truth).abs().mean() for each in (laid, apart, weighed(laid, apart, torch.zeros(()), unsure)))
    assert max(alone, both) < .4*before, (before, alone, both)


scales = st.tuples(*[st.floats(.7, 1.4)]*2)


@settings(max_examples=10, deadline=None)
@given(seeds, scales, scales)
def test_the_doubts_that_are_fitted_cannot_be_bettered(seed, ours, theirs):
    "Both err by chance, in middle and distance: together less than either; and each doubt is near to what theory says (in 400 trials 0.3 away at most)."
    batches, chance = Batches(drawn(48, 100*seed + k) for k in range(3)), torch.Generator().manual_seed(seed)
    def errors(scales): return [(scale*torch.randn(48, 2, generator=chance)).clamp(-5, 5) for scale in scales]
    class Detector(Blind):
        def forward(self, image): return dict(image=image)
        def decode_predictions(self, outputs, **options):
            batch, (middle, apart) = next(batch for batch in batches if torch.equal(batch['image'], outputs['image'])), errors(ours)
            points, truth = [batch['gap_coords'] + middle + apart/2, batch['slider_coords'] + middle - apart/2], [batch[f'{name}_coords'] for name in ('gap', 'slider')]
            middle, apart = (off(batch['image'], *truth, of=points) + error for off, error in zip((off_middle, off_distance), errors(theirs)))
            model.pair_net.said = torch.stack([middle, middle], 2), torch.zeros(48, 2), apart, torch.zeros(48, 2)
            return dict(gap_coords=points[0], slider_coords=points[1], gap_score=torch.full((48,), .5), slider_score=torch.full((48,), .5))
    model = Detector()
    model.pair_net = Sees(*[torch.zeros(2, 2)]*4)
    model.pair_net.of = lambda views, said: said
    found = fit_doubts(model.pair_net, answers_again(model, batches))
    assert found['captchas'] == found['right'] == 144
    for name, fitted, a, b in zip(('middle', 'distance'), (model.pair_net.doubt, model.pair_net.laid), ours, theirs):
        assert found[name]['after'] <= min(found[name]['before'], found[name]['alone']) + 1e-3
        assert abs(fitted - np.log(a/b)) < .5


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(.3, 2), st.floats(0, 1), st.floats(-2, 2))
def test_what_a_likeness_is_worth_is_found_again(seed, slope, worth, bias):
    "Of answers that are right with a known probability; a score with it tells right from wrong better, or as well. (In 300 trials 0.17 away at most.)"
    chance, net = torch.Generator().manual_seed(seed), PairNet()
    likeness, logits = (torch.randn(4000, *more, generator=chance, dtype=torch.float64)*3 for more in ((), (2,)))
    right = torch.rand(4000, 2, generator=chance, dtype=torch.float64) < (slope*(logits + worth*likeness[:, None]) + bias).sigmoid()
    seen = dict(likeness=likeness + 7, logits=logits, right=right.double())
    found = fit_worth(net, seen)
    assert (net.worth - worth).abs().max() < .25 and abs(net.usual - 7) < .5
    for k, name in enumerate(('gap', 'slider')): assert found[name]['right'] == right[:, k].sum() and found[name]['after'] <= found[name]['before'] + 1e-6
    few = dict(seen, right=torch.ones_like(seen['right']))
    few['right'][:LEAST - 1] = 0
    net = PairNet()
    assert fit_worth(net, few) == {} and not net.worth.any()


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0, 2), st.floats(-5, 5))
def test_scores_know_the_likeness(seed, worth, usual):
    "More likeness, higher scores, of candidates as of the answer; the usual one changes nothing, nor does one that is worth nothing."
    outputs, net = maps(seed), Sees(torch.zeros(2, 2), *[[0., 0.]]*3)
    net.forward = lambda views: torch.zeros(len(views))
    before = decode_outputs(outputs, CODEC, reranking=net)
    net.worth.copy_(torch.tensor([worth, 0.])); net.usual.fill_(usual)
    found = decode_outputs(outputs, CODEC, reranking=net)
    expected = worth*(torch.arange(2.) - usual).double()
    for name, expected in (('gap_score', expected), ('gap_candidate_scores', expected[:, None])):
        torch.testing.assert_close(found[name].double(), (before[name].double().logit() + expected).sigmoid(), atol=1e-4, rtol=0)
    for name in before:
        if not name.startswith('gap') or 'score' not in name: assert torch.equal(found[name], before[name])


def test_a_training_that_is_stopped_keeps_what_it_learnt(caplog):
    class Stopped(Batches):
        def __iter__(self):
            yield self[0]
            raise KeyboardInterrupt
    model = Blind()
    before = model.pair_net.out.weight.clone()
    second_looks(model, Stopped([drawn(4)]*3), epochs=1, lr=1e-3, weight_decay=0, pairs=5, looks=1)
    assert 'after step 1 of 3' in caplog.text and not torch.equal(model.pair_net.out.weight, before) and not model.pair_net.training


@pytest.mark.parametrize('arguments, line', [
    (dict(out='x.pth'), 'must end in .safetensors'), (dict(out='x.safetensors', pairs_from='net.safetensors'), 'net.safetensors: has no second look'),
    (dict(out='net.safetensors'), 'is there already'), (dict(out='x.safetensors', config='none.yaml'), 'none.yaml'), (dict(out='x.safetensors', weights='none.pth'), 'none.pth'),
    (dict(out='x.safetensors', distance_only=True), 'net.safetensors: has no second look'), (dict(out='x.safetensors', distance_only=True, pairs_from='net.safetensors'), 'only one of them'),
    (dict(out='x.safetensors', trust_only=True), 'net.safetensors: has no second look'), (dict(out='x.safetensors', trust_only=True, distance_only=True), 'only one of them')])
def test_mistakes(tmp_path, monkeypatch, arguments, line):
    trained(tmp_path)
    config = str((train_reranking.Path.cwd()/'configs/reranking.yaml'))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=line): train_reranking.main(**dict(weights='net.safetensors', config=config, set=['train.num_workers=0']) | arguments)
    assert not list(tmp_path.glob('x.*'))


LESS = ['train.num_workers=0', 'data.train_samples=6', 'data.val_samples=8', 'train.batch_size=3', 'eval.batch_size=4', 'sched.epochs=1', 'sched.warmup_epochs=0',
        'data.input_height=64', 'data.input_width=128', 'hardware.device=cpu', 'train.step=eager']


def test_the_command(tmp_path):
    "A detector goes in, the same one with a second look comes out; another takes the look as it is and fits its share."
    trained(tmp_path)
    def make(**more): train_reranking.main(weights=str(tmp_path/'net.safetensors'), config='configs/reranking.yaml', set=LESS, **more)
    make(out=str(tmp_path/'one.safetensors'))
    make(out=str(tmp_path/'two.safetensors'), pairs_from=str(tmp_path/'one.safetensors'))
    before, one, two = (load_model(tmp_path/f'{name}.safetensors') for name in ('net', 'one', 'two'))
    assert one.config['model']['reranking'] and one.pair_net.shares[1] != 0
    for name, value in before.state_dict().items(): assert torch.equal(value, one.state_dict()[name])
    for name, value in one.pair_net.state_dict().items():
        if name not in ('shares', 'worth', 'usual'): assert torch.equal(value, two.pair_net.state_dict()[name]), name


def test_what_was_learnt_is_kept_where_a_fit_fails(tmp_path, monkeypatch):
    "The file holds it, and fitting goes on from there."
    trained(tmp_path)
    def make(out, **more): train_reranking.main(weights=str(tmp_path/'net.safetensors'), config='configs/reranking.yaml', out=str(tmp_path/out), set=LESS, **more)
    make('whole.safetensors')
    with monkeypatch.context() as broken:
        broken.setattr(train_reranking, 'fit_trust', None)
        with pytest.raises(TypeError): make('kept.safetensors')
    make('mended.safetensors', pairs_from=str(tmp_path/'kept.safetensors'))
    whole, kept, mended = (load_model(tmp_path/f'{name}.safetensors').state_dict() for name in ('whole', 'kept', 'mended'))
    fitted = {f'pair_net.{name}' for name in ('shares', 'doubt', 'laid', 'trust', 'worth', 'usual')}
    for name, value in whole.items():
        if name not in fitted: assert torch.equal(value, kept[name]) and torch.equal(value, mended[name]), name
    assert kept['pair_net.shares'].tolist() == [1, 0] and mended['pair_net.shares'][1] != 0


def test_of_ones_own_pictures_only_the_trust_is_fitted(tmp_path, monkeypatch, caplog):
    "On the training captchas, each once; what was fitted before stays, and where nothing can be fitted everything does."
    trained(tmp_path, registration=True, reranking=True)
    path, told = tmp_path/'net.safetensors', [4*LEAST, LEAST - 1]   # how many moved far
    model = load_model(path)
    for name, value in dict(doubt=.5, laid=-1., worth=.3, trust=2., shares=1.).items(): getattr(model.pair_net, name).fill_(value)
    save_weights(model, path, **model.facts)
    def seen(model, loader):
        assert [index for batch in loader for index in batch['index'].tolist()] == list(range(6))
        answers_again(model, loader)   # what it does to what was fitted
        right = torch.arange(told[0]) % 3 > 0                          # registration is, and the first sign says so
        errors = torch.stack([right, ~right], 1).double()
        either = torch.stack([errors, errors, 0*errors, 0*errors], 2)[..., None].expand(-1, -1, -1, 2)
        return dict(far=torch.ones(told.pop(0)), right=torch.ones(len(right), 2), evidence=F.pad(right.double()[:, None]*2 - 1, (0, 3)), either=either)
    monkeypatch.setattr(train_reranking, 'answers_again', seen)
    for out in ('fitted', 'kept'): train_reranking.main(weights=str(path), config='configs/reranking.yaml', out=str(tmp_path/f'{out}.safetensors'), trust_only=True, set=LESS)
    before, fitted, kept = (load_model(tmp_path/f'{name}.safetensors').state_dict() for name in ('net', 'fitted', 'kept'))
    assert [name for name in before if not torch.equal(before[name], fitted[name])] == ['pair_net.trust'] and fitted['pair_net.trust'][0] > .5
    assert all(torch.equal(before[name], kept[name]) for name in before) and 'nothing was fitted' in caplog.text
