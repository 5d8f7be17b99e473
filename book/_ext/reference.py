"""`.. reference:: compresskit.bits` documents a module: a table of its public names, then each.

The names are read from the module, in the order of its source, so the page cannot fall behind.
"""

import inspect
from importlib import import_module

from sphinx.util.docutils import SphinxDirective


def public_names(module):
    """Functions and classes defined in `module` whose names have no leading underscore."""

    def line(item):
        return inspect.getsourcelines(inspect.unwrap(item[1]))[1]

    own = [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value)))
        and getattr(value, "__module__", None) == module.__name__
    ]
    return [name for name, _ in sorted(own, key=line)]


class Reference(SphinxDirective):
    required_arguments = 1

    def run(self):
        name = self.arguments[0]
        module = import_module(name)
        names = public_names(module)
        lines = [
            f".. automodule:: {name}",
            "",
            ".. autosummary::",
            "   :nosignatures:",
            "",
            *(f"   {public}" for public in names),
            "",
        ]
        for public in names:
            kind = "class" if inspect.isclass(getattr(module, public)) else "function"
            lines += [f".. auto{kind}:: {name}.{public}", *["   :members:"] * (kind == "class"), ""]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app):
    app.add_directive("reference", Reference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
