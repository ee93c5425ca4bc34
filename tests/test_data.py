"""Data: what a notebook can't hold. Hostile files, fuzzed labels, caches that are torn or shared, loaders with workers."""
import json
import logging
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from captcha_hrnet import data as module
from captcha_hrnet import synth
from captcha_hrnet.config import Config, UserError, run_command
from captcha_hrnet.data import (
    MAX_LINE,
    CaptchaDataset,
    DataPipeline,
    EvalBatches,
    LabelTable,
    PackedDataset,
    PackedLoader,
    SyntheticDataset,
    TrainBatches,
    cached_file,
    check_record,
    loader_speed,
    make_sample,
    read_coco,
    read_image,
    write_coco,
)
from captcha_hrnet.geometry import unletterbox

FOREIGN = Path(__file__).parent / "data" / "foreign"
GOOD = dict(image="images/0.png", width=64, height=32, gap=[40.25, 16], slider=[8.5, 16.0])
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def grey(value, width=64, height=32):
    return Image.fromarray(np.full((height, width, 3), value, np.uint8))


def write_lines(folder, lines):
    (folder / "labels.jsonl").write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")


@pytest.fixture
def split(tmp_path):
    """A split of three good samples: 0.png, 1.png and 2.png."""
    folder = tmp_path / "data" / "val"
    (folder / "images").mkdir(parents=True)
    for i in range(3): grey(50 * i + 50).save(folder / f"images/{i}.png")
    write_lines(folder, [{**GOOD, "image": f"images/{i}.png"} for i in range(3)])
    return folder


def load(split, on_bad_sample="raise", **more):
    return CaptchaDataset(split.parent, split.name, 128, 64, on_bad_sample, **more)


def same(one, two):
    return one.keys() == two.keys() and all(type(one[k]) is type(two[k]) and np.array_equal(one[k], two[k]) for k in one)


def expect_rejected(split, line, reason, caplog):
    """`raise` names file, line and reason; `skip` keeps the others, writes rejected.jsonl and says so."""
    with pytest.raises(UserError) as error: load(split)
    assert f"{split / 'labels.jsonl'}:{line}: " in str(error.value) and reason in str(error.value), error.value
    assert "1 bad samples" in str(error.value) and "\ud800" not in str(error.value)
    assert not (split / "rejected.jsonl").exists()
    caplog.clear()
    with caplog.at_level(logging.WARNING): dataset = load(split, "skip")
    assert len(dataset) == 2 and [dataset[i]["index"] for i in range(2)] == [0, 1]
    assert "1 bad samples" in caplog.text and "rejected.jsonl" in caplog.text
    rejected = [json.loads(x) for x in (split / "rejected.jsonl").read_text().splitlines()]
    assert [(r["file"], r["line"]) for r in rejected] == [(str(split / "labels.jsonl"), line)]
    assert reason in rejected[0]["reason"] and len(rejected[0]["reason"]) < 1000 and "text" in rejected[0]


# ── labels ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def without(key): return {k: v for k, v in GOOD.items() if k != key}


