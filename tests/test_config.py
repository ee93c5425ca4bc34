"""Configuration: what a notebook can't hold. Fuzzing, odd files, devices that aren't here, command lines that are interrupted."""
import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captcha_hrnet import config as module
from captcha_hrnet.config import (
    CAMERA_EFFECTS,
    CONFUSIONS,
    LAYOUTS,
    OVERLAYS,
    METRICS,
    SCHEMA,
    Config,
    ConfigManager,
    UserError,
    apply_overrides,
    existing_devices,
    load_config,
    merge,
    parse_yaml,
    pick_device,
    read_mapping,
    run_command,
    save_config,
    write_atomically,
)

DEFAULT_FILE = Path(__file__).parents[1] / "configs" / "training_config.yaml"
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
    return path


def complaint(function, *args, **kwargs):
    with pytest.raises(UserError) as caught: function(*args, **kwargs)
    return str(caught.value)


def from_yaml(text): return Config.from_dict(parse_yaml(text, "text"), "f.yaml")


# ── the default file ─────────────────────────────────────────────────────────────────────────────────────────────

def test_default_file_says_every_key_and_equals_the_defaults():
    assert load_config(DEFAULT_FILE) == Config()
    tree = read_mapping(DEFAULT_FILE)
    for path, section in SCHEMA.items():
        node = tree
        for key in path: node = node[key]
        assert isinstance(node, dict) if section else True
    assert merge(tree) == Config().to_dict()


def test_default_file_comments_almost_every_key_and_stays_narrow():
    lines = DEFAULT_FILE.read_text().splitlines()
    assert max(map(len, lines)) <= 120
    keys = [line for line in lines if ":" in line and not line.lstrip().startswith("#")]
    assert sum("#" in line for line in keys) > 0.75 * len(keys)


# ── access ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_both_ways_of_access_agree_everywhere():
    config = Config()
    for path in SCHEMA:
        by_key = by_name = config
        for key in path: by_key, by_name = by_key[key], getattr(by_name, key)
        assert by_key == by_name
    assert "train" in config and "trian" not in config and dict(**config.optimizer)["lr"] == config.optimizer.lr
    with pytest.raises(KeyError): config["trian"]


def test_frozen_through_and_through():
    config = Config()
    for change in (lambda: setattr(config, "seed", 1), lambda: setattr(config.train, "batch_size", 1),
                   lambda: config.synth.shapes.update(star=0), lambda: config.synth.shapes.pop("star")):
        with pytest.raises((ValueError, TypeError)): change()
    with pytest.raises(TypeError): config.synth.shapes["star"] = 0
    assert config == Config()


def test_goes_to_worker_processes_and_back():
    config = Config().override("synth.shapes={star: 1}", "seed=3")
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert Config.from_dict(config.to_dict()) == config


def test_to_dict_is_plain_and_a_copy(tmp_path):
    tree = Config().to_dict()
    torch.save(tree, tmp_path / "c.pth")
    assert torch.load(tmp_path / "c.pth", weights_only=True) == tree
    tree["synth"]["shapes"]["star"] = 99
    assert Config().synth.shapes["star"] == 1


# ── what is refused: (yaml, words that the line must have) ────────────────────────────────────────────────────────

