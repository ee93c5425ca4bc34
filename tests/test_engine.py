"""What the engine notebook can't hold: slow twins of schedule, step and average, damaged files, resuming anywhere, two processes."""
import copy
import io
import itertools
import logging
import math
import os
import pickle
import random
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from torch import nn

from captcha_hrnet.augment import augmented
from captcha_hrnet.config import Config, UserError
from captcha_hrnet.engine import (CheckpointError, Meter, NonFiniteError, TrainingEngine, learning_rate, load_checkpoint, log, make_ema,
                                  newest_checkpoint, parameter_groups, random_state, save_checkpoint, set_random_state, windows)
from captcha_hrnet.geometry import Letterbox
from captcha_hrnet.graphs import GraphedEngine, make_engine
from captcha_hrnet.loss import CaptchaLoss
from captcha_hrnet.model import create_lite_hrnet_18_fpn
from toys import HEIGHT, WIDTH, Loader, Toy, batch_of, joined

torch.set_num_threads(1)


def engine_of(norm=False, seed=0, kind=TrainingEngine, **sections):
    sections = {'train': {}, 'optimizer': {}} | sections
    sections['train'] = dict(num_workers=0, amp='off', log_every=1, max_nonfinite_steps=3) | sections['train']
    sections['optimizer'] = dict(lr=1e-2, eps=1e-3, ema_decay=.9) | sections['optimizer']
    sections['sched'] = dict(epochs=3, warmup_epochs=.5) | sections.get('sched', {})
    torch.manual_seed(seed)
    return kind(Toy(norm), Config(**sections), 'cpu')


def same(a, b) -> bool:
    "Equal to the last bit, whatever they are made of."
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def learnt(engine): return {key: value for key, value in engine.state_dict().items() if key not in ('random', 'config')}


@pytest.fixture
def messages():
    "What the library logs."
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    log.addHandler(handler)
    yield found
    log.removeHandler(handler)


