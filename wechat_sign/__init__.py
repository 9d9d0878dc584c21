"""Signatures for WeChat's JS-SDK: everything that is WeChat's, nothing that is Tornado's."""

__version__ = "1.0.0"
