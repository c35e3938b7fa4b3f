"""The playground: its arithmetic against torch, its words, and the page itself."""

import base64
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from docs.chinese import DOCS
from flashlayer import online_softmax
from tests.docs.browser import evaluate
from tests.docs.test_chinese import UNEVEN

FOLDER = DOCS / "_static" / "playground"
NUMBERS, WORDS, PLAYGROUND = (FOLDER / f"{name}.js" for name in ("numbers", "words", "playground"))
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# In and out of JavaScript as bytes: JSON has no infinity and no -0. Results are numbers of the
# types, so fp32 holds them.
BYTES = """
const coded = (items) => {
  const bytes = new Uint8Array(Float32Array.from(items).buffer);
  const pieces = [];
  for (let at = 0; at < bytes.length; at += 8192)
    pieces.push(String.fromCharCode(...bytes.subarray(at, at + 8192)));
  return btoa(pieces.join(""));
};
const decoded = (type, text) =>
  Float64Array.from(new type(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
const each = (f, ...given) => coded(given[0].map((_, i) => f(...given.map((g) => g[i]))));
"""


def js(numbers: np.ndarray | Tensor) -> str:
    """Numbers as an expression of JavaScript."""
    given = numbers.float().numpy() if isinstance(numbers, Tensor) else numbers
    text = base64.b64encode(given.tobytes()).decode()
    return f'decoded(Float{8 * given.itemsize}Array, "{text}")'


def assert_same(found: np.ndarray, expected: Any, *given: Any) -> None:
    """Equal bit for bit; any NaN equals any other."""
    expected, *operands = (
        np.asarray(x.double() if isinstance(x, Tensor) else x, np.float64)
        for x in (expected, *given)
    )
    same = found.view(np.int64) == expected.view(np.int64)
    wrong = np.flatnonzero(~(same | (np.isnan(found) & np.isnan(expected))))
    for i in wrong[:1]:
        told = f"{[x[i].item() for x in operands]} gives {found[i]}, not {expected[i]}"
        raise AssertionError(f"{told}, and {len(wrong) - 1} others")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def patterns(name: str) -> Tensor:
    """Every number of a 16-bit type, the infinities and NaNs among them."""
    return torch.arange(-(2**15), 2**15).short().view(TYPES[name])


def around_the_numbers(name: str) -> Tensor:
    """Every number of a 16-bit type, the midpoint to the next, and the fp32 beside both."""
    numbers = patterns(name)
    successors = (numbers.view(torch.int16) + 1).view(TYPES[name])
    exact = torch.cat([numbers.float(), (numbers.float() + successors.float()) / 2])
    up, down = (exact.nextafter(torch.tensor(side)) for side in (torch.inf, -torch.inf))
    return torch.cat([exact, up, down])


