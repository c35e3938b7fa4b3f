"""The stepper: its record against the kernels of today and against fp64, and the page itself."""

import json
import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from docs import stepper
from docs.chinese import DOCS
from flashlayer import flash_attention
from flashlayer.kernels.primitives import INTERPRETED
from tests.docs.browser import evaluate
from tests.docs.test_chinese import UNEVEN

FOLDER = DOCS / "_static" / "stepper"
SCRIPTS = [FOLDER / f"{name}.js" for name in ("record", "words", "stepper")]


def committed() -> dict[str, Any]:
    return json.loads(stepper.RECORD.read_text(encoding="utf-8")[len(stepper.PREFIX) : -2])


RECORDED = committed()
PRESETS = RECORDED["presets"]


def differences(ours: Any, theirs: Any, where: str = "record") -> list[str]:
    """Where two records differ; numbers by more than rounding on another CPU would make them."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return [d for k in ours for d in differences(ours[k], theirs[k], f"{where}.{k}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [d for i, pair in pairs for d in differences(*pair, f"{where}[{i}]")]
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        same = math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=2e-5)
    else:
        same = ours == theirs
    return [] if same else [f"{where}: {ours!r:.80} is {theirs!r:.80} today"]


@pytest.mark.skipif(not INTERPRETED, reason="the recorder needs Triton's interpreter")
def test_the_record_is_of_todays_kernels() -> None:
    stale = differences(RECORDED, stepper.record())
    assert stale == [], f"run python docs/stepper.py: {len(stale)} differences, first {stale[0]}"


def test_the_record_is_small() -> None:
    assert stepper.RECORD.stat().st_size < 300_000


def tensor(numbers: Any) -> Tensor:
    """Nested lists, in which numbers that are not finite are strings."""

    def finite(x: Any) -> Any:
        return [finite(y) for y in x] if isinstance(x, list) else float(x)

    return torch.tensor(finite(numbers), dtype=torch.float64)


def reference(name: str) -> dict[str, Tensor]:
    """Results of a preset from the recorded inputs, in fp64 by the standard formula."""
    recorded = {field: tensor(x) for field, x in PRESETS[name]["tensors"].items()}
    q, k, v = (recorded[field][None].requires_grad_() for field in "qkv")
    options = dict(stepper.presets()[name].get("options", {}))
    edges = options.pop("cu_seqlens_q", torch.tensor([0, q.shape[2]])).tolist()
    whole = edges == [0, q.shape[2]]
    outs, lses = [], []
    for start, stop in pairwise(edges):
        rows = [x if whole else x[:, :, start:stop] for x in (q, k, v)]
        out, lse = flash_attention(*rows, scale=1.0, return_lse=True, backend="standard", **options)
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs, 2), torch.cat(lses, 2)
    found = {"out": out, "lse": lse}
    if "do" in recorded:
        gradients = torch.autograd.grad(out, (q, k, v), recorded["do"][None])
        found |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return {field: x.detach()[0] for field, x in found.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_recorded_results_are_those_of_attention(name: str) -> None:
    rounding = 2e-3 if PRESETS[name]["half"] else 1e-4
    for field, expected in reference(name).items():
        found = tensor(PRESETS[name]["tensors"][field])
        torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


def on_the_page(language: str, body: str) -> Any:
    """What a function body returns on the stepper's page, in a column 368 pixels wide."""
    style = f'<link rel="stylesheet" href="{(FOLDER / "stepper.css").as_uri()}">'
    script = f'document.documentElement.lang = "{language}"; location.hash = "window-17";'
    page = f'{style}<script>{script}</script><div class="stepper" style="width: 368px"></div>'
    helpers = """
    const root = document.querySelector(".stepper");
    const find = (selector) => root.querySelector(selector);
    const all = (selector) => [...root.querySelectorAll(selector)];
    const press = (key) => {
      const event = new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true });
      document.activeElement.dispatchEvent(event);
    };
    const words = (name) => STEPPER_WORDS[name][document.documentElement.lang.slice(0, 2)];
    const button = (name) => find(`[aria-label="${words(name)}"]`);
    const at = () => Number(find("[type=range]").value);
    const open = (preset) => {
      find("select").value = preset;
      find("select").dispatchEvent(new Event("change"));
    };
    const sentence = () => find("[role=status]").textContent;
    """
    return evaluate(SCRIPTS, f"(() => {{ {helpers} {body} }})()", page=page)