REFUSED = [
    ("data: {input_width: 500}", "data.input_width: value 500: must be a multiple of 32"),
    ("data: {input_height: 32}", "data.input_height: value 32: must be greater than or equal to 64"),
    ("data: {source: directory, root: null}", "data.root: value None: must name the data folder"),
    ("data: {root: ''}", "data.root: value ''"),
    ("train: {batch_size: 0}", "train.batch_size: value 0: must be greater than or equal to 1"),
    ("train: {batch_size: 8.0}", "train.batch_size: value 8.0: must be a valid integer"),
    ("train: {batch_size: '8'}", "train.batch_size: value '8': must be a valid integer"),
    ("train: {batch_size: true}", "train.batch_size: value True: must be a valid integer"),
    ("train: {batch_size: null}", "train.batch_size: value None"),
    ("train: {pin_memory: yes}", "train.pin_memory: value 'yes': must be true or false"),
    ("train: {amp: false}", "train.amp: value False: must be 'bf16', 'fp16' or 'off'"),
    ("train: {amp: bf61}", "nearest: 'bf16'"),
    ("train: {step: graphs, compile: true}", "train.step: value 'graphs': must be eager with amp fp16, compile and activation_checkpointing"),
    ("train: {step: kernels}\nmodel: {name: rep_hrnet_18}", "model.name: value 'rep_hrnet_18': must be lite_hrnet_18 or lite_hrnet_30 with train.step kernels"),
    ("train: 5", "train: value 5: must be a mapping of keys"),
    ("train:", "train: value None: must be a mapping of keys"),
    ("train: {num_worker: 3}", "train.num_worker: unknown key, nearest known: train.num_workers"),
    ("eval: {early_stopping: {second_guard: {min_dleta: 1}}}", "nearest known: eval.early_stopping.second_guard.min_delta"),
    ("epochs: 3", "epochs: unknown key, nearest known: sched.epochs"),
    ("zzzzzzzz: 3", "zzzzzzzz: unknown key"),
    ("optimizer: {lr: .nan}", "optimizer.lr: value nan: must be a finite number"),
    ("optimizer: {lr: -.inf}", "optimizer.lr: value -inf: must be"),
    ("optimizer: {lr: 1e999}", "optimizer.lr: value inf: must be a finite number"),
    ("optimizer: {lr: 0}", "optimizer.lr: value 0: must be greater than 0"),
    ("optimizer: {betas: [0.9, 1]}", "optimizer.betas.1: value 1: must be less than 1"),
    ("optimizer: {betas: [-0.1, 0.9]}", "optimizer.betas.0: value -0.1"),
    ("optimizer: {betas: 0.9}", "optimizer.betas: value 0.9: must be a list of two numbers"),
    ("optimizer: {ema_decay: 1}", "optimizer.ema_decay: value 1: must be less than 1"),
    ("sched: {warmup_epochs: 60}", "sched.warmup_epochs: value 60.0: must be less than sched.epochs (sched.epochs is 60)"),
    ("sched: {cosine_min_lr: 0.1}", "sched.cosine_min_lr: value 0.1: must be at most optimizer.lr (optimizer.lr is 0.001)"),
    ("{train: {amp: fp16}, hardware: {device: cpu}}", "train.amp: value 'fp16': must be bf16 or off on the CPU"),
    ("hardware: {device: gpu}", "hardware.device: value 'gpu': must be auto, cpu, mps, cuda or cuda:N"),
    ("hardware: {device: 'cuda:'}", "hardware.device: value 'cuda:'"),
    ("hardware: {threads: 0}", "hardware.threads: value 0"),
    ("checkpoints: {save_interval: 0}", "checkpoints.save_interval: value 0: must be greater than or equal to 1"),
    ("checkpoints: {save_dir: \"a\\0b\"}", "checkpoints.save_dir: value 'a\\x00b': must be printable text"),
    ("eval: {select_by: hit_le_4px}", "eval.select_by: value 'hit_le_4px': must be 'mae_px'"),
    ("eval: {early_stopping: {second_guard: {mode: max}}}", "second_guard.mode: value 'max': must be the way the metric gets better"),
    ("eval: {early_stopping: {second_guard: {metric: slide_hit_le_1px}}}", "second_guard.mode: value 'min': must be the way"),
    ("eval: {early_stopping: {patience: 0}}", "eval.early_stopping.patience: value 0"),
    ("synth: {shapes: {star: 0}}", "synth.shapes: value {'star': 0}: must give at least one name a weight above 0"),
    ("synth: {shapes: {}}", "synth.shapes: value {}: must give at least one name"),
    ("synth: {shapes: {star: -1}}", "synth.shapes.star: value -1: must be greater than or equal to 0"),
    ("synth: {shapes: {sta: 1}}", "synth.shapes.sta: unknown name, must be 'jigsaw'"),
    ("synth: {width: [300, 200]}", "synth.width: value [300, 200]: must be [low, high] with low not above high"),
    ("synth: {width: [200.5, 300]}", "synth.width.0: value 200.5: must be a valid integer"),
    ("synth: {decoy: {p: 2}}", "synth.decoy.p: value 2: must be less than or equal to 1"),
    ("synth: {decoy: {strength: [0.5]}}", "synth.decoy.strength: value [0.5]: must be a list of two numbers"),
    ("synth: {decoy: {prob: 0.5}}", "synth.decoy.prob: unknown key"),
    ("version: ../up", "version: value '../up': must begin with a letter or digit"),
    ("version: ..", "version: value '..'"),
    ("version: 2", "version: value 2: must be a valid string (in quotes: '2')"),
    ("seed: -1", "seed: value -1"),
    ("seed: 4294967296", "seed: value 4294967296"),
]


