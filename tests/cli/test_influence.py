"""``curvlib influence``: its numbers, its page, going on after a stop, and bad input."""

from __future__ import annotations

import json
import re
import signal

import pytest
import torch

from curvlib.cli import main
from curvlib.influence.influence import Influence
from curvlib.influence.page import Contents
from curvlib.influence.result import TopInfluence
from curvlib.report.influence import own_contents
from tests.programs import Program

TARGET = """
import os, time
import torch
import curvlib as cl

CE = torch.nn.CrossEntropyLoss()

class Slow(torch.nn.Tanh):
    def forward(self, x):
        time.sleep(float(os.environ.get("NAP", "0")))
        return super().forward(x)

def network(hidden=5):
    return torch.nn.Sequential(torch.nn.Linear(4, hidden), Slow(), torch.nn.Linear(hidden, 3))

def data(seed, count=36):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)

def risk():
    x, y = data(0)
    return cl.Risk(network(), CE, [(x[i : i + 6], y[i : i + 6]) for i in range(0, 36, 6)])

def few():
    return data(1, 2)

def summed():
    return cl.Risk(network(), torch.nn.CrossEntropyLoss(reduction="sum"), data(1, 2))

def other():
    return cl.Risk(network(7), CE, data(1, 2))

def wide():
    return torch.randn(2, 9), torch.zeros(2, dtype=torch.int64)

def nothing():
    return []

def images():
    x = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    return cl.Risk(model, torch.nn.MSELoss(), (x, x.flatten(1)[:, :2]))

def image_queries():
    return images().data

show = {"train": [f"train text {n}" for n in range(36)], "queries": ["first <query>", "second"]}

def titled():
    return {"captions": {n: f"caption {n}" for n in range(36)}, "train_captions": []}

number = 7
FEW = cl.influence.page.Contents(captions=[f"own caption {n}" for n in range(36)])
"""
FAST = ["mine.py:risk", "--queries", "mine.py:few", "--top", "3", "--no-check"]


def influence(*arguments):
    return main(["influence", *arguments])


def numbers(folder):
    return json.loads((folder / "influence.json").read_text())


def own(place, name="risk"):
    """What the command line loads."""
    from curvlib.cli.target import load_object

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_object(f"{place / 'mine.py'}:{name}")


def test_numbers_are_those_of_the_library(place, capsys, rng_untouched):
    assert influence(*FAST, "--bottom", "2", "--unit", "nats", "--out", "a folder") == 0
    fit = {"checkpoint": place / "fit.safetensors"}  # sums in another order without
    inf = Influence.of(own(place), unit="nats", fit=fit, progress=False)
    expected = inf.top(own(place, "few"), 3, 2)
    folder = place / "a folder"
    names = {"influence.html", "influence.json", "influence.safetensors", "command.txt"}
    assert {path.name for path in folder.iterdir()} == names
    found = TopInfluence.load(folder / "influence.safetensors")
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.bottom_per_layer, expected.bottom_per_layer)
    document = numbers(folder)
    assert (document["unit"], document["curvature"], document["damping"]) == ("nats", "EK-FAC", 0.1)
    for q, row in enumerate(document["queries"]):
        assert [own["example"] for own in row["proponents"]] == expected.indices[q].tolist()
        assert [own["score"] for own in row["opponents"]] == expected.bottom_scores[q].tolist()
    shown = capsys.readouterr().out
    assert shown.index("Plan") < shown.index("eigenvalues") < shown.index("curvature:  ")
    assert re.search(rf"0 +{int(expected.indices[0, 0])} \(\+", shown)
    line = (folder / "command.txt").read_text().splitlines()[1]
    assert line == f"curvlib influence {' '.join(FAST)} --bottom 2 --unit nats --out 'a folder'"