@pytest.mark.parametrize('before, after', [(TrainingEngine, GraphedEngine), (GraphedEngine, TrainingEngine)])
def test_a_run_goes_on_with_another_kind_of_step(before, after, tmp_path):
    batches = [batch_of(4, seed) for seed in range(4)]
    first, straight = (engine_of(norm=True, kind=before, train=dict(batch_size=4)) for _ in range(2))
    first.train_epoch(Loader(batches), 0)
    save_checkpoint(tmp_path/'last.pth', first.state_dict())
    second = engine_of(norm=True, kind=after, seed=1, train=dict(batch_size=4))
    second.load_state_dict(load_checkpoint(tmp_path/'last.pth'))
    for epoch in range(2): expected = straight.train_epoch(Loader(batches), epoch)
    found = second.train_epoch(Loader(batches), 1)
    for name in ('loss', 'gap_mae', 'grad_norm', 'lr'): assert found[name] == pytest.approx(expected[name], rel=1e-4)
    for name, value in straight.ema.module.state_dict().items(): torch.testing.assert_close(second.ema.module.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_compiling_ahead_leaves_no_trace(monkeypatch):
    "The step that only notes its kernels writes whatever it likes into gradients and running statistics."
    calls = []
    def compile_ahead(work): calls.append(work()); return 7
    monkeypatch.setitem(sys.modules, 'captcha_hrnet.kernels', SimpleNamespace(compile_ahead=compile_ahead))
    batches = [batch_of(4, seed) for seed in range(4)]
    plain, ahead = (engine_of(norm=True, kind=GraphedEngine, train=dict(batch_size=4, accumulate=2)) for _ in range(2))
    ahead.compiled = False
    for engine in (plain, ahead): engine.train_epoch(Loader(batches), 0)
    assert same(learnt(ahead), learnt(plain)) and len(calls) == 1


@pytest.mark.parametrize('kind', [TrainingEngine, GraphedEngine])
def test_an_engine_trains_on_what_augmenting_gives(kind):
    "Step by step and batch by batch otherwise, and the same again."
    augment = dict(flip=.5, scale=(.6, .9), color=.5, views=2)
    batches = [batch_of(4, seed) for seed in range(4)]
    seen, engine = [], engine_of(norm=True, kind=kind, augment=augment, train=dict(batch_size=4, accumulate=2))
    engine.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    first = engine.train_epoch(Loader(batches), 0)
    assert [len(image) for image in seen] == [8]*4 and all(torch.equal(image[::2], batch['image']) for image, batch in zip(seen, batches))
    wanted = [augmented(batch, engine.config.augment, (0, i // 2, i % 2, 0))['image'] for i, batch in enumerate(batches)]
    assert all(torch.equal(image, other) for image, other in zip(seen, wanted))
    again = engine_of(norm=True, kind=kind, augment=augment, train=dict(batch_size=4, accumulate=2))
    assert again.train_epoch(Loader(batches), 0)['loss'] == first['loss'] and same(learnt(again), learnt(engine))


@pytest.mark.parametrize('step', ['graphs', 'kernels'])
def test_fast_steps_need_a_gpu(step):
    with pytest.raises(UserError, match=f"train.step: value '{step}': needs a CUDA GPU; 'eager' runs anywhere"): make_engine(Toy(False), Config(train=dict(step=step)), 'cpu')


# the learning rate

def torch_rates(sched, per_epoch, peak, steps):
    "The cosine by PyTorch's own schedulers, from the end of the warm-up on."
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    length = (sched.epochs - sched.warmup_epochs)*per_epoch
    if sched.name == 'cosine': scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(length), sched.cosine_min_lr)
    else: scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, sched.restart_epochs*per_epoch, sched.restart_mult, sched.cosine_min_lr)
    for _ in range(steps):
        yield optimizer.param_groups[0]['lr']
        optimizer.step()
        scheduler.step()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(['cosine', 'cosine_warm_restarts']), st.integers(1, 40), st.integers(0, 4), st.integers(1, 12), st.integers(1, 5), st.integers(1, 3))
def test_rate_equals_its_twins(name, per_epoch, warmup, more, restart_epochs, restart_mult):
    sched = Config(sched=dict(name=name, epochs=warmup + more, warmup_epochs=float(warmup), restart_epochs=restart_epochs, restart_mult=restart_mult,
                              cosine_min_lr=1e-5)).sched
    warm, total = warmup*per_epoch, (warmup + more)*per_epoch
    rates = [learning_rate(step, per_epoch, sched, 1e-3) for step in range(total)]
    assert rates[:warm] == pytest.approx([1e-3*(step + 1)/(warm + 1) for step in range(warm)])
    assert rates[warm:] == pytest.approx(list(torch_rates(sched, per_epoch, 1e-3, total - warm)), abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.floats(0, 3), st.integers(4, 12), st.sampled_from([0., 1e-5, 1.]))
def test_rate_is_continuous_and_bounded(per_epoch, warmup, epochs, floor):
    sched = Config(sched=dict(epochs=epochs, warmup_epochs=warmup, cosine_min_lr=floor), optimizer=dict(lr=1.)).sched
    rates = [learning_rate(step, per_epoch, sched, 1.) for step in range((epochs + 1)*per_epoch)]
    steepest = max(1/(warmup*per_epoch + 1), math.pi/2/((epochs - warmup)*per_epoch))
    assert all(abs(a - b) <= steepest + 1e-9 for a, b in itertools.pairwise(rates))
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[0] > 0 and rates[epochs*per_epoch:] == pytest.approx([floor]*per_epoch)


# the step

def train_slowly(config, batches, per_epoch):
    "The training of big batches, as one would write it first; the average by hand."
    torch.manual_seed(0)
    model, loss = Toy(norm=False), CaptchaLoss(config.loss)
    optimizer = torch.optim.AdamW([dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=config.optimizer.weight_decay),
                                   dict(params=[p for p in model.parameters() if p.ndim == 1], weight_decay=0.)],
                                  betas=config.optimizer.betas, eps=config.optimizer.eps, fused=False, foreach=False)
    average = None
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss(model(batch['image']), batch)['loss'].backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad_norm)
        for group in optimizer.param_groups: group['lr'] = learning_rate(step, per_epoch, config.sched, config.optimizer.lr)
        optimizer.step()
        now = [p.detach().clone() for p in model.parameters()]
        decay = min(config.optimizer.ema_decay, (1 + step)/(10 + step))
        average = now if average is None else [decay*a + (1 - decay)*b for a, b in zip(average, now)]
    return model, average