WALK = """
const told = {}, texts = new Set(), kinds = new Set();
for (const preset of Object.keys(STEPPER_RECORD.presets)) {
  open(preset);
  const last = Number(find("[type=range]").max);
  const steps = [];
  const walked = STEPPER_RECORD.presets[preset].programs.flatMap(({ steps }) => steps);
  for (let n = 0; n <= last; n++) {
    if (sample && kinds.has(walked[n].kind)) continue;
    kinds.add(walked[n].kind);
    if (sample) {
      find("[type=range]").value = n;
      find("[type=range]").dispatchEvent(new Event("input"));
    } else if (n > 0) {
      button("forth").click();
    }
    const lines = all(".source .at").map((line) => line.textContent);
    const current = all(".programs [aria-current]").length;
    const hand = find(".hand").textContent;
    const tile = all("td.now").map((cell) => cell.textContent);
    steps.push({ at: at(), sentence: sentence(), lines, current, hand, tile });
    for (const e of all("p, th, td, .legend span, button, option, label")) texts.add(e.textContent);
  }
  const results = ["q", "k"].map((side) => all(`[aria-labelledby=stepper-memory-${side}] tbody tr`)
    .map((row) => [...row.children].map((cell) => cell.textContent)));
  button("last").click();
  button("back").click();
  const back = at() === last - 1 && (sample || sentence() === steps[last - 1].sentence);
  const overflow = root.scrollWidth - root.clientWidth;
  told[preset] = { steps, results, back, overflow };
}
return { told, texts: [...texts], words: STEPPER_WORDS };
"""


@pytest.fixture(scope="module")
def walks() -> dict[str, Any]:
    """Every step of every preset, forwards; in Chinese one step of each kind."""
    return {
        language: on_the_page(language, f"const sample = {sample}; {WALK}")
        for language, sample in (("en", "false"), ("zh-CN", "true"))
    }


def test_every_preset_in_both_languages(walks: dict[str, Any]) -> None:
    for walk in walks.values():
        assert [text for text in walk["texts"] if re.search("undefined|[^ ]NaN|{", text)] == []
        assert walk["told"].keys() == PRESETS.keys()
        assert all(told["back"] and told["overflow"] <= 0 for told in walk["told"].values())


@pytest.mark.parametrize("name", PRESETS)
def test_every_step(name: str, walks: dict[str, Any]) -> None:
    steps = [step for program in PRESETS[name]["programs"] for step in program["steps"]]
    told = walks["en"]["told"][name]["steps"]
    assert [shown["at"] for shown in told] == list(range(len(steps)))
    for shown, step in zip(told, steps, strict=True):
        assert shown["sentence"]
        assert shown["current"] == 1
        # The page marks the lines that the file has in that place.
        function, first, last = step["lines"]
        file = stepper.ROOT / "flashlayer" / RECORDED["sources"][function]["file"]
        source = file.read_text(encoding="utf-8").splitlines()[first - 1 : last]
        assert shown["lines"] == [f"{first + n}{line.strip()}" for n, line in enumerate(source)]
        if "tile" in step:
            numbers = [float(x) for row in step["tile"] for x in row]
            assert [float(x) for x in shown["tile"]] == pytest.approx(numbers, rel=0.05, abs=6e-4)


def test_what_is_worked_out_by_hand_is_right(walks: dict[str, Any]) -> None:
    names = {"max": max, "exp": math.exp, "inf": math.inf}
    known = set()
    for told in walks["en"]["told"].values():
        for hand in filter(None, (shown["hand"] for shown in told["steps"])):
            equation = re.findall(r"^By hand, .*?: (\S+) = (.*) = (\S+)$", hand)
            name, terms, result = equation[0]
            computed = eval(terms.replace("\u2212", "-").replace("\u00b7", "*"), names)
            # Numbers are shown with five digits, those below 1e-3 with three.
            assert computed == pytest.approx(float(result), rel=5e-3, abs=1e-4), hand
            known.add(name)
    assert known == {*"smpl\u03b1", "dP", "dS", "acc[0]", "dV[0]", "dK[0]", "dQ[0]"}