BAD_LINES = {   # a second line → what is said about it
    "not json": (b"{nonsense", "not JSON"), "array": ([1, 2], "not a JSON object"), "number": (3, "not a JSON object"), "null": (None, "not a JSON object"),
    "two objects": (b"{} {}", "not JSON"), "not utf-8": (b'{"image": "\xff\xfe"}', "not JSON"), "utf-16": ('{"a": 1}'.encode("utf-16"), "not JSON"),
    "key twice": (json.dumps(GOOD).encode()[:-1] + b', "gap": [1, 2]}', "twice"),
    "nested": (b"[" * 100_000 + b"]" * 100_000, "not JSON"), "nested in a field": (b'{"image": ' + b"[" * 900 + b"]" * 900 + b"}", "no width"),
    "nested gap": (json.dumps({**GOOD, "gap": 0}).replace('"gap": 0', '"gap": ' + "[" * 500 + "]" * 500).encode(), "gap is"),
    "huge": (b'{"image": "' + b"x" * 3 * MAX_LINE + b'"}', "longer than 1,048,576 bytes"), "as long as can be": (b"x" * (MAX_LINE - 2), "not JSON"),
    "many digits": (b'{"image": ' + b"1" * 10_000 + b"}", "not JSON"),
    **{f"no {key}": (without(key), f"no {key}") for key in GOOD},
    "two folders up": ({**GOOD, "image": "../../x"}, "leaves the data folder"), "up inside": ({**GOOD, "image": "images/../../x.png"}, "leaves"),
    "absolute": ({**GOOD, "image": "/etc/passwd"}, "leaves the data folder"), "backslash": ({**GOOD, "image": "..\\x"}, "no portable path"),
    "nul": ({**GOOD, "image": "a\0b"}, "no portable path"), "surrogate": ({**GOOD, "image": "\ud800.png"}, "no portable path"),
    "no name": ({**GOOD, "image": ""}, "a path is needed"), "name is a number": ({**GOOD, "image": 3}, "a path is needed"),
    "long name": ({**GOOD, "image": "x" * 9000}, "no portable path"), "two lines": ({**GOOD, "image": "a\nb"}, "no portable path"),
    "same": ({**GOOD, "image": "images/0.png"}, "earlier line"),
    "same, written otherwise": ({**GOOD, "image": "./images//0.png"}, "earlier line"),
    **{f"width {v!r:.20}": ({**GOOD, "width": v}, "width is") for v in (0, 15, 4097, -64, 64.0, "64", True, None, 10**300)},
    **{f"gap {v!r:.30}": ({**GOOD, "gap": v}, "gap is") for v in
       ([float("nan"), 1], [1, float("inf")], [float("-inf"), 1], [10**400, 1], [True, 1], ["1", 1], [1], [1, 2, 3], [None, 1], None, "left", {"x": 1}, 5)},
    "overflow": (json.dumps(GOOD).replace("40.25", "1e999").encode(), "gap is"),
    **{f"slider {v}": ({**GOOD, "slider": v}, "lies outside its 64×32 px picture") for v in ([64.01, 1], [-0.01, 1], [1, 32.5], [1, -1], [1e8, 1e8])},
    "decoy outside": ({**GOOD, "decoys": [[1, 2], [65, 2]]}, "lies outside"), "decoys no list": ({**GOOD, "decoys": "two"}, "a list of"),
    "decoys flat": ({**GOOD, "decoys": [1, 2]}, "a decoy is 1"), "decoys null": ({**GOOD, "decoys": None}, "a list of"),
    "angle": ({**GOOD, "gap_angle": float("nan")}, "degrees are needed"), "angle text": ({**GOOD, "gap_angle": "5"}, "degrees are needed"),
    "flag 1": ({**GOOD, "has_noise": 1}, "true or false is needed"), "flag null": ({**GOOD, "has_rotation": None}, "true or false is needed"),
    "flag name": ({**GOOD, "has_a b": True}, "no name for a flag"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_reported_and_never_used(split, caplog, name):
    line, reason = BAD_LINES[name]
    if isinstance(line, dict) and line.get("image") == GOOD["image"] and name != "same": line = {**line, "image": "images/1.png"}
    if isinstance(line, bytes): line = line.replace(b"images/0.png", b"images/1.png")
    write_lines(split, [GOOD, line, {**GOOD, "image": "images/2.png"}])
    expect_rejected(split, 2, reason, caplog)


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf%s\n%s\n%s", b"%s\r\n%s\r\n%s\r\n", b"\n\n%s\n  \n%s\n\t\r\n%s", b"\xef\xbb\xbf\r\n%s\n%s\n%s\n\n"],
                         ids=["byte-order mark", "CRLF", "empty lines", "mark alone"])
def test_lines_as_editors_write_them(split, text):
    (split / "labels.jsonl").write_bytes(text % tuple(json.dumps({**GOOD, "image": f"images/{i}.png"}).encode() for i in range(3)))
    assert len(load(split)) == 3
    assert not (split / "rejected.jsonl").exists()


def test_points_may_lie_on_the_border_and_names_may_be_of_any_language(split):
    name = "images/капча 图 ı.png"
    grey(9).save(split / name)
    write_lines(split, [{**GOOD, "image": name, "gap": [0, 0], "slider": [64, 32], "comment": {"free": [1]}}])
    sample = load(split)[0]
    assert sample["gap_coords"].tolist() == [0, 0] and sample["slider_coords"].tolist() == [128, 64]
    assert sample["has_rotation"] is False and sample["has_noise"] is False   # these two are always there


def test_many_bad_samples_are_counted_and_ten_are_shown(split):
    write_lines(split, [b"?"] * 25 + [{**GOOD, "image": f"images/{i}.png"} for i in range(3)])
    with pytest.raises(UserError, match="25 bad samples") as error: load(split)
    assert str(error.value).count("not JSON") == 10 and "and 15 more" in str(error.value)
    assert len(load(split, "skip")) == 3 and len((split / "rejected.jsonl").read_text().splitlines()) == 25
    write_lines(split, [GOOD])
    assert len(load(split, "skip")) == 1 and not (split / "rejected.jsonl").exists()   # an old list is no news


def test_empty_splits(split):
    with pytest.raises(UserError, match="no such folder; .* needs one named 'train'"): CaptchaDataset(split.parent, "train")
    for text in (b"", b"\n \n", b"\xef\xbb\xbf"):
        (split / "labels.jsonl").write_bytes(text)
        with pytest.raises(UserError, match="labels.jsonl: no usable sample"): load(split)
    write_lines(split, [b"?"])
    with pytest.raises(UserError, match="no usable sample"): load(split, "skip")
    assert (split / "rejected.jsonl").exists()
    (split / "labels.jsonl").unlink()
    with pytest.raises(UserError, match="labels.jsonl: no such file"): load(split)
    with pytest.raises(UserError, match="must be 'raise' or 'skip'"): load(split, "ignore")


def test_no_more_flags_than_a_table_can_hold(split):
    write_lines(split, [{**GOOD, **{f"has_{i}": True for i in range(62)}}])
    sample = load(split)[0]
    assert sample["has_61"] is True and sample["has_noise"] is False
    write_lines(split, [{**GOOD, **{f"has_{i}": True for i in range(63)}}])
    with pytest.raises(UserError, match="labels.jsonl:1: more than 64 different"): load(split)


def test_flags_that_only_some_lines_have(split):
    write_lines(split, [{**GOOD, "has_b": True}, {**GOOD, "image": "images/1.png", "has_a": True, "has_b": False}, {**GOOD, "image": "images/2.png"}])
    dataset = load(split)
    assert dataset.flags == ["has_a", "has_b", "has_noise", "has_rotation"]
    assert [[dataset[i][f] for f in dataset.flags] for i in range(3)] == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert torch.utils.data.default_collate([dataset[i] for i in range(3)])["has_b"].tolist() == [True, False, False]


def test_a_hundred_thousand_lines_stream_into_little_memory(tmp_path):
    code = """if True:
        import json, resource, sys
        from captcha_hrnet.data import LabelTable
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
        before, n = peak(), 100_000
        table = LabelTable(sys.argv[1])
        size = sum(len(a)*a.itemsize for a in vars(table).values() if hasattr(a, 'itemsize')) + len(table.names)
        print(json.dumps(dict(n=len(table), peak=(peak() - before)/n, kept=size/n, name=table.name(n - 1), last=table[n - 1]['decoys'].tolist())))"""
    with open(tmp_path / "labels.jsonl", "w") as file:
        for i in range(100_000):
            file.write(json.dumps(dict(image=f"images/{i:06}.png", width=640, height=320, gap=[400.125 + i % 7, 99.5], slider=[31.0625, 99.5],
                                       decoys=[[i % 100, 50.5]], has_rotation=i % 2 == 0)) + "\n")
    found = json.loads(subprocess.run([sys.executable, "-c", code, tmp_path / "labels.jsonl"], capture_output=True, text=True, check=True).stdout)
    assert (found["n"], found["name"], found["last"]) == (100_000, "images/099999.png", [[99, 50.5]])
    assert found["kept"] < 150 and found["peak"] < 500, found   # bytes a sample; the peak has the names seen so far


# ── pictures ───────────────────────────────────────────────────────────────────────────────────────────────────────

def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT"


def noise(size=(64, 32)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def saved(path, image=None, kind="PNG", cut=None, **options):
    (image or noise()).save(path, kind, **options)
    if cut: path.write_bytes(path.read_bytes()[:-cut])


TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"   # orientation 6: turn me clockwise


def linked(path, target):
    target.parent.mkdir(exist_ok=True)
    noise().save(target, "PNG")
    path.symlink_to(target)


BAD_PICTURES = {   # puts a file in place of images/1.png → what is said about it
    "30,000 × 30,000 px": (lambda p: p.write_bytes(png_header(30_000, 30_000)), "900000000 pixels"),
    "10,000 × 10,000 px": (lambda p: p.write_bytes(png_header(10_000, 10_000)), "10000×10000 px; sides of 16 to 4096"),
    "one side too long": (lambda p: saved(p, grey(1, 4097, 16)), "4097×16 px; sides of"), "1 pixel": (lambda p: saved(p, grey(1, 1, 1)), "1×1 px; sides of"),
    "truncated JPEG": (lambda p: saved(p, kind="JPEG", cut=200), "not a readable picture"), "truncated PNG": (lambda p: saved(p, cut=3000), "not a readable"),
    "header alone": (lambda p: p.write_bytes(png_header(64, 32)), "not a readable"), "empty": (lambda p: p.write_bytes(b""), "not a readable picture"),
    "web page": (lambda p: p.write_text("<html>404</html>"), "not a readable picture"), "EPS": (lambda p: saved(p, kind="EPS"), "not a readable picture"),
    "missing": (lambda p: None, "no such file"), "a folder": (lambda p: p.mkdir(), "no such file"), "a pipe": (lambda p: os.mkfifo(p), "no such file"),
    "size that lies": (lambda p: saved(p, grey(1, 65, 32)), "is 65×32 px; its label says 64×32"),
    "turned": (lambda p: saved(p, kind="JPEG", exif=TURNED), "is 32×64 px; its label says 64×32"),
    "float TIFF": (lambda p: saved(p, Image.fromarray(np.ones((32, 64), np.float32)), "TIFF"), "more than 16 bits"),
    "32-bit TIFF": (lambda p: saved(p, Image.fromarray(np.full((32, 64), 2**30, np.int32)), "TIFF"), "more than 16 bits"),
    "link that leaves": (lambda p: linked(p, p.parents[3] / "elsewhere" / "x.png"), "a link that leaves the data folder"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_picture_is_reported_and_never_used(split, caplog, name):
    put, reason = BAD_PICTURES[name]
    (split / "images/1.png").unlink()
    put(split / "images/1.png")
    start = time.perf_counter()
    expect_rejected(split, 2, reason, caplog)
    assert time.perf_counter() - start < 2
    cache = split.parent / "cache"
    for _ in range(2):   # with a cache the verdict is the same, found or remembered
        with pytest.raises(UserError, match="labels.jsonl:2: "): load(split, cache=cache)
        assert load(split, "skip", cache=cache).rows.tolist() == [0, 2]


def test_links_inside_the_data_folder_are_followed(split):
    (split / "images/1.png").unlink()
    linked(split / "images/1.png", split.parent / "shared" / "x.png")
    os.symlink(split.parent, split.parents[1] / "alias")
    assert len(CaptchaDataset(split.parents[1] / "alias", "val")) == 3


GREY = np.arange(64 * 32, dtype=np.uint16).reshape(32, 64) * 32
GOOD_PICTURES = {
    "16-bit": (Image.fromarray(GREY), "PNG", {}, lambda a: np.array_equal(a[..., 0], GREY >> 8)),
    "dark 16-bit": (Image.fromarray(GREY // 512), "PNG", {}, lambda a: a.max() == 0),          # not stretched, not taken for 8-bit
    "grey": (Image.fromarray((GREY >> 8).astype(np.uint8)), "PNG", {}, lambda a: np.array_equal(a[..., 2], GREY >> 8)),
    "black and white": (Image.fromarray(GREY > 9000), "PNG", {}, lambda a: set(a.ravel()) == {0, 255}),
    "palette": (noise().quantize(16), "PNG", {}, lambda a: np.array_equal(a, np.asarray(noise().quantize(16).convert("RGB")))),
    "palette with a transparent colour": (Image.new("P", (64, 32)), "PNG", dict(transparency=0), lambda a: a.min() == 255),
    "alpha": (Image.new("RGBA", (64, 32), (200, 0, 0, 51)), "PNG", {}, lambda a: a[0, 0].tolist() == [244, 204, 204]),
    "grey with alpha": (Image.new("LA", (64, 32), (7, 0)), "PNG", {}, lambda a: a.min() == 255),
    "CMYK": (Image.new("CMYK", (64, 32), (0, 255, 255, 0)), "JPEG", {}, lambda a: a[0, 0, 0] > 240 and a[0, 0, 1] < 15),
    "WebP": (noise(), "WEBP", dict(lossless=True), lambda a: np.array_equal(a, np.asarray(noise()))),
    "BMP": (noise(), "BMP", {}, lambda a: np.array_equal(a, np.asarray(noise()))),
    "animated GIF": (grey(10), "GIF", dict(save_all=True, append_images=[grey(200)]), lambda a: a.max() == 10),
    "turned by EXIF": (grey(0, 32, 64), "JPEG", dict(exif=TURNED), lambda a: True),
}


@pytest.mark.parametrize("name", GOOD_PICTURES)
def test_pictures_of_every_kind_load(split, name):
    image, kind, options, is_right = GOOD_PICTURES[name]
    saved(split / "images/1.png", image, kind, **options)   # the content counts, not the suffix
    pixels = read_image(split / "images/1.png")
    assert pixels.shape == (32, 64, 3) and pixels.dtype == np.uint8 and is_right(pixels)
    sample = load(split)[1]
    assert sample["image"].shape == (4, 64, 128) and sample["image"].dtype == torch.uint8


def test_exif_turns_the_picture_that_people_see(tmp_path):
    half = np.zeros((40, 60, 3), np.uint8)
    half[:, :30] = 255                                                         # the stored left half is bright
    for orientation, bright in {1: (20, 5), 2: (20, 55), 3: (20, 55), 6: (5, 20), 8: (55, 20)}.items():
        exif = Image.Exif()
        exif[274] = orientation
        saved(tmp_path / "x.png", Image.fromarray(half), exif=exif)
        assert read_image(tmp_path / "x.png")[bright][0] == 255, orientation


def test_a_picture_that_changes_in_mid_run_stops_it(split):
    dataset = load(split)
    saved(split / "images/1.png", grey(1, 128, 64))
    with pytest.raises(UserError, match="1.png is 128×64 px; its label says 64×32"): dataset[1]
    (split / "images/1.png").unlink()
    with pytest.raises(UserError, match="1.png: no such file"): list(DataLoader(dataset, batch_size=3, num_workers=1))


# ── fuzzing ────────────────────────────────────────────────────────────────────────────────────────────────────────

ANYTHING = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
                        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)
POINT = st.lists(st.floats(-10, 80) | st.integers(-10, 80), min_size=2, max_size=2)
RECORD = st.fixed_dictionaries({}, optional=dict(
    image=st.sampled_from(["images/0.png", "images/9.png", "../x", "/x"]) | ANYTHING, width=st.sampled_from([64, 65]) | ANYTHING,
    height=st.just(32) | ANYTHING, gap=POINT | ANYTHING, slider=POINT | ANYTHING, decoys=st.lists(POINT, max_size=6) | ANYTHING,
    gap_angle=st.floats() | ANYTHING, has_noise=st.booleans() | ANYTHING, shape=ANYTHING))


@given(record=RECORD | ANYTHING)
@settings(QUICK, max_examples=100)
def test_any_record_is_good_or_has_reasons(record):
    problems = check_record(record)
    assert all(isinstance(p, str) and len(p) < 600 and p.isprintable() for p in problems)
    if problems: return
    label = dict(gap=record["gap"], slider=record["slider"], decoys=record.get("decoys", []), gap_angle=record.get("gap_angle", 0), flags={})
    sample = make_sample(np.zeros((record["height"], record["width"], 3), np.uint8), label, 0, 128, 64)
    for key, size in (("gap_coords", 2), ("slider_coords", 2)):
        assert sample[key].shape == (size,) and (sample[key] >= 0).all() and (sample[key] <= torch.tensor([128, 64])).all()


def mutate(blob, edits):
    for where, cut, put in edits:
        at = int(where * len(blob))
        blob = blob[:at] + put + blob[at + cut:]
    return blob


TOKENS = [b"NaN", b"\n", b"{", b"]", b"-", b"e9", b"\\ud800", b'"']
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=6) | st.sampled_from(TOKENS)), min_size=1, max_size=5)


@given(edits=EDITS)
@settings(QUICK, max_examples=100)
def test_damaged_labels_raise_user_errors_only(split, edits):
    lines = [{**GOOD, "image": f"images/{i}.png", "decoys": [[1, 2.5]], "has_noise": True, "gap_angle": 3} for i in range(3)]
    (split / "labels.jsonl").write_bytes(mutate(b"\n".join(json.dumps(x).encode() for x in lines), edits))
    table = LabelTable(split / "labels.jsonl")
    try: kept = len(load(split))
    except UserError: kept = None
    try: skipping = load(split, "skip")
    except UserError as error: assert "no usable sample" in str(error)
    else:
        assert kept in (None, len(skipping)) and len(skipping) <= len(table)
        for i in range(len(skipping)): assert torch.isfinite(skipping[i]["gap_coords"]).all()


@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]), edits=EDITS)
@settings(QUICK, max_examples=100)
@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_raise_user_errors_only(tmp_path, kind, edits):
    path = tmp_path / "x"
    noise((40, 20)).save(path, kind)
    path.write_bytes(mutate(path.read_bytes(), edits))
    try: pixels = read_image(path)
    except UserError as error: assert str(path) in str(error)
    else: assert pixels.dtype == np.uint8 and pixels.ndim == 3 and 16 <= min(pixels.shape[:2])


