// Stands in for WeChat's script: it checks the signature as the phone does, against the url that
// the phone takes (the entry's on iOS, the current one elsewhere), and answers in order. It renames
// inside the very lists that it is given, as WeChat's script does.
(function () {
  const iOS = /iPhone/.test(navigator.userAgent)
  const entry = location.href.split('#')[0]
  const completes = []
  let state = 0, onError = null, permitted = [], queue = Promise.resolve()
  const RENAMED = {
    onMenuShareAppMessage: 'menu:share:appmessage', onMenuShareTimeline: 'menu:share:timeline',
    previewImage: 'imagePreview', getLocation: 'geoLocation', chooseWXPay: 'getBrandWCPayRequest'
  }
  const rename = names => names.forEach((name, at) => { names[at] = RENAMED[name] || name })
  const invoke = step => { queue = queue.then(step) }
  window.wxCalls = []
  window.wx = {
    config (config) {
      rename(config.jsApiList)
      invoke(async () => {
        const url = iOS ? entry : location.href.split('#')[0]
        const problem = await window.phoneChecks({ ...config, url })
        window.wxCalls.push({ name: 'config', url, debug: config.debug, problem })
        permitted = problem ? [] : config.jsApiList
        state = 1
        if (problem && onError) onError({ errMsg: 'config:' + problem })
        completes.splice(0).forEach(complete => complete())
      })
    },
    ready (complete) { state ? complete() : completes.push(complete) },
    error (callback) { onError = callback },
    checkJsApi ({ jsApiList, success, complete }) {
      const asked = jsApiList.slice()
      rename(jsApiList)
      invoke(async () => {
        const answer = { errMsg: 'checkJsApi:ok', checkResult: {} }
        asked.forEach((name, at) => {
          answer.checkResult[name] = permitted.includes(jsApiList[at]) && name !== 'tooNewApi'
        })
        if (success) success(answer)
        if (complete) complete(answer)
      })
    }
  }
  for (const name of ['updateAppMessageShareData', 'updateTimelineShareData', 'onMenuShareAppMessage',
    'onMenuShareTimeline']) {
    window.wx[name] = data => invoke(async () => {
      const good = permitted.includes(RENAMED[name] || name)
      window.wxCalls.push({ name, good, title: data.title, link: data.link })
      if (good && data.success) data.success({ errMsg: name + ':ok' })
      if (!good && data.fail) data.fail({ errMsg: name + ':fail, the permission value is offline verifying' })
    })
  }
})()
