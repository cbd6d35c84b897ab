"""The report as a page: what it says, and what a browser makes of it."""

import base64
import functools
import html.parser
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fisherprune_jax as fp
from fisherprune_jax.__main__ import main
from fisherprune_jax._html import pruner as of_pruner
from fisherprune_jax._html import report
from fisherprune_jax._tables import as_number

X = jax.random.normal(jax.random.key(0), (16, 8))
VOID = {"meta", "link", "input", "br"}
EVIL = "<script>alert(1)</script>"


class Page(html.parser.HTMLParser):
  """The text of a page by element, with every tag closed."""

  def __init__(self, text):
    super().__init__()
    self.open, self.words, self.attrs, self.ids = [], [], [], {}
    self.feed(text)
    assert not self.open
    self.text = " ".join(self.words).replace(" ,", ",")

  def handle_starttag(self, tag, attrs):
    self.attrs += attrs
    name = dict(attrs).get("id")
    assert name not in self.ids or name is None
    self.ids[name] = tag
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.attrs += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] not in ("script", "style"):
      self.words += data.split()


class MLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(32)(x))
    x = nn.relu(nn.Dense(16)(x))
    return nn.Dense(3)(x)


def loss_of(apply):
  return lambda params, x: jnp.mean((apply({"params": params}, x) - 1) ** 2)


@functools.cache
def trained():
  """A pruner, trained parameters, and the state of the optimizer."""
  model = MLP()
  variables = model.init(jax.random.key(1), X)
  pruner = fp.Pruner(model.apply, variables, X, keep=0.4, start=2, stop=12, every=2)
  tx = pruner.wrap(optax.adam(1e-2))
  params, state = variables["params"], tx.init(variables["params"])

  @jax.jit
  def step(params, state):
    _, grads = pruner.value_and_grad(loss_of(model.apply))(params, state, X)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(14):
    params, state = step(params, state)
  return pruner, params, state


def written(pruner, folder, *args):
  path = folder / "report.html"
  pruner.report_html(path, *args)
  text = path.read_text("utf-8")
  return text, Page(text)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """The page of the trained pruner."""
  pruner, params, state = trained()
  where = tmp_path_factory.mktemp("report") / "report.html"
  pruner.report_html(where, state, params)
  return where


def find_browser():
  names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
  return next(filter(None, map(shutil.which, names)), None)


