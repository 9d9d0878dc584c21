"""wechat-sign.js in single-page apps: real Vue Router 4 and React Router 6, and what Vite and
TypeScript make of the manuals' lines. WeChat's real script.

After each route the phone has that route's title and link, for at most one getApi and one
preVerifyJSAPI a settled route. None are needed where the url to sign stays the same: on iOS, and
where the route is in the fragment.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from browser import KINDS as AGENTS
from browser import NPM, Phone, Signing, Site, bridge_for, npm_file
from conftest import OpenPhone
from harness import ROOT, unavailable
from manuals import ENGLISH, blocks_of

PACKAGES = {
    "Vue": [
        ("vue@3.5.45", "dist/vue.global.prod.js"),
        ("vue-router@4.6.5", "dist/vue-router.global.prod.js"),
    ],
    "React": [
        ("react@18.3.1", "umd/react.production.min.js"),
        ("react-dom@18.3.1", "umd/react-dom.production.min.js"),
        ("@remix-run/router@1.23.4", "dist/router.umd.min.js"),
        ("react-router@6.30.6", "dist/umd/react-router.production.min.js"),
        ("react-router-dom@6.30.6", "dist/umd/react-router-dom.production.min.js"),
    ],
}
APPS = ["Vue", "React"]
MODES = ["history", "hash"]
KINDS = ["iOS", "Android", "HarmonyOS", "Windows"]

ASKED = "performance.getEntriesByType('resource').filter(at => /getApi/.test(at.name)).length"
RECORD = """
  const visited = [[performance.now(), location.href]]
  function arrived () { visited.push([performance.now(), location.href]) }
  for (const name of ['pushState', 'replaceState']) {
    const original = history[name]
    history[name] = function (...all) { original.apply(this, all); arrived() }
  }
  addEventListener('popstate', arrived)
  // Those that stayed for as long as wechat-sign.js waits for another.
  function settled () {
    const changes = visited.filter(([, href], at) => !at || href !== visited[at - 1][1])
    const next = at => (changes[at + 1] || [Infinity])[0]
    return changes.filter(([since], at) => next(at) - since > 49).length
  }
"""

VUE = """
  const {createRouter, createWebHistory, createWebHashHistory} = VueRouter
  const name = to => to.path.split('/').filter(Boolean).map(decodeURIComponent).join(' ')
  const component = {template: '<p>{{ $route.path }}</p>'}
  const hop = next => ({template: '<p>…</p>', mounted () {
    router.replace(next + (this.$route.params.id || ''))
  }})
  const router = createRouter({
    history: HASH ? createWebHashHistory() : createWebHistory(),
    routes: [
      {path: '/', redirect: '/start'},
      {path: '/start', component: hop('/home')},
      {path: '/home', component},
      {path: '/item/:id', component},
      {path: '/hop/:id', component: hop('/skip/')},
      {path: '/skip/:id', component: hop('/item/')},
      {path: '/private', component, beforeEnter: async () => '/login?back=/private'},
      {path: '/slow/:id', component, beforeEnter: async to => {
        await later(120)
        return '/item/' + to.params.id
      }},
      {path: '/vetoed', component, beforeEnter: async () => false},
      {path: '/login', component}
    ]
  })
  router.beforeEach(async () => { await null })
  router.afterEach((to, from, failure) => { if (!failure) document.title = name(to) })
  window.go = path => { router.push(path) }
  window.replace = path => { router.replace(path) }
  Vue.createApp({template: '<router-view/>'}).use(router).mount('#app')
"""
REACT = """
  const {createElement: h, useEffect} = React
  const {
    Route, Navigate, Outlet, RouterProvider, redirect, createBrowserRouter, createHashRouter,
    createRoutesFromElements, useLocation, useNavigate, useParams
  } = ReactRouterDOM
  const name = at => at.pathname.split('/').filter(Boolean).map(decodeURIComponent).join(' ')
  const Hop = ({next}) => h(Navigate, {to: next + (useParams().id || ''), replace: true})
  const Page = () => {
    const at = useLocation()
    useEffect(() => { document.title = name(at) }, [at])
    return h('p', null, at.pathname)
  }
  const Layout = () => {
    const navigate = useNavigate()
    useEffect(() => {
      window.go = path => navigate(path)
      window.replace = path => navigate(path, {replace: true})
    }, [navigate])
    return h(Outlet)
  }
  const page = path => h(Route, {path, element: h(Page)})
  const hop = (path, next) => h(Route, {path, element: h(Hop, {next})})
  const routes = h(Route, {path: '/', element: h(Layout)},
    h(Route, {index: true, element: h(Hop, {next: '/start'})}),
    hop('start', '/home'), page('home'), page('login'), page('item/:id'),
    hop('hop/:id', '/skip/'), hop('skip/:id', '/item/'),
    h(Route, {path: 'private', loader: async () => redirect('/login?back=/private')}),
    h(Route, {path: 'slow/:id', loader: async ({params}) => {
      await later(120)
      return redirect('/item/' + params.id)
    }}))
  const made = createRoutesFromElements(routes)
  const router = (HASH ? createHashRouter : createBrowserRouter)(made)
  ReactDOM.createRoot(document.querySelector('#app')).render(h(RouterProvider, {router}))