# ── sources and orders ─────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A set that the generator's command wrote: 12 training and 5 validation samples."""
    folder = tmp_path_factory.mktemp("written")
    synth.main(out=str(folder), train=12, val=5, seed=5, workers=1)
    return folder


def config_of(source="synthetic", root=None, workers=0, cache=None, **data):
    return Config(seed=5, data=dict(source=source, root=str(root or "data"), train_samples=12, val_samples=5, cache=cache and str(cache), **data),
                  train=dict(batch_size=4, num_workers=workers, prefetch=2), eval=dict(batch_size=2))


@pytest.mark.parametrize("mode", ["train", "val"])
def test_a_written_set_gives_what_the_generator_gives(written, mode):
    read, drawn = (DataPipeline(config_of(source, written)).dataset(mode) for source in ("directory", "synthetic"))
    assert len(read) == len(drawn) and read.flags == drawn.flags
    for i in range(len(read)):
        one, two = read[i], drawn[i]
        assert one.keys() == two.keys() and torch.equal(one["image"], two["image"]) and torch.equal(one["letterbox"], two["letterbox"])
        assert all(one[f] is two[f] for f in read.flags) and torch.equal(one["decoy_mask"], two["decoy_mask"])
        for key in ("gap_coords", "slider_coords", "decoys"): assert (one[key] - two[key]).abs().max() < 5e-4   # labels have four digits
        assert abs(one["gap_angle"] - two["gap_angle"]) < 1e-4


