"""What the notebook of captcha_hrnet.synth can't hold: other processes, kills, folders of bad photographs, fuzzing."""
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captcha_hrnet import config as names
from captcha_hrnet import synth
from captcha_hrnet.config import CAMERA_EFFECTS, CONFUSIONS, Factor, SynthConfig, UserError, load_config
from captcha_hrnet.synth import BACKGROUNDS, FACTORS, GAP_STYLES, SHAPES, SLIDER_STYLES
from captcha_hrnet.synth import CaptchaSynth, Streams, box_centre, coverage, make_outline

ROOT = Path(__file__).parents[1]
OFF = {name: Factor(p=0.0) for name in FACTORS}
SMALL = {"width": (200, 260), "aspect": (1.5, 2.0)}


def digest(sample):
    return hashlib.sha256(sample.image.tobytes() + json.dumps(sample.record("x")).encode()).hexdigest()


def only(**factors):
    "Settings with nothing but the given factors, at their strength."
    return OFF | {name: Factor(p=1.0, strength=(s, s)) for name, s in factors.items()}


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_name_that_a_run_file_may_use_can_be_drawn_and_the_other_way_round():
    assert set(names.SHAPES) == set(SHAPES) and set(names.GAP_STYLES) == set(GAP_STYLES) and set(names.SLIDER_STYLES) == set(SLIDER_STYLES)
    assert set(names.BACKGROUNDS) == set(BACKGROUNDS) | {"photo"}


TABLES = {"shapes": SHAPES, "backgrounds": BACKGROUNDS, "gap_styles": GAP_STYLES, "slider_styles": SLIDER_STYLES}


@pytest.mark.parametrize("key, name", [(key, name) for key, table in TABLES.items() for name in table])
def test_each_entry_alone(key, name):
    drawn = CaptchaSynth(SynthConfig(**SMALL, min_visibility=0.0, **{key: {name: 1.0}}), 3)
    for sample in map(drawn.draw, range(6)):
        assert name in (sample.shape, *sample.styles.values()) and sample.image.dtype == np.uint8


def test_what_is_kept_apart_is_never_trained_on():
    "Styles for measuring have no weight in any configuration but the one that measures, and all of them have it there."
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        weights = (run := load_config(file).synth).gap_styles | run.slider_styles
        drawn = {name for name in names.UNSEEN_STYLES if weights.get(name)}
        assert drawn == (set(names.UNSEEN_STYLES) if file.stem == "synth_unseen" else set()), file


@pytest.mark.parametrize("name", ["easy", "default", "wide", "hard", "unseen"])
def test_presets(name):
    config = load_config(ROOT / "configs" / f"synth_{name}.yaml")
    flags = [CaptchaSynth(config.synth, 0).draw(i).flags for i in range(40)]
    assert any(flag[f"has_{c}"] for flag in flags for c in CONFUSIONS) == (name != "easy")
    if name == "default": assert config.synth == SynthConfig()


# ── the same sample, always ──────────────────────────────────────────────────────────────────────────────────────

PROGRAM = """
import hashlib, json, sys, cv2
from captcha_hrnet.config import SynthConfig
from captcha_hrnet.synth import CaptchaSynth
cv2.setNumThreads(int(sys.argv[1]))
drawn = CaptchaSynth(SynthConfig(), 5)
for index in map(int, sys.argv[2:]):
    sample = drawn.draw(index)
    print(index, hashlib.sha256(sample.image.tobytes() + json.dumps(sample.record("x")).encode()).hexdigest())
"""