class Browser:
  """A headless Chromium over its debugging pipe, which needs no package."""

  START = (
    "import fcntl, os, sys\n"
    "high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1:3]]\n"
    "os.dup2(high[0], 3), os.dup2(high[1], 4)\n"
    "os.execv(sys.argv[3], sys.argv[3:])"
  )

  def __init__(self, program, profile):
    (read, self.out), (self.into, write) = os.pipe(), os.pipe()
    options = [
      "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
      "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    command = [sys.executable, "-c", self.START, str(read), str(write), program, *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    self.process = subprocess.Popen(command, pass_fds=(read, write), **quiet)
    os.close(read), os.close(write)
    self.count, self.left, self.events, self.session = 0, b"", [], {}
    target = self.ask("Target.createTarget", url="about:blank")["targetId"]
    found = self.ask("Target.attachToTarget", targetId=target, flatten=True)
    self.session = {"sessionId": found["sessionId"]}
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.ask(f"{domain}.enable")

  def close(self):
    self.process.terminate()
    self.process.wait(20)
    os.close(self.out), os.close(self.into)

  def ask(self, method, **params):
    self.count += 1
    message = {"id": self.count, "method": method, "params": params, **self.session}
    os.write(self.out, json.dumps(message).encode() + b"\0")
    found = self.until(lambda found: found.get("id") == self.count)
    assert "error" not in found, found
    return found["result"]

  def until(self, holds):
    deadline = time.monotonic() + 60
    while True:
      while b"\0" in self.left:
        first, self.left = self.left.split(b"\0", 1)
        found = json.loads(first)
        self.events.append(found)
        if holds(found):
          return found
      assert select.select([self.into], [], [], deadline - time.monotonic())[0], "the browser is silent"
      part = os.read(self.into, 1 << 20)
      assert part, "the browser has ended"
      self.left += part

  def show(self, path, width, scheme="light"):
    self.events.clear()
    self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    self.ask("Emulation.setDeviceMetricsOverride", **size)
    assert "errorText" not in self.ask("Page.navigate", url=f"file://{path}")
    self.until(lambda found: found.get("method") == "Page.loadEventFired")

  def value(self, expression):
    found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
    assert "exceptionDetails" not in found, found
    return found["result"].get("value")

  def press(self, key, code):
    for kind in ("rawKeyDown", "keyUp"):
      self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

  def picture(self, path, **options):
    found = self.ask("Page.captureScreenshot", format="png", **options)
    path.write_bytes(base64.b64decode(found["data"]))

  def problems(self):
    """Errors, refused loads, and everything that was loaded beside the page."""
    bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    asked = [
      e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"
    ]
    return [e for e in self.events if e.get("method") in bad], asked[1:]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  program = find_browser()
  if program is None:
    pytest.skip("no Chromium or Chrome is installed")
  found = Browser(program, tmp_path_factory.mktemp("profile"))
  yield found
  found.close()


def frames_of(text):
  return json.loads(re.search(r'id="frames">(.*?)</script>', text).group(1))


def section(text, name):
  return Page(re.search(f'<section id="{name}">.*?</section>', text, re.DOTALL).group())


def test_the_numbers_are_those_of_the_pruner(path):
  pruner, params, state = trained()
  text = path.read_text("utf-8")
  page, small = Page(text), pruner.compact(params, state)
  dense, now, target = map(as_number, (pruner.cost.dense, small.cost, pruner.target))
  assert f"{now} of {dense} FLOPs per example Target: {target} FLOPs" in page.text
  sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (small.variables, params)]
  assert f"Parameters {100 * sizes[0] / sizes[1]:.1f} % {sizes[0]:,} of {sizes[1]:,}" in page.text
  widths = pruner.config(state)
  assert f"{sum(widths.values())} of 48" in page.text
  groups = section(text, "groups").text
  assert f"Dense_0 {widths['Dense_0']} of 32, connected with Dense_1" in groups
  assert f"Dense_1 {widths['Dense_1']} of 16, connected with Dense_0" in groups
  assert text.count("data-of=") == 1
  lines = {}
  for row in pruner.cost.breakdown(pruner.masks(state)):
    where = os.path.basename(row.where)
    lines[where] = [a + b for a, b in zip(lines.get(where, (0, 0)), (row.now, row.dense), strict=True)]
  layers = section(text, "cost-by-layer").text
  assert len(lines) == 3
  for where, (now, dense) in lines.items():
    assert re.search(f"{re.escape(where)} [^()]* {as_number(now)} of {as_number(dense)}", layers)
  assert "it reaches an argument" in section(text, "blockers").text
  assert "The compact network keeps no masked feature." in section(text, "blockers").text


def test_the_history_is_that_of_the_state(path):
  pruner, _, state = trained()
  frames = frames_of(path.read_text("utf-8"))
  steps = sorted({0, *(went.step for went in pruner.history(state)), 14})
  assert [frame[0] for frame in frames] == [str(step) for step in steps]
  for step, (_, total, _, widths) in zip(steps, frames, strict=True):
    masks = fp.masks_at(state, step)
    assert widths == [int(masks[name].sum()) for name in ("Dense_0", "Dense_1")]
    assert total.startswith(f"{as_number(float(pruner.cost(masks)))} of ")


def test_histograms_count_all_features(path):
  pruner, _, state = trained()
  importance = fp.get_importance(state)
  shown = section(path.read_text("utf-8"), "importance").text
  for name, mask in pruner.masks(state).items():
    live = int(mask.sum())
    assert f"{live} live, {mask.size - live} masked" in shown
    found = of_pruner.histogram(name, np.asarray(importance[name]), np.asarray(mask))
    assert [sum(found.live), sum(found.masked)] == [live, mask.size - live]
    assert np.isclose(found.high, importance[name].max())


@pytest.mark.parametrize(
  ("importance", "live", "masked"),
  [
    ([0.0, 1.0, 20.0, 100.0], {0: 1, 24: 1}, {1: 1, 16: 1}),
    ([0.0, 0.0, 0.0, 0.0], {0: 2}, {0: 2}),
    ([5.0, 5.0, 5.0, 5.0], {1: 2}, {1: 2}),
    ([-1.0, np.nan, 1e-9, 1.0], {0: 1, 24: 1}, {0: 2}),
  ],
)
def test_bins_are_logarithmic(importance, live, masked):
  found = of_pruner.histogram("m", np.array(importance), np.array([1.0, 0.0, 0.0, 1.0]))
  for counts, expected in ((found.live, live), (found.masked, masked)):
    assert {at: n for at, n in enumerate(counts) if n} == expected