@pytest.mark.parametrize('sizes', [[4]*5, [4]*6, [3, 5, 1, 2, 6], [7]], ids=str)
@pytest.mark.parametrize('accumulate', [1, 2, 3])
def test_accumulation_is_the_big_batch(sizes, accumulate):
    batches = [batch_of(size, seed) for seed, size in enumerate(sizes)]
    big = [joined(window) for window in windows(batches, accumulate)]
    engine = engine_of(train=dict(accumulate=accumulate))
    for epoch in range(2): engine.train_epoch(Loader(batches), epoch)
    model, average = train_slowly(engine.config, big*2, len(big))
    assert engine.step == 2*len(big)
    for ours, theirs in zip(engine.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(engine.ema.module.parameters(), average): torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_average_follows_weights_and_buffers():
    engine, slow = engine_of(norm=True), None
    def follow(step, _):
        nonlocal slow
        now, decay = copy.deepcopy(engine.model.state_dict()), min(.9, step/(step + 9))   # step - 1 averages were made before
        if slow is None: slow = now
        else: slow = {name: decay*slow[name] + (1 - decay)*value if value.is_floating_point() else value for name, value in now.items()}
    engine.on_log = follow
    for epoch in range(3): engine.train_epoch(Loader([batch_of(4, seed) for seed in range(7)]), epoch)
    found = engine.ema.module.state_dict()
    assert found['body.1.num_batches_tracked'] == 21 and found.keys() == slow.keys()
    for name, value in slow.items(): torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    assert not engine.ema.module.training and not torch.equal(found['body.1.running_mean'], engine.model.state_dict()['body.1.running_mean'])


def test_frozen_batchnorm_counter_and_bf16_weights_are_averaged_too():
    net = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.BatchNorm1d(2))
    ema = make_ema(net, .5)
    for value in (1., 3., 5.):
        nn.init.constant_(net[0].weight, value)
        net[1].num_batches_tracked.fill_(int(value))
        ema.update_parameters(net)
    assert ema.module[1].num_batches_tracked == 5
    torch.testing.assert_close(ema.module[0].weight, torch.full((2, 2), (1*2/11 + 3*9/11)*.25 + 5*.75).bfloat16(), atol=.05, rtol=0)