def test_captchas_of_other_generators_come_back_to_their_own_pixels():
    dataset, lines = CaptchaDataset(FOREIGN, "val"), [json.loads(x) for x in (FOREIGN / "val/labels.jsonl").read_text().splitlines()]
    assert len(dataset) == len(lines) == 2
    for i, line in enumerate(lines):
        sample = dataset[i]
        assert sample["letterbox"][4:].tolist() == [line["width"], line["height"]]
        for key in ("gap", "slider"): assert np.abs(unletterbox(sample[f"{key}_coords"], sample["letterbox"]).numpy() - line[key]).max() < 1e-4
    records = [{k: line[k] for k in ("image", "width", "height", "gap", "slider")} for line in lines]
    assert [dict(image=dataset.labels.name(i), width=w, height=h, gap=list(dataset.labels[i]["gap"]), slider=list(dataset.labels[i]["slider"]))
            for i, (w, h) in enumerate(map(dataset.labels.size, range(2)))] == records


def batches(loader): return [{key: value.clone() for key, value in batch.items()} for batch in loader]


@pytest.mark.parametrize("source", ["synthetic", "directory", "cached"])
def test_the_same_bytes_in_any_worker_order_and_position(written, tmp_path, source):
    more = dict(source="directory", root=written, cache=tmp_path) if source == "cached" else dict(source=source, root=written)
    alone, helped = (DataPipeline(config_of(workers=workers, **more)).setup() for workers in (0, 2))
    for pipeline in (alone, helped): pipeline.batches.set_position(3)
    whole = batches(alone.train_loader)
    assert len(whole) == 3 and all(map(same, whole, batches(helped.train_loader)))
    helped.batches.set_position(3, 2)                             # resumed before the last step
    rest = batches(helped.train_loader)
    assert len(rest) == 1 and same(rest[0], whole[2])
    dataset = alone.train_loader.dataset
    for row in (3, 0):                                            # asked for by itself, backwards
        index = int(whole[1]["index"][row])
        one = dataset[index]
        assert one["index"] == index and torch.equal(one["image"], whole[1]["image"][row]) and torch.equal(one["gap_coords"], whole[1]["gap_coords"][row])
    assert all(map(same, batches(alone.val_loader), batches(helped.val_loader)))
    alone.batches.set_position(4)
    assert not torch.equal(next(iter(alone.train_loader))["index"], whole[0]["index"])