def test_without_a_state_the_page_says_what_it_leaves_out(tmp_path):
  pruner, params, state = trained()
  masks = pruner.masks(state)
  for given, widths in ((None, (32, 16)), (masks, [int(m.sum()) for m in masks.values()])):
    page = written(pruner, tmp_path, given)[1]
    assert page.words.count("neither") == 1
    assert f"Dense_0 {widths[0]} of 32" in page.text
    assert {"groups", "cost-by-layer", "blockers"} <= {*page.ids}
    assert not {"importance", "history", "step"} & {*page.ids}
  early = pruner.wrap(optax.sgd(0.1)).init(params)
  assert "taken no step yet" in written(pruner, tmp_path, early)[1].text


def named(variables, x):
  h = jnp.tanh(x @ variables["w"]) * variables["masks"][EVIL]
  return (jnp.sort(h @ variables["u"]) * variables["masks"]["a&b"]) @ variables["v"]


def test_names_are_escaped_and_blockers_have_their_lines(tmp_path):
  masks = {EVIL: jnp.ones(6), "a&b": jnp.ones(4)}
  own = {"w": jnp.ones((8, 6)), "u": jnp.ones((6, 4)), "v": jnp.ones((4, 2))}
  pruner = fp.Pruner(named, {**own, "masks": masks}, X, keep=0.5)
  given = {EVIL: jnp.ones(6).at[0].set(0), "a&b": jnp.ones(4).at[:2].set(0)}
  text, page = written(pruner, tmp_path, given, own)
  assert "<script>a" not in text
  assert "a&b" not in text
  assert f"{EVIL} 5 of 6 a&b 2 of 4" in page.text
  (blocker,) = pruner.compact(own, given).blockers
  shown = section(text, "blockers").text
  assert blocker.where in shown
  assert f"{blocker.reason} " in shown
  assert f"u axis 1: {blocker.holds[0].kept} where masks allow 2" in shown
  assert "The masks are those of the model." in shown


def test_layers_of_a_scan_and_branches_have_bars_of_their_own(tmp_path):
  def model(params, x):
    h = x @ params["in"]
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w["a"]) @ w["b"], None), h, params["layers"])
    return h @ params["out"]

  layers = {"a": jnp.ones((3, 6, 5)), "b": jnp.ones((3, 5, 6))}
  params = {"in": jnp.ones((8, 6)), "layers": layers, "out": jnp.ones((6, 2))}
  pruner = fp.Pruner(model, params, X, keep=0.5, blocks=True)
  masks = jax.tree.map(lambda m: m.at[0].set(0) if m.ndim == 2 else m, pruner.cost.masks)
  text, _ = written(pruner, tmp_path, masks)
  features, (block,) = (
    [g for g in pruner.groups if g.kind != "block"],
    [g for g in pruner.groups if g.kind == "block"],
  )
  stream, inner = sorted((g.name for g in features), key=lambda name: len(pruner.cost.masks[name].shape))
  groups = section(text, "groups").text
  for at, width in enumerate((0, 5, 5)):
    assert f"{inner}[{at}] {width} of 5, connected with {stream}" in groups
    assert f"{block.name}[{at}] block {width // 5} of 1" in groups
  assert text.count("data-of=") == 3


def test_long_lists_are_cut_short():
  bars = [report.Bar(str(at), 2, 1) for at in range(report.MOST_BARS + 5)]
  cut = report.section("Groups", "", bars, report.MOST_BARS)
  assert (len(cut.bars), cut.rest) == (report.MOST_BARS, "and 5 more: 5 of 10")
  steps = of_pruner.thinned(range(1000))
  assert (len({*steps}), steps[0], steps[-1]) == (report.MOST_STEPS, 0, 999)
  assert of_pruner.thinned([3, 4]) == [3, 4]


def test_costs_without_a_breakdown(tmp_path):
  pruner, *_ = trained()
  mine = fp.CostModel.from_functions(
    pruner.cost.masks,
    lambda m: 1e-3 * sum(map(jnp.sum, jax.tree.leaves(m))),
    lambda m: jax.tree.map(lambda x: 1e-3 * x, m),
    "seconds",
  )
  model = MLP()
  pruner = fp.Pruner(model.apply, model.init(jax.random.key(1), X), X, keep=0.5, measure=mine)
  page = written(pruner, tmp_path)[1]
  assert "0.048 of 0.048 seconds per example" in page.text
  assert "no breakdown" in page.text


