"The docs site in a browser: every page loads without errors and without another host, search finds things, a phone shows it whole."
import os, re, shutil, subprocess, sys, time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from functools import partial
from itertools import product
from pathlib import Path
from threading import Thread

import pytest


sys.path.insert(0, str(Path(__file__).parents[1]/'tools'))
playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
Table = pytest.importorskip('captcha_hrnet._showdoc', reason='nbdev is not installed').Table
docs = pytest.importorskip('docs', reason='nbdev or a library of the docs build is not installed')

ROOT = Path(__file__).parents[1]
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
needs_chromium = pytest.mark.skipif(not shutil.which('chromium'), reason='no chromium on the path')

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The built site: the one that CAPTCHA_HRNET_DOCS names, or one that is built here, once for all processes of a test run, from what git knows."
    if named := os.environ.get('CAPTCHA_HRNET_DOCS'): return Path(named).resolve()
    folder = tmp_path_factory.getbasetemp().parent/f"docs-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    try: folder.mkdir()
    except FileExistsError:   # another process builds
        for _ in range(600):
            if (folder/'finished').exists(): break
            time.sleep(.5)
    else:
        try: build(folder/'repo')
        finally: (folder/'finished').touch()
    return folder/'repo'/'_docs'

def build(copy):
    subprocess.run(['git', 'clone', '-q', str(ROOT), str(copy)], check=True)
    done = subprocess.run([sys.executable, 'tools/docs.py', '--smalldocs'], cwd=copy, env={**os.environ, 'PYTHONPATH': str(copy)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

@pytest.fixture(scope='module')
def address(site):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()

@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=shutil.which('chromium'), args=FLAGS)
        yield chromium
        chromium.close()

def visit(page, url):
    "Open the page; what the console complained of, and the requests that left this machine."
    errors, foreign, own = [], [], re.compile(rf"(http://{re.escape(url.split('/')[2])}/|data:|blob:)")
    listeners = dict(console=lambda message: errors.append(message.text) if message.type == 'error' else None, pageerror=lambda error: errors.append(str(error)),
                     request=lambda request: None if own.match(request.url) else foreign.append(request.url))
    for event, listener in listeners.items(): page.on(event, listener)
    page.goto(url, wait_until='load')
    page.evaluate('new Promise(done => requestIdleCallback(done))')
    for event, listener in listeners.items(): page.remove_listener(event, listener)
    return errors, foreign

GROUND = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + +part, 0)"   # 0: black, 765: white

FAINT = """() => {   // the first texts of each kind that stand out from their ground by less than 4.5 : 1 (WCAG), as 'kind: contrast'
    const parts = s => { const p = s.match(/[\\d.]+/g).map(Number); return p.length < 4 ? [...p, 1] : p };
    const over = (top, ground, opacity) => ground.map((g, k) => top[k]*opacity + g*(1 - opacity));
    const light = c => c.slice(0, 3).map(v => v/255).map(v => v <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4).reduce((sum, v, k) => sum + v*[.2126, .7152, .0722][k], 0);
    const family = e => e ? [e, ...family(e.parentElement)] : [];
    const contrast = e => {
        const all = family(e), ground = all.map(n => parts(getComputedStyle(n).backgroundColor)).reverse().reduce((g, c) => over(c, g, c[3]), [255, 255, 255]);
        const text = parts(getComputedStyle(e).color), opacity = all.reduce((o, n) => o*getComputedStyle(n).opacity, text[3]);
        const [low, high] = [light(ground), light(over(text, ground, opacity))].sort((a, b) => a - b);
        return (high + .05)/(low + .05);
    };
    const kinds = ['.navbar-title', '.navbar .menu-text', '.sidebar-link .menu-text', '.sidebar-link.active .menu-text', '.breadcrumb a', 'main h2', 'main p', 'main p a', 'main p code', 'main a code',
                   'main th', 'main td', 'main figcaption', 'main pre code', 'main pre span.co', 'main pre span.st', 'main pre span.kw', '.cell-output pre code', '.nav-footer div'];
    return kinds.flatMap(kind => [...document.querySelectorAll(kind)].slice(0, 2).map(contrast).filter(c => c < 4.5).map(c => `${kind}: ${c.toFixed(2)}`));
}"""
NAMELESS = "[...document.querySelectorAll('main img, main svg:not([aria-hidden=true]), main iframe')].filter(e => !(e.alt || e.title || e.ariaLabel || e.querySelector('title') || e.closest('figure')?.querySelector('figcaption'))).length"

@needs_chromium
@pytest.mark.parametrize('half', [0, 1])
def test_every_page_loads_by_itself(site, address, browser, half):
    names = sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html'))
    assert {'index.html', 'data.html', 'tutorials/quickstart.html', 'benchmarks.html', 'changelog.html'} <= set(names)
    page = browser.new_page(viewport=dict(width=390, height=844))
    for name, scheme in product(names[half::2], ('light', 'dark')):
        page.emulate_media(color_scheme=scheme)
        assert visit(page, f'{address}/{name}') == ([], []), name
        assert page.title() and page.locator('main').inner_text().strip(), name
        width = page.evaluate('document.documentElement.scrollWidth')
        assert width <= 390, f'{name}: {width} px wide on a phone of 390'
        assert (page.evaluate(GROUND) > 600) == (scheme == 'light'), f'{name} is not {scheme}'
        assert page.evaluate(FAINT) == [], f'{name}, {scheme}: hard to read'
        assert page.evaluate(NAMELESS) == 0, f'{name}: pictures that say nothing to those who cannot see them'
        assert 'Call self as a function' not in page.content(), f'{name}: a function without a docstring'
    page.close()