@pytest.mark.parametrize("text, words", REFUSED)
def test_one_clear_line(text, words):
    line = complaint(from_yaml, text)
    assert words in line and line.startswith("f.yaml: ") and "\n" not in line


def test_all_mistakes_at_once(tmp_path):
    kept = [text for text, _ in REFUSED if text.startswith(("optimizer: {lr: 0", "train: {batch_size: 0", "seed: -1", "synth: {shapes: {sta:"))]
    text = "\n".join([*kept, "sched: {warmup_epochs: 61}", "checkpoints: {save_interval: 0, keep: 1}", "modle: {}"])
    lines = complaint(load_config, write(tmp_path / "many.yaml", text)).splitlines()
    assert len(lines) == 8 and all(line.startswith(f"{tmp_path}/many.yaml: ") for line in lines)
    assert any("warmup_epochs" in line for line in lines)   # a rule, in spite of the wrong fields


def test_a_mistake_is_told_once_and_breaks_no_rule_by_its_absence():
    text = "{sched: {epochs: many, warmup_epochs: 70}, synth: {shapes: {stra: 1, star: 0}}, optimizer: {lr: 1e-7, betas: [2, 3]}}"
    lines = complaint(from_yaml, text).splitlines()
    assert sorted(line.split(":")[1].strip() for line in lines) == sorted(
        ["sched.epochs", "synth.shapes.stra", "optimizer.betas.0", "optimizer.betas.1", "sched.cosine_min_lr"])
    assert any("optimizer.lr is 1e-07" in line for line in lines)


def test_every_metric_selects_and_guards_in_its_own_direction():
    for metric, mode in METRICS.items():
        other = {"min": "max", "max": "min"}[mode]
        guard = "eval.early_stopping.second_guard"
        assert Config().override(f"eval.select_by={metric}", f"{guard}.metric={metric}", f"{guard}.mode={mode}")
        assert "the way the metric gets better" in complaint(Config().override, f"{guard}.metric={metric}", f"{guard}.mode={other}")


def test_factors_are_sections():
    assert all(SCHEMA["synth", name].__name__ == "Factor" for name in (*CONFUSIONS, *CAMERA_EFFECTS, *LAYOUTS, *OVERLAYS))


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("content, words", [
    ("", "empty"), ("# nothing\n---\n", "empty"), ("- 1", "not a list"), ("words", "not a str"), ("a: [", "not valid YAML: line 1"),
    ("a: 1\na: 2", "stands here twice"), ("train: {amp: off, 'amp': bf16}", "stands here twice"), (b"\xff\xfe\x00", "not a UTF-8"),
    (b"a\x00b: 1", "not valid YAML"), ("a: 1\n---\nb: 2", "not valid YAML"), ("a: *b", "not valid YAML"), ("1: 2", "key 1"),
    ("train: {null: 2}", "key None"), ('"\\ud800": 1', "key"), ('"a\\nb": 1', "key 'a\\nb'"), ("? [a]\n: 1", "not valid YAML"),
    ("a: !!python/name:os.system", "not valid YAML"), ("a: !!timestamp x", "not valid YAML"), ("a: !!int x", "not valid YAML"),
    ("a: !!bool maybe", "not valid YAML"), ("a: !!float ''", "not valid YAML"), ("a: !!set {x}", "not valid YAML"),
    ("seed: " + "9" * 5000, "not valid YAML"), ("a: " + "[" * 3000, "not valid YAML"), ("&a [*a]", "not a list"), ("a: &a {b: *a}", "unknown key"),
    ("train: &a {train: *a}", "unknown key"), ("<<: 3", "not valid YAML"), ("base: 3", "base: value 3: must be a path"),
    ("base: ''", "no such file"), ("base: .", "no such file"), ("base: \"a\\0\"", "must be a path"), ("base: " + "x" * 999, "no such file")])
