"""Takes the manuals' pictures of the page: all well, a url changed by a proxy, outside WeChat.

    python tests/pictures.py

Needs what the tests of the page need. Writes .github/page.png and .github/page.zh-CN.png.
"""

from __future__ import annotations

import configparser
import io
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from browser import KINDS, Chromium, Phone, bridge_for, launched
from harness import ROOT, Sandbox, Server, write_ini
from PIL import Image

WIDTH, HEIGHT, GAP = 340, 845, 5
PICTURES = {"page.png": "en-US", "page.zh-CN.png": "zh-CN"}


def changed(route: Any) -> None:
    """As a proxy does that takes one level of escapes away."""
    address, _, query = route.request.url.partition("?")
    route.continue_(url=f"{address}?{query.replace('%25', '%')}")


def taken(browser: Any, url: str, wechat: Sandbox, locale: str, kind: str, proxy: Any) -> Any:
    context = browser.new_context(
        user_agent=KINDS[kind].agent, locale=locale, viewport={"width": WIDTH, "height": HEIGHT}
    )
    phone = Phone(Chromium(context, bridge_for(kind, wechat)), wechat)
    page = phone.tab.page  # type: ignore[attr-defined]
    if proxy is not None:
        page.route("**/getApi?*", proxy)
    phone.open(f"{url}/")
    phone.verdict()
    picture = Image.open(io.BytesIO(page.screenshot()))
    context.close()
    return picture


def main() -> None:
    example = configparser.ConfigParser(interpolation=None)
    example.read(ROOT / "config.example.ini", encoding="utf-8")
    apis = "js_api_list = " + example["jssdk"]["js_api_list"].replace("\n", " ")
    wechat = Sandbox().start()
    with tempfile.TemporaryDirectory() as folder, contextmanager(launched)() as browser:
        ini = write_ini(Path(folder) / "c.ini", wechat, "[jssdk]", apis)
        server = Server("--config", str(ini), "--address", "127.0.0.1", "--port", "0")
        for name, locale in PICTURES.items():
            shots = [
                taken(browser, server.url, wechat, locale, kind, proxy)
                for kind, proxy in (("Android", None), ("Android", changed), ("desktop", None))
            ]
            whole = Image.new("RGB", (3 * WIDTH + 2 * GAP, HEIGHT), "#fff")
            for place, shot in enumerate(shots):
                whole.paste(shot, (place * (WIDTH + GAP), 0))
            small = whole.quantize(256, dither=Image.Dither.NONE)
            small.save(ROOT / ".github" / name, optimize=True)
        server.kill()
        wechat.stop()


if __name__ == "__main__":
    main()