def test_other_processes_orders_and_thread_counts_draw_the_same_bytes():
    here = {index: digest(CaptchaSynth(SynthConfig(), 5).draw(index)) for index in range(12)}
    for threads, order in (("1", range(12)), ("4", range(11, -1, -1)), ("0", (7, 3, 7))):
        done = subprocess.run([sys.executable, "-c", PROGRAM, threads, *map(str, order)], capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            index, value = line.split()
            assert here[int(index)] == value


def test_seed_split_and_index_all_count_and_pickling_does_not():
    drawn = CaptchaSynth(SynthConfig(**SMALL), 1)
    others = CaptchaSynth(SynthConfig(**SMALL), 2), CaptchaSynth(SynthConfig(**SMALL), 1, "val")
    different = [digest(each.draw(i)) for each in (drawn, *others) for i in (0, 1)]
    assert len(set(different)) == 6
    assert digest(pickle.loads(pickle.dumps(drawn)).draw(1)) == digest(drawn.draw(1)) == digest(drawn.draw(np.int64(1)))


def test_drawing_leaves_the_global_states_alone():
    np.random.seed(1); cv2.setNumThreads(3)
    state = np.random.get_state()[1].copy()
    CaptchaSynth(SynthConfig(**SMALL), 1).draw(0)
    assert (np.random.get_state()[1] == state).all() and cv2.getNumThreads() == 3


def test_a_factor_does_not_move_the_others():
    quiet, loud = (CaptchaSynth(SynthConfig(**(OFF | {"jpeg": Factor(p=1.0, strength=(s, s))})), 4) for s in (0.0, 0.9))
    for index in range(10):
        a, b = quiet.draw(index).record("x"), loud.draw(index).record("x")
        assert not a["has_jpeg"] and b["has_jpeg"]
        for key in ("gap", "slider", "shape", "piece_size", "width", "height", "background"): assert a[key] == b[key]


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────────────────

def centroid(mask):
    x, y = np.arange(mask.shape[1]) + 0.5, np.arange(mask.shape[0]) + 0.5
    return np.array([(mask.sum(0) * x).sum(), (mask.sum(1) * y).sum()]) / mask.sum()


def polygon_centroid(outline):
    x, y = outline.T; u, v = np.roll(x, -1), np.roll(y, -1)
    cross = x * v - u * y
    return np.array([((x + u) * cross).sum(), ((y + v) * cross).sum()]) / (3 * cross.sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_found_where_its_label_says(shape):
    "The place comes from pixels alone; only the form (its centroid against its box centre) is taken from the outline."
    errors = []
    for index in range(60):
        rng = Streams(9, "train", index)("shape")
        outline = make_outline(shape, rng) * rng.uniform(16, 100)
        placed = outline + rng.uniform(70, 75, 2)
        assert box_centre(outline) == pytest.approx([0, 0], abs=1e-9)
        found = centroid(coverage(placed, (150, 150))) - polygon_centroid(outline)
        errors.append(found - box_centre(placed))
    assert np.abs(errors).max() < 0.1 and np.abs(np.mean(errors, 0)).max() < 0.01        # no bias either


@pytest.fixture
def silhouettes(monkeypatch):
    "A black world in which the gap is white and the slider does not show: the picture is the gap's mask."
    monkeypatch.setitem(BACKGROUNDS, "gradient", lambda rng, h, w: np.zeros((h, w, 3), np.uint8))
    monkeypatch.setattr(synth, "with_light", lambda picture, rng: picture)
    monkeypatch.setitem(GAP_STYLES, "light", lambda stamp: stamp.blend(255.0, stamp.mask))
    return {"backgrounds": {"gradient": 1.0}, "gap_styles": {"light": 1.0}, "slider_styles": {"plain": 1.0}, "min_visibility": 0.0}


@pytest.mark.parametrize("factors", [{}, {"resize": 0.3}, {"resize": 1.0}, {"blur": 1.0}, {"rotation": 1.0},
                                     {"rotation": 0.5, "resize": 0.7}, {"row_offset": 0.8}])
def test_finished_pictures_show_the_gap_at_the_label(silhouettes, factors):
    drawn = CaptchaSynth(SynthConfig(**silhouettes, **only(**factors)), 7)
    errors = []
    for sample in map(drawn.draw, range(60)):
        low, high = np.floor(sample.gap_outline.min(0) - 6).clip(0).astype(int), np.ceil(sample.gap_outline.max(0) + 6).astype(int)
        part = sample.image[low[1]:high[1], low[0]:high[0], 0].astype(float)
        errors.append(centroid(part) + low - polygon_centroid(sample.gap_outline))        # 0 where pixels and outline agree
        back = synth.rotated(sample.gap_outline - sample.gap, -sample.gap_angle)          # the label is what it was turned about
        if "resize" not in factors: assert box_centre(back) == pytest.approx([0, 0], abs=1e-6)
    aliased = factors.get("resize", 0) > 0.5   # scaling without a filter moves single edges, to either side
    assert np.abs(errors).max() < (0.2 if aliased else 0.1) and np.abs(np.mean(errors, 0)).max() < 0.02


def test_slider_plus_distance_lands_on_the_gap():
    for sample in map(CaptchaSynth(SynthConfig(**OFF), 2).draw, range(30)):
        move = np.array(sample.gap) - sample.slider
        assert move[1] == pytest.approx(0, abs=1e-9)
        assert sample.slider_outline + move == pytest.approx(sample.gap_outline, abs=1e-9)


def test_the_slider_shows_what_was_cut_out_at_the_gap():
    "A smooth background is needed: content moved by part of a pixel is interpolated."
    config = SynthConfig(backgrounds={"gradient": 1.0}, slider_styles={"plain": 1.0}, gap_styles={"dark": 1.0}, min_visibility=0.0, **OFF)
    drawn = CaptchaSynth(config, 1)
    for index in range(20):
        streams = Streams(1, "train", index)
        plan = synth.make_plan(config, streams("plan"), streams("shape"))
        before, _ = drawn._background(plan, streams("background"))
        sample = drawn.draw(index)
        (x, y), (u, v) = np.floor(sample.slider).astype(int), np.floor(sample.gap).astype(int)
        smooth = np.abs(before[v - 3:v + 4, u - 3:u + 4].astype(int) - before[v, u]).max()
        if smooth < 8: assert np.abs(sample.image[y, x].astype(int) - before[v, u]).max() <= smooth + 3


def test_positions_are_continuous():
    gaps = np.array([s.gap for s in map(CaptchaSynth(SynthConfig(), 0).draw, range(400))])
    for fraction in (gaps % 1).T:
        steps = np.abs(np.sort(fraction) - np.linspace(0, 1, 400)).max()              # Kolmogorov-Smirnov against even
        assert steps < 0.09 and len(np.unique(fraction)) > 395


# ── layouts ──────────────────────────────────────────────────────────────────────────────────────────────────────

def span(low, high, kind=st.floats):
    return st.tuples(kind(low, high), kind(low, high)).map(lambda pair: tuple(sorted(pair)))


@settings(deadline=None, max_examples=60)
@given(width=span(64, 500, st.integers), aspect=span(1.0, 4.0), piece=span(0.05, 0.5), start=st.sampled_from(["left", "anywhere", "mixed"]),
       factors=st.fixed_dictionaries(dict.fromkeys(FACTORS, st.builds(Factor, p=st.sampled_from([0.0, 0.3, 1.0]),
                                                                      strength=span(0.0, 1.0)))),
       index=st.integers(0, 2 ** 40), seed=st.integers(0, 2 ** 70))
def test_any_settings_give_a_sound_sample(width, aspect, piece, start, factors, index, seed):
    sample = CaptchaSynth(SynthConfig(width=width, aspect=aspect, piece_size=piece, slider_start=start, **factors), seed).draw(index)
    height, wide = sample.image.shape[:2]
    assert width[0] <= wide <= width[1] and sample.image.shape[2] == 3 and sample.image.dtype == np.uint8
    for x, y in (sample.gap, sample.slider, *sample.decoys): assert 0 <= x <= wide and 0 <= y <= height
    assert json.loads(json.dumps(sample.record("a.png"))) == sample.record("a.png")
    assert all(isinstance(flag, bool) for flag in sample.flags.values())
    assert np.isfinite([sample.visibility, sample.slider_visibility]).all()
    for name in ("rotation", "noise", "highlight", "hollow", "bright_edge", *CAMERA_EFFECTS, "strip"):
        factor = factors[name]
        if factor.p == 0 or factor.strength == (0, 0): assert not sample.flags[f"has_{name}"]
        if factor.p == 1 and factor.strength[0] > 0: assert sample.flags[f"has_{name}"]
    assert sample.flags["has_decoy"] == bool(sample.decoys) and (sample.gap_angle != 0) == sample.flags["has_rotation"]


def test_pieces_stay_inside_and_apart_and_decoys_do_not_fit():
    config = SynthConfig(decoy=Factor(p=1.0, strength=(0.5, 1.0)), overlap=Factor(p=0.0), min_visibility=0.0)
    for index in range(150):
        streams = Streams(6, "train", index)
        plan = synth.make_plan(config, streams("plan"), streams("shape"))
        synth.add_decoys(plan, streams("decoy"))
        x0, y0, x1, y1 = plan.scene
        for outline in [plan.gap_outline] + [outline + place for outline, place in plan.decoys]:
            assert (outline.min(0) >= (x0, y0)).all() and (outline.max(0) <= (x1, y1)).all()
        assert (plan.slider_outline.min(0) >= -1e-6).all() and (plan.slider_outline.max(0) <= np.array(plan.drawn) + 1e-6).all()
        boxes = [plan.gap_outline, plan.slider_outline] + [outline + place for outline, place in plan.decoys]
        for k, one in enumerate(boxes):
            for other in boxes[:k]: assert (one.min(0) >= other.max(0)).any() or (other.min(0) >= one.max(0)).any()
        assert not synth.flags_of(plan)["has_overlap"]
        for outline, _ in plan.decoys: assert synth.likeness(outline, plan.outline) <= 0.9


@pytest.mark.parametrize("name", FACTORS)
def test_a_flag_never_stands_for_nothing(name):
    "Already the weakest strength changes the picture (decoys need room)."
    with_it, without = (CaptchaSynth(SynthConfig(**SMALL, min_visibility=0.0, **factors), 8) for factors in (only(**{name: 0.01}), OFF))
    for index in range(25):
        a, b = with_it.draw(index), without.draw(index)
        assert not b.flags[f"has_{name}"]
        if not a.flags[f"has_{name}"]: assert name in ("decoy", "overlap"); continue
        assert a.image.shape != b.image.shape or (a.image != b.image).any()


@given(index=st.integers(0, 10**6), strength=st.floats(0.01, 1), kind=st.sampled_from(sorted(synth.OVERLAID)))
@settings(max_examples=60, deadline=None)
def test_clutter_changes_the_picture_alone(index, strength, kind):
    "Labels, outlines and styles stay; each kind shows at every strength, and is drawn on a copy."
    with_it, without = (CaptchaSynth(SynthConfig(**SMALL, min_visibility=0.0, **factors), 3) for factors in (only(clutter=strength), OFF))
    a, b = with_it.draw(index), without.draw(index)
    visible = ("visibility", "slider_visibility", "has_clutter")
    assert {k: v for k, v in a.record("x").items() if k not in visible} == {k: v for k, v in b.record("x").items() if k not in visible}
    assert a.flags["has_clutter"] and not b.flags["has_clutter"] and (a.image != b.image).any()
    grainy = np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8)   # on which every colour shows
    picture = grainy.copy()
    synth.OVERLAID[kind](picture, strength, np.random.default_rng(index))
    assert (picture != grainy).any()
    before = b.image.copy()
    assert synth.add_clutter(b.image, strength, np.random.default_rng(index)) is not b.image and (b.image == before).all()


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_solid_gap_shows_nothing_of_the_picture(seed):
    "At its strongest it is the same on two pictures that have nothing in common; a translucent one is not."
    outline = make_outline("jigsaw", np.random.default_rng(seed)) * 40 + 40
    inside = coverage(outline, (80, 80)) == 1
    pictures = [np.full((80, 80, 3), 30, np.uint8), np.random.default_rng(1).integers(0, 256, (80, 80, 3), dtype=np.uint8)]
    for style, same in (("solid", True), ("translucent", False)):
        painted = [picture.copy() for picture in pictures]
        for picture in painted: synth.paint_gap(picture, outline, style, dict.fromkeys(FACTORS, 0.0), np.random.default_rng(seed), boost=1.0)
        assert (np.abs(painted[0][inside].astype(int) - painted[1][inside]).max() <= 1) == same     # 1: float32 rounds


def test_what_is_absent_is_not_drawn_and_all_else_stays():
    "Against the same samples with everything: the picture differs where the absent piece was, and nowhere else."
    plain = SynthConfig(**SMALL, **OFF, min_visibility=0.0)
    whole, gapless, bare = (CaptchaSynth(plain.model_copy(update=p), 5) for p in ({}, {"no_gap": 1.0}, {"no_gap": 1.0, "no_slider": 1.0}))
    for i in range(12):
        a, b, c = (s.draw(i) for s in (whole, gapless, bare))
        assert (b.gap, b.visibility, b.decoys, c.slider) == (None, None, [], None) and b.slider == a.slider and b.flags == c.flags
        assert b.styles["gap_style"] is None and b.styles["slider_style"] == a.styles["slider_style"]
        for one, two, point, size in ((a, b, a.gap, 3.0), (b, c, a.slider, 4.0)):   # shadows and glow reach beyond the piece
            y, x = np.nonzero((one.image != two.image).any(2))
            assert len(x) and (np.abs(np.stack([x, y], 1) + 0.5 - point).max(0) <= size / 2 * np.array(a.piece_size) + 8).all()
        assert b.record("x")["gap"] is None and b.record("x")["no_gap"] and "no_slider" not in b.record("x")
    some = [CaptchaSynth(SynthConfig(no_gap=0.3, no_slider=0.2), 1).draw(i) for i in range(150)]
    assert 0.2 < np.mean([s.gap is None for s in some]) < 0.4 and 0.1 < np.mean([s.slider is None for s in some]) < 0.3
    for sample in some:
        shown = [name for name in ("decoy", "rotation", "highlight", "hollow", "bright_edge", "row_offset", "overlap") if sample.flags[f"has_{name}"]]
        assert sample.gap or not (shown or sample.gap_angle or sample.decoys)


def test_rows_agree_unless_flagged():
    samples = [CaptchaSynth(SynthConfig(**only(row_offset=s)), 3).draw(i) for s in (0.0, 0.1, 1.0) for i in range(20)]
    for sample in samples:
        assert (abs(sample.gap[1] - sample.slider[1]) > 0.5) == sample.flags["has_row_offset"]
    assert not any(s.flags["has_row_offset"] for s in samples[:20]) and all(s.flags["has_row_offset"] for s in samples[20:])


def test_nothing_of_the_default_is_lost():
    floor = SynthConfig().min_visibility
    visible = np.array([(s.visibility, s.slider_visibility) for s in map(CaptchaSynth(SynthConfig(), 11).draw, range(500))])
    assert (visible < floor).mean() < 0.004 and visible.min() > 0.5 * floor


# ── photographs ──────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k in range(60):
        size = (int(rng.integers(20, 500)), int(rng.integers(20, 500)))
        picture = np.broadcast_to(np.array([k * 4, 40, 255 - k * 4], np.uint8), (*size, 3))
        (folder / f"sub{k % 3}").mkdir(exist_ok=True)
        cv2.imwrite(str(folder / f"sub{k % 3}" / (f"ü {k}.png" if k % 2 else f"{k}.JPG")), picture)
    (folder / "notes.txt").write_text("not a photograph")
    return folder


def photo_config(folder, **more):
    return SynthConfig(**(SMALL | {"backgrounds": {"photo": 1.0}, "background_dir": str(folder)} | more))


def test_photographs_are_split_by_content(photos, tmp_path):
    both = {split: {synth.photo_key(p) for p in synth.PhotoFolder(str(photos), split).paths} for split in ("train", "val")}
    assert both["val"] and len(both["train"]) > 40 and not both["train"] & both["val"]
    copy = shutil.copytree(photos, tmp_path / "other names")
    for k, path in enumerate(sorted(copy.rglob("*.png"))): path.rename(path.with_name(f"{k}x.png"))
    assert {synth.photo_key(p) for p in synth.PhotoFolder(str(copy), "val").paths} == both["val"]
    for split in ("train", "val"):
        drawn = CaptchaSynth(photo_config(photos), 0, split)
        assert {drawn.draw(i).styles["background"] for i in range(5)} == {"photo"}


def test_unreadable_photographs_are_reported(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    bad = [folder / f"bad{k}.jpg" for k in range(200)]
    for k, path in enumerate(bad): path.write_bytes(b"" if k % 2 else b"this is no picture %d" % k)
    with pytest.warns(UserWarning, match=r"bad\d+.jpg: not a picture"):
        samples = [CaptchaSynth(photo_config(folder), 0).draw(i) for i in range(10)]
    assert all(s.image.size for s in samples)
    for path in [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("bad")]: path.unlink()
    with warnings.catch_warnings(), pytest.raises(UserError, match="can be read"):
        warnings.simplefilter("ignore")
        CaptchaSynth(photo_config(folder), 0).draw(0)


def test_photograph_mistakes_are_one_line(tmp_path):
    for make, words in ((lambda: CaptchaSynth(photo_config(tmp_path / "none"), 0), "no such folder"),
                        (lambda: CaptchaSynth(photo_config(tmp_path), 0), "none falls to 'train'"),
                        (lambda: CaptchaSynth(SynthConfig(), -1), "must be 0 or more")):
        with pytest.raises(UserError, match=words) as caught: make()
        assert "\n" not in str(caught.value)


# ── data sets on disk ────────────────────────────────────────────────────────────────────────────────────────────

FAST = ["--set", "synth.width=[128, 160]", "synth.redraws=0"]


def command(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "captcha_hrnet.synth", *map(str, arguments)], capture_output=True, text=True, **options)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_one_process_and_several_write_the_same(tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        done = command("--out", tmp_path / name, "--train", 150, "--val", 20, "--seed", 3, "--workers", workers, *FAST)
        assert (done.returncode, done.stderr) == (0, "")
    files = contents(tmp_path / "one")
    assert files == contents(tmp_path / "two") and len(files) == 150 + 20 + 3
    records = [json.loads(line) for line in files["train/labels.jsonl"].splitlines()]
    for index in (0, 64, 149):
        image = cv2.imdecode(np.frombuffer(files[f"train/{records[index]['image']}"], np.uint8), cv2.IMREAD_COLOR)
        assert image.shape[:2] == (records[index]["height"], records[index]["width"])
    config = SynthConfig(width=(128, 160), redraws=0)
    assert CaptchaSynth(config, 3).draw(149).record("images/000149.png") == records[149]
    assert CaptchaSynth(config, 3, "val").draw(7).record("images/000007.png") == json.loads(files["val/labels.jsonl"].splitlines()[7])


def alive(group):
    try: os.killpg(group, 0)
    except ProcessLookupError: return False
    return True


@pytest.mark.parametrize("how, workers", [(signal.SIGKILL, 2), (signal.SIGKILL, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_killed_and_started_again(tmp_path, how, workers):
    options = ["--out", str(tmp_path / "set"), "--train", "700", "--val", "70", "--workers", str(workers), *FAST]
    line = [sys.executable, "-m", "captcha_hrnet.synth", *options]
    images = tmp_path / "set" / "train" / "images"
    for amount in (90, 300):
        process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        until = time.time() + 60
        while len(list(images.glob("*.png"))) < amount and time.time() < until and process.poll() is None: time.sleep(0.02)
        process.send_signal(how)
        assert process.wait(60) != 0
        until = time.time() + 20
        while alive(process.pid) and time.time() < until: time.sleep(0.1)
        assert not alive(process.pid), "workers outlived their parent"
        assert not (tmp_path / "set/train/labels.jsonl").exists()
        for path in images.glob("*.png"): assert cv2.imread(str(path)) is not None
    done = command(*options)
    assert (done.returncode, done.stderr) == (0, "")
    assert command("--out", tmp_path / "whole", "--train", 700, "--val", 70, "--workers", 2, *FAST).returncode == 0
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_set_grows_but_never_mixes(tmp_path):
    out = tmp_path / "set"
    assert command("--out", out, "--train", 30, *FAST).returncode == 0
    before = contents(out)
    assert command("--out", out, "--train", 30, *FAST).returncode == 0 and contents(out) == before
    assert command("--out", out, "--train", 100, "--val", 5, *FAST).returncode == 0
    grown = contents(out)
    assert grown["train/labels.jsonl"].startswith(before["train/labels.jsonl"]) and len(grown["train/labels.jsonl"].splitlines()) == 100
    for more, words in ((["--seed", 1, "--train", 200], "other settings (seed)"), (["--train", 20], "more than the 20"),
                        (["--train", 200, "--set", "synth.jpeg.p=0"], "synth.jpeg")):
        done = command("--out", out, *more, *FAST)
        assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert contents(out) == grown


def test_a_set_that_was_changed_does_not_grow(tmp_path):
    "Nothing is drawn to a data set that is not what was written; damage is a line."
    assert command("--out", tmp_path / "set", "--train", 7, *FAST).returncode == 0
    labels = (tmp_path / "set/train/labels.jsonl").read_bytes()
    lines = labels.splitlines(True)
    damages = {"synth.json": (b"3", "synth.json: cannot be read"), "train/labels.jsonl": (b"".join(lines[:1] + lines[2:]), "labels.jsonl:2: must be of images/000001.png"),
               "./train/labels.jsonl": (labels[:-20], "labels.jsonl:7: must be of"), "train/./labels.jsonl": (labels + b"\xff\xfe", "not UTF-8"),
               "train/images/000003.png": (None, "labels.jsonl:4: must be of images/000003.png, and that must be there")}
    for name, (content, words) in damages.items():
        copy = shutil.copytree(tmp_path / "set", tmp_path / f"copy{len(words)}-{len(name)}")
        if content is None: (copy / name).unlink()
        else: (copy / name).write_bytes(content)
        before, done = contents(copy), command("--out", copy, "--train", 9, *FAST)
        assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1 and contents(copy) == before, done.stderr
    part = tmp_path / "set/train/.parts"
    part.mkdir()
    (part / "00000007.jsonl").write_text('{"x": 1}\nnot json\n')   # not finished, then
    assert command("--out", tmp_path / "set", "--train", 9, *FAST).returncode == 0 and len((tmp_path / "set/train/labels.jsonl").read_bytes().splitlines()) == 9


@pytest.mark.parametrize("arguments, code, words", [
    (["--help"], 0, ""), (["--no-such-option"], 2, "unrecognized"), (["--train", "many"], 2, "invalid int"),
    ([], 1, "not both 0"), (["--train", "-3"], 1, "must be 0 or more"), (["--train", "3", "--seed", "-1"], 1, "seed"),
    (["--train", "3", "--workers", "0"], 1, "workers"), (["--train", "3", "--backgrounds", "no/such"], 1, "no such folder"),
    (["--train", "3", "--preset", "soft"], 1, "easy"), (["--train", "3", "--config", "none.yaml"], 1, "none.yaml"),
    (["--train", "3", "--config", "none.yaml", "--preset", "easy"], 1, "one of them"),
    (["--train", "3", "--set", "synth.jpg.p=1"], 1, "synth.jpeg"),
    (["--train", "3", "--out", "file"], 1, "file"), (["--train", "3", "--out", "full"], 1, "name another folder"),
])
def test_command_line_mistakes(tmp_path, arguments, code, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "full" / "train").mkdir(parents=True)
    done = command(*arguments, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == code and words in done.stderr + done.stdout and "Traceback" not in done.stderr
    if code == 1: assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_command_line_with_photographs_and_a_preset(photos, tmp_path):
    done = command("--out", tmp_path / "set", "--train", 40, "--val", 6, "--preset", "wide", "--backgrounds", photos, "--workers", 1,
                   "--set", "synth.backgrounds={photo: 1}")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "set/train/labels.jsonl").read_text().splitlines()]
    assert {record["background"] for record in records} == {"photo"} and len(records) == 40


@pytest.mark.parametrize("name", FACTORS)
def test_each_factor_has_a_preset_of_its_own(name):
    run = load_config(ROOT / f"configs/factors/{name}.yaml").synth
    assert {factor for factor in FACTORS if run[factor].p} == {name}
    drawn = [CaptchaSynth(run, 0).draw(i) for i in range(4)]
    assert all(sample.flags[f"has_{name}"] for sample in drawn)
    follows = {"strip": {"row_offset"}}.get(name, set())   # a piece on its own strip stands on another row
    assert not any(sample.flags[f"has_{other}"] for sample in drawn for other in set(FACTORS) - follows - {name})
