"""wechat-sign.js in single-page apps: real Vue Router 4 and React Router 6, and what Vite and
TypeScript make of the manuals' lines. WeChat's real script.

After each route the phone has that route's title and link, for at most one getApi and one
preVerifyJSAPI a settled route. None are needed where the url to sign stays the same: on iOS, and
where the route is in the fragment.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from browser import KINDS, NPM, Phone, Signing, Site, bridge_for, npm_file
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
  const hop = {template: '<p>…</p>', mounted () { router.replace('/home') }}
  const router = createRouter({
    history: HASH ? createWebHashHistory() : createWebHistory(),
    routes: [
      {path: '/', redirect: '/start'},
      {path: '/start', component: hop},
      {path: '/home', component},
      {path: '/item/:id', component},
      {path: '/private', component, beforeEnter: async () => '/login?back=/private'},
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
    createRoutesFromElements, useLocation, useNavigate
  } = ReactRouterDOM
  const name = at => at.pathname.split('/').filter(Boolean).map(decodeURIComponent).join(' ')
  const Hop = ({to}) => h(Navigate, {to, replace: true})
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
  const routes = h(Route, {path: '/', element: h(Layout)},
    h(Route, {index: true, element: h(Hop, {to: '/start'})}),
    h(Route, {path: 'start', element: h(Hop, {to: '/home'})}),
    page('home'), page('login'), page('item/:id'),
    h(Route, {path: 'private', loader: async () => redirect('/login?back=/private')}))
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
      {RECORD}
      wechatSign(() => ({{desc: 'about ' + document.title}}))
      {code}
    </script>"""


@pytest.mark.parametrize("engine", ["Chromium", "WebKit"])
@pytest.mark.parametrize("mode", ["history", "hash"])
@pytest.mark.parametrize("app", ["Vue", "React"])
def test_each_route_is_shared_as_it_is_and_signed_once(
    request: pytest.FixtureRequest, site: Site, signing: Signing, app: str, mode: str, engine: str
) -> None:
    for package in PACKAGES[app]:
        npm_file(*package)
    origin = site(spa(app, mode, signing))
    base = origin + ("/#" if mode == "hash" else "")
    tabs: dict[str, Phone] = {}
    if engine == "WebKit":
        site.files["/bridge.js"] = bridge_for("iOS", signing.wechat)
        webkit = request.getfixturevalue("webkit")
        tabs["iOS"] = Phone(webkit.tab(KINDS["iOS"].agent), signing.wechat)
    else:
        open_phone = request.getfixturevalue("phone")
        for kind in ("iOS", "Android", "HarmonyOS", "Windows"):
            tabs[kind] = open_phone(kind, delays={"preVerifyJSAPI": 100})
    for tab in tabs.values():
        tab.open(base + "/")
    way = [
        ("0", "/home", "home"),  # / redirects to /start, and that to /home
        ("go('/item/1')", "/item/1", "item 1"),
        ("go('/item/2?q=a%20b')", "/item/2?q=a%20b", "item 2"),
        ("go('/item/中')", "/item/%E4%B8%AD", "item 中"),
        ("go('/private')", "/login?back=/private", "login"),
        ("[4, 5, 6].map((id, at) => setTimeout(go, 15 * at, '/item/' + id))", "/item/6", "item 6"),
        ("history.back()", "/item/5", "item 5"),
        ("history.forward()", "/item/6", "item 6"),
        ("history.go(-3)", "/login?back=/private", "login"),
        ("replace('/item/7')", "/item/7", "item 7"),
        ("[8, 9].map(id => replace('/item/' + id))", "/item/9", "item 9"),
        # While WeChat verifies the one before.
        ("[1, 2, 3].map((id, at) => setTimeout(go, 80 * at, '/item/' + id))", "/item/3", "item 3"),
    ]
    for step, route, title in way:
        for tab in tabs.values():
            tab.js(f"void {step}")
        for kind, tab in tabs.items():
            tab.shared(title=title, link=base + route, desc=f"about {title}")
            settled = "1" if mode == "hash" or kind == "iOS" else "settled()"
            known = f"[{settled}, phone.count('preVerifyJSAPI'), {ASKED}]"
            allowed, *asked = tab.js(known)
            assert max(asked) <= allowed, (kind, asked, allowed)
    for tab in tabs.values():
        assert not any(call["problem"] for call in tab.configs())
        for name in ("menu:share:appmessage", "menu:share:timeline"):
            sent = tab.js(f"phone.send('{name}')")
            assert (sent["title"], sent["link"]) == (title, base + route)


BUILD = ["vite@8.4.0", "typescript@6.0.3", "weixin-js-sdk@1.6.5"]


def test_vite_and_typescript_build_the_manuals_lines_as_they_stand(
    phone: OpenPhone, site: Site, signing: Signing, tmp_path: Path
) -> None:
    npm = shutil.which("npm") or unavailable("no npm to build with: apt-get install npm")
    there = NPM / "build"
    if not (there / "node_modules" / "vite").is_dir():
        there.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--silent", "--no-audit", "--no-fund", *BUILD]
        subprocess.run(command, cwd=there, check=True)
    [lines] = [block.text for block in blocks_of(ENGLISH) if block.language == "ts"]
    (tmp_path / "node_modules").symlink_to(there / "node_modules")
    for name in ("wechat-sign.js", "wechat-sign.d.ts"):
        shutil.copy(ROOT / "wechat_sign" / name, tmp_path)
    more = "window.wechatShare = {desc: 'D'}\nvoid wechatSign.config({jsApiList: ['scanQRCode']})\n"
    (tmp_path / "app.ts").write_text(lines.replace("https://sign.example.com", signing.url) + more)
    (tmp_path / "index.html").write_text("<script type=module src=/app.ts></script>")
    tsc = "tsc --strict --noEmit --target es2022 --moduleResolution bundler --module esnext app.ts"
    for wished in (tsc, "vite build"):
        command = [npm, "exec", "--offline", "--", *wished.split()]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
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