def test_the_page_shows_numbers_labels_and_predictions(place):
    assert influence(*FAST, "--out", "o") == 0
    page = (place / "o" / "influence.html").read_text()
    risk = own(place)
    n = numbers(place / "o")["queries"][0]["proponents"][0]["example"]
    x, y = (torch.cat([batch[i] for batch in risk.data]) for i in (0, 1))
    said = int(risk.model(x[n : n + 1]).argmax())
    assert f'caption">label {int(y[n])}, predicted {said}<' in page
    assert ", ".join(f"{v:.4g}".replace("-", "−") for v in x[n].tolist()) in page
    for fact in ("Influence: mine.py:risk", "mine.py:few", "curvlib influence mine.py:risk"):
        assert fact in page


def test_the_page_shows_what_the_user_gives(place):
    assert influence(*FAST, "--show", "mine.py:show", "--shown", "2", "--out", "o") == 0
    page = (place / "o" / "influence.html").read_text()
    assert "first &lt;query&gt;" in page
    assert "ranks 3 to 3" in page
    for row in numbers(place / "o")["queries"][0]["proponents"]:
        assert f"train text {row['example']}" in page
    assert "label " in page  # captions are still the data's
    assert influence(*FAST, "--show", "mine.py:FEW", "--out", "o") == 0
    assert "own caption" in (place / "o" / "influence.html").read_text()


def test_images_of_the_data_are_shown(place):
    arguments = ["mine.py:images", "--queries", "mine.py:image_queries", "--top", "2"]
    assert influence(*arguments, "--curvature", "identity", "--out", "o") == 0
    page = (place / "o" / "influence.html").read_text()
    assert page.count("data:image/png;base64,") == 8 * (1 + 1 + 2 + 2)  # in the index, too
    assert re.search(r"target \S+, \S+, output -?\S+, -?\S+<", page)


def test_settings_reach_the_search(place):
    options = ["--curvature", "diagonal", "--damping", "0.5", "--absolute", "--rank", "2"]
    assert influence(*FAST, *options, "--fisher", "empirical", "--params", "2.*", "--out", "o") == 0
    found = numbers(place / "o")
    assert (found["damping"], found["relative"], found["rescored"]) == (0.5, False, True)
    assert found["settings"]["rank"] == 2
    assert found["parameters"] == 18
    assert found["layers"] == ["2"]
    fit = {"fisher": "empirical"}
    risk = own(place).restrict(["2.*"])
    inf = Influence.of(risk, "diagonal", damping=0.5, relative=False, fit=fit, progress=False)
    top = inf.top(own(place, "few"), 3)
    assert [row["example"] for row in found["queries"][1]["proponents"]] == top.indices[1].tolist()


def test_queries_of_a_risk_have_its_loss(place):
    queries = ["--queries", "mine.py:summed"]
    assert influence("mine.py:risk", *queries, "--top", "3", "--no-check", "--out", "a") == 0
    assert influence(*FAST, "--out", "b") == 0
    one, two = numbers(place / "a"), numbers(place / "b")
    assert one["queries"] == two["queries"]  # gradients of summed losses, either way


def test_another_type(place):
    assert influence(*FAST, "--dtype", "float64", "--out", "o") == 0
    assert TopInfluence.load(place / "o" / "influence.safetensors").scores.dtype == torch.float64
    arguments = ["mine.py:risk", "--queries", "mine.py:summed", "--top", "3", "--no-check"]
    assert influence(*arguments, "--dtype", "float64", "--out", "p") == 0
    assert numbers(place / "p")["queries"] == numbers(place / "o")["queries"]


def test_one_query_of_all_shows_no_example_of_them(place):
    risk, few = own(place), own(place, "few")
    inf = Influence.of(risk, "identity", progress=False)
    contents = own_contents(inf.top(few, 2, query_reduction="sum"), risk, risk.on(few), {})
    assert contents.queries is None
    assert len(contents.train) == 4
    assert isinstance(contents, Contents)