def test_odd_files_are_one_line(tmp_path, content, words):
    line = complaint(load_config, write(tmp_path / "odd.yaml", content))
    assert words in line and "\n" not in line and "odd.yaml: " in line and len(line) < 2500


def test_places_that_are_no_files(tmp_path):
    assert "Is a directory" in complaint(load_config, tmp_path)
    assert "No such file" in complaint(load_config, tmp_path / "none.yaml")
    assert "cannot be read" in complaint(load_config, "a\0b")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    assert "cannot be read" in complaint(load_config, tmp_path / "loop.yaml")


def test_byte_order_mark_windows_lines_and_anchors(tmp_path):
    text = "\ufeffsynth:\r\n  jpeg: &f {p: 0.5, strength: [0, 1]}\r\n  blur: {<<: *f, p: 0.1}\r\n"
    synth = load_config(write(tmp_path / "a.yaml", text.encode())).synth
    assert (synth.jpeg.p, synth.blur.p, synth.blur.strength) == (0.5, 0.1, (0, 1))


def test_merged_anchor_used_before_it_is_built_is_no_duplicate():
    assert parse_yaml("{o: &o {x: 1}, z: {a: &a {<<: *o, x: 2}}, c: {<<: *a}}", "text")["c"] == {"x": 2}


# ── inheriting and overriding ────────────────────────────────────────────────────────────────────────────────────

def test_layers_and_who_is_to_blame(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "base.yaml", "{train: {batch_size: no}, synth: {shapes: {star: 1}}, optimizer: {lr: 1}}")
    child = write(tmp_path / "child.yaml", "{base: sub/base.yaml, train: {accumulate: no}, optimizer: {lr: 2e-3}}")
    lines = complaint(load_config, child, ["train.prefetch=no", "seed=x", "train.batch_size=4", "synth.gap_styles.drak=1"]).splitlines()
    assert [line.split(": ")[:2] for line in sorted(lines)] == [
        ["--set", "seed"], ["--set", "synth.gap_styles.drak"], ["--set", "train.prefetch"], [str(child), "train.accumulate"]]
    write(tmp_path / "child.yaml", "{base: sub/base.yaml, optimizer: {lr: 2e-3}}")
    assert complaint(load_config, child).startswith(f"{tmp_path}/sub/base.yaml: train.batch_size")
    config = load_config(child, ["train.batch_size=4"])
    assert (dict(config.synth.shapes), config.optimizer.lr, config.train.batch_size) == ({"star": 1}, 2e-3, 4)


def test_a_rule_blames_the_layer_that_broke_it(tmp_path):
    file = write(tmp_path / "a.yaml", "seed: 1")
    assert complaint(load_config, file, ["sched.epochs=1"]).startswith("--set: sched.warmup_epochs: value 2.0: must be less than")


def test_child_switches_a_section_off_and_on(tmp_path):
    write(tmp_path / "off.yaml", "eval: {early_stopping: {second_guard: null}}")
    on = write(tmp_path / "on.yaml", "{base: off.yaml, eval: {early_stopping: {second_guard: {metric: hit_le_1px, mode: max}}}}")
    assert load_config(tmp_path / "off.yaml").eval.early_stopping.second_guard is None
    assert load_config(on).eval.early_stopping.second_guard.min_delta == 0.05
    assert load_config(tmp_path / "off.yaml", ["eval.early_stopping.second_guard.metric=rmse_px"]).eval.early_stopping.second_guard.mode == "min"


@pytest.mark.parametrize("chain", [["a.yaml"], ["b.yaml", "a.yaml"], ["b.yaml", "c.yaml", "b.yaml"]])
def test_circles(tmp_path, chain):
    for name, base in zip(["a.yaml", *chain], chain): write(tmp_path / name, f"base: {base}")
    assert "in a circle" in complaint(load_config, tmp_path / "a.yaml")