@needs_chromium
def test_what_is_faint_or_nameless_is_noticed(browser):
    page = browser.new_page()
    page.set_content('<main><p style="color: #999">too faint</p><div style="background: #222"><p style="color: #fff; opacity: .4">too faint</p></div><img src="data:,"><svg aria-label="a"></svg></main>')
    assert page.evaluate(FAINT) == ['main p: 2.85', 'main p: 3.73'] and page.evaluate(NAMELESS) == 1
    page.set_content('<main><h2 style="background: #222; color: #444">too faint</h2><iframe></iframe><img alt="a" src="data:,"></main>')
    assert page.evaluate(FAINT) == ['main h2: 1.63'] and page.evaluate(NAMELESS) == 1
    page.close()

@needs_chromium
def test_search_finds_a_class(address, browser):
    page = browser.new_page(viewport=dict(width=1280, height=900))
    visit(page, f'{address}/index.html')
    page.locator('.smalldocs-search input, #quarto-search input').first.fill('CaptchaDataset')
    hit = page.locator('.smalldocs-search-results a, .aa-Panel a').filter(has_text='CaptchaDataset').first
    hit.wait_for(timeout=10_000)
    hit.click()
    page.wait_for_load_state('load')
    assert 'CaptchaDataset' in page.locator('main').inner_text()
    page.close()

@needs_chromium
def test_the_architecture_names_every_module(address, browser):
    page = browser.new_page(viewport=dict(width=1280, height=900))
    visit(page, f'{address}/index.html')
    drawn = page.locator('svg.architecture')
    modules = [path.stem for path in sorted((ROOT/'captcha_hrnet').glob('[a-z]*.py')) if path.stem in {p.stem[3:] for p in (ROOT/'nbs').glob('[0-9]*.ipynb')}]
    texts = drawn.locator('text[font-weight=bold]').all_text_contents()
    assert {'config', 'train'} <= set(texts) <= set(modules)
    assert drawn.locator('g title').count() >= len(texts) - 1     # each but the first takes something from another
    page.close()

@needs_chromium
def test_formulas_are_drawn(address, browser):
    page = browser.new_page()
    visit(page, f'{address}/loss.html')
    assert page.locator('main math').count() >= 4 and page.locator('main math[display=block]').first.bounding_box()['height'] > 30
    assert '$' not in page.locator('main p').all_text_contents()
    page.close()

def test_a_page_that_needs_another_host_stops_the_build(tmp_path):
    (tmp_path/'good.html').write_text('<a href="https://elsewhere.org">a link to click</a><img src="images/a.png"><img src="data:image/png;base64,AA=="><link rel="canonical" href="https://x.org">')
    (tmp_path/'site.css').write_text('@import url(https://fonts.example/css2?family=A:wght@300;400&display=swap);@import "//fonts.example/b";body{color:red}')
    assert docs.offline(tmp_path) == []
    assert (tmp_path/'site.css').read_text() == 'body{color:red}'
    (tmp_path/'bad.html').write_text('<script src="//cdn.org/a.js"></script><p style="background: url(https://b.org/c.png)">')
    (tmp_path/'bad.css').write_text('p{background:url(https://d.org/e.png)}')
    assert sorted(docs.offline(tmp_path)) == ['bad.css: https://d.org/e.png', 'bad.html: //cdn.org/a.js', 'bad.html: https://b.org/c.png']

def test_formulas_become_mathml_outside_code():
    text = docs.formulas('from $p^2$ on; `$HOME` and $5 or 6$5 stay\n```\necho $A $B\n```\n$$\\frac{a}{b}$$')
    assert text.count('<math') == 2 and '`$HOME`' in text and 'echo $A $B' in text and '$5 or 6$5' in text
    assert 'display="block"' in text and '$$' not in text

def test_a_widget_is_shown_as_it_was_saved():
    models = dict(box=dict(model_name='VBoxModel', state=dict(children=['IPY_MODEL_slider', 'IPY_MODEL_picture']), buffers=[]),
                  slider=dict(model_name='SelectionSliderModel', state=dict(description='noise', index=1, _options_labels=['a', 'b<']), buffers=[]),
                  picture=dict(model_name='ImageModel', state=dict(format='jpeg'), buffers=[dict(data='AA==')]))
    shown = docs.still(models, 'box')
    assert 'noise <b>b&lt;</b>' in shown and 'src="data:image/jpeg;base64,AA=="' in shown

def test_printed_lines_are_one_piece_and_plots_say_what_they_show():
    printed = [dict(output_type='stream', name=name, text=[text]) for name, text in (('stdout', 'a\n'), ('stdout', 'b\n'), ('stderr', 'c\n'))]
    assert [(output['name'], ''.join(output['text'])) for output in docs.streams(printed)] == [('stdout', 'a\nb\n'), ('stderr', 'c\n')]
    assert docs.words('Offsets', "ax.set(xlabel='error, px', title='who pulls'); ax.plot(x, label=f'{name}')") == 'Offsets, error, px, who pulls'
    data = {'image/png': ['AA', '=='], 'text/plain': '<Figure>'}
    docs.drawn(data, 'a "b"')
    assert data['text/html'] == '<img class="img-fluid" alt="a &quot;b&quot;" src="data:image/png;base64,AA==">' and 'image/png' not in data

def test_a_bar_in_a_type_or_a_comment_ends_no_cell():
    def function(first: int | None = None,  # one | two
                 second=None):              # <name> or a|b
        pass
    *_, first, second = str(Table(function)).splitlines()
    assert first == '| first | int or None | None | one or two |'
    assert second == r'| second |  | None | &lt;name> or a\|b |'