@pytest.mark.slow
def test_the_demo_explains_misread_digits(place):
    assert influence("--top", "2", "--curvature", "identity", "--out", "o") == 0
    page = (place / "o" / "influence.html").read_text()
    labels = re.findall(r'<p class="caption">label (\d), predicted (\d)</p><img', page)
    queries = labels[:: 1 + 4]
    assert len(queries) == 4
    assert all(label != said for label, said in queries)


# ------------------------------------------------------------------------- going on
def start(place, *arguments, nap="0"):
    words = ["-m", "curvlib", "influence", *FAST, "--save-every", "0.001", *arguments]
    return Program(*words, cwd=place, NAP=nap)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "stop"), [("fit", signal.SIGKILL), ("scan", signal.SIGINT)])
def test_stopped_and_resumed(place, capsys, stage, stop):
    assert influence(*FAST, "--out", "undisturbed") == 0
    process = start(place, "--out", stage, nap="0.1")
    process.until((place / stage / "checkpoints" / f"{stage}.safetensors").exists)
    code, _, error = process.stop(stop)
    if stop == signal.SIGINT:
        assert code == 130
        assert re.search("go on with: curvlib influence mine.py:risk .* --resume", error)
    assert not (place / stage / "influence.json").exists()
    assert influence(*FAST, "--out", stage) == 2
    assert "holds an unfinished run; pass --resume" in capsys.readouterr().err
    assert influence(*FAST, "--out", stage, "--resume") == 0
    one, two = (place / folder / "influence.safetensors" for folder in (stage, "undisturbed"))
    assert one.read_bytes() == two.read_bytes()
    assert numbers(place / stage)["resumed"]
    assert not (place / stage / "checkpoints").exists()
    pages = [(place / folder / "influence.html").read_text() for folder in (stage, "undisturbed")]
    mains = [re.search(r"<main>.*</section>\n</main>", page, re.DOTALL) for page in pages]
    assert mains[0].group() == mains[1].group()


# ------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine.py:risk"], "influence needs --queries file.py:name"),
        ([*FAST, "--queries", "mine.py"], "--queries 'mine.py' names nothing: expected file.py"),
        ([*FAST, "--queries", "mine.py:fev"], "mine.py has no 'fev'; it has few"),
        ([*FAST, "--queries", "mine.py:other"], r"'0.weight' of shape \[7, 4\], got \[5, 4\]"),
        ([*FAST, "--queries", "mine.py:wide"], r"the queries have examples of shapes \[9\]"),
        ([*FAST, "--queries", "mine.py:number"], "data= should be a batch .* got int"),
        ([*FAST, "--queries", "mine.py:nothing"], "no example in the data|no batch|empty"),
        ([*FAST, "--top", "37"], "--top 37 and --bottom 37 are more than the 36 training examples"),
        ([*FAST, "--unit", "nats", "--curvature", "identity"], "--unit nats needs curvature"),
        ([*FAST, "--fisher", "mc", "--curvature", "identity"], "--fisher belongs to --curvature"),
        ([*FAST, "--absolute"], "--absolute says what --damping is: add --damping"),
        ([*FAST, "--tolerance", "2"], "--tolerance is a relative error below 1, got 2"),
        ([*FAST, "--show", "mine.py:titled"], "has the keys train_captions; keys are queries, tr"),
        ([*FAST, "--show", "mine.py:number"], "--show mine.py:number is of type int; expected"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(place, capsys, arguments, message):
    assert influence(*arguments, "--out", "o") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("curvlib: error: ")
    assert re.search(message, lines[0])
    assert not (place / "o" / "influence.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top", "0"], "--top: expected a positive whole number, got 0"),
        (["--bottom", "-1"], "--bottom: expected a whole number of at least 0, got -1"),
        (["--damping", "-1"], "--damping: expected a number of at least 0, got -1"),
        (["--damping", "much"], "--damping: invalid number value: 'much'"),
        (["--curvature", "hessian"], "--curvature: invalid choice: 'hessian'"),
    ],
)
def test_options_that_are_none(place, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        influence(*FAST, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
