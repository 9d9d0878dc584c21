// The types of wechat-sign.js, for editors and compilers. They lie beside it.

/** What a friend gets. What is missing is taken from the page: title, description, og:image and, as
 * link, its address without what WeChat added. */
export interface WechatShare {
  title?: string
  desc?: string
  link?: string
  imgUrl?: string
}

/** A function is called for each route of a single-page app; an object is for the page that it is
 * given on. */
export type WechatShared = WechatShare | (() => WechatShare | void | Promise<WechatShare | void>)

export interface WechatSignOptions {
  /** WeChat's script, where it is imported and therefore not in window.wx. */
  wx?: object
  /** The signing server, where the script does not come from it: `https://sign.example.com`. */
  server?: string
}

export interface WechatSign {
  /** Shares the page and all routes that follow. Called again without data, it shares what changed.
   * Resolves when WeChat has it, and outside WeChat; rejects with the reason. It needs no catch. */
  (share?: WechatShared, options?: WechatSignOptions): Promise<void>
  /** Calls wx.config for the page's own calls, as wx.scanQRCode, and again where a route wants it.
   * Without a list, that of the server counts. */
  config(options?: WechatSignOptions & { jsApiList?: string[] }): Promise<void>
}

declare global {
  var wechatSign: WechatSign
  interface Window {
    wechatSign: WechatSign
    /** What to share, set before the script is there. */
    wechatShare?: WechatShared
  }
}