def test_training_and_validation_share_nothing():
    config = config_of()
    seen = [{SyntheticDataset(config, mode)[i]["image"].numpy().tobytes() for i in range(12)} for mode in ("train", "val")]
    assert len(seen[0]) == len(seen[1]) == 12 and not seen[0] & seen[1]


@given(length=st.integers(1, 60), batch=st.integers(1, 7), world=st.integers(1, 4), epoch=st.integers(0, 5), passes=st.integers(1, 3))
@QUICK
def test_an_epoch_of_several_passes(length, batch, world, epoch, passes):
    "Pass by pass the orders of so many epochs of one, cut into batches across their ends; each sample comes once in each."
    if length * passes < batch * world: return
    several, single = TrainBatches(length, batch, 1, False, 0, world, passes), TrainBatches(length, 1, 1, False)
    several.set_position(epoch)
    orders = []
    for k in range(passes): single.set_position(epoch * passes + k); orders += single.order().tolist()
    assert several.order().tolist() == orders and len(several) == len(list(several)) == length * passes // (batch * world)
    assert (np.bincount(orders, minlength=length) == passes).all()


@given(length=st.integers(1, 60), batch=st.integers(1, 7), world=st.integers(1, 4), epoch=st.integers(0, 5), endless=st.booleans())
@QUICK
def test_processes_share_an_epoch_without_overlap(length, batch, world, epoch, endless):
    evaluated = sorted(i for rank in range(world) for b in EvalBatches(length, batch, rank, world) for i in b)
    assert evaluated == list(range(length))
    if length < batch * world: return
    samplers = [TrainBatches(length, batch, 1, endless, rank, world) for rank in range(world)]
    for s in samplers: s.set_position(epoch)
    trained = [i for s in samplers for b in s for i in b]
    assert len(trained) == len(set(trained)) == length // (batch * world) * batch * world
    assert set(trained) <= set(range(epoch * length, (epoch + 1) * length) if endless else range(length))


def test_pictures_without_a_gap_or_a_slider(tmp_path):
    "Drawn, written, read, packed and exchanged as COCO: NaN, and never by mistake."
    config = config_of("directory", tmp_path / "data", max_decoys=2).override("synth.no_gap=0.5", "synth.no_slider=0.5")
    synth.write_dataset(config.synth, config.seed, tmp_path / "data", 12, 12, workers=1)
    read = DataPipeline(config).dataset("val")
    drawn = SyntheticDataset(config, "val")
    quick = PackedDataset(read, tmp_path / "cache")
    kinds = set()
    for i in range(12):
        a, b, c = read[i], drawn[i], quick[i]
        for key in ("gap_coords", "slider_coords"): assert torch.allclose(a[key], b[key], atol=1e-3, equal_nan=True) and torch.equal(a[key].isnan(), c[key].isnan())
        kinds.add((bool(a["gap_coords"].isnan().all()), bool(a["slider_coords"].isnan().all())))
    assert len(kinds) == 4
    records = [json.loads(line) for line in (tmp_path / "data/val/labels.jsonl").read_text().splitlines()]
    write_coco(tmp_path / "a.json", records)
    assert read_coco(tmp_path / "a.json") == records
    for wrong in (dict(gap=None), dict(no_gap=True), dict(gap=None, no_gap=1), dict(gap=None, no_gap=True, slider=None)):
        assert check_record({**GOOD, **wrong}), wrong


# ── the cache ──────────────────────────────────────────────────────────────────────────────────────────────────────

