"""Benchmarks from the command line."""
import json, subprocess, sys

def bench(*arguments):
    return subprocess.run([sys.executable, "-m", "captcha_hrnet.bench", *arguments, "--rounds", "1", "--seconds", "0.05"], capture_output=True, text=True)

SMALL = ["--set", "data.input_height=64", "data.input_width=64", "train.batch_size=2", "train.amp=off", "hardware.threads=1", "synth.width=[128,160]"]

def test_each_kind_prints_one_json_object_with_machine_and_rates():
    for what, first in (("train", "as configured"), ("data", "generator, 0 workers")):
        done = bench(what, "--json", *SMALL)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["what"] == what and said["rates"][0]["variant"] == first and said["machine"]["torch"]
        assert all(rate["low"] > 0 and rate["ratio"] > 0 for rate in said["rates"]) and said["rates"][0]["ratio"] == 1

def test_mistakes_are_one_line():
    for arguments, status, said in ((["sing"], 2, "invalid choice"), (["synth", "--set", "synth.widht=3"], 1, "width")):
        done = bench(*arguments)
        assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr
