/* wechatSign({title, desc, link, imgUrl}) makes a page share as it should inside WeChat.

   It asks the server that this script came from for a signature, calls wx.config, and sets the
   share data by the new and the old names. It returns a Promise that settles with the reason,
   and signs anew when a single-page app changes its route. Load WeChat's own script before it:

   <script src="https://res.wx.qq.com/open/js/jweixin-1.6.0.js"></script>
   <script src="https://sign.example.com/wechat-sign.js"></script>

   As an ES module: import 'https://sign.example.com/wechat-sign.js', then the same function. */

(function () {
  'use strict'

  var SHARING = ['updateAppMessageShareData', 'updateTimelineShareData',
    // Android ignores the new names where the old ones are not there as well.
    'onMenuShareAppMessage', 'onMenuShareTimeline']
  var PATIENCE = 15000 // ms for WeChat to answer wx.config
  var iOS = /iPhone|iPad|iPod/.test(navigator.userAgent)

  var server = ownAddress().replace(/\/wechat-sign\.js.*$/, '')
  var entry = pageUrl() // what WeChat on iOS takes for the url, whatever the route is now
  var signed = null     // the url that WeChat last accepted or is being asked to accept
  var current = null    // the last share data
  var turn = 0          // only the last call's outcome counts
  var configured = null // the Promise of the last wx.config

  function ownAddress() {
    if (document.currentScript) return document.currentScript.src
    return /https?:\/\/[^\s()@]*\/wechat-sign\.js/.exec(new Error().stack)[0] // a module
  }

  function pageUrl() {
    return location.href.split('#')[0]
  }

  // Resolves to what wx.config takes. Its Error has the url that was `sent`, the answer's `status`
  // (0: none), the server's `reason` and `errcode`, and the url that was `signed` in its place.
  function fetchConfig(url) {
    return fetch(server + '/getApi?url=' + encodeURIComponent(url), {
      // The whole Referer tells the server what is meant where a url can be read in two ways.
      referrerPolicy: 'no-referrer-when-downgrade'
    }).then(function (answer) {
      return answer.json().catch(function () {}).then(function (body) {
        var arrived = answer.headers.get('Signed-Url') // the first 2048 characters of it, if any
        var said = body && body.error
        if (!answer.ok || !body || !body.signature) {
          throw problem(url, 'the signing server answers ' + answer.status + (said ? ': ' + said
            : (body ? ' and other JSON than its own' : ' and not JSON') +
              ': is /getApi handed on to the signing server?'),
          { status: answer.status, reason: said, errcode: body && body.errcode })
        }
        if (arrived !== null && arrived !== url.slice(0, 2048)) {
          throw problem(url, 'a proxy between this page and the server changed the url: ' + url +
            ' was sent, ' + arrived + ' was signed', { status: answer.status, signed: arrived })
        }
        return body
      })
    }, function () {
      throw problem(url, 'no answer of the signing server at ' + server + ' can be read: it is down, ' +
        'a proxy answers for it, or its page_hosts lacks ' + location.hostname, { status: 0 })
    })
  }

  function problem(sent, message, facts) {
    return Object.assign(new Error(message), { sent: sent }, facts)
  }

  // Resolves to the phone's answer about jsApiList when WeChat accepts, rejects with its message.
  function configure(config) {
    return new Promise(function (resolve, reject) {
      var silence = Object.assign(new Error('WeChat does not answer wx.config'), { silent: true })
      setTimeout(reject, PATIENCE, silence)
      wx.error(function (error) { reject(new Error(error.errMsg || 'config:fail')) })
      wx.config(copy(config))
      wx.ready(function () { // comes after error, too
        // From the second wx.config on, ready comes at once. checkJsApi waits its turn.
        wx.checkJsApi({ jsApiList: copy(config.jsApiList), complete: resolve })
      })
    })
  }

  // WeChat's script renames inside the very list that it is given.
  function copy(value) {
    return JSON.parse(JSON.stringify(value))
  }

  function sign(url, otherUrl) {
    signed = url
    return fetchConfig(url).then(function (config) {
      var names = config.jsApiList
      SHARING.forEach(function (name) {
        if (names.indexOf(name) < 0) names.push(name)
      })
      return configure(config)
    }).catch(function (error) {
      if (!otherUrl || !/invalid signature/.test(error.message)) throw error
      return sign(otherUrl)
    })
  }

  // Resolves when WeChat took the data by the new name, rejects with its message where it did not.
  function share(data) {
    var filled = {
      title: data.title || document.title, desc: data.desc || '',
      link: data.link || pageUrl(), imgUrl: data.imgUrl || ''
    }
    return new Promise(function (resolve, reject) {
      setTimeout(resolve, 3000) // clients that never say
      SHARING.forEach(function (name, place) {
        var answers = place > 0 ? {} : {
          success: resolve, fail: function (error) { reject(new Error(error.errMsg)) }
        }
        if (wx[name]) wx[name](Object.assign(answers, filled))
      })
    })
  }

  function apply(mine) {
    var url = iOS ? entry : pageUrl()
    if (url !== signed || !configured) {
      // Once more after `invalid signature`: with a fresh one, and for the other url if there is one.
      configured = sign(url, iOS ? pageUrl() : url)
      configured.catch(function () { if (mine === turn) configured = null })
    }
    return configured.then(function () {
      if (mine === turn) return share(current)
    })
  }

  window.wechatSign = function (data) {
    if (!/MicroMessenger/i.test(navigator.userAgent)) {
      return Promise.reject(new Error('this page is not open inside WeChat'))
    }
    if (!window.wx || !wx.config) {
      return Promise.reject(new Error('WeChat\'s script jweixin-1.6.0.js is not loaded'))
    }
    current = data || {}
    return apply(++turn)
  }
  // Its two steps, for the server's own page, which shows each.
  Object.assign(window.wechatSign, { fetchConfig: fetchConfig, configure: configure })

  function routeChanged() {
    if (current === null) return
    if (iOS) configured = null // its open tags die with the route unless wx.config is called again
    apply(++turn).catch(function (error) { console.warn('wechatSign: ' + error.message) })
  }

  ['pushState', 'replaceState'].forEach(function (name) {
    var original = history[name]
    history[name] = function () {
      var before = pageUrl()
      var result = original.apply(this, arguments)
      if (pageUrl() !== before) routeChanged()
      return result
    }
  })
  window.addEventListener('popstate', routeChanged)
})()