"""


def spa(app: str, mode: str, signing: Signing) -> str:
    """The app's page, which calls wechatSign as README has it, before the app starts."""
    libraries = [f"/npm/{package.replace('/', '+')}//{file}" for package, file in PACKAGES[app]]
    scripts = ["/bridge.js", "/jweixin.js", f"{signing.url}/wechat-sign.js", *libraries]
    tags = "".join(f'<script src="{script}"></script>' for script in scripts)
    code = (VUE if app == "Vue" else REACT).replace("HASH", str(mode == "hash").lower())
    return f"""<!doctype html><meta charset="utf-8"><title>not yet</title>
    <div id="app"></div><script>
      // A robot's steps never end, for wechat-sign.js, which would wait longer for each.
      const slow = window.setTimeout, paces = [100, 200, 400, 800, 1000]
      window.setTimeout = (call, ms, ...more) =>
        slow(call, paces.includes(ms) ? 50 : ms, ...more)
    </script>{tags}<script>
      const later = ms => new Promise(resolve => setTimeout(resolve, ms))
      {RECORD}
      wechatSign(() => ({{desc: 'about ' + document.title}}))
      {code}
    </script>"""


class Visit:
    """A phone's way through an app."""

    def __init__(self, tab: Phone, base: str, mode: str, kind: str) -> None:
        self.tab = tab
        self.kind = kind
        self.base = base + ("/#" if mode == "hash" else "")
        self.one = mode == "hash" or kind == "iOS"
        """One url is signed, whatever the route is."""

    def holds(self, route: str, title: str) -> None:
        """The phone does, in the end, and was asked no more than the settled routes need."""
        self.tab.shared(title=title, link=self.base + route, desc=f"about {title}")
        settled = "1" if self.one else "settled()"
        known = f"[{settled}, phone.count('preVerifyJSAPI'), {ASKED}]"
        allowed, *asked = self.tab.js(known)
        assert max(asked) <= allowed, (self.kind, asked, allowed)

    def ends(self, route: str, title: str) -> None:
        """Nothing was asked for in vain, and the old names share this, too."""
        self.holds(route, title)
        assert not any(call["problem"] for call in self.tab.configs())
        for name in ("menu:share:appmessage", "menu:share:timeline"):
            sent = self.tab.js(f"phone.send('{name}')")
            assert (sent["title"], sent["link"]) == (title, self.base + route)


Go = Callable[..., list[Visit]]


@pytest.fixture(params=product(APPS, MODES), ids=" by ".join)
def go(request: pytest.FixtureRequest, site: Site, signing: Signing) -> Go:
    """Opens an app on phones of these kinds at once, in Chromium or in WebKit."""
    app, mode = request.param
    for package in PACKAGES[app]:
        npm_file(*package)
    base = site(spa(app, mode, signing))

    def opened(route: str, *kinds: str, in_webkit: bool = False, **more: Any) -> list[Visit]:
        visits = []
        for kind in kinds:
            if in_webkit:
                site.files["/bridge.js"] = bridge_for(kind, signing.wechat, **more)
                browser = request.getfixturevalue("webkit")
                tab = Phone(browser.tab(AGENTS[kind].agent), signing.wechat)
            else:
                tab = request.getfixturevalue("phone")(kind, **more)
            visits.append(Visit(tab, base, mode, kind))
            tab.open(visits[-1].base + route)
        return visits

    return opened


