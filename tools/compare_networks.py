"""Networks that one may choose from, side by side: `python tools/compare_networks.py backbones speed accuracy --seeds 0 1`, or `heads` for necks and heads, or
`published speed` for the default network beside the same one computed as its authors' code does. It writes nbs/backbones.json, which the notebook "twin" draws,
nbs/heads.json, which "model" draws, or nbs/published.json. Speed needs onnx, onnxruntime and openvino, and some minutes; accuracy trains every network for every
seed, four minutes of a processor each."""
import argparse, itertools, json, resource, subprocess, sys, tempfile, time, types, warnings
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
import torch.nn.functional as F
from torch import nn

from captcha_hrnet.bench import compare, machine, random_batch, repeated
from captcha_hrnet.config import load_config
from captcha_hrnet.engine import TrainingEngine
from captcha_hrnet.model import CrossResolutionWeighting, LiteHRModule, OperationCounter, PredictionHead, create_lite_hrnet_18_fpn, model_table
from captcha_hrnet.twin import folded

ROOT = Path(__file__).parents[1]
BACKBONES = {"lite_hrnet_18": [], "naive_lite_hrnet_18": ["model.name=naive_lite_hrnet_18"],
             "rep_hrnet_18": [f"model.{key}={value}" for key, value in load_config(ROOT/"configs"/"fast.yaml").model if key in ("name", "neck_channels", "head_channels")]}
def head(neck: int, hidden: int, separable: bool) -> list[str]:
    return [f"model.neck_channels={neck}", f"model.head_channels={hidden}", f"model.neck_separable={separable}"]

HEADS = {"64, separable": [], "32, separable": head(32, 32, True), "128, separable": head(128, 128, True), "64, dense": head(64, 64, False),
         "64, shared": head(64, 0, True), "128, shared": head(128, 0, True), "64, shared, dense": head(64, 0, False)}   # width of neck and heads
NETWORKS = dict(backbones=BACKBONES, heads=HEADS, published={"ours": [], "as published": []})
EPOCHS = 5   # of the quickstart, instead of eight

def as_published(model):
    "The same network, with dense 3×3 heads, computed as the published code does: branch 0's way to each other branch twice, means of any size."
    def fuse(self, maps):
        fused = []
        for target, paths in enumerate(self.fuse_layers):
            total = paths[0](maps[0])
            for path, x in zip(paths, maps): total = total + path(x)
            fused.append(total)
            if target == 0: maps = [total, *maps[1:]]
        return fused

    def weights(self, maps):
        pooled = [F.adaptive_avg_pool2d(x, maps[-1].shape[2:]) for x in maps[:-1]]
        return self.conv2(self.conv1(torch.cat([*pooled, maps[-1]], dim=1))).split(self.channels, dim=1)

    for module in model.modules():
        if isinstance(module, LiteHRModule): module.fuse = types.MethodType(fuse, module)
        if isinstance(module, CrossResolutionWeighting): module.weights = types.MethodType(weights, module)
    for name, head in model.heads.items(): model.heads[name] = PredictionHead(head.out.in_channels, head.out.in_channels, head.out.out_channels, separable=False)
    return model

class Maps(nn.Module):
    "The network from a picture in [0, 1] to its maps, as runtimes take it."
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        features = self.model.neck(self.model.context(self.model.backbone(image)))
        return tuple(head(features) for head in self.model.heads.values())