@pytest.mark.parametrize("assignment, path, value", [
    ("train.amp=off", ("train", "amp"), "off"), ("optimizer.lr=1e-3", ("optimizer", "lr"), 1e-3), ("data.root=a=b", ("data", "root"), "a=b"),
    ("optimizer.betas=[0.5, 0.6]", ("optimizer", "betas"), (0.5, 0.6)), (" seed = 7", ("seed",), 7), ("model.weights=", ("model", "weights"), None),
    ("train={batch_size: 3}", ("train", "batch_size"), 3), ("version='2'", ("version",), "2"), ("data.root=größe", ("data", "root"), "größe")])
def test_overrides(assignment, path, value):
    found = Config().override(assignment)
    for key in path: found = found[key]
    assert found == value


def test_overrides_of_parts_keep_the_rest_and_the_last_one_wins():
    config = Config().override("synth.shapes.star=9", "train={batch_size: 3}", "train.batch_size=5")
    assert config.synth.shapes["jigsaw"] == 6 and config.synth.shapes["star"] == 9
    assert config.train.amp == "bf16" and config.train.batch_size == 5
    assert load_config(DEFAULT_FILE, "seed=4").seed == 4 and load_config(DEFAULT_FILE, None) == Config()


@pytest.mark.parametrize("assignment", ["", "=", "seed", "=1", ".seed=1", "seed.=1", "a..b=1", "seed=[", "a\nb=1", "seed={1: 2}", "seed=\udcff",
                                        "seed.x=1", "base=x.yaml", "train.batch_size.x.y=1", "synth.shapes.star.x=1", "a." * 2000 + "b=1"])
def test_malformed_overrides(assignment):
    line = complaint(Config().override, assignment)
    assert line.startswith("--set") and "\n" not in line


def test_overrides_leave_their_input_alone():
    tree = Config().to_dict()
    before = copy.deepcopy(tree)
    apply_overrides(tree, ["synth.shapes.star=9", "train.batch_size=3"])
    assert tree == before


# ── fuzzing: nothing but UserError ───────────────────────────────────────────────────────────────────────────────

names = st.sampled_from(sorted({key for path in SCHEMA for key in path} | {"star", "base", "<<", "x", "[key]"})) | st.text(max_size=8)
scalars = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
           | st.sampled_from(["off", "1e-3", "cpu", "cuda:0", "fp16", "min", "max", "mae_px", "2024-01-01", "0x1", "*a", "&a x", "!!int z"]))
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | scalars, inner, max_size=4), max_leaves=12)


def harmless(function, *args):
    try: return function(*args)
    except UserError as error:
        assert str(error) and all(line.strip() for line in str(error).splitlines())


@st.composite
def near_misses(draw):
    "A valid tree with a few values replaced by anything, at paths that exist"
    tree = Config().to_dict()
    for path in draw(st.lists(st.sampled_from(sorted(SCHEMA)), min_size=1, max_size=6)):
        node = tree
        for key in path[:-1]:
            if not isinstance(node.get(key), dict): node[key] = {}
            node = node[key]
        node[path[-1]] = draw(trees)
    return tree


@relaxed
@given(tree=trees | near_misses())
def test_random_trees(tree):
    try: text = yaml.safe_dump(tree)
    except (yaml.YAMLError, ValueError): return
    harmless(lambda: Config.from_dict(parse_yaml(text, "text")))


@relaxed
@given(tree=near_misses())
def test_random_trees_without_yaml(tree): harmless(Config.from_dict, tree)


@relaxed
@given(content=st.binary(max_size=60) | st.text("[]{}:,-&*!|>?'\"#% \n\tab1.e<\\u0\x00\x85\u2028", max_size=60).map(str.encode))
def test_random_files(tmp_path, content): harmless(load_config, write(tmp_path / "random.yaml", content))


values = trees.map(lambda tree: yaml.safe_dump(tree, default_flow_style=True).strip()) | st.text(max_size=20)


@relaxed
@given(assignments=st.lists(st.text(max_size=20) | st.builds("{}={}".format, st.sampled_from(sorted(SCHEMA)).map(".".join), values)
                            | st.builds("{}.{}={}".format, names, names, values), max_size=4))