def packed(split, **more):
    cache = split.parent / "cache"
    return PackedDataset(load(split, cache=cache, **more), cache)


def inode(dataset): return dataset.path.name, dataset.path.stat().st_ino


def test_a_cache_holds_what_the_pictures_give(split):
    write_lines(split, [{**GOOD, "image": f"images/{i}.png", "decoys": [[i, 5]] * i, "gap_angle": i / 7, "has_x": i == 1} for i in range(3)])
    plain, quick = load(split), packed(split)
    assert len(quick) == 3 and quick.flags == plain.flags and quick.name(1) == plain.name(1)
    assert all(same(plain[i], quick[i]) for i in (2, 0, 1))
    for i in (-1, 3):
        with pytest.raises(IndexError): quick[i]
    assert inode(packed(split)) == inode(quick)                                        # opened, not built
    spawned = DataLoader(quick, batch_size=3, num_workers=1, multiprocessing_context="spawn")
    assert same(next(iter(spawned)), next(iter(DataLoader(plain, batch_size=3))))
    none = PackedDataset(CaptchaDataset(split.parent, "val", 128, 64, max_decoys=0), split.parent / "cache")
    assert none[1]["decoys"].shape == (0, 2) and not quick.path.exists()               # its place was taken
    assert same(next(iter(DataLoader(quick, batch_size=3, num_workers=1))), next(iter(DataLoader(plain, batch_size=3))))   # but who has it keeps it


def test_a_cache_is_built_again_when_anything_changed(split):
    def touched(): os.utime(split / "images/2.png", (1, 1))
    def relabelled(): write_lines(split, [{**GOOD, "image": f"images/{i}.png", "gap": [41, 16]} for i in range(3)])
    def exchanged(): saved(split / "images/0.png", grey(222))
    before = packed(split)
    for change in (touched, relabelled, exchanged):
        change()
        now = packed(split)
        assert now.path != before.path and all(same(now[i], load(split)[i]) for i in range(3)), change
        assert len(list(now.path.parent.glob("packed-*"))) == len(list(now.path.parent.glob("checked-*"))) == 1   # the old ones are gone
        before = now
    larger = PackedDataset(CaptchaDataset(split.parent, "val", 256, 128), split.parent / "cache")
    assert larger[0]["image"].shape == (4, 128, 256) and before.path.exists()          # another input size stands beside it


def test_a_cache_whose_content_is_wrong_is_built_again(split):
    whole = packed(split).path.read_bytes()
    for damage in (b"", whole[:50], whole[:-1], whole[:300] + b"\xff" * 1000 + whole[1300:], whole[:-40] + b"\x01" * 40):
        path = packed(split).path
        path.unlink()
        path.write_bytes(damage)
        now = packed(split)
        assert all(same(now[i], load(split)[i]) for i in range(3)) and now.path.read_bytes() == whole


def test_pictures_are_not_decoded_while_nothing_changed(split, monkeypatch):
    packed(split)
    looked = []
    monkeypatch.setattr(module, "read_image", lambda path: looked.append(path) or read_image(path))
    packed(split)
    assert len(looked) <= 4            # the spot check, not the whole set
    write_lines(split, [b"?", GOOD])
    with pytest.raises(UserError, match="labels.jsonl:1: not JSON"): packed(split)   # labels are checked each time


def test_a_full_disk_is_an_error_and_leaves_nothing(split, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(UserError, match="GB are free: name another data.cache"): packed(split)
    assert not list((split.parent / "cache").glob("packed-*"))


def _slow_build(folder, note):
    def make(file):
        with open(note, "a") as told: told.write("x")
        file.write(b"ab")
        file.flush()
        time.sleep(0.3)
    cached_file(folder, "thing", "key", make)


def test_processes_that_want_the_same_file_build_it_once(tmp_path):
    workers = [multiprocessing.get_context("fork").Process(target=_slow_build, args=(tmp_path / "c", tmp_path / "note")) for _ in range(4)]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    assert [w.exitcode for w in workers] == [0] * 4 and (tmp_path / "note").read_text() == "x"
    assert (tmp_path / "c/thing-key").read_bytes() == b"ab"


def _slow_read(folder, key):
    def read(path): time.sleep(0.1); return path.read_bytes()
    assert cached_file(folder, "thing", key, lambda file: file.write(key.encode()), read=read) == key.encode()


def test_processes_that_want_other_files_of_one_name_get_their_own(tmp_path):
    "Two runs with one cache and other settings: each removes the other's file, and neither before it is read."
    workers = [multiprocessing.get_context("fork").Process(target=_slow_read, args=(tmp_path, key)) for key in "abcabc"]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    assert [w.exitcode for w in workers] == [0] * 6 and len(list(tmp_path.glob("thing-*"))) == 1


def test_a_builder_that_is_killed_leaves_no_half_file_and_no_lock(tmp_path):
    def forever(folder): cached_file(folder, "thing", "key", lambda file: (file.write(b"half"), file.flush(), time.sleep(60)))
    worker = multiprocessing.get_context("fork").Process(target=forever, args=(tmp_path,))
    worker.start()
    while not list(tmp_path.glob("*.tmp")): time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert not (tmp_path / "thing-key").exists()
    assert cached_file(tmp_path, "thing", "key", lambda file: file.write(b"whole")).read_bytes() == b"whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "thing-key"]


def test_the_generators_validation_set_is_cached_and_its_training_set_is_not(tmp_path):
    train, val = (DataPipeline(config_of(cache=tmp_path)).dataset(mode) for mode in ("train", "val"))
    assert isinstance(train, SyntheticDataset) and isinstance(val, PackedDataset)
    drawn = SyntheticDataset(config_of(), "val")
    assert len(val) == 5 and all(same(val[i], drawn[i]) for i in range(5))
    assert inode(DataPipeline(config_of(cache=tmp_path)).dataset("val")) == inode(val)
    other = DataPipeline(config_of(cache=tmp_path).override("seed=6")).dataset("val")
    assert other.path != val.path and not same(other[0], drawn[0])


def test_a_packed_loader_gives_what_a_loader_gives(written, tmp_path, monkeypatch):
    plain, quick = (DataPipeline(config_of("directory", written, cache=cache)).setup() for cache in (None, tmp_path))
    for ours, theirs in ((quick.train_loader, plain.train_loader), (quick.val_loader, plain.val_loader)):
        for epoch, step in ((0, 0), (1, 0), (1, 2)):
            for loader in (ours, theirs):
                if hasattr(loader.batch_sampler, "set_position"): loader.batch_sampler.set_position(epoch, step)
            batches = list(ours)
            assert len(batches) == len(list(theirs)) > 0 and all(map(same, batches, theirs))
    for batch in quick.val_loader: break
    assert same(batch, next(iter(plain.val_loader))) and "ThreadPool" not in str(threading.enumerate())   # left early: no thread stays
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **more: empty(*size, **more))             # no GPU here
    assert same(quick.val_loader.dataset.batch([1, 0], pin_memory=True), quick.val_loader.dataset.batch([1, 0]))
    with pytest.raises(IndexError): next(iter(PackedLoader(quick.val_loader.dataset, batch_sampler=[[0, 99]])))
    assert loader_speed(quick.train_loader, 0.1) > 0


