"""`.. reference:: compresskit.bits` documents a module: a table of its public names, then each.

The names are read from the module, in the order of its source, so the page cannot fall behind.
Constants have no page of their own to fill; `.. autodata::` in the page documents one.
"""

import inspect
import re
from importlib import import_module

from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxDirective

BAR = re.compile(r"(?<!\\)\|(?=(?:[^`]*`[^`]*`)*[^`]*$)")  # outside of `code`
ESCAPED_BAR = r"\\|"
RAISES = re.compile(r"(\w+) : (.+)")


def public_names(module):
    """What the module lists in `__all__`, else what it defines without a leading underscore.

    A package lists what its files define, and chooses an order.
    """
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if callable(getattr(module, name))]

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


def plain_text(app, what, name, obj, options, lines):
    """Docstrings are to be read as they stand; two of their habits mean something else here.

    |x| is the magnitude of x, where reStructuredText would look for a substitution. And an entry
    under "Raises" has its condition on the same line, where napoleon expects it on the next.
    """
    section, result = "", []
    for number, line in enumerate(lines):
        if set(line.strip()) == {"-"} and number:
            section = lines[number - 1].strip()
        entry = RAISES.fullmatch(line) if section == "Raises" else None
        if entry:
            result += [entry[1], f"    {BAR.sub(ESCAPED_BAR, entry[2])}"]
        elif line.lstrip().startswith(">>>"):
            result.append(line)
        else:
            result.append(BAR.sub(ESCAPED_BAR, line))
    lines[:] = result


def skip(app, what, name, obj, skipped, options):
    """A named tuple's docstring explains its fields; what Python adds to each says nothing."""
    return True if (obj.__doc__ or "").startswith("Alias for field number") else None


def setup(app):
    # A property's sentence may hold a colon; napoleon would take what stands before it for a type.
    GoogleDocstring._parse_attribute_docstring = lambda self: list(self._consume_to_end())
    app.connect("autodoc-process-docstring", plain_text, priority=400)  # before napoleon's 500
    app.connect("autodoc-skip-member", skip)
    app.add_directive("reference", Reference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