def test_random_overrides(tmp_path, assignments): harmless(load_config, write(tmp_path / "small.yaml", "seed: 1"), assignments)


numbers = st.floats(0, 1, exclude_max=True)
pairs = st.tuples(numbers, numbers).map(lambda pair: sorted(pair))


@st.composite
def valid_trees(draw):
    text = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
    return {
        "version": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
                        | st.sampled_from(["1e-3", "010", "off", "null", "2024-01-01", "0x1"])),
        "seed": draw(st.integers(0, 2**32 - 1)), "data": {"root": draw(text), "input_width": 32 * draw(st.integers(2, 40))},
        "synth": {"shapes": draw(st.dictionaries(st.sampled_from(module.SHAPES), st.floats(0.001, 9), min_size=1)),
                  "decoy": {"p": draw(numbers), "strength": draw(pairs)}},
        "model": {"weights": draw(st.none() | text)}, "optimizer": {"lr": draw(st.floats(1e-5, 1e300)), "betas": [draw(numbers), draw(numbers)]},
        "train": {"amp": draw(st.sampled_from(["bf16", "fp16", "off"])), "compile": draw(st.booleans())},
        "logging": {"log_dir": draw(text)}}


@relaxed
@given(tree=valid_trees())
def test_saving_and_loading_is_lossless(tmp_path, tree):
    config = Config.from_dict(tree)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text("utf-8")) == config.to_dict()   # readers of YAML 1.1 agree


