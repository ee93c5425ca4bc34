"""What the loss notebook can't hold: every formula against a slow twin, extreme maps, padding, batches."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from captcha_hrnet.config import Config
from captcha_hrnet.geometry import HeatmapCodec
from captcha_hrnet.loss import OFFSET_BETA_CELLS, CaptchaLoss, angle_loss, focal_loss, margin_loss, neighbourhood, offset_loss

torch.set_num_threads(1)
CODEC, STRIDE = HeatmapCodec(), 4
MAPS = dict(gap_heatmap=1, slider_heatmap=1, offsets=4, angle=2)   # channels
seeds = st.integers(0, 2**32 - 1)
exponents = st.sampled_from([0., .5, 1., 2., 3.7])
sizes = st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(2, 8))   # pictures, rows, columns


def world(seed, size, spread=4.):
    "Random maps and labels of small pictures: `outputs` and `batch` as the loss takes them. Points lie anywhere, borders included."
    generator = torch.Generator().manual_seed(seed)
    count, rows, columns = size
    extent = torch.tensor([columns*STRIDE, rows*STRIDE], dtype=torch.float)
    def points(*shape):
        places = torch.rand(*shape, 2, generator=generator)*1.2 - .1
        return places.clamp(0, 1)*extent
    outputs = {name: spread*torch.randn(count, channels, rows, columns, generator=generator) for name, channels in MAPS.items()}
    valid = torch.rand(count, 1, rows, columns, generator=generator) < .8
    batch = dict(gap_coords=points(count), slider_coords=points(count), decoys=points(count, 3),
                 decoy_mask=torch.rand(count, 3, generator=generator) < .6, gap_angle=360*torch.rand(count, generator=generator) - 180)
    return outputs | dict(valid=valid), batch


@given(seeds, sizes, st.lists(st.sampled_from(['gap_coords', 'slider_coords']), unique=True, min_size=1))
@settings(deadline=None)
def test_what_is_not_there_has_silence_for_a_target(seed, size, absent):
    "Only its own heat map learns anything, at every cell, and as if no cell were the true one; the loss does not know of the point."
    outputs, batch = world(seed, size)
    present = torch.tensor([[name not in absent for name in ('gap_coords', 'slider_coords')]]*size[0])
    nothing = batch | {name: torch.full_like(batch[name], math.nan) for name in absent} | dict(present=present)
    maps = {name: value.clone().requires_grad_() for name, value in outputs.items() if name != 'valid'}
    parts = CaptchaLoss(Config().loss)(maps | dict(valid=outputs['valid']), nothing)
    parts['loss'].backward()
    assert all(value.isfinite() for value in parts.values()) and all(value.grad is None or value.grad.isfinite().all() for value in maps.values())
    for number, name in enumerate(('gap', 'slider')):
        if f'{name}_coords' not in absent: continue
        silent = slow_focal(outputs[f'{name}_heatmap'], torch.zeros_like(outputs['gap_heatmap']), outputs['valid'], 2., 4.)
        assert parts[f'{name}_focal'].item() == pytest.approx(silent, rel=1e-4)
        assert (maps['offsets'].grad[:, 2*number:2*number + 2] == 0).all()


def log_sigmoid(z): return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def cell_of(point, rows, columns):
    return min(int(point[0]//STRIDE), columns - 1), min(int(point[1]//STRIDE), rows - 1)


def slow_heat(point, rows, columns, sigma):
    heat = [[math.exp(-((column + .5 - point[0]/STRIDE)**2 + (row + .5 - point[1]/STRIDE)**2) / (2*sigma**2))
             for column in range(columns)] for row in range(rows)]
    column, row = cell_of(point, rows, columns)
    heat[row][column] = 1.
    return heat


def slow_focal(logits, heat, valid, alpha, beta):
    total, (count, _, rows, columns) = 0., logits.shape
    for b in range(count):
        for row in range(rows):
            for column in range(columns):
                if not valid[b, 0, row, column]: continue
                z, y = logits[b, 0, row, column].item(), heat[b, 0, row, column].item()
                p = math.exp(log_sigmoid(z))
                if y == 1: total -= (1 - p)**alpha * log_sigmoid(z)
                else: total -= (1 - y)**beta * p**alpha * log_sigmoid(-z)
    return total / count


def smooth_l1(error):
    error = abs(error)
    return error - OFFSET_BETA_CELLS/2 if error > OFFSET_BETA_CELLS else error**2 / (2*OFFSET_BETA_CELLS)


def slow_offset(offsets, points, heat, valid, radius):
    total, (count, _, rows, columns) = 0., offsets.shape
    for b in range(count):
        x, y = points[b].tolist()
        column, row = cell_of((x, y), rows, columns)
        weighted = weights = 0.
        for c in range(column - radius, column + radius + 1):
            for r in range(row - radius, row + radius + 1):
                if not (0 <= c < columns and 0 <= r < rows and valid[b, 0, r, c]): continue
                dx, dy = offsets[b, :, r, c].tolist()
                error = (smooth_l1(dx - (x/STRIDE - c - .5)) + smooth_l1(dy - (y/STRIDE - r - .5))) / 2
                weighted += heat[b, 0, r, c].item()*error
                weights += heat[b, 0, r, c].item()
        if weights: total += weighted / weights
    return total / count


def slow_margin(logits, heat, valid, cell, rivals, mask, margin):
    total, count = 0., len(logits)
    for b in range(count):
        column, row = cell[b].tolist()
        asked, hinges = 0, 0.
        for k in range(rivals.shape[1]):
            if not mask[b, k]: continue
            asked += 1
            c, r = rivals[b, k].tolist()
            if not (valid[b, 0, r, c] and valid[b, 0, row, column]): continue
            above = margin + logits[b, 0, r, c].item() - logits[b, 0, row, column].item()
            hinges += max(0., above)*(1 - heat[b, 0, r, c].item())
        if asked: total += hinges / asked
    return total / count


def slow_angle(angles, degrees, valid, cell):
    total = 0.
    for b in range(len(angles)):
        column, row = cell[b].tolist()
        sine, cosine = angles[b, :, row, column].tolist()
        if valid[b, 0, row, column]: total += 1 - math.cos(math.atan2(sine, cosine) - math.radians(degrees[b].item()))
    return total / len(angles)


def close(fast, slow): assert fast.item() == pytest.approx(slow, rel=2e-5, abs=2e-5)


@settings(max_examples=40, deadline=None)
@given(seeds, sizes, exponents, exponents, st.sampled_from([.5, 1., 3.]))
def test_focal_equals_its_twin(seed, size, alpha, beta, sigma):
    outputs, batch = world(seed, size)
    heat, _, _ = CODEC.encode(batch['gap_coords'], size[1:], sigma)
    for b, point in enumerate(batch['gap_coords'].tolist()):
        torch.testing.assert_close(heat[b, 0], torch.tensor(slow_heat(point, *size[1:], sigma)), atol=1e-5, rtol=1e-4)
    close(focal_loss(outputs['gap_heatmap'], heat, outputs['valid'], alpha, beta), slow_focal(outputs['gap_heatmap'], heat, outputs['valid'], alpha, beta))


@settings(max_examples=40, deadline=None)
@given(seeds, sizes, st.integers(0, 3), st.sampled_from([.05, .3, 4.]))
def test_offset_equals_its_twin(seed, size, radius, spread):
    outputs, batch = world(seed, size, spread)
    points, offsets = batch['gap_coords'], outputs['offsets'][:, :2]
    heat, _, _ = CODEC.encode(points, size[1:], 1.)
    close(offset_loss(offsets, points, heat, outputs['valid'], CODEC, radius), slow_offset(offsets, points, heat, outputs['valid'], radius))


@settings(max_examples=40, deadline=None)
@given(seeds, sizes, st.sampled_from([0., 1., 5.]))
def test_margin_and_angle_equal_their_twins(seed, size, margin):
    outputs, batch = world(seed, size)
    heat, cell, _ = CODEC.encode(batch['gap_coords'], size[1:], 1.)
    rivals, _ = CODEC.cells(batch['decoys'], size[1:])
    arguments = outputs['gap_heatmap'], heat, outputs['valid'], cell, rivals, batch['decoy_mask'], margin
    close(margin_loss(*arguments), slow_margin(*arguments))
    arguments = outputs['angle'], batch['gap_angle'], outputs['valid'], cell
    close(angle_loss(*arguments), slow_angle(*arguments))


@settings(max_examples=30, deadline=None)
@given(seeds, sizes)
def test_the_whole_equals_its_twin(seed, size):
    config = Config(loss=dict(sigma_cells=1.3, offset_weight=2.5, margin_weight=.7, angle_weight=.3, offset_radius_cells=2, margin=2.)).loss
    outputs, batch = world(seed, size)
    valid, cells, heats = outputs['valid'], {}, {}
    for name in ('gap', 'slider'):
        heats[name], cells[name], _ = CODEC.encode(batch[f'{name}_coords'], size[1:], 1.3)
    decoys, exists = CODEC.cells(batch['decoys'], size[1:])[0], torch.ones(size[0], 1, dtype=torch.bool)
    slow = {f'{n}_focal': slow_focal(outputs[f'{n}_heatmap'], heats[n], valid, 2, 4) for n in heats}
    slow['offset'] = sum(slow_offset(outputs['offsets'][:, i:i+2], batch[f'{n}_coords'], heats[n], valid, 2) for n, i in (('gap', 0), ('slider', 2))) / 2
    slow['margin'] = sum(slow_margin(outputs[f'{n}_heatmap'], heats[n], valid, cells[n], torch.cat([cells[other][:, None], decoys], 1),
                                     torch.cat([exists, batch['decoy_mask']], 1), 2.) for n, other in (('gap', 'slider'), ('slider', 'gap'))) / 2
    slow['angle'] = slow_angle(outputs['angle'], batch['gap_angle'], valid, cells['gap'])
    slow['loss'] = slow['gap_focal'] + slow['slider_focal'] + 2.5*slow['offset'] + .7*slow['margin'] + .3*slow['angle']
    parts = CaptchaLoss(config)(outputs, batch)
    assert parts.keys() == slow.keys()
    for name, value in slow.items(): close(parts[name], value)


def test_without_an_angle_head_there_is_no_angle_part():
    outputs, batch = world(0, (2, 4, 4))
    del outputs['angle']
    assert set(CaptchaLoss(Config().loss)(outputs, batch)) == {'loss', 'gap_focal', 'slider_focal', 'offset', 'margin'}


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize('alpha', [0., .5, 1., 2.])
def test_finite_for_any_finite_input(dtype, alpha):
    largest = torch.finfo(dtype).max
    loss, (count, rows, columns) = CaptchaLoss(Config(loss=dict(focal_alpha=alpha, margin=1e4)).loss), (2, 16, 32)
    values = torch.tensor([0., 1e-7, 20., 89., 1e4, 6e4, largest], dtype=torch.float64).clamp(max=largest)
    values = torch.cat([values, -values])
    maps = [(values[i].expand if i < len(values) else values[torch.randint(len(values), (count*4*rows*columns,), generator=torch.Generator().manual_seed(i))].view)
            (count, 4, rows, columns) for i in range(len(values) + 3)]   # each value everywhere, then all of them mixed
    _, batch = world(1, (count, rows, columns))
    for value in maps:
        outputs = {name: value[:, :channels].to(dtype).clone().requires_grad_() for name, channels in MAPS.items()}
        with torch.autocast('cpu', torch.bfloat16): parts = loss(outputs | dict(valid=torch.ones(count, 1, rows, columns, dtype=torch.bool)), batch)
        assert all(part.dtype == torch.float32 and part.isfinite() for part in parts.values())
        parts['loss'].backward()
        assert all(output.grad.isfinite().all() for output in outputs.values())


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 3), st.booleans())
def test_padding_has_no_gradient_and_no_say(seed, radius, at_the_border):
    rows, columns, left, top, right, bottom = 8, 10, 2, 1, 8, 7   # cells of the picture: 2 … 7, 1 … 6
    outputs, batch = world(seed, (2, rows, columns))
    outputs['valid'] = torch.zeros(2, 1, rows, columns, dtype=torch.bool)
    outputs['valid'][:, :, top:bottom, left:right] = True
    low, high = torch.tensor([left, top])*STRIDE, torch.tensor([right, bottom])*STRIDE
    for name in ('gap_coords', 'slider_coords', 'decoys'):
        share = batch[name] / torch.tensor([columns, rows]) / STRIDE
        batch[name] = low + (share.round() if at_the_border else share)*(high - low)   # a border point may fall into a cell of padding
    loss = CaptchaLoss(Config(loss=dict(offset_radius_cells=radius)).loss)
    for name in MAPS: outputs[name].requires_grad_()
    value = loss(outputs, batch)['loss']
    value.backward()
    padding = ~outputs['valid']
    for name, channels in MAPS.items(): assert (outputs[name].grad[padding.expand(-1, channels, -1, -1)] == 0).all()
    other = {name: outputs[name].detach() + 100*padding for name in MAPS} | dict(valid=outputs['valid'])
    torch.testing.assert_close(loss(other, batch)['loss'], value.detach())


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 4))
def test_a_batch_is_the_mean_of_its_pictures(seed, count):
    outputs, batch = world(seed, (count, 6, 8))
    loss = CaptchaLoss(Config().loss)
    one = lambda values, b: {name: value[b:b+1] for name, value in values.items()}
    singles = [loss(one(outputs, b), one(batch, b)) for b in range(count)]
    for name, value in loss(outputs, batch).items():
        torch.testing.assert_close(value, torch.stack([single[name] for single in singles]).mean(), rtol=1e-5, atol=1e-5)


def test_decoys_that_do_not_exist_have_no_say():
    outputs, batch = world(5, (2, 6, 8))
    batch['decoy_mask'][:] = False
    moved = batch | dict(decoys=torch.full_like(batch['decoys'], 3.))
    loss = CaptchaLoss(Config().loss)
    assert loss(outputs, batch)['loss'] == loss(outputs, moved)['loss']
    none = batch | dict(decoys=torch.zeros(2, 0, 2), decoy_mask=torch.zeros(2, 0, dtype=torch.bool))
    assert loss(outputs, batch)['loss'] == loss(outputs, none)['loss']


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), st.data())
def test_neighbourhood_is_the_square_inside_the_grid(rows, columns, radius, data):
    column, row = data.draw(st.integers(0, columns - 1)), data.draw(st.integers(0, rows - 1))
    cells, inside = neighbourhood(torch.tensor([[column, row]]), (rows, columns), radius)
    expected = {(c, r) for c in range(columns) for r in range(rows) if abs(c - column) <= radius and abs(r - row) <= radius}
    assert sorted(map(tuple, cells[inside].tolist())) == sorted(expected)
    assert inside.shape == (1, (2*radius + 1)**2)
