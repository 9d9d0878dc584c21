// express with co-wechat-api, which keeps its ticket in memory unless it is told otherwise.
'use strict'

const express = require('express')
const WechatAPI = require('co-wechat-api')

const {API, APPID, PORT, SECRET} = process.env
const api = new WechatAPI(APPID, SECRET)
api.prefix = `${API}/cgi-bin/` // a field, and no option of the constructor

const app = express()
app.get('/getApi', async (req, res) => {
  res.json(await api.getJsConfig({
    debug: true,
    jsApiList: ['updateAppMessageShareData', 'updateTimelineShareData'],
    url: req.query.url,
  }))
})
app.listen(PORT, '127.0.0.1', 1024)
