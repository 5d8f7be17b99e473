"""The book's address on the web is given by who publishes it, in BOOK_URL; without it, none is
claimed: no canonical links, no sitemap, no preview cards."""

import os


def use_address(app, config):
    url = os.environ.get("BOOK_URL", "").rstrip("/")
    if url:
        config.html_baseurl = config.ogp_site_url = url + "/"
        config.ogp_social_cards = {"enable": False}
        config.sitemap_url_scheme = "{link}"


def setup(app):
    if os.environ.get("BOOK_URL"):
        app.setup_extension("sphinxext.opengraph")
        app.setup_extension("sphinx_sitemap")
        app.connect("config-inited", use_address, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
