/* Makes a page share as it should inside WeChat, beside WeChat's own script. Both may come late:

     <script>window.wechatShare = function () { return { title: '…', desc: '…' } }</script>
     <script async src="…/jweixin-1.6.0.js"></script><script async src="…/wechat-sign.js"></script>

   The function is called for each route of a single-page app. The manual has the rest. */

(function () {
  'use strict'
  if (typeof window === 'undefined' || window.wechatSign) return
  // Android ignores the new names where the old are not there as well; old apps have no others.
  var SHARING = ['updateAppMessageShareData', 'updateTimelineShareData', 'onMenuShareAppMessage',
    'onMenuShareTimeline']
  var PATIENCE = 15000 // ms for WeChat or the server to answer
  var SETTLED = 50     // ms without another route: what is quicker is a redirect
  var agent = navigator.userAgent
  var inside = /MicroMessenger/i.test(agent)
  var visit = window.performance && performance.getEntriesByType &&
    performance.getEntriesByType('navigation')[0] // knows the url also where a router replaced it
  var entry = pageUrl(visit && visit.name.indexOf(location.origin) === 0 && visit.name)
  var keepsEntry = /iPhone|iPad|iPod/.test(agent) // to WeChat there, it stays the page's url
  var now = document.currentScript, tag = now instanceof HTMLScriptElement && now // no <img name>
  var own = /(https?:\/\/[^\s()@]*)\/wechat-sign\.js/.exec(tag ? tag.src : new Error().stack)
  var server = (tag && tag.getAttribute('data-server')) || (own && own[1]) || '' // no tag: a module
  var sdk, given     // WeChat's script; what to share, or the function that says it
  var signed = null  // what WeChat accepted last: the url, where the page was, its open tags
  var seen = location.href
  var turn = 0       // only the last call or route counts
  var working, leave // the Promise of all who wait; ends a wait for what is no longer wanted
  var offline, titled = null // no server was reached; the page's title when it was shared

  function pageUrl(href) { return (href || location.href).split('#')[0] }
  function urls() { // that WeChat may take for the page's, the likelier first; a Mac may be an iPad
    return keepsEntry ? [entry, pageUrl()] : [pageUrl(), /Mac/.test(agent) ? entry : pageUrl()]
  }
  function absolute(url) { // by the document's base, as links are
    return !url || /^[a-z]+:/i.test(url) ? url
      : Object.assign(document.createElement('a'), { href: url }).href
  }
  function address() { // without what WeChat added for one reader, or for once
    var theirs = 'code=[^&#]*&state=[^&#]*|from=(singlemessage|groupmessage|timeline)'
    return location.href.replace('#wechat_redirect', '').replace(
      new RegExp('([?&])((' + theirs + '|isappinstalled=\\d)(&|(?=#|$)))+', 'g'),
      function (all, lead, last, name, from, more) { return more ? lead : '' })
  }
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
  function within(promise, message, facts) {
    return Promise.race([promise, rest(PATIENCE).then(function () {
      throw problem(message, facts)
    })])
  }
  function judge(answer) { // `function not exist`: an old app, which has the old names
    if (!/:(ok|function not exist)$/.test(answer.errMsg)) throw new Error(answer.errMsg)
  }

  // Resolves to what wx.config takes. Its Error has the url that was `sent`, the answer's `status`
  // (0: none), the server's `reason` and `errcode`, and the url that was `signed` in its place.
  function fetchConfig(url) {
    var facts = { sent: url, status: 0 }, at = 'the signing server at ' + server
    return within(fetch(server.replace(/\/$/, '') + '/getApi?url=' + encodeURIComponent(url), {
      referrerPolicy: 'no-referrer-when-downgrade' // tells the server what can be read in two ways
    }).then(function (answer) {
      offline = false
      return answer.json().catch(Object).then(function (body) {
        var arrived = answer.headers.get('Signed-Url') // its first 2048 characters, if it is there
        body = body || {}
        facts = { sent: url, status: answer.status, reason: body.error, errcode: body.errcode }
        if (answer.status === 503) facts.retry = Number(answer.headers.get('Retry-After'))
        if (!answer.ok || !body.signature) throw problem(at + ' answers ' + answer.status +
          (body.error ? ': ' + body.error :
            ' and not its JSON: is /getApi handed on to it?'), facts)
        facts.signed = arrived
        if (arrived === null || arrived === url.slice(0, 2048)) return body
        throw problem('a proxy between this page and the server changed the url: ' + url +
          ' was sent, ' + arrived + ' was signed', facts)
      })
    }, function () {
      offline = facts.retry = 2
      throw problem('no answer of ' + at + ' can be read: it is down, a proxy answers for it, or ' +
        'its page_hosts lacks ' + location.hostname, facts)
    }), at + ' does not answer', facts)
  }
  function ask(url) { // once more after what may pass by itself, unless it is over a minute
    return fetchConfig(url).catch(function (error) {
      if (!(error.retry > 0 && error.retry <= 60)) throw error
      var stopped = left().then(function () { throw error })
      return Promise.race([rest(error.retry * 1000), stopped]).then(fetchConfig.bind(null, url))
    })
  }
  // Resolves when WeChat accepts, rejects with its message. Does nothing for what is stale by then.
  function configure(config, stale) {
    return within(new Promise(function (resolve) {
      function ready() {
        var bridge = window.WeixinJSBridge, invoke = bridge.invoke, script = sdk || window.wx
        // wx.error is one for everybody, told of failures of long ago; wx.ready comes but once. So
        // this listens to the answer, once WeChat's script has worded it.
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
        script.error(resolve)
        script.ready(function () { // comes at once from the second on; checkJsApi waits its turn
          script.checkJsApi({ jsApiList: copy(SHARING), complete: resolve })
        })
      }
      if (window.WeixinJSBridge) ready()
      else document.addEventListener('WeixinJSBridgeReady', ready)
    }).then(judge), 'WeChat does not answer wx.config', { silent: true })
  }
  // By the likelier url and, after `invalid signature`, once more: by the other, or afresh.
  function sign(place) {
    var url = urls()[place]
    function stale() { return url !== urls()[place] }
    function other(name) { return SHARING.indexOf(name) < 0 }
    return ask(url).then(function (config) {
      config.jsApiList = SHARING.concat(config.jsApiList.filter(other))
      signed = null // WeChat takes rights away where it refuses
      return configure(config, stale).then(function () {
        if (stale()) return
        if (place && url !== urls()[0]) keepsEntry = !keepsEntry
        signed = { url: url, href: location.href, tags: (config.openTagList || '').length }
      })
    }).catch(function (error) {
      if (place || stale() || !/invalid signature/.test(error.message)) throw error
      return sign(1)
    })
  }
  // Resolves when WeChat has the data, by the new names or, where it lacks those, by the old.
  function share() {
    titled = document.title
    var told = Promise.resolve(typeof given === 'function' ? given() : given).then(function (data) {
      var card = says()
      for (var name in card) card[name] = (data && data[name]) || card[name]
      card.link = absolute(data && data.link) || address()
      card.imgUrl = absolute(card.imgUrl)
      if (/^(data|blob):/.test(card.imgUrl)) warn('no phone shows a picture of data: or blob:')
      return Promise.all(SHARING.map(function (name, place) {
        return sdk[name] && within(new Promise(function (resolve) {
          if (place > 1) resolve({ errMsg: ':ok' }) // that one only registers
          sdk[name](Object.assign({ complete: resolve }, card))
        }).then(judge), 'WeChat does not answer ' + name)
      }))
    })
    return Promise.race([left(), told])
  }
  function signAndShare() { return sign(0).then(share) }
  function script() { // resolves when WeChat's is there, which may be loaded after this one
    var looks = PATIENCE / SETTLED
    return within(new Promise(function (resolve) {
      (function look() {
        sdk = sdk || (window.wx && window.wx.config ? window.wx : window.jWeixin)
        sdk ? resolve() : looks-- && setTimeout(look, SETTLED)
      })()
    }), 'WeChat\'s script jweixin-1.6.0.js is not here; {wx: wx} hands it in')
  }
  function attempt() {
    if (!inside) return
    if (!server) throw new Error('which signing server? Name it: {server: …} or data-server="…"')
    return script().then(shareOrSign)
  }
  function shareOrSign() {
    // Rights that are there are used first: what fails after that takes nothing away.
    if (!signed || signed.url !== urls()[0]) return signAndShare()
    return share().then(function () {
      // Open tags die with the route unless wx.config is called again.
      if (signed.tags && signed.href !== location.href) return sign(0).catch(warn)
    }, signAndShare)
  }
  // One attempt at a time; who comes meanwhile gets the newest one's outcome.
  function work() {
    var mine = turn
    return rest(SETTLED).then(function () {
      if (mine === turn) return attempt()
    }).then(function () {}, function (error) { return error }).then(function (error) {
      if (mine !== turn) return work()
      working = null
      titleChanged()
      if (error) throw error
    })
  }
  function again() {
    turn++
    if (leave) leave()
    if (!working) (working = work()).catch(warn)
    return working
  }
  function routeChanged() {
    if (seen !== (seen = location.href) && given) again()
  }
  function titleChanged() { if (!working && titled !== null && titled !== document.title) again() }

  window.wechatSign = function (data, options) {
    if (!window.Promise) return
    given = data || given || {}
    sdk = (options && options.wx) || sdk
    server = (options && options.server) || server
    return again()
  }
  window.wechatSign.fetchConfig = fetchConfig // its two steps, for the server's own page
  window.wechatSign.configure = configure
  ;['pushState', 'replaceState'].forEach(function (name) {
    var original = history[name]
    history[name] = function () {
      try { return original.apply(this, arguments) } finally { routeChanged() }
    }
  })
  addEventListener('popstate', routeChanged) // of the fragment, too
  addEventListener('online', function () { if (offline && given) again() })
  addEventListener('pageshow', function (event) { if (event.persisted && given) again() })
  if (window.MutationObserver) new MutationObserver(titleChanged).observe(document.head, {
    childList: true, subtree: true, characterData: true
  })
  if (window.wechatShare) window.wechatSign(window.wechatShare)
})()
