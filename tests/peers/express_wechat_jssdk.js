// express with wechat-jssdk, as its README has it, its store in memory.
'use strict'

const express = require('express')
const {JSSDK, Store, Wechat} = require('wechat-jssdk')

const {API, APPID, EXPIRE, PORT, SECRET} = process.env
// It takes a ticket, and the signature that it keeps for each url, to live for 119 minutes, whatever
// WeChat says of it, and has no option for that.
if (EXPIRE < 7000) JSSDK.isTokenExpired = date => Date.now() - new Date(date) > EXPIRE * 1000

const wx = new Wechat({
  appId: APPID,
  appSecret: SECRET,
  accessTokenUrl: `${API}/cgi-bin/token`,
  ticketUrl: `${API}/cgi-bin/ticket/getticket`,
  store: new Store(),
})
const app = express()
app.get('/getApi', async (req, res) => {
  res.json(await wx.jssdk.getSignature(req.query.url))
})
app.listen(PORT, '127.0.0.1', 1024)