# ── COCO keypoints ─────────────────────────────────────────────────────────────────────────────────────────────────

COORDINATES = st.tuples(st.floats(0, 64), st.floats(0, 32)).map(list)
COCO_RECORD = st.fixed_dictionaries(
    dict(image=st.uuids().map(lambda u: f"images/{u}.png"), width=st.just(64), height=st.just(32), gap=COORDINATES, slider=COORDINATES),
    optional=dict(decoys=st.lists(COORDINATES, max_size=3), gap_angle=st.floats(-180, 180), has_noise=st.booleans(), shape=st.text(max_size=9)))


@given(records=st.lists(COCO_RECORD, min_size=1, max_size=4, unique_by=lambda r: r["image"]))
@QUICK
def test_coco_there_and_back_is_exact(tmp_path, records):
    write_coco(tmp_path / "a.json", records, gap="hole", slider="piece")
    assert read_coco(tmp_path / "a.json", gap="hole", slider="piece") == records
    write_coco(tmp_path / "a.json", records, origin="centre")
    for record, read in zip(records, read_coco(tmp_path / "a.json", origin="centre"), strict=True):
        for x, y in zip(record["gap"] + record["slider"], read["gap"] + read["slider"], strict=True):
            assert x == y or x < 0.5 and abs(x - y) < 1e-15   # only in the first half pixel does a float have finer steps than the one 0.5 below


COCO = dict(images=[dict(id=7, file_name="a.png", width=64, height=32), dict(id="b", file_name="b.png", width=64, height=32)],
            categories=[dict(id=1, name="person", keypoints=["nose"]), dict(id=2, name="captcha", keypoints=["slider", "corner", "gap"])],
            annotations=[dict(id=1, image_id=7, category_id=2, keypoints=[8, 16, 2, 0, 0, 0, 40.5, 16, 1], attributes=dict(occluded=False, has_noise=True)),
                         dict(id=2, image_id=7, category_id=1, keypoints=[1, 1, 2]),
                         dict(id=3, image_id="b", category_id=2, keypoints=[9, 16, 2, 1, 1, 1, 30, 15.25, 2])])


def coco_file(folder, change=lambda tree: None):
    tree = json.loads(json.dumps(COCO))
    change(tree)
    (folder / "a.json").write_text(json.dumps(tree))
    return folder / "a.json"


def test_coco_as_a_labelling_tool_writes_it(tmp_path):
    first, second = read_coco(coco_file(tmp_path))
    assert first == dict(image="a.png", width=64, height=32, gap=[40.5, 16], slider=[8, 16], occluded=False, has_noise=True)
    assert (second["gap"], second["slider"]) == ([30, 15.25], [9, 16])
    assert read_coco(tmp_path / "a.json", origin="centre")[0]["gap"] == [41, 16.5]     # counted from the first pixel's centre


@pytest.mark.parametrize("change, reason", [
    (lambda t: t["annotations"][0]["keypoints"].pop(), "annotation 1: 8 numbers as keypoints; x, y, visibility of slider, corner, gap"),
    (lambda t: t["annotations"][0]["keypoints"].__setitem__(8, 0), "annotation 1: gap is not marked"),
    (lambda t: t["annotations"][0]["keypoints"].__setitem__(6, 65), "annotation 1: gap [65.0, 16.0] lies outside its 64×32 px picture"),
    (lambda t: t["annotations"][0]["keypoints"].__setitem__(6, float("nan")), "annotation 1: gap is [nan"),
    (lambda t: t["annotations"][0]["keypoints"].__setitem__(6, "4"), "annotations id 1 keypoints 6: Input should be a valid number"),
    (lambda t: t["annotations"][0].pop("image_id"), "annotations id 1 image_id: Field required"),
    (lambda t: t["annotations"][2].update(image_id=99), "annotation 3: image_id 99 is not among the images"),
    (lambda t: t["annotations"][2].update(image_id=7), "annotation 3: a second one for the same picture"),
    (lambda t: t["annotations"].pop(2), "image b (b.png): no annotation"),
    (lambda t: t["annotations"][0]["attributes"].update(has_noise="yes"), "annotation 1: has_noise is 'yes'; true or false"),
    (lambda t: t["annotations"][0]["attributes"].update(decoys=[1]), "annotation 1: a decoy is 1"),
    (lambda t: t["images"][0].update(file_name="../../x"), "annotation 1: image '../../x' leaves the data folder"),
    (lambda t: t["images"][1].update(file_name="a.png"), "images: the same file_name twice"),
    (lambda t: t["images"][1].update(id=7), "images: the same id twice"),
    (lambda t: t["images"].__setitem__(0, 3), "images 0: Input should be"),
    (lambda t: t["categories"].pop(1), "no category has keypoints named 'gap' and 'slider'"),
    (lambda t: t.pop("annotations"), "annotations: Field required"),
], ids=range(17))
def test_coco_mistakes_name_file_annotation_and_reason(tmp_path, change, reason):
    with pytest.raises(UserError) as error: read_coco(coco_file(tmp_path, change))
    assert f"{tmp_path / 'a.json'}: {reason}" in str(error.value)