@pytest.mark.parametrize("engine", ["Chromium", "WebKit"])
def test_each_route_is_shared_as_it_is_and_signed_once(go: Go, engine: str) -> None:
    # / redirects to /start, and that to /home.
    visits = go("/", *KINDS) if engine == "Chromium" else go("/", "iOS", in_webkit=True)
    way = [
        ("0", "/home", "home"),
        ("go('/item/1')", "/item/1", "item 1"),
        ("go('/item/2?q=a%20b')", "/item/2?q=a%20b", "item 2"),
        ("go('/item/中')", "/item/%E4%B8%AD", "item 中"),
        ("go('/hop/3')", "/item/3", "item 3"),
        ("go('/private')", "/login?back=/private", "login"),
        ("[4, 5, 6].map((id, at) => setTimeout(go, 15 * at, '/item/' + id))", "/item/6", "item 6"),
        ("history.back()", "/item/5", "item 5"),
        ("history.forward()", "/item/6", "item 6"),
        ("history.go(-3)", "/login?back=/private", "login"),
        ("replace('/item/7')", "/item/7", "item 7"),
        ("[8, 9].map(id => replace('/item/' + id))", "/item/9", "item 9"),
        ("go('/slow/10')", "/item/10", "item 10"),
    ]
    for step, route, title in way:
        for visit in visits:
            visit.tab.js(f"void {step}")
        for visit in visits:
            visit.holds(route, title)
    for visit in visits:
        visit.ends(route, title)


def test_routes_that_come_while_wechat_verifies_wait_for_it_and_the_last_is_shared(go: Go) -> None:
    visits = go("/home", "Android", "HarmonyOS", delays={"preVerifyJSAPI": 250})
    for visit in visits:
        visit.holds("/home", "home")
        visit.tab.js("[1, 2, 3].forEach((id, at) => setTimeout(go, 80 * at, '/item/' + id))")
    for visit in visits:
        visit.ends("/item/3", "item 3")


def test_back_and_forward_at_once_leave_all_as_it_was(go: Go) -> None:
    for visit in go("/home", "Android"):
        visit.holds("/home", "home")
        visit.tab.js("void go('/item/1')")
        visit.holds("/item/1", "item 1")
        visit.tab.js(
            "new Promise(resolve => { addEventListener('popstate', resolve, {once: true });"
            "history.back() }).then(() => { history.forward() })"
        )
        visit.tab.waits("location.href.endsWith('/item/1')")
        assert visit.tab.js("wechatSign().then(() => 'shared')") == "shared"
        visit.ends("/item/1", "item 1")


BUILD = ["vite@8.4.0", "typescript@6.0.3", "weixin-js-sdk@1.6.5"]


@pytest.fixture(scope="module")
def npm() -> str:
    """The program, with what builds an app installed below tests/.npm once."""
    found = shutil.which("npm")
    if found is None:
        unavailable("no npm to build with: apt-get install npm")
    there = NPM / "build"
    if not (there / "node_modules" / "vite").is_dir():
        there.mkdir(parents=True, exist_ok=True)
        command = [str(found), "install", "--silent", "--no-audit", "--no-fund", *BUILD]
        subprocess.run(command, cwd=there, check=True)
    return str(found)


def test_vite_and_typescript_build_the_manuals_lines_as_they_stand(
    npm: str, phone: OpenPhone, site: Site, signing: Signing, tmp_path: Path
) -> None:
    [lines] = [block.text for block in blocks_of(ENGLISH) if block.language == "ts"]
    (tmp_path / "node_modules").symlink_to(NPM / "build" / "node_modules")
    for name in ("wechat-sign.js", "wechat-sign.d.ts"):
        shutil.copy(ROOT / "wechat_sign" / name, tmp_path)
    more = "window.wechatShare = {desc: 'D'}\nvoid wechatSign.config({jsApiList: ['scanQRCode']})\n"
    (tmp_path / "app.ts").write_text(lines.replace("https://sign.example.com", signing.url) + more)
    (tmp_path / "index.html").write_text("<script type=module src=/app.ts></script>")
    for command in (["tsc", "--strict", "--noEmit", "--target", "es2022"], ["vite", "build"]):
        files = ["--moduleResolution", "bundler", "--module", "esnext", "app.ts"]
        wished = [*command, *(files if command[0] == "tsc" else [])]
        ended = subprocess.run(
            [npm, "exec", "--offline", "--", *wished], cwd=tmp_path, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
    [built] = (tmp_path / "dist" / "assets").glob("*.js")
    site.files["/app.js"] = built.read_text()
    tab = phone("Android")
    base = site("<!doctype html><title>built</title><script type=module src=/app.js></script>")
    tab.open(base + "/one")
    tab.shared(title="built", link=base + "/one")
    tab.js("history.pushState({}, '', '/two')")
    tab.shared(link=base + "/two")
    last = tab.calls("preVerifyJSAPI")[-1]["args"]
    assert last["verifyJsApiList"][-1] == "scanQRCode"