def test_the_page_ends_with_attention(walks: dict[str, Any]) -> None:
    for name in PRESETS:
        expected = reference(name)
        rounding = 2e-3 if PRESETS[name]["half"] else 2e-4
        of_queries, of_keys = walks["en"]["told"][name]["results"]
        shown = tensor([[float(x) for x in row[1:]] for row in of_queries])
        if "do" in PRESETS[name]["tensors"]:
            torch.testing.assert_close(shown[:, 0], expected["lse"][0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(shown[:, 2:], expected["dq"][0], rtol=1e-3, atol=1e-4)
            gradients = torch.cat((expected["dk"], expected["dv"]), 2)[0]
            keys = tensor([[float(x) for x in row[1:]] for row in of_keys])
            torch.testing.assert_close(keys, gradients, rtol=1e-3, atol=1e-4)
            continue
        results = torch.cat((expected["out"], expected["lse"][..., None]), 2).flatten(0, 1)
        if name == "split":
            shown = shown[-1:]  # the rows before are the parts'
        torch.testing.assert_close(shown, results, rtol=rounding, atol=rounding)


def test_the_naive_softmax_is_nan_beside_a_huge_logit(walks: dict[str, Any]) -> None:
    assert {"NaN", "inf"} <= set(walks["en"]["texts"])
    assert "nan" not in json.dumps(PRESETS["huge"]["programs"])
    naive = PRESETS["huge"]["naive"]["out"]
    assert [row for row, out in enumerate(naive) if "nan" in out] == [1, 2]


def test_both_languages_say_the_same(walks: dict[str, Any]) -> None:
    words = walks["en"]["words"]
    chinese = "".join(walks["zh-CN"]["texts"])
    source = SCRIPTS[2].read_text(encoding="utf-8")
    for name, word in words.items():
        assert UNEVEN.findall(word["zh"]) == [], word
        assert set(re.findall(r"{\w+}", word["zh"])) == set(re.findall(r"{\w+}", word["en"]))
        for piece in re.split(r"{\w+}", word["en"]):
            if re.search("[A-Za-z]{4} [a-z]{2}", piece):
                assert piece.strip() not in chinese, name
        used = rf"\b{name}\b|{name.split('_')[0]}_\$|{re.sub('Queries$', '', name)}\$"
        kinds = {kind for steps in stepper.STEPS.values() for kind, _ in steps.values()}
        assert name in kinds | set(PRESETS) | set(stepper.STEPS) or re.search(used, source), name


def test_keyboard_and_names() -> None:
    found = on_the_page(
        "en",
        """
        const told = { opened: [find("select").value, at()] };
        open("causal");
        const places = [];
        const [left, right] = ["ArrowLeft", "ArrowRight"];
        const pages = ["PageDown", "PageDown", "PageUp"];
        for (const key of [right, right, left, ...pages, "End", right, "Home", left]) {
          button("forth").focus();
          press(key);
          places.push(at());
        }
        told.places = places;
        document.activeElement.blur();
        press("ArrowRight");
        press("PageDown");
        told.page = at();
        find(".source").focus();
        press("ArrowRight");
        find("select").focus();
        press("ArrowRight");
        told.kept = at();
        button("last").focus();
        button("last").click();
        told.focus = document.activeElement === button("last");
        told.ends = all(".controls [aria-disabled=true]").length;
        all(".programs button")[1].click();
        told.program = sentence();
        const slider = find("[type=range]");
        slider.value = 5;
        slider.dispatchEvent(new Event("input"));
        told.slider = [at(), slider.getAttribute("aria-valuetext")];
        const refers = (e) => ["aria-labelledby", "aria-describedby"].map((a) => e.getAttribute(a));
        const named = (e) => e.labels?.length || e.ariaLabel || e.textContent || refers(e)[0];
        const controls = all("input, button, select, table, [role=region], [role=group]");
        told.nameless = controls.filter((e) => !named(e)).length;
        const names = all("*").flatMap(refers).filter(Boolean);
        told.labels = names.filter((name) => !document.getElementById(name)).length;
        const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
        told.twice = ids.length - new Set(ids).size;
        told.live = find("[role=status]").getAttribute("aria-live");
        return told;
        """,
    )
    steps = [s for p in PRESETS["causal"]["programs"] for s in p["steps"]]
    loads = [n for n, step in enumerate(steps) if step["kind"] in ("load", "init")]
    last = len(steps) - 1
    assert found["opened"] == ["window", 16]
    assert found["places"] == [1, 2, 1, loads[1], loads[2], loads[1], last, last, 0, 0]
    assert found["page"] == found["kept"] == 1
    assert found["focus"]
    assert found["ends"] == 3
    assert "Load q4\u2013q7" in found["program"]
    assert found["slider"] == [5, f"step 6 of {len(steps)}"]
    assert found["nameless"] == found["labels"] == found["twice"] == 0
    assert found["live"] == "polite"