def runtimes(model) -> dict:  # runtime -> a function that predicts one picture of 256×512 px on as many threads as PyTorch has
    image = np.random.default_rng(0).random((1, 4, 256, 512), np.float32)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.onnx"
        torch.onnx.export(Maps(model), torch.from_numpy(image), file, dynamo=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        compiled = openvino.Core().compile_model(file, "CPU", dict(INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY", INFERENCE_PRECISION_HINT="f32"))
    name, request = session.get_inputs()[0].name, compiled.create_infer_request()
    ours = [value.detach().numpy() for value in Maps(model)(torch.from_numpy(image))]
    for theirs in (session.run(None, {name: image}), request.infer([image]).values()):
        for a, b in zip(ours, theirs): assert np.abs(a - b).max() < 1e-3*np.abs(a).max(), "the runtime computes something else"
    def in_pytorch():
        with torch.inference_mode(): return len(Maps(model)(torch.from_numpy(image))[0])
    return {"PyTorch": in_pytorch, "ONNX Runtime": lambda: len(session.run(None, {name: image})[0]), "OpenVINO": lambda: len(request.infer([image])[0])}

def training_step(model, config):
    engine, batch = TrainingEngine(model, config, "cpu"), random_batch(config, "cpu")
    engine.model.train()
    def step():
        engine._train_window([batch])
        return config.train.batch_size
    return step

def training_kernels(model) -> int:
    "Kernels of a forward and a backward pass in training mode."
    with OperationCounter() as counter:
        sum(value.square().mean() for name, value in model.train()(torch.zeros(2, 4, 64, 64)).items() if name != "valid").backward()
    return counter.kernels.total()

@torch.no_grad()
def with_statistics(model):
    "A fresh network whose norms know what they see; with those of a start values grow so far that float32 means little."
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d): module.momentum = 1.
    model.train()(torch.rand(2, 4, 256, 512, generator=torch.Generator().manual_seed(0)))
    return model

def speed(networks: dict, rounds: int) -> dict:  # name -> what it holds and costs; ratios are rates against the first
    rows, variants = {}, {"PyTorch": {}, "ONNX Runtime": {}, "OpenVINO": {}, "training step": {}}
    for name, changes in networks.items():
        config = load_config(ROOT/"configs"/"training_config.yaml", [*changes, "train.batch_size=2", "train.amp=off", "hardware.device=cpu"])
        model = create_lite_hrnet_18_fpn(config.model)
        model = with_statistics(as_published(model) if name == "as published" else model)
        use, parameters = folded(model), sum(p.numel() for p in model.parameters())
        rows[name] = dict(parameters=parameters, macs=model_table(use)[-1]["macs"], kernels=model_table(use)[-1]["kernels"], training_kernels=training_kernels(model))
        for kind, run in runtimes(use).items(): variants[kind][name] = partial(repeated, run, 1.)
        variants["training step"][name] = partial(repeated, training_step(model, config), 1.)
    for kind, of_kind in variants.items():
        for rate in compare(of_kind, rounds):
            rows[rate.variant][kind] = dict(ms=round(1e3/rate.median, 1), fastest_ms=round(1e3/rate.high, 1), slowest_ms=round(1e3/rate.low, 1), ratio=round(rate.ratio, 2))
    return rows

def processor_seconds() -> float:  # of all commands that have ended
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime

def trained(changes: list[str], seed: int) -> dict:
    "The best epoch's metrics of a short quickstart."
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "captcha_hrnet.train", "--config", str(ROOT/"configs"/"quickstart.yaml"), "--set", *changes, f"seed={seed}",
                   f"sched.epochs={EPOCHS}", f"logging.log_dir={folder}/logs", f"logging.tensorboard_dir={folder}/tensorboard", f"checkpoints.save_dir={folder}/checkpoints"]
        start, before = time.perf_counter(), processor_seconds()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds, spent = time.perf_counter() - start, processor_seconds() - before
        epochs = [json.loads(line)["val"] for line in open(f"{folder}/logs/log-quickstart/metrics.jsonl")]
    best = max(epochs, key=lambda metrics: (metrics["hit_le_5px"], -metrics["mae_px"]))
    kept = {key: round(best[key], 2) for key in ("hit_le_5px", "hit_le_1px", "mae_px", "median_px", "slide_hit_le_5px")}
    return kept | dict(seed=seed, seconds=round(seconds), processor_seconds=round(spent))

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", choices=NETWORKS)
    parser.add_argument("what", nargs="+", choices=("speed", "accuracy"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.networks == "published" and "accuracy" in args.what: parser.error("published: for speed alone; `heads` compares the accuracy of dense heads")
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="torch.onnx")
    networks, file = NETWORKS[args.networks], ROOT/"nbs"/f"{args.networks}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    def keep(**more):
        found.update(more)
        file.write_text(json.dumps(found, indent=1) + "\n")
    if "speed" in args.what: keep(**{"speed" if args.threads == 1 else f"speed, {args.threads} threads": dict(
        machine=machine() | dict(onnxruntime=onnxruntime.__version__, openvino=openvino.__version__), rows=speed(networks, args.rounds))})
    rows = {name: [] for name in networks}
    for seed, name in itertools.product(args.seeds, networks) if "accuracy" in args.what else ():
        rows[name].append(trained(networks[name], seed))
        keep(accuracy=dict(epochs=EPOCHS, rows=rows))

if __name__ == "__main__": main()
