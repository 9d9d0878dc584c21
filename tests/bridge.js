// Stands in for the phone: WeixinJSBridge and nothing else, as WeChat's own script calls it. It
// checks a signature as WeChat does, keeps the rights by url, and knows what friends would get.
// `setup` says what kind of phone this is; what tests ask it is in window.phone.
(function (setup) {
  if (window.phone) return
  const pageUrl = () => location.href.split('#')[0]
  const entry = pageUrl()
  const rights = {} // the names that may be called, by url
  const handlers = {}
  const waiting = []
  let busy = false
  const phone = window.phone = { calls: [], friend: null, timeline: null, problems: setup.problems }
  const url = () => setup.keepsEntry ? entry : pageUrl()

  function sha1 (text) {
    const bytes = [...new TextEncoder().encode(text), 0x80]
    const length = (bytes.length - 1) * 8
    while (bytes.length % 64 !== 56) bytes.push(0)
    for (let shift = 56; shift >= 0; shift -= 8) bytes.push(Math.floor(length / 2 ** shift) & 255)
    const rotate = (word, by) => (word << by) | (word >>> (32 - by))
    let state = [0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0]
    for (let block = 0; block < bytes.length; block += 64) {
      const words = []
      for (let at = 0; at < 80; at++) {
        words.push(at < 16
          ? [0, 1, 2, 3].reduce((word, byte) => (word << 8) | bytes[block + 4 * at + byte], 0)
          : rotate(words[at - 3] ^ words[at - 8] ^ words[at - 14] ^ words[at - 16], 1))
      }
      let [a, b, c, d, e] = state
      words.forEach((word, at) => {
        const [mix, key] = [[(b & c) | (~b & d), 0x5a827999], [b ^ c ^ d, 0x6ed9eba1],
          [(b & c) | (b & d) | (c & d), 0x8f1bbcdc], [b ^ c ^ d, 0xca62c1d6]][Math.floor(at / 20)]
        const next = (rotate(a, 5) + mix + e + key + word) | 0
        ;[a, b, c, d, e] = [next, a, rotate(b, 30), c, d]
      })
      state = [a, b, c, d, e].map((word, at) => (word + state[at]) | 0)
    }
    return state.map(word => (word >>> 0).toString(16).padStart(8, '0')).join('')
  }

  // What WeChat has against a signature: a reason, or nothing.
  function problemOf (args, signed) {
    if (phone.problems.length) return phone.problems.shift()
    if (!args.verifyJsApiList.length) return 'invalid_args'
    const right = sha1(`jsapi_ticket=${setup.ticket}&noncestr=${args.verifyNonceStr}` +
      `&timestamp=${args.verifyTimestamp}&url=${signed}`)
    return args.verifyAppId === setup.appid && args.verifySignature === right ? '' : 'invalid_signature'
  }

  const permitted = name => (rights[url()] || []).includes(name)

  // What the phone does with each call; its answer follows after a while.
  const deals = {
    preVerifyJSAPI (args, call) {
      const signed = call.url = url()
      const problem = call.problem = problemOf(args, signed)
      return () => {
        rights[signed] = problem ? [] : [...args.verifyJsApiList] // a failure sets them back
        const more = setup.tells && problem === 'invalid_signature' ? { realAuthUrl: signed } : {}
        return { err_msg: 'pre_verify_jsapi:' + (problem ? 'fail_' + problem : 'ok'), ...more }
      }
    },
    checkJsApi (args) {
      return () => {
        const result = {}
        args.jsApiList.forEach(name => { result[name] = permitted(name) && !setup.lacks.includes(name) })
        return { err_msg: 'checkJsApi:ok', checkResult: setup.android ? JSON.stringify(result) : result }
      }
    },
    getNetworkType: () => () => ({ err_msg: 'network_type:wifi' }),
    sendAppMessage: args => () => { sending(args); return { err_msg: 'send_app_msg:confirm' } },
    shareTimeline: args => () => { sending(args); return { err_msg: 'share_timeline:ok' } },
    updateAppMessageShareData: (args, call) => update('friend', args, call),
    updateTimelineShareData: (args, call) => update('timeline', args, call)
  }
  function update (whom, args, call) {
    return () => {
      const told = setup.answers[call.name]
      call.good = !told && permitted(call.name)
      if (call.good) phone[whom] = { title: args.title, desc: args.desc, link: args.link, imgUrl: args.imgUrl }
      return { err_msg: call.name + ':' + (told || (call.good ? 'ok' : 'fail, the permission value is offline verifying')) }
    }
  }

  function invoke (name, args, answered) {
    const call = { name, args: JSON.parse(JSON.stringify(args || {})), page: location.href }
    const deal = () => {
      busy = true
      phone.calls.push(call)
      const answer = setup.lacks.includes(name) || !deals[name]
        ? () => ({ err_msg: 'system:function_not_exist' }) : deals[name](call.args, call)
      if (!setup.silent.includes(name)) {
        setTimeout(() => {
          call.answered = true
          const told = answer()
          busy = false
          if (answered) answered(told)
          next()
        }, setup.delays[name] || setup.delay)
      } else busy = false
    }
    waiting.push(deal)
    next()
  }
  function next () {
    while (waiting.length && !(setup.queue && busy)) waiting.shift()()
  }

  // A friend is sent this page by the menu, as phones do that know the old names alone. Resolves
  // to what WeChat's script has for that.
  let sending = null
  phone.send = name => new Promise(resolve => {
    sending = args => resolve({ title: args.title, link: args.link, imgUrl: args.img_url })
    handlers[name] ? handlers[name]({ err_msg: name + ':ok' }) : resolve(null)
  })
  phone.count = name => phone.calls.filter(call => call.name === name).length

  function arrive () {
    const bridge = { invoke, on (name, handler) { handlers[name] = handler } }
    window.WeixinJSBridge = setup.sealed ? Object.freeze(bridge) : bridge
    document.dispatchEvent(new Event('WeixinJSBridgeReady'))
  }
  if (setup.when === 'early') arrive()
  if (setup.when === 'late') setTimeout(arrive, 300)
})(__SETUP__)