def test_one_file_without_references(path):
  text = path.read_text("utf-8")
  assert not re.search(r"https?:|//[a-z]|\bsrc\s*=|<link|@import|url\(", text)
  assert all(value.startswith("#") for name, value in Page(text).attrs if name == "href")
  assert "default-src 'none'" in text


def test_bad_places_and_states_of_other_networks_are_errors(tmp_path):
  pruner, params, state = trained()
  with pytest.raises(FileNotFoundError, match=r"A report needs a folder that is there, got '.*none'"):
    pruner.report_html(tmp_path / "none" / "a.html")
  with pytest.raises(IsADirectoryError, match="A report needs the path of a file"):
    pruner.report_html(tmp_path)
  variables = {"w": jnp.ones((8, 6)), "v": jnp.ones((6, 2))}
  other = fp.Pruner(lambda v, x: jnp.tanh(x @ v["w"]) @ v["v"], variables, X, keep=0.5, stop=3)
  with pytest.raises(ValueError, match="Build the cost model for this model"):
    pruner.report_html(tmp_path / "a.html", other.wrap(optax.sgd(0.1)).init(variables))
  with pytest.raises(ValueError, match=r"Build a new fp\.Pruner for another network"):
    pruner.report_html(tmp_path / "a.html", state, variables)
  with pytest.raises(ValueError, match="must hold one FisherPruneState"):
    pruner.report_html(tmp_path / "a.html", optax.sgd(0.1).init(params))
  assert os.listdir(tmp_path) == []


def test_an_older_page_is_replaced_or_kept_whole(tmp_path):
  pruner, _, state = trained()
  old = tmp_path / "report.html"
  old.write_text("old")
  with pytest.raises(ValueError, match="must hold one"):
    pruner.report_html(old, optax.sgd(0.1).init(jnp.ones(2)))
  assert old.read_text() == "old"
  written(pruner, tmp_path, state)
  assert os.listdir(tmp_path) == ["report.html"]


def test_the_page_of_a_file(tmp_path, capsys):
  pruner, params, state = trained()
  small, file = pruner.compact(params, state), tmp_path / "small & net"
  small.save(file, history=state)
  assert main(["inspect", str(file), "--html"]) == 0
  assert capsys.readouterr().out == f"{file}.html\n"
  text = (tmp_path / "small & net.html").read_text("utf-8")
  page = Page(text)
  assert f"{as_number(small.cost)} of {as_number(pruner.cost.dense)} FLOPs per example" in page.text
  widths = pruner.config(state)
  assert (
    f"Dense_0 {widths['Dense_0']} of 32 Dense_1 {widths['Dense_1']} of 16" in section(text, "groups").text
  )
  kernel = f"8x32 to 8x{widths['Dense_0']} {8 * widths['Dense_0']} of 256"
  assert f"params/Dense_0/kernel {kernel}" in section(text, "variables").text
  assert "Everything that is masked was removed." in section(text, "blockers").text
  for _, total, _, shown in (frames := frames_of(text)):
    assert total.startswith(f"{sum(shown)} of 48")
  assert [frames[0][3], frames[-1][3]] == [[32, 16], [*widths.values()]]
  assert "small & net" not in text

  small.save(file)
  assert main(["inspect", str(file), "--html", str(tmp_path / "out.html")]) == 0
  page = Page((tmp_path / "out.html").read_text("utf-8"))
  assert "without a history" in page.text
  assert "step" not in page.ids


def test_bad_files_and_places_are_one_line_and_exit_code_1(tmp_path, capsys):
  (tmp_path / "other").write_bytes(b"other")
  for arguments in (["other"], ["nothing"], ["other", str(tmp_path / "none" / "out.html")]):
    assert main(["inspect", str(tmp_path / arguments[0]), "--html", *arguments[1:]]) == 1
    assert capsys.readouterr().err.count("\n") == 1
  assert os.listdir(tmp_path) == ["other"]


def test_a_page_never_replaces_its_network(tmp_path, capsys):
  pruner, params, state = trained()
  pruner.compact(params, state).save(tmp_path / "net")
  before = (tmp_path / "net").read_bytes()
  (tmp_path / "link").symlink_to(tmp_path / "net")
  for out in ("net", "link"):
    assert main(["inspect", str(tmp_path / "net"), "--html", str(tmp_path / out)]) == 1
    assert "the network itself" in capsys.readouterr().err
  assert (tmp_path / "net").read_bytes() == before