# ── saving ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = write(tmp_path / "c.yaml", "old")
    def full(descriptor): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError): write_atomically(path, b"new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["c.yaml"]
    assert "No space left" in complaint(save_config, Config(), path)


# ── folders and devices ──────────────────────────────────────────────────────────────────────────────────────────

def manager(folder, *overrides, **kwargs):
    file = write(folder / "run.yaml", "version: demo")
    return ConfigManager(file, [f"checkpoints.save_dir={folder}/c", f"logging.log_dir={folder}/l", f"logging.tensorboard_dir={folder}/t", *overrides], **kwargs)


def test_folders(tmp_path):
    manager(tmp_path, make_folders=False)
    assert os.listdir(tmp_path) == ["run.yaml"]
    for _ in range(2): made = manager(tmp_path)   # again is fine
    assert (made.checkpoint_dir, made.log_dir, made.tensorboard_dir) == (tmp_path / "c/demo", tmp_path / "l/log-demo", tmp_path / "t/demo")
    assert all(folder.is_dir() and not os.listdir(folder) for folder in (made.checkpoint_dir, made.log_dir, made.tensorboard_dir))
    made.save()
    assert load_config(made.log_dir / "config.yaml") == made.config


@pytest.mark.parametrize("key", ["checkpoints.save_dir", "logging.log_dir", "logging.tensorboard_dir"])
def test_folders_that_cannot_be(tmp_path, key, monkeypatch):
    write(tmp_path / "file", "")
    assert f"run.yaml: {key}: value" in complaint(manager, tmp_path, f"{key}={tmp_path}/file")
    def read_only(self, *args, **kwargs): raise OSError(30, "Read-only file system")
    monkeypatch.setattr(Path, "touch", read_only)
    assert "Read-only file system" in complaint(manager, tmp_path)


def pretend(monkeypatch, cuda=0, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize("cuda, mps, rank, name, expected", [
    (0, False, None, "auto", "cpu"), (0, True, None, "auto", "mps"), (2, True, None, "auto", "cuda:0"), (2, False, "1", "auto", "cuda:1"),
    (2, False, "1", "cuda", "cuda:1"), (2, False, None, "cuda:1", "cuda:1"), (2, True, None, "cpu", "cpu"), (0, True, "1", "auto", "mps")])
def test_devices(monkeypatch, cuda, mps, rank, name, expected):
    pretend(monkeypatch, cuda, mps)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank: monkeypatch.setenv("LOCAL_RANK", rank)
    assert str(pick_device(name)) == expected


@pytest.mark.parametrize("cuda, name, there", [(0, "cuda", "cpu"), (0, "mps", "cpu"), (2, "cuda:2", "cuda:0, cuda:1, cpu")])
def test_missing_devices_say_what_there_is(monkeypatch, tmp_path, cuda, name, there):
    pretend(monkeypatch, cuda)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    line = complaint(manager(tmp_path, f"hardware.device={name}").get_device)
    assert line.startswith(f"{tmp_path}/run.yaml: hardware.device: value '{name}': ") and line.endswith(f"there is {there}")


def test_more_ranks_than_gpus(monkeypatch):
    pretend(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert "cuda:2 does not exist here" in complaint(pick_device, "auto")


def test_half_precision_needs_a_gpu(monkeypatch, tmp_path):
    pretend(monkeypatch)
    assert "train.amp: value 'fp16'" in complaint(manager(tmp_path, "train.amp=fp16").get_device)
    assert existing_devices() == ["cpu"]


# ── command lines ────────────────────────────────────────────────────────────────────────────────────────────────

TOOL = """
import sys, time
from captcha_hrnet.config import Overrides, UserError, cli
@cli
def main(what: str,                # what to do
         size: int = 3,            # px
         set: Overrides = None):
    "A tool"
    if what == "two": raise UserError("first\\nsecond")
    if what == "file": open("/no/such/file")
    if what == "bug": raise RuntimeError("ours")
    if what == "wait": print("ready", flush=True); time.sleep(60)
    if what == "much":
        for _ in range(100000): print("line")
    print(what, size, set)
    return {"not": "an exit code"}
if __name__ == "__main__": main()
"""


@pytest.fixture
def tool(tmp_path): return [sys.executable, str(write(tmp_path / "tool.py", TOOL))]


def run(tool, *arguments):
    done = subprocess.run([*tool, *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments, output", [
    (["x"], "x 3 None\n"), (["x", "--size", "4", "--set", "a=1"], "x 4 ['a=1']\n"), (["x", "--set", "a=1", "b=2"], "x 3 ['a=1', 'b=2']\n"),
    (["x", "--set", "a=1", "--set", "b=2", "c=[3, 4]"], "x 3 ['a=1', 'b=2', 'c=[3, 4]']\n")])
def test_done(tool, arguments, output): assert run(tool, *arguments) == (0, output, "")


def test_failures_are_lines(tool):
    assert run(tool, "two") == (1, "", "error: first\nerror: second\n")
    assert run(tool, "file") == (1, "", "error: /no/such/file: No such file or directory\n")


@pytest.mark.parametrize("arguments", [[], ["x", "--size", "big"], ["x", "--nonsense"], ["x", "--set"]])
def test_bad_usage(tool, arguments):
    code, output, errors = run(tool, *arguments)
    assert code == 2 and output == "" and errors.startswith("usage: tool.py")


def test_help_and_our_own_bugs(tool):
    code, output, errors = run(tool, "--help")
    assert code == 0 and "A tool" in output and "what to do" in output and errors == ""
    code, _, errors = run(tool, "bug")
    assert code == 1 and "Traceback" in errors


def test_interrupted(tool):
    process = subprocess.Popen([*tool, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")


def test_reader_that_stops_reading(tool):
    process = subprocess.Popen([*tool, "much"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait(30)) == ("", 1)
    process.stderr.close()


def test_as_a_module(tool):
    folder = str(Path(tool[1]).parent)
    done = subprocess.run([sys.executable, "-m", "tool"], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: python -m tool ")


def test_from_python_the_function_stays_a_function(capsys):
    @module.cli
    def half(size: int = 3):   # even
        if size % 2: raise UserError("odd")
        return size // 2
    assert half(4) == half.__wrapped__(size=4) == 2
    for call in (half, lambda: half(5)):
        with pytest.raises(UserError): call()
    assert run_command(half.__wrapped__, ["--size", "5"]) == 1
    assert capsys.readouterr().err == "error: odd\n"


def test_reading_a_configuration_does_not_import_torch():
    code = f"import sys; from captcha_hrnet.config import load_config; load_config({str(DEFAULT_FILE)!r}); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False).stdout == "False\n"
