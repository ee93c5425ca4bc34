"""The home page's table of modules and the drawing of them: read from the notebooks' headings, the modules' imports, and one sample that is led through the line."""
import ast, html, textwrap
from collections import Counter

import nbformat
import torch
from nbdev.config import get_config

from captcha_hrnet.config import Config
from captcha_hrnet.data import DataPipeline
from captcha_hrnet.geometry import Letterbox
from captcha_hrnet.loss import CaptchaLoss
from captcha_hrnet.model import create_lite_hrnet_18_fpn
from captcha_hrnet.synth import CaptchaSynth
from captcha_hrnet.validator import metrics_of, sample_errors

ROW, LEFT, WIDTH = 66, 118, 420   # px of the drawing

def notebooks() -> dict:  # module -> its notebook, in the order of their numbers
    return {path.stem[3:]: path for path in sorted(get_config().nbs_path.glob("[0-9]*.ipynb"))}

def subtitle(path) -> str:
    "The line below a notebook's title."
    return " ".join(line.lstrip("> ") for line in nbformat.read(path, 4).cells[0].source.split("\n") if line.startswith(">"))

def table() -> str:
    "Modules and what each is about, in Markdown."
    rows = [f"| [{name}]({path.name}) | {subtitle(path)} |" for name, path in notebooks().items()]
    return "\n".join(["| module | what it is about |", "| --- | --- |", *rows])

# -- what flows

def shape(value) -> str: return f'{str(value.dtype).removeprefix("torch.")} [{", ".join(map(str, value.shape))}]'

def some(names, count=6) -> str:
    names = [*names]
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")

def traced() -> dict:
    "What comes out of each module of the line for the first generated captcha."
    torch.manual_seed(0)
    config = Config(data=dict(train_samples=1, val_samples=1), train=dict(num_workers=0, batch_size=1))
    sample = CaptchaSynth(config.synth, config.seed).draw(0)
    batch = next(iter(DataPipeline(config).setup().val_loader))
    model = create_lite_hrnet_18_fpn(config.model).eval()
    with torch.no_grad(): outputs = model(batch["image"])
    found, parts = model.decode_predictions(outputs), CaptchaLoss(config.loss)(outputs, batch)
    points = (torch.cat([d["gap_coords"], d["slider_coords"]], 1).numpy() for d in (found, batch))
    height, width = sample.image.shape[:2]
    inside = Letterbox(width, height, config.data.input_width, config.data.input_height).scaled
    flags = some((name for name in batch if name.startswith("has_")), 2)
    return dict(config=f"Config: {some(config.keys(), 20)}",
                geometry=f"picture {width}×{height} px → {inside[0]}×{inside[1]} px of the input → cells of the grid, and back",
                synth=f"image {shape(sample.image)}, gap, slider, decoys, angle, flags",
                data=f'batch: image {shape(batch["image"])}, gap_coords {shape(batch["gap_coords"])}, slider_coords, {flags}',
                model=f'gap_heatmap {shape(outputs["gap_heatmap"])}, offsets {shape(outputs["offsets"])}; decoded: {some(found, 3)}',
                loss=f"{some(parts)}: scalars", validator=some(metrics_of(sample_errors(*points))))

def imports(path) -> dict:  # module -> the names taken from it
    taken = {}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module: taken.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return taken

def modules() -> tuple[dict, dict]:  # module -> what comes out of it; (source, module) -> names taken
    "Everything that the drawing shows. A module that imports from one after it is an error."
    files = {name: get_config().lib_path/f"{name}.py" for name in notebooks()}
    files = {name: path for name, path in files.items() if path.exists()}
    edges = {(source, name): names for name, path in files.items() for source, names in imports(path).items() if source in files}
    order, comes_out = [*files], traced()
    for source, name in edges: assert order.index(source) < order.index(name), f"{name} imports from {source}, which comes after it"
    for name in files:
        taken = Counter(n for (source, _), names in edges.items() if source == name for n in sorted(names))
        comes_out.setdefault(name, some(n for n, _ in taken.most_common()) if len(taken) > 2 else subtitle(notebooks()[name]))
    return {name: comes_out[name] for name in files}, edges

# -- the drawing

def box(name: str, text: str, middle: int) -> str:
    "A module's box around the height `middle`: its name, and two lines of what comes out."
    lines = textwrap.wrap(text, 47)
    if len(lines) > 2: lines = [lines[0], lines[1][:46] + " …"]
    rows = "".join(f'<text x="{LEFT + 12}" y="{middle + 8 + 13*i}" font-size="11" opacity=".85">{html.escape(line)}</text>' for i, line in enumerate(lines))
    return (f'<rect x="{LEFT}" y="{middle - 28}" width="{WIDTH - LEFT - 1}" height="{ROW - 10}" rx="7" fill="currentColor" fill-opacity=".06" stroke="currentColor" stroke-opacity=".35"/>'
            f'<text x="{LEFT + 12}" y="{middle - 9}" font-size="14.5" font-weight="bold">{name}</text>{rows}')

def line(start: int, end: int, share: float, hue: int, title: str) -> str:
    "From one box's left side to another's; the farther (`share` of the whole), the wider the bend."
    bend = LEFT - 14 - (LEFT - 18)*share
    return (f'<g stroke="hsl({hue} 60% 50%)" fill="none" stroke-width="1.6"><title>{html.escape(title)}</title>'
            f'<path d="M{LEFT} {start} C{bend:.0f} {start} {bend:.0f} {end} {LEFT - 6} {end}" opacity=".75"/><path d="M{LEFT - 6} {end - 3.5} l6 3.5 l-6 3.5z" fill="hsl({hue} 60% 50%)"/></g>')

def drawing() -> str:
    "The modules from top to bottom and who takes from whom, as SVG that takes its colour from the page."
    comes_out, edges = modules()
    place = {name: number for number, name in enumerate(comes_out)}
    middle = {name: number*ROW + 28 for name, number in place.items()}
    lines = [line(middle[a] + 6, middle[b] - 4, (place[b] - place[a])/(len(place) - 1), 360*place[a]//len(place), f'{b} takes from {a}: {", ".join(sorted(names))}')
             for (a, b), names in edges.items()]
    boxes = [box(name, text, middle[name]) for name, text in comes_out.items()]
    return (f'<svg viewBox="0 -1 {WIDTH} {len(place)*ROW - 8}" role="img" aria-label="Modules and what flows between them" style="width:100%;max-width:620px;height:auto" '
            f'font-family="system-ui, sans-serif" fill="currentColor" class="architecture">{"".join(lines + boxes)}</svg>')