def test_what_a_file_keeps_is_listed(tmp_path):
  masks = {EVIL: jnp.ones(6), "a&b": jnp.array([1.0, 0, 1, 0])}
  own = {"w": jnp.ones((8, 6)), "u": jnp.ones((6, 4)), "v": jnp.ones((4, 2))}
  small = fp.compact(named, {**own, "masks": masks}, X)
  small.save(tmp_path / "net")
  main(["inspect", str(tmp_path / "net"), "--html"])
  text = (tmp_path / "net.html").read_text("utf-8")
  assert " ".join(small.report().splitlines()[-1].split()) in section(text, "blockers").text
  assert "<script>a" not in text


def test_modules(tmp_path):
  model = nnx.Sequential(nnx.Linear(8, 12, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(12, 2, rngs=nnx.Rngs(1)))
  pruner = fp.nnx.Pruner(model, X, keep=0.5, stop=4)
  optimizer = nnx.Optimizer(model, pruner.wrap(optax.adam(1e-2)), wrt=nnx.Param)
  for _ in range(5):
    _, grads = pruner.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))(model, optimizer, X)
    optimizer.update(model, grads)
  page = written(pruner, tmp_path, optimizer, model)[1]
  assert f"{as_number(pruner.compact(model, optimizer).cost)} of {as_number(pruner.cost.dense)}" in page.text
  assert {"importance", "history", "step"} <= {*page.ids}
  assert "keeps no masked feature" in page.text


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page(browser, path, width, scheme):
  browser.show(path, width, scheme)
  assert browser.value("innerWidth") == width
  assert browser.value("document.documentElement.scrollWidth <= window.innerWidth")
  assert browser.value("document.querySelector('h1').textContent") == "Pruning report"
  assert browser.value(
    "[...document.querySelectorAll('.number')].every((x) => x.scrollWidth <= x.offsetWidth)"
  )
  assert browser.problems() == ([], [])
  assert browser.value(CONTRAST) >= 4.5


CONTRAST = """(() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map((x) => x / 255).map(
      (x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const style = (selector) => getComputedStyle(document.querySelector(selector));
  const pairs = [["body", "body"], [".card p", ".card"], [".number", "body"], ["nav a", "body"], ["th", "th"]];
  return Math.min(...pairs.map(([text, ground]) => {
    const both = [light(style(text).color), light(style(ground).backgroundColor)];
    return Math.max(...both) / Math.min(...both);
  }));
})()"""
"""The smallest contrast of some texts."""

SHOWN = """[document.getElementById("at").textContent, document.getElementById("total").textContent,
  ...[...document.querySelectorAll("#widths .number")].map((x) => x.textContent),
  document.getElementById("step").getAttribute("aria-valuetext")]"""


@pytest.mark.parametrize("width", [390, 1280])
def test_the_slider_moves_by_keyboard(browser, path, width):
  frames = frames_of(path.read_text("utf-8"))

  def expected(at):
    step, total, _, widths = frames[at]
    return [step, total, f"{widths[0]} of 32", f"{widths[1]} of 16", f"step {step}, {total}"]

  browser.show(path, width)
  assert browser.value(SHOWN) == expected(-1)
  browser.value("document.getElementById('step').focus()")
  browser.press("ArrowLeft", 37)
  browser.press("ArrowLeft", 37)
  assert browser.value(SHOWN) == expected(-3)
  before = browser.value("document.querySelector('#widths .now').offsetWidth")
  browser.press("Home", 36)
  assert browser.value(SHOWN) == expected(0)
  assert browser.value("document.querySelector('#widths .now').offsetWidth") > before
  assert browser.value("document.getElementById('cursor').getAttribute('d')") == "M0 0V100"
  assert browser.problems() == ([], [])


def test_the_pointer_shows_the_connections_of_a_group(browser, path):
  browser.show(path, 1280)
  place = browser.value(
    "(({x, y}) => [x + 9, y + 9])(document.querySelector('.graph .name').getBoundingClientRect())"
  )
  assert browser.value("document.querySelectorAll('.on').length") == 0
  browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
  assert browser.value("document.querySelectorAll('.on').length") == 1
  assert browser.problems() == ([], [])
