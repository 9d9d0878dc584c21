/* Makes a page share as it should inside WeChat, beside WeChat's own script; both may come late.
   What to share is in window.wechatShare, or given to wechatSign(): an object, or, for each route
   of a single-page app, a function that returns one. What is missing is the page's. */
(function () {
  'use strict'
  if (typeof window === 'undefined' || window.wechatSign) return
  var SHARING = ['updateAppMessageShareData', 'updateTimelineShareData', 'onMenuShareAppMessage',
    'onMenuShareTimeline'] // Android ignores the new names without these; old apps have no others
  var PATIENCE = 15000, FRESH = 60000 // ms for an answer; ms that a signature serves once more
  var SETTLED = 50, SLOWEST = 1000 // ms without another route; ms for that where changes go on
  var agent = navigator.userAgent, inside = /MicroMessenger/i.test(agent)
  var visit = window.performance && performance.getEntriesByType &&
    performance.getEntriesByType('navigation')[0] // has the url before a router replaced it
  var entry = pageUrl(visit && visit.name.indexOf(location.origin) === 0 && visit.name)
  var keepsEntry = /iPhone|iPad|iPod/.test(agent) // to WeChat there, it stays the page's url
  var now = document.currentScript, tag = now instanceof HTMLScriptElement && now // no <img name>
  var own = /(https?:\/\/[^\s()@]*)\/wechat-sign\.js/.exec(tag ? tag.src : new Error().stack)
  var server = absolute((tag && tag.getAttribute('data-server')) || (own && own[1]) || '', entry)
  var sdk, answers = {}, banned = '' // WeChat's script; the server's answers; what CSP forbids
  var given, givenAt, wanted // what to share, or who says it; on what page; the options of config()
  var signed, told, shown // what WeChat accepted last; what it has; what the page said of itself
  var seen = location.href, turn = 0 // only the last call or route counts
  var pace, since, last = 0 // ms to wait for another; since when it waits; when work ended
  var working, leave, offline // all wait for it; ends an idle wait; once no server was reached
  function pageUrl(href) { return (href || location.href).split('#')[0] }
  function urls() { // that WeChat may take for the page's, the likelier first; a Mac may be an iPad
    return keepsEntry ? [entry, pageUrl()] : [pageUrl(), /Mac/.test(agent) ? entry : pageUrl()]
  }
  function absolute(url, base) { return !url || /^\w+:/.test(url) ? url : new URL(url, base).href }
  function address() { // without what WeChat added for one reader, or for once
    var added = '(code=[^&#]*&state=[^&#]*|from=(\\w+message|timeline)|isappinstalled=\\d)'
    return location.href.replace('#wechat_redirect', '').replace(
      RegExp('([?&])(' + added + '(&|(?=#|$)))+', 'g'),
      function (all, lead, last, name, from, more) { return more ? lead : '' })
  }
  function page() { return address().replace(/#(?![\/!]).*/, '') } // an anchor is no other page
  function copy(value) { return JSON.parse(JSON.stringify(value)) } // for WeChat to rename in it
  function meta(is) { return (document.querySelector('meta[' + is + ']') || {}).content || '' }
  function says() { // the page of itself
    return { title: document.title, desc: meta('name="description"'),
      imgUrl: meta('property="og:image"') || meta('name="og:image"') }
  }
  function warn(error) { if (inside) console.warn('wechatSign: ' + (error.message || error)) }
  function problem(message, facts) { return Object.assign(new Error(message), facts) }
  function rest(ms) { return new Promise(function (resolve) { setTimeout(resolve, ms) }) }
  function left() { return new Promise(function (resolve) { leave = resolve }) }
  function within(it, said, more) {
    function end() { throw problem(said + banned, more) }
    return Promise.race([it, rest(PATIENCE).then(end)])
  }
  function judge(answer) { // `function not exist`: an old app, which has the old names
    if (!/:(ok|function not exist)$/.test(answer.errMsg)) throw problem(answer.errMsg, answer)
  }
  // Resolves to what wx.config takes. Its Error has the url that was `sent`, the answer's `status`
  // (0: none), the server's `reason` and `errcode`, and the url that was `signed` in its place.
  function fetchConfig(url, afresh) {
    var facts = { sent: url, status: 0 }, at = 'the signing server at ' + server
    if (!window.fetch) return Promise.reject(problem('this browser is too old: no fetch', facts))
    return within(fetch(server.replace(/\/$/, '') + '/getApi?' + // no service worker has kept `at`
      (afresh ? 'at=' + Date.now() + '&url=' : 'url=') + encodeURIComponent(url), {
      referrerPolicy: 'no-referrer-when-downgrade' // tells the server what can be read in two ways
    }).then(function (answer) {
      return answer.json().then(Object, Object).then(function (body) { // null is {} then
        var arrived = answer.headers.get('Signed-Url') // its first 2048 characters, if it is there
        facts = { sent: url, status: answer.status, reason: body.error, errcode: body.errcode }
        if (answer.status === 503) facts.retry = Number(answer.headers.get('Retry-After'))
        if (!answer.ok || !body.signature) throw problem(at + ' answers ' + answer.status + (
          body.error ? ': ' + body.error : ' and not its JSON: is /getApi handed on to it?'), facts)
        if (arrived === null || arrived === url.slice(0, 2048)) return body
        throw problem('a proxy between this page and the server changed the url: ' + url +
          ' was sent, ' + arrived + ' was signed', Object.assign(facts, { signed: arrived }))
      })
    }, function () {
      offline = facts.retry = 2
      throw problem('no answer of ' + at + ' can be read' + (banned || ': it is down, a proxy ' +
        'answers for it, or its page_hosts lacks ' + location.hostname), facts)
    }), at + ' does not answer', facts)
  }
  function ask(url, afresh) { // once more after what may pass by itself within a minute
    var kept = answers[url]
    if (kept && !afresh && Date.now() - kept.at < FRESH) return Promise.resolve(kept.config)
    return fetchConfig(url, afresh).catch(function (error) {
      if (!(error.retry > 0 && error.retry <= 60)) throw error
      return Promise.race([rest(1000 * error.retry), left().then(function () { throw error })])
        .then(fetchConfig.bind(0, url, true))
    }).then(function (config) { return (answers[url] = { config: config, at: Date.now() }).config })
  }
  // Resolves when WeChat accepts, rejects with its message. Does nothing for what is stale by then.
  function configure(config, stale) {
    return within(new Promise(function (resolve) {
      function ready() {
        var bridge = window.WeixinJSBridge, invoke = bridge.invoke, script = sdk || window.wx
        // wx.error is one for all, told of long ago; wx.ready comes once. So this hears the answer.
        function listening(name, args, answered) {
          var ours = name === 'preVerifyJSAPI' && args.verifySignature === config.signature
          return invoke.call(bridge, name, args, ours ? function (answer) {
            if (bridge.invoke === listening) bridge.invoke = invoke
            try { answered(answer) } finally { resolve(answer) }
          } : answered)
        }
        if (stale && stale()) return resolve({ errMsg: ':ok' })
        try { bridge.invoke = listening } catch (sealed) {}
        script.config(copy(config))
        if (bridge.invoke === listening) return
        script.error(resolve) // ready comes at once from the second on; checkJsApi waits its turn
        script.ready(script.checkJsApi.bind(0, { jsApiList: copy(SHARING), complete: resolve }))
      }
      window.WeixinJSBridge ? ready() : document.addEventListener('WeixinJSBridgeReady', ready)
    }).then(judge), 'WeChat does not answer wx.config', { silent: true })
  }
  // By the likelier url and, after `invalid signature`, by what WeChat took, the other, or afresh.
  function sign(nth, real) {
    var was = urls()[nth], url = real || was, mine = { url: url, by: wanted, shares: !!given }
    var sharing = given ? SHARING : [], apis = wanted && wanted.jsApiList
    function stale() { return was !== urls()[nth] }
    function other(name) { return sharing.indexOf(name) < 0 }
    return ask(url, nth).then(function (config) {
      apis = sharing.concat((apis || config.jsApiList).filter(other))
      signed = told = null // WeChat takes rights away where it refuses
      return configure(Object.assign({}, config, { jsApiList: apis }), stale).then(function () {
        if (stale()) return
        if (nth && url !== urls()[0]) keepsEntry = (entry = url) !== pageUrl()
        signed = Object.assign(mine, { href: config.openTagList && location.href })
      })
    }).catch(function (error) {
      if (nth || stale() || !/invalid signature/.test(error.message)) throw error
      return sign(1, [].concat(error.realAuthUrl)[0])
    })
  }
  // Resolves when WeChat has the data, by the new names or, where it lacks those, by the old.
  function share() {
    var card = says(), mine = turn
    shown = JSON.stringify(card)
    if (!given) return
    if (window.__wxjs_environment === 'miniprogram' || /miniProgram/i.test(agent)) throw problem(
      'in a mini program pages do not share: its own onShareAppMessage does')
    var data = typeof given === 'function' ? given() : givenAt === page() && given
    var done = within(Promise.resolve(data), 'what to share is never told').then(function (data) {
      for (var name in card) card[name] = (data && data[name]) || card[name]
      card.link = absolute(data && data.link, document.baseURI) || address()
      card.imgUrl = absolute(card.imgUrl, document.baseURI)
      if (/^(data|blob):/.test(card.imgUrl)) warn('no phone shows a picture of data: or blob:')
      var news = JSON.stringify(card)
      if (news === told) return
      told = null
      return Promise.all(SHARING.map(function (name, place) {
        return sdk[name] && within(new Promise(function (resolve) {
          if (place > 1) resolve({ errMsg: ':ok' }) // that one only registers
          sdk[name](Object.assign({ complete: resolve }, card))
        }).then(judge), 'WeChat does not answer ' + name)
      })).then(function () { if (mine === turn) told = news })
    })
    return Promise.race([left(), done])
  }
  function signAndShare() { return sign(0).then(share) }
  function free() { // nothing has to be signed
    return signed && signed.url === urls()[0] && signed.by === wanted && signed.shares >= !!given
  }
  function attempt(looks) {
    if (/wxwork/i.test(agent)) throw problem('in WeCom pages share by WeCom\'s own script')
    if (window.top !== window) throw problem('in a frame WeChat does nothing: open the page itself')
    if (!server) throw problem('which signing server? Name it: {server: …} or data-server="…"')
    givenAt = givenAt || page()
    sdk = sdk || (window.wx && window.wx.config ? window.wx : window.jWeixin)
    if (!sdk && looks) return rest(PATIENCE / 100).then(attempt.bind(null, looks - 1))
    if (!sdk) throw problem('WeChat\'s script jweixin-1.6.0.js is not here' + (banned ||
      '; {wx: wx} hands it in'))
    // Rights that are there are used first: what fails after that takes nothing away.
    return !free() ? signAndShare() : Promise.resolve().then(share).then(function () {
      // Open tags die with the route unless wx.config is called again.
      if (signed.href && signed.href !== location.href) return sign(0).catch(warn)
    }, signAndShare)
  }
  // One attempt at a time; who comes meanwhile gets the newest one's outcome. While changes go on,
  // each waits twice as long as the one before it, and what is free is told once a second.
  function work() {
    var mine = turn
    pace = Date.now() - last < SLOWEST ? Math.min(2 * pace, SLOWEST) : SETTLED
    return rest(free() ? Math.min(pace, since + SLOWEST - Date.now()) : pace).then(function () {
      if (mine !== turn && !(free() && Date.now() - since >= SLOWEST)) return
      since = Date.now()
      return inside && attempt(100)
    }).then(function () {}, function (error) { return error }).then(function (error) {
      last = Date.now()
      if (mine !== turn) return work()
      working = null
      pageChanged()
      if (error) throw error
    })
  }
  function again() {
    turn++
    if (leave) leave()
    if (!working) (working = work(since = Date.now())).catch(warn)
    return working
  }
  function againIf(changed) { if (changed && (given || wanted)) call() }
  function routeChanged() { againIf(seen !== (seen = location.href)) }
  function pageChanged() { againIf(!working && shown && shown !== JSON.stringify(says())) }
  function call(options) {
    sdk = (options && options.wx) || sdk
    server = absolute(options && options.server, location.href) || server
    return window.Promise && again()
  }
  window.wechatSign = function (data, options) {
    if (data) givenAt = null
    given = data || given || {}
    return call(options)
  }
  // For the page's own calls: wx.config without sharing. And its two steps, for the server's page.
  window.wechatSign.config = function (options) { return call(wanted = options || wanted || {}) }
  window.wechatSign.fetchConfig = fetchConfig
  window.wechatSign.configure = configure
  ;['pushState', 'replaceState'].forEach(function (name) {
    var original = history[name]
    function watched() { try { return original.apply(this, arguments) } finally { routeChanged() } }
    try { history[name] = watched } catch (frozen) {}
  })
  if (window.navigation) navigation.addEventListener('currententrychange', routeChanged)
  addEventListener('popstate', routeChanged) // of the fragment, too
  addEventListener('online', function () { againIf(offline) })
  addEventListener('pageshow', function (event) { againIf(event.persisted && !(told = null)) })
  document.addEventListener('securitypolicyviolation', function (event) {
    var url = event.blockedURI, wx = /^(weixin|wvjb)|\/\/res2?\.wx\.qq\.com/.test(url)
    if (wx || url.indexOf(server) === 0) banned = ': its Content-Security-Policy forbids ' + url
  })
  var any = { childList: true, subtree: true, characterData: true, attributes: true }
  if (window.MutationObserver) new MutationObserver(pageChanged).observe(document.head, any)
  if (window.wechatShare) window.wechatSign(window.wechatShare)
})()