@pytest.mark.parametrize('name', ['naive_lite_hrnet_18', 'rep_hrnet_18'])
def test_activation_checkpointing_changes_no_bit(name):
    "Weights, averages, statistics and the dropping of a bad step; with accumulation."
    def trained(checkpointing):
        config = Config(model=dict(name=name, neck_channels=8, head_channels=8), hardware=dict(device='cpu'),
                        train=dict(amp='off', activation_checkpointing=checkpointing), optimizer=dict(lr=1e-2))
        torch.manual_seed(0)
        engine = TrainingEngine(create_lite_hrnet_18_fpn(config.model), config, 'cpu')
        engine.model.train()
        for seed in range(3): engine._train_window([batch_of(2, seed), poisoned(batch_of(2, 9), 'nan label') if seed == 1 else batch_of(2, seed + 10)])
        return engine
    one, two = trained(False), trained(True)
    assert (one.step, one.dropped) == (two.step, two.dropped) == (2, 1)
    for a, b in ((one.model, two.model), (one.ema.module, two.ema.module)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_optimizer_groups_of_the_real_network():
    model = create_lite_hrnet_18_fpn({'name': 'naive_lite_hrnet_18', 'neck_channels': 16, 'head_channels': 16})
    decay, keep = parameter_groups(model, .03)
    assert (decay['weight_decay'], keep['weight_decay']) == (.03, 0.)
    norms = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    biases = {p for name, p in model.named_parameters() if name.endswith('bias')}
    assert norms | biases <= set(keep['params'])
    assert len(decay['params']) + len(keep['params']) == len(list(model.parameters())) == len({*decay['params'], *keep['params']})
    for p in model.backbone.parameters(): p.requires_grad_(False)
    assert not {p for group in parameter_groups(model, .03) for p in group['params']} & set(model.backbone.parameters())


def test_settings_reach_the_optimizer():
    engine = engine_of(optimizer=dict(betas=(.8, .95), eps=1e-5, weight_decay=.2))
    assert [(g['betas'], g['eps'], g['weight_decay']) for g in engine.optimizer.param_groups] == [((.8, .95), 1e-5, .2), ((.8, .95), 1e-5, 0.)]


def test_clipping():
    batch, norms = batch_of(4), {}
    for limit in (0., .5):
        engine = engine_of(optimizer=dict(clip_grad_norm=limit))
        norms[limit] = engine.train_epoch(Loader([batch]), 0)['grad_norm']
        found = torch.cat([p.grad.flatten() for p in engine.model.parameters()]).norm().item()
        assert found == pytest.approx(limit or norms[0.], rel=1e-3)
    assert norms[0.] == pytest.approx(norms[.5]) and norms[0.] > 1   # what is reported is the norm before


# steps that are dropped

def poisoned(batch, kind):
    if kind == 'nan label': return batch | dict(gap_coords=batch['gap_coords']*math.nan)
    return batch | dict(poison=torch.ones(1))


def spoil_gradients(engine):
    "Batches marked with `poison` give a finite loss and an infinite gradient."
    forward = engine._batch
    def spoilt(batch, share, last):
        parts = forward(batch, share, last)
        if 'poison' in batch: engine.model.head.bias.grad[2] = math.inf
        return parts
    engine._batch = spoilt


@pytest.mark.parametrize('kind', ['nan label', 'infinite gradient'])
@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('engine', [TrainingEngine, GraphedEngine])
def test_a_dropped_step_leaves_no_trace(kind, accumulate, engine, messages):
    good = [batch_of(4, seed, first=10*seed) for seed in range(6)]
    clean, hit = (engine_of(norm=True, kind=engine, train=dict(accumulate=accumulate, batch_size=4)) for _ in range(2))
    spoil_gradients(hit)
    clean.train_epoch(Loader(good), 0)
    bad = [poisoned(batch_of(4, 99, first=990), kind), batch_of(4, 98, first=980)][:accumulate]
    for kwargs in (dict(), dict()):   # before, between and after the good ones
        before = copy.deepcopy(learnt(hit))
        hit.steps_per_epoch = clean.steps_per_epoch
        hit._train_window(bad)
        after = learnt(hit)
        assert after['dropped'] == before['dropped'] + 1
        assert same(before | dict(dropped=0, scheduler_state_dict=0), after | dict(dropped=0, scheduler_state_dict=0))
        if not hit.step:
            hit.model.train()
            for window in windows(good, accumulate): hit._train_window(window)
    for key in ('model_state_dict', 'ema_state_dict', 'optimizer_state_dict', 'step', 'ema_steps', 'meter'): assert same(learnt(clean)[key], learnt(hit)[key])
    assert len(messages) == 2 and all('not finite' in message and '990, 991, 992, 993' in message for message in messages)


def test_too_many_dropped_steps_in_a_row_end_the_run():
    engine, good, bad = engine_of(), batch_of(4), poisoned(batch_of(4), 'nan label')   # the limit is 3
    result = engine.train_epoch(Loader([bad, bad, bad, good, bad, bad, bad, good]), 0)
    assert (result['dropped'], engine.step, result['stopped']) == (6, 2, False)
    before = copy.deepcopy(engine.model.state_dict())
    with pytest.raises(NonFiniteError, match='4 steps in a row.*optimizer.lr'): engine.train_epoch(Loader([bad]*5), 1)
    assert engine.dropped == 10 and engine.epoch_step == 3 and same(before, engine.model.state_dict())


def test_an_epoch_of_nothing_but_dropped_steps_reports_no_loss():
    result = engine_of().train_epoch(Loader([poisoned(batch_of(4), 'nan label')]*2), 0)
    assert 'loss' not in result and result['dropped'] == 2 and all(math.isfinite(v) for v in result.values())


# numerics

@pytest.mark.parametrize('amp', ['off', 'bf16', 'fp16'])
def test_every_precision_learns(amp):
    engine = engine_of(norm=True, train=dict(amp=amp, max_nonfinite_steps=20), optimizer=dict(lr=3e-2), sched=dict(epochs=30, warmup_epochs=1.))
    assert engine.scaler.is_enabled() == (amp == 'fp16')
    seen = []
    engine.model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    losses = [engine.train_epoch(Loader([batch_of(4)]*8), epoch)['loss'] for epoch in range(6)]   # fp16 drops a few while it looks for a scale
    assert losses[-1] < .5*losses[0]
    assert set(seen) == {dict(off=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[amp]}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in engine.model.state_dict().values() if p.is_floating_point())


def test_the_search_for_a_scale_does_not_count_towards_the_limit(messages):
    "Gradients that overflow at any scale do, once the scale is below 1."
    engine = engine_of(train=dict(amp='fp16', max_nonfinite_steps=2))
    spoil_gradients(engine)
    before, scale = copy.deepcopy(learnt(engine)), engine.scaler.get_scale()
    bad = [poisoned(batch_of(4), 'infinite gradient')]
    for count in range(1, 5):
        engine._train_window(bad)
        assert engine.scaler.get_scale() == scale/2**count and same(before['model_state_dict'], engine.model.state_dict())
        assert (engine.dropped, engine.dropped_in_a_row) == (count, 0)
    while not engine.step: engine._train_window([batch_of(4)])   # the first scales are too large for any gradient
    assert not same(before['model_state_dict'], engine.model.state_dict()) and 4 <= engine.dropped < 15
    halvings = int(math.log2(engine.scaler.get_scale()))
    with pytest.raises(NonFiniteError):
        for _ in range(30): engine._train_window(bad)
    assert engine.dropped_in_a_row == 3 and engine.scaler.get_scale() == 2**-3 and halvings < 30


def test_a_loss_that_is_not_finite_counts_in_half_precision_too():
    engine = engine_of(train=dict(amp='fp16', max_nonfinite_steps=2))
    forward = engine._batch
    engine._batch = lambda batch, share, last: forward(batch, share, last) | dict(loss=torch.tensor(math.nan))   # and fine gradients
    engine.scaler.load_state_dict(engine.scaler.state_dict() | dict(scale=8.))
    with pytest.raises(NonFiniteError, match='3 steps in a row'):
        for _ in range(5): engine._train_window([batch_of(4)])


def test_errors_are_in_original_pixels():
    "The picture was enlarged by 2, so an error of 4 input px is 2 px."
    engine, batch = engine_of(), batch_of(4)
    engine.model.decode_predictions = lambda outputs: {f'{name}_coords': batch[f'{name}_coords'] + 4 for name in ('gap', 'slider')}
    batch['letterbox'] = torch.tensor(Letterbox(WIDTH//2, HEIGHT//2, WIDTH, HEIGHT).params).expand(4, -1)
    result = engine.train_epoch(Loader([batch]), 0)
    assert (result['gap_mae'], result['slider_mae']) == pytest.approx((2., 2.))


# loaders and epochs

def test_any_loader_and_a_repeated_epoch():
    samples = [{name: value[0] for name, value in batch_of(1, seed, first=seed).items()} for seed in range(10)]
    loader = torch.utils.data.DataLoader(samples, batch_size=4)   # its last batch is smaller
    engine = engine_of(train=dict(accumulate=2))
    first, again = engine.train_epoch(loader, 0), engine.train_epoch(loader, 0)
    assert engine.step == 4 and again['loss'] < first['loss'] and not again['stopped']


def test_meter_keeps_small_things_beside_large_ones():
    meter = Meter()
    for value in [1e8] + [1.]*1000: meter.add(dict(loss=torch.tensor(value, dtype=torch.float32)))
    assert meter.means()['loss'] == pytest.approx((1e8 + 1000)/1001, rel=1e-12)


def test_a_batch_without_a_gap_has_no_error_of_it():
    "It is left out of the mean, and no 0; where no batch had one, the mean is NaN."
    engine, batches = engine_of(), [batch_of(1, seed, first=seed) for seed in range(3)]
    batches[1] |= dict(gap_coords=torch.full((1, 2), math.nan), present=torch.tensor([[False, True]]))
    parts = [engine._forward_backward(batch, 1.) for batch in batches]   # no step between them
    for p in parts: engine.meter.add(p)
    found = engine.meter.means()
    assert parts[1]['gap_mae'].isnan() and found['gap_mae'] == pytest.approx((parts[0]['gap_mae'] + parts[2]['gap_mae']).item()/2)
    assert found['slider_mae'] == pytest.approx(sum(p['slider_mae'].item() for p in parts)/3)
    engine.meter = Meter()
    engine.meter.add(parts[1])
    assert math.isnan(engine.meter.means()['gap_mae'])


# stopping and going on

@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('kind', [TrainingEngine, GraphedEngine])
def test_stopped_anywhere_and_resumed_is_not_stopped(accumulate, kind, tmp_path):
    batches = [batch_of(4, seed) for seed in range(5)]
    make = lambda: engine_of(norm=True, kind=kind, train=dict(accumulate=accumulate, batch_size=4))
    straight, per_epoch = make(), math.ceil(5/accumulate)
    results = [straight.train_epoch(Loader(batches), epoch) for epoch in range(2)]
    for stop_at in range(1, 2*per_epoch):
        engine = make()
        def stop(step, _, engine=engine, stop_at=stop_at): engine.stop_requested = step == stop_at
        engine.on_log = stop
        for epoch in range(2):
            if engine.train_epoch(Loader(batches), epoch)['stopped'] or engine.stop_requested: break
        save_checkpoint(tmp_path/'last.pth', engine.state_dict())
        resumed = make()
        with torch.no_grad():
            for p in resumed.model.parameters(): p.add_(1)
        resumed.load_state_dict(load_checkpoint(tmp_path/'last.pth'))
        start = resumed.epoch if resumed.epoch_step < 5 else resumed.epoch + 1
        for epoch in range(start, 2): result = resumed.train_epoch(Loader(batches), epoch)
        assert same(learnt(straight), learnt(resumed)), stop_at
        assert {name: result[name] for name in ('loss', 'gap_mae', 'grad_norm', 'lr')} == {name: results[1][name] for name in ('loss', 'gap_mae', 'grad_norm', 'lr')}


def test_changed_settings_count_after_resuming():
    old, new = engine_of(), engine_of(optimizer=dict(weight_decay=.5, betas=(.5, .6), eps=1e-4, lr=1e-4))
    old.train_epoch(Loader([batch_of(4)]), 0)
    new.load_state_dict(old.state_dict())
    assert [(g['weight_decay'], g['betas'], g['eps']) for g in new.optimizer.param_groups] == [(.5, (.5, .6), 1e-4), (0., (.5, .6), 1e-4)]
    assert new.train_epoch(Loader([batch_of(4)]), 1)['lr'] <= 1e-4
    assert new.optimizer.state_dict()['state'][0]['step'] == 2


def test_checkpoints_that_cannot_be_resumed_are_refused():
    engine = engine_of()
    engine.train_epoch(Loader([batch_of(4)]), 0)
    state = engine.state_dict()
    for key in state:
        for spoilt in ({k: v for k, v in state.items() if k != key}, state | {key: ['wrong']}, state | {key: {}}):
            if key == 'scaler_state_dict' and key in spoilt: continue   # no scaler, nothing to read
            with pytest.raises(CheckpointError): engine_of().load_state_dict(spoilt)
    other = TrainingEngine(Toy(False, width=7), engine.config, 'cpu')
    with pytest.raises(CheckpointError, match="another model's"): other.load_state_dict(state)


@pytest.mark.parametrize(('before', 'after', 'seen_again'), [(4, 2, 0), (2, 4, 0), (4, 3, 2)], ids=str)
def test_another_batch_size_skips_no_sample(before, after, seen_again, messages):
    "Stopped after two batches of 4 (or four of 2) of 24 samples, in the second of four epochs."
    make = lambda size: engine_of(train=dict(batch_size=size), sched=dict(epochs=4, warmup_epochs=.5))
    loader = lambda size: Loader([batch_of(size, seed) for seed in range(24//size)])
    old, new = make(before), make(after)
    old.on_log = lambda step, _: setattr(old, 'stop_requested', step == 24//before + 8//before)
    for epoch in range(2): old.train_epoch(loader(before), epoch)
    new.load_state_dict(old.state_dict())
    assert old.epoch_step*before == 8 and new.epoch_step*after == 8 - seen_again
    assert len(messages) == 1 and f'goes on at sample {8 - seen_again}, {seen_again} are seen again' in messages[0]
    rates = []
    new.on_log = lambda step, means: rates.append(means['lr'])
    new.train_epoch(loader(after), 1)
    assert rates[0] == pytest.approx(learning_rate(old.step*24//after/(24//before), 24//after, new.config.sched, 1e-2), rel=.02)
    assert new.step == pytest.approx(2*24/after, abs=1)


def test_random_states_go_through_a_file(tmp_path):
    import numpy as np
    draw = lambda: (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item())
    random.gauss(0, 1), np.random.randn()   # each leaves a second Gaussian waiting
    save_checkpoint(tmp_path/'x.pth', dict(model_state_dict={}, random=random_state()))
    first = draw()
    set_random_state(load_checkpoint(tmp_path/'x.pth')['random'])
    assert draw() == first


# files

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    engine = engine_of(norm=True)
    engine.train_epoch(Loader([batch_of(4)]), 0)
    path = tmp_path_factory.mktemp('saved')/'last.pth'
    save_checkpoint(path, engine.state_dict())
    return path


def test_torn_at_any_length(saved, tmp_path):
    whole, path = saved.read_bytes(), tmp_path/'last.pth'
    for length in sorted({*(len(whole)*tenth//10 for tenth in range(10)), 1, 4, len(whole) - 1, len(whole) - 22, len(whole) - 100}):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match='last.pth'): load_checkpoint(path)
    path.write_bytes(whole)
    assert same(load_checkpoint(path), load_checkpoint(saved))


def test_flipped_bits(saved, tmp_path):
    "A flipped bit in any record is found; in the bytes between records it is found or changes nothing."
    whole, path, rng = saved.read_bytes(), tmp_path/'last.pth', random.Random(0)
    truth, records = load_checkpoint(saved), []
    with zipfile.ZipFile(saved) as archive:
        for info in archive.infolist():
            name, extra = (int.from_bytes(whole[info.header_offset + at:][:2], 'little') for at in (26, 28))
            start = info.header_offset + 30 + name + extra
            records.append(range(start, start + info.file_size))
    inside = [rng.choice(record) for record in records if len(record)] + [rng.choice(max(records, key=len)) for _ in range(20)]
    for spot in inside + [rng.randrange(len(whole)) for _ in range(60)]:
        path.write_bytes(whole[:spot] + bytes([whole[spot] ^ 1 << rng.randrange(8)]) + whole[spot + 1:])
        try: state = load_checkpoint(path)
        except CheckpointError: continue
        assert spot not in inside and same(state, truth), spot


class Bomb:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'pickle', 'in a dict'])
def test_nothing_in_a_file_is_executed(kind, tmp_path):
    path, crater = tmp_path/'bomb.pth', tmp_path/'crater'
    if kind == 'zip': torch.save(Bomb(crater), path)
    elif kind == 'legacy': torch.save(Bomb(crater), path, _use_new_zipfile_serialization=False)
    elif kind == 'pickle': path.write_bytes(pickle.dumps(dict(model_state_dict=Bomb(crater))))
    else: torch.save(dict(model_state_dict={}, extra=Bomb(crater)), path)
    with pytest.raises(CheckpointError, match='bomb.pth'): load_checkpoint(path)
    assert not crater.exists()


def test_what_unpacks_to_more_than_the_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path/'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as archive: archive.writestr('archive/data.pkl', bytes(2**22))
    with pytest.raises(CheckpointError, match='larger than the file'): load_checkpoint(tmp_path/'bomb.pth')


def test_files_that_are_no_checkpoints(tmp_path):
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    with zipfile.ZipFile(tmp_path/'other.zip', 'w') as archive: archive.writestr('hello', 'world')
    for name, content in dict(text=b'hello', empty=b'', list=buffer.getvalue(), zip=(tmp_path/'other.zip').read_bytes()).items():
        (tmp_path/name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name): load_checkpoint(tmp_path/name)
    with pytest.raises(CheckpointError, match='no such checkpoint'): load_checkpoint(tmp_path/'missing.pth')
    with pytest.raises(CheckpointError, match='folder'): load_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_old_file(saved, tmp_path, monkeypatch):
    path = tmp_path/'last.pth'
    path.write_bytes(saved.read_bytes())
    def full(_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match=r'last.pth: cannot be written \(No space left on device\)'): save_checkpoint(path, dict(model_state_dict={}))
    assert path.read_bytes() == saved.read_bytes() and os.listdir(tmp_path) == ['last.pth']


def checkpoint(path: Path, epoch, epoch_step=0): save_checkpoint(path, dict(model_state_dict={}, epoch=epoch, epoch_step=epoch_step))


def test_the_newest_whole_checkpoint(tmp_path, messages):
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path/'nowhere') is None
    checkpoint(tmp_path/'best_model.pth', 3)
    (tmp_path/'epoch_notes.txt').write_text('mine')
    assert newest_checkpoint(tmp_path).name == 'best_model.pth'
    for epoch in (5, 999, 1000): checkpoint(tmp_path/f'epoch_{epoch:03}.pth', epoch + 1)
    assert newest_checkpoint(tmp_path).name == 'epoch_1000.pth'
    checkpoint(tmp_path/'last.pth', 2)   # of a run that was started anew
    assert newest_checkpoint(tmp_path).name == 'last.pth' and not messages
    (tmp_path/'last.pth').write_bytes(b'')
    assert newest_checkpoint(tmp_path).name == 'epoch_1000.pth' and 'last.pth' in messages[0]
    torn = (tmp_path/'epoch_1000.pth').read_bytes()[:-50]
    (tmp_path/'epoch_1000.pth').write_bytes(torn)
    assert newest_checkpoint(tmp_path).name == 'epoch_999.pth'
    checkpoint(tmp_path/'last.pth', 'nine')
    assert newest_checkpoint(tmp_path).name == 'epoch_999.pth'
    for path in tmp_path.glob('*.pth'): path.write_bytes(torn)
    with pytest.raises(CheckpointError, match='none of its 5 checkpoints is whole'): newest_checkpoint(tmp_path)


# two processes

def train_in_parallel(rank, folder, kind):
    "Two processes, accumulation; one loss of the second one is not a number, and no gradient says so to the first."
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    engine = engine_of(kind=kind, train=dict(accumulate=2, batch_size=4))
    batches = [batch_of(4, 10*rank + seed) for seed in range(6)]
    if rank: batches[3]['poison'] = torch.ones(1)
    forward = engine._batch
    engine._batch = lambda batch, share, last: forward(batch, share, last) | (dict(loss=torch.tensor(math.nan)) if 'poison' in batch else {})
    result = engine.train_epoch(Loader(batches), 0)
    engine.stop_requested = rank == 1
    torch.save(dict(state=learnt(engine), dropped=result['dropped'], stop=engine.should_stop()), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def train_in_two(_, *arguments):
    import torch._dynamo   # noqa: F401 seconds that parallel training would spend twice
    torch.multiprocessing.start_processes(train_in_parallel, arguments, 2, start_method='fork')


@pytest.mark.parametrize('kind', [TrainingEngine, GraphedEngine])
def test_processes_decide_together(kind, tmp_path):
    torch.multiprocessing.start_processes(train_in_two, (str(tmp_path), kind), 1, start_method='spawn')   # what has gone backward must not fork
    first, second = (torch.load(tmp_path/f'{rank}.pt') for rank in range(2))
    assert first['dropped'] == second['dropped'] == 1 and first['stop'] is second['stop'] is True
    for key in ('model_state_dict', 'ema_state_dict', 'optimizer_state_dict', 'step'): assert same(first['state'][key], second['state'][key])
    kept = [joined([batch_of(4, 10*rank + seed) for rank in range(2) for seed in window]) for window in ((0, 1), (4, 5))]
    model, _ = train_slowly(engine_of().config, kept, 3)
    for name, value in model.state_dict().items(): torch.testing.assert_close(first['state']['model_state_dict'][name], value, atol=1e-6, rtol=0)
