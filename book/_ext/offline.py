"""Pages that ask nothing of the network, repaired where the tools that write them slip.

MathJax comes along, and code for live kernels stays out.
"""

import re
import shutil
from importlib.metadata import distribution
from pathlib import Path

# What a page with TeX in it needs: 1.6 MB of the 24 MB which the package holds.
MATHJAX = ("tex-mml-chtml.js", "ui/lazy.js", "output/chtml/fonts/woff-v2/*.woff")


def copy_mathjax(app, exception):
    if exception or app.builder.format != "html":
        return
    package = distribution("sphinx-mathjax-offline")
    source = Path(package.locate_file("sphinx-mathjax-offline/static/mathjax"))
    target = Path(app.outdir, "_static", "mathjax")
    for pattern in MATHJAX:
        files = sorted(source.glob(pattern))
        if not files:
            raise FileNotFoundError(f"sphinx-mathjax-offline holds no {pattern}")
        for file in files:
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def drop_scripts(app, pagename, templatename, context, doctree):
    """Leave out Thebe, which loads from elsewhere, and inline scripts that are there twice.

    Sphinx 7.4 repeats each inline script added after `builder-inited`.
    """
    kept, bodies = [], set()
    for script in context.get("script_files", []):
        body = script.attributes.get("body")
        if "thebe" in f"{script.filename} {body}".lower() or (body and body in bodies):
            continue
        bodies.add(body)
        kept.append(script)
    if "script_files" in context:
        context["script_files"][:] = kept
    if "css_files" in context:
        context["css_files"][:] = [
            c for c in context["css_files"] if "thebe" not in str(c.filename)
        ]


def repair_body(app, pagename, templatename, context, doctree):
    """Two slips in the pages' HTML.

    sphinx-proof gives every proof one and the same id, which must be unique on its page. And
    docutils calls a bibliography a list, while its entries say that they are something else.
    """
    if body := context.get("body"):
        body = re.sub(r' id="proof(-content)?"', "", body)
        context["body"] = body.replace('role="list" class="citation-list"', 'class="citation-list"')


def nest_modules(app, pagename, templatename, context, doctree):
    """Sphinx puts the list of a package's modules beside its entry; it belongs into the entry."""
    if pagename == "_modules/index":
        body = context["body"].replace("</li>\n<ul>", "\n<ul>")
        context["body"] = body.replace("</ul><li>", "</ul></li>\n<li>").replace(
            "</ul></ul>", "</ul></li></ul>"
        )


def setup(app):
    app.connect("build-finished", copy_mathjax)
    app.connect("html-page-context", drop_scripts, priority=900)
    app.connect("html-page-context", repair_body, priority=900)
    app.connect("html-page-context", nest_modules, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
