"""What can be measured of how the pages look: room, size, contrast."""

import pytest
from playwright.sync_api import expect

from .pages import ChatPage

PHONE = {"is_mobile": True, "has_touch": True}
PHONES = [
    pytest.param({"width": 390, "height": 844}, id="phone"),
    pytest.param({"width": 320, "height": 568}, id="small phone"),
    pytest.param({"width": 740, "height": 360}, id="phone on its side"),
]
LONG = "Rindfleischetikettierungsüberwachungsaufgabenübertragungsgesetz" * 4
PATHS = ["/", f"/?q={LONG}", "/recipes/leek-and-potato-soup"]

# The elements that reach over the viewport's sides, as a reader could see them.
OVERFLOWING = """() => {
  const wide = [...document.querySelectorAll("body *")].filter((element) => {
    const { left, right, width } = element.getBoundingClientRect();
    return element.checkVisibility() && width > 1 && (left < -0.5 || right > document.documentElement.clientWidth + 0.5);
  });
  const scrolls = [document.documentElement, document.getElementById("transcript")]
    .filter((element) => element && element.scrollWidth > element.clientWidth);
  return [...wide, ...scrolls].map((element) => element.outerHTML.slice(0, 200));
}"""

SMALL_TARGETS = """() => [...document.querySelectorAll("button, input, select, textarea")]
  .filter((element) => element.checkVisibility())
  .map((element) => [element.outerHTML.slice(0, 100), element.getBoundingClientRect().height])
  .filter(([, height]) => height < 36)"""

# WCAG 2.2, 1.4.3: every visible text against the background that it is really on.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => {
    const [r, g, b] = rgba(color).map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const backgroundOf = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = getComputedStyle(each).backgroundColor;
      const alpha = rgba(color)[3];
      if (alpha === 255) return color;
      if (alpha !== 0) throw new Error(`cannot tell what is behind ${color}`);
    }
    throw new Error("the page has no background");
  };
  const found = [];
  const measure = (element, text, color) => {
    const background = backgroundOf(element);
    const [light, dark] = [luminance(color), luminance(background)].sort((a, b) => b - a);
    found.push({ text, color, background, ratio: (light + 0.05) / (dark + 0.05) });
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    const seen = { opacityProperty: true, visibilityProperty: true };
    if (text && element.checkVisibility(seen)) measure(element, text, getComputedStyle(element).color);
  }
  for (const element of document.querySelectorAll("[placeholder]"))
    measure(element, element.placeholder, getComputedStyle(element, "::placeholder").color);
  return found;
}"""


def expect_readable(page, least_texts):
    texts = page.evaluate(CONTRASTS)
    assert len(texts) >= least_texts
    assert [text for text in texts if text["ratio"] < 4.5] == []


def fill_with_every_state(chat, watch, text="Because it is so."):
    """One exchange of each kind, the last still being written."""
    watch.allow("status of 429")
    chat.ask_and_answer(f"Done? {text}", text)
    chat.ask("Stopped?").write(text)
    chat.expect_reply("writing", text)
    chat.the("stop").click()
    chat.expect_reply("stopped", text)
    chat.ask("Failed?").fail("QueueFullError", f"Too many are asking. {text}")
    chat.expect_reply("failed")
    answer = chat.ask("Writing?")
    answer.write(text)
    chat.expect_reply("writing", text)
    return answer


@pytest.mark.parametrize("viewport", PHONES)
def test_on_a_phone_nothing_is_wider_than_the_screen(new_page, server, watch, viewport):
    page = new_page(viewport=viewport, **PHONE)
    for path in PATHS:
        page.goto(path)
        assert page.evaluate(OVERFLOWING) == []
    page.get_by_test_id("suggest-prompt").fill(LONG)
    page.get_by_test_id("suggest").click()
    answer = server.next_answer()
    answer.write(LONG)
    expect(page.get_by_test_id("suggestion")).to_have_text(LONG)
    assert page.evaluate(OVERFLOWING) == []
    answer.finish()
    expect(page.get_by_test_id("suggest")).to_be_enabled()
    page.reload()
    expect(page.get_by_test_id("kept").first).to_contain_text(LONG)
    assert page.evaluate(OVERFLOWING) == []
    chat = ChatPage(page, server).open()
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate(SMALL_TARGETS) == []
    answer = fill_with_every_state(chat, watch, text=LONG)
    assert page.evaluate(OVERFLOWING) == []
    answer.finish()
    chat.expect_reply("done", LONG)
    chat.the("prompt").fill(LONG * 5)
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate(SMALL_TARGETS) == []
    for testid in ("prompt", "send", "model", "clear"):
        expect(chat.the(testid)).to_be_in_viewport(ratio=1)
    expect(chat.the("transcript")).to_be_in_viewport()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(new_page, server, watch, scheme):
    page = new_page(color_scheme=scheme)
    for path in PATHS:
        page.goto(path)
        expect_readable(page, least_texts=5)
    backdrop = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert backdrop == {"light": "rgb(246, 248, 245)", "dark": "rgb(19, 24, 22)"}[scheme]
    chat = ChatPage(page, server).open()
    expect_readable(page, least_texts=10)
    answer = fill_with_every_state(chat, watch)
    expect_readable(page, least_texts=20)
    answer.finish("length")
    chat.expect_reply("done")
    expect_readable(page, least_texts=20)