@given(edits=EDITS)
@settings(QUICK, max_examples=100)
def test_damaged_coco_files_raise_user_errors_only(tmp_path, edits):
    path = coco_file(tmp_path)
    path.write_bytes(mutate(path.read_bytes(), edits))
    try: records = read_coco(path, origin="centre")
    except UserError as error: assert str(path) in str(error)
    else: assert all(not check_record(r) for r in records)


def test_coco_refuses_what_it_cannot_write_or_read(tmp_path):
    with pytest.raises(UserError, match="record 1 .*lies outside"): write_coco(tmp_path / "a.json", [GOOD, {**GOOD, "gap": [99, 9]}])
    for origin in ("center", "", None):
        with pytest.raises(UserError, match="must be corner or centre"): read_coco(coco_file(tmp_path), origin=origin)
    with pytest.raises(UserError, match="cannot be read"): read_coco(tmp_path / "none.json")
    for content in (b"[" * 99999, b"[]", b"3", b"\xff\xfe", b""):
        (tmp_path / "b.json").write_bytes(content)
        with pytest.raises(UserError, match="b.json"): read_coco(tmp_path / "b.json")


def test_command_line(split, tmp_path, capsys):
    run = lambda *argv: run_command(module.main, [str(a) for a in argv])
    os.makedirs(tmp_path / "tool/images/default")
    for name in "ab": shutil.copy(split / "images/0.png", tmp_path / f"tool/images/default/{name}.png")
    coco = coco_file(tmp_path / "tool")
    arguments = "--read", coco, "--images", tmp_path / "tool/images/default", "--data", tmp_path / "new"
    assert run(*arguments) == 0 and "new/train: 2 samples" in capsys.readouterr().out
    assert CaptchaDataset(tmp_path / "new", "train").flags == ["has_noise", "has_rotation"]
    assert run(*arguments) == 1 and "error: " in capsys.readouterr().err                                       # is there already
    assert run("--write", tmp_path / "out.json", "--data", tmp_path / "new", "--gap", "hole") == 0
    assert read_coco(tmp_path / "out.json", gap="hole")[0]["gap"] == [40.5, 16]
    saved(tmp_path / "tool/images/default/b.png", grey(1, 65, 32))
    assert run(*arguments, "--split", "other") == 1 and "b.png is 65×32 px" in capsys.readouterr().err
    assert not (tmp_path / "new/other").exists()                                                               # nothing is half done
    capsys.readouterr()
    assert run("--write", tmp_path / "no/c.json", "--data", tmp_path / "new") == 1 and f"{tmp_path}/no/c.json: " in capsys.readouterr().err   # not a temporary name
    (tmp_path / "empty.json").write_text(json.dumps(json.loads(coco.read_text()) | dict(images=[], annotations=[])))
    assert run("--read", tmp_path / "empty.json", "--data", tmp_path / "none") == 1 and "empty.json: no image in it" in capsys.readouterr().err
    assert run() == 1 and run("--read", "x", "--write", "y") == 1 and run("--write", "x", "--data", tmp_path / "no") == 1
    with pytest.raises(SystemExit) as status: run("--origin", "middle")
    assert status.value.code == 2


def test_flags_of_any_language_are_packed(split):
    write_lines(split, [GOOD | {"has_旋转": True}])
    packed_one = packed(split)[0]
    assert packed_one["has_旋转"] == load(split)[0]["has_旋转"] and same(packed_one, load(split)[0])


def test_a_picture_that_is_there_is_not_overwritten(split, tmp_path, capsys):
    write_coco(tmp_path / "labels.json", [dict(GOOD, image="0.png")])
    (tmp_path / "new/train/images").mkdir(parents=True)
    (tmp_path / "new/train/images/0.png").write_text("precious")
    run = lambda: run_command(module.main, ["--read", str(tmp_path / "labels.json"), "--images", str(split / "images"), "--data", str(tmp_path / "new")])
    assert run() == 1 and "is there already, and another picture" in capsys.readouterr().err
    assert (tmp_path / "new/train/images/0.png").read_text() == "precious" and not (tmp_path / "new/train/labels.jsonl").exists()
    shutil.copy(split / "images/0.png", tmp_path / "new/train/images/0.png")
    assert run() == 0   # the same picture


def test_whole_numbers_that_may_be_8_or_16_bits_are_refused(tmp_path):
    grey(200).convert("I").save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif: not a readable picture .*none above 255"): read_image(tmp_path / "a.tif")
    Image.fromarray(np.full((32, 64), 200 * 256, np.int32)).save(tmp_path / "b.tif")
    assert (read_image(tmp_path / "b.tif") == 200).all()


def test_two_pictures_of_one_name_are_not_imported(tmp_path, capsys):
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    for name in ("a.png", "images/a.png"): saved(folder / name, grey(9))
    records = [dict(GOOD, image=name) for name in ("a.png", "images/a.png")]
    write_coco(folder / "labels.json", records)
    assert run_command(module.main, ["--read", str(folder / "labels.json"), "--data", str(tmp_path / "data")]) == 1
    assert "a.png and images/a.png would both become images/a.png" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_packing_reads_the_source_once(tmp_path, monkeypatch):
    """A second set of workers, started by mistake, would also keep the cache's lock."""
    started, iterate = [], DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", lambda loader: started.append(1) or iterate(loader))
    PackedDataset(SyntheticDataset(config_of(), "val"), tmp_path / "c", workers=1)
    assert len(started) == 1
