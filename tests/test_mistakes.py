"A clumsy first day on the command lines: one line that says what is wrong, the right exit code, and every file as it was."
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch

from captcha_hrnet import audit, data, evaluate, export, predict
from captcha_hrnet.config import run_command
from captcha_hrnet.data import write_coco
from captcha_hrnet.synth import write_dataset
from test_evaluate import SMALL, checkpoint

COMMANDS = dict(predict=(predict, ['picture.png']), evaluate=(evaluate, ['--data', 'mine', '--out', 'new']), export=(export, ['--out', 'new/m.onnx']),
                audit=(audit, ['--out', 'new', '--factors', 'blur']), data=(data, []))


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "What lies about on such a day."
    home = tmp_path_factory.mktemp('mistakes')
    torch.set_num_threads(1)
    good = torch.load(checkpoint(home/'good.pth'), weights_only=True)
    weights, config = good['model_state_dict'], good['config']
    for name, changed in (('nan', dict(model_state_dict={key: value*torch.nan for key, value in weights.items()})), ('newer', dict(config=config | dict(model=config['model'] | dict(rows=3)))),
                          ('other', dict(model_state_dict=dict([*weights.items()][:-1])))): torch.save(good | changed, home/f'{name}.pth')
    torch.save(weights, home/'bare.pth')
    (home/'torn.pth').write_bytes((home/'good.pth').read_bytes()[:200_000])
    (home/'text.pth').write_text('hello\n')
    (home/'empty.pth').touch(); (home/'empty').mkdir()
    (home/'code.pth').write_bytes(pickle.dumps(print, 4))
    write_dataset(SMALL.synth, 3, str(home/'mine'), train=0, val=2, workers=1)
    (home/'picture.png').write_bytes((home/'mine/val/images/000000.png').read_bytes())
    (home/'list.json').write_text('[1]')
    write_coco(home/'coco.json', [json.loads(line) for line in open(home/'mine/val/labels.jsonl')])
    (home/'latin/val').mkdir(parents=True)
    (home/'latin/val/labels.jsonl').write_bytes(b'{"image": "b\xe4r.png"}\n')
    return home


def files() -> dict: return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob('*')}


def attempt(capsys, command, arguments) -> tuple:
    "Exit code and error lines; nothing on the disk may have changed."
    before = files()
    try: code = run_command(COMMANDS[command][0].main.__wrapped__, arguments)
    except SystemExit as ended: code = ended.code
    said = capsys.readouterr()
    assert files() == before and 'Traceback' not in said.err
    return code, [line for line in said.err.splitlines() if 'error: ' in line], said.err


@pytest.mark.parametrize('command', ['predict', 'evaluate', 'export', 'audit'])
def test_weights(home, monkeypatch, capsys, command):
    monkeypatch.chdir(home)
    for name, said in (('none.pth', 'no such weights file'), ('mine', 'a folder; name a checkpoint in it'), ('text.pth', 'cut off, damaged, or something else'), ('torn.pth', 'cut off, damaged'),
                       ('empty.pth', 'cut off, damaged'), ('code.pth', 'cut off, damaged'), ('picture.png', 'cut off, damaged'), ('bare.pth', 'not a checkpoint of this library'),
                       ('nan.pth', 'hold numbers that are not finite'), ('newer.pth', '(of another version of this library?): model.rows: unknown key'), ('other.pth', 'do not fit (of another version')):
        code, lines, err = attempt(capsys, command, [*COMMANDS[command][1], '--weights', name])
        assert (code, len(lines)) == (1, 1) and lines[0].startswith(f'error: {name}') and said in lines[0] and err.strip() == lines[0], err


@pytest.mark.parametrize('line, said', [
    ('predict empty --weights good.pth', 'empty: no picture in it'),
    ('predict *.jpg --weights good.pth', '*.jpg: nothing matches'),
    ('predict picture.png --weights good.pth --out text.pth', 'must be a folder that can be written to'),
    ('predict picture.png --weights good.pth --out /proc/new', 'must be a folder that can be written to'),
    ('predict picture.png --weights good.pth --device gpu', "value 'gpu'"),
    ('evaluate --weights good.pth --data latin', "latin/val/labels.jsonl:1: not JSON ('utf-8'"),
    ('evaluate --weights good.pth --data list.json', 'list.json: no COCO file'),
    ('evaluate --weights good.pth --data mine --images mine', '--images mine: goes with a COCO file, and mine is none'),
    ('evaluate --weights good.pth --data mine --compare none.pth --out new', 'none.pth: no such weights file'),
    ('export --weights good.pth --out good.pth', 'must end in .onnx'),
    ('export --weights good.pth --out empty', 'is a folder'),
    ('export --weights good.pth --out m.onnx --opset 3', '--opset 3: must be 13 to 20'),
    ('export --weights good.pth --out m.onnx --int8 --data empty', '--data empty: no picture in it'),
    ('audit --weights good.pth --out new --images mine', '--images: goes with a COCO file as --data'),
    ('audit --weights good.pth --out text.pth', 'must be a folder that can be written to'),
    ('data --write picture.png --data mine --split val', 'must end in .json'),
    ('data --read list.json --data new', 'list.json: no COCO file'),
    ('data --read coco.json --data mine --split val --images mine/val', 'is there already'),
    ('data', '--read FILE or --write FILE'),
])
def test_the_rest(home, monkeypatch, capsys, line, said):
    monkeypatch.chdir(home)
    command, *arguments = line.split()
    code, lines, err = attempt(capsys, command, arguments)
    assert code == 1 and said in err and lines[0].startswith('error: ')


@pytest.mark.parametrize('line', ['predict --weights good.pth', 'evaluate --data mine', 'export --form hole', 'audit --weights good.pth', 'audit --weights good.pth --out new --samples x', 'data --check mine'])
def test_bad_usage(home, monkeypatch, capsys, line):
    monkeypatch.chdir(home)
    code, lines, _ = attempt(capsys, line.split()[0], line.split()[1:])
    assert (code, len(lines)) == (2, 1)


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime', 'openvino'])
def test_an_extra_that_is_missing(home, monkeypatch, capsys, package):
    monkeypatch.chdir(home)
    monkeypatch.setitem(sys.modules, package, None)
    code, lines, _ = attempt(capsys, 'export', ['--weights', 'good.pth', '--out', 'm.onnx'])
    assert (code, len(lines)) == (1, 1) and "pip install 'captcha_hrnet[export]'" in lines[0]