def beside_midpoints(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Doubles that a rounding to fp32 on the way would put on a midpoint; the nearest numbers."""
    bits = {"fp16": 10, "bf16": 7, "fp32": 23}[name]
    below = 1 + torch.randint(2**bits, (2000,), generator=generator()).numpy() / 2**bits
    exponents = torch.randint(-14, 15, (2000,), generator=generator()).numpy()
    nearest = np.ldexp([below, below + 2.0**-bits], exponents)
    middle = nearest.mean(0)
    given = [np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)]
    return np.concatenate(given), np.concatenate(nearest)


def any_doubles() -> np.ndarray:
    bits = torch.randint(-(2**63), 2**63 - 1, (20000,), generator=generator())
    return np.concatenate([bits.numpy().view(np.float64), np.ldexp(1.5, np.arange(-160, 130))])


def operands(name: str) -> Tensor:
    if name == "fp32":
        return (
            torch.randint(-(2**31), 2**31, (2, 20000), generator=generator())
            .int()
            .view(TYPES[name])
        )
    return (
        torch.randint(-(2**15), 2**15, (2, 20000), generator=generator()).short().view(TYPES[name])
    )


Row = tuple[list[float], list[float], list[list[int]]]


def rows() -> list[Row]:
    """Scores and values, and blocks of the keys in some order."""
    made = []
    for row in range(40):
        keys, size = 1 + row % 16, 1 + row % 6
        scores, values = torch.randn(2, keys, generator=generator().manual_seed(row)).tolist()
        scores = [(1, 4, 12, 60)[row % 4] * score for score in scores]
        if row % 5 == 0:
            scores[: (keys + 1) // 2] = [-math.inf] * ((keys + 1) // 2)
        order = torch.randperm(keys, generator=generator().manual_seed(row)).tolist()
        made.append((scores, values, [order[k : k + size] for k in range(0, keys, size)]))
    return made


KEPT = [(name, kept) for name in TYPES for kept in dict.fromkeys((name, "fp32"))]


@pytest.fixture(scope="module")
def answers() -> dict[str, np.ndarray]:
    """What numbers.js gives for all of the above: one start of the browser."""
    asked = {"fround": f'each((x) => numbers.round("fp32", x), {js(any_doubles())})'}
    for name in TYPES:
        given = {"beside": beside_midpoints(name)[0]}
        if name != "fp32":
            given |= {"round": around_the_numbers(name)}
            e = f'(x) => numbers.round("{name}", Math.exp(x))'
            asked[f"exp {name}"] = f"each({e}, {js(patterns(name))})"
        for what, numbers in given.items():
            asked[f"{what} {name}"] = f'each((x) => numbers.round("{name}", x), {js(numbers)})'
        a, b = map(js, operands(name))
        for sign in "+-*/":
            f = f'(x, y) => numbers.round("{name}", x {sign} y)'
            asked[f"{sign} {name}"] = f"each({f}, {a}, {b})"
        asked[f"limits {name}"] = f'coded(Object.values(numbers.limits("{name}")))'
    for name, kept in KEPT:
        for number, (scores, values, blocks) in enumerate(rows()):
            given = ", ".join(
                f"[...{js(torch.tensor(x, dtype=TYPES[name]))}]" for x in (scores, values)
            )
            asked[f"{name} {kept} {number}"] = (
                f'coded(numbers.online("{name}", "{kept}", {given}, {blocks})'
                ".flatMap(({ state: { m, l, o }, out }) => [m, l, o, out]))"
            )
    listed = ", ".join(f'"{name}": {expression}' for name, expression in asked.items())
    found = evaluate([NUMBERS], f"(() => {{ {BYTES} return {{ {listed} }}; }})()")
    return {
        name: np.frombuffer(base64.b64decode(text), np.float32).astype(np.float64)
        for name, text in found.items()
    }


Answers = dict[str, np.ndarray]


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_rounding_is_torchs(name: str, answers: Answers) -> None:
    given = around_the_numbers(name)
    assert_same(answers[f"round {name}"], given.to(TYPES[name]), given)


@pytest.mark.parametrize("name", TYPES)
def test_doubles_are_rounded_once(name: str, answers: Answers) -> None:
    given, nearest = beside_midpoints(name)
    assert_same(answers[f"beside {name}"], nearest, given)


def test_fp32_is_rounded_as_by_numpy(answers: Answers) -> None:
    given = any_doubles()
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        assert_same(answers["fround"], given.astype(np.float32), given)


@pytest.mark.parametrize("name", TYPES)
def test_operations_are_torchs(name: str, answers: Answers) -> None:
    a, b = operands(name)
    for sign, expected in {"+": a + b, "-": a - b, "*": a * b, "/": a / b}.items():
        assert_same(answers[f"{sign} {name}"], expected, a, b)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_exponentials_are_torchs(name: str, answers: Answers) -> None:
    """Of every number. torch's own is that of fp32, rounded again: beside a midpoint it differs."""
    given, found = patterns(name), answers[f"exp {name}"]
    assert_same(found, exp(given), given)
    own = given.exp().double().numpy()
    differ = (own != found) & ~np.isnan(found)
    assert differ.mean() < 1e-3
    assert np.allclose(own[differ], found[differ], rtol=2.0**-7)


@pytest.mark.parametrize("name", TYPES)
def test_limits(name: str, answers: Answers) -> None:
    above, below = torch.tensor(answers[f"limits {name}"]).to(TYPES[name])
    assert [above.item(), below.item()] == answers[f"limits {name}"].tolist()
    beyond = [x.nextafter(x * torch.inf) for x in (above, below)]
    assert exp(above) < torch.inf == exp(beyond[0])
    assert exp(below) > 0 == exp(beyond[1])


def exp(x: Tensor) -> Tensor:
    """Rounded once from double precision; torch rounds to fp32 and then to half."""
    e = x.double().exp()
    if x.dtype != torch.float16:
        return e.to(x.dtype)
    with np.errstate(over="ignore", under="ignore"):
        return torch.tensor(e.numpy().astype(np.float16))


def by_hand(
    scores: Tensor, values: Tensor, blocks: list[list[int]], kept: torch.dtype
) -> list[Tensor]:
    """m, l, o and the output after each block, one operation of torch after the other."""
    zero = torch.zeros((), dtype=kept)

    def finite(m: Tensor) -> Tensor:
        return zero if m == -torch.inf else m

    m, l, o = zero - torch.inf, zero, zero  # noqa: E741
    states = []
    for keys in blocks:
        own_m = scores[keys].max().to(kept)
        own_l, own_o = zero, zero
        for j in keys:
            p = exp(scores[j].to(kept) - finite(own_m))
            own_l = own_l + p
            own_o = own_o + p.to(values.dtype).to(kept) * values[j].to(kept)
        new = torch.maximum(m, own_m)
        a, b = exp(m - finite(new)), exp(own_m - finite(new))
        m, l, o = new, a * l + b * own_l, a * o + b * own_o  # noqa: E741
        out = (o / (l if l > 0 else 1)).to(values.dtype)
        states += [x.double() for x in (m, l, o, out)]
    return states


@pytest.mark.parametrize(("name", "kept"), KEPT)
def test_states_are_torchs(name: str, kept: str, answers: Answers) -> None:
    for number, (scores, values, blocks) in enumerate(rows()):
        s, v = (torch.tensor(x, dtype=TYPES[name]) for x in (scores, values))
        expected = torch.stack(by_hand(s, v, blocks, TYPES[kept]))
        assert_same(answers[f"{name} {kept} {number}"], expected)


def test_states_are_the_librarys(answers: Answers) -> None:
    for number, (scores, values, blocks) in enumerate(rows()):
        s, v = (torch.tensor(x, dtype=torch.float32).double() for x in (scores, values))
        state = online_softmax.init_state((1,), 1, dtype=torch.float64)
        expected = []
        for keys in blocks:
            state = online_softmax.update(state, s[None, keys], v[keys, None])
            expected += [*state, online_softmax.finalize(state)]
        found = torch.tensor(answers[f"fp32 fp32 {number}"])
        expected = torch.cat([x.flatten() for x in expected])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def on_the_page(language: str, body: str) -> Any:
    """What a function body returns on the playground's page, in a column 368 pixels wide."""
    style = f'<link rel="stylesheet" href="{(FOLDER / "playground.css").as_uri()}">'
    lang = f'<script>document.documentElement.lang = "{language}";</script>'
    page = f'{style}{lang}<div class="playground" style="width: 368px"></div>'
    helpers = """
    const root = document.querySelector(".playground");
    const find = (selector) => root.querySelector(selector);
    const all = (selector) => [...root.querySelectorAll(selector)];
    const set = (control, value, kind = "input") => {
      control.value = value;
      control.dispatchEvent(new Event(kind));
    };
    const rows = (table) => all(`[aria-labelledby="${table}-caption"] tbody tr`);
    const column = (table, number) => rows(table).map((row) => row.cells[number].textContent);
    const verdicts = () => all("[role=status] p").map((p) => p.textContent);
    """
    scripts = [NUMBERS, WORDS, PLAYGROUND]
    return evaluate(scripts, f"(() => {{ {helpers} {body} }})()", page=page)


def test_every_preset_in_both_languages() -> None:
    body = """
    const told = {};
    for (const option of all("select option"))
      for (const type of ["fp16", "bf16", "fp32"])
        for (const kept of ["same", "wide"]) {
          set(find("select"), option.value, "change");
          find(`input[value=${type}]`).click();
          find(`input[value=${kept}]`).click();
          told[[option.value, type, kept]] = [verdicts(), column("orders", 1), root.innerText];
        }
    return { told, words: PLAYGROUND_WORDS };
    """
    pages = {language: on_the_page(language, body) for language in ("en", "zh-CN")}
    words = pages["en"]["words"]
    for page in pages.values():
        for _, maxima, text in page["told"].values():
            assert len(set(maxima)) == 1
            assert "undefined" not in text
            assert "{" not in text
    english = pages["en"]["told"]
    for preset, type_, verdict in (
        ("presetOrdinary", "fp16", "right in fp16"),
        ("presetTooLarge", "fp16", "2 of 8 exponentials overflow in fp16"),
        ("presetTooLarge", "bf16", "right in bf16"),
        ("presetTooLow", "fp16", "every exponential is 0 in fp16"),
        ("presetTooLow", "fp32", "right in fp32"),
        ("presetSum", "fp16", "each exponential is finite in fp16, their sum is not"),
        ("presetNothing", "fp32", "every exponential is 0"),
    ):
        naive, safe = english[f"{preset},{type_},same"][0]
        assert verdict in naive
        assert ("no key is visible" in safe) == (preset == "presetNothing")
    assert "outputs differ by at most" in english["presetStall,bf16,same"][2]
    chinese = "".join(text for _, _, text in pages["zh-CN"]["told"].values())
    for name, word in words.items():
        assert UNEVEN.findall(word["zh"]) == [], word
        assert set(re.findall(r"{\w+}", word["zh"])) == set(re.findall(r"{\w+}", word["en"]))
        for piece in re.split(r"{\w+}", word["en"]):
            if re.search("[A-Za-z]{4}", piece.replace("softmax", "")):
                assert piece.strip() not in chinese, name


def test_controls() -> None:
    found = on_the_page(
        "en",
        """
        const told = {};
        const [bar] = all(".bar input"), [field] = all(".key input[type=text]");
        set(bar, "15");
        told.dragged = [field.value, bar.getAttribute("aria-valuetext"), verdicts()[0]];
        set(field, "-inf");
        told.masked = [bar.getAttribute("aria-valuetext"), column("softmax", 1)[0]];
        set(field, "twelve");
        told.wrong = [field.getAttribute("aria-invalid"), column("softmax", 1)[0]];
        set(field, "\u22121e1");
        told.typed = [field.getAttribute("aria-invalid"), column("softmax", 1)[0]];

        set(find(".row input[type=range]"), "4");
        told.blocks = column("states", 1);
        const later = () => find("[aria-label='move block 1 later']");
        later().focus();
        later().click();
        told.moved = [column("states", 1), document.activeElement.getAttribute("aria-label")];
        told.said = all("[role=status]").map((p) => p.textContent);
        told.rows = column("orders", 0);

        const press = (words) => all("button").find((b) => b.textContent === words).click();
        for (let i = 0; i < 20; i++) press("add a key");
        told.most = column("softmax", 0);
        for (let i = 0; i < 20; i++) press("remove the last key");
        told.least = [column("softmax", 0), column("states", 1)];

        const named = (e) =>
          e.labels?.length || e.ariaLabel || e.textContent || e.hasAttribute("aria-labelledby");
        const controls = all("input, button, select, [role=region], [role=group]");
        told.nameless = controls.filter((e) => !named(e)).length;
        told.overflow = root.scrollWidth - root.clientWidth;
        return told;
        """,
    )
    assert found["dragged"][:2] == ["15", "15, exp overflows"]
    assert "1 of 8 exponentials overflow" in found["dragged"][2]
    assert found["masked"] == ["-inf, masked", "-inf"]
    assert found["wrong"] == ["true", "-inf"]
    assert found["typed"] == ["false", "-10"]
    assert found["blocks"] == ["", "1\u20134", "5\u20138"]
    assert found["moved"] == [["", "5\u20138", "1\u20134"], "move block 1 earlier"]
    assert "Block 1 comes at step 2 of 2." in found["said"]
    assert found["rows"][-2:] == ["as chosen above", "exact, in fp64"]
    assert found["most"] == [*map(str, range(1, 17)), "sum"]
    assert found["least"] == [["1", "sum"], ["", "1"]]
    assert found["nameless"] == 0
    assert found["overflow"] <= 0
